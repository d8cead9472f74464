"""Updates a second of the scripts' own `update`, and how near that is to the fastest that this machine could do.

    python tests/benchmark_updates.py [--script iql_finetune] [--device cuda] [--threads 2]

The bound is the rate of the update's 44 matrix products alone, forward and backward, each into memory that is already
there: no losses, no optimizer, no sampling, no Python to speak of. Both are measured in turns, so that the fraction
survives a machine whose speed drifts. This is no test: nothing is asserted about a time.
"""

import importlib
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


@dataclass
class Args:
    script: Literal["iql_continuous", "iql_finetune"] = "iql_continuous"
    """whose update"""
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    """where"""
    threads: int = torch.get_num_threads()
    """threads of a CPU"""
    obs_dim: int = 46
    """size of an observation; 46 is hammer's"""
    act_dim: int = 26
    """size of an action; 26 is hammer's"""
    transitions: int = 100_000
    """size of the (random) dataset"""
    compile: bool = False
    """on a GPU: torch.compile"""
    cudagraphs: bool = True
    """on a GPU: one CUDA graph, as the scripts do"""
    turns: int = 7
    """how often each is measured; the medians are printed"""
    updates: int = 100
    """updates in a turn"""


def products(obs_dim, act_dim, batch_size):
    """The (m, k, n) of every matrix product in an update, (m, k) times (k, n); 256 hidden units."""

    def forward(inputs, outputs):
        return [(batch_size, inputs, 256), (batch_size, 256, 256), (batch_size, 256, outputs)]

    def backward(inputs, outputs):  # of the weights, then of the activations: nobody wants the inputs'
        weights = [(k, m, n) for m, k, n in forward(inputs, outputs)]
        return weights + [(m, n, k) for m, k, n in forward(inputs, outputs)[1:]]

    qf, vf, actor = (obs_dim + act_dim, 1), (obs_dim, 1), (obs_dim, act_dim)
    trained = [qf, qf, vf, actor]
    only_evaluated = [qf, qf, vf, vf]  # the targets, V again after its step, and V at the next observations
    shapes = [shape for sizes in trained for shape in forward(*sizes) + backward(*sizes)]
    return shapes + [shape for sizes in only_evaluated for shape in forward(*sizes)]


def seconds(function, repeats, device):
    """Wall-clock seconds a call."""
    if device == "cuda":
        torch.cuda.synchronize()
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
    script = importlib.import_module(args.script)
    torch.use_deterministic_algorithms(True)  # as the scripts do
    torch.utils.deterministic.fill_uninitialized_memory = False

    if args.device == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream())
    script_args = script.Args()
    agent = script.Agent(args.obs_dim, args.act_dim).to(args.device)
    optimizers = script.make_optimizers(agent, script_args.learning_rate)
    count = args.transitions
    transitions = {
        "observations": torch.randn(count, args.obs_dim, device=args.device),
        "actions": torch.rand(count, args.act_dim, device=args.device) * 2 - 1,
        "rewards": torch.randn(count, device=args.device),
        "next_observations": torch.randn(count, args.obs_dim, device=args.device),
        "terminations": torch.zeros(count, device=args.device),
    }

    fast_update = torch.compile(script.update) if args.compile and args.device == "cuda" else script.update

    def step():
        indices = torch.randint(count, (script_args.batch_size,), device=args.device)
        data = {name: tensor.index_select(0, indices) for name, tensor in transitions.items()}
        return fast_update(agent, optimizers, data, script_args)

    if args.cudagraphs and args.device == "cuda":
        step = script.capture(step)

    shapes = products(args.obs_dim, args.act_dim, script_args.batch_size)
    operands = [
        (
            torch.randn(m, k, device=args.device),
            torch.randn(k, n, device=args.device),
            torch.empty(m, n, device=args.device),
        )
        for m, k, n in shapes
    ]

    def multiply():
        for a, b, out in operands:
            torch.mm(a, b, out=out)

    bound = multiply
    for function in (step, multiply):
        seconds(function, 10, args.device)  # memory, kernels, clocks
    if args.device == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            multiply()
        bound = graph.replay
    turns = [[seconds(f, args.updates, args.device) for f in (step, bound)] for _ in range(args.turns)]
    update_time, bound_time = np.median(turns, 0)
    fraction = np.median([bound_time / update_time for update_time, bound_time in turns])
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {args.threads} threads"
    mflop = sum(2 * m * k * n for m, k, n in shapes) / 1e6
    print(f"{args.script}, {where}, dropout {script_args.actor_dropout}, {args.turns} turns of {args.updates} updates")
    print(f"update:   {1 / update_time:.0f} updates/s (slowest and fastest turn: ", end="")
    print(f"{1 / max(t for t, _ in turns):.0f}, {1 / min(t for t, _ in turns):.0f})")
    print(f"bound:    {1 / bound_time:.0f} updates/s ({len(shapes)} products, {mflop:.0f} MFLOP an update)")
    print(f"fraction: {fraction:.2f}")
