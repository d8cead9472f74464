"""Whatever happens to a run, its last complete checkpoint is there, and --resume goes on as if nothing had happened."""

import csv
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from processes import SCRIPTS, Hostile, assert_refused, finish, run, run_dir, start, wait_until
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import iql_continuous


def resume_arguments(folder):
    return f"--resume {run_dir(folder).relative_to(folder)}"


def result(folder):
    """What two runs of the same arguments have in common, all but times: (weights, evaluations.csv, scalars).

    An online phase depends on when it was interrupted: of that, only the steps at which something is said are left.
    """
    weights = torch.load(run_dir(folder) / "model.pt", weights_only=True)["agent"]
    weights = {name: tensor.numpy().tobytes() for name, tensor in weights.items()}
    with open(run_dir(folder) / "evaluations.csv") as file:
        table = list(csv.DictReader(file))
    last_offline = max(int(row["global_step"]) for row in table if row.get("phase") != "online")
    for row in table:
        del row["wall_seconds"]
        if row.get("phase") == "online":
            weights, row["episodic_return_mean"], row["episodic_return_std"], row["success_rate"] = None, "", "", ""
    events = EventAccumulator(str(run_dir(folder)), size_guidance={"scalars": 0}).Reload()
    scalars = {}
    for tag in events.Tags()["scalars"]:
        comparable = last_offline if tag != "charts/SPS" else -1
        scalars[tag] = [(e.step, e.value if e.step <= comparable else None) for e in events.Scalars(tag)]
    return weights, table, scalars


@pytest.fixture(scope="module", params=SCRIPTS)
def script(request):
    return request.param


@pytest.fixture(scope="module")
def straight(script, tmp_path_factory):
    """The result of a run that nothing happens to."""
    folder = tmp_path_factory.mktemp("straight")
    run(script, folder)
    return result(folder)


def assert_resumes_as(straight, script, folder, arguments=""):
    """What is left of the run in `folder` can be resumed, and ends as one that nothing happened to."""
    run(script, folder, f"{resume_arguments(folder)} {arguments}")
    for name, found, expected in zip(("weights", "evaluations.csv", "scalars"), result(folder), straight, strict=True):
        assert found == expected, name


def kill_and_resume(script, folder, rng, arguments):
    """Kill a run five times at random moments. Returns how many of the kills hit the writing of a checkpoint."""

    def lines():
        return [line for path in folder.glob("runs/*/evaluations.csv") for line in path.read_text().splitlines()]

    def event_files():
        return len(list(folder.glob("runs/*/events*")))

    def temporary_exists():
        return (run_dir(folder) / "checkpoint.tmp").exists()

    hits = 0
    for moment in ("first checkpoint", "writing", "begin", "writing", "anywhere"):
        lines_before, event_files_before = len(lines()), event_files()
        process = start(script, folder, resume_arguments(folder) if event_files_before else arguments)
        if moment == "first checkpoint":
            wait_until(lambda: any(folder.glob("runs/*/checkpoint.pt")), process)
        elif moment == "begin":
            wait_until(lambda: event_files() > event_files_before, process)  # noqa: B023
        else:
            # from here on also a half-written file that the last kill left is gone
            more = rng.randint(2, 12) if moment == "anywhere" else 2
            wait_until(lambda: len(lines()) >= lines_before + more, process)  # noqa: B023
        if moment == "writing":
            wait_until(temporary_exists, process)
        else:
            time.sleep(rng.uniform(0, 0.1))
        process.kill()
        # waits for the evaluation's processes too: none of them is left behind
        assert finish(process).returncode == -signal.SIGKILL
        hits += moment == "writing" and temporary_exists()
    return hits


def test_kills_at_random_moments_change_no_bit(script, straight, tmp_path):
    """Whether training waits for its evaluations, as that of `straight` did, or goes on meanwhile."""
    lanes = range(4 if script == SCRIPTS[0] else 1)  # five kills each

    def kill(lane):
        arguments = "--concurrent-eval True" if lane % 2 else ""
        hits = kill_and_resume(script, tmp_path / str(lane), random.Random(lane), arguments)
        assert_resumes_as(straight, script, tmp_path / str(lane))
        return hits

    with ThreadPoolExecutor(2) as pool:
        assert sum(pool.map(kill, lanes)) > 0, "no kill hit the writing of a checkpoint"


def start_and_hang(script, folder, arguments=""):
    """Start a run and return its process when it is within its first evaluation, and stays there."""
    (folder / "hang").touch()
    process = start(script, folder, arguments)
    wait_until((folder / "hanging").exists, process)
    return process


def let_go(folder):
    (folder / "hang").unlink()
    (folder / "hanging").unlink()


def interrupt(script, folder, signum, send=os.kill):
    """Run a script and stop it in its first evaluation: its main process, or with os.killpg all of its processes."""
    process = start_and_hang(script, folder)
    send(process.pid, signum)
    let_go(folder)
    return finish(process)


