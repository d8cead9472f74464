"""Runs the scripts on the tiny environment and in a folder of the test's own.

`run` does so in the test's process, which takes a tenth of a second. `start` starts a process as a user does, where
signals and kills count: it is forked from a server that has imported what the scripts import (3 seconds otherwise).
"""

import io
import multiprocessing
import os
import runpy
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

import gymnasium as gym
import pytest
import torch

ROOT = Path(__file__).parent.parent
# 13 evaluations with a checkpoint each, in about a second
RUN_LENGTHS = {
    "iql_continuous": "--total-updates 120",
    # whole episodes before the first online update: those of a resumed run, which begin anew, end where others do
    "iql_finetune": "--offline-updates 40 --online-steps 80 --learning-starts 10",
}
SCRIPTS = list(RUN_LENGTHS)
asked_for_determinism = []  # by execute(), where nobody waits for what it imports
TINY = "--env-id tiny_env:Tiny-v0 --dataset-id tiny/good-v0 --no-cuda --batch-size 32 "
TINY += "--eval-frequency 10 --eval-episodes 2 --final-episodes 2 --eval-envs 2"


def command(script, arguments, tiny):
    """The script's path and its arguments; those given override the tiny run's, if it is to be one."""
    path = script if isinstance(script, Path) else ROOT / f"{script}.py"
    flags = f"{TINY} {RUN_LENGTHS.get(path.stem, '')}" if tiny else ""
    return path, shlex.split(f"{flags} {arguments}")


def execute(script, folder, arguments="", tiny=True):
    """Run a script in this process, with all of its environments, to its good end: its globals, and what it printed."""
    folder.mkdir(parents=True, exist_ok=True)
    path, arguments = command(script, arguments, tiny)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        patch.chdir(folder)
        patch.setattr(sys, "argv", [str(path), *arguments])
        patch.setattr(sys, "path", [str(path.parent), *sys.path])
        patch.setattr(gym.vector, "AsyncVectorEnv", gym.vector.SyncVectorEnv)
        patch.setattr(signal, "signal", lambda *_: None)
        patch.setattr(torch, "use_deterministic_algorithms", asked_for_determinism.append)
        try:
            script_globals = runpy.run_path(str(path), run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise
            script_globals = {}
    return script_globals, printed.getvalue()


def run(*arguments, **options):
    """Run a script in this process, see execute(). Returns what it printed."""
    return execute(*arguments, **options)[1]


def refused(sentence, *arguments, **options):
    """The script ends with the sentence, in which there are these words. Returns the sentence."""
    with pytest.raises(SystemExit) as end:
        run(*arguments, **options)
    assert sentence in str(end.value)
    return end.value.code


server = multiprocessing.get_context("forkserver")
# the last one is what torch.use_deterministic_algorithms imports
server.set_forkserver_preload(
    ["minari", "gymnasium_robotics", "tyro", "torch.utils.tensorboard", "torch._inductor.config"]
)
started = []  # what no finish() has seen the end of yet


def become(path, arguments, folder, environment, streams):
    """Turn this process into one that `python path arguments` started in `folder`."""
    os.setsid()
    os.open(streams / "alive", os.O_WRONLY)  # open as long as this process lives, or one that it forks
    for fd, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(streams / name, os.O_WRONLY | os.O_CREAT), fd)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [str(path), *arguments]
    others = [path for path in sys.path if path not in (str(ROOT), str(ROOT / "tests"))]
    sys.path = [str(path.parent), str(ROOT / "tests"), *others]
    multiprocessing.process._parent_process = None  # by this a script tells itself from its workers
    multiprocessing.set_start_method("fork", force=True)  # Python's own on Linux, and not the server's
    runpy.run_path(str(path), run_name="__main__")


def start(script, folder, arguments="", tiny=True):
    """Start a script in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    path, arguments = command(script, arguments, tiny)
    streams = Path(tempfile.mkdtemp())
    os.mkfifo(streams / "alive")
    alive = os.open(streams / "alive", os.O_RDONLY | os.O_NONBLOCK)
    process = server.Process(target=become, args=(path, arguments, folder, dict(os.environ), streams))
    process.start()
    process.alive, process.streams = alive, streams
    started.append(process)
    return process


def kill_started():
    """Leave no process behind, whatever became of a test."""
    while started:
        process = started[-1]
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        finish(process)


def finish(process, timeout=120):
    """Wait for a process and all it forked. Returns a CompletedProcess."""
    process.join(timeout)
    if process.exitcode is None or not select.select([process.alive], [], [], timeout)[0]:
        raise AssertionError(f"the script or a process of it still ran after {timeout} s")
    out, err = ((process.streams / name).read_text() for name in ("out", "err"))
    os.close(process.alive)
    shutil.rmtree(process.streams)
    started.remove(process)
    return subprocess.CompletedProcess(process.name, process.exitcode, out, err)


def wait_until(condition, process, timeout=120):
    """Poll a condition that comes true while `process` runs."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.is_alive(), finish(process)
        assert time.monotonic() < deadline, "what the test waits for never came"
        time.sleep(0.0005)  # writing a checkpoint takes some milliseconds


def run_dir(folder):
    (path,) = (folder / "runs").iterdir()
    return path


def saved_by(folder, name="checkpoint.pt"):
    """A checkpoint of the one run in `folder`."""
    return torch.load(run_dir(folder) / name, weights_only=True)
