"""What IQL is: the expectile, the stitching it buys, where a bootstrap ends, and that every argument counts."""

import copy

import gymnasium as gym
import numpy as np
import pytest
import torch
from maze import Maze, maze_transitions

import iql_continuous as iql


def expectile_by_bisection(sample, expectile):
    """The m where expectile * E[(x - m)+] = (1 - expectile) * E[(m - x)+]."""
    low, high = sample.min(), sample.max()
    for _ in range(100):
        m = (low + high) / 2
        above, below = np.maximum(sample - m, 0).mean(), np.maximum(m - sample, 0).mean()
        low, high = (m, high) if expectile * above > (1 - expectile) * below else (low, m)
    return m


@pytest.mark.parametrize("expectile", [0.1, 0.5, 0.95])
def test_the_minimizer_of_the_expectile_loss_is_the_expectile(expectile):
    sample = np.random.default_rng(0).gamma(2.0, size=1000)
    m = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [m], max_iter=100, tolerance_grad=1e-12, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = iql.expectile_loss(torch.tensor(sample) - m, expectile)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert m.item() == pytest.approx(expectile_by_bisection(sample, expectile), abs=1e-5)
    if expectile == 0.5:
        assert m.item() == pytest.approx(sample.mean(), abs=1e-5)


@pytest.mark.parametrize("expectile, episodic_return", [(0.9, 1.0), (0.5, 0.3)])
def test_a_high_expectile_stitches_a_path_that_no_trajectory_shows(expectile, episodic_return):
    torch.manual_seed(0)
    args = iql.Args(expectile=expectile, beta=30.0, gamma=0.9, learning_rate=1e-3, actor_dropout=0.0)
    transitions, agent = maze_transitions(), iql.Agent(2, 2, args)
    optimizers = iql.make_optimizers(agent, args.learning_rate)
    for _ in range(500):
        indices = torch.randint(len(transitions["rewards"]), (64,))
        iql.update(agent, optimizers, {name: tensor[indices] for name, tensor in transitions.items()}, args)
    envs = gym.vector.SyncVectorEnv([lambda: gym.wrappers.TimeLimit(Maze(), 10)])
    returns, _ = iql.evaluate(envs, agent.actor.act, episodes=1)
    assert returns == pytest.approx([episodic_return])


@pytest.mark.parametrize("terminated", [False, True])
def test_only_a_termination_cuts_the_bootstrap(terminated):
    torch.manual_seed(0)
    agent, args = iql.Agent(3, 2, iql.Args()), iql.Args()
    data = {name: torch.randn(8, dim) for name, dim in (("observations", 3), ("actions", 2), ("next_observations", 3))}
    data |= {"rewards": torch.randn(8), "terminations": torch.full((8,), float(terminated))}
    with torch.no_grad():
        agent.vf.fc3.bias += 100.0
        target = data["rewards"] + (0.0 if terminated else args.gamma * agent.vf(data["next_observations"]))
        errors = [qf(data["observations"], data["actions"]) - target for qf in (agent.qf1, agent.qf2)]
    metrics = iql.update(agent, iql.make_optimizers(agent, 0.0), data, args)
    assert metrics["qf_loss"].item() == pytest.approx(sum((error**2).mean().item() for error in errors), rel=1e-5)


def test_beta_zero_is_behavior_cloning():
    torch.manual_seed(0)
    args, transitions = iql.Args(beta=0.0, actor_dropout=0.0), maze_transitions()
    agent = iql.Agent(2, 2, args)
    log_prob = agent.actor.log_prob(transitions["observations"], transitions["actions"]).mean().item()
    metrics = iql.update(agent, iql.make_optimizers(agent, 3e-4), transitions, args)
    assert metrics["weights"].unique().tolist() == [1.0]
    assert metrics["actor_loss"].item() == pytest.approx(-log_prob)


@pytest.mark.parametrize("advantage, weight", [(-1000.0, 0.0), (1000.0, 100.0)])
def test_weights_are_clipped(advantage, weight):
    torch.manual_seed(0)
    agent, args = iql.Agent(2, 2, iql.Args()), iql.Args(beta=3.0, max_weight=100.0)
    agent.vf.fc3.bias.data.fill_(-advantage)  # exp(3 * 1000) would overflow
    metrics = iql.update(agent, iql.make_optimizers(agent, 0.0), maze_transitions(), args)
    torch.testing.assert_close(metrics["advantages"].mean().item(), advantage, rtol=0.1, atol=0.0)
    assert metrics["weights"].unique().tolist() == [weight]
    assert torch.isfinite(metrics["actor_loss"])


def test_the_standard_deviation_stays_between_the_official_bounds():
    actor = iql.Actor(2, 3, dropout=0.0)
    actor.log_std.data[:] = torch.tensor([-9.0, 1.5, 9.0])
    assert actor(torch.zeros(1, 2))[1].tolist() == [-5.0, 1.5, 2.0]


def updated(agent=None, optimizers=None, **values):
    """The weights after two updates from the same beginning, the critics drawn apart from their targets."""
    torch.manual_seed(0)
    args = iql.Args(**{"max_weight": 1.2, **values})
    agent = agent or iql.Agent(2, 2, args)
    optimizers = optimizers or iql.make_optimizers(agent, 0.01)
    for _ in range(2):
        iql.update(agent, optimizers, maze_transitions(), args)
    return agent.state_dict()


OTHERS = {"gamma": 0.5, "tau": 0.5, "expectile": 0.9, "beta": 1.0, "max_weight": 1.1, "actor_dropout": 0.0}


@pytest.mark.parametrize("name", OTHERS)
def test_every_argument_of_update_gives_other_weights(name):
    plain, other = updated(), updated(**{name: OTHERS[name]})
    changed = {key.split(".")[0] for key in plain if not torch.equal(plain[key], other[key])}
    actor_only = name in ("beta", "max_weight", "actor_dropout")
    assert changed >= (
        {"actor"} if actor_only else {"tau": {"vf", "qf1_target", "qf2_target"}}.get(name, {"vf", "qf1"})
    )
    assert not actor_only or changed == {"actor"}


def test_targets_start_as_copies_and_each_follows_its_network():
    torch.manual_seed(1)
    args = iql.Args(tau=0.25)
    agent = iql.Agent(2, 2, args)
    assert not torch.equal(agent.qf1.fc1.weight, agent.qf2.fc1.weight)
    before = copy.deepcopy(agent)
    for name in ("qf1", "qf2"):
        for a, b in zip(getattr(agent, name).parameters(), getattr(agent, f"{name}_target").parameters(), strict=True):
            assert torch.equal(a, b)
    iql.update(agent, iql.make_optimizers(agent, 0.01), maze_transitions(), args)
    for name in ("qf1", "qf2"):
        networks = (getattr(before, f"{name}_target"), getattr(agent, name), getattr(agent, f"{name}_target"))
        for old, new, target in zip(*(network.parameters() for network in networks), strict=True):
            torch.testing.assert_close(target, 0.75 * old + 0.25 * new)


def test_another_optimizer_does_not_take_the_place_of_one():
    agent = iql.Agent(2, 2, iql.Args())
    optimizers = [torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))]), *iql.make_optimizers(agent, 0.01)]
    with pytest.raises(ValueError, match="unpack"):
        updated(agent, optimizers)
