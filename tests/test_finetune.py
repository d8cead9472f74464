"""What iql_finetune.py adds to iql_continuous.py, and that the rest of the two is the same text."""

import ast
import inspect
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from processes import run, run_dir
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import iql_continuous
import iql_finetune


def definitions(script):
    """Source text of every function, class and constant at the top level of a script."""
    source = inspect.getsource(script)
    texts = {}
    for node in ast.parse(source).body:
        names = [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else []
        if isinstance(node, ast.Assign):
            names = [ast.unparse(node.targets[0])]
        decorators = [ast.get_source_segment(source, d) for d in getattr(node, "decorator_list", [])]
        texts |= {name: (decorators, ast.get_source_segment(source, node)) for name in names}
    return texts


def test_what_both_scripts_define_is_the_same_text():
    continuous, finetune = definitions(iql_continuous), definitions(iql_finetune)
    shared = continuous.keys() & finetune.keys() - {"Args"}
    assert {"update", "Actor", "Critic", "evaluate", "load_transitions", "save_file", "ADROIT"} <= shared
    assert [name for name in shared if continuous[name] != finetune[name]] == []
    assert continuous.keys() - finetune.keys() == set()


def test_arguments_of_both_scripts_differ_only_where_they_should():
    continuous, finetune = vars(iql_continuous.Args()), vars(iql_finetune.Args())
    assert continuous.keys() - finetune.keys() == {"total_updates"}
    assert finetune.keys() - continuous.keys() == {
        *("offline_updates", "online_steps", "learning_starts", "updates_per_step", "num_envs"),
        *("buffer_size", "offline_fraction", "exploration_scale", "exploration_correlation", "anneal_lr"),
    }


def counting_transitions(values):
    column = torch.tensor(values, dtype=torch.float32)
    transitions = {name: column[:, None] for name in ("observations", "actions", "next_observations")}
    return {**transitions, "rewards": column, "terminations": column}


def test_a_full_ring_overwrites_the_oldest_online_data_and_never_the_dataset():
    rb = iql_finetune.ReplayBuffer(counting_transitions([0, 1, 2]), buffer_size=8, device="cpu")
    for value in range(10, 20, 2):
        rb.add(counting_transitions([value, value + 1]))
        assert rb.storage["rewards"][:3].tolist() == [0, 1, 2]
    # ten were added to a ring of five, two at a time: the last five are left
    assert sorted(rb.storage["rewards"][3:].tolist()) == [15, 16, 17, 18, 19]
    for tensor in rb.storage.values():
        assert tensor.flatten().tolist() == rb.storage["rewards"].tolist()
    # the next one replaces the oldest, also in a buffer restored from a checkpoint
    restored = iql_finetune.ReplayBuffer(counting_transitions([0, 1, 2]), buffer_size=8, device="cpu")
    restored.load_online(rb.online(), rb.position)
    for buffer in (rb, restored):
        buffer.add(counting_transitions([20]))
        assert sorted(buffer.storage["rewards"].tolist()) == [0, 1, 2, 16, 17, 18, 19, 20]


@pytest.mark.parametrize("offline_fraction, share", [(None, 30 / 40), (0.25, 0.25), (0.0, 0.0), (1.0, 1.0)])
def test_batches_hold_the_asked_share_of_the_dataset(offline_fraction, share):
    rb = iql_finetune.ReplayBuffer(counting_transitions([0] * 30), buffer_size=50, device="cpu")
    generator = torch.Generator().manual_seed(0)
    assert rb.sample(64, offline_fraction, generator)["rewards"].sum() == 0  # there is nothing else yet
    rb.add(counting_transitions([1] * 10))
    batch = rb.sample(10_000, offline_fraction, generator)
    assert 1 - batch["rewards"].mean().item() == pytest.approx(share, abs=0.02 if offline_fraction is None else 1e-6)


def test_exploration_is_the_policys_gaussian_times_a_scale_inside_the_bounds():
    torch.manual_seed(0)
    actor = iql_finetune.Actor(3, 2)
    actor.log_std.data[:] = torch.tensor([-2.0, -3.0])
    actor.action_scale[:], actor.action_bias[:] = 2.0, 1.0
    obs = torch.zeros(20_000, 3)
    _, actions, env_actions = iql_finetune.explore(actor, obs, None, 0.5, 0.9, torch.Generator().manual_seed(0))
    torch.testing.assert_close(actions.mean(0), actor(obs[:1])[0][0], atol=0.01, rtol=0)
    torch.testing.assert_close(actions.std(0), 0.5 * torch.tensor([-2.0, -3.0]).exp(), atol=0.002, rtol=0)
    np.testing.assert_allclose(env_actions, actions * 2 + 1)
    actor.log_std.data[:] = 2.0
    _, actions, _ = iql_finetune.explore(actor, obs, None, 1.0, 0.0, torch.Generator().manual_seed(0))
    assert actions.abs().max() == 1


@pytest.mark.parametrize("correlation", [0.0, 0.9])
def test_the_noise_of_successive_steps_is_as_correlated_as_asked_and_no_wider(correlation):
    actor, obs, generator = iql_finetune.Actor(3, 2), torch.zeros(20_000, 3), torch.Generator().manual_seed(0)
    actor.log_std.data[:] = -3.0
    noise, steps = None, []
    for _ in range(4):
        noise, actions, _ = iql_finetune.explore(actor, obs, noise, 2.0, correlation, generator)
        steps.append((actions[:, 0] - actor(obs)[0][:, 0]) / (2.0 * math.exp(-3.0)))
    expected = torch.tensor([[correlation ** abs(i - j) for j in range(4)] for i in range(4)])
    torch.testing.assert_close(torch.cov(torch.stack(steps)), expected, atol=0.03, rtol=0)


def test_the_environments_step_returns_what_the_script_counts_on_where_an_episode_ends():
    """The script stores infos["final_obs"] as the next observation: no autoreset step may come between."""
    envs = gym.vector.SyncVectorEnv([iql_finetune.make_env("AdroitHandPen-v1")] * 2, autoreset_mode="SameStep")
    envs.reset(seed=0)
    actions = np.zeros(envs.action_space.shape)
    for _ in range(99):
        last_obs, _, _, truncations, _ = envs.step(actions)
        assert not truncations.any()
    first_obs, rewards, terminations, truncations, infos = envs.step(actions)
    assert truncations.all() and not terminations.any() and (rewards != 0).all()
    for idx in range(2):
        # one step of the hand away from the step before, unlike the reset that follows
        assert np.abs(infos["final_obs"][idx] - last_obs[idx]).max() < np.abs(first_obs[idx] - last_obs[idx]).max()
    assert "success" in infos["final_info"]


@pytest.mark.parametrize("updates_per_step", [1, 2])
def test_what_is_stored_online_is_what_happened(updates_per_step, tmp_path):
    flags = "--offline-updates 10 --online-steps 60 --learning-starts 42 --num-envs 2 --reward-scale 0.5"
    flags += f" --actor-dropout 0 --exploration-scale 2 --updates-per-step {updates_per_step}"
    assert "collecting 42 steps before the online updates" in run("iql_finetune", tmp_path, flags)
    saved = torch.load(run_dir(tmp_path) / "checkpoint.pt", weights_only=True)
    online, model = saved["online"], saved["agent"]
    assert saved["global_step"] == 10 + 60 * updates_per_step
    events = EventAccumulator(str(run_dir(tmp_path))).Reload()
    # episodes of ten steps: two of each environment before the first online update, the third when it is due
    ends = [event.step for event in events.Scalars("charts/online_episodic_return")]
    assert ends == [11, 10 + 58 * updates_per_step + 1]
    assert len(online["rewards"]) == 60 and not online["terminations"].any()  # Tiny's time limit is no termination
    state, next_state = (
        (online[name] * model["actor.obs_std"] + model["actor.obs_mean"]).view(30, 2, 3)  # a row is a step of both
        for name in ("observations", "next_observations")
    )
    actions = (online["actions"] * model["actor.action_scale"] + model["actor.action_bias"]).view(30, 2, 2)
    # Tiny's own physics, at the end of an episode too
    torch.testing.assert_close(next_state[..., :2], state[..., :2] + 0.1 * actions, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(next_state[..., 2], state[..., 2], rtol=1e-4, atol=1e-4)
    rewards = -0.5 * next_state.abs().sum(2)
    torch.testing.assert_close(online["rewards"].view(30, 2), rewards, rtol=1e-4, atol=1e-4)
    # an observation follows from the one before, but where an episode of ten steps begins; no step is missing or extra
    follows = torch.isclose(state[1:], next_state[:-1], rtol=1e-4, atol=1e-4).all(2)
    begins = torch.arange(1, 30) % 10 == 0
    assert torch.equal(follows, ~begins[:, None].expand(29, 2))


def test_the_noise_of_a_run_is_as_correlated_as_asked(tmp_path):
    flags = "--offline-updates 1 --online-steps 40 --learning-starts 40 --learning-rate 1e-12 --actor-dropout 0"
    run("iql_finetune", tmp_path, f"{flags} --exploration-scale 0.1 --exploration-correlation 0.99")
    saved = torch.load(run_dir(tmp_path) / "checkpoint.pt", weights_only=True)
    agent = iql_finetune.Agent(3, 2)
    agent.load_state_dict(saved["agent"])
    mean, log_std = agent.actor(saved["online"]["observations"])
    noise = ((saved["online"]["actions"] - mean) / (0.1 * log_std.exp())).detach()
    assert 0.5 < noise.diff(dim=0).std() / math.sqrt(2 * (1 - 0.99)) < 1.5


@pytest.mark.parametrize("flag, factor", [("", 0.5 * (1 + math.cos(math.pi * 19 / 20))), ("--no-anneal-lr", 1)])
def test_the_actors_learning_rate_alone_falls_online(flag, factor, tmp_path):
    run("iql_finetune", tmp_path, f"--offline-updates 30 --online-steps 20 --learning-rate 0.001 {flag}")
    saved = torch.load(run_dir(tmp_path) / "checkpoint.pt", weights_only=True)
    rates = [optimizer["param_groups"][0]["lr"].item() for optimizer in saved["optimizers"]]
    assert rates == pytest.approx([0.001, 0.001 * factor, 0.001])
