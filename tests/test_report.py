"""docs/report.py on run directories that are made here."""

import csv
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

SCRIPT = Path(__file__).parent.parent / "docs" / "report.py"
spec = importlib.util.spec_from_file_location("report", SCRIPT)
report = importlib.util.module_from_spec(spec)
spec.loader.exec_module(report)
MEASURED = {
    "dataset": {"episodes": 25, "episodic_return": 3.0, "normalized_score": 55.5},
    "random": {"episodes": 20, "episodic_return": 1.0, "normalized_score": -3.25},
}
PEN = ("AdroitHandPen-v1", "D4RL/pen/human-v2")
HAMMER = ("AdroitHandHammer-v1", "D4RL/hammer/human-v2")


def write_run(folder, scores=(1.0, 4.0, 2.0), task=PEN, normalized=True, started=100, measured=MEASURED, **args):
    """The directory of a run with these scores, the last one of more episodes; `asked` is each one's total length."""
    env_id, dataset_id = task
    args = {"env_id": env_id, "dataset_id": dataset_id, "exp_name": "iql", "seed": 1, "beta": 3.0, **args}
    args = {"checkpoint": None, "max_episodes": None, "eval_episodes": 20, **args}
    online, total_name = "online_steps" in args, "total_steps" if "online_steps" in args else "total_updates"
    offline = args.setdefault("offline_updates", 0) if online else 0
    total = offline + args["online_steps"] if online else args.setdefault("total_updates", 1000)
    steps = args.pop("steps", np.linspace(0, total, len(scores)).astype(int).tolist())
    asked = args.pop("asked", [total] * len(steps))
    path = folder / f"{env_id}__{args['exp_name']}__{args['seed']}__{started}"
    path.mkdir(parents=True)
    (path / "args.json").write_text(json.dumps({"args": args, **measured}))
    rows = []
    for step, score, length in zip(steps, scores, asked, strict=True):
        row = {
            "global_step": step,
            total_name: length,
            "episodes": 100 if step == length or online and step == offline else 20,
        }
        row |= {"online_steps": max(0, step - offline)} if online else {}
        row |= {"normalized_score": score, "success_rate": 0.5} if normalized else {}
        rows.append({**row, "episodic_return": 10 * score, "wall_seconds": 90})
    with open(path / "evaluations.csv", "w", newline="") as file:
        csv.DictWriter(file, rows[0]).writeheader()
        csv.DictWriter(file, rows[0]).writerows(rows)
    return path


def table(folder):
    """The rows of report.md, each as a dict."""
    lines = (folder / "report.md").read_text().splitlines()
    head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    return [dict(zip(head, row, strict=True)) for row in rows]


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """Makes the report and returns the columns of its table that are asked for."""
    monkeypatch.setattr(report, "draw", lambda *_: None)

    def rows(*columns, folder=tmp_path, merge=None):
        report.main(folder, merge)
        return [tuple(row[column] for column in columns) for row in table(folder)]

    return rows


def test_statistics(tmp_path):
    """Computed in another way; over all sets the bootstrap draws within each."""
    pen = np.array([10 * 2.0**seed for seed in range(1, 7)])
    for seed, score in enumerate(pen):
        write_run(tmp_path / "runs", (0, 2 * score, score), seed=seed)
        write_run(tmp_path / "runs", (0, 2 * score, score + 1000), HAMMER, seed=seed)
    report.main(tmp_path)
    _, row, pooled = table(tmp_path)
    assert (row["environment"], row["data (mean score)"], row["variant"]) == (PEN[0], f"{PEN[1]} (55.5)", "iql")
    assert (row["updates"], row["runs"], row["success"]) == ("1000", "6", "0.50")
    assert row["final"] == f"{pen.mean():.1f} ± {np.sqrt(((pen - pen.mean()) ** 2).mean()):.1f}"
    assert row["best"] == f"{2 * pen.mean():.1f}"
    assert (pooled["environment"], pooled["data (mean score)"], pooled["runs"]) == ("all", "2 sets", "12")
    assert pooled["final"] == f"{pen.mean() + 500:.1f}"
    rng = np.random.default_rng(5)
    for cells, strata, cut in ((row, [pen], 1), (pooled, [pen, pen + 1000], 3)):
        middle, low, high = map(float, re.findall(r"[\d.]+", cells["IQM of final"]))
        assert middle == round(np.sort(np.concatenate(strata))[cut:-cut].mean(), 1)
        draws = [np.sort(np.concatenate([rng.choice(x, 6) for x in strata]))[cut:-cut].mean() for _ in range(10_000)]
        assert np.allclose((low, high), np.percentile(draws, (2.5, 97.5)), rtol=0.05)
    first, *_ = csv.DictReader((tmp_path / "results.csv").open())
    assert (first["wall_seconds"], first["random_score"], first["dataset_episodes"]) == ("90.0", "-3.25", "25")
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"


