"""What whole runs write and print, and what may not change them."""

import csv
import json
import re

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from conftest import ROOT
from processes import SCRIPTS, finish, run, run_dir, saved_by, start
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import iql_continuous

FLAGS = {
    "iql_continuous": "--env-id tiny_env:Ending-v0 --total-updates 60",
    "iql_finetune": "--env-id tiny_env:Ending-v0 --offline-updates 20 --online-steps 40 --learning-starts 10",
}


@pytest.fixture(scope="module", params=SCRIPTS)
def finished(request, tmp_path_factory):
    """A script, the folder of its run, which ends with other episodes than it began with, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    printed = run(request.param, folder, f"{FLAGS[request.param]} --final-episodes 5 --exp-name named --seed 4")
    return request.param, folder, printed


def rows_of(folder):
    with open(run_dir(folder) / "evaluations.csv") as file:
        return list(csv.DictReader(file))


def equal_bits(a, b):
    return all(torch.equal(a["agent"][name], b["agent"][name]) for name in a["agent"])


def test_only_the_seed_changes_the_bits(finished, tmp_path):
    """Not how often one evaluates, with how many environments, and on how many episodes."""
    script, folder, _ = finished
    other = "--eval-frequency 1000 --eval-episodes 3 --final-episodes 4 --eval-envs 3"
    run(script, tmp_path / "seldom", f"{FLAGS[script]} --seed 4 {other}")
    run(script, tmp_path / "seed", f"{FLAGS[script]} --seed 5")
    assert equal_bits(saved_by(folder), saved_by(tmp_path / "seldom"))
    assert not equal_bits(saved_by(folder), saved_by(tmp_path / "seed"))


def test_evaluations_are_the_same_in_the_table_the_checkpoint_tensorboard_and_the_output(finished):
    script, folder, printed = finished
    rows, saved = rows_of(folder), saved_by(folder)
    assert [{k: str(row.get(k, "")) for k in rows[0]} for row in saved["evaluations"]] == rows
    assert [int(row["global_step"]) for row in rows] == [0, 10, 20, 30, 40, 50, 60]
    phase_ends = (60,) if script == "iql_continuous" else (20, 60)
    assert [int(row["episodes"]) for row in rows] == [5 if 10 * k in phase_ends else 2 for k in range(7)]
    if script == "iql_finetune":
        assert [int(row["online_steps"]) for row in rows] == [0, 0, 0, 10, 20, 30, 40]
    total = "total_updates" if script == "iql_continuous" else "total_steps"
    assert {row[total] for row in rows} == {"60"}

    events = EventAccumulator(str(run_dir(folder)), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    for name in ("episodes", "episodic_return", "episodic_return_std", "success_rate"):
        logged = [(event.step, event.value) for event in events.Scalars(f"charts/{name}")]
        assert logged == [(int(row["global_step"]), pytest.approx(float(row[name]))) for row in rows]
    losses = {tag for tag in events.Tags()["scalars"] if tag.startswith("losses/")}
    names = "v_loss qf_loss actor_loss qf_values v_values advantages weights clipped_weights"
    assert losses == {f"losses/{name}" for name in names.split()}
    updates = [10, 20, 30, 40, 50, 60] if script == "iql_continuous" else [10, 20, 40, 50, 60]
    assert [event.step for event in events.Scalars("losses/v_loss")] == updates
    rates = [event.value for event in events.Scalars("charts/SPS")]
    assert len(rates) == len(updates) and min(rates) > 0
    table = events.Tensors("hyperparameters/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "|exp_name|named|" in table and "|beta|3.0|" in table

    lines = printed.splitlines()
    for evaluation in saved["evaluations"]:
        assert iql_continuous.describe(evaluation) in lines
    final = f"final: {saved['args']['env_id']} with tiny/good-v0, seed 4: "
    assert lines[-1] == final + iql_continuous.describe(saved["evaluations"][-1])


def test_args_json_explains_the_run(finished):
    script, folder, printed = finished
    assert re.fullmatch(r"tiny_env_Ending-v0__named__4__\d{10}", run_dir(folder).name)
    written, saved = json.loads((run_dir(folder) / "args.json").read_text()), saved_by(folder)
    assert written["args"] == saved["args"]
    defaults = vars(__import__(script).Args())
    given = (
        "seed exp_name env_id dataset_id cuda batch_size eval_frequency eval_episodes final_episodes eval_envs".split()
    )
    given += ["total_updates"] if script == "iql_continuous" else ["offline_updates", "online_steps", "learning_starts"]
    resolved = {"reward_scale": 1.0, "reward_shift": 0.0}
    assert written["args"] == {**defaults, **{name: written["args"][name] for name in given}, **resolved}
    assert written["args"]["dataset_id"] == "tiny/good-v0" and written["args"]["seed"] == 4
    returns = [episode.rewards.sum() for episode in minari.load_dataset("tiny/good-v0").iterate_episodes()]
    dataset = {"transitions": 40, **iql_continuous.summarize(np.array(returns), None, None)}
    assert written["dataset"] == pytest.approx(dataset)
    envs = gym.vector.SyncVectorEnv([iql_continuous.make_env("tiny_env:Ending-v0")] * 2)
    rng = np.random.default_rng(iql_continuous.EVAL_SEED)
    returns, _ = iql_continuous.evaluate(envs, lambda _: rng.uniform(-1, 1, (2, 2)), 20)
    assert written["random"] == pytest.approx(iql_continuous.summarize(returns, None, None))
    for name in ("dataset", "random"):
        assert f"{name}: {iql_continuous.describe(written[name])}" in printed.splitlines()


@pytest.mark.parametrize("script, expectile, scale", [("iql_continuous", 0.7, 0.05), ("iql_finetune", 0.8, 0.005)])
def test_adroit_has_its_settings_under_every_name(script, expectile, scale, tmp_path):
    length = "--total-updates 0" if script == "iql_continuous" else "--offline-updates 0 --online-steps 0"
    flags = f"--env-id AdroitHandPen --dataset-id bundled/pen/demos-v0 --no-cuda {length}"
    printed = run(script, tmp_path, f"{flags} --final-episodes 1 --eval-envs 1 --eval-episodes 1", tiny=False)
    assert printed.splitlines()[-1].startswith("final: AdroitHandPen-v1 with bundled/pen/demos-v0, seed 1: ")
    args = json.loads((run_dir(tmp_path) / "args.json").read_text())["args"]
    assert (args["env_id"], args["expectile"], args["reward_scale"]) == ("AdroitHandPen-v1", expectile, scale)
    (row,) = rows_of(tmp_path)
    score = 100 * (float(row["episodic_return"]) - 96.262799) / (3076.8331017826877 - 96.262799)
    assert float(row["normalized_score"]) == pytest.approx(score)


def test_best_pt_is_the_best_evaluation_on_the_start_states_that_all_share(finished, tmp_path):
    """Its policy is evaluated again. The last evaluation has more episodes, whose mean would win."""
    script, folder, _ = finished
    best, last = saved_by(folder, "best.pt"), saved_by(folder)
    envs = gym.vector.SyncVectorEnv([iql_continuous.make_env(last["args"]["env_id"])] * 2)
    agent = iql_continuous.Agent(3, 2, iql_continuous.Args())
    agent.load_state_dict(best["agent"])
    returns, _ = iql_continuous.evaluate(envs, agent.actor.act, 2)
    assert best["best_return"] == last["best_return"] == pytest.approx(returns.mean())
    means = {row["global_step"]: row["episodic_return"] for row in last["evaluations"]}
    ordinary = {row["global_step"]: row["episodic_return"] for row in last["evaluations"] if row["episodes"] == 2}
    agent.load_state_dict(last["agent"])
    returns, _ = iql_continuous.evaluate(envs, agent.actor.act, 2)
    assert max(ordinary, key=ordinary.get) == best["global_step"], (ordinary, returns.mean())
    assert means[60] > best["best_return"] > returns.mean()


def test_a_checkpoint_keeps_its_statistics_and_units_and_evaluates_to_its_score(finished, tmp_path):
    script, folder, _ = finished
    before, path = saved_by(folder), tmp_path / "scaled.pt"
    units = {"reward_scale": 0.125, "reward_shift": -0.5, "normalize_obs": False}
    torch.save({**before, "args": {**before["args"], **units}}, path)
    same = f"--env-id {before['args']['env_id']} --checkpoint {path} --final-episodes 5"
    if script == "iql_continuous":
        run(script, tmp_path / "evaluated", f"{same} --total-updates 0 --dataset-id None")
        (row,), evaluated = rows_of(tmp_path / "evaluated"), saved_by(tmp_path / "evaluated")
        assert row["episodic_return"] == rows_of(folder)[-1]["episodic_return"]
        # no dataset was read: the checkpoint's stays its own for what begins with it
        assert json.loads((run_dir(tmp_path / "evaluated") / "args.json").read_text()).keys() == {"args"}
        inherited = {"dataset_id": "tiny/good-v0", **units}
        assert {name: evaluated["args"][name] for name in ("dataset_id", *units)} == inherited
        last = run(script, tmp_path / "evaluated", f"--resume runs/{run_dir(tmp_path / 'evaluated').name}", tiny=False)
        score = iql_continuous.describe(evaluated["evaluations"][0])
        assert last == f"runs/{run_dir(tmp_path / 'evaluated').name} is finished: {score}\n"
    flags = f"{FLAGS['iql_finetune']} {same} --dataset-id tiny/other-v0"
    printed = run("iql_finetune", tmp_path / "tuned", flags)
    saved = saved_by(tmp_path / "tuned")
    for name in ("actor.obs_mean", "actor.obs_std"):
        assert torch.equal(saved["agent"][name], before["agent"][name])
    args = {name: saved["args"][name] for name in ("dataset_id", "offline_updates", *units)}
    assert args == {"dataset_id": "tiny/other-v0", "offline_updates": 0, **units}
    first = saved["evaluations"][0]
    assert first["episodic_return"] == before["evaluations"][-1]["episodic_return"] and first["online_steps"] == 0
    assert f"before fine-tuning: {iql_continuous.describe(first)}\n" in printed


MOVIEPY = """
class ImageSequenceClip:
    def __init__(self, frames, fps):
        self.frames = len(frames)

    def write_videofile(self, path, **kwargs):
        open(path, "w").write(str(self.frames))
