"""Milliseconds of one training step, sampling included: ours, the matrix products alone, d3rlpy's and TorchRL's IQL.

    python docs/benchmark_updates.py --threads 1

They take turns, so that their ratios survive a machine whose speed drifts. The bound is the 44 matrix products of one
update, forward and backward, written into memory that is already there. A library that is not installed is left out;
docs/results.md installs both beside the script's own PyTorch.
"""

import copy
import math
import os
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import tyro

# the stretch of the script that needs only Args and PyTorch
source = (Path(__file__).resolve().parent.parent / "iql_continuous.py").read_text()
names = {"torch": torch, "nn": torch.nn, "F": torch.nn.functional, "math": math, "os": os, "sys": sys}
names |= {"dataclass": dataclass, "copy": copy, "__name__": "iql", "__file__": "iql_continuous.py"}
for begin, end in (("@dataclass", "# by Adroit task"), ("def capture(", "def save(")):
    exec(source[source.index(begin) : source.index(end)], names)


@dataclass
class Args:
    threads: int = 1
    """threads of a CPU"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """where ours and the products run; the libraries are measured on a CPU only"""
    turns: int = 5
    """how often each is measured; the medians are printed"""
    steps: int = 100
    """steps in a turn"""


OBS_DIM, ACT_DIM, BATCH, COUNT = 46, 26, 256, 100_000  # hammer's sizes; transitions in the (random) dataset


def ours(transitions, dropout, device):
    """The script's own step."""
    args = names["Args"](actor_dropout=dropout)
    agent = names["Agent"](OBS_DIM, ACT_DIM, args).to(device)
    optimizers = names["make_optimizers"](agent, args.learning_rate)
    transitions = {name: tensor.to(device) for name, tensor in transitions.items()}

    def step():
        indices = torch.randint(COUNT, (BATCH,), device=device)
        data = {name: tensor.index_select(0, indices) for name, tensor in transitions.items()}
        return names["update"](agent, optimizers, data, args)

    return names["capture"](step).__next__ if device == "cuda" else step


def products(device):
    """The 44 matrix products of an update, (m, k) times (k, n)."""

    def forward(inputs, outputs):
        return [(BATCH, inputs, 256), (BATCH, 256, 256), (BATCH, 256, outputs)]

    def backward(inputs, outputs):  # of the weights, then of the activations: nobody wants the inputs'
        return [(k, m, n) for m, k, n in forward(inputs, outputs)] + [(BATCH, 256, 256), (BATCH, outputs, 256)]

    qf, vf, actor = (OBS_DIM + ACT_DIM, 1), (OBS_DIM, 1), (OBS_DIM, ACT_DIM)
    shapes = [shape for sizes in (qf, qf, vf, actor) for shape in forward(*sizes) + backward(*sizes)]
    # only evaluated: the targets, V again after its step, and V at the next observations
    shapes += [shape for sizes in (qf, qf, vf, vf) for shape in forward(*sizes)]
    operands = [[torch.randn(size, device=device) for size in ((m, k), (k, n), (m, n))] for m, k, n in shapes]

    def step():
        for a, b, out in operands:
            torch.mm(a, b, out=out)

    return names["capture"](step).__next__ if device == "cuda" else step


def d3rlpy_step(transitions):
    """d3rlpy's IQL with its defaults, two hidden layers of 256."""
    from d3rlpy.algos import IQLConfig
    from d3rlpy.dataset import MDPDataset

    ends = np.arange(1, COUNT + 1) % 200 == 0
    columns = (transitions[name].numpy() for name in ("observations", "actions", "rewards"))
    dataset = MDPDataset(*columns, terminals=np.zeros(COUNT), timeouts=ends)
    iql = IQLConfig(batch_size=BATCH).create(device=False)
    iql.build_with_dataset(dataset)
    return lambda: iql.update(dataset.sample_transition_batch(BATCH))


def torchrl_step(transitions):
    """TorchRL's IQLLoss, put together as in its sota-implementations/iql."""
    from tensordict import TensorDict
    from tensordict.nn import TensorDictModule
    from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
    from torchrl.modules import MLP, NormalParamExtractor, ProbabilisticActor, TanhNormal, ValueOperator
    from torchrl.objectives import IQLLoss, SoftUpdate

    def mlp(inputs, outputs):
        return MLP(in_features=inputs, out_features=outputs, num_cells=[256, 256], activation_class=torch.nn.ReLU)

    network = torch.nn.Sequential(mlp(OBS_DIM, 2 * ACT_DIM), NormalParamExtractor())
    module = TensorDictModule(network, in_keys=["observation"], out_keys=["loc", "scale"])
    actor = ProbabilisticActor(module, in_keys=["loc", "scale"], distribution_class=TanhNormal)
    qvalue = ValueOperator(mlp(OBS_DIM + ACT_DIM, 1), ["observation", "action"], ["state_action_value"])
    value = ValueOperator(mlp(OBS_DIM, 1), ["observation"])
    loss = IQLLoss(actor, qvalue, value, loss_function="l2", temperature=3.0, expectile=0.7)
    loss.make_value_estimator(gamma=0.99)
    targets = SoftUpdate(loss, tau=0.005)
    optimizer = torch.optim.Adam(loss.parameters(), lr=3e-4)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(COUNT), batch_size=BATCH)
    false = torch.zeros(COUNT, 1, dtype=torch.bool)
    following = {"observation": transitions["next_observations"], "reward": transitions["rewards"][:, None]}
    following |= {"done": false, "terminated": false}
    data = {"observation": transitions["observations"], "action": transitions["actions"], "next": following}
    buffer.extend(TensorDict(data, batch_size=[COUNT]))

    def step():
        losses = loss(buffer.sample())
        optimizer.zero_grad()
        (losses["loss_actor"] + losses["loss_qvalue"] + losses["loss_value"]).backward()
        optimizer.step()
        targets.step()

    return step


def seconds(function, repeats, device):
    """Wall-clock seconds a call."""
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


if __name__ == "__main__":
    args = tyro.cli(Args)
    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    torch.use_deterministic_algorithms(True)  # as the scripts do
    torch.utils.deterministic.fill_uninitialized_memory = False
    if args.device == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream())
    transitions = {
        "observations": torch.randn(COUNT, OBS_DIM),
        "actions": torch.rand(COUNT, ACT_DIM) * 1.98 - 0.99,
        "rewards": torch.randn(COUNT),
        "next_observations": torch.randn(COUNT, OBS_DIM),
        "terminations": torch.zeros(COUNT),
    }
    steps = {"products alone": products(args.device), "ours": ours(transitions, 0.1, args.device)}
    steps["ours without dropout"] = ours(transitions, 0.0, args.device)
    for name, make in (("d3rlpy", d3rlpy_step), ("torchrl", torchrl_step)):
        if find_spec(name) and args.device == "cpu":
            steps[name] = make(transitions)
    for step in steps.values():
        seconds(step, 10, args.device)  # memory, kernels, clocks
    turns = np.array([[seconds(f, args.steps, args.device) for f in steps.values()] for _ in range(args.turns)])
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {args.threads} threads"
    print(f"{where}, PyTorch {torch.__version__}, medians of {args.turns} turns of {args.steps} steps")
    medians, fractions = np.median(turns, 0), np.median(turns[:, :1] / turns, 0)
    for name, median, fraction in zip(steps, medians, fractions, strict=True):
        print(f"{name}: {1000 * median:.1f} ms, {1 / median:.0f} steps/s, {fraction:.2f} of the bound")
