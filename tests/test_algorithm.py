"""What IQL is: the expectile, the stitching it buys, and where a bootstrap ends."""

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from maze import Maze, maze_transitions
from minari.data_collector import EpisodeBuffer

import iql_continuous
import iql_finetune

SCRIPTS = pytest.mark.parametrize("script", [iql_continuous, iql_finetune], ids=lambda script: script.__name__)


def expectile_by_bisection(sample, expectile):
    """The m where expectile * E[(x - m)+] = (1 - expectile) * E[(m - x)+]."""
    low, high = sample.min(), sample.max()
    for _ in range(100):
        m = (low + high) / 2
        above, below = np.maximum(sample - m, 0).mean(), np.maximum(m - sample, 0).mean()
        low, high = (m, high) if expectile * above > (1 - expectile) * below else (low, m)
    return m


@SCRIPTS
@pytest.mark.parametrize("expectile", [0.1, 0.5, 0.7, 0.95])
def test_the_minimizer_of_the_expectile_loss_is_the_expectile(script, expectile):
    sample = np.random.default_rng(0).gamma(2.0, size=1000)
    m = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [m], max_iter=100, tolerance_grad=1e-12, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = script.expectile_loss(torch.tensor(sample) - m, expectile)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert m.item() == pytest.approx(expectile_by_bisection(sample, expectile), abs=1e-5)
    if expectile == 0.5:
        assert m.item() == pytest.approx(sample.mean(), abs=1e-5)


@SCRIPTS
@pytest.mark.parametrize("expectile, episodic_return", [(0.9, 1.0), (0.5, 0.3)])
def test_a_high_expectile_stitches_a_path_that_no_trajectory_shows(script, expectile, episodic_return):
    torch.manual_seed(0)
    args = script.Args(expectile=expectile, beta=30.0, gamma=0.9, learning_rate=1e-3, actor_dropout=0.0)
    transitions, agent = maze_transitions(), script.Agent(2, 2)
    optimizers = script.make_optimizers(agent, args.learning_rate)
    for _ in range(500):
        indices = torch.randint(len(transitions["rewards"]), (64,))
        script.update(agent, optimizers, {name: tensor[indices] for name, tensor in transitions.items()}, args)
    envs = gym.vector.SyncVectorEnv([lambda: gym.wrappers.TimeLimit(Maze(), 10)])
    returns, successes = script.evaluate(envs, agent.actor.act, episodes=1)
    assert returns == pytest.approx([episodic_return])
    assert successes is None  # the maze reports no success


@SCRIPTS
@pytest.mark.parametrize("terminated", [False, True])
def test_only_a_termination_cuts_the_bootstrap(script, terminated):
    torch.manual_seed(0)
    agent, args = script.Agent(3, 2), script.Args(actor_dropout=0.0, learning_rate=1e-12)
    data = {name: torch.randn(8, dim) for name, dim in (("observations", 3), ("actions", 2), ("next_observations", 3))}
    data |= {"rewards": torch.randn(8), "terminations": torch.full((8,), float(terminated))}
    with torch.no_grad():
        agent.vf.fc3.bias += 100.0
        target = data["rewards"] + (0.0 if terminated else args.gamma * agent.vf(data["next_observations"]))
        errors = [qf(data["observations"], data["actions"]) - target for qf in (agent.qf1, agent.qf2)]
    metrics = script.update(agent, script.make_optimizers(agent, 0.0), data, args)
    assert metrics["qf_loss"].item() == pytest.approx(sum((error**2).mean().item() for error in errors), rel=1e-5)