"""


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_final_policy_is_filmed_for_one_episode(script, tmp_path):
    folder = tmp_path / "moviepy" / "video" / "io"
    folder.mkdir(parents=True)
    for package in (folder, folder.parent, folder.parent.parent):
        (package / "__init__.py").touch()
    (folder / "ImageSequenceClip.py").write_text(MOVIEPY)
    path = f"{tmp_path}:{ROOT / 'tests'}"
    flags = f"{FLAGS[script]} --env-id tiny_env:Tiny-v0 --capture-video"
    done = finish(start(script, tmp_path, flags, PYTHONPATH=path))
    assert done.returncode == 0, done.stderr
    films = [f"{path.parent.name}/{path.name} {path.read_text()}" for path in tmp_path.glob("videos/*/*.mp4")]
    assert films == [f"{run_dir(tmp_path).name}/rl-video-episode-0.mp4 11"]  # the start and ten steps
    dark = finish(start(script, tmp_path / "dark", f"{flags} --env-id tiny_env:Dark-v0", PYTHONPATH=path))
    assert dark.returncode != 0 and "no screen" in dark.stderr and not (tmp_path / "dark" / "runs").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_runs_of_one_name_in_one_second_share_no_folder(script, tmp_path):
    length = "--total-updates 0" if script == "iql_continuous" else "--offline-updates 0 --online-steps 0"
    processes = [start(script, tmp_path, length) for _ in range(4)]
    codes = [finish(process).returncode for process in processes]
    assert codes.count(0) == len(list((tmp_path / "runs").iterdir()))


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_scripts_own_dependencies_are_those_of_requirements_txt(script):
    head = re.search(r"^# /// script\n(.*?)^# ///$", (ROOT / f"{script}.py").read_text(), re.DOTALL | re.MULTILINE)[1]
    requirements = (ROOT / "requirements.txt").read_text().split("# the figure")[0]
    assert re.findall(r'"(\S+)",', head) == [line for line in requirements.splitlines() if not line.startswith("#")]
    assert 'requires-python = ">=3.11,<3.14"' in head
