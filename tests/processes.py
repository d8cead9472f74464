"""Runs the scripts as a user does, a process each, on the tiny environment and in a folder of the test's own.

The processes are forked from a server that has imported what the scripts import: that takes 3 seconds otherwise.
tests/test_run.py and tests/test_readme.py start Python itself.
"""

import multiprocessing
import os
import runpy
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
# 13 evaluations with a checkpoint each, in about a second
RUN_LENGTHS = {
    "iql_continuous": "--total-updates 120",
    # whole episodes before the first online update: those of a resumed run, which begin anew, end where others do
    "iql_finetune": "--offline-updates 40 --online-steps 80 --learning-starts 10",
}
SCRIPTS = list(RUN_LENGTHS)
TINY = "--env-id tiny_env:Tiny-v0 --dataset-id tiny/good-v0 --no-cuda --batch-size 32 "
TINY += "--eval-frequency 10 --eval-episodes 2 --final-episodes 2 --eval-envs 2"


server = multiprocessing.get_context("forkserver")
# the last one is what torch.use_deterministic_algorithms imports
server.set_forkserver_preload(
    ["minari", "gymnasium_robotics", "tyro", "torch.utils.tensorboard", "torch._inductor.config"]
)
started = []  # what no finish() has seen the end of yet


def become(script, arguments, folder, environment, streams):
    """Turn this process into one that `python script arguments` started in `folder`."""
    os.setsid()
    os.open(streams / "alive", os.O_WRONLY)  # open as long as this process lives, or one that it forks
    for fd, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(streams / name, os.O_WRONLY | os.O_CREAT), fd)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [str(script), *arguments]
    others = [path for path in sys.path if path not in (str(ROOT), str(ROOT / "tests"))]
    sys.path = [str(script.parent), *environment["PYTHONPATH"].split(os.pathsep), *others]
    multiprocessing.process._parent_process = None  # by this a script tells itself from its workers
    multiprocessing.set_start_method("fork", force=True)  # Python's own on Linux, and not the server's
    runpy.run_path(str(script), run_name="__main__")


def start(script, folder, arguments, tiny=True, **environment):
    """Start a script in `folder`; what follows in `arguments` overrides the tiny run's, if it is to be one."""
    folder.mkdir(parents=True, exist_ok=True)
    path = script if isinstance(script, Path) else ROOT / f"{script}.py"
    flags = [*TINY.split(), *RUN_LENGTHS[path.stem].split()] if tiny else []
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), **environment}
    streams = Path(tempfile.mkdtemp())
    os.mkfifo(streams / "alive")
    alive = os.open(streams / "alive", os.O_RDONLY | os.O_NONBLOCK)
    arguments = [*flags, *arguments.split()]
    process = server.Process(target=become, args=(path, arguments, folder, environment, streams))
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


def run(script, folder, arguments="", **environment):
    """Run a script to its good end. Returns what it printed."""
    done = finish(start(script, folder, arguments, **environment))
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_refused(done, *telling):
    """The finished process failed, without a traceback, and its last line on stderr has all of the `telling` words."""
    assert done.returncode != 0, done.stdout
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    sentence = done.stderr.strip().splitlines()[-1]
    for words in telling:
        assert words in sentence, done.stderr


def run_dir(folder):
    (path,) = (folder / "runs").iterdir()
    return path


def saved_by(folder, name="checkpoint.pt"):
    """A checkpoint of the one run in `folder`."""
    return torch.load(run_dir(folder) / name, weights_only=True)


def wait_until(condition, process, timeout=120):
    """Poll a condition that comes true while `process` runs."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.is_alive(), finish(process)
        assert time.monotonic() < deadline, "what the test waits for never came"
        time.sleep(0.0005)  # writing a checkpoint takes some milliseconds
