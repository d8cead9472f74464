"""The algorithm: twenty updates, how networks begin, where they drop; and what both scripts share.

`golden/official_iql_20_updates.npz` holds what the official JAX implementation computed on the same weights and batches
(float32, dropout off): `losses` (20, 6) are value loss, critic loss, actor loss, mean V before its step, mean Q1 before
its step and mean advantage after V's step; `q1 q2 tq1 tq2 v mean log_std` are the trained networks' outputs on a batch.
"""

import ast
import inspect
import re

import numpy as np
import pytest
import torch
from processes import ROOT

import iql_continuous
import iql_finetune

OBS_DIM, ACT_DIM = 46, 26
GOLDEN = np.load(ROOT / "tests" / "golden" / "official_iql_20_updates.npz")
COLUMNS = ("v_loss", "qf_loss", "actor_loss", "v_values", "qf_values", "advantages")
SCRIPTS = [iql_continuous, iql_finetune]
by_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)


def golden_agent(script, args):
    """The official run's starting weights, redrawn: its matrices are (in, out), torch's (out, in)."""
    rng, agent = np.random.RandomState(0), script.Agent(OBS_DIM, ACT_DIM, args)
    state = agent.state_dict()
    for name in ("qf1", "qf2", "vf", "actor"):
        sizes = [OBS_DIM + ACT_DIM * ("qf" in name), 256, 256, ACT_DIM if name == "actor" else 1]
        for k, layer in enumerate(("fc1", "fc2", "fc_mean" if name == "actor" else "fc3")):
            weight = (rng.standard_normal((sizes[k], sizes[k + 1])) / np.sqrt(sizes[k])).astype(np.float32)
            bias = (0.1 * rng.standard_normal(sizes[k + 1])).astype(np.float32)
            for network in (name, f"{name}_target") if "qf" in name else (name,):
                state[f"{network}.{layer}.weight"] = torch.tensor(weight.T)
                state[f"{network}.{layer}.bias"] = torch.tensor(bias)
    state["actor.log_std"] = torch.tensor((0.1 * rng.standard_normal(ACT_DIM) - 0.5).astype(np.float32))
    agent.load_state_dict(state)
    return agent


def golden_batches(count=20, size=256, seed=1):
    rng = np.random.RandomState(seed)
    for _ in range(count):
        batch = {"observations": rng.standard_normal((size, OBS_DIM)), "actions": rng.uniform(-1, 1, (size, ACT_DIM))}
        batch |= {"rewards": rng.standard_normal(size), "terminations": rng.uniform(size=size) <= 0.1}
        batch["next_observations"] = rng.standard_normal((size, OBS_DIM))
        yield {name: torch.tensor(array.astype(np.float32)) for name, array in batch.items()}


@by_script
def test_twenty_updates_agree_with_the_official_implementation(script):
    args = script.Args(expectile=0.7, beta=0.5, gamma=0.99, tau=0.005, learning_rate=3e-4, actor_dropout=0.0)
    agent = golden_agent(script, args)
    optimizers, losses = script.make_optimizers(agent, args.learning_rate), []
    for k, batch in enumerate(golden_batches()):
        optimizers[1].param_groups[0]["lr"].fill_(args.learning_rate * 0.5 * (1 + np.cos(np.pi * k / 1000)))
        metrics = script.update(agent, optimizers, batch, args)
        losses.append([metrics[name].mean().item() for name in COLUMNS])
    np.testing.assert_allclose(losses, GOLDEN["losses"], rtol=1e-3, atol=1e-4)
    other, args.expectile, args.beta = golden_agent(script, args), 0.5, 0.0  # SARSA, and cloning
    metrics = script.update(other, script.make_optimizers(other, 0.1), next(golden_batches()), args)
    assert metrics["v_loss"] != pytest.approx(losses[0][0], rel=0.1) and metrics["weights"].eq(1).all()
    agent.eval()
    obs, actions, *_ = next(golden_batches(1, 64, seed=99)).values()
    found = dict(zip(("mean", "log_std"), agent.actor(obs), strict=True)) | {"v": agent.vf(obs)}
    critics = {"q1": agent.qf1, "q2": agent.qf2, "tq1": agent.qf1_target, "tq2": agent.qf2_target}
    for name, output in (found | {name: critic(obs, actions) for name, critic in critics.items()}).items():
        np.testing.assert_allclose(output.detach(), GOLDEN[name], rtol=1e-3, atol=1e-4, err_msg=name)