def test_the_table_has_no_empty_column(tmp_path, rows):
    """Plain returns where there is no reference; no spread of one seed; no success where none is reported."""
    write_run(tmp_path, (-50, -70, -10), ("Own-v0", "own/set-v0"), normalized=False)
    assert rows("environment", "final", "best") == [("Own-v0 (returns)", "-100.0", "-100.0")]
    assert list(table(tmp_path)[0]) == "environment|data (mean score)|variant|updates|runs|final|best".split("|")


def test_each_phase_of_fine_tuning_has_its_row(tmp_path, rows):
    """With its own last and best evaluation."""
    args = {"offline_updates": 100, "online_steps": 50, "steps": [0, 50, 100, 125, 150]}
    write_run(tmp_path, (1.0, 9.0, 2.0, 4.0, 3.0), **args)
    checkpoint = {"checkpoint": "a/best.pt", "online_steps": 50, "steps": [0, 25, 50]}
    write_run(tmp_path, (8.0, 6.0, 7.0), exp_name="tuned", **checkpoint)
    assert rows("variant", "updates", "final", "best") == [
        ("iql offline", "100", "2.0", "9.0"),
        ("iql online", "100+50", "3.0", "4.0"),
        ("tuned offline", "checkpoint", "8.0", "8.0"),
        ("tuned online", "checkpoint+50", "7.0", "7.0"),
    ]


def test_a_lengthened_run_is_marked(tmp_path, rows):
    """It is no run of its last length: its cosine began anew. The offline phase has none."""
    write_run(tmp_path, asked=[500, 500, 1000])
    write_run(tmp_path, seed=2)
    tuned = {"exp_name": "tuned", "offline_updates": 100, "online_steps": 50, "steps": [0, 100, 130, 150]}
    write_run(tmp_path, (1.0, 2.0, 3.0, 4.0), asked=[130, 130, 130, 150], **tuned)
    write_run(tmp_path, (1.0, 2.0, 3.0, 4.0), asked=[130, 130, 150, 150], seed=2, **tuned)
    assert sorted(rows("variant", "updates", "runs")) == [
        ("iql", "1000", "1"),
        ("iql", "500->1000", "1"),
        ("tuned offline", "100", "2"),
        ("tuned online", "100+30->50", "1"),
        ("tuned online", "100+50", "1"),
    ]


def test_other_arguments_are_another_variant(tmp_path, rows):
    """In the row of a set; the row over all sets has what is alike in each, and of one length."""
    for seed in (1, 2):
        for beta in (1.0, 3.0):
            write_run(tmp_path, (0, 0, beta), seed=seed, beta=beta, started=beta)
        write_run(tmp_path, (0, 0, 9), HAMMER, seed=seed, expectile=0.9)
        write_run(tmp_path, (0, 0, 7), exp_name="bc", seed=seed, max_episodes=5)
        write_run(tmp_path, (0, 0, 8), HAMMER, exp_name="bc", seed=seed)
        write_run(tmp_path, (0, 0, 5), HAMMER, exp_name="bc", seed=seed, total_updates=999, started=200)
        write_run(tmp_path, (0, 0, 6), exp_name="sarsa", seed=seed, expectile=0.5)
        write_run(tmp_path, (0, 0, 6), HAMMER, exp_name="sarsa", seed=seed)
    assert rows("data (mean score)", "variant", "updates", "final") == [
        ("D4RL/hammer/human-v2 (55.5)", "iql", "1000", "9.0 ± 0.0"),
        ("D4RL/hammer/human-v2 (55.5)", "bc", "1000", "8.0 ± 0.0"),
        ("D4RL/hammer/human-v2 (55.5)", "bc", "999", "5.0 ± 0.0"),
        ("D4RL/hammer/human-v2 (55.5)", "sarsa", "1000", "6.0 ± 0.0"),
        ("D4RL/pen/human-v2 (55.5)", "iql beta=1.0", "1000", "1.0 ± 0.0"),
        ("D4RL/pen/human-v2 (55.5)", "iql beta=3.0", "1000", "3.0 ± 0.0"),
        ("D4RL/pen/human-v2 (55.5)", "sarsa", "1000", "6.0 ± 0.0"),
        ("D4RL/pen/human-v2[:5] (55.5)", "bc", "1000", "7.0 ± 0.0"),
        ("2 sets", "bc", "1000", "7.5"),
    ]


def test_checkpoints_that_share_a_seed_are_told_apart(tmp_path, rows):
    """Runs that each have a seed and a checkpoint of their own are one row."""
    for seed in (1, 2):
        write_run(tmp_path, exp_name="own", seed=seed, checkpoint=f"/a/run{seed}/best.pt", total_updates=10)
        write_run(tmp_path, exp_name="shared", started=seed, checkpoint=f"/a/run{seed}/best.pt", online_steps=10)
    assert rows("variant", "updates", "runs") == [
        ("own", "checkpoint+10", "2"),
        ("shared checkpoint=run1/best.pt offline", "checkpoint", "1"),
        ("shared checkpoint=run1/best.pt online", "checkpoint+10", "1"),
        ("shared checkpoint=run2/best.pt offline", "checkpoint", "1"),
        ("shared checkpoint=run2/best.pt online", "checkpoint+10", "1"),
    ]


