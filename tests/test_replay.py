"""Whole runs are what this test computes itself: updates, on data and batches that it prepares."""

import math

import minari
import numpy as np
import pytest
import torch
from processes import run, run_dir, saved_by, written_by

import iql_continuous

NAMES = ("observations", "actions", "rewards", "next_observations", "terminations")
GAMMA, TAU, EXPECTILE, BETA, MAX_WEIGHT, DROPOUT, RATE = 0.9, 0.3, 0.6, 2.0, 0.9, 0.3, 0.01  # no default
FLAGS = f"--gamma {GAMMA} --tau {TAU} --expectile {EXPECTILE} --beta {BETA} --max-weight {MAX_WEIGHT} --seed 7 "
FLAGS += f"--actor-dropout {DROPOUT} --learning-rate {RATE} --batch-size 16 --reward-scale 0.25 --reward-shift 0.5 "
FLAGS += "--env-id tiny_env:Ending-v0"
ARGS = {"gamma": GAMMA, "tau": TAU, "expectile": EXPECTILE, "beta": BETA, "max_weight": MAX_WEIGHT}
ARGS = iql_continuous.Args(**ARGS, actor_dropout=DROPOUT)


def prepare(normalize, count):
    """The first episodes of tiny/good-v0 as the updates should see them, their mean and standard deviation."""
    columns = {name: [] for name in NAMES}
    for episode in minari.load_dataset("tiny/good-v0").iterate_episodes(range(count)):
        columns["observations"].append(episode.observations[:-1])
        columns["next_observations"].append(episode.observations[1:])
        for name in ("actions", "rewards", "terminations"):
            columns[name].append(getattr(episode, name))
    data = {name: np.concatenate(column).astype(np.float64) for name, column in columns.items()}
    obs = data["observations"]
    mean, std = (obs.mean(0), obs.std(0) + 1e-3) if normalize else (np.zeros(3), np.ones(3))
    data["observations"], data["next_observations"] = (obs - mean) / std, (data["next_observations"] - mean) / std
    low, width, bound = np.array([-2, 0]), np.array([4, 1]), 1 - 1e-5
    data["actions"] = np.clip((data["actions"] - low) / width * 2 - 1, -bound, bound)
    data["rewards"] = 0.25 * (data["rewards"] + 0.5)
    return {name: torch.tensor(column, dtype=torch.float32) for name, column in data.items()}, mean, std


class Replay:
    """Networks and random numbers as a checkpoint of no updates has them, and what IQL does to them."""

    def __init__(self, saved, mean, std):
        self.agent = iql_continuous.Agent(3, 2, ARGS)
        self.agent.load_state_dict(saved["agent"])
        np.testing.assert_allclose(self.agent.actor.obs_mean, mean)
        np.testing.assert_allclose(self.agent.actor.obs_std, std)
        self.optimizers = iql_continuous.make_optimizers(self.agent, RATE)
        torch.set_rng_state(saved["rng_state"])

    def update(self, data, actor_rate):
        self.optimizers[1].param_groups[0]["lr"].fill_(actor_rate)
        metrics = iql_continuous.update(self.agent, self.optimizers, data, ARGS)
        metrics["clipped_weights"] = (metrics["weights"] == MAX_WEIGHT).float()
        self.metrics = {name: value.mean().item() for name, value in metrics.items()}

    def assert_same(self, folder):
        """The run ended with these networks, logged the last update's means, and acts as they say."""
        saved, scalars = saved_by(folder), written_by(folder).scalars
        assert saved["agent"].keys() == self.agent.state_dict().keys()
        for name, tensor in self.agent.state_dict().items():
            torch.testing.assert_close(tensor, saved["agent"][name], rtol=1e-3, atol=1e-4, msg=name)
        logged = {name: scalars[f"losses/{name}"][-1][1] for name in self.metrics}
        assert logged == pytest.approx(self.metrics, rel=1e-2, abs=1e-3) and 0 < logged["clipped_weights"] < 1
        obs = np.eye(3)
        mean, _ = self.agent.eval().actor(torch.cat([self.normalize(x) for x in obs]))
        torch.testing.assert_close(torch.from_numpy(self.agent.actor.act(obs)), mean.detach(), rtol=1e-3, atol=1e-4)

    def normalize(self, obs):
        return ((torch.tensor(obs)[None] - self.agent.actor.obs_mean) / self.agent.actor.obs_std).float()


