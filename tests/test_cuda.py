"""What a GPU alone runs: its bookkeeping with stand-ins everywhere, the real thing where there is a GPU."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, run_script

import iql_continuous
import iql_finetune

SCRIPTS = pytest.mark.parametrize("script", [iql_continuous, iql_finetune], ids=lambda script: script.__name__)
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def stand_ins(monkeypatch):
    """A torch.cuda that logs what is done in `log`: while it captures, work is recorded, not done."""
    log, state = [], SimpleNamespace(capturing=False)

    class Graph:
        def register_generator_state(self, generator):
            log.append(("registered", generator))

        def replay(self):
            log.append("worked")

    class Stream:
        def wait_stream(self, stream):
            pass

    @contextmanager
    def stream(stream):
        yield

    @contextmanager
    def graph(graph):
        state.capturing = True
        yield
        state.capturing = False

    for name, stand_in in (("CUDAGraph", Graph), ("Stream", Stream), ("current_stream", Stream)):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    return log, state


@SCRIPTS
def test_every_call_of_a_captured_step_does_its_work_once(script, stand_ins):
    log, state = stand_ins
    calls = []

    def step():
        calls.append(state.capturing)
        if not state.capturing:
            log.append("worked")
        return {"call": len(calls)}

    captured_step = script.capture(step, "generator")
    results = [captured_step() for _ in range(10)]
    assert log == [("registered", "generator"), *10 * ["worked"]]
    assert calls == [False, False, False, True]
    assert [result["call"] for result in results] == [1, 2, 3] + 7 * [4]


@SCRIPTS
def test_a_step_that_cannot_be_captured_ends_in_a_sentence(script, stand_ins):
    def step():
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(SystemExit, match="--no-compile or --no-cudagraphs: operation not permitted"):
        script.capture(step, "generator")()


@pytest.mark.parametrize("script, flags", [("iql_continuous.py", "--total-updates 50"), ("iql_finetune.py", "")])
@GPU
def test_a_gpu_learns_the_same_compiled_captured_and_as_written(script, flags, tmp_path):
    flags = flags or "--offline-updates 50 --online-steps 120 --learning-starts 100"
    flags += " --env-id AdroitHandPen-v1 --dataset-id bundled/pen/demos-v0 --eval-episodes 2 --save-model"
    flags += " --actor-dropout 0.0"  # the compiler may draw its random numbers in another order
    models = []
    for name, more in (("fast", ""), ("captured", "--no-compile"), ("plain", "--no-compile --no-cudagraphs")):
        run_script(script, f"{flags} {more} --exp-name {name}", tmp_path)
        (path,) = tmp_path.glob(f"runs/*__{name}__*/model.pt")
        models.append(torch.load(path, weights_only=True, map_location="cpu")["agent"])
    for model in models[:-1]:
        torch.testing.assert_close(model, models[-1], rtol=1e-3, atol=1e-4)


@GPU
def test_the_update_benchmark_runs_on_a_gpu(tmp_path):
    assert "fraction: " in run_script(ROOT / "tests" / "benchmark_updates.py", "--turns 1", tmp_path)
