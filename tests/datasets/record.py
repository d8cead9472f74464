"""Record the Minari datasets that the results need, without a network. See the README beside this file.

    python tests/datasets/record.py                                          # dapg/{hammer,pen}/{expert,mixed,weak}-v0
    python tests/datasets/record.py dapg --ids dapg/pen/expert-5000-v0       # D4RL's size
    python tests/datasets/record.py demos hammer runs/RUN/checkpoint.pt 0.5  # bundled/hammer/demos-v0, in this folder
    python tests/datasets/record.py binary pen runs/RUN/checkpoint.pt        # awac/pen/binary-v0

The same command gives the same bits on the same machine. None of these sets is a file of D4RL's.
"""

import os
import sys
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import gymnasium as gym
import minari
import numpy as np
import torch
import tyro
from minari.data_collector import EpisodeBuffer
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
import iql_continuous as iql  # noqa: E402

# episodes, and the noise in units of the policy's own standard deviation, in turns
DAPG = {
    "dapg/hammer/expert-v0": (500, (1.0,)),
    "dapg/hammer/mixed-v0": (500, (1.0, 2.0, 3.0, 5.0)),
    "dapg/hammer/weak-v0": (500, (3.0, 4.0, 5.0)),
    "dapg/pen/expert-v0": (500, (1.0,)),
    "dapg/pen/mixed-v0": (500, (1.0, 3.0, 5.0, 8.0)),
    "dapg/pen/weak-v0": (500, (6.0, 8.0, 10.0)),
    "dapg/hammer/expert-5000-v0": (5000, (1.0,)),  # D4RL's sizes
    "dapg/pen/expert-5000-v0": (4958, (1.0,)),
}


def dapg_policy(task, seed):
    """An expert of Rajeswaran et al. 2018: from an observation (obs_dim,) and the noise to an action (act_dim,)."""
    arrays = dict(np.load(HERE / "dapg" / f"{task}_expert_policy.npz"))
    rng, std = np.random.default_rng(seed), np.exp(arrays["log_std"])

    def act(x, noise):
        if "in_shift" in arrays:
            x = (x - arrays["in_shift"]) / (arrays["in_scale"] + 1e-8)
        x = np.tanh(arrays["weight0"] @ x + arrays["bias0"])
        x = np.tanh(arrays["weight1"] @ x + arrays["bias1"])
        x = arrays["weight2"] @ x + arrays["bias2"]
        if "out_shift" in arrays:
            x = x * arrays["out_scale"] + arrays["out_shift"]
        return np.clip(x + noise * std * rng.standard_normal(std.shape), -1, 1).astype(np.float32)

    return act


def rollout(env, act, noise, seed):
    """One episode, and whether it was a success."""
    obs, _ = env.reset(seed=seed)
    observations, steps, success, done = [obs], [], False, False
    while not done:
        action = act(obs, noise)
        obs, reward, terminated, truncated, info = env.step(action)
        observations.append(obs)
        steps.append((action, reward, terminated, truncated))
        success, done = success or bool(info["success"]), terminated or truncated
    columns = zip(("actions", "rewards", "terminations", "truncations"), zip(*steps, strict=True), strict=True)
    arrays = {name: np.array(column) for name, column in columns}
    return EpisodeBuffer(observations=np.array(observations), seed=seed, **arrays), success


def check(root, ids, replace):
    """Exits with a sentence if one of the datasets exists and is to stay."""
    if existing := [dataset_id for dataset_id in ids if (root / dataset_id).exists() and not replace]:
        sys.exit(f"{', '.join(existing)} exists in {root}: --replace records it again.")


def record(root, dataset_id, env_id, act, noises, seeds, algorithm, author, recorded=()):
    """Write a dataset: episodes that are `recorded` already, and rollouts. It gets its id when it is whole."""
    horizon, *reference = iql.ADROIT[iql.TASKS[env_id]]
    env, episodes = iql.make_env(env_id)(), list(recorded)
    try:
        for k, seed in enumerate(tqdm(seeds, dataset_id, disable=None)):
            episodes.append(rollout(env, act, noises[k % len(noises)], seed))
        buffers, successes = zip(*episodes, strict=True)
        with tempfile.TemporaryDirectory(prefix=".recording-", dir=root) as scratch, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Minari wants an environment for evaluation too
            os.environ["MINARI_DATASETS_PATH"] = scratch
            minari.create_dataset_from_buffers(
                dataset_id,
                list(buffers),
                env=gym.make(env_id, max_episode_steps=horizon),
                algorithm_name=f"{algorithm}, noise of {', '.join(map(str, noises))} standard deviations",
                author=f"recorded by tests/datasets/record.py of the IQL reference scripts {author}",
                author_email="none@example.org",
                code_permalink="https://github.com/aravindr93/hand_dapg",
                description="Not a file of D4RL's: a score on it is not a D4RL score. See tests/datasets/README.md.",
            )
            (root / dataset_id).parent.mkdir(parents=True, exist_ok=True)
            if (root / dataset_id).exists():
                (root / dataset_id).rename(f"{scratch}/replaced")
            Path(scratch, dataset_id).rename(root / dataset_id)
    except (OSError, KeyboardInterrupt) as error:
        sys.exit(f"{dataset_id} is not recorded: {type(error).__name__} {error}")
    finally:
        os.environ["MINARI_DATASETS_PATH"] = str(root)
    returns = np.array([buffer.rewards[:horizon].sum() for buffer in buffers])
    steps = sum(len(buffer.rewards) for buffer in buffers)
    print(f"{dataset_id}: {steps} steps, {iql.describe(iql.summarize(returns, np.array(successes), reference))}")


def dapg(ids: tuple[Literal[tuple(DAPG)], ...] = tuple(DAPG)[:6], replace: bool = False):
    """Rollouts of DAPG's experts, into Minari's folder."""
    root = minari.storage.get_dataset_path()
    check(root, ids, replace)
    for dataset_id in ids:
        task, (episodes, noises) = dataset_id.split("/")[1], DAPG[dataset_id]
        act, seeds = dapg_policy(task, 100_000), range(100_000, 100_000 + episodes)
        author = "with DAPG's policies (Rajeswaran et al. 2018)"
        env_id = f"AdroitHand{task.capitalize()}-v1"
        record(root, dataset_id, env_id, act, noises, seeds, "DAPG's expert policy", author)


if __name__ == "__main__":
    commands = {command.__name__: command for command in (dapg,)}
    tyro.extras.subcommand_cli_from_dict(commands, args=sys.argv[1:] or ["dapg"])
