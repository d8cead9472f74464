"""Whole runs on the bundled data: what they write, and that the same seed gives the same bits."""

import csv
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import run_script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

COMMON = "--env-id AdroitHandPen-v1 --dataset-id bundled/pen/demos-v0 --eval-episodes 2 --eval-envs 2 --save-model"
RUNS = {
    "straight": ("iql_continuous.py", "--total-updates 600 --eval-frequency 200"),
    "again": ("iql_continuous.py", "--total-updates 600 --eval-frequency 200 --concurrent-eval True"),
    "seldom": ("iql_continuous.py", "--total-updates 600 --eval-frequency 600"),
    "other_seed": ("iql_continuous.py", "--total-updates 600 --eval-frequency 600 --seed 2"),
    "finetune": (
        "iql_finetune.py",
        "--offline-updates 400 --online-steps 200 --learning-starts 0 --eval-frequency 200",
    ),
    "finetune_seldom": (
        "iql_finetune.py",
        "--offline-updates 400 --online-steps 200 --learning-starts 0 --eval-frequency 600 --concurrent-eval True",
    ),
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


def weights(run):
    return torch.load(run[0] / "model.pt", weights_only=True)["agent"]


def rows(run):
    with open(run[0] / "evaluations.csv") as file:
        return list(csv.DictReader(file))


def equal_bits(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_the_same_seed_gives_the_same_bits_evaluated_meanwhile_or_not_and_another_seed_does_not(runs):
    assert equal_bits(weights(runs["straight"]), weights(runs["again"]))
    assert not equal_bits(weights(runs["straight"]), weights(runs["other_seed"]))
    for row, again in zip(rows(runs["straight"]), rows(runs["again"]), strict=True):
        assert {**row, "wall_seconds": 0} == {**again, "wall_seconds": 0}


def test_how_often_one_evaluates_changes_no_bit_of_training(runs):
    assert equal_bits(weights(runs["straight"]), weights(runs["seldom"]))
    assert equal_bits(weights(runs["finetune"]), weights(runs["finetune_seldom"]))


def test_evaluations_csv(runs):
    header = "global_step,episodic_return_mean,episodic_return_std,normalized_score,success_rate,wall_seconds"
    assert (runs["straight"][0] / "evaluations.csv").read_text().splitlines()[0] == header
    assert [int(row["global_step"]) for row in rows(runs["straight"])] == [0, 200, 400, 600]
    for row in rows(runs["straight"]):
        score = 100 * (float(row["episodic_return_mean"]) - 96.262799) / (3076.8331017826877 - 96.262799)
        assert float(row["normalized_score"]) == pytest.approx(score)
        assert 0 <= float(row["success_rate"]) <= 1
    assert (runs["finetune"][0] / "evaluations.csv").read_text().splitlines()[0] == header + ",phase"
    assert [row["phase"] for row in rows(runs["finetune"])] == ["offline", "offline", "offline", "online"]


@pytest.mark.parametrize("name", ["straight", "finetune"])
def test_tensorboard(runs, name):
    events = EventAccumulator(str(runs[name][0]), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    charts = "episodic_return normalized_score success_rate SPS random_return dataset_return"
    losses = "v_loss qf_loss actor_loss qf_values v_values advantages weights clipped_weights"
    tags = {f"charts/{tag}" for tag in charts.split()} | {f"losses/{tag}" for tag in losses.split()}
    if name == "finetune":
        tags |= {"charts/online_episodic_return", "charts/regret"}
    assert set(events.Tags()["scalars"]) == tags
    for tag, steps in (("charts/normalized_score", [0, 200, 400, 600]), ("losses/v_loss", [200, 400, 500, 600])):
        assert [event.step for event in events.Scalars(tag)] == steps
        assert np.isfinite([event.value for event in events.Scalars(tag)]).all()
    hyperparameters = events.Tensors("hyperparameters/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "|dataset_id|bundled/pen/demos-v0|" in hyperparameters and "|beta|3.0|" in hyperparameters


def test_what_is_printed(runs):
    lines = runs["straight"][1].splitlines()
    assert any(line.startswith("dataset: episodic_return=") for line in lines)
    assert any(line.startswith("random: episodic_return=") for line in lines)
    score = float(rows(runs["straight"])[-1]["normalized_score"])
    assert lines[-1].startswith("final: AdroitHandPen-v1 with bundled/pen/demos-v0, 600 updates, seed 1: ")
    assert f"normalized_score={score:.2f}" in lines[-1]
    assert any(line.startswith("before fine-tuning: ") for line in runs["finetune"][1].splitlines())


def test_a_saved_model_evaluates_to_the_runs_last_score_and_starts_fine_tuning(runs, tmp_path):
    model = runs["straight"][0] / "model.pt"
    flags = f"--env-id AdroitHandPen-v1 --checkpoint {model} --eval-episodes 2 --eval-envs 2"
    run_script("iql_continuous.py", f"{flags} --total-updates 0 --exp-name evaluated", tmp_path)
    evaluated = (next(tmp_path.glob("runs/*__evaluated__*")), None)
    last = rows(runs["straight"])[-1]
    assert rows(evaluated)[0]["episodic_return_mean"] == last["episodic_return_mean"]
    flags += " --dataset-id bundled/pen/demos-v0 --online-steps 110 --learning-starts 100 --exp-name tuned"
    output = run_script("iql_finetune.py", flags, tmp_path)
    assert f"before fine-tuning: episodic_return={float(last['episodic_return_mean']):.2f}" in output
    (path,) = tmp_path.glob("runs/*__tuned__*/checkpoint.pt")
    assert torch.load(path, weights_only=True)["args"]["reward_scale"] == 0.05  # the model's, not this script's default
