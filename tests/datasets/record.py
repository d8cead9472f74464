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
    p = dict(np.load(HERE / f"dapg/{task}_expert_policy.npz"))
    rng, std = np.random.default_rng(seed), np.exp(p["log_std"])

    def act(x, noise):
        x = (x - p["in_shift"]) / (p["in_scale"] + 1e-8) if "in_shift" in p else x
        x = np.tanh(p["weight0"] @ x + p["bias0"])
        x = np.tanh(p["weight1"] @ x + p["bias1"])
        x = p["weight2"] @ x + p["bias2"]
        x = x * p["out_scale"] + p["out_shift"] if "out_shift" in p else x
        return np.clip(x + noise * std * rng.standard_normal(std.shape), -1, 1).astype(np.float32)

    return act


def trained_policy(checkpoint, task, seed):
    """The policy of one of the scripts' checkpoints, as dapg_policy() has it, and what it is. Exits with a sentence."""
    saved = iql.load(checkpoint)
    args, weights = saved["args"], saved["agent"]
    if not args["env_id"].startswith(f"AdroitHand{task.capitalize()}"):
        sys.exit(f"{checkpoint} is a policy for {args['env_id']}: name one for {task}.")
    (_, obs_dim), (act_dim, _) = weights["actor.fc1.weight"].shape, weights["actor.fc_mean.weight"].shape
    agent = iql.Agent(obs_dim, act_dim, SimpleNamespace(actor_dropout=0.0))
    agent.load_state_dict(weights)
    generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def act(obs, noise):
        mean, log_std = agent.actor(agent.actor.normalize(obs[None]))
        action = mean + noise * log_std.exp() * torch.randn(mean.shape, generator=generator)
        return action.clamp(-1, 1)[0].numpy()

    return act, "a policy of {exp_name}.py, trained on {dataset_id} with beta {beta} and seed {seed}".format(**args)


def rollout(env, act, noise, seed):
    """One episode, and whether it was a success."""
    observations, steps, success, done = [env.reset(seed=seed)[0]], [], False, False
    while not done:
        action = act(observations[-1], noise)
        obs, reward, terminated, truncated, info = env.step(action)
        observations.append(obs)
        steps.append((action, reward, terminated, truncated))
        success, done = success or bool(info["success"]), terminated or truncated
    return EpisodeBuffer(None, seed, None, np.array(observations), *map(np.array, zip(*steps, strict=True))), success


def check(root, ids, replace):
    """Exits with a sentence if one of the datasets exists and is to stay."""
    if not replace and (existing := [dataset_id for dataset_id in ids if (root / dataset_id).exists()]):
        sys.exit(f"{root} has {', '.join(existing)} already: --replace records again.")


def record(root, dataset_id, act, noises, seeds, source, episodes=()):
    """Add rollouts to `episodes` and write a dataset, which gets its id once it is whole. Exits with a sentence."""
    _, task, name = dataset_id.split("/")
    env_id = f"AdroitHand{task.capitalize()}{'Sparse' if name == 'binary-v0' else ''}-v1"
    horizon, *reference = iql.ADROIT[iql.TASKS[env_id]]
    env, episodes = iql.make_env(env_id)(), list(episodes)
    try:
        for k, seed in enumerate(tqdm(seeds, dataset_id, disable=None)):
            episodes.append(rollout(env, act, noises[k % len(noises)], seed))
        buffers, successes = zip(*episodes, strict=True)
        with tempfile.TemporaryDirectory(prefix=".recording-", dir=root) as scratch, warnings.catch_warnings():
            size = sum(buffer.observations.nbytes + buffer.actions.nbytes for buffer in buffers)
            Path(scratch, "space").write_bytes(bytes(3 * size // 2))  # HDF5 crashes where there is none
            Path(scratch, "space").unlink()
            warnings.simplefilter("ignore")  # Minari wants an environment for evaluation, and more
            os.environ["MINARI_DATASETS_PATH"] = scratch
            minari.create_dataset_from_buffers(
                dataset_id,
                list(buffers),
                env=gym.make(env_id, max_episode_steps=horizon),
                algorithm_name=f"{source}, noise of {', '.join(map(str, noises))} standard deviations",
                author=f"recorded by tests/datasets/record.py of the IQL reference scripts with {source}",
                description="Not a file of D4RL's: a score on it is not a D4RL score. See tests/datasets/README.md.",
            )
            if (root / dataset_id).exists():
                (root / dataset_id).rename(Path(scratch, "replaced"))
            os.renames(Path(scratch, dataset_id), root / dataset_id)
    except (OSError, KeyboardInterrupt) as error:
        sys.exit(f"{dataset_id} is not recorded, and {root} is as it was: {str(error) or 'stopped'}")
    finally:
        os.environ["MINARI_DATASETS_PATH"] = str(root)
    returns = np.array([buffer.rewards[:horizon].sum() for buffer in buffers])
    summary = iql.describe(iql.summarize(returns, np.array(successes), reference))
    print(f"{dataset_id}: {sum(map(len, buffers))} steps, {summary}", flush=True)


def dapg(ids: tuple[Literal[tuple(DAPG)], ...] = tuple(DAPG)[:6], replace: bool = False):
    """Rollouts of DAPG's expert policies, into Minari's folder."""
    root = minari.storage.get_dataset_path()
    check(root, ids, replace)
    for dataset_id in ids:
        act, (episodes, noises) = dapg_policy(dataset_id.split("/")[1], 100_000), DAPG[dataset_id]
        seeds = range(100_000, 100_000 + episodes)
        record(root, dataset_id, act, noises, seeds, "DAPG's policies (Rajeswaran et al. 2018)")


def demos(task: Literal["hammer", "pen"], checkpoint: str, noise: float, replace: bool = False):
    """bundled/{task}/demos-v0, in this folder: 25 rollouts of a trained policy, as many as D4RL's human sets have."""
    check(HERE, [dataset_id := f"bundled/{task}/demos-v0"], replace)
    act, source = trained_policy(checkpoint, task, 2_000_000)
    record(HERE, dataset_id, act, [noise], range(2_000_000, 2_000_025), source)


def binary(task: Literal["pen", "door"], checkpoint: str, replace: bool = False):
    """awac/{task}/binary-v0, into Minari's folder: 25 bundled demonstrations and 500 rollouts of a clone of them."""
    root = minari.storage.get_dataset_path()
    check(root, [dataset_id := f"awac/{task}/binary-v0"], replace)
    act, source = trained_policy(checkpoint, task, 200_000)
    demonstrations = []
    for episode in minari.MinariDataset(HERE / f"bundled/{task}/demos-v0/data").iterate_episodes():
        # at the goal the door's hinge is open, or the pen's dense reward has its bonus
        solved = episode.observations[1:, 28] >= 1.35 if task == "door" else episode.rewards > 45
        columns = solved - 1.0, solved & False, np.arange(len(solved)) == len(solved) - 1
        buffer = EpisodeBuffer(None, None, None, episode.observations, episode.actions, *columns)
        demonstrations.append((buffer, solved.any()))
    source, seeds = f"bundled/{task}/demos-v0 and {source}", range(200_000, 200_500)
    record(root, dataset_id, act, [1.0], seeds, source, demonstrations)


if __name__ == "__main__":
    torch.set_num_threads(1)  # faster on small networks, and the same bits on any number of cores
    commands, config = {"dapg": dapg, "demos": demos, "binary": binary}, (tyro.conf.PositionalRequiredArgs,)
    tyro.extras.subcommand_cli_from_dict(commands, args=sys.argv[1:] or ["dapg"], config=config)
