"""Whole runs on the bundled data: what they write, and that the same seed gives the same bits."""

import csv
import json
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import processes
import pytest
import torch
from conftest import ROOT, run_script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

COMMON = "--env-id AdroitHandPen-v1 --dataset-id bundled/pen/demos-v0 --batch-size 32 "
COMMON += "--eval-episodes 2 --final-episodes 4 --eval-envs 2"
OFFLINE, ONLINE = "--total-updates 600", "--offline-updates 300 --online-steps 150 --learning-starts 0"
RUNS = {
    "straight": ("iql_continuous.py", f"{OFFLINE} --eval-frequency 200"),
    "seldom": ("iql_continuous.py", f"{OFFLINE} --eval-frequency 600"),
    "finetune": ("iql_finetune.py", f"{ONLINE} --eval-frequency 150"),
    "finetune_seldom": ("iql_finetune.py", f"{ONLINE} --eval-frequency 600"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Every run's directory and output."""
    folder = tmp_path_factory.mktemp("runs")

    def run(name):
        script, flags = RUNS[name]
        return run_script(script, f"{COMMON} {flags} --exp-name {name}", folder)

    with ThreadPoolExecutor(2) as pool:
        outputs = dict(zip(RUNS, pool.map(run, RUNS), strict=True))
    return {name: (next(folder.glob(f"runs/*__{name}__*")), outputs[name]) for name in RUNS}


def saved(run, name="checkpoint.pt"):
    return torch.load(run[0] / name, weights_only=True)


def rows(run):
    with open(run[0] / "evaluations.csv") as file:
        return list(csv.DictReader(file))


def equal_bits(a, b):
    return all(torch.equal(a["agent"][name], b["agent"][name]) for name in a["agent"])


def test_how_often_one_evaluates_changes_no_bit_of_training(runs):
    assert equal_bits(saved(runs["straight"]), saved(runs["seldom"]))
    assert equal_bits(saved(runs["finetune"]), saved(runs["finetune_seldom"]))


def test_another_seed_gives_other_weights(tmp_path):
    for seed in "12":
        processes.run("iql_continuous", tmp_path / seed, f"--total-updates 10 --seed {seed}")
    first, second = ((processes.run_dir(tmp_path / seed), None) for seed in "12")
    assert not equal_bits(saved(first), saved(second))


def test_evaluations_csv_and_the_best_checkpoint(runs):
    header = "global_step,episodes,episodic_return,episodic_return_std,normalized_score,success_rate,wall_seconds"
    assert (runs["straight"][0] / "evaluations.csv").read_text().splitlines()[0] == header
    table = rows(runs["straight"])
    assert [(row["global_step"], row["episodes"]) for row in table] == [
        ("0", "2"),
        ("200", "2"),
        ("400", "2"),
        ("600", "4"),
    ]
    for row in table:
        score = 100 * (float(row["episodic_return"]) - 96.262799) / (3076.8331017826877 - 96.262799)
        assert float(row["normalized_score"]) == pytest.approx(score)
        assert 0 <= float(row["success_rate"]) <= 1
    best = saved(runs["straight"], "best.pt")
    returns = [float(row["episodic_return"]) for row in table[:3]]
    assert best["best_return"] >= max(returns)
    if best["global_step"] < 600:
        assert best["best_return"] == max(returns) == returns[best["global_step"] // 200]
    assert (runs["finetune"][0] / "evaluations.csv").read_text().splitlines()[0] == header + ",online_steps"
    phases = [("0", "0", "2"), ("150", "0", "2"), ("300", "0", "4"), ("450", "150", "4")]
    assert [(row["global_step"], row["online_steps"], row["episodes"]) for row in rows(runs["finetune"])] == phases


@pytest.mark.parametrize("name", ["straight", "finetune"])
def test_args_json_explains_the_run(runs, name):
    written = json.loads((runs[name][0] / "args.json").read_text())
    assert written["args"] == saved(runs[name])["args"]
    assert written["args"]["dataset_id"] == "bundled/pen/demos-v0" and written["args"]["exp_name"] == name
    assert written["dataset"]["episodes"] == 25 and 100 < written["dataset"]["normalized_score"] < 115
    assert written["random"]["episodes"] == 20 and abs(written["random"]["normalized_score"]) < 15


@pytest.mark.parametrize("name", ["straight", "finetune"])
def test_tensorboard(runs, name):
    events = EventAccumulator(str(runs[name][0]), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    charts = "episodes episodic_return episodic_return_std normalized_score success_rate SPS"
    losses = "v_loss qf_loss actor_loss qf_values v_values advantages weights clipped_weights"
    tags = {f"charts/{tag}" for tag in charts.split()} | {f"losses/{tag}" for tag in losses.split()}
    if name == "finetune":
        tags |= {"charts/online_episodic_return", "charts/regret"}
    assert set(events.Tags()["scalars"]) == tags
    if name == "straight":
        for tag, steps in (("charts/normalized_score", [0, 200, 400, 600]), ("losses/v_loss", [200, 400, 500, 600])):
            assert [event.step for event in events.Scalars(tag)] == steps
            assert np.isfinite([event.value for event in events.Scalars(tag)]).all()
    hyperparameters = events.Tensors("hyperparameters/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "|dataset_id|bundled/pen/demos-v0|" in hyperparameters and "|beta|3.0|" in hyperparameters


def test_what_is_printed(runs):
    lines = runs["straight"][1].splitlines()
    assert any(line.startswith("dataset: transitions=2500, episodes=25, episodic_return=") for line in lines)
    assert any(line.startswith("random: episodes=20, episodic_return=") for line in lines)
    last = rows(runs["straight"])[-1]
    start = "final: AdroitHandPen-v1 with bundled/pen/demos-v0, 600 updates, seed 1: global_step=600, episodes=4, "
    assert lines[-1].startswith(f"{start}episodic_return={round(float(last['episodic_return']), 2)}, ")
    assert f", normalized_score={round(float(last['normalized_score']), 2)}, " in lines[-1]
    assert any(line.startswith("before fine-tuning: ") for line in runs["finetune"][1].splitlines())


def test_a_checkpoint_evaluates_to_the_runs_score_and_starts_fine_tuning(runs, tmp_path):
    model = runs["straight"][0] / "checkpoint.pt"
    flags = f"--env-id AdroitHandPen-v1 --checkpoint {model} --eval-episodes 2 --final-episodes 4 --eval-envs 2"
    run_script("iql_continuous.py", f"{flags} --total-updates 0 --exp-name evaluated", tmp_path)
    evaluated = (next(tmp_path.glob("runs/*__evaluated__*")), None)
    last = rows(runs["straight"])[-1]
    assert rows(evaluated)[0]["episodic_return"] == last["episodic_return"]
    flags += " --dataset-id bundled/pen/demos-v0 --online-steps 110 --learning-starts 100 --exp-name tuned"
    output = run_script("iql_finetune.py", flags, tmp_path)
    assert "before fine-tuning: global_step=0, episodes=4, " in output
    assert f" episodic_return={round(float(last['episodic_return']), 2)}, " in output
    (path,) = tmp_path.glob("runs/*__tuned__*")
    assert saved((path, None))["args"]["reward_scale"] == 0.05  # the model's, not this script's default
    # a run begun with a checkpoint resumes without it, and longer
    model.rename(model.with_suffix(".away"))
    try:
        output = run_script("iql_finetune.py", f"--resume {path} --online-steps 120", tmp_path)
    finally:
        model.with_suffix(".away").rename(model)
    assert "global_step=120, " in output.splitlines()[-1]


@pytest.mark.parametrize("script", ["iql_continuous.py", "iql_finetune.py"])
def test_the_scripts_own_dependencies_are_those_of_requirements_txt(script):
    head = re.search(r"^# /// script\n(.*?)^# ///$", (ROOT / script).read_text(), re.DOTALL | re.MULTILINE)[1]
    requirements = (ROOT / "requirements.txt").read_text().split("# the figure")[0]
    assert re.findall(r'"(\S+)",', head) == [line for line in requirements.splitlines() if not line.startswith("#")] + (
        re.findall(r'">=3.11",', head)
    )
    assert 'requires-python = ">=3.11"' in head
