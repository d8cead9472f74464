"""Scores are D4RL's: a random policy scores 0 under the rules, and only where the rules are D4RL's.

`golden/door_demonstrations.npz` holds the first 200 steps of two human demonstrations of door, recorded in the original
environment: its observations before each step, the actions, its rewards, and the state that each begins with. They are
those with index 12 and 16 in dapg/demonstrations/door-v0_demos.pickle of github.com/aravindr93/hand_dapg at commit
9a1de23 (Rajeswaran et al. 2018, Apache-2.0, datasets/LICENSE_DAPG), with float32 actions and observations.
"""

from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

import iql_continuous as iql

DEMONSTRATIONS = np.load(Path(__file__).parent / "golden" / "door_demonstrations.npz")


@pytest.mark.parametrize("task", ["Hammer", "Door", "Relocate", "Pen"])
def test_a_random_policy_scores_zero(task):
    episodes, tolerance = (60, 4) if task == "Pen" else (12, 0.03)
    envs, rng = gym.vector.SyncVectorEnv([iql.make_env(f"AdroitHand{task}-v1")]), np.random.default_rng(0)
    returns, _ = iql.evaluate(envs, lambda _: rng.uniform(-1, 1, envs.action_space.shape), episodes)
    horizon, *reference = iql.ADROIT[task.lower()]
    assert abs(iql.summarize(returns, None, reference)["normalized_score"]) < tolerance
    assert envs.envs[0].spec.max_episode_steps == horizon == (100 if task == "Pen" else 200)


@pytest.mark.parametrize("task, body", [("Hammer", "obj_body_id"), ("Relocate", "obj_body_id"), ("Door", None)])
def test_a_step_costs_the_distance_from_the_hand_that_it_was_paid_for(task, body):
    """Measured in the simulator, on a step of the same environment without the rules."""
    ours, own = iql.make_env(f"AdroitHand{task}-v1")(), gym.make(f"AdroitHand{task}-v1")
    rng = np.random.default_rng(0)
    for env in (ours, own):
        env.reset(seed=0)
    for _ in range(30):
        action = rng.uniform(-1, 1, own.action_space.shape).astype(np.float32)
        reward, plain, at = ours.step(action)[1], own.step(action)[1], own.unwrapped
        palm = at.data.site_xpos[at.S_grasp_site_id if body else at.grasp_site_id]
        target = at.data.xpos[at.obj_body_id] if body else at.data.site_xpos[at.handle_site_id]
        assert plain - reward == pytest.approx(0.2 * np.linalg.norm(palm - target), abs=1e-9)


def replay(k):
    """Observations before each step, and rewards, of demonstration k's actions in this repository's door."""
    env = iql.make_env("AdroitHandDoor-v1")()
    state = {name: DEMONSTRATIONS[name][k] for name in ("qpos", "qvel", "door_body_pos")}
    observations, rewards = [env.reset(options={"initial_state_dict": state})[0]], []
    for action in np.clip(DEMONSTRATIONS["actions"][k], -1, 1):
        obs, reward, terminated, truncated, _ = env.step(action)
        observations.append(obs)
        rewards.append(reward)
        assert not terminated and truncated == (len(rewards) == 200)
    return np.array(observations[:-1]), np.array(rewards)


@pytest.mark.parametrize("k", [0, 1])
def test_door_gives_the_rewards_that_the_original_environment_gave(k, monkeypatch):
    observations, rewards = replay(k)
    recorded = DEMONSTRATIONS["rewards"][k]
    # the recorded arm did not begin in the recorded first state: by step 40 nothing is left of that.
    # Contacts move single fingers by up to 0.16; latch, hinge, palm and handle stay within 0.033
    error = np.abs(observations - DEMONSTRATIONS["observations"][k])[40:]
    assert np.median(error) < 0.003 and error[:, :27].max() < 0.25 and error[:, 27:].max() < 0.05
    assert np.abs(rewards - recorded).max() < 0.01
    assert rewards.sum() == pytest.approx(recorded.sum(), rel=0.01)

    monkeypatch.setattr(iql, "TASKS", {})  # gymnasium-robotics' own rewards are not these
    _, own_rewards = replay(k)
    assert own_rewards.sum() != pytest.approx(recorded.sum(), rel=0.04)