def checkpoint(folder):
    return torch.load(run_dir(folder) / "checkpoint.pt", weights_only=True)


@pytest.fixture(scope="module")
def interrupted(script, tmp_path_factory):
    """The folder of a run that SIGTERM stopped, to be copied, and what that said."""
    folder = tmp_path_factory.mktemp("interrupted")
    return folder, interrupt(script, folder, signal.SIGTERM)


def test_sigterm_says_how_to_resume_and_the_run_goes_on_with_its_own_arguments(script, straight, interrupted, tmp_path):
    folder, done = interrupted
    assert_refused(done, f"go on with {resume_arguments(folder)}")
    assert done.returncode == 128 + signal.SIGTERM
    folder = shutil.copytree(folder, tmp_path / "copy")
    assert_resumes_as(straight, script, folder, "--seed 7 --learning-rate 1 --env-id Nowhere-v0")


def test_ctrl_c_says_how_to_resume(script, tmp_path):
    done = interrupt(script, tmp_path, signal.SIGINT, os.killpg)  # a terminal sends it to all processes
    assert_refused(done, f"go on with {resume_arguments(tmp_path)}")
    assert done.returncode == 128 + signal.SIGINT


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_stop_signal_ends_the_run_at_once(script, second, tmp_path):
    process = start_and_hang(script, tmp_path)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)  # two signals at the same time are one
    process.send_signal(second)
    assert process.wait(timeout=20) in (128 + second, -second)  # while the evaluation still hangs
    let_go(tmp_path)
    done = finish(process)
    assert "Traceback" not in done.stdout + done.stderr
    assert checkpoint(tmp_path)["global_step"] == 0


def test_sigterm_to_all_processes_says_how_to_resume(script, tmp_path):
    done = interrupt(script, tmp_path, signal.SIGTERM, os.killpg)  # as timeout(1) and schedulers send it
    assert_refused(done, "--resume")
    assert checkpoint(tmp_path)["global_step"] in (0, 1)


def test_sigint_before_the_first_update_leaves_no_process(tmp_path):
    (tmp_path / "runs").mkdir()  # so that the environment hangs as soon as the random policy is evaluated
    process = start_and_hang("iql_continuous", tmp_path)
    process.send_signal(signal.SIGINT)
    process.wait(timeout=20)
    let_go(tmp_path)
    assert_refused(finish(process, timeout=20), "Stopped, start it")
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_run_killed_in_its_first_evaluation_leaves_no_process_and_resumes(script, straight, tmp_path):
    process = start_and_hang(script, tmp_path)
    process.kill()
    let_go(tmp_path)
    assert finish(process, timeout=20).returncode == -signal.SIGKILL
    assert_resumes_as(straight, script, tmp_path)


def test_a_run_stopped_while_it_trains_beside_an_evaluation_keeps_that(script, tmp_path):
    longer = {"iql_continuous": "--total-updates 9999", "iql_finetune": "--offline-updates 9999"}[script]
    process = start_and_hang(script, tmp_path, f"--concurrent-eval True --eval-frequency 9999 {longer}")
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)  # the evaluation of the untrained policy still hangs
    let_go(tmp_path)
    assert_refused(finish(process), f"go on with {resume_arguments(tmp_path)}")
    saved = checkpoint(tmp_path)
    assert 0 < saved["global_step"] < 9999
    assert [row.split(",")[0] for row in saved["evaluations"]] == ["0"]


def test_an_evaluation_process_that_dies_is_reported_with_its_exit_code(tmp_path):
    (tmp_path / "die").touch()
    done = finish(start("iql_continuous", tmp_path, ""))
    assert_refused(done, "An evaluation process died", "-9", "--resume")
    assert checkpoint(tmp_path)["global_step"] == 0


def test_an_environment_that_raises_is_reported_with_its_message(tmp_path):
    (tmp_path / "raise").touch()
    done = finish(start("iql_continuous", tmp_path, ""))
    assert done.returncode != 0
    assert "the environment's own mistake" in done.stderr.strip().splitlines()[-1]


def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_checkpoint(script, tmp_path):
    done = finish(start(script, tmp_path, "--learning-rate 1e30"))
    assert_refused(done, "A loss is NaN or infinite at update 10", "--learning-rate")
    assert checkpoint(tmp_path)["global_step"] == 0
    assert all(tensor.isfinite().all() for tensor in checkpoint(tmp_path)["agent"].values())


