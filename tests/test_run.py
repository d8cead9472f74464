"""What whole runs write and print, what they begin with, and what may not change them."""

import os
import re
import shutil
import sys
import time
import zlib
from itertools import count
from types import SimpleNamespace

import gymnasium as gym
import minari
import numpy as np
import processes
import pytest
import torch
from processes import NOTHING, ORDINARY, ROOT, SCRIPTS, by_script, refused, resume, run, run_dir, saved_by, written_by

import iql_continuous

ENDING = "--env-id tiny_env:Ending-v0"
SHORT = {"iql_continuous": "--total-updates 10", "iql_finetune": "--online-steps 20"}
ONLINE = {"iql_continuous": "--total-updates", "iql_finetune": "--offline-updates 0 --learning-starts 0 --online-steps"}


@pytest.fixture(scope="module", params=SCRIPTS)
def finished(request, tmp_path_factory):
    """A script, the folder of its run, and what it printed.

    The clock that only goes forward goes on by 1 whenever it is read, the one that people see goes back.
    """
    folder, forward, back = tmp_path_factory.mktemp("finished"), count(100), count(1_800_000_000, -1000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: next(forward))
        patch.setattr(time, "time", lambda: next(back))
        printed = run(request.param, folder, f"{ENDING} --exp-name \"an 'odd' name\" --seed 4")
    return request.param, folder, printed


def test_evaluations_are_the_same_in_the_table_the_checkpoint_tensorboard_and_the_output(finished):
    script, folder, printed = finished
    written, saved = written_by(folder), saved_by(folder)
    rows, scalars = written.rows, written.scalars
    assert [{k: str(row.get(k, "")) for k in rows[0]} for row in saved["evaluations"]] == rows
    assert [int(row["global_step"]) for row in rows] == [0, 10, 20, 30, 40, 50, 60]
    finetune = script == "iql_finetune"
    assert not finetune or [int(row["online_steps"]) for row in rows] == [0, 0, 0, 10, 20, 30, 40]
    assert {(row["total_steps" if finetune else "total_updates"], row["episodes"]) for row in rows} == {("60", "2")}
    for name in ("episodes", "episodic_return", "episodic_return_std", "success_rate"):
        found = [(int(row["global_step"]), pytest.approx(float(row[name]))) for row in rows]
        assert scalars[f"charts/{name}"] == found
    names = "v_loss qf_loss actor_loss qf_values v_values advantages weights clipped_weights"
    assert {tag for tag in scalars if tag.startswith("losses/")} == {f"losses/{name}" for name in names.split()}
    updates = [10, 20, 40, 50, 60] if finetune else [10, 20, 30, 40, 50, 60]
    assert [step for step, _ in scalars["losses/v_loss"]] == updates
    seconds = {int(row["global_step"]): float(row["wall_seconds"]) for row in rows}  # SPS reads the clock before
    assert seconds[0] == 1 and sorted({*seconds.values()}) == [*seconds.values()]
    assert scalars["charts/SPS"] == [(step, pytest.approx(step / (seconds[step] - 1))) for step in updates]
    assert "|exp_name|an 'odd' name|" in written.text and "|beta|3.0|" in written.text
    lines, last = printed.splitlines(), iql_continuous.describe(saved["evaluations"][-1])
    assert {iql_continuous.describe(evaluation) for evaluation in saved["evaluations"]} <= {*lines}
    assert lines[-1] == f"final: tiny_env:Ending-v0 with tiny/good-v0, seed 4: {last}"


