"""Scores are D4RL's: a random policy scores 0 under the rules, and only where the rules are D4RL's."""

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
    horizon, *reference = iql.ADROIT[task.lower()]
    assert abs(iql.summarize(returns, None, reference)["normalized_score"]) < tolerance
    assert envs.envs[0].spec.max_episode_steps == horizon == (100 if task == "Pen" else 200)


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


def test_only_the_dense_tasks_get_the_rules_under_every_name():
    for env_id in (
        "AdroitHandPen-v1",
        "AdroitHandPen",
        "gymnasium_robotics:AdroitHandPen-v1",
        "AdroitHandPenSparse-v1",
    ):
        env = iql.make_env(env_id)()
        dense = "Sparse" not in env_id
        assert ("D4RLRules" in str(env)) == dense and env.spec.max_episode_steps == (100 if dense else 200)


def test_a_score_is_0_and_100_at_the_two_returns_of_its_reference():
    for _, *reference in iql.ADROIT.values():
        for episodic_return, score in zip(reference, (0, 100), strict=True):
            stats = iql.summarize(np.array([episodic_return]), None, reference)
            assert stats["normalized_score"] == pytest.approx(score)
    stats = iql.summarize(np.array([1.0, 3.0]), np.array([True, False]), None)
    assert stats == {"episodes": 2, "episodic_return": 2, "episodic_return_std": 1, "success_rate": 0.5}
