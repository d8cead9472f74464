"""Whatever happens to a run, its last complete checkpoint is there, and --resume goes on as if nothing had happened."""

import csv
import json
import os
import resource
import shutil
import signal
import traceback
from pathlib import Path

import numpy as np
import pytest
import tiny_env
import torch
from processes import ROOT, SCRIPTS, finish, refused, run, run_dir, saved_by, start, wait_until
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_variant import assert_same

import iql_continuous
import iql_finetune

SCRIPT = {"iql_continuous": iql_continuous, "iql_finetune": iql_finetune}
OFFLINE = {"iql_continuous": "", "iql_finetune": "--offline-updates 120 --online-steps 0"}
# episodes of ten steps, each of which ends at a checkpoint
ONLINE = "--offline-updates 20 --online-steps 60 --learning-starts 10"
MORE = {"iql_continuous": "--total-updates", "iql_finetune": "--online-steps"}
by_script = pytest.mark.parametrize("script", SCRIPTS)


class Killed(BaseException):
    pass


def resume(script, folder, arguments=""):
    """Go on with the run in `folder`, under its own arguments. Returns what is printed."""
    return run(script, folder, f"--resume {run_dir(folder).relative_to(folder)} {arguments}", tiny=False)


def result(folder):
    """What two runs with the same arguments have in common, without times."""
    with open(run_dir(folder) / "evaluations.csv") as file:
        table = list(csv.DictReader(file))
    files = sorted(run_dir(folder).glob("events.*"), key=lambda path: path.stat().st_mtime_ns)
    for k, path in enumerate(files):  # TensorBoard reads those of one second in the order of their process ids as text
        path.rename(path.with_name(f"events.out.tfevents.{k}"))
    events = EventAccumulator(str(run_dir(folder)), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag != "charts/SPS"]
    scalars = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}
    online = [path.read_bytes() for path in run_dir(folder).glob("online.bin")]
    files = {path.name for path in run_dir(folder).iterdir()} - {path.name for path in run_dir(folder).glob("events*")}
    return {"checkpoint": saved_by(folder), "best": saved_by(folder, "best.pt"), "table": table, "scalars": scalars} | {
        "online": online,
        "files": files,
    }


def assert_same_result(folder, other):
    assert_same(result(folder), result(other), "wall_seconds", "resume")
    seconds = [row["wall_seconds"] for row in saved_by(folder)["evaluations"]]
    assert seconds == sorted(seconds)


@pytest.fixture(scope="module", params=["iql_continuous", "iql_finetune", "online"])
def straight(request, tmp_path_factory):
    """A script, its flags, and the folder of a run that nothing happens to."""
    script = "iql_finetune" if request.param == "online" else request.param
    folder, flags = tmp_path_factory.mktemp("straight"), OFFLINE.get(request.param, ONLINE)
    run(script, folder, flags)
    return script, flags, folder


def killing(monkeypatch, place, at):
    """Kill the process in the middle of what it does at this place, for the `at`-th time: a file stays a half."""
    save, replace, count = torch.save, os.replace, [at]

    def due():
        count[0] -= 1
        return count[0] == 0

    def save_half(state, file):
        save(state, file)
        if due():
            (file := file if hasattr(file, "truncate") else open(file, "r+b")).truncate(100_000)
            file.flush()
            raise Killed

    def do_not_replace(*paths):
        if due():
            raise Killed
        replace(*paths)

    def write_half(table, rows, write=csv.DictWriter.writerows):
        if due():
            raise Killed
        write(table, rows)

    def choose_no_action(x, randn_like=torch.randn_like):
        if due():
            raise Killed
        return randn_like(x)

    if place == "the checkpoint":
        monkeypatch.setattr(torch, "save", save_half)
    elif place == "its new name":
        monkeypatch.setattr(os, "replace", do_not_replace)
    elif place == "the table":
        monkeypatch.setattr(csv.DictWriter, "writerows", write_half)
    else:
        monkeypatch.setattr(torch, "randn_like", choose_no_action)


@pytest.mark.parametrize(
    "place, at", [("the checkpoint", 6), ("its new name", 8), ("the table", 5), ("an episode", 36)]
)
def test_a_kill_at_the_worst_moments_changes_no_bit(place, at, straight, tmp_path, monkeypatch):
    script, flags, folder = straight
    if place == "an episode" and flags != ONLINE:
        pytest.skip("is of online runs")
    killing(monkeypatch, place, at)
    with pytest.raises(Killed):
        run(script, tmp_path, flags)
    monkeypatch.undo()
    assert 0 < saved_by(tmp_path)["global_step"] < saved_by(folder)["global_step"]
    if place == "an episode":  # a resumed run believes none of what is beyond the checkpoint
        online = np.memmap(run_dir(tmp_path) / "online.bin", np.float32, "r+", shape=(60, 10))
        assert online[: saved_by(tmp_path)["global_step"] - 20 + 5].any(1).all()
        online[saved_by(tmp_path)["global_step"] - 20 :] = 7.0
    checkpoint, path = (run_dir(tmp_path) / "checkpoint.pt").read_bytes(), run_dir(tmp_path) / "checkpoint.pt"
    for _ in range(2):  # the second time, an older checkpoint meets rows and scalars that are all there
        path.write_bytes(checkpoint)
        resume(script, tmp_path)
        assert_same_result(tmp_path, folder)


