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
COLUMNS = "global_step,episodes,episodic_return,episodic_return_std,normalized_score,success_rate,wall_seconds"
MEASURED = {
    "dataset": {"episodes": 25, "episodic_return_std": 1.0, "episodic_return": 3.0, "normalized_score": 55.5},
    "random": {"episodes": 20, "episodic_return_std": 1.0, "episodic_return": 1.0, "normalized_score": -3.25},
}


def write_run(folder, scores=(1.0, 4.0, 2.0), normalized=True, phases=None, started=100, measured=MEASURED, **args):
    """A run directory with one evaluation for each score, evenly spaced."""
    default = {"env_id": "AdroitHandPen-v1", "dataset_id": "D4RL/pen/human-v2", "exp_name": "iql.D4RL.pen.human-v2"}
    args = {**default, "seed": 1, "beta": 3.0, "checkpoint": None, "max_episodes": None, "final_episodes": 100, **args}
    if phases:
        args = {"updates_per_step": 1, **args}
        offline = 0 if args["checkpoint"] else args["offline_updates"]
        total = offline + args["online_steps"] * args["updates_per_step"]
        steps = [offline if phase == "offline" else total for phase in phases]
    else:
        args = {"total_updates": 1000, **args}
        steps = np.linspace(0, args["total_updates"], len(scores)).astype(int).tolist()
    path = folder / f"{args['env_id']}__{args['exp_name']}__{args['seed']}__{started}"
    path.mkdir(parents=True)
    (path / "args.json").write_text(json.dumps({"args": args, **measured}))
    lines = [COLUMNS + (",online_steps" if phases else "")]
    for i, (step, score) in enumerate(zip(steps, scores, strict=True)):
        cells = [step, 20, 10 * score, 1, score, 0.5, 60 * (i + 1)] if normalized else [step, 20, score, 1, "", "", 60]
        lines.append(",".join(map(str, cells + ([1000 * (phases[i] == "online")] if phases else []))))
    (path / "evaluations.csv").write_text("\n".join(lines) + "\n")
    return path


def table(folder):
    """The rows of report.md below its head, each as a dict, by environment, data and variant."""
    lines = (folder / "report.md").read_text().splitlines()
    head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    rows = [dict(zip(head, row, strict=True)) for row in rows]
    return {(row["environment"], row["data"].split(" (")[0], row["variant"]): row for row in rows}


def results(folder):
    with open(folder / "results.csv") as file:
        return list(csv.DictReader(file))


PEN = ("AdroitHandPen-v1", "D4RL/pen/human-v2", "iql")


def test_statistics(tmp_path):
    """Computed in another way; over all sets the bootstrap draws within each."""
    pen = np.array([10 * 2.0**seed for seed in range(1, 7)])
    for seed, score in enumerate(pen):
        write_run(tmp_path / "runs", (0, 2 * score, score), seed=seed)
        hammer = {"env_id": "AdroitHandHammer-v1", "dataset_id": "D4RL/hammer/human-v2"}
        write_run(tmp_path / "runs", (0, 2 * score, score + 1000), seed=seed, **hammer)
    report.main(tmp_path)
    row = table(tmp_path)[PEN]
    assert (row["updates"], row["runs"], row["unit"]) == ("1000", "6", "normalized")
    assert (row["success"], row["minutes"], row["random policy"]) == ("0.50 ± 0.00", "3.0", "-3.2")
    assert row["data"].endswith("(25 episodes, 55.5)")
    assert row["final"] == f"{pen.mean():.1f} ± {np.sqrt(((pen - pen.mean()) ** 2).mean()):.1f}"
    assert row["best"].split()[0] == f"{2 * pen.mean():.1f}"
    middle, low, high = map(float, re.findall(r"[\d.]+", row["final IQM"]))
    assert middle == (40 + 80 + 160 + 320) / 4
    rng = np.random.default_rng(5)
    draws = [np.sort(rng.choice(pen, 6))[1:5].mean() for _ in range(10_000)]
    assert np.allclose((low, high), np.percentile(draws, (2.5, 97.5)), rtol=0.05)
    assert float(row["best IQM"].split()[0]) == 2 * middle
    pooled = table(tmp_path)["all", "2 sets", "iql"]
    strata = [pen, pen + 1000]
    draws = [np.sort(np.concatenate([rng.choice(x, 6) for x in strata]))[3:9].mean() for _ in range(10_000)]
    middle, low, high = map(float, re.findall(r"[\d.]+", pooled["final IQM"]))
    assert (pooled["runs"], pooled["final"]) == ("12", f"{np.mean(strata):.1f}")
    assert middle == round(np.sort(np.concatenate(strata))[3:9].mean(), 1)
    assert np.allclose((low, high), np.percentile(draws, (2.5, 97.5)), rtol=0.05)
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("args", "published"),
    [
        ({}, True),
        ({"exp_name": "iql_continuous"}, True),
        ({"total_updates": 999_999}, False),
        ({"max_episodes": 24}, False),
        ({"checkpoint": "runs/other/checkpoint.pt"}, False),
        ({"dataset_id": "own/pen-v0"}, False),
        ({"exp_name": "bc.D4RL.pen.human-v2", "beta": 0.0}, False),
        ({"exp_name": "iql_continuous", "beta": 0.0}, False),
    ],
)
def test_published_numbers(tmp_path, monkeypatch, args, published):
    """Only beside a million updates of IQL on the published set."""
    monkeypatch.setattr(report, "draw", lambda *_: None)
    write_run(tmp_path, **{"total_updates": 1_000_000, **args})
    report.main(tmp_path)
    (row,) = table(tmp_path).values()
    wanted = ("78.49 ± 8.21, 106.15 ± 10.28", "71.5") if published else ("", "")
    assert (row["IQL in CORL"], row["IQL's paper"]) == wanted