def test_runs_that_only_evaluate(tmp_path, rows):
    for name in "ab":
        run = {"checkpoint": f"runs/{name}/best.pt", "task": (PEN[0], None), "total_updates": 0, "started": ord(name)}
        write_run(tmp_path, (ord(name),), measured={}, **run)
    assert rows("data (mean score)", "variant", "updates", "final") == [
        ("only evaluated", "iql checkpoint=a/best.pt", "checkpoint+0", "97.0"),
        ("only evaluated", "iql checkpoint=b/best.pt", "checkpoint+0", "98.0"),
    ]


def test_a_dot_cuts_no_name(tmp_path, rows):
    """Only the dataset, which benchmark.sh appends, is cut off."""
    for name in ("v1.0", "v1.1", "v2.D4RL.pen.human-v2"):
        write_run(tmp_path, exp_name=name)
    assert rows("variant") == [("v1.0",), ("v1.1",), ("v2",)]


def test_runs_without_a_row_are_named(tmp_path, rows):
    """Of two finished runs of one identity the newest counts."""
    names = [write_run(tmp_path / "runs", (1, 2, score), started=100 + score).name for score in (30, 50)]
    names.insert(1, write_run(tmp_path, (1, 2, 40), started=140).name)
    early, stopped, cut = (write_run(tmp_path, seed=seed) for seed in (2, 3, 4))
    (early / "evaluations.csv").unlink()
    text = (stopped / "evaluations.csv").read_text().splitlines()
    (stopped / "evaluations.csv").write_text("\n".join(text[:-1]) + "\n")
    (cut / "evaluations.csv").write_text("\n".join(text)[:-2])
    assert rows("final", "runs") == [("50.0", "1")]
    first, second, third = names
    text = (tmp_path / "report.md").read_text()
    assert f"name, arguments and seed: {first} by {second}, {second} by {third}.\n" in text
    assert set(re.search("Not finished: (.*)[.]\n", text)[1].split(", ")) == {early.name, stopped.name, cut.name}


def test_merge(tmp_path, rows):
    """The folder's runs go before those of the earlier file, which is said where they differ."""
    for seed, score in ((1, 10.0), (2, 20.0)):
        write_run(tmp_path / "old", (0, 5.0, score), seed=seed)
    rows(folder=tmp_path / "old")
    run = write_run(tmp_path / "new", (0, 5.0, 26.0), seed=2)
    assert rows("runs", "final", folder=tmp_path / "new", merge=tmp_path / "old" / "results.csv") == [
        ("2", "18.0 ± 8.0")
    ]
    assert f"seed: results.csv by {run.name}.\n" in (tmp_path / "new" / "report.md").read_text()
    merged = (tmp_path / "new" / "results.csv").read_text()
    rows(folder=tmp_path / "new", merge=tmp_path / "new" / "results.csv")
    assert "Replaced" not in (tmp_path / "new" / "report.md").read_text()
    assert (tmp_path / "new" / "results.csv").read_text() == merged


def test_figure(tmp_path, monkeypatch):
    """The last evaluation is a mark, not a point of the curve; one seed has no range."""
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: drawn.append(figure))
    for seed in (1, 2):
        write_run(tmp_path, (1, 4 * seed, 2, 9 * seed), seed=seed, asked=[500, 500, 666, 1000])
    write_run(tmp_path, (1, 3, 2), HAMMER)
    write_run(tmp_path, (5,), (PEN[0], None), measured={}, checkpoint="a/best.pt", total_updates=0, started=200)
    report.main(tmp_path)
    hammer, pen = drawn[0].axes
    curves = [[list(map(float, line.get_ydata())) for line in ax.lines[:2]] for ax in (hammer, pen)]
    assert curves == [[[1, 3], [2]], [[1, 6], [9, 18]]]  # 500->666->1000: the end of the first lengths is left out
    assert [list(line.get_xdata()) for line in pen.lines[:2]] == [[0, 333], [1000, 1000]]
    labels = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert labels[0] == "iql, 1000 updates"
    assert "iql, 500->666->1000 updates, mean and range of the seeds" in labels


def test_command(tmp_path):
    """As a user calls it, in a folder with blanks and brackets; where nothing is finished it says so."""
    folder = tmp_path / "my [1] runs"
    folder.mkdir()
    for status in (1, 0):
        done = subprocess.run([sys.executable, SCRIPT, folder], capture_output=True, text=True)
        assert done.returncode == status, done.stderr
        if status:
            assert done.stderr.count("\n") == 1 and "holds no finished run" in done.stderr
            write_run(folder)
    assert (folder / "report.md").read_text() in done.stdout
    assert {path.name for path in folder.iterdir() if path.is_file()} == {"report.md", "results.csv", "figure.png"}
