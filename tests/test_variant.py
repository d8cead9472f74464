"""What must hold for an edited copy of a script, too: `pytest --script my_variant.py tests` runs this on it alone.

Only the actor has a name here. What an optimizer has is trained; a target is a module of the agent that none has, and
starts as a copy of one. The copy keeps the names `agent`, `step` and `args` of the script's last part.
"""

import csv
import gc
from types import SimpleNamespace as Some

import conftest
import numpy as np
import pytest
import torch
from processes import ROOT, SCRIPTS, assert_same, execute, killed, resume, run, run_dir, saved_by
from tiny_env import episode, write

FLAGS = "--eval-frequency 2 --tau 0.25 --learning-rate 0.01 "


def pytest_generate_tests(metafunc):
    if "script" not in metafunc.fixturenames:
        return
    variant = metafunc.config.getoption("--script")
    paths = [metafunc.config.invocation_params.dir / variant] if variant else [ROOT / f"{name}.py" for name in SCRIPTS]
    metafunc.parametrize("script", paths, ids=lambda path: path.stem)


def flags(script, updates):
    online = "online_steps" in script.read_text()
    return FLAGS + (f"--offline-updates {updates} --online-steps 0" if online else f"--total-updates {updates}")


def test_every_parameter_is_trained_by_one_optimizer_or_belongs_to_a_target_that_follows_a_network(script, tmp_path):
    """What critics bootstrap from learns from their targets alone."""
    run_globals, _ = execute(script, tmp_path, flags(script, 0))
    agent, step, args = (run_globals[name] for name in ("agent", "step", "args"))
    assert len({*map(id, agent._modules.values())}) == len(agent._modules), "a network has two names: copy.deepcopy it"
    optimizers = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.optim.Optimizer)]
    trained = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]

    targets, own = {}, dict(agent.named_parameters())  # of each target, the name of the network that it is a copy of
    for name, module in agent.named_modules():
        weights = dict(module.named_parameters())
        if name.startswith(tuple(f"{target}." for target in targets)) or {*map(id, weights.values())} & {*trained}:
            continue
        networks = []
        for other, network in agent.named_modules():
            its = dict(network.named_parameters())
            equal = weights and its.keys() == weights.keys() and all(map(torch.equal, its.values(), weights.values()))
            networks += [other] if equal and {*map(id, its.values())} <= {*trained} else []
        assert len(networks) == bool(weights), f"no optimizer has {name}, which is a copy of these: {networks}"
        targets |= {name: networks[0]} if weights else {}
    assert targets, "nothing is a target"
    for name, p in own.items():
        count, target = trained.count(id(p)), name.startswith(tuple(f"{target}." for target in targets))
        assert count == 1 - target, f"{count} optimizers have {name}"
        copies = [other for other, q in own.items() if id(q) in trained and q is not p and torch.equal(p, q)]
        assert target or len(p.unique()) == 1 or not copies, f"{name} and {copies} are copies, and in optimizers"

    for _ in range(3):
        before = {name: p.detach().clone() for name, p in own.items()}
        step()
        for name, p in own.items():
            if id(p) in trained:
                assert not torch.equal(p, before[name]), f"{name} does not move in an update"
            else:
                target = next(target for target in targets if name.startswith(f"{target}."))
                new = before[name].lerp(own[name.replace(target, targets[target], 1)], args.tau)
                torch.testing.assert_close(p, new, msg=f"{name} does not move by tau")

    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    moments = [tensor for state in states for tensor in state.values() if torch.is_tensor(tensor)]
    saved = [(tensor, tensor.detach().clone()) for tensor in (*own.values(), *moments)]
    rng_state, args.tau = torch.get_rng_state(), 0.0  # targets stand still, wherever in an update they move

    def differs(names, *changed):
        """What the next update makes of these parameters when others had changed before it."""
        results = []
        for others in ((), changed):
            for tensor, value in saved:
                tensor.data.copy_(value)
            for name in others:
                own[name].data.mul_(1.5).add_(0.1)
            torch.set_rng_state(rng_state)
            step()
            results.append([own[name].detach().clone() for name in names])
        return not all(map(torch.equal, *results))

    critics = [name for name in own if name.startswith(tuple(f"{network}." for network in targets.values()))]
    others = [name for name, p in own.items() if id(p) in trained and name not in critics and "actor" not in name]
    values = [name for name in others if differs(critics, name)]
    assert values or script.parent != ROOT
    for name in values:
        assert not differs([name], *critics), f"{name}, which critics bootstrap from, learns from critics, not targets"