@SCRIPTS
def test_transitions_never_cross_an_episode_and_truncations_are_no_terminations(script, tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    observation_space, action_space = gym.spaces.Box(-np.inf, np.inf, (1,)), gym.spaces.Box(-2, 4, (1,))
    buffers = [
        EpisodeBuffer(
            observations=np.arange(start, start + 4, dtype=np.float32)[:, None],
            actions=np.array([[-2.0], [1.0], [4.0]], np.float32),
            rewards=np.array([1.0, 2.0, 3.0]) * start,
            terminations=np.array([False, False, terminated]),
            truncations=np.array([False, False, not terminated]),
        )
        for start, terminated in ((10, True), (20, False), (30, True))
    ]
    dataset = minari.create_dataset_from_buffers(
        "test/counting-v0", buffers, observation_space=observation_space, action_space=action_space
    )
    transitions, returns = script.load_transitions(dataset, observation_space, action_space, 2, 2)
    assert transitions["observations"].flatten().tolist() == [10, 11, 12, 20, 21, 22]
    assert transitions["next_observations"].flatten().tolist() == [11, 12, 13, 21, 22, 23]
    assert transitions["terminations"].tolist() == [0, 0, 1, 0, 0, 0]
    assert transitions["rewards"].tolist() == [10, 20, 30, 20, 40, 60]
    assert returns.tolist() == [30, 60]  # of the first two steps, the horizon
    # actions are scaled from the environment's bounds to +-1 and kept inside by the official code's margin
    np.testing.assert_allclose(transitions["actions"].flatten(), 2 * [-1 + 1e-5, 0, 1 - 1e-5], atol=1e-7)


@SCRIPTS
def test_beta_zero_is_behaviour_cloning(script):
    torch.manual_seed(0)
    agent, args = script.Agent(2, 2), script.Args(beta=0.0, actor_dropout=0.0)
    transitions = maze_transitions()
    log_prob = agent.actor.log_prob(transitions["observations"], transitions["actions"]).mean().item()
    metrics = script.update(agent, script.make_optimizers(agent, 3e-4), transitions, args)
    assert metrics["weights"].unique().tolist() == [1.0]
    assert metrics["actor_loss"].item() == pytest.approx(-log_prob)


@SCRIPTS
@pytest.mark.parametrize("advantage, weight", [(-1000.0, 0.0), (1000.0, 100.0)])
def test_weights_are_clipped(script, advantage, weight):
    torch.manual_seed(0)
    agent, args = script.Agent(2, 2), script.Args(beta=3.0, max_weight=100.0, actor_dropout=0.0)
    agent.vf.fc3.bias.data.fill_(-advantage)  # exp(3 * 1000) would overflow
    metrics = script.update(agent, script.make_optimizers(agent, 0.0), maze_transitions(), args)
    torch.testing.assert_close(metrics["advantages"].mean().item(), advantage, rtol=0.1, atol=0.0)
    assert metrics["weights"].unique().tolist() == [weight]
    assert torch.isfinite(metrics["actor_loss"])


@SCRIPTS
def test_target_critics_start_as_copies(script):
    agent = script.Agent(3, 2)
    for qf, target in ((agent.qf1, agent.qf1_target), (agent.qf2, agent.qf2_target)):
        assert all(torch.equal(a, b) for a, b in zip(qf.parameters(), target.parameters(), strict=True))
    assert not torch.equal(agent.qf1.fc1.weight, agent.qf2.fc1.weight)


class Staircase(gym.Env):
    """Ends after 1 + seed % 5 steps, the k-th of which gives k; an odd seed's last step is a success.

    An episode that follows without a seed is another one: it gives 1000 a step and succeeds at once.
    """

    observation_space, action_space = gym.spaces.Box(-1, 1, (1,)), gym.spaces.Box(-1, 1, (1,))

    def reset(self, seed=None, options=None):
        self.seed, self.steps = seed, 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        if self.seed is None:
            return np.zeros(1, np.float32), 1000.0, False, False, {"success": True}
        ended = self.steps == 1 + self.seed % 5
        info = {"success": ended and self.seed % 2 == 1}
        return (
            np.zeros(1, np.float32),
            float(self.steps),
            ended and self.seed % 3 == 0,
            ended and self.seed % 3 > 0,
            info,
        )


@SCRIPTS
def test_an_evaluation_counts_each_episode_to_its_end_and_no_further(script):
    envs = gym.vector.SyncVectorEnv([Staircase] * 3)
    returns, successes = script.evaluate(envs, lambda obs: np.zeros((3, 1), np.float32), episodes=7)
    seeds = script.EVAL_SEED + np.arange(7)
    lengths = 1 + seeds % 5
    assert returns.tolist() == (lengths * (lengths + 1) / 2).tolist()
    assert successes.tolist() == (seeds % 2 == 1).tolist()


@SCRIPTS
def test_scores_are_d4rls(script):
    for _, random_return, expert_return in script.ADROIT.values():
        reference = random_return, expert_return
        assert script.summarize(np.array([random_return]), None, reference)["normalized_score"] == pytest.approx(0)
        assert script.summarize(np.array([expert_return]), None, reference)["normalized_score"] == pytest.approx(100)
    assert script.ADROIT["pen"][0] == 100 and script.ADROIT["hammer"][0] == 200  # D4RL's horizons
    assert script.make_env("AdroitHandPen-v1")().spec.max_episode_steps == 100
    assert script.adroit_task("AdroitHandHammer-v2") == "hammer"
    for env_id in ("Pendulum-v1", "AdroitHandPenSparse-v1"):
        assert script.adroit_task(env_id) is None
    assert "normalized_score" not in script.summarize(np.zeros(1), None, None)