def hanging(script, folder, arguments="", until="runs/*/checkpoint.pt"):
    """A process of a run that hangs as soon as this exists, and the process of it that does."""
    folder.mkdir(exist_ok=True)
    (folder / "hang").write_text(until)
    process, pid = start(script, folder, arguments), folder / "hanging"
    wait_until(lambda: pid.exists() and pid.read_text().endswith(" "), process)
    return process, int(pid.read_text())


def test_a_kill_of_the_process_changes_no_bit(straight, tmp_path):
    script, flags, folder = straight
    process, _ = hanging(script, tmp_path, flags)
    process.kill()
    (tmp_path / "hang").unlink()
    assert finish(process).returncode == -signal.SIGKILL  # waits for the evaluation's processes: none is left behind
    resume(script, tmp_path)
    assert_same_result(tmp_path, folder)


def stopped(process, signum, send, folder):
    """What a process that hangs says last when it is sent a signal: a sentence, once."""
    send(process.pid, signum)
    (folder / "hang").unlink()  # Python sees a signal that comes just before a blocking read only after it
    done = finish(process)
    assert done.returncode == 128 + signum and "Traceback" not in done.stdout + done.stderr, done.stderr
    assert done.stderr.count("Stopped: ") == 1
    return done.stderr.splitlines()[-1]


def test_a_stop_signal_ends_a_run_with_a_sentence(straight, tmp_path):
    """In an evaluation, or, online, in the loop's own environment."""
    script, flags, folder = straight
    signum, send = (signal.SIGINT, os.killpg) if flags == OFFLINE["iql_finetune"] else (signal.SIGTERM, os.kill)
    where = "loop" if flags == ONLINE else ""
    process, pid = hanging(script, tmp_path, flags, f"runs/*/checkpoint.pt {where}")
    assert (pid == process.pid) == (where == "loop")
    said = stopped(process, signum, send, tmp_path)
    assert said == f"Stopped: go on with python {ROOT / script}.py --resume runs/{run_dir(tmp_path).name}"
    resume(script, tmp_path)
    assert_same_result(tmp_path, folder)


def test_a_stop_signal_before_the_first_evaluation_leaves_nothing(tmp_path):
    process, _ = hanging("iql_continuous", tmp_path, until="hang")
    assert stopped(process, signal.SIGINT, os.killpg, tmp_path) == "Stopped: start again, nothing is saved"
    assert [path.name for path in tmp_path.iterdir()] == ["hanging"]


def test_an_evaluation_process_that_ends_is_silent_and_ends_the_run(tmp_path):
    process, worker = hanging("iql_continuous", tmp_path)
    assert worker != process.pid
    os.kill(worker, signal.SIGINT)
    (tmp_path / "hang").unlink()
    done = finish(process)
    assert done.returncode == 1 and "in evaluate" in done.stderr and "Stopped" not in done.stderr, done.stderr


# WHAT IS GIVEN ANEW
@by_script
def test_arguments_given_on_resume_hold_from_then_on(script, tmp_path, monkeypatch):
    length = {"iql_continuous": "--total-updates 20", "iql_finetune": "--offline-updates 0 --online-steps 20"}
    total = {"iql_continuous": "total_updates", "iql_finetune": "total_steps"}[script]
    run(script, tmp_path, length[script])
    before, best = saved_by(tmp_path), (run_dir(tmp_path) / "best.pt").read_bytes()
    torch.save({**before, "best_return": 1e9}, run_dir(tmp_path) / "checkpoint.pt")  # no later evaluation is better
    # killed before the first new evaluation's checkpoint
    killing(monkeypatch, "the checkpoint", 2)
    with pytest.raises(Killed):
        resume(script, tmp_path, f"{MORE[script]} 40 --final-episodes 3 --eval-frequency 5")
    monkeypatch.undo()
    assert saved_by(tmp_path)["global_step"] == 20
    assert "global_step=40, " in resume(script, tmp_path).splitlines()[-1]
    saved, written = saved_by(tmp_path), json.loads((run_dir(tmp_path) / "args.json").read_text())["args"]
    given = {MORE[script][2:].replace("-", "_"): 40, "final_episodes": 3, "eval_frequency": 5}
    assert {**before["args"], **given} == {**saved["args"], "resume": None} and written == saved["args"]
    assert saved["best_return"] == 1e9 and (run_dir(tmp_path) / "best.pt").read_bytes() == best
    rows = saved["evaluations"]
    assert rows[:3] == before["evaluations"]  # with the length that they were asked for
    assert [(row["global_step"], row["episodes"], row[total]) for row in rows[2:]] == [
        *((20, 2, 20), (25, 2, 40), (30, 2, 40), (35, 2, 40), (40, 3, 40))
    ]
    v_rate, actor_rate, q_rate = (optimizer["param_groups"][0]["lr"].item() for optimizer in saved["optimizers"])
    assert v_rate == q_rate == pytest.approx(3e-4)
    assert actor_rate == pytest.approx(3e-4 * 0.5 * (1 + np.cos(np.pi * 39 / 40)))