def test_the_bundled_demonstrations_of_door_follow_d4rls_rules():
    env = iql.make_env("AdroitHandDoor-v1")()
    columns, returns = iql.load_transitions(iql.load_dataset(env.spec.id, "bundled/door/demos-v0"), env)
    summary = iql.summarize(returns, None, iql.ADROIT["door"][1:])
    assert len(columns["rewards"]) == 6729 and not columns["terminations"].any()
    told = "episodes=25, episodic_return=170.1, episodic_return_std=241.19, normalized_score=7.72"
    assert iql.describe(summary) == told
    # D4RL's reward but for its cost of joint velocities, which observations do not have
    hinge, reach = columns["next_observations"][:, 28], columns["next_observations"][:, 35:38]
    rewards = -0.1 * np.linalg.norm(reach, axis=1) - 0.1 * (hinge - 1.57) ** 2
    rewards += 2 * (hinge > 0.2) + 8 * (hinge > 1.0) + 10 * (hinge > 1.35)
    cost = rewards - columns["rewards"]
    assert 0 < cost.min() and cost.max() < 0.03


def test_a_dropped_pen_ends_the_episode_as_a_termination():
    env, rng, dropped = iql.make_env("AdroitHandPen-v1")(), np.random.default_rng(0), False
    for seed in range(3):
        env.reset(seed=seed)
        for _ in range(100):
            obs, _, terminated, *_ = env.step(rng.uniform(-1, 1, 24))
            assert terminated == (obs[26] < 0.075)
            dropped |= terminated
    assert dropped


def test_a_task_gets_its_rules_under_every_name():
    for env_id in "AdroitHandPen-v1 AdroitHandPen gymnasium_robotics:AdroitHandPen-v1 AdroitHandPenSparse-v1".split():
        env = iql.make_env(env_id)()
        assert "D4RLRules" in str(env) and env.spec.max_episode_steps == 100


@pytest.mark.parametrize("task", ["Hammer", "Door", "Relocate", "Pen"])
def test_a_binary_task_pays_0_at_the_goal_and_ends_at_its_horizon_alone(task, monkeypatch):
    """The goal is what info["success"] says, here of a stand-in: one random action in seven reaches it."""
    env_id, (horizon, episodes) = f"AdroitHand{task}Sparse-v1", (100, 20) if task == "Pen" else (200, 3)
    envs, rng = gym.vector.SyncVectorEnv([iql.make_env(env_id)]), np.random.default_rng(0)
    reference = iql.ADROIT[iql.TASKS[env_id]][1:]
    returns, successes = iql.evaluate(envs, lambda _: rng.uniform(-1, 1, envs.action_space.shape), episodes)
    score = iql.summarize(returns, successes, reference)["normalized_score"]
    assert 0 <= score <= (3 if task == "Pen" else 0)  # a random policy turns a pen to the goal by chance
    own, said = type(envs.envs[0].unwrapped), []

    def step(self, action, plain=own.step):
        obs, reward, *ends, info = plain(self, action)
        said.append(len(said) % 7 == 0)
        return obs, reward, *ends, {"success": np.bool_(said[-1])}

    monkeypatch.setattr(own, "step", step)
    env, rewards = envs.envs[0], []
    env.reset(seed=0)
    for k in range(horizon):
        _, reward, terminated, truncated, _ = env.step(rng.uniform(-1, 1, env.action_space.shape))
        rewards.append(reward)
        assert not terminated and truncated == (k == horizon - 1)
    assert rewards == [0.0 if success else -1.0 for success in said]
    solved = iql.summarize(np.array([sum(rewards)]), None, reference)["normalized_score"]
    assert solved == pytest.approx(100 * sum(said) / horizon)


def test_a_score_is_0_and_100_at_the_two_returns_of_its_reference():
    """Of a random policy and of the expert: d4rl/infos.py."""
    infos = {"pen": (96.262799, 3076.8331017826877), "hammer": (-274.856578, 12794.134825156867)}
    infos |= {"door": (-56.512833, 2880.5693087298737), "relocate": (-6.425911, 4233.877797728884)}
    for task, (_, *reference) in [*iql.ADROIT.items()][:4]:
        for episodic_return, score in zip(infos[task], (0, 100), strict=True):
            stats = iql.summarize(np.array([episodic_return]), None, reference)
            assert stats["normalized_score"] == pytest.approx(score, abs=1e-12)
    stats = iql.summarize(np.array([1.0, 3.0]), np.array([True, False]), None)
    assert stats == {"episodes": 2, "episodic_return": 2, "episodic_return_std": 1, "success_rate": 0.5}
