"""Whatever happens to a run, its last complete checkpoint is there, and --resume goes on as if nothing had happened."""

import csv
import os
import resource
import shutil
import signal
import sys
import time
import traceback
import zlib
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import processes
import pytest
import torch
from processes import LENGTH, NOTHING, ROOT, SCRIPTS, by_script, killed, refused, resume, run, run_dir, saved_by
from tiny_env import episode, write

import iql_continuous

ONLINE = "--offline-updates 10 --online-steps 40 --learning-starts 10"  # in episodes that each end at a checkpoint
PLACES = [(torch, "save", 6), (os, "replace", 8), (csv.DictWriter, "writerows", 3), (torch, "randn_like", 16)]
MORE = {"iql_continuous": "--total-updates", "iql_finetune": "--online-steps"}


def result(folder):
    """What two runs with the same arguments have in common: their files and scalars; and their updates a second."""
    files = sorted(run_dir(folder).glob("events.*"), key=lambda path: path.stat().st_mtime_ns)
    for k, path in enumerate(files):  # TensorBoard reads those of one second in the order of their process ids as text
        path.rename(path.with_name(f"events.out.tfevents.{k}"))
    found = vars(processes.written_by(folder))
    for path in run_dir(folder).glob("[!ae]*"):
        found[path.name] = saved_by(folder, path.name) if path.suffix == ".pt" else path.read_bytes()
    return found, found["scalars"].pop("charts/SPS")


def assert_same_result(folder, other):
    found, speeds = result(folder)
    processes.assert_same(found, result(other)[0], "wall_seconds", "resume")
    seconds = {row["global_step"]: row["wall_seconds"] for row in saved_by(folder)["evaluations"]}
    assert sorted(seconds.values()) == [*seconds.values()]  # what was before a kill counts
    assert all(speed >= 0.999 * step / seconds[step] for step, speed in speeds)


@pytest.fixture(scope="module", params=[*SCRIPTS, "online"])
def straight(request, tmp_path_factory):
    """A script, its flags, and the folder of a run that nothing happens to."""
    script = "iql_finetune" if request.param == "online" else request.param
    folder, flags = tmp_path_factory.mktemp("straight"), ONLINE if script != request.param else f"{LENGTH[script]} 50"
    run(script, folder, flags)
    return script, flags, folder


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place[1])
def test_a_kill_at_the_worst_moments_changes_no_bit(place, straight, tmp_path):
    script, flags, folder = straight
    if place[1] == "randn_like" and flags != ONLINE:  # it draws online actions
        return
    with killed(*place):
        run(script, tmp_path, flags)
    path, collected = run_dir(tmp_path) / "checkpoint.pt", saved_by(tmp_path)["global_step"] - 10
    assert 0 < collected + 10 < saved_by(folder)["global_step"]
    if place[1] == "randn_like":  # a resumed run believes none of what is beyond the checkpoint
        online = np.memmap(path.with_name("online.bin"), np.float32, "r+", shape=(40, 10))
        assert online[: collected + 5].any(1).all() and collected == 10
        online[collected:] = 7.0
    checkpoint = path.read_bytes()
    for _ in range(2):  # the second time, an older checkpoint meets rows and scalars that are all there
        path.write_bytes(checkpoint)
        resume(script, tmp_path)
        assert_same_result(tmp_path, folder)


def hanging(script, folder, arguments="", until="runs/*/checkpoint.pt"):
    """A process of a run that hangs as soon as this exists, and the process of it that does."""
    folder.mkdir(exist_ok=True)
    (folder / "hang").write_text(until)
    process, pid = processes.start(script, folder, arguments), folder / "hanging"
    while not (pid.exists() and pid.read_text().endswith(" ")):
        ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        assert ended is None, processes.finish(process)
        time.sleep(0.01)
    return process, int(pid.read_text())


def end_of(process, send, signum, folder, status):
    """What a process that hangs says on stderr when it, or one that it forked, is sent a signal."""
    send(process.pid, signum)
    (folder / "hang").unlink()  # Python sees a signal that comes just before a blocking read only after it
    returncode, said = processes.finish(process)  # waits for all that it forked: nothing is left behind
    assert returncode == status, said
    return said


def test_a_kill_or_a_stop_signal_changes_no_bit_and_the_signal_gets_a_sentence(straight, tmp_path):
    """They come in an evaluation, or, online, in the loop's own environment."""
    script, flags, folder = straight
    until = "runs/*/checkpoint.pt loop" if flags == ONLINE else "runs/*/checkpoint.pt"
    send, signum = (os.killpg, signal.SIGINT) if script == "iql_continuous" else (os.kill, signal.SIGTERM)
    for kind, how in (("killed", (os.kill, signal.SIGKILL)), ("stopped", (send, signum))):
        process, pid = hanging(script, tmp_path / kind, flags, until)
        assert (pid == process.pid) == (flags == ONLINE)
        said = end_of(process, *how, tmp_path / kind, -signal.SIGKILL if kind == "killed" else 128 + signum)
        name = run_dir(tmp_path / kind).name
        resume(script, tmp_path / kind)
        assert_same_result(tmp_path / kind, folder)
    assert said.splitlines()[-1] == f"Stopped: go on with python {ROOT / script}.py --resume runs/{name}"
    assert "Traceback" not in said and said.count("Stopped") == 1


