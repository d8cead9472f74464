"""Starts the scripts as a user does, a process each, on the tiny environment and in a folder of the test's own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
# 25 evaluations with a checkpoint each, in about two seconds
RUN_LENGTHS = {
    "iql_continuous": "--total-updates 240",
    # whole episodes before the first online update: those of a resumed run, which begin anew, end where others do
    "iql_finetune": "--offline-updates 60 --online-steps 180 --learning-starts 10",
}
SCRIPTS = list(RUN_LENGTHS)
TINY = "--env-id tiny_env:Tiny-v0 --dataset-id tiny/good-v0 --no-cuda --batch-size 32 "
TINY += "--eval-frequency 10 --eval-episodes 2 --final-episodes 2 --eval-envs 2"


started = []  # what no finish() has seen the end of yet


def start(script, folder, arguments, tiny=True, **environment):
    """Start a script in `folder`; what follows in `arguments` overrides the tiny run's, if it is to be one."""
    folder.mkdir(parents=True, exist_ok=True)
    path = script if isinstance(script, Path) else ROOT / f"{script}.py"
    flags = [*TINY.split(), *RUN_LENGTHS[path.stem].split()] if tiny else []
    command = [sys.executable, path, *flags, *arguments.split()]
    environment = {"PYTHONPATH": str(ROOT / "tests"), **environment}
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    started.append(process)
    return process


def kill_started():
    """Leave no process behind, whatever became of a test."""
    while started:
        process = started.pop()
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.communicate()


def finish(process, timeout=120):
    """Wait for a process and all it started, which hold its output open. Returns a CompletedProcess."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"the script or a process of it still ran after {timeout} s") from None
    if process in started:
        started.remove(process)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


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


def wait_until(condition, process, timeout=120):
    """Poll a condition that comes true while `process` runs."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline, "what the test waits for never came"
        time.sleep(0.0005)  # writing a checkpoint takes some milliseconds