def test_args_json_explains_the_run(finished):
    script, folder, printed = finished
    assert re.fullmatch(r"tiny_env_Ending-v0__an__odd__name__4__\d{10}_[0-9a-f]{4}", run_dir(folder).name)
    written, args, text = written_by(folder).json, saved_by(folder)["args"], (ROOT / f"{script}.py").read_bytes()
    assert written["script"] == saved_by(folder)["script"] == f"{zlib.crc32(text):08x}"
    assert written["args"] == args and processes.asked_for_determinism[-1] is True
    flags = f"{processes.TINY} {processes.DATA} {ORDINARY[script]} --seed --exp-name"
    own = {name: args[name] for name in [flag.replace("-", "_") for flag in re.findall(r"--(?:no-)?([a-z-]+)", flags)]}
    assert args == {**vars(__import__(script).Args()), **own, "reward_scale": 1.0}
    assert (own["dataset_id"], own["seed"], own["exp_name"], own["cuda"]) == ("tiny/good-v0", 4, "an 'odd' name", False)
    returns = [episode.rewards.sum() for episode in minari.load_dataset("tiny/good-v0").iterate_episodes()]
    dataset = {"transitions": 40, **iql_continuous.summarize(np.array(returns), None, None)}
    assert written["dataset"] == pytest.approx(dataset)
    envs = gym.vector.SyncVectorEnv([iql_continuous.make_env("tiny_env:Ending-v0")] * 2)
    rng = np.random.default_rng(iql_continuous.EVAL_SEED)
    returns, _ = iql_continuous.evaluate(envs, lambda _: rng.uniform(-1, 1, (2, 2)), 20)
    assert written["random"] == pytest.approx(iql_continuous.summarize(returns, None, None))
    for name in ("dataset", "random"):
        assert f"{name}: {iql_continuous.describe(written[name])}" in printed.splitlines()


@by_script
def test_losses_are_logged_between_evaluations_too_and_there_is_no_regret_without_successes(script, tmp_path):
    flags = f"{ONLINE[script]} 501 --batch-size 2 --eval-frequency 1000 --env-id tiny_env:Silent-v0"
    run(script, tmp_path, f"{flags} --no-torch-deterministic")
    written = written_by(tmp_path)
    assert [step for step, _ in written.scalars["losses/qf_loss"]] == [500, 501]
    assert not {name for name in [*written.rows[-1], *written.scalars] if "regret" in name or "success" in name}
    assert processes.asked_for_determinism[-1] is False


@pytest.mark.parametrize("script, expectile, scale", [("iql_continuous", 0.7, 0.05), ("iql_finetune", 0.8, 0.005)])
def test_adroit_has_its_settings_under_every_name_and_d4rls_references(script, expectile, scale, tmp_path, monkeypatch):
    """The dataset has other reference scores, and no id but its path."""
    path = shutil.copytree(ROOT / "tests" / "datasets" / "bundled" / "pen" / "demos-v0", tmp_path / "pen")
    minari.MinariDataset(path / "data").storage.update_metadata({"ref_min_score": 0.0, "ref_max_score": 1.0})
    flags = f"--env-id AdroitHandPen {NOTHING[script]} --no-cuda --eval-envs 1 --eval-episodes 1"
    printed = run(script, tmp_path, f"{flags} --dataset-id {path}", tiny=False)
    assert printed.splitlines()[-1].startswith(f"final: AdroitHandPen-v1 with {path}, seed 1: ")
    written, (row,) = written_by(tmp_path).json, written_by(tmp_path).rows
    args = [written["args"][name] for name in ("env_id", "dataset_id", "expectile", "reward_scale", "reward_shift")]
    assert args == ["AdroitHandPen-v1", str(path), expectile, scale, 0.0]
    for found in (row, written["dataset"], written["random"]):
        score = 100 * (float(found["episodic_return"]) - 96.262799) / (3076.8331017826877 - 96.262799)
        assert float(found["normalized_score"]) == pytest.approx(score)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "none"))  # the bundled set in the default one's place
    assert "NOT D4RL" in run(script, tmp_path / "other", flags, tiny=False)
    assert written_by(tmp_path / "other").json["args"]["dataset_id"] == "bundled/pen/demos-v0"


def test_best_pt_is_the_best_evaluation(finished):
    """Its policy is evaluated again."""
    script, folder, _ = finished
    best, last, scores = saved_by(folder, "best.pt"), saved_by(folder), []
    envs = gym.vector.SyncVectorEnv([iql_continuous.make_env(last["args"]["env_id"])] * 2)
    for saved in (best, last):
        agent = iql_continuous.Agent(3, 2, iql_continuous.Args())
        agent.load_state_dict(saved["agent"])
        scores.append(iql_continuous.evaluate(envs, agent.actor.act, 2)[0].mean())
    returns = {row["global_step"]: row["episodic_return"] for row in last["evaluations"]}
    assert max(returns, key=returns.get) == best["global_step"] < 60
    assert [returns[best["global_step"]], returns[60]] == pytest.approx(scores)