FREE = "resume eval_frequency final_episodes eval_envs capture_video track wandb_project_name wandb_entity".split()
VALUES = {"expectile": 0.6, "gamma": 0.5, "tau": 0.5, "actor_dropout": 0.5, "seed": 99, "env_id": "Other-v0"}
VALUES |= dict.fromkeys("exp_name wandb_project_name wandb_entity checkpoint dataset_id".split(), "other")


def other_values(script):
    """A flag for each argument with another value than that of the tiny run."""
    for name, value in vars(SCRIPT[script].Args()).items():
        flag = name.replace("_", "-")
        yield name, f"--{'no-' * value}{flag}" if isinstance(value, bool) else f"--{flag} {VALUES.get(name, 7)}"


@by_script
def test_what_would_make_another_run_is_refused(script, straight, tmp_path):
    """A finished run takes nothing anew, a longer one what does not change what is learned. Nothing is written."""
    name, flags, folder = straight
    if name != script or flags == ONLINE:
        pytest.skip("the run is another script's")
    shutil.copytree(folder, tmp_path / "work")
    directory, length = run_dir(tmp_path / "work"), MORE[script]
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in directory.iterdir()}
    longer = f"{length} 200" if script == "iql_continuous" else "--online-steps 200"
    for name, flag in other_values(script):
        if name not in ("resume", "cuda", "total_updates", "online_steps"):
            sentence = f"{directory} takes no other {name} at step 120: begin a new run."
            assert sentence == refused(name, script, tmp_path, f"--resume {directory} {flag}", tiny=False)
            if name not in FREE:
                assert sentence == refused(name, script, tmp_path, f"--resume {directory} {longer} {flag}", tiny=False)
    if script == "iql_continuous":
        refused("takes no other total_updates", script, tmp_path, f"--resume {directory} {length} 5", tiny=False)
    score = iql_continuous.describe(saved_by(tmp_path / "work")["evaluations"][-1])
    assert resume(script, tmp_path / "work") == f"runs/{directory.name} is finished: {score}\n"
    (other,) = set(SCRIPTS) - {script}
    refused("of another script", other, tmp_path, f"--resume {directory}", tiny=False)
    refused("nowhere/checkpoint.pt is missing", script, tmp_path, "--resume nowhere", tiny=False)
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in directory.iterdir()}
    saved = saved_by(tmp_path / "work")
    torch.save({**saved, "args": {**saved["args"], "cuda": True}}, directory / "checkpoint.pt")
    refused("another device", script, tmp_path, f"--resume {directory} {longer}", tiny=False)
    torch.save({key: value for key, value in saved.items() if key != "fingerprint"}, directory / "checkpoint.pt")
    refused("of another script or version", script, tmp_path, f"--resume {directory} {longer}", tiny=False)
    assert [path.name for path in tmp_path.iterdir()] == ["work"] and run_dir(tmp_path / "work") == directory


# WHAT CHANGES OR BREAKS BETWEEN
@pytest.mark.filterwarnings("ignore::UserWarning")  # Minari wants an author, an e-mail address and more
@by_script
def test_a_dataset_that_was_recorded_again_is_refused_and_one_that_moved_is_not(script, own_root, tmp_path):
    length = {"iql_continuous": "--total-updates 0", "iql_finetune": "--offline-updates 0 --online-steps 0"}[script]
    episode, (path, copied) = tiny_env.episode, (own_root / "some" / "set-v0", own_root / "copied")
    tiny_env.write("some/set-v0", episode(seed=1), episode(seed=2))
    shutil.copytree(path, copied)
    for k, name in enumerate((copied, "copied", "some/set-v0")):  # in the copy, there still is the other id
        run(script, tmp_path / str(k), f"{length} --dataset-id {name}")
        assert saved_by(tmp_path / str(k))["args"]["dataset_id"] == str(name)
        resume(script, tmp_path / str(k), f"{MORE[script]} 11")
    columns = {name: getattr(episode(seed=2), name).copy() for name in "observations actions rewards".split()}
    columns["terminations"] = np.zeros(10, bool)
    for name, place in [*dict.fromkeys(columns, 3).items(), ("observations", 10)]:  # the last: of next_observations
        shutil.rmtree(path)
        column = columns[name].copy()
        column[place] = column[place] + 0.01 if name != "terminations" else True
        tiny_env.write("some/set-v0", episode(seed=1), episode(seed=2, **{name: column}))
        directory = run_dir(tmp_path / "2")
        sentence = f"The dataset some/set-v0 has changed since {directory} began: begin a new run."
        assert sentence == refused("", script, tmp_path, f"--resume {directory} {MORE[script]} 20", tiny=False)