def test_a_signal_before_the_first_evaluation_leaves_nothing_and_one_to_a_worker_ends_the_run(tmp_path):
    process, _ = hanging("iql_continuous", tmp_path / "early", until="hang")
    said = end_of(process, os.killpg, signal.SIGINT, tmp_path / "early", 130)
    assert said.splitlines()[-1] == "Stopped: start again, nothing is saved" and said.count("Stopped") == 1
    assert [path.name for path in (tmp_path / "early").iterdir()] == ["hanging"]
    process, worker = hanging("iql_continuous", tmp_path / "worker")
    assert worker != process.pid
    said = end_of(process, lambda _, signum: os.kill(worker, signum), signal.SIGINT, tmp_path / "worker", 1)
    assert "in evaluate" in said and "Stopped" not in said  # workers keep silent


# WHAT IS GIVEN ANEW
@by_script
def test_arguments_given_on_resume_hold_from_then_on(script, tmp_path):
    run(script, tmp_path, f"{NOTHING[script]} {MORE[script]} 20")
    path, before = run_dir(tmp_path), saved_by(tmp_path)
    better = [{**before["evaluations"][0], "episodic_return": 1e9}]  # no later evaluation is
    torch.save({**before, "evaluations": better}, path / "best.pt")
    best = (path / "best.pt").read_bytes()
    with killed(torch, "save", 2):  # before the first new evaluation's checkpoint
        resume(script, tmp_path, f"{MORE[script]} 40 --eval-frequency 5")
    assert saved_by(tmp_path)["global_step"] == 20
    assert "global_step=40, " in resume(script, tmp_path).splitlines()[-1]
    saved, written = saved_by(tmp_path), processes.written_by(tmp_path).json["args"]
    given = {MORE[script][2:].replace("-", "_"): 40, "eval_frequency": 5}
    assert {**before["args"], **given} == {**saved["args"], "resume": None} and written == saved["args"]
    assert (path / "best.pt").read_bytes() == best  # which a kill between the two files left newer
    assert saved["evaluations"][:3] == before["evaluations"]  # with the length that they were asked for
    total = {"iql_continuous": "total_updates", "iql_finetune": "total_steps"}[script]
    rows = [(row["global_step"], row[total]) for row in saved["evaluations"][2:]]
    assert rows == [(20, 20), (25, 40), (30, 40), (35, 40), (40, 40)]
    v_rate, actor_rate, q_rate = (optimizer["param_groups"][0]["lr"].item() for optimizer in saved["optimizers"])
    assert v_rate == q_rate == pytest.approx(3e-4)
    assert actor_rate == pytest.approx(3e-4 * 0.5 * (1 + np.cos(np.pi * 39 / 40)))


@pytest.mark.filterwarnings("ignore::UserWarning")  # Minari wants an author, an e-mail address and more
@by_script
def test_what_changes_no_update_may_be_given_alone(script, tmp_path, own_root, monkeypatch):
    """The references of the data are not read again, and a script that changed meanwhile is named."""
    write("some/set-v0", episode()).storage.update_metadata({"ref_min_score": -100.0, "ref_max_score": 0.0})
    own = Path(shutil.copy(ROOT / f"{script}.py", tmp_path))
    run(own, tmp_path / "run", f"{NOTHING[script]} {MORE[script]} 20 --learning-rate 0.001 --dataset-id some/set-v0")
    moved = shutil.copytree(own_root / "some", tmp_path / "moved") / "set-v0"
    write("other/set-v0", episode()).storage.update_metadata({"ref_min_score": 0.0, "ref_max_score": 1.0})
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: None))
    monkeypatch.setattr(gym.wrappers, "RecordVideo", lambda env, _: SimpleNamespace(env=env))
    given = {"dataset_id": moved, "eval_frequency": 7, "eval_envs": 1, "track": True, "capture_video": True}
    given |= {"wandb_project_name": "some", "wandb_entity": "body"}
    for name, value in given.items():
        flag = f"--{name.replace('_', '-')} {'' if value is True else value}"
        with killed(torch, "save", 2):
            resume(own, tmp_path / "run", f"{MORE[script]} 30 {flag}")
        assert str(saved_by(tmp_path / "run")["args"][name]) == str(value)
    own.write_text(own.read_text() + "# edited\\n")
    printed = resume(own, tmp_path / "run", "--no-capture-video --dataset-id other/set-v0")
    assert f"{own} has changed since runs/{run_dir(tmp_path / 'run').name} began" in printed
    row, script = saved_by(tmp_path / "run")["evaluations"][-1], processes.written_by(tmp_path / "run").json["script"]
    assert row["global_step"] == 30 and row["normalized_score"] == pytest.approx(row["episodic_return"] + 100)
    assert script == saved_by(tmp_path / "run")["script"] and script.endswith(f"+{zlib.crc32(own.read_bytes()):08x}")


