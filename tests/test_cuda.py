"""What a GPU alone runs: its bookkeeping with stand-ins everywhere, the real thing where there is a GPU."""

import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from processes import ROOT

import iql_continuous

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_every_call_of_a_captured_step_does_its_work_once(monkeypatch):
    """With a stand-in for torch.cuda: while it captures, work is recorded, not done."""
    log, capturing = [], []

    @contextmanager
    def graph(graph, stream):
        assert stream == "the current stream"
        capturing.append(True)
        yield
        capturing.pop()

    def step():
        log.append("recorded" if capturing else "worked")
        return len(log)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: log.append("replayed")))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "the current stream")
    monkeypatch.setattr(torch.cuda, "graph", graph)
    captured_step = iql_continuous.capture(step)
    assert [captured_step() for _ in range(6)] == [1, 2, 3, 4, 4, 4]
    assert log == [*3 * ["worked"], "recorded", *3 * ["replayed"]]


FLAGS = "--env-id AdroitHandPen-v1 --dataset-id bundled/pen/demos-v0 --eval-episodes 2 --final-episodes 2"
LENGTH = {"iql_continuous": "--total-updates", "iql_finetune": "--online-steps 0 --offline-updates"}


def process(path, flags, folder):
    command = [sys.executable, path, *flags.split()]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def trained(path, flags, folder, name):
    """The run directory of a short run."""
    process(path, f"{FLAGS} {flags} --exp-name {name}", folder)
    (path,) = folder.glob(f"runs/*__{name}__*")
    return path


def weights(run_dir):
    return torch.load(run_dir / "checkpoint.pt", weights_only=True, map_location="cpu")["agent"]


@pytest.mark.parametrize("script", LENGTH)
@GPU
def test_a_captured_run_has_the_bits_of_a_plain_one_resumed_or_not(script, tmp_path):
    plain = weights(trained(ROOT / f"{script}.py", f"{LENGTH[script]} 60", tmp_path, "plain"))
    captured = weights(trained(ROOT / f"{script}.py", f"{LENGTH[script]} 60 --cudagraphs", tmp_path, "captured"))
    # one that stops after its checkpoint at 30 updates
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    text, place = (ROOT / f"{script}.py").read_text(), "        # losses: here"
    path = tmp_path / f"{script}.py"
    path.write_text(text.replace(place, f"        if global_step > 30:\n            sys.exit()\n{place}"))
    run_dir = trained(path, f"{LENGTH[script]} 60 --cudagraphs --eval-frequency 30", tmp_path, "resumed")
    assert torch.load(run_dir / "checkpoint.pt", weights_only=True)["global_step"] == 30
    process(ROOT / f"{script}.py", f"--resume {run_dir}", tmp_path)
    for found in (captured, weights(run_dir)):
        assert all(torch.equal(plain[name], tensor) for name, tensor in found.items())
