"""What a GPU alone runs: its bookkeeping with stand-ins everywhere, the real thing where there is a GPU."""

import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from processes import LENGTH, ROOT, by_script, run_dir, saved_by

import iql_continuous


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
    captured_steps = iql_continuous.capture(step)
    assert [next(captured_steps) for _ in range(6)] == [1, 2, 3, 4, 4, 4]
    assert log == [*3 * ["worked"], "recorded", *3 * ["replayed"]]


def trained(path, folder, flags):
    """The weights that a script's own process leaves."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run([sys.executable, path, *flags.split()], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return saved_by(folder)["agent"]


@by_script
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_run_has_the_bits_of_a_plain_one_resumed_or_not(script, tmp_path):
    flags = "--env-id AdroitHandPen-v1 --dataset-id bundled/pen/demos-v0 --eval-episodes 2"
    path, flags = ROOT / f"{script}.py", f"{flags} {LENGTH[script]} 60"
    plain = trained(path, tmp_path / "plain", flags)
    captured = trained(path, tmp_path / "captured", f"{flags} --cudagraphs")
    (tmp_path / "tests").symlink_to(ROOT / "tests")  # for one that stops after its checkpoint at 30 updates
    text, place = path.read_text(), "        # losses: "
    stopping = f"        if global_step > 30:\n            sys.exit()\n{place}"
    (tmp_path / path.name).write_text(text.replace(place, stopping))
    trained(tmp_path / path.name, tmp_path / "stopped", f"{flags} --cudagraphs --eval-frequency 30")
    assert saved_by(tmp_path / "stopped")["global_step"] == 30
    resumed = trained(path, tmp_path / "stopped", f"--resume {run_dir(tmp_path / 'stopped')}")
    for found in (captured, resumed):
        assert all(torch.equal(plain[name], tensor) for name, tensor in found.items())