def test_networks_begin_as_the_official_ones():
    """Orthogonal weights with gain sqrt 2, zero biases and log_std; every network has its own, but for targets.

    Dropout follows each hidden layer's ReLU, in the actor alone.
    """
    agent, dropped = iql_continuous.Agent(7, 3, iql_continuous.Args(actor_dropout=0.4)), []
    (dropout,) = (module for module in agent.modules() if isinstance(module, torch.nn.Dropout))
    dropout.register_forward_hook(lambda _, given, output: dropped.append([*given, output]))
    state = {name: tensor for name, tensor in agent.state_dict().items() if "obs_" not in name}
    matrices = {name: tensor for name, tensor in state.items() if tensor.dim() == 2}
    for matrix in matrices.values():
        matrix = matrix if len(matrix) <= matrix.shape[1] else matrix.T
        torch.testing.assert_close(matrix @ matrix.T, 2 * torch.eye(len(matrix)), rtol=0, atol=1e-5)
    assert not any(tensor.any() for name, tensor in state.items() if name not in matrices)
    sums = {name: matrix.abs().sum().item() for name, matrix in matrices.items()}
    assert len({*sums.values()}) == 12  # of V, the actor and two critics
    assert all(sums[name] == sums[name.replace("_target", "")] for name in sums)
    agent.actor.log_std.data[:] = torch.tensor([-9.0, 1.5, 9.0])  # within the official bounds
    assert agent.actor(torch.randn(100, 7))[1].tolist() == [-5.0, 1.5, 2.0]
    rates = [((x > 0) & (output == 0)).sum().item() / (x > 0).sum().item() for x, output in dropped if (x >= 0).all()]
    assert rates == pytest.approx([0.4, 0.4], abs=0.05)


@by_script
def test_what_a_researcher_adds_is_off_while_the_policy_acts(script):
    """A layer is in training in update(), in V, critics and targets too, and nowhere else."""
    agent, modes = script.Agent(OBS_DIM, ACT_DIM, script.Args()), []
    agent.actor.dropout = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.BatchNorm1d(256))
    optimizers = script.make_optimizers(agent, 0.01)
    for network in agent.children():
        network.register_forward_hook(lambda module, *_: modes.append(module.training))
    acts = [script.Actor.act] + [lambda actor, obs: script.explore(actor, obs, 0.0)] * (script is iql_finetune)
    zeros = np.zeros((3, OBS_DIM))
    for act in 2 * acts:  # what acts puts the actor into evaluation
        agent.eval()
        script.update(agent, optimizers, next(golden_batches()), script.Args())
        assert len(modes) > 7 and all(modes)
        before = [tensor.clone() for tensor in agent.state_dict().values()]
        assert (act(agent.actor, zeros) == act(agent.actor, zeros)[0]).all()
        assert not any(modes[-2:]) and all(map(torch.equal, before, agent.state_dict().values()))
        modes.clear()


def definitions(script):
    """Source text of every function, class and constant at the top level of a script."""
    source, texts = inspect.getsource(script), {}
    for node in ast.parse(source).body:
        name = ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else getattr(node, "name", None)
        decorators = [ast.unparse(decorator) for decorator in getattr(node, "decorator_list", [])]
        texts |= {name: (decorators, ast.get_source_segment(source, node))} if name else {}
    assert not [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assert)]  # python -O skips them
    return texts


def test_what_both_scripts_define_is_the_same_text_and_no_check_is_an_assert():
    continuous, finetune = map(definitions, SCRIPTS)
    assert continuous.keys() <= finetune.keys() and finetune.keys() - continuous.keys() == {"explore"}
    assert {name for name in continuous if continuous[name] != finetune[name]} == {"Args", "parse_args"}


def test_arguments_have_the_defaults_that_the_documentation_gives():
    both = {"seed": 1, "torch_deterministic": True, "cuda": True, "eval_envs": 10, "env_id": "AdroitHandHammer-v1"}
    both |= dict.fromkeys("cudagraphs track capture_video".split(), False) | {"wandb_project_name": "iql"}
    both |= dict.fromkeys("wandb_entity checkpoint resume dataset_id max_episodes reward_scale".split())
    details, words = (ROOT / "docs" / "details.md").read_text(), {"yes": 1, "online": 1, "no": 0}
    for k, script in enumerate(SCRIPTS):
        told = {}
        for *cells, flags in re.findall(r"\n\|.*\| (.*) \| (.*) \| (`--.*)", details):
            names = [flag.replace("-", "_") for flag in re.findall("`--([a-z-]+)`", flags)]
            names = [name for name in names if hasattr(script.Args, name)]
            values = [float(words.get(cell, cell.replace(",", ""))) for cell in cells[k].split(", ") if names]
            told |= zip(names, values, strict=True)
        assert f" else {told.pop('reward_scale')}\n" in inspect.getsource(script)
        assert vars(script.Args()) == {**both, **told, "exp_name": script.__name__}