@by_script
def test_what_would_make_another_run_is_refused(script, tmp_path):
    """A finished run takes nothing anew, a longer one what does not change what is learned. Nothing is written."""
    run(script, tmp_path / "work", f"{LENGTH[script]} 10")
    free = "dataset_id eval_frequency eval_envs capture_video track wandb_project_name wandb_entity".split()
    values = {"expectile": 0.6, "gamma": 0.5, "tau": 0.5, "actor_dropout": 0.5, "seed": 99, "env_id": "Other-v0"}
    values |= dict.fromkeys("exp_name wandb_project_name wandb_entity checkpoint dataset_id".split(), "other")
    directory, more = run_dir(tmp_path / "work"), f"{MORE[script]} 60"
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in directory.iterdir()}
    for name, value in vars(__import__(script).Args()).items():
        if name not in ("resume", "cuda", "total_updates", "online_steps"):
            flag = f"--{'no-' * (value is True)}{name.replace('_', '-')}"
            flag += "" if isinstance(value, bool) else f" {values.get(name, 7)}"
            for longer in ["", more][: 1 + (name not in free)]:
                sentence = refused(name, script, tmp_path, f"--resume {directory} {longer} {flag}", tiny=False)
                assert sentence == f"{directory} takes no other {name} at step 10: begin a new run."
    if script == "iql_continuous":
        refused("no other total_updates", script, tmp_path, f"--resume {directory} --total-updates 5", tiny=False)
    score = iql_continuous.describe(saved_by(tmp_path / "work")["evaluations"][-1])
    assert resume(script, tmp_path / "work") == f"runs/{directory.name} is finished: {score}\n"
    (other,) = set(SCRIPTS) - {script}
    refused("of another script", other, tmp_path, f"--resume {directory}", tiny=False)
    for flag, its in (("resume no", "no/checkpoint.pt"), ("resume ''", "/checkpoint.pt"), ("checkpoint ''", "")):
        refused(f"{its} is missing, damaged or not a checkpoint", script, tmp_path, f"--{flag}")
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in directory.iterdir()}
    saved = saved_by(tmp_path / "work")
    torch.save({**saved, "args": {**saved["args"], "cuda": True}}, directory / "checkpoint.pt")
    refused("another device", script, tmp_path, f"--resume {directory} {more}", tiny=False)
    torch.save({key: value for key, value in saved.items() if key != "script"}, directory / "checkpoint.pt")
    refused("of another script or version", script, tmp_path, f"--resume {directory} {more}", tiny=False)
    assert [path.name for path in tmp_path.iterdir()] == ["work"] and run_dir(tmp_path / "work") == directory


# WHAT CHANGES OR BREAKS BETWEEN
@pytest.mark.filterwarnings("ignore::UserWarning")  # Minari wants an author, an e-mail address and more
@by_script
def test_a_dataset_that_was_recorded_again_is_refused_and_one_that_moved_is_not(script, own_root, tmp_path):
    path, copied = own_root / "some" / "set-v0", own_root / "copied"
    write("some/set-v0", episode(seed=1), episode(seed=2))
    shutil.copytree(path, copied)
    for k, name in enumerate((copied, "copied", "some/set-v0")):  # in the copy, there still is the other id
        run(script, tmp_path / str(k), f"{NOTHING[script]} --dataset-id {name}")
        assert saved_by(tmp_path / str(k))["args"]["dataset_id"] == str(name)
        resume(script, tmp_path / str(k), f"{MORE[script]} 11")
    directory, again = run_dir(tmp_path / "2"), episode(seed=2)
    # the last is one of the next observations alone
    for name, place in [("observations", 3), ("actions", 3), ("rewards", 3), ("terminations", 9), ("observations", 10)]:
        shutil.rmtree(path)
        column = np.array(getattr(again, name))
        column[place] = column[place] + 0.01 if name != "terminations" else True
        write("some/set-v0", episode(seed=1), episode(seed=2, **{name: column}))
        sentence = refused("", script, tmp_path, f"--resume {directory} {MORE[script]} 20", tiny=False)
        assert sentence == f"The dataset some/set-v0 has changed since {directory} began: begin a new run."


