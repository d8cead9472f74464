"""What IQL is: the expectile, the stitching it buys, how networks begin and where they drop; and what scripts share."""

import ast
import inspect
import re

import gymnasium as gym
import numpy as np
import pytest
import torch
from maze import Maze, maze_transitions
from processes import ROOT

import iql_continuous
import iql_finetune

SCRIPTS = [iql_continuous, iql_finetune]


@pytest.mark.parametrize("expectile", [0.1, 0.5, 0.95])
def test_the_minimizer_of_the_expectile_loss_is_the_expectile(expectile):
    """The m where expectile * E[(x - m)+] = (1 - expectile) * E[(m - x)+], found by bisection; the mean for 0.5."""
    sample = np.random.default_rng(0).gamma(2.0, size=1000)
    low, high = sample.min(), sample.max()
    for _ in range(100):
        m = (low + high) / 2
        above, below = np.maximum(sample - m, 0).mean(), np.maximum(m - sample, 0).mean()
        low, high = (m, high) if expectile * above > (1 - expectile) * below else (low, m)
    x = torch.tensor(m, requires_grad=True)
    iql_continuous.expectile_loss(torch.tensor(sample) - x, expectile).backward()
    assert abs(x.grad.item()) < 1e-6 and (m == pytest.approx(sample.mean())) == (expectile == 0.5)


@pytest.mark.parametrize("expectile, episodic_return", [(0.9, 1.0), (0.5, 0.3)])
def test_a_high_expectile_stitches_a_path_that_no_trajectory_shows(expectile, episodic_return):
    torch.manual_seed(0)
    args = iql_continuous.Args(expectile=expectile, beta=30.0, gamma=0.9, learning_rate=1e-3, actor_dropout=0.0)
    transitions, agent = maze_transitions(), iql_continuous.Agent(2, 2, args)
    optimizers = iql_continuous.make_optimizers(agent, args.learning_rate)
    for _ in range(500):
        indices = torch.randint(len(transitions["rewards"]), (64,))
        iql_continuous.update(agent, optimizers, {k: x[indices] for k, x in transitions.items()}, args)
    envs = gym.vector.SyncVectorEnv([lambda: gym.wrappers.TimeLimit(Maze(), 10)])
    assert iql_continuous.evaluate(envs, agent.actor.act, 1)[0] == pytest.approx([episodic_return])


def test_networks_begin_as_the_official_ones():
    """Orthogonal weights with gain sqrt 2, zero biases and log_std; every network has its own, but for targets."""
    agent = iql_continuous.Agent(7, 3, iql_continuous.Args())
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
    assert agent.actor(torch.zeros(1, 7))[1].tolist() == [-5.0, 1.5, 2.0]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_what_a_researcher_adds_is_off_while_the_policy_acts(script):
    """A layer is in training in update(), in V, critics and targets too, and nowhere else."""
    agent, modes = script.Agent(2, 2, script.Args()), []
    agent.actor.dropout = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.BatchNorm1d(256))
    optimizers = script.make_optimizers(agent, 0.01)
    for network in agent.children():
        network.register_forward_hook(lambda module, *_: modes.append(module.training))
    acts = [script.Actor.act] + [lambda actor, obs: script.explore(actor, obs, 0.0)] * (script is iql_finetune)
    for act in 2 * acts:  # what acts puts the actor into evaluation
        script.update(agent, optimizers, maze_transitions(), script.Args())
        assert len(modes) > 7 and all(modes)
        before = [tensor.clone() for tensor in agent.state_dict().values()]
        assert (act(agent.actor, np.zeros((3, 2))) == act(agent.actor, np.zeros((3, 2)))[0]).all()
        assert not any(modes[-2:]) and all(map(torch.equal, before, agent.state_dict().values()))
        modes.clear()


def definitions(script):
    """Source text of every function, class and constant at the top level of a script."""
    source, texts = inspect.getsource(script), {}
    for node in ast.parse(source).body:
        name = ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else getattr(node, "name", None)
        decorators = [ast.unparse(decorator) for decorator in getattr(node, "decorator_list", [])]
        texts |= {name: (decorators, ast.get_source_segment(source, node))} if name else {}
    # python -O leaves assert statements out
    assert not [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assert)]
    return texts


def test_what_both_scripts_define_is_the_same_text_and_no_check_is_an_assert():
    continuous, finetune = map(definitions, SCRIPTS)
    assert continuous.keys() <= finetune.keys() and finetune.keys() - continuous.keys() == {"explore"}
    assert {name for name in continuous if continuous[name] != finetune[name]} == {"Args", "parse_args"}


DEFAULTS = {"seed": 1, "torch_deterministic": True, "cuda": True, "cudagraphs": False, "track": False}
DEFAULTS |= {"wandb_project_name": "iql", "env_id": "AdroitHandHammer-v1", "batch_size": 256, "learning_rate": 3e-4}
DEFAULTS |= {"gamma": 0.99, "tau": 0.005, "beta": 3.0, "max_weight": 100.0, "actor_dropout": 0.1, "normalize_obs": True}
DEFAULTS |= {"eval_frequency": 5000, "eval_episodes": 20, "final_episodes": 100, "eval_envs": 10}
DEFAULTS |= {"capture_video": False}
DEFAULTS |= dict.fromkeys("wandb_entity checkpoint resume dataset_id max_episodes reward_scale reward_shift".split())
ONLINE = {"offline_updates": 1_000_000, "online_steps": 1_000_000, "learning_starts": 20_000, "exploration_scale": 0.3}
ONLINE |= {"anneal_lr": True, "exp_name": "iql_finetune", "expectile": 0.8}


def test_arguments_have_the_defaults_that_the_documentation_gives():
    continuous, finetune = (script.Args() for script in SCRIPTS)
    own = {"exp_name": "iql_continuous", "total_updates": 1_000_000, "expectile": 0.7}
    assert (vars(continuous), vars(finetune)) == ({**DEFAULTS, **own}, {**DEFAULTS, **ONLINE})
    _, offline, online = (ROOT / "docs" / "details.md").read_text().split("\n## D4RL")[0].split("\n**Different while ")
    assert f"| {finetune.expectile:g}, {finetune.beta:g} |" in online
    for args, text, flags in (
        (continuous, offline, ["beta"]),
        (finetune, online, ["learning-starts", "exploration-scale"]),
    ):
        for flag in flags:
            (line,) = re.findall(rf"^\|.*`--{flag}`.*", text.replace(",", ""), re.MULTILINE)
            assert re.search(rf"(?<![\d.]){getattr(args, flag.replace('-', '_')):g}(?![\d.])", line), line