def test_evaluations_change_nothing_and_are_the_same_twice(script, tmp_path):
    """Only the seed changes the bits, and not how often, with how many environments, on how many episodes one does."""
    run(script, tmp_path / "often", flags(script, 6))
    others = "--eval-frequency 1000 --eval-episodes 3 --eval-envs 3 --cudagraphs"
    run(script, tmp_path / "seldom", f"{flags(script, 6)} {others}")
    often, seldom = saved_by(tmp_path / "often"), saved_by(tmp_path / "seldom")
    for name in ("agent", "optimizers", "rng_state"):
        assert_same(often[name], seldom[name])
    run(script, tmp_path / "seed", f"{flags(script, 6)} --seed 2")
    assert not torch.equal(saved_by(tmp_path / "seed")["rng_state"], often["rng_state"])
    path, again = run_dir(tmp_path / "often") / "checkpoint.pt", tmp_path / "again"
    run(script, again, f"{flags(script, 0)} --checkpoint {path} --seed 2 --eval-envs 3")
    assert_same(saved_by(again)["agent"], often["agent"])
    but = ("global_step", "total_updates", "total_steps", "wall_seconds")
    assert_same(saved_by(again)["evaluations"][-1], often["evaluations"][-1], *but)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Minari wants an author, an e-mail address and more
def test_the_bootstrap_is_from_where_a_step_leads_and_only_a_termination_cuts_it(script, own_root, tmp_path):
    """Where every step is the task's end, gamma does not matter; where none is, nor the next observation."""

    def learned(gamma, ended=False, way=0):
        ends, name = {"terminations": np.array([ended]), "truncations": np.array([not ended])}, f"{ended}-{way}-{gamma}"
        episodes = [episode(1, seed, **ends) for seed in range(40)]
        for one in episodes:
            one.observations[1] += way
        write(f"{name}/step-v0", *episodes)
        run(script, tmp_path / name, f"{flags(script, 6)} --dataset-id {name}/step-v0 --gamma 0.{gamma}")
        return saved_by(tmp_path / name)["agent"]

    straight = learned(9)
    for what, other in (("gamma", learned(5)), ("the next observation", learned(9, way=1))):
        assert not all(map(torch.equal, straight.values(), other.values())), f"{what} changes nothing"
    ended = learned(9, True)
    changed = {key for key, tensor in learned(5, True).items() if not torch.equal(tensor, ended[key])}
    assert not changed, f"where all is terminated, gamma changes {changed}"


def test_a_run_that_is_killed_and_resumed_has_the_same_bits(script, tmp_path):
    run(script, tmp_path / "straight", flags(script, 6))
    with killed(csv.DictWriter, "writerows", 3):
        run(script, tmp_path / "killed", flags(script, 6))
    assert saved_by(tmp_path / "killed")["global_step"] == 2
    resume(script, tmp_path / "killed")
    assert_same(saved_by(tmp_path / "killed"), saved_by(tmp_path / "straight"), "wall_seconds", "resume")


def test_a_copy_that_is_not_there_is_named(tmp_path):
    config = Some(getoption={"--script": "my.py"}.get, invocation_params=Some(dir=tmp_path))
    with pytest.raises(pytest.UsageError, match="my.py: no such file"):
        conftest.pytest_configure(config)
