"""Whatever happens to a run, its last complete checkpoint is there, and --resume goes on as if nothing had happened."""

import csv
import os
import random
import signal
import time

import pytest
import torch
from processes import ROOT, SCRIPTS, assert_refused, finish, run, run_dir, start, wait_until
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import iql_continuous

# whole offline runs, so that all bits can be compared; what an interruption online leaves is in the last tests
LENGTH = {"iql_continuous": "", "iql_finetune": "--offline-updates 240 --online-steps 0"}


def resume_arguments(folder):
    return f"--resume {run_dir(folder).relative_to(folder)}"


def resume(script, folder, arguments=""):
    """Go on with the run in `folder`, under its own arguments."""
    return finish(start(script, folder, f"{resume_arguments(folder)} {arguments}", tiny=False))


def result(folder):
    """What two runs of the same arguments have in common, all but times: (weights, evaluations.csv, scalars)."""
    saved = torch.load(run_dir(folder) / "checkpoint.pt", weights_only=True)
    weights = {name: tensor.numpy().tobytes() for name, tensor in saved["agent"].items()}
    with open(run_dir(folder) / "evaluations.csv") as file:
        table = [{**row, "wall_seconds": 0} for row in csv.DictReader(file)]
    events = EventAccumulator(str(run_dir(folder)), size_guidance={"scalars": 0}).Reload()
    scalars = {}
    for tag in events.Tags()["scalars"]:
        scalars[tag] = [(e.step, 0 if tag == "charts/SPS" else e.value) for e in events.Scalars(tag)]
    return weights, table, scalars


@pytest.fixture(scope="module", params=SCRIPTS)
def script(request):
    return request.param


@pytest.fixture(scope="module")
def straight(script, tmp_path_factory):
    """The result of a run that nothing happens to."""
    folder = tmp_path_factory.mktemp("straight")
    run(script, folder, LENGTH[script])
    return result(folder)


def assert_resumes_as(straight, script, folder):
    """What is left of the run in `folder` can be resumed, and ends as one that nothing happened to."""
    done = resume(script, folder)
    assert done.returncode == 0, done.stderr
    for name, found, expected in zip(("weights", "evaluations.csv", "scalars"), result(folder), straight, strict=True):
        assert found == expected, name


def rows_in(folder):
    return sum(len(path.read_text().splitlines()) for path in folder.glob("runs/*/evaluations.csv"))


def test_kills_at_random_moments_change_no_bit(script, straight, tmp_path):
    rng = random.Random(0)
    process = start(script, tmp_path, LENGTH[script])
    wait_until(lambda: any(tmp_path.glob("runs/*/checkpoint.pt")), process)
    for _ in range(3):
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        # waits for the evaluation's processes too: none of them is left behind
        assert finish(process).returncode == -signal.SIGKILL
        before = rows_in(tmp_path)
        process = start(script, tmp_path, resume_arguments(tmp_path), tiny=False)
        wait_until(lambda: rows_in(tmp_path) >= before + 3, process)  # noqa: B023
    process.kill()
    assert finish(process).returncode == -signal.SIGKILL
    assert_resumes_as(straight, script, tmp_path)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("send", [os.kill, os.killpg], ids=["process", "group"])
def test_a_stop_signal_ends_a_run_with_a_sentence(signum, send, script, straight, tmp_path):
    """In an evaluation."""
    folder = tmp_path / "a folder"
    process = start(script, folder, LENGTH[script])
    wait_until(lambda: any(folder.glob("runs/*/checkpoint.pt")), process)
    (folder / "hang").touch()
    wait_until((folder / "hanging").exists, process)
    send(process.pid, signum)
    (folder / "hang").unlink()  # Python sees a signal that comes just before a blocking read only after it
    done = finish(process)
    assert_refused(done, "Stopped: go on with python ", f"--resume {run_dir(folder).relative_to(folder)}")
    assert done.returncode == 128 + signum
    assert_resumes_as(straight, script, folder)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("send", [os.kill, os.killpg], ids=["process", "group"])
