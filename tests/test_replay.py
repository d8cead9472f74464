"""A whole run is `update` on the data that the test prepares itself, with the same random numbers.

The replay starts from the checkpoint of a run without updates. No flag has its default.
"""

import math

import minari
import numpy as np
import pytest
import torch
from processes import run, run_dir, saved_by
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import iql_continuous
import iql_finetune

NAMES = ("observations", "actions", "rewards", "next_observations", "terminations")
VALUES = {"gamma": 0.9, "tau": 0.5, "expectile": 0.6, "beta": 2.0, "max_weight": 0.9, "actor_dropout": 0.3}
FLAGS = " ".join(f"--{name} {value}" for name, value in VALUES.items())
FLAGS += " --seed 7 --batch-size 16 --learning-rate 0.01 --reward-scale 0.25 --reward-shift 0.5"


def prepare(normalize, max_episodes=4):
    """tiny/good-v0 as the updates should see it, its mean and its standard deviation."""
    episodes = list(minari.load_dataset("tiny/good-v0").iterate_episodes(range(max_episodes)))
    obs = np.concatenate([e.observations[:-1] for e in episodes]).astype(np.float64)
    next_obs = np.concatenate([e.observations[1:] for e in episodes]).astype(np.float64)
    mean, std = (obs.mean(0), obs.std(0) + 1e-3) if normalize else (np.zeros(3), np.ones(3))
    low, high = np.array([-2, 0]), np.array([2, 1])
    actions = (np.concatenate([e.actions for e in episodes]).astype(np.float64) - low) / (high - low) * 2 - 1
    actions = np.clip(actions, -1 + 1e-5, 1 - 1e-5)
    rewards = 0.25 * (np.concatenate([e.rewards for e in episodes]) + 0.5)
    terminations = np.concatenate([e.terminations for e in episodes])
    columns = ((obs - mean) / std, actions, rewards, (next_obs - mean) / std, terminations)
    data = {name: torch.tensor(column, dtype=torch.float32) for name, column in zip(NAMES, columns, strict=True)}
    return data, mean, std


def begin_at(saved, script):
    """The agent and the optimizers of a checkpoint; PyTorch's random numbers go on from there."""
    agent = script.Agent(3, 2, script.Args(**VALUES))
    agent.load_state_dict(saved["agent"])
    optimizers = script.make_optimizers(agent, 0.01)
    for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    torch.set_rng_state(saved["rng_state"])
    return agent, optimizers


def cosine(done, total):
    return 0.01 * 0.5 * (1 + math.cos(math.pi * done / total))


def assert_same(agent, saved):
    for name, tensor in agent.state_dict().items():
        torch.testing.assert_close(tensor, saved["agent"][name], rtol=1e-3, atol=1e-4, msg=name)


def assert_logged(metrics, events):
    """The means of the last update's metrics are the losses logged last."""
    clipped = (metrics["weights"] >= VALUES["max_weight"]).float()
    assert 0 < clipped.mean() < 1
    means = {name: tensor.mean().item() for name, tensor in {**metrics, "clipped_weights": clipped}.items()}
    logged = {name: events.Scalars(f"losses/{name}")[-1].value for name in means}
    assert logged == pytest.approx(means, rel=1e-2, abs=1e-3)


@pytest.mark.parametrize("normalize", [True, False])
def test_an_offline_run_is_update_on_the_prepared_data(normalize, tmp_path):
    flags = f"{FLAGS} --max-episodes 3" + ("" if normalize else " --no-normalize-obs")
    for updates in (0, 5):
        run("iql_continuous", tmp_path / str(updates), f"{flags} --total-updates {updates}")
    data, mean, std = prepare(normalize, max_episodes=3)
    agent, optimizers = begin_at(saved_by(tmp_path / "0"), iql_continuous)
    np.testing.assert_allclose(agent.actor.obs_mean, mean)
    np.testing.assert_allclose(agent.actor.obs_std, std)
    for k in range(5):
        optimizers[1].param_groups[0]["lr"].fill_(cosine(k, 5))
        indices = torch.randint(30, (16,))
        batch = {name: column[indices] for name, column in data.items()}
        metrics = iql_continuous.update(agent, optimizers, batch, iql_continuous.Args(**VALUES))
    assert_same(agent, saved_by(tmp_path / "5"))
    assert_logged(metrics, EventAccumulator(str(run_dir(tmp_path / "5"))).Reload())