@by_script
def test_what_counts_is_on_the_disk_before_it_does(script, tmp_path, monkeypatch):
    """Online transitions before a checkpoint that counts them, a checkpoint before it takes the old one's place."""
    log = []
    for owner, name in ((np.memmap, "flush"), (torch, "save"), (os, "fsync"), (os, "replace")):
        call = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given, name=name, call=call: log.append(name) or call(*given))
    run(script, tmp_path)
    evaluations, text = len(saved_by(tmp_path)["evaluations"]), " ".join(log)
    assert text.count("save fsync replace") == log.count("save") > evaluations == 7
    assert text.count("flush save") == (evaluations if script == "iql_finetune" else 0)


@by_script
def test_a_full_disk_leaves_the_old_files_and_is_named(script, tmp_path, monkeypatch):
    run(script, tmp_path, f"{MORE[script]} 20")
    longer, names = f"{MORE[script]} 30", ("checkpoint.pt", "best.pt", "args.json")
    before, (_, hard) = [(run_dir(tmp_path) / x).read_bytes() for x in names], resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))  # of a checkpoint's megabytes
    try:
        with pytest.raises((OSError, RuntimeError)) as error:
            resume(script, tmp_path, longer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert "File too large" in "".join(traceback.format_exception(error.value))  # PyTorch adds an error of its own
    assert before == [(run_dir(tmp_path) / name).read_bytes() for name in names]
    write_text = Path.write_text
    monkeypatch.setattr(Path, "write_text", lambda path, text: write_text(path, text[:20]) and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        resume(script, tmp_path, longer)
    monkeypatch.undo()
    assert before[2] == (run_dir(tmp_path) / "args.json").read_bytes()
    assert "final: " in resume(script, tmp_path)


@by_script
@pytest.mark.parametrize("name", ["actor.log_std", "qf1.fc3.bias", "vf.fc3.bias"])  # of one loss alone in an update
def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_checkpoint(script, name, tmp_path):
    run(script, tmp_path, f"{LENGTH[script]} 10")
    path, saved = run_dir(tmp_path) / "checkpoint.pt", saved_by(tmp_path)
    saved["agent"][name] *= torch.nan
    saved["args"][{"iql_continuous": "total_updates", "iql_finetune": "offline_updates"}[script]] = 20
    torch.save(saved, path)
    sentence = refused("", script, tmp_path, f"--resume {path.parent} --eval-frequency 1", tiny=False)
    unit = "update" if script == "iql_continuous" else "step"
    assert sentence == f"A loss is NaN or infinite at {unit} 11: lower --learning-rate or --reward-scale."
    assert saved_by(tmp_path)["global_step"] == 10


# ONLINE TRANSITIONS
@pytest.mark.parametrize("kind", ["Unstable", "Unpaid"])
def test_nan_from_the_simulator_is_not_stored_and_a_resumed_run_gets_past_it(kind, tmp_path):
    """A file is on the disk from its first step on, however large."""
    telling = f"{kind}-v0 gave NaN or infinity at step"
    sentence = refused(telling, "iql_finetune", tmp_path, f"{ONLINE} --env-id tiny_env:{kind}-v0 --online-steps 30000")
    path, saved, stops = run_dir(tmp_path) / "online.bin", saved_by(tmp_path), 1
    assert path.stat().st_size == 30_000 * 40 <= path.stat().st_blocks * 512
    assert sentence.endswith(f"go on with --resume {path.parent.relative_to(tmp_path)}")
    assert np.isfinite(np.fromfile(path, np.float32)).all()
    torch.save({**saved, "args": {**saved["args"], "online_steps": 40}}, path.with_name("checkpoint.pt"))
    os.truncate(path, 40 * 40)
    while saved_by(tmp_path)["global_step"] < 50 and stops < 20:
        try:
            resume("iql_finetune", tmp_path)
        except SystemExit as end:
            assert telling in end.code
            stops += 1
        rows = np.fromfile(path, np.float32).reshape(40, 10)
        assert np.isfinite(rows).all()
    assert 1 < stops < 20 and rows.any(1).all()


def test_a_longer_run_keeps_its_online_transitions_and_lost_ones_are_missed(tmp_path):
    run("iql_finetune", tmp_path, ONLINE)
    path = run_dir(tmp_path) / "online.bin"
    before = path.read_bytes()
    resume("iql_finetune", tmp_path, "--online-steps 80")
    rows = np.fromfile(path, np.float32).reshape(80, 10)
    assert rows.any(1).all() and rows[:40].tobytes() == before
    rows[30] = 0
    rows.tofile(path)
    sentence = refused("", "iql_finetune", tmp_path, f"--resume {path.parent} --online-steps 90", tiny=False)
    assert sentence == f"{path} lacks transitions: begin a new run."