def test_a_stop_signal_while_training_leaves_no_process(script, signum, send, tmp_path):
    long = {"iql_continuous": "--total-updates 1000000", "iql_finetune": "--offline-updates 0 --online-steps 1000000"}
    process = start(script, tmp_path, f"{long[script]} --eval-frequency 1000000")
    wait_until(lambda: any(tmp_path.glob("runs/*/checkpoint.pt")), process)
    time.sleep(1)  # what is after the checkpoint is training
    send(process.pid, signum)
    done = finish(process)
    assert_refused(done, "Stopped: go on with python ", f"--resume {run_dir(tmp_path).relative_to(tmp_path)}")
    assert done.returncode == 128 + signum


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("send", [os.kill, os.killpg], ids=["process", "group"])
def test_a_stop_signal_before_the_first_update_leaves_no_process(signum, send, script, tmp_path):
    (tmp_path / "runs").mkdir()  # so that the environment hangs as soon as the random policy is evaluated
    (tmp_path / "hang").touch()
    process = start(script, tmp_path, "")
    wait_until((tmp_path / "hanging").exists, process)
    send(process.pid, signum)
    (tmp_path / "hang").unlink()
    assert_refused(finish(process), "Stopped: start it again, there is no checkpoint yet")
    assert list((tmp_path / "runs").iterdir()) == []


def test_an_evaluation_process_that_dies_ends_the_run(tmp_path):
    (tmp_path / "die").touch()
    (tmp_path / "runs").mkdir()
    done = finish(start("iql_continuous", tmp_path, ""))
    assert done.returncode == 1 and "in evaluate" in done.stderr, done.stderr


def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_checkpoint(tmp_path):
    done = finish(start("iql_continuous", tmp_path, "--learning-rate 1e30"))
    assert_refused(done, "A loss is NaN or infinite at update 10", "--learning-rate")
    saved = torch.load(run_dir(tmp_path) / "checkpoint.pt", weights_only=True)
    assert saved["global_step"] == 0 and all(tensor.isfinite().all() for tensor in saved["agent"].values())


def test_a_run_goes_on_with_other_wishes_and_refuses_what_makes_it_another(tmp_path):
    run("iql_continuous", tmp_path, "--total-updates 20")
    done = resume("iql_continuous", tmp_path, "--total-updates 40 --eval-episodes 3")
    assert done.returncode == 0 and "global_step=40, " in done.stdout.splitlines()[-1], done.stderr
    saved = torch.load(run_dir(tmp_path) / "checkpoint.pt", weights_only=True)
    assert saved["args"]["total_updates"] == 40 and saved["args"]["batch_size"] == 32
    assert [row["episodes"] for row in saved["evaluations"]] == [2, 2, 2, 3, 2]
    for flags in ("--seed 2", "--no-normalize-obs", "--dataset-id tiny/wide-v0"):
        done = resume("iql_continuous", tmp_path, flags)
        assert_refused(done, "would make another run of", "--" + flags.removeprefix("--no-").strip("-").split()[0])
    refused = resume("iql_continuous", tmp_path, "--total-updates 30")
    assert_refused(refused, "--total-updates 30 is not more than the 40")
    # no row is lost to a kill before the first new one
    (tmp_path / "hang").touch()
    process = start("iql_continuous", tmp_path, f"{resume_arguments(tmp_path)} --total-updates 50", tiny=False)
    wait_until((tmp_path / "hanging").exists, process)
    process.kill()
    (tmp_path / "hang").unlink()
    finish(process)
    assert rows_in(tmp_path) == 1 + 5
    # and the new wish holds
    assert "global_step=50, " in resume("iql_continuous", tmp_path).stdout.splitlines()[-1]
    # of another device or script, or damaged
    path = run_dir(tmp_path) / "checkpoint.pt"
    torch.save(saved | {"device": "cuda"}, path)
    assert_refused(resume("iql_continuous", tmp_path), "ran on cuda, not on cpu")
    saved["measured"]["dataset"]["transitions"] = 41
    torch.save(saved, path)
    assert_refused(resume("iql_continuous", tmp_path), "has 40 transitions", "began with 41")
    assert_refused(resume("iql_finetune", tmp_path), "is not a run of this script")
    path.write_bytes(path.read_bytes()[:100_000])
    assert_refused(resume("iql_continuous", tmp_path), "checkpoint.pt cannot be loaded")