@pytest.mark.parametrize("anneal", [True, False])
def test_an_online_run_is_update_on_the_data_and_what_the_environment_gave(anneal, tmp_path):
    """Rows, returns, successes and starts are those of the environment itself, stepped again with the actions."""
    flags = f"{FLAGS} --env-id tiny_env:Ending-v0 --offline-updates 2 --learning-starts 12 --exploration-scale 0.5"
    flags += "" if anneal else " --no-anneal-lr"
    run("iql_finetune", tmp_path / "0", f"{flags} --online-steps 0")
    printed = run("iql_finetune", tmp_path / "45", f"{flags} --online-steps 45")
    saved, online = saved_by(tmp_path / "45"), np.fromfile(run_dir(tmp_path / "45") / "online.bin", np.float32)
    data, mean, std = prepare(normalize=True)
    data = {name: torch.cat([column, torch.zeros(45, *column.shape[1:])]) for name, column in data.items()}
    agent, optimizers = begin_at(saved_by(tmp_path / "0"), iql_finetune)
    env, obs, ends, rows = iql_finetune.make_env("tiny_env:Ending-v0")(), None, [], []
    for k in range(1, 46):
        if obs is None:
            obs, _ = env.reset(seed=torch.randint(2**31, ()).item())
            episodic_return, success = 0.0, False
        x = torch.tensor((obs - mean) / std, dtype=torch.float32)
        agent.eval()
        with torch.no_grad():
            policy_mean, log_std = agent.actor(x[None])
            action = (policy_mean + 0.5 * log_std.exp() * torch.randn(1, 2)).clamp(-1, 1)[0]
        next_obs, reward, terminated, truncated, info = env.step(action.numpy())
        next_x = torch.tensor((next_obs - mean) / std, dtype=torch.float32)
        scaled = torch.tensor([0.25 * (reward + 0.5)], dtype=torch.float32)
        for name, value in zip(NAMES, (x, action, scaled[0], next_x, float(terminated)), strict=True):
            data[name][39 + k] = value
        rows.append(torch.cat([x, action, scaled, next_x, torch.tensor([float(terminated)])]))
        episodic_return, success = episodic_return + reward, success or bool(info["success"])
        obs = next_obs
        if terminated or truncated:
            ends.append((2 + k, episodic_return, success))
            obs = None
        if k > 12:
            optimizers[1].param_groups[0]["lr"].fill_(cosine(k - 1, 45) if anneal else 0.01)
            indices = (torch.rand(16, dtype=torch.float64) * (40 + k)).long()
            batch = {name: column[indices] for name, column in data.items()}
            metrics = iql_finetune.update(agent, optimizers, batch, iql_finetune.Args(**VALUES))
    torch.testing.assert_close(torch.from_numpy(online.reshape(45, 10)), torch.stack(rows), rtol=1e-3, atol=1e-4)
    assert_same(agent, saved)
    rates = [optimizer["param_groups"][0]["lr"].item() for optimizer in saved["optimizers"]]
    assert rates == pytest.approx([0.01, cosine(44, 45) if anneal else 0.01, 0.01])

    # what is said of the episodes: unscaled returns and success at any step, each at the step that it ended at
    successes = [success for _, _, success in ends]
    assert any(successes) and not all(successes) and len(ends) > 5
    assert saved["online_successes"] == successes
    events = EventAccumulator(str(run_dir(tmp_path / "45")), size_guidance={"scalars": 0}).Reload()
    assert_logged(metrics, events)
    logged = [(event.step, event.value) for event in events.Scalars("charts/online_episodic_return")]
    assert logged == [(step, pytest.approx(episodic_return, rel=1e-3)) for step, episodic_return, _ in ends]
    regrets = {step: 1 - np.mean(successes[: i + 1]) for i, (step, _, _) in enumerate(ends)}
    for row in saved["evaluations"]:
        ended = [step for step in regrets if step <= row["global_step"]]
        assert row.get("regret") == (pytest.approx(regrets[ended[-1]]) if ended else None)
    assert f", regret={round(regrets[ends[-1][0]], 2)}, " in printed.splitlines()[-1]
    before = next(row for row in saved["evaluations"] if row["global_step"] == 2)
    assert f"before fine-tuning: {iql_finetune.describe(before)}\n" in printed
