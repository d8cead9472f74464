"""Record a bundled dataset: rollouts of a policy that iql_continuous.py trained, with exploration noise.

    python tests/datasets/collect.py runs/RUN/checkpoint.pt 0.5     # writes tests/datasets/bundled/{task}/demos-v0

The number is the noise in units of the policy's own standard deviation.
The commands that trained the two policies, and what was recorded, are in the README beside this file.
"""

import os
import shutil
import sys
from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
import torch
from minari.data_collector import EpisodeBuffer

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT.parent.parent))
import iql_continuous as iql  # noqa: E402

EPISODES = 25  # like D4RL's human sets
SEED = 2_000_000  # reset seeds count from here, away from the evaluation's


def rollout(env, actor, noise, seed, generator):
    """One episode with actions sampled around the policy's mean, clipped to the bounds."""
    obs, _ = env.reset(seed=seed)
    steps = {name: [] for name in ("actions", "rewards", "terminations", "truncations")}
    observations, success, done = [obs], False, False
    while not done:
        with torch.no_grad():
            mean, log_std = actor(actor.normalize(obs[None]))
            action = mean + noise * log_std.exp() * torch.randn(mean.shape, generator=generator)
        action = action.clamp(-1, 1)[0].numpy()
        obs, reward, terminated, truncated, info = env.step(action)
        observations.append(obs)
        for column, value in zip(steps.values(), (action, reward, terminated, truncated), strict=True):
            column.append(value)
        success, done = success or bool(info["success"]), terminated or truncated
    arrays = {name: np.array(column) for name, column in steps.items()}
    return EpisodeBuffer(observations=np.array(observations), seed=seed, **arrays), success


if __name__ == "__main__":
    model, noise = iql.load(sys.argv[1]), float(sys.argv[2])
    env_id = model["args"]["env_id"]
    env = iql.make_env(env_id)()
    args = iql.Args(**model["args"])
    agent = iql.Agent(env.observation_space.shape[0], env.action_space.shape[0], args).eval()
    agent.load_state_dict(model["agent"])
    generator = torch.Generator().manual_seed(SEED)
    episodes, successes = zip(
        *[rollout(env, agent.actor, noise, SEED + i, generator) for i in range(EPISODES)],
        strict=True,
    )
    os.environ["MINARI_DATASETS_PATH"] = str(ROOT)
    dataset_id = f"bundled/{iql.TASKS[env_id]}/demos-v0"
    shutil.rmtree(ROOT / dataset_id, ignore_errors=True)
    minari.create_dataset_from_buffers(
        dataset_id,
        list(episodes),
        env=gym.make(env_id, max_episode_steps=env.spec.max_episode_steps),
        algorithm_name="IQL, iql_continuous.py, sampled actions",
        author="the authors of the IQL reference scripts",
        author_email="none@example.org",
        code_permalink="https://arxiv.org/abs/2110.06169",
        description="Rollouts of a policy trained by this repository, see tests/datasets/README.md. Not D4RL data.",
    )
    returns = np.array([episode.rewards.sum() for episode in episodes])
    score = iql.summarize(returns, np.array(successes), iql.ADROIT[iql.TASKS[env_id]][1:])
    steps = sum(len(episode.rewards) for episode in episodes)
    print(f"{dataset_id}: {EPISODES} episodes, {steps} steps, return {returns.mean():.1f} +- {returns.std():.1f}")
    print(score)
