"""Whatever happens to a run, its last complete checkpoint is there, and --resume goes on as if nothing had happened."""

import csv
import os
import random
import signal
import time

import numpy as np
import pytest
import torch
from processes import ROOT, SCRIPTS, assert_refused, finish, run, run_dir, saved_by, start, wait_until
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

# runs that are offline to their end: all of their bits can be compared
LENGTH = {"iql_continuous": "", "iql_finetune": "--offline-updates 120 --online-steps 0"}
# episodes of ten steps, each of which ends at a checkpoint
ONLINE = "--offline-updates 20 --online-steps 60 --learning-starts 10"


def resume(script, folder, arguments=""):
    """Start to go on with the run in `folder`, under its own arguments."""
    return start(script, folder, f"--resume {run_dir(folder).relative_to(folder)} {arguments}", tiny=False)


def timeless(value):
    """A checkpoint's content in plain types, without times."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in ("wall_seconds", "resume")}
    return [timeless(v) for v in value] if isinstance(value, (list, tuple)) else value


def result(folder):
    """What two runs with the same arguments have in common: both checkpoints, evaluations.csv, scalars, online.bin."""
    with open(run_dir(folder) / "evaluations.csv") as file:
        table = timeless(list(csv.DictReader(file)))
    files = sorted(run_dir(folder).glob("events.*"), key=lambda path: path.stat().st_mtime_ns)
    for k, path in enumerate(files):  # TensorBoard reads those of one second in the order of their process ids as text
        path.rename(path.with_name(f"events.out.tfevents.{k}"))
    events = EventAccumulator(str(run_dir(folder)), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag != "charts/SPS"]
    scalars = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}
    online = [path.read_bytes() for path in run_dir(folder).glob("online.bin")]
    return timeless(saved_by(folder)), timeless(saved_by(folder, "best.pt")), table, scalars, online


def assert_same_result(folder, other):
    names = ("checkpoint.pt", "best.pt", "evaluations.csv", "scalars", "online.bin")
    for name, found, expected in zip(names, result(folder), result(other), strict=True):
        assert found == expected, name
    seconds = [row["wall_seconds"] for row in saved_by(folder)["evaluations"]]
    assert seconds == sorted(seconds)


def rows_in(folder):
    return sum(len(path.read_text().splitlines()) for path in folder.glob("runs/*/evaluations.csv"))


@pytest.fixture(scope="module", params=SCRIPTS)
def script(request):
    return request.param


@pytest.fixture(scope="module")
def straight(script, tmp_path_factory):
    """The folder of a run that nothing happens to."""
    folder = tmp_path_factory.mktemp("straight")
    run(script, folder, LENGTH[script])
    return folder


def test_kills_at_random_moments_change_no_bit(script, straight, tmp_path):
    rng = random.Random(0)
    process = start(script, tmp_path, LENGTH[script])
    for rows in (4, 8):  # the evaluations of the straight run have 13, and the first line is the head
        wait_until(lambda: rows_in(tmp_path) >= rows, process)  # noqa: B023
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        # waits for the evaluation's processes too: none of them is left behind
        assert finish(process).returncode in (-signal.SIGKILL, 0)
        checkpoint = (run_dir(tmp_path) / "checkpoint.pt").read_bytes()
        process = resume(script, tmp_path)
    assert finish(process).returncode == 0
    # back to that checkpoint, from rows and scalars that are all there
    (run_dir(tmp_path) / "checkpoint.pt").write_bytes(checkpoint)
    assert finish(resume(script, tmp_path)).returncode == 0
    assert_same_result(tmp_path, straight)


@pytest.mark.parametrize("signum, send", [(signal.SIGINT, os.killpg), (signal.SIGTERM, os.kill)])
def test_a_stop_signal_in_an_evaluation_ends_a_run_with_a_sentence(signum, send, script, straight, tmp_path):
    process = start(script, tmp_path, LENGTH[script])
    wait_until(lambda: rows_in(tmp_path) >= 4, process)
    (tmp_path / "hang").touch()
    wait_until((tmp_path / "hanging").exists, process)
    send(process.pid, signum)
    (tmp_path / "hang").unlink()  # Python sees a signal that comes just before a blocking read only after it
    done = finish(process)
    assert_refused(done, "Stopped: go on with python ", f"--resume {run_dir(tmp_path).relative_to(tmp_path)}")
    assert done.returncode == 128 + signum and done.stderr.count("Stopped") == 1  # the workers keep silent
    done = finish(resume(script, tmp_path))
    assert done.returncode == 0, done.stderr
    assert_same_result(tmp_path, straight)


@pytest.mark.parametrize("signum, send", [(signal.SIGINT, os.kill), (signal.SIGTERM, os.killpg)])
def test_a_stop_signal_in_training_leaves_no_process(signum, send, script, tmp_path):
    length = "--total-updates" if script == "iql_continuous" else "--offline-updates 0 --online-steps"
    process = start(script, tmp_path, f"{length} 1000000 --eval-frequency 1000000")
    wait_until(lambda: any(tmp_path.glob("runs/*/checkpoint.pt")), process)
    time.sleep(0.5)  # what is after the checkpoint is training
    send(process.pid, signum)
    done = finish(process)
    assert_refused(done, "Stopped: go on with python ", f"--resume {run_dir(tmp_path).relative_to(tmp_path)}")


@pytest.mark.parametrize("signum, send", [(signal.SIGINT, os.killpg), (signal.SIGTERM, os.kill)])
def test_a_stop_signal_before_the_first_update_leaves_no_process(signum, send, script, tmp_path):
    (tmp_path / "runs").mkdir()  # so that the environment hangs as soon as the random policy is evaluated
    (tmp_path / "hang").touch()
    process = start(script, tmp_path, "")
    wait_until((tmp_path / "hanging").exists, process)
    send(process.pid, signum)
    (tmp_path / "hang").unlink()
    assert_refused(finish(process), "Stopped: start again, nothing is saved")
    assert list((tmp_path / "runs").iterdir()) == []


def test_an_evaluation_process_that_dies_ends_the_run(tmp_path):
    (tmp_path / "die").touch()
    (tmp_path / "runs").mkdir()
    done = finish(start("iql_continuous", tmp_path, ""))
    assert done.returncode == 1 and "in evaluate" in done.stderr, done.stderr


def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_checkpoint(script, tmp_path):
    done = finish(start(script, tmp_path, "--learning-rate 1e30"))
    assert_refused(done, "A loss is NaN or infinite at ", " 10: lower --learning-rate")
    saved = saved_by(tmp_path)
    assert saved["global_step"] == 0 and all(tensor.isfinite().all() for tensor in saved["agent"].values())


def test_arguments_given_on_resume_hold_from_then_on(tmp_path):
    run("iql_continuous", tmp_path, "--total-updates 20")
    before, best = saved_by(tmp_path), (run_dir(tmp_path) / "best.pt").read_bytes()
    torch.save({**before, "best_return": 1e9}, run_dir(tmp_path) / "checkpoint.pt")  # no later evaluation is better
    done = finish(resume("iql_continuous", tmp_path, "--total-updates 40 --final-episodes 3"))
    assert done.returncode == 0 and "global_step=40, " in done.stdout.splitlines()[-1], done.stderr
    saved = saved_by(tmp_path)
    assert {**before["args"], "total_updates": 40, "final_episodes": 3} == {**saved["args"], "resume": None}
    assert saved["best_return"] == 1e9 and (run_dir(tmp_path) / "best.pt").read_bytes() == best
    rows = saved["evaluations"]
    assert rows[:3] == before["evaluations"]  # with the length that they were asked for
    assert [(row["episodes"], row["total_updates"]) for row in rows] == 3 * [(2, 20)] + [(2, 40), (3, 40)]
    v_rate, actor_rate, q_rate = (optimizer["param_groups"][0]["lr"].item() for optimizer in saved["optimizers"])
    assert v_rate == q_rate == pytest.approx(3e-4)
    assert actor_rate == pytest.approx(3e-4 * 0.5 * (1 + np.cos(np.pi * 39 / 40)))
    # a kill before the first new evaluation loses neither a row nor what was asked for
    begun = (
        (lambda: saved_by(tmp_path)["args"]["total_updates"] == 10**6),
        (lambda: said.exists() and "from update 41" in said.read_text()),
    )
    for flags, condition in zip(("--total-updates 1000000 --eval-frequency 1000000", ""), begun, strict=True):
        process = resume("iql_continuous", tmp_path, flags)
        said = process.streams / "out"
        wait_until(condition, process)
        process.kill()
        finish(process)
        assert rows_in(tmp_path) == 1 + 5
    done = finish(resume("iql_continuous", tmp_path, "--total-updates 50"))
    assert "global_step=50, total_updates=50, episodes=3, " in done.stdout.splitlines()[-1], done.stderr
    files = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in run_dir(tmp_path).iterdir()}
    done = finish(resume("iql_continuous", tmp_path))  # a finished run says its score again, and writes nothing
    assert f"{run_dir(tmp_path).name} is finished: global_step=50, " in done.stdout and rows_in(tmp_path) == 1 + 6
    assert files == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in run_dir(tmp_path).iterdir()}


def kill_beyond_a_checkpoint(folder, flags, step):
    """Run fine-tuning and kill it when its environment is some steps beyond the checkpoint at `step`."""
    process = start("iql_finetune", folder, flags)
    wait_until(lambda: any(folder.glob("runs/*/checkpoint.pt")), process)
    row = step - 20 + 4  # the fifth online step after it
    path = run_dir(folder) / "online.bin"
    wait_until(lambda: path.stat().st_size == 60 * 40 and np.fromfile(path, np.float32)[row * 10] != 0, process)
    process.kill()
    finish(process)


def test_an_online_run_goes_on_from_its_checkpoint_and_loses_no_transition(tmp_path):
    run("iql_finetune", tmp_path / "straight", ONLINE)
    kill_beyond_a_checkpoint(tmp_path / "killed", ONLINE, step=50)
    saved, path = saved_by(tmp_path / "killed"), run_dir(tmp_path / "killed") / "online.bin"
    collected = saved["global_step"] - 20
    before = np.fromfile(path, np.float32).reshape(60, 10)
    assert before[:collected].any(1).all()
    before[collected:] = 7.0  # a resumed run believes none of what is beyond the checkpoint
    before.tofile(path)
    done = finish(resume("iql_finetune", tmp_path / "killed"))
    assert done.returncode == 0, done.stderr
    assert_same_result(tmp_path / "killed", tmp_path / "straight")
    # longer, with a best score that is never reached again, and then without a part of what was collected
    torch.save({**saved_by(tmp_path / "killed"), "best_return": 1e9}, path.with_name("checkpoint.pt"))
    done = finish(resume("iql_finetune", tmp_path / "killed", "--online-steps 80"))
    assert "global_step=100, " in done.stdout.splitlines()[-1], done.stderr
    assert saved_by(tmp_path / "killed")["best_return"] == 1e9
    longer = np.fromfile(path, np.float32).reshape(80, 10)
    assert longer.any(1).all() and longer[:60].tobytes() == result(tmp_path / "straight")[-1][0]
    longer[30] = 0
    longer.tofile(path)
    done = finish(resume("iql_finetune", tmp_path / "killed", "--online-steps 90"))
    assert_refused(done, "online.bin lacks transitions")


def test_nan_from_the_simulator_is_not_stored_and_a_resumed_run_gets_past_it(tmp_path):
    done, stops = finish(start("iql_finetune", tmp_path, f"{ONLINE} --env-id tiny_env:Unstable-v0")), 0
    while done.returncode != 0 and stops < 20:
        assert_refused(done, "tiny_env:Unstable-v0 gave NaN or infinity at step", "go on with --resume")
        stops += 1
        done = finish(resume("iql_finetune", tmp_path))
    assert stops > 0 and done.returncode == 0
    rows = np.fromfile(run_dir(tmp_path) / "online.bin", np.float32).reshape(60, 10)
    assert np.isfinite(rows).all() and rows.any(1).all()


WANDB = """
def init(**kwargs):
    print("wandb.init", kwargs["id"], kwargs["name"], kwargs["resume"])
"""


def test_a_resumed_run_goes_on_in_the_same_wandb_run(tmp_path):
    (tmp_path / "wandb.py").write_text(WANDB)
    path = os.pathsep.join([str(tmp_path), str(ROOT / "tests")])
    first = finish(start("iql_continuous", tmp_path, "--track --total-updates 10", PYTHONPATH=path))
    name = run_dir(tmp_path).name
    flags = f"--resume runs/{name} --total-updates 20"
    second = finish(start("iql_continuous", tmp_path, flags, tiny=False, PYTHONPATH=path))
    for done in (first, second):
        assert f"wandb.init {name} {name} allow" in done.stdout, done.stderr
        assert "it/s" not in done.stderr  # no progress bar where nobody looks
