"""What must hold for an edited copy of a script, too: `pytest --script my_variant.py tests` runs this on it alone.

No network has a name here: what an optimizer has is trained, and a target is a module of the agent that none has and
that starts as a copy of one. The copy keeps the names `agent`, `step` and `args` of the script's last part.
"""

import csv
import gc

import numpy as np
import pytest
import torch
from processes import ROOT, SCRIPTS, assert_same, execute, killed, resume, run, run_dir, saved_by
from tiny_env import episode, write

FLAGS = "--eval-frequency 2 --tau 0.25 --learning-rate 0.01 --expectile 0.8 "


def pytest_generate_tests(metafunc):
    variant = metafunc.config.getoption("--script")
    paths = [metafunc.config.invocation_params.dir / variant] if variant else [ROOT / f"{name}.py" for name in SCRIPTS]
    metafunc.parametrize("script", paths, ids=lambda path: path.stem)


def flags(script, updates):
    online = "online_steps" in script.read_text()
    return FLAGS + (f"--offline-updates {updates} --online-steps 0" if online else f"--total-updates {updates}")


def test_every_parameter_is_trained_by_one_optimizer_or_belongs_to_a_target_that_follows_a_network(script, tmp_path):
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
    run(script, again, f"{flags(script, 0)} --checkpoint {path} --seed 2")
    assert_same(saved_by(again)["agent"], often["agent"])
    but = ("global_step", "total_updates", "total_steps", "wall_seconds")
    for saved in (seldom, saved_by(again)):
        assert_same(saved["evaluations"][-1], often["evaluations"][-1], *but)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Minari wants an author, an e-mail address and more
def test_a_termination_cuts_the_bootstrap_and_a_truncation_does_not(script, own_root, tmp_path):
    """Where every step is the task's end, gamma does not matter."""
    for name, ended in (("truncated", False), ("terminated", True)):
        ends = {"terminations": np.array([ended]), "truncations": np.array([not ended])}
        write(f"{name}/step-v0", *(episode(1, seed, **ends) for seed in range(40)))
        agents = []
        for gamma in ("0.5", "0.9"):
            run(script, tmp_path / name / gamma, f"{flags(script, 6)} --dataset-id {name}/step-v0 --gamma {gamma}")
            agents.append(saved_by(tmp_path / name / gamma)["agent"])
        changed = {key for key, tensor in agents[0].items() if not torch.equal(tensor, agents[1][key])}
        assert bool(changed) != ended, f"where all is {name}, gamma changes {changed}"


def test_a_run_that_is_killed_and_resumed_has_the_same_bits(script, tmp_path):
    run(script, tmp_path / "straight", flags(script, 6))
    with killed(csv.DictWriter, "writerows", 3):
        run(script, tmp_path / "killed", flags(script, 6))
    assert saved_by(tmp_path / "killed")["global_step"] == 2
    resume(script, tmp_path / "killed")
    assert_same(saved_by(tmp_path / "killed"), saved_by(tmp_path / "straight"), "wall_seconds", "resume")
