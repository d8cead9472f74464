"""Runs the scripts on the tiny environment and in a folder of the test's own.

`run` does so in the test's process, which takes a tenth of a second, `start` in one that is forked from it, where
signals and kills count. Imports would take 3 seconds otherwise.
"""

import csv
import io
import itertools
import json
import os
import runpy
import select
import shlex
import signal
import sys
import traceback
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parent.parent
LENGTH = {"iql_continuous": "--total-updates", "iql_finetune": "--online-steps 0 --offline-updates"}  # offline alone
NOTHING = {script: f"{flags} 0" for script, flags in LENGTH.items()}
# 7 evaluations with a checkpoint each. Whole episodes before the first online update: those of a resumed run, which
# begin anew, end where others do
ORDINARY = {"iql_continuous": "--total-updates 60"}
ORDINARY |= {"iql_finetune": "--offline-updates 20 --online-steps 40 --learning-starts 10"}
SCRIPTS = list(LENGTH)
TINY = "--env-id tiny_env:Tiny-v0 --no-cuda --batch-size 32 "
TINY += "--eval-frequency 10 --eval-episodes 2 --eval-envs 2"
DATA = "--dataset-id tiny/good-v0"
by_script = pytest.mark.parametrize("script", SCRIPTS)
asked_for_determinism = []  # by execute(), where nobody waits for what it imports
Killed = type("Killed", (BaseException,), {})


def become(script, folder, arguments, tiny, patch):
    """Run a script as `python script arguments` would in `folder`. Returns its globals.

    If it is to be a tiny run, what is in the arguments overrides that run's.
    """
    path = script if isinstance(script, Path) else ROOT / f"{script}.py"
    folder.mkdir(parents=True, exist_ok=True)
    patch.chdir(folder)
    ordinary = f"{DATA} {ORDINARY.get(path.stem, '')}"
    if "--checkpoint" in arguments:  # it has its own data, and takes the place of the offline updates
        ordinary = ordinary.replace(DATA, "").replace("--offline-updates 20", "")
    arguments = f"{TINY} {ordinary} {arguments}" if tiny else arguments
    patch.setattr(sys, "argv", [str(path), *shlex.split(arguments)])
    patch.setattr(sys, "path", [str(path.parent), *sys.path])
    return runpy.run_path(str(path), run_name="__main__")


def execute(script, folder, arguments="", tiny=True):
    """Run a script in this process, with all of its environments, to its good end: its globals, and what it printed."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        patch.setattr(gym.vector, "AsyncVectorEnv", gym.vector.SyncVectorEnv)
        patch.setattr(signal, "signal", lambda *_: None)
        patch.setattr(torch, "use_deterministic_algorithms", asked_for_determinism.append)
        try:
            return become(script, folder, arguments, tiny, patch), printed.getvalue()
        except SystemExit as end:
            if end.code:
                raise
            return {}, printed.getvalue()


def run(*arguments, **options):
    """What a script printed, see execute()."""
    return execute(*arguments, **options)[1]


def refused(sentence, *arguments, **options):
    """The script ends with the sentence, in which there are these words. Returns the sentence."""
    with pytest.raises(SystemExit) as end:
        run(*arguments, **options)
    assert sentence in str(end.value)
    return end.value.code


@contextmanager
def killed(owner, name, at):
    """The run in here is killed in its `at`-th call of this function; of a file written there, a half is left."""
    function, calls = getattr(owner, name), itertools.count(1)

    def call(*arguments):
        if next(calls) < at:
            return function(*arguments)
        if name == "save":
            file = arguments[1] if hasattr(arguments[1], "write") else open(arguments[1], "wb")
            file.write(b"PK" + bytes(1000))
            file.flush()
        raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, name, call)
        yield


def resume(script, folder, arguments=""):
    """Go on with the run in `folder`, under its own arguments. Returns what is printed."""
    return run(script, folder, f"--resume {run_dir(folder).relative_to(folder)} {arguments}", tiny=False)


started = []  # what no finish() has seen the end of yet


def start(script, folder, arguments=""):
    """Fork a process of a tiny run in `folder`."""
    read, write = os.pipe()
    pid = os.fork()
    if pid > 0:
        os.close(write)
        started.append(SimpleNamespace(pid=pid, output=read))
        return started[-1]
    try:
        os.setsid()
        os.dup2(write, 2)  # what goes to stdout is lost
        os.close(write)
        sys.stdout, sys.stderr = open(os.devnull, "w"), open(2, "w", buffering=1)
        become(script, folder, arguments, True, pytest.MonkeyPatch())
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def finish(process, timeout=600):
    """Wait for a process and all that it forked. Returns its exit status, as `subprocess` has it, and its output."""
    output = b""
    while select.select([process.output], [], [], timeout)[0]:
        if not (more := os.read(process.output, 65536)):
            started.remove(process)
            os.close(process.output)
            return os.waitstatus_to_exitcode(os.waitpid(process.pid, 0)[1]), output.decode()
        output += more
    raise AssertionError(f"the script or a process of it still runs: {output.decode()}")


def run_dir(folder):
    (path,) = (folder / "runs").iterdir()
    return path


def saved_by(folder, name="checkpoint.pt"):
    """A checkpoint of the one run in `folder`."""
    return torch.load(run_dir(folder) / name, weights_only=True)


def written_by(folder):
    """Of the one run in `folder`: args.json, the rows of evaluations.csv, and TensorBoard's scalars and first text."""
    path = run_dir(folder)
    events = EventAccumulator(str(path), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    scalars = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    text = events.Tensors("hyperparameters/text_summary")[0].tensor_proto.string_val[0].decode()
    rows = list(csv.DictReader((path / "evaluations.csv").open()))
    return SimpleNamespace(json=json.loads((path / "args.json").read_text()), rows=rows, scalars=scalars, text=text)


def assert_same(found, expected, *but):
    """Two checkpoints' contents are equal to the bit, but for what is under these names."""
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected.keys() - {*but}:
            assert_same(found[name], expected[name], *but)
    elif isinstance(expected, (list, tuple)):
        for pair in zip(found, expected, strict=True):
            assert_same(*pair, *but)
    else:
        assert found == expected