@pytest.mark.parametrize(
    ("args", "updates", "published"),
    [
        ({}, ["1000000", "1000000+1000000"], ["84.19 ± 3.96", "102.02 ± 20.75"]),
        ({"online_steps": 5}, ["1000000", "1000000+5"], ["84.19 ± 3.96", ""]),
        ({"online_steps": 500_000, "updates_per_step": 2}, ["1000000", "1000000+500000*2"], ["84.19 ± 3.96", ""]),
        ({"checkpoint": "best.pt"}, ["checkpoint", "checkpoint+1000000"], ["", ""]),
    ],
)
def test_finetuning(tmp_path, monkeypatch, args, updates, published):
    monkeypatch.setattr(report, "draw", lambda *_: None)
    args = {"offline_updates": 1_000_000, "online_steps": 1_000_000, **args}
    phases = ("offline", "online", "online")
    write_run(tmp_path, (1.0, 9.0, 6.0), phases=phases, dataset_id="D4RL/pen/cloned-v2", **args)
    report.main(tmp_path)
    rows = list(table(tmp_path).values())
    assert [(row["variant"], row["final"]) for row in rows] == [
        ("iql offline", "1.0 ± 0.0"),
        ("iql online", "6.0 ± 0.0"),
    ]
    assert [row["updates"] for row in rows] == updates
    assert [row["IQL in CORL"] for row in rows] == published


def test_own_runs(tmp_path):
    """Names without a dot, no reference scores, nothing measured; runs of one name that had different arguments."""
    own = {"env_id": "Own-v0", "dataset_id": "own/set-v0", "exp_name": "iql_continuous", "normalized": False}
    for seed in (1, 2):
        for beta in (1.0, 3.0):
            write_run(tmp_path, (-50, -7 * beta, -10 * seed), seed=seed, beta=beta, started=beta, measured={}, **own)
    report.main(tmp_path, out=tmp_path / "a" / "report")
    rows = table(tmp_path / "a" / "report")
    assert [key[2] for key in rows] == ["iql_continuous beta=1.0", "iql_continuous beta=3.0"]
    for row in rows.values():
        assert (row["runs"], row["unit"], row["final"], row["success"]) == ("2", "return", "-15.0 ± 5.0", "")
    assert not (tmp_path / "results.csv").exists() and len(results(tmp_path / "a" / "report")) == 4


def test_unfinished_and_repeated_runs(tmp_path, monkeypatch):
    """Of two finished runs with one identity the newest counts; one of them is enough."""
    monkeypatch.setattr(report, "draw", lambda *_: None)
    write_run(tmp_path, (1, 2, 30.0), seed=1, started=100)
    write_run(tmp_path, (1, 2, 40.0), seed=1, started=200)
    write_run(tmp_path / "runs", (1, 2, 50.0), seed=1, started=150)
    early = write_run(tmp_path, seed=1, started=300)
    (early / "evaluations.csv").unlink()
    stopped = write_run(tmp_path, seed=2)
    text = (stopped / "evaluations.csv").read_text().splitlines()
    (stopped / "evaluations.csv").write_text("\n".join(text[:-1]) + "\n")
    torn = write_run(tmp_path, seed=3)
    (torn / "evaluations.csv").write_text("\n".join(text)[:-12])
    report.main(tmp_path)
    assert [(row["seed"], row["final"]) for row in results(tmp_path)] == [("1", "40.0")]
    assert "\n2 more runs are not finished.\n" in (tmp_path / "report.md").read_text()


def test_merge(tmp_path, monkeypatch):
    """The folder's runs go before those of the earlier file and alone are drawn; merged again, nothing changes."""
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, _: drawn.append([ax.get_title() for ax in figure.axes]))
    for seed, score in ((1, 10.0), (2, 20.0)):
        write_run(tmp_path / "old", (0, 5.0, score), seed=seed)
    write_run(tmp_path / "old", dataset_id="D4RL/pen/cloned-v2", started=200)
    report.main(tmp_path / "old")
    write_run(tmp_path / "new", (0, 5.0, 26.0), seed=2)
    write_run(tmp_path / "new", (0, 5.0, 33.0), seed=3)
    report.main(tmp_path / "new", merge=tmp_path / "old" / "results.csv")
    rows = [(row["seed"], float(row["final"])) for row in results(tmp_path / "new")]
    assert rows == [("1", 2.0), ("1", 10.0), ("2", 26.0), ("3", 33.0)]
    assert table(tmp_path / "new")[PEN]["final"].split()[0] == "23.0"
    (tmp_path / "none").mkdir()
    report.main(tmp_path / "none", merge=tmp_path / "new" / "results.csv")
    for name in ("results.csv", "report.md"):
        assert (tmp_path / "none" / name).read_text() == (tmp_path / "new" / name).read_text()
    assert [len(titles) for titles in drawn] == [2, 1]
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit, match="other.csv is no results.csv of this report"):
        report.main(tmp_path / "new", merge=tmp_path / "other.csv")


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