# losses are written to TensorBoard every 500 updates, before a checkpoint if evaluations are rarer
LONG = {"iql_continuous": "--total-updates 600", "iql_finetune": "--offline-updates 600 --online-steps 0"}


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux can limit the files of a running process")
@pytest.mark.parametrize("first_to_write", ["checkpoint", "TensorBoard"])
def test_a_full_disk_is_said_and_spares_the_checkpoint(script, first_to_write, tmp_path):
    arguments = "" if first_to_write == "checkpoint" else f"--eval-frequency 600 {LONG[script]}"
    process = start_and_hang(script, tmp_path, arguments)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, 0))
    let_go(tmp_path)
    assert_refused(finish(process), "File too large", "--resume")
    assert checkpoint(tmp_path)["global_step"] == 0


def test_a_run_directory_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "runs").touch()
    assert_refused(finish(start("iql_continuous", tmp_path, "")), "Not a directory: 'runs")


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1  # within the weights
    path.write_bytes(data)


def table_to_folder(path):
    path.unlink()
    path.mkdir()


def with_args(state, **changes):
    return state | {"args": state["args"] | changes}


# what happens to checkpoint.pt, given its path and contents, and words of the sentence that --resume then says
DAMAGES = {
    "gone": (lambda path, state: path.unlink(), "checkpoint.pt cannot be loaded (FileNotFoundError)"),
    "empty": (lambda path, state: path.write_bytes(b""), "checkpoint.pt cannot be loaded"),
    "truncated": (lambda path, state: path.write_bytes(path.read_bytes()[:100_000]), "checkpoint.pt cannot be loaded"),
    "flipped bit": (lambda path, state: flip_a_bit(path), "checkpoint.pt cannot be loaded"),
    "other version": (lambda path, state: torch.save(state | {"version": 0}, path), "checkpoint.pt has format 0"),
    "other script": (lambda path, state: torch.save(with_args(state, other=1), path), "is not a run of this script"),
    "only a model": (
        lambda path, state: torch.save({name: state[name] for name in ("version", "args", "agent")}, path),
        "is not a run of this script",
    ),
    "other environment": (
        lambda path, state: torch.save(with_args(state, env_id="tiny_env:Wide-v0"), path),
        "networks of other names or sizes",
    ),
    "environment gone": (
        lambda path, state: torch.save(with_args(state, env_id="tiny_env:Gone-v0"), path),
        "tiny_env:Gone-v0 cannot be made",
    ),
    "dataset gone": (
        lambda path, state: torch.save(with_args(state, dataset_id="tiny/gone-v0"), path),
        "tiny/gone-v0 could not be downloaded",
    ),
    "other device": (lambda path, state: torch.save(state | {"device": "cuda"}, path), "ran on cuda, this is cpu"),
    "would run code": (lambda path, state: torch.save(state | {"agent": Hostile()}, path), "cannot be loaded"),
    "pickle": (lambda path, state: path.write_bytes(pickle.dumps(Hostile())), "checkpoint.pt cannot be loaded"),
}
# the same for a run directory that cannot be written: root may do everything but open a folder for writing
UNWRITABLE = {
    "no checkpoint": (lambda path, state: path.with_suffix(".tmp").mkdir(), "Is a directory", "checkpoint.tmp"),
    "no table": (lambda path, state: table_to_folder(path.parent / "evaluations.csv"), "Is a directory", ".csv"),
}


def resumptions(script):
    """What is tried with a script: all with the first; the second says only these by itself, see test_finetune.py."""
    return list(DAMAGES | UNWRITABLE) if script == SCRIPTS[0] else ["other script", "only a model", "other device"]


@pytest.fixture(scope="module")
def refusals(script, interrupted, tmp_path_factory):
    """What --resume said to every damage, and the run directory's files before and after; two at a time."""

    def files(folder):
        return {path.name: path.read_bytes() for path in run_dir(folder).iterdir() if path.is_file()}

    def refuse(damage):
        folder = shutil.copytree(interrupted[0], tmp_path_factory.mktemp("damage") / "copy")
        (DAMAGES | UNWRITABLE)[damage][0](run_dir(folder) / "checkpoint.pt", checkpoint(folder))
        before = files(folder)
        done = finish(start(script, folder, resume_arguments(folder)))
        assert not (folder / "executed").exists()
        return done, before, files(folder)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(resumptions(script), pool.map(refuse, resumptions(script)), strict=True))


def test_a_run_that_cannot_be_resumed_is_refused_and_nothing_is_overwritten(refusals):
    for damage, (done, before, after) in refusals.items():
        print(damage)  # pytest shows it if it is what failed
        assert_refused(done, *(DAMAGES | UNWRITABLE)[damage][1:])
        if damage in DAMAGES:
            assert after == before
        else:
            assert after["checkpoint.pt"] == before["checkpoint.pt"]


def test_a_checkpoint_is_synced_before_it_replaces_the_last_one(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(os, "fsync", lambda *_: calls.append("sync"))
    monkeypatch.setattr(os, "replace", lambda *_: calls.append("rename"))
    iql_continuous.save_file({}, tmp_path / "checkpoint.pt")
    assert calls == ["sync", "rename"]