@pytest.fixture(scope="module", params=[("iql_continuous", True), ("iql_finetune", False)])
def beginning(request, tmp_path_factory):
    """The checkpoint of a run on three episodes in units of its own, with normalized observations and without."""
    (script, normalize), folder = request.param, tmp_path_factory.mktemp("beginning")
    units = "--max-episodes 3 --reward-scale 0.125 --reward-shift -0.5" + ("" if normalize else " --no-normalize-obs")
    run(script, folder, f"{ENDING} {units}")
    return run_dir(folder) / "checkpoint.pt", saved_by(folder), normalize


def units_of(saved):
    names = "dataset_id max_episodes reward_scale reward_shift normalize_obs".split()
    return {name: saved["args"][name] for name in names}


@by_script
def test_a_checkpoint_gives_statistics_units_and_data_where_nothing_else_is_asked_for(script, beginning, tmp_path):
    path, before, normalize = beginning
    flags = f"{ENDING} {SHORT[script]} --checkpoint {path}"
    other = {"dataset_id": "tiny/other-v0", "max_episodes": None, "reward_scale": 0.5, "reward_shift": 0.0}
    asked = {"": {}, "--max-episodes 2": {"max_episodes": 2}}
    asked["--dataset-id tiny/other-v0 --reward-scale 0.5 --reward-shift 0"] = other
    for k, (more, given) in enumerate(asked.items()):
        printed = run(script, tmp_path / str(k), f"{flags} {more}")
        saved, found = saved_by(tmp_path / str(k)), written_by(tmp_path / str(k)).json["dataset"]
        units = units_of(saved)
        assert units == {**units_of(before), **given} and saved["args"].get("offline_updates", 0) == 0
        episodes = list(minari.load_dataset(units["dataset_id"]).iterate_episodes())[: units["max_episodes"]]
        mean = np.mean([episode.rewards.sum() for episode in episodes])
        assert (found["transitions"], found["episodic_return"]) == (10 * len(episodes), pytest.approx(mean))
        obs_mean, obs_std = (before["agent"][f"actor.obs_{name}"] for name in ("mean", "std"))
        assert torch.equal(saved["agent"]["actor.obs_mean"], obs_mean)
        assert torch.equal(saved["agent"]["actor.obs_std"], obs_std)
        first = saved["evaluations"][0]
        assert first["global_step"] == 0 and first["episodic_return"] == before["evaluations"][-1]["episodic_return"]
        if script == "iql_finetune":
            assert f"before fine-tuning: {iql_continuous.describe(first)}\n" in printed
            own = before["args"]["expectile"]
            changed = [f"{name} {before['args'][name]} -> {value}" for name, value in given.items() if k < 2]
            changed += ["reward_scale 0.125 -> 0.5", "reward_shift -0.5 -> 0.0"] * (k == 2)
            changed = ", ".join([*changed, *[f"expectile {own} -> 0.8"] * (own != 0.8)]) or "nothing"
            assert f"{path} gives the networks. Other than in its run: {changed}\n" in printed
            row = np.fromfile(run_dir(tmp_path / str(k)) / "online.bin", np.float32)[:10]
            reward = row[5] / units["reward_scale"] - units["reward_shift"]
            assert reward == pytest.approx(-np.abs(row[6:9] * obs_std.numpy() + obs_mean.numpy()).sum(), rel=1e-4)
    flag = "--no-normalize-obs" if normalize else "--normalize-obs"
    refused(f"has normalize_obs={normalize}: leave this flag out", script, tmp_path / "x", f"{flags} {flag}")
    refused("Ending-v0, not of tiny_env:Wide-v0", script, tmp_path / "x", f"{flags} --env-id tiny_env:Wide-v0")
    assert not (tmp_path / "x" / "runs").exists()


def test_an_evaluation_alone_reads_no_data_and_passes_on_what_the_checkpoint_had(beginning, tmp_path):
    """The environment too."""
    path, before, _ = beginning
    flags = f"--total-updates 0 --checkpoint {path} --no-cuda --eval-episodes 2 --eval-envs 2"
    printed = run("iql_continuous", tmp_path / "0", flags, tiny=False)
    assert f" with {path}, seed 1: " in printed and not written_by(tmp_path / "0").json.keys() & {"dataset", "random"}
    resume("iql_continuous", tmp_path / "0", "--total-updates 10")  # now with the data
    assert saved_by(tmp_path / "0")["global_step"] == 10 and len(saved_by(tmp_path / "0")["fingerprint"]) == 5
    run("iql_finetune", tmp_path / "1", f"{ENDING} --checkpoint {run_dir(tmp_path / '0')}/best.pt")
    assert units_of(saved_by(tmp_path / "0")) == units_of(saved_by(tmp_path / "1")) == units_of(before)


