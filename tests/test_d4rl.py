"""Scores are D4RL's: a random policy scores 0 under the rules, and only where the rules are D4RL's."""

import copy

import gymnasium as gym
import numpy as np
import pytest

import iql_continuous as iql


@pytest.mark.parametrize(
    "task, episodes, tolerance", [("Hammer", 12, 0.03), ("Door", 12, 0.03), ("Relocate", 12, 0.03), ("Pen", 60, 4)]
)
def test_a_random_policy_scores_zero(task, episodes, tolerance):
    envs, rng = gym.vector.SyncVectorEnv([iql.make_env(f"AdroitHand{task}-v1")]), np.random.default_rng(0)
    returns, _ = iql.evaluate(envs, lambda _: rng.uniform(-1, 1, envs.action_space.shape), episodes)
    assert abs(iql.summarize(returns, None, iql.ADROIT[task.lower()][1:])["normalized_score"]) < tolerance


def test_a_dropped_pen_ends_the_episode_as_a_termination():
    env, rng = iql.make_env("AdroitHandPen-v1")(), np.random.default_rng(0)
    for seed in range(10):
        env.reset(seed=seed)
        for _ in range(100):
            obs, _, terminated, truncated, _ = env.step(rng.uniform(-1, 1, 24))
            assert terminated == (obs[26] < 0.075)
            if terminated:
                return
            if truncated:
                break
    raise AssertionError("no pen was dropped")


def wraps_rules(env):
    while isinstance(env, gym.Wrapper):
        if isinstance(env, iql.D4RLRules):
            return True
        env = env.env
    return False


@pytest.mark.parametrize("task", ["Pen", "Hammer", "Door", "Relocate"])
def test_only_the_dense_v1_tasks_get_the_rules(task, monkeypatch):
    for env_id in (f"AdroitHand{task}-v1", f"AdroitHand{task}", f"gymnasium_robotics:AdroitHand{task}-v1"):
        assert wraps_rules(env := iql.make_env(env_id)())
        assert env.spec.max_episode_steps == (100 if task == "Pen" else 200)
    assert not wraps_rules(iql.make_env(f"AdroitHand{task}Sparse-v1")())
    future = copy.copy(gym.spec(f"AdroitHand{task}-v1"))
    future.id, future.version = f"AdroitHand{task}-v2", 2
    monkeypatch.setitem(gym.registry, future.id, future)
    for env_id in (f"AdroitHand{task}-v2", f"AdroitHand{task}"):
        assert not wraps_rules(iql.make_env(env_id)())