def test_an_offline_run(tmp_path):
    """The data are normalized here, and the last episode is left out."""
    for updates in (0, 5):
        run("iql_continuous", tmp_path / str(updates), f"{FLAGS} --max-episodes 3 --total-updates {updates}")
    data, mean, std = prepare(True, 3)
    replay = Replay(saved_by(tmp_path / "0"), mean, std)
    for k in range(5):
        indices = torch.randint(30, (16,))
        rate = RATE * 0.5 * (1 + math.cos(math.pi * k / 5))
        replay.update({name: column[indices] for name, column in data.items()}, rate)
    replay.assert_same(tmp_path / "5")


@pytest.mark.parametrize("anneal", [True, False])
def test_an_online_run(anneal, tmp_path):
    """Without annealing, nothing is normalized either, and all episodes are read, not three of them."""
    flags = f"{FLAGS} --offline-updates 2 --learning-starts 12 --exploration-scale 0.5"
    flags += " --max-episodes 3" if anneal else " --no-anneal-lr --no-normalize-obs"
    run("iql_finetune", tmp_path / "0", f"{flags} --offline-updates 0 --online-steps 0")
    printed = run("iql_finetune", tmp_path / "45", f"{flags} --online-steps 45")
    saved, online = saved_by(tmp_path / "45"), np.fromfile(run_dir(tmp_path / "45") / "online.bin", np.float32)
    count = 30 if anneal else 40
    data, mean, std = prepare(anneal, count // 10)
    data = {name: torch.cat([column, torch.zeros(45, *column.shape[1:])]) for name, column in data.items()}
    replay = Replay(saved_by(tmp_path / "0"), mean, std)
    env, obs, ends, rows = iql_continuous.make_env("tiny_env:Ending-v0")(), None, [], []
    for k in range(-1, 46):
        if k > 0:
            if obs is None:
                obs, _ = env.reset(seed=torch.randint(2**31, ()).item())
                episodic_return, success = 0.0, False
            mean, log_std = replay.agent.eval().actor(x := replay.normalize(obs))
            action = (mean + 0.5 * log_std.exp() * torch.randn(1, 2)).clamp(-1, 1).detach()
            obs, reward, terminated, truncated, info = env.step(action[0].numpy())
            scaled, ended = torch.tensor([[0.25 * (reward + 0.5)]]), torch.tensor([[float(terminated)]])
            rows.append(torch.cat([x, action, scaled, replay.normalize(obs), ended], 1).float()[0])
            for name, value in zip(NAMES, rows[-1].split([3, 2, 1, 3, 1]), strict=True):
                data[name][count + k - 1] = value if data[name].dim() == 2 else value[0]
            episodic_return, success = episodic_return + reward, success or bool(info.get("success"))
            if terminated or truncated:
                ends.append((2 + k, episodic_return, success))
                obs = None
        if k <= 0 or k > 12:
            rate = RATE * 0.5 * (1 + math.cos(math.pi * (k - 1) / 45)) if anneal and k > 0 else RATE
            indices = (torch.rand(16, dtype=torch.float64) * (count + max(0, k))).long()
            replay.update({name: column[indices] for name, column in data.items()}, rate)
    torch.testing.assert_close(torch.from_numpy(online.reshape(45, 10)), torch.stack(rows), rtol=1e-3, atol=1e-4)
    replay.assert_same(tmp_path / "45")

    # what is said of the episodes: unscaled returns and success at any step, each at the step that it ended at
    successes = [success for _, _, success in ends]
    assert any(successes) and not all(successes) and len(ends) > 5
    assert saved["online_successes"] == successes
    logged = written_by(tmp_path / "45").scalars["charts/online_episodic_return"]
    assert logged == [(step, pytest.approx(episodic_return, rel=1e-3)) for step, episodic_return, _ in ends]
    regrets = {step: 1 - np.mean(successes[: i + 1]) for i, (step, _, _) in enumerate(ends)}
    for row in saved["evaluations"]:
        ended = [step for step in regrets if step <= row["global_step"]]
        assert row.get("regret") == (pytest.approx(regrets[ended[-1]]) if ended else None)
    assert f", regret={round(regrets[ends[-1][0]], 2)}, " in printed.splitlines()[-1]
    before = next(row for row in saved["evaluations"] if row["global_step"] == 2)
    assert f"before fine-tuning: {iql_continuous.describe(before)}\n" in printed