@by_script
def test_the_final_policy_is_filmed_for_one_episode(script, tmp_path, monkeypatch):
    frames, logged = [], []
    clip = SimpleNamespace(write_videofile=lambda path, **_: open(path, "w").write(str(len(frames))))
    fake = SimpleNamespace(ImageSequenceClip=lambda all_frames, fps: frames.extend(all_frames) or clip)
    for name in ("moviepy", "moviepy.video", "moviepy.video.io", "moviepy.video.io.ImageSequenceClip"):
        monkeypatch.setitem(sys.modules, name, fake)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: None, Video=str, log=logged.append))
    run(script, tmp_path, f"{NOTHING[script]} --capture-video --track")
    film = f"videos/{run_dir(tmp_path).name}/rl-video-episode-0.mp4"
    assert logged == [{"video": film}] and [*tmp_path.glob("videos/*/*.mp4")] == [tmp_path / film]
    assert (tmp_path / film).read_text() == "11"  # the start and ten steps
    with pytest.raises(RuntimeError, match="no screen"):  # before anything is learned
        run(script, tmp_path / "dark", f"{NOTHING[script]} --capture-video --env-id tiny_env:Dark-v0")
    assert not (tmp_path / "dark" / "runs").exists()


@by_script
def test_each_run_has_its_own_folder_and_one_thread_unless_the_user_says_otherwise(script, tmp_path, monkeypatch):
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(time, "time", lambda: 1_800_000_000.5)
    monkeypatch.setattr(os, "urandom", lambda count: bytes([18, 52][:count]))
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    run(script, tmp_path, NOTHING[script])
    assert not threads and run_dir(tmp_path).name == f"tiny_env_Tiny-v0__{script}__1__1800000000_1234"
    monkeypatch.delenv("OMP_NUM_THREADS")
    with pytest.raises(FileExistsError):  # of the same name, second and two random bytes
        run(script, tmp_path, NOTHING[script])
    assert threads == [1]


@by_script
def test_a_run_is_tracked_and_a_resumed_one_goes_on_in_the_same_wandb_run(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)  # not installed
    with pytest.raises(ImportError, match="wandb"):  # and said before anything is read
        run(script, tmp_path / "x", "--track --dataset-id no/such-v0 --env-id no_such:Env-v0")
    inits = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **kwargs: inits.append(kwargs)))
    flags = "--wandb-project-name some --wandb-entity body"
    run(script, tmp_path, f"--track {flags} {ONLINE[script]} 10")
    directory = run_dir(tmp_path)
    run(script, tmp_path, f"--resume {directory}/ {ONLINE[script].split()[-1]} 20", tiny=False)
    for init in inits:
        assert (init["id"], init["name"], init["resume"]) == (directory.name, directory.name, "allow")
        assert (init["project"], init["entity"], init["sync_tensorboard"]) == ("some", "body", True)
        assert init["config"]["learning_rate"] == 3e-4
    assert len(inits) == 2 and "it/s" not in capsys.readouterr().err  # no progress bar where nobody looks


@by_script
def test_an_environment_may_be_in_a_module_of_the_folder_where_one_works(script, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "my_env", raising=False)
    registration = "gym.register('My-v0', 'tiny_env:Tiny', max_episode_steps=10)"
    (tmp_path / "my_env.py").write_text(f"import gymnasium as gym\n{registration}\n")
    assert "my_env:My-v0" in run(script, tmp_path, f"{NOTHING[script]} --env-id my_env:My-v0")


@by_script
def test_the_scripts_own_dependencies_are_those_of_requirements_txt(script):
    head = re.search(r"^# /// script\n(.*?)^# ///$", (ROOT / f"{script}.py").read_text(), re.DOTALL | re.MULTILINE)[1]
    requirements = (ROOT / "requirements.txt").read_text().split("# the figure")[0]
    assert re.findall(r'"(\S+)",', head) == [line for line in requirements.splitlines() if not line.startswith("#")]
    assert 'requires-python = ">=3.11,<3.14"' in head
