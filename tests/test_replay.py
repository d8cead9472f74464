"""Whole runs are what this test computes itself: IQL's update written down again, on data that it prepares."""

import math

import minari
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from processes import run, run_dir, saved_by, written_by
from torch.distributions import Normal

import iql_continuous

NAMES = ("observations", "actions", "rewards", "next_observations", "terminations")
GAMMA, TAU, EXPECTILE, BETA, MAX_WEIGHT, DROPOUT, RATE = 0.9, 0.3, 0.6, 2.0, 0.9, 0.3, 0.01  # no default
FLAGS = f"--gamma {GAMMA} --tau {TAU} --expectile {EXPECTILE} --beta {BETA} --max-weight {MAX_WEIGHT} --seed 7 "
FLAGS += f"--actor-dropout {DROPOUT} --learning-rate {RATE} --batch-size 16 --reward-scale 0.25 --reward-shift 0.5 "
FLAGS += "--env-id tiny_env:Ending-v0"


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
        self.networks = {name: tensor.clone() for name, tensor in saved["agent"].items()}
        np.testing.assert_allclose(self.networks["actor.obs_mean"], mean)
        np.testing.assert_allclose(self.networks["actor.obs_std"], std)
        torch.set_rng_state(saved["rng_state"])
        self.adams = []
        for names in ("vf.", "actor.", ("qf1.", "qf2.")):
            trained = [name for name in self.networks if name.startswith(names) and "obs_" not in name]
            self.adams.append(torch.optim.Adam([self.networks[name].requires_grad_() for name in trained], RATE))

    def __call__(self, network, *inputs, last="fc3", dropout=0.0):
        x = torch.cat(inputs, 1)
        for layer in ("fc1", "fc2", last):
            x = F.linear(x, *(self.networks[f"{network}.{layer}.{part}"] for part in ("weight", "bias")))
            x = x if layer == last else F.dropout(F.relu(x), dropout)
        return x if last == "fc_mean" else x[:, 0]

    def policy(self, x, dropout=0.0):
        std = self.networks["actor.log_std"].clamp(-5, 2).exp()
        return Normal(torch.tanh(self("actor", x, last="fc_mean", dropout=dropout)), std)

    def step(self, k, loss):
        self.adams[k].zero_grad()
        loss.backward()
        self.adams[k].step()

    def update(self, data, actor_rate):
        obs, actions, rewards, next_obs, terminations = (data[name] for name in NAMES)
        q = torch.min(self("qf1_target", obs, actions), self("qf2_target", obs, actions)).detach()
        v = self("vf", obs)
        v_loss = (torch.where(q > v, EXPECTILE, 1 - EXPECTILE) * (q - v) ** 2).mean()
        self.step(0, v_loss)
        advantages = (q - self("vf", obs)).detach()
        weights = (BETA * advantages).exp().clamp(max=MAX_WEIGHT)
        actor_loss = -(weights * self.policy(obs, DROPOUT).log_prob(actions).sum(1)).mean()
        self.adams[1].param_groups[0]["lr"] = actor_rate
        self.step(1, actor_loss)
        bootstrap = torch.where(terminations == 1, 0.0, GAMMA * self("vf", next_obs))
        target = (rewards + bootstrap).detach()
        values = [self(name, obs, actions) for name in ("qf1", "qf2")]
        qf_loss = sum(((q - target) ** 2).mean() for q in values)
        self.step(2, qf_loss)
        for name in self.networks:
            if "_target" in name:
                new = self.networks[name.replace("_target", "")].detach()
                self.networks[name] = (1 - TAU) * self.networks[name] + TAU * new
        clipped = (weights >= MAX_WEIGHT).float()
        metrics = {"v_loss": v_loss, "actor_loss": actor_loss, "qf_loss": qf_loss, "qf_values": values[0]}
        metrics |= {"v_values": v, "advantages": advantages, "weights": weights, "clipped_weights": clipped}
        self.metrics = {name: value.mean().item() for name, value in metrics.items()}

    def assert_same(self, folder):
        """The run ended with these networks, logged the last update's means, and acts as they say."""
        saved, scalars = saved_by(folder), written_by(folder).scalars
        assert saved["agent"].keys() == self.networks.keys()
        for name, tensor in self.networks.items():
            torch.testing.assert_close(tensor.detach(), saved["agent"][name], rtol=1e-3, atol=1e-4, msg=name)
        logged = {name: scalars[f"losses/{name}"][-1][1] for name in self.metrics}
        assert logged == pytest.approx(self.metrics, rel=1e-2, abs=1e-3) and 0 < logged["clipped_weights"] < 1
        agent, obs = iql_continuous.Agent(3, 2, iql_continuous.Args()), np.eye(3)
        agent.load_state_dict(saved["agent"])
        actions = torch.cat([self.policy(self.normalize(x)).mean for x in obs]).detach()
        torch.testing.assert_close(torch.from_numpy(agent.actor.act(obs)), actions, rtol=1e-3, atol=1e-4)

    def normalize(self, obs):
        mean, std = (self.networks[f"actor.obs_{name}"] for name in ("mean", "std"))
        return ((torch.tensor(obs)[None] - mean) / std).float()


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
            x, policy = replay.normalize(obs), replay.policy(replay.normalize(obs))
            action = (policy.mean + 0.5 * policy.stddev * torch.randn(1, 2)).clamp(-1, 1).detach()
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