def test_an_evaluation_of_a_checkpoint_is_not_resumed_with_updates(tmp_path):
    run("iql_continuous", tmp_path / "first", "--total-updates 10")
    run("iql_continuous", tmp_path, f"--checkpoint {run_dir(tmp_path / 'first')}/best.pt --total-updates 0")
    assert_refused(resume("iql_continuous", tmp_path, "--total-updates 20"), "begin a new run with that --checkpoint")


def test_collected_steps_are_not_given_up_on_resuming(tmp_path):
    """More of them than updates: --online-steps may not end before them, nor --offline-updates before its updates."""
    flags = "--offline-updates 20 --online-steps 60 --learning-starts 40"
    process = start("iql_finetune", tmp_path, flags)
    wait_until(lambda: rows_in(tmp_path) >= 1 + 5, process)
    (tmp_path / "hang").touch()
    process.kill()
    (tmp_path / "hang").unlink()
    finish(process)
    assert 30 <= torch.load(run_dir(tmp_path) / "checkpoint.pt", weights_only=True)["global_step"] < 80
    assert_refused(resume("iql_finetune", tmp_path, "--online-steps 39"), "--online-steps 39 is not more than")


def test_fine_tuning_resumed_online_ends_as_a_straight_run_where_episodes_end_at_checkpoints(tmp_path):
    flags = "--offline-updates 20 --online-steps 60 --learning-starts 10"
    run("iql_finetune", tmp_path / "straight", flags)
    process = start("iql_finetune", tmp_path / "killed", flags)
    wait_until(lambda: rows_in(tmp_path / "killed") >= 6, process)
    process.kill()
    finish(process)
    done = resume("iql_finetune", tmp_path / "killed")
    assert done.returncode == 0, done.stderr
    weights, table, scalars = result(tmp_path / "straight")
    assert (weights, table) == result(tmp_path / "killed")[:2]
    online = [(run_dir(tmp_path / name) / "online.bin").read_bytes() for name in ("straight", "killed")]
    assert online[0] == online[1] and len(online[0]) == 60 * 10 * 4
    for flag in ("--offline-updates 30", "--updates-per-step 2", "--checkpoint none.pt"):
        assert_refused(resume("iql_finetune", tmp_path / "killed", flag), flag, "would make another run of")
    refused = resume("iql_finetune", tmp_path / "killed", "--online-steps 30")
    assert_refused(refused, "--online-steps 30 is not more than")
    (run_dir(tmp_path / "killed") / "online.bin").write_bytes(b"")
    assert_refused(resume("iql_finetune", tmp_path / "killed"), "online.bin lacks transitions")


WANDB = """
def init(**kwargs):
    print("wandb.init", kwargs["id"], kwargs["name"], kwargs["resume"])
"""


def test_a_resumed_run_goes_on_in_the_same_wandb_run(tmp_path):
    (tmp_path / "wandb.py").write_text(WANDB)
    path = os.pathsep.join([str(tmp_path), str(ROOT / "tests")])
    first = finish(start("iql_continuous", tmp_path, "--track --total-updates 10", PYTHONPATH=path))
    flags = f"{resume_arguments(tmp_path)} --total-updates 20"
    second = finish(start("iql_continuous", tmp_path, flags, tiny=False, PYTHONPATH=path))
    name = run_dir(tmp_path).name
    for done in (first, second):
        assert f"wandb.init {name} {name} allow" in done.stdout, done.stderr
        assert "updates/s" not in done.stderr  # no progress bar where nobody looks


def test_a_checkpoint_is_synced_before_it_replaces_the_last_one(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(os, "fsync", lambda *_: calls.append("sync"))
    monkeypatch.setattr(os, "replace", lambda *_: calls.append("rename"))
    iql_continuous.save({}, tmp_path / "checkpoint.pt")
    assert calls == ["sync", "rename"]