@by_script
def test_a_full_disk_leaves_the_old_files_and_is_named(script, tmp_path, monkeypatch):
    run(script, tmp_path, "--total-updates 10" if script == "iql_continuous" else "--online-steps 20")
    names = ("checkpoint.pt", "best.pt", "args.json")
    before = {name: (run_dir(tmp_path) / name).read_bytes() for name in names}
    longer = f"{MORE[script]} 30"
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))  # of a checkpoint's megabytes
    try:
        with pytest.raises((OSError, RuntimeError)) as error:
            resume(script, tmp_path, longer)
        assert "File too large" in "".join(traceback.format_exception(error.value))  # PyTorch adds an error of its own
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert before == {name: (run_dir(tmp_path) / name).read_bytes() for name in names}

    def write_half(path, text, write=Path.write_text):
        write(path, text[:20])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(OSError, match="No space left"):
        resume(script, tmp_path, longer)
    monkeypatch.undo()
    assert before["args.json"] == (run_dir(tmp_path) / "args.json").read_bytes()
    assert resume(script, tmp_path).count("global_step=") == 3


@by_script
@pytest.mark.parametrize("name", ["actor.log_std", "qf1.fc3.bias", "vf.fc3.bias"])  # of one loss alone in an update
def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_checkpoint(script, name, tmp_path):
    run(
        script,
        tmp_path,
        "--total-updates 10" if script == "iql_continuous" else "--offline-updates 10 --online-steps 0",
    )
    path = run_dir(tmp_path) / "checkpoint.pt"
    saved = saved_by(tmp_path)
    saved["agent"][name] *= torch.nan
    args = {"total_updates": 20} if script == "iql_continuous" else {"offline_updates": 20}
    torch.save({**saved, "args": {**saved["args"], **args}}, path)
    sentence = refused("", script, tmp_path, f"--resume {path.parent} --eval-frequency 1", tiny=False)
    unit = "update" if script == "iql_continuous" else "step"
    assert sentence == f"A loss is NaN or infinite at {unit} 11: lower --learning-rate or --reward-scale."
    assert saved_by(tmp_path)["global_step"] == 10


# ONLINE TRANSITIONS
@pytest.mark.parametrize("kind", ["Unstable", "Unpaid"])
def test_nan_from_the_simulator_is_not_stored_and_a_resumed_run_gets_past_it(kind, tmp_path):
    """A file is on the disk from its first step on, however large."""
    flags = f"{ONLINE} --env-id tiny_env:{kind}-v0 --online-steps 30000"
    sentence = refused(f"{kind}-v0 gave NaN or infinity at step", "iql_finetune", tmp_path, flags)
    path, stops = run_dir(tmp_path) / "online.bin", 1
    assert path.stat().st_size == 30_000 * 40 <= path.stat().st_blocks * 512
    assert sentence.endswith(f"go on with --resume {path.parent.relative_to(tmp_path)}")
    saved = saved_by(tmp_path)
    torch.save({**saved, "args": {**saved["args"], "online_steps": 60}}, path.with_name("checkpoint.pt"))
    os.truncate(path, 60 * 40)
    while stops < 20:
        try:
            resume("iql_finetune", tmp_path)
            break
        except SystemExit as end:
            assert f"{kind}-v0 gave NaN or infinity at step" in end.code
            stops += 1
    assert 1 < stops < 20
    rows = np.fromfile(path, np.float32).reshape(60, 10)
    assert np.isfinite(rows).all() and rows.any(1).all() and saved_by(tmp_path)["global_step"] == 80


def test_a_longer_run_keeps_its_online_transitions_and_lost_ones_are_missed(tmp_path):
    run("iql_finetune", tmp_path, ONLINE)
    path = run_dir(tmp_path) / "online.bin"
    before = path.read_bytes()
    resume("iql_finetune", tmp_path, "--online-steps 80")
    rows = np.fromfile(path, np.float32).reshape(80, 10)
    assert rows.any(1).all() and rows[:60].tobytes() == before
    rows[30] = 0
    rows.tofile(path)
    sentence = refused("", "iql_finetune", tmp_path, f"--resume {path.parent} --online-steps 90", tiny=False)
    assert sentence == f"{path} lacks transitions: begin a new run."
