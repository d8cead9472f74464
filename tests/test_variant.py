"""What must hold for an edited copy of iql_continuous.py, too: `pytest --script my_variant.py tests` runs this alone.

No network has a name here: what an optimizer has is trained, and a target is a module of the agent that none has and
that starts as a copy of one. The copy keeps the names `agent`, `step` and `args` of the script's last part.
"""

import gc

import numpy as np
import pytest
import torch
from processes import ROOT, execute, run, saved_by
from tiny_env import episode, write

FLAGS = "--total-updates 6 --eval-frequency 2 --tau 0.25 --learning-rate 0.01 --expectile 0.8"


@pytest.fixture(scope="module")
def script(request):
    config = request.config
    return config.invocation_params.dir / (config.getoption("--script") or ROOT / "iql_continuous.py")


def assert_same(found, expected, *but):
    """Two checkpoints' contents are equal to the bit, but for what is under these names."""
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected.keys() - {*but}:
            assert_same(found[name], expected[name], *but)
    elif isinstance(expected, (list, tuple)):
        for pair in zip(found, expected, strict=True):
            assert_same(*pair, *but)
    else:
        assert found == expected


def parameters(module, values=False):
    return {name: p.detach().clone() if values else p for name, p in module.named_parameters()}


def test_every_parameter_is_trained_by_one_optimizer_or_belongs_to_a_target_that_follows_a_network(script, tmp_path):
    run_globals, _ = execute(script, tmp_path, f"{FLAGS} --total-updates 0")
    agent, step, args = (run_globals[name] for name in ("agent", "step", "args"))
    assert len({*map(id, agent._modules.values())}) == len(agent._modules), "a network has two names: copy.deepcopy it"
    optimizers = [thing for thing in gc.get_objects() if isinstance(thing, torch.optim.Optimizer)]
    trained = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]

    targets = {}  # of each target, the name of the network that it is a copy of
    for name, module in agent.named_modules():
        within = any(name.startswith(f"{target}.") for target in targets)
        own = parameters(module)
        if within or not own or any(id(p) in trained for p in own.values()):
            continue
        networks = [
            other_name
            for other_name, other in agent.named_modules()
            if (its := parameters(other)).keys() == own.keys()
            and all(id(its[key]) in trained and torch.equal(its[key], own[key]) for key in own)
        ]
        assert len(networks) == 1, f"{name} is in no optimizer, and a copy of {networks or 'nothing that is'}"
        targets[name] = networks[0]
    assert targets, "nothing is a target"
    for name, p in agent.named_parameters():
        count = trained.count(id(p))
        assert count == 1 or any(name.startswith(f"{target}.") for target in targets), f"{count} optimizers have {name}"
        copies = [other for other, q in parameters(agent).items() if other < name and torch.equal(p, q) and p.std() > 0]
        assert not (count and [other for other in copies if id(parameters(agent)[other]) in trained]), (name, copies)

    for _ in range(3):
        before = parameters(agent, values=True)
        step()
        for name, p in agent.named_parameters():
            if id(p) in trained:
                assert not torch.equal(p, before[name]), f"{name} does not move in an update"
            else:
                target = next(target for target in targets if name.startswith(f"{target}."))
                network = agent.get_parameter(name.replace(target, targets[target], 1))
                torch.testing.assert_close(p, before[name].lerp(network, args.tau), msg=f"{name} does not move by tau")


def test_evaluations_change_nothing_and_are_the_same_twice(script, tmp_path):
    run(script, tmp_path / "often", FLAGS)
    run(script, tmp_path / "seldom", f"{FLAGS} --eval-frequency 1000")
    often, seldom = saved_by(tmp_path / "often"), saved_by(tmp_path / "seldom")
    for name in ("agent", "optimizers", "rng_state"):
        assert_same(often[name], seldom[name])
    path = next(tmp_path.glob("often/runs/*/checkpoint.pt"))
    run(script, tmp_path / "again", f"{FLAGS} --checkpoint {path} --total-updates 0 --seed 2")
    assert_same(saved_by(tmp_path / "again")["agent"], often["agent"])
    for saved in (seldom, saved_by(tmp_path / "again")):
        assert_same(saved["evaluations"][-1], often["evaluations"][-1], "global_step", "total_updates", "wall_seconds")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Minari wants an author, an e-mail address and more
@pytest.mark.parametrize("terminated", [True, False])
def test_a_termination_cuts_the_bootstrap_and_a_truncation_does_not(terminated, script, own_root, tmp_path):
    """Where every step is the task's end, gamma does not matter."""
    ends = {"terminations": np.array([terminated]), "truncations": np.array([not terminated])}
    write("one/step-v0", *(episode(1, seed, **ends) for seed in range(40)))
    agents = []
    for gamma in (0.5, 0.9):
        run(script, tmp_path / str(gamma), f"{FLAGS} --dataset-id one/step-v0 --gamma {gamma}")
        agents.append(saved_by(tmp_path / str(gamma))["agent"])
    changed = {name for name, tensor in agents[0].items() if not torch.equal(tensor, agents[1][name])}
    assert bool(changed) != terminated, changed


def test_a_run_that_is_killed_and_resumed_has_the_same_bits(script, tmp_path, monkeypatch):
    run(script, tmp_path / "straight", FLAGS)
    save, saved_steps = torch.save, []

    def save_or_die(state, *arguments):
        if state["global_step"] == 4:
            raise KeyboardInterrupt
        saved_steps.append(state["global_step"])
        save(state, *arguments)

    monkeypatch.setattr(torch, "save", save_or_die)
    with pytest.raises(KeyboardInterrupt):
        run(script, tmp_path / "killed", FLAGS)
    monkeypatch.undo()
    assert saved_steps[-1] == 2
    (path,) = tmp_path.glob("killed/runs/*")
    run(script, tmp_path / "killed", f"--resume {path}", tiny=False)
    found, expected = saved_by(tmp_path / "killed"), saved_by(tmp_path / "straight")
    assert_same(found, expected, "wall_seconds", "resume")
