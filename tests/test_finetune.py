"""What iql_finetune.py adds to iql_continuous.py, and that the rest of the two is the same text."""

import ast
import inspect

import torch

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
    assert continuous.keys() <= finetune.keys() and finetune.keys() - continuous.keys() == {"explore"}
    assert {name for name in continuous if continuous[name] != finetune[name]} == {"Args", "parse_args"}


def test_arguments_of_both_scripts_differ_only_where_they_should():
    continuous, finetune = vars(iql_continuous.Args()), vars(iql_finetune.Args())
    assert continuous.keys() - finetune.keys() == {"total_updates"}
    online = {"offline_updates", "online_steps", "learning_starts", "exploration_scale", "anneal_lr"}
    assert finetune.keys() - continuous.keys() == online
    other = {name for name in continuous.keys() & finetune.keys() if continuous[name] != finetune[name]}
    assert other == {"exp_name", "expectile"} and finetune["expectile"] == 0.8


def test_exploration_is_the_policys_gaussian_times_a_scale_inside_the_bounds():
    torch.manual_seed(0)
    actor = iql_finetune.Actor(3, 2, dropout=0.5)
    actor.log_std.data[:] = torch.tensor([-2.0, -3.0])
    x = torch.zeros(20_000, 3)
    actions = torch.from_numpy(iql_finetune.explore(actor, x.numpy(), 0.5))
    torch.testing.assert_close(actions.mean(0), actor(x[:1])[0][0], atol=0.01, rtol=0)
    torch.testing.assert_close(actions.std(0), 0.5 * torch.tensor([-2.0, -3.0]).exp(), atol=0.002, rtol=0)
    actor.log_std.data[:] = 2.0
    assert abs(iql_finetune.explore(actor, x.numpy(), 1.0)).max() == 1
