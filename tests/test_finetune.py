"""What iql_finetune.py adds to iql_continuous.py, and that the rest of the two is the same text."""

import ast
import inspect
import math

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
    assert {"update", "Actor", "Critic", "evaluate", "load_transitions", "save", "ADROIT"} <= shared
    assert [name for name in shared if continuous[name] != finetune[name]] == []
    assert continuous.keys() - finetune.keys() == set()


def test_arguments_of_both_scripts_differ_only_where_they_should():
    continuous, finetune = vars(iql_continuous.Args()), vars(iql_finetune.Args())
    assert continuous.keys() - finetune.keys() == {"total_updates"}
    assert finetune.keys() - continuous.keys() == {
        *("offline_updates", "online_steps", "learning_starts", "updates_per_step", "exploration_scale", "anneal_lr"),
    }


def test_exploration_is_the_policys_gaussian_times_a_scale_inside_the_bounds():
    torch.manual_seed(0)
    actor = iql_finetune.Actor(3, 2)
    actor.log_std.data[:] = torch.tensor([-2.0, -3.0])
    x = torch.zeros(20_000, 3)
    actions = iql_finetune.explore(actor, x, 0.5)
    torch.testing.assert_close(actions.mean(0), actor(x[:1])[0][0], atol=0.01, rtol=0)
    torch.testing.assert_close(actions.std(0), 0.5 * torch.tensor([-2.0, -3.0]).exp(), atol=0.002, rtol=0)
    actor.log_std.data[:] = 2.0
    assert iql_finetune.explore(actor, x, 1.0).abs().max() == 1


def saved_by(folder):
    """The checkpoint of the one run in `folder`, and its online transitions by name."""
    saved = torch.load(run_dir(folder) / "checkpoint.pt", weights_only=True)
    rows = torch.from_numpy(np.fromfile(run_dir(folder) / "online.bin", np.float32)).view(-1, 3 + 2 + 1 + 3 + 1)
    names = ("observations", "actions", "rewards", "next_observations", "terminations")
    return saved, dict(zip(names, rows.split([3, 2, 1, 3, 1], 1), strict=True))


@pytest.mark.parametrize("updates_per_step", [1, 2])
def test_what_is_stored_online_is_what_happened(updates_per_step, tmp_path):
    flags = "--offline-updates 10 --online-steps 60 --learning-starts 42 --reward-scale 0.5 --eval-frequency 30"
    flags += f" --actor-dropout 0 --exploration-scale 2 --updates-per-step {updates_per_step}"
    assert "collecting 42 steps before the online updates" in run("iql_finetune", tmp_path, flags)
    saved, online = saved_by(tmp_path)
    assert saved["global_step"] == 10 + 60 * updates_per_step and saved["online_steps"] == 60
    events = EventAccumulator(str(run_dir(tmp_path)), size_guidance={"scalars": 0}).Reload()
    # episodes of ten steps: four before the first online update, two when they are due
    ends = [event.step for event in events.Scalars("charts/online_episodic_return")]
    due = [10 + updates_per_step * (steps - 1) + 1 for steps in (50, 60)]
    assert ends == [11, 11, 11, 11, *due]
    # many checkpoints, and each transition is written once
    assert len(online["rewards"]) == 60 and not online["terminations"].any()  # Tiny's time limit is no termination
    mean, std = (saved["agent"][f"actor.obs_{name}"] for name in ("mean", "std"))
    state, next_state = (online[name] * std + mean for name in ("observations", "next_observations"))
    actions = online["actions"] * torch.tensor([2.0, 0.5]) + torch.tensor([0.0, 0.5])
    # Tiny's own physics, at the end of an episode too
    torch.testing.assert_close(next_state[:, :2], state[:, :2] + 0.1 * actions, rtol=1e-4, atol=1e-4, check_dtype=False)
    torch.testing.assert_close(next_state[:, 2], state[:, 2], rtol=1e-4, atol=1e-4)
    rewards = -0.5 * next_state.abs().sum(1).float()
    torch.testing.assert_close(online["rewards"].flatten(), rewards, rtol=1e-4, atol=1e-4)
    # an observation follows from the one before, but where an episode of ten steps begins; no step is missing or extra
    follows = torch.isclose(state[1:], next_state[:-1], rtol=1e-4, atol=1e-4).all(1)
    assert torch.equal(follows, torch.arange(1, 60) % 10 != 0)


@pytest.mark.parametrize("flag, factor", [("", 0.5 * (1 + math.cos(math.pi * 19 / 20))), ("--no-anneal-lr", 1)])
def test_the_actors_learning_rate_alone_falls_online(flag, factor, tmp_path):
    run("iql_finetune", tmp_path, f"--offline-updates 30 --online-steps 20 --learning-rate 0.001 {flag}")
    saved, _ = saved_by(tmp_path)
    rates = [optimizer["param_groups"][0]["lr"].item() for optimizer in saved["optimizers"]]
    assert rates == pytest.approx([0.001, 0.001 * factor, 0.001])
