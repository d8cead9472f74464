"""docs/report.py on run directories that are made here."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import report
from matplotlib.figure import Figure

SCRIPT = Path(__file__).parent.parent / "docs" / "report.py"
PEN, HAMMER = (("AdroitHandPen-v1", "D4RL/pen/human-v2"), ("AdroitHandHammer-v1", "D4RL/hammer/human-v2"))


def write_run(folder, scores=(1.0, 4.0, 2.0), task=PEN, normalized=True, started=100, data=(), script="aa", **args):
    """The directory of a run with these scores, each of which `asked` for a length; one of no updates evaluates."""
    args = {"env_id": task[0], "dataset_id": task[1], "exp_name": "iql", "seed": 1, "checkpoint": None} | args
    args = {"max_episodes": None, "beta": 3.0} | args
    online, offline = "online_steps" in args, args.get("offline_updates", 0)
    total = offline + args["online_steps"] if online else args.setdefault("total_updates", 1000)
    steps = args.pop("steps", np.linspace(0, total, len(scores)).astype(int).tolist())
    asked = args.pop("asked", [total] * len(steps))
    (path := folder / f"{task[0]}__{args['exp_name']}__{args['seed']}__{started}_{script}").mkdir(parents=True)
    data = {"episodes": 25, "episodic_return": 55.5, "normalized_score": 55.5, **dict(data)}
    random = {"episodic_return": 1.0, "normalized_score": -3.25}
    measured = {"dataset": data, "random": random} if args.get("total_updates", 1) else {}
    (path / "args.json").write_text(json.dumps({"args": args, "script": script, **measured}))
    names = ["global_step", *(["total_steps", "online_steps"] if online else ["total_updates"])]
    names += ["normalized_score", "success_rate"] * normalized + ["episodic_return", "regret", "wall_seconds"]
    lines = [",".join(names)]
    for step, score, length in zip(steps, scores, asked, strict=True):
        row = [step, length, *[max(0, step - offline)] * online, *[score, score / 1000] * normalized, 10 * score]
        lines.append(",".join(map(str, [*row, score / 20 if online else "", 1000 * args["seed"] + step])))
    (path / "evaluations.csv").write_text("\n".join([*lines, ""]))
    return path


def table(folder):
    """The rows of report.md, each as a dict."""
    lines = (folder / "report.md").read_text().splitlines()
    head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    return [dict(zip(head, row, strict=True)) for row in rows]


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """Makes the report and returns the columns of its table that are asked for as text: a row, another row."""
    monkeypatch.setattr(report, "draw", lambda *_: None)

    def rows(*columns, folder=tmp_path, merge=None):
        report.main(folder, merge)
        return ", ".join(" ".join(row[column] or "-" for column in columns) for row in table(folder))

    return rows


def test_statistics(tmp_path):
    """Computed in another way; over all sets the bootstrap draws within each."""
    pen = np.array([10 * 2.0**seed for seed in range(1, 7)])
    for seed, score in enumerate(pen):
        write_run(tmp_path / "runs", (0, 2 * score, score), seed=seed)
        write_run(tmp_path / "runs", (0, 2 * score, score + 1000), HAMMER, seed=seed)
    report.main(tmp_path)
    _, row, pooled = table(tmp_path)
    middles = [row.pop("IQM of final"), pooled.pop("IQM of final")]
    final = f"{pen.mean():.1f} ± {np.sqrt(((pen - pen.mean()) ** 2).mean()):.1f}"
    best, success = f"{2 * pen.mean():.1f}", f"{pen.mean() / 1000:.2f}"
    assert [*row.values()] == [PEN[0], f"{PEN[1]} (25, 55.5)", "iql", "1000", "6", final, best, success]
    assert list(pooled.values())[:6] == ["all", "2 sets", "iql", "1000", "12", f"{pen.mean() + 500:.1f}"]
    rng = np.random.default_rng(5)
    for text, strata, cut in zip(middles, ([pen], [pen, pen + 1000]), (1, 3), strict=True):
        middle, low, high = map(float, re.findall(r"[\d.]+", text))
        assert middle == round(np.sort(np.concatenate(strata))[cut:-cut].mean(), 1)
        draws = [np.sort(np.concatenate([rng.choice(x, 6) for x in strata]))[cut:-cut].mean() for _ in range(10_000)]
        assert np.allclose((low, high), np.percentile(draws, (2.5, 97.5)), rtol=0.05)
    assert report.iqm([np.arange(9.0) ** 5]) == "2440.0 [97.6, 13194.6]"  # the same numbers each time
    *_, last = csv.DictReader((tmp_path / "results.csv").open())
    names = ("seed", "run", "script", "success_rate", "wall_seconds", "random_score", "dataset_episodes")
    assert ",".join(last[name] for name in names) == f"5,{PEN[0]}__iql__5__100_aa,aa,0.64,6000.0,-3.25,25"


def test_plain_returns(tmp_path, rows):
    """They stand alone; one seed has no spread; what nobody reports has no column; what rounds to 0 has no sign."""
    write_run(tmp_path, (-50, -0.001, -10), ("Own-v0", "own/set-v0"), normalized=False)
    assert rows("environment", "final", "best") == "Own-v0 (returns) -100.0 0.0"
    assert list(table(tmp_path)[0]) == "environment|data (episodes, score)|variant|updates|runs|final|best".split("|")
    write_run(tmp_path, (-70, -0.01), ("Own-v0", "own/set-v0"), seed=2)
    write_run(tmp_path, (0, 1), ("Own-v0", "own/other-v0"), normalized=False, started=1)
    write_run(tmp_path, (0, 4), PEN)
    wanted = "AdroitHandPen-v1 1 4.0, Own-v0 (returns) 1 10.0, Own-v0 1 0.0, Own-v0 (returns) 1 -100.0, all 2 2.0"
    assert rows("environment", "runs", "final") == wanted and "IQM of final" not in table(tmp_path)[0]


def test_unlike_data_under_one_id(tmp_path, rows):
    """Neither a row nor a replacement, also when they come from an earlier file; machines may round differently."""
    for n, (episodes, mean) in enumerate([(5, 55.0), (500, 55.0), (500, 55.01)] * 2):
        data = {"episodes": episodes, "normalized_score": mean + n * 1e-10}
        write_run(tmp_path, (0, 75 + 10 * n), data=data, seed=n // 3, started=n)
    columns, few, many = ("data (episodes, score)", "runs", "final"), f"{PEN[1]} (5, 55.0)", f"{PEN[1]} (500, 55.0)"
    wanted = f"{few} 2 90.0 ± 15.0, {many} 2 100.0 ± 15.0, {many} 2 110.0 ± 15.0"
    assert rows(*columns) == f"{wanted}, 3 sets 6 100.0"
    assert "Replaced" not in (tmp_path / "report.md").read_text()
    (tmp_path / "new").mkdir()  # its rows have no arguments to tell what is alike in all sets
    assert rows(*columns, folder=tmp_path / "new", merge=tmp_path / "results.csv") == wanted


def test_unlike_code_is_another_variant(tmp_path, rows):
    """Also beside an earlier file. A row over all sets is of one code, with as many runs of each."""
    old, new = tmp_path / "old", tmp_path / "new"
    for seed, script in ((1, "aa"), (2, "aa"), (2, "bb"), (2, "aa+bb")):
        write_run(old, (0, seed), seed=seed, script=script)
    write_run(old, (0, 7), HAMMER, exp_name="other")
    write_run(old, (0, 8), exp_name="other", script="bb")
    for n, task in enumerate((PEN, PEN, HAMMER)):
        write_run(old, (0, 9), task, exp_name="uneven", seed=n)
    wanted = "other 1 7.0, uneven 1 9.0, iql script=aa 2 1.5 ± 0.5, iql script=aa+bb 1 2.0, iql script=bb 1 2.0, "
    wanted += "other 1 8.0, uneven 2 9.0 ± 0.0"
    assert rows("variant", "runs", "final", folder=old) == wanted
    write_run(new, (0, 3), seed=3, script="bb")
    wanted = wanted.replace("script=bb 1 2.0", "script=bb 2 2.5 ± 0.5")
    for earlier in (old, new):
        assert rows("variant", "runs", "final", folder=new, merge=earlier / "results.csv") == wanted


def test_each_phase_of_fine_tuning_has_its_row(tmp_path, rows):
    """With its own last and best evaluation. A lengthened run is none of its last length; the offline phase is."""
    checkpoint = {"checkpoint": "a/best.pt", "online_steps": 50, "steps": [0, 25, 50]}
    write_run(tmp_path, (8.0, 6.0, 7.0), exp_name="checked", **checkpoint)
    tuned = {"exp_name": "tuned", "offline_updates": 100, "online_steps": 50, "steps": [0, 50, 100, 130, 150]}
    write_run(tmp_path, (9.0, 1.0, 2.0, 14.0, 3.0), asked=[130, 130, 130, 130, 150], **tuned)
    write_run(tmp_path, (9.0, 1.0, 2.0, 7.0, 5.0), asked=[130, 130, 130, 150, 150], seed=2, **tuned)
    write_run(tmp_path, (9.0, 1.0, 2.0, 7.0, 6.0), asked=[140, 140, 140, 140, 150], seed=3, **tuned)
    write_run(tmp_path, asked=[500, 500, 1000])
    write_run(tmp_path, seed=2)
    assert rows("variant", "updates", "runs", "final", "best") == (
        "iql 1000 1 2.0 4.0, iql 500->1000 1 2.0 4.0, "
        "checked offline checkpoint 1 8.0 8.0, checked online checkpoint+50 1 7.0 7.0, "
        "tuned offline 100 3 2.0 ± 0.0 9.0, tuned online 100+30->50 1 3.0 14.0, "
        "tuned online 100+40@30->50 1 6.0 7.0, tuned online 100+50 1 5.0 7.0"
    )
    regrets = {row["variant"]: row["regret"] for row in csv.DictReader((tmp_path / "results.csv").open())}
    assert (regrets["iql"], regrets["checked online"]) == ("nan", "0.35")


def test_other_arguments_are_another_variant(tmp_path, rows):
    """In the row of a set; the row over all sets has what is alike in each, and of one length."""
    for seed in (1, 2):
        for beta in (1.0, 3.0):
            write_run(tmp_path, (0, 0, beta), seed=seed, beta=beta, started=beta)
        write_run(tmp_path, (0, 0, 9), HAMMER, seed=seed, expectile=0.9)
        # of a name, only the dataset, which benchmark.sh appends, is cut off
        write_run(tmp_path, (0, 0, 7), exp_name="bc.D4RL.pen.human-v2", seed=seed, max_episodes=5)
        write_run(tmp_path, (0, 0, 8), HAMMER, exp_name="bc.D4RL.hammer.human-v2", seed=seed)
        write_run(tmp_path, (0, 0, 5), HAMMER, exp_name="bc", seed=seed, total_updates=999, started=200)
        write_run(tmp_path, (0, 0, 6), exp_name="v1.0", seed=seed, expectile=0.5)
        write_run(tmp_path, (0, 0, 6), HAMMER, exp_name="v1.0", seed=seed)
    assert rows("variant", "updates", "final") == (
        "iql 1000 9.0 ± 0.0, bc 1000 8.0 ± 0.0, bc 999 5.0 ± 0.0, v1.0 1000 6.0 ± 0.0, "
        "iql beta=1.0 1000 1.0 ± 0.0, iql beta=3.0 1000 3.0 ± 0.0, v1.0 1000 6.0 ± 0.0, bc 1000 7.0 ± 0.0, bc 1000 7.5"
    )
    assert [row["data (episodes, score)"] for row in table(tmp_path)][-2:] == [f"{PEN[1]}[:5] (25, 55.5)", "2 sets"]


def test_checkpoints_that_share_a_seed_are_told_apart(tmp_path, rows):
    """Runs that each have a seed and a checkpoint of their own are one row. One checkpoint is one number."""
    for seed in (1, 2):
        write_run(tmp_path, exp_name="own", seed=seed, checkpoint=f"/a/run{seed}/best.pt", total_updates=10)
        write_run(tmp_path, exp_name="shared", started=seed, checkpoint=f"/a/run{seed}/best.pt", online_steps=10)
        write_run(tmp_path, (4, 5), exp_name="tuned", seed=seed, checkpoint="/a/run/best.pt", online_steps=10)
    assert rows("variant", "updates", "runs", "final") == (
        "own checkpoint+10 2 2.0 ± 0.0, shared checkpoint=run1/best.pt offline checkpoint 1 1.0, "
        "shared checkpoint=run1/best.pt online checkpoint+10 1 2.0, "
        "shared checkpoint=run2/best.pt offline checkpoint 1 1.0, "
        "shared checkpoint=run2/best.pt online checkpoint+10 1 2.0, "
        "tuned offline checkpoint 1 4.0, tuned online checkpoint+10 2 5.0 ± 0.0"
    )


def test_runs_that_only_evaluate(tmp_path, rows):
    """One checkpoint is one number, whatever the seed, also with those of an earlier file; in no row over all sets."""
    tasks = (*4 * [PEN], *2 * [HAMMER], (PEN[0], "D4RL/pen/expert-v2"))
    for i, (exp_name, name, task) in enumerate(zip("iijjjjj", "abbbccd", tasks, strict=True)):
        run = {"exp_name": exp_name, "checkpoint": f"/{name}/best.pt", "total_updates": 0, "seed": i // 3, "started": i}
        write_run(tmp_path, (ord(name),), task, max_episodes=5, **run)
    hammer, expert, human = (f"only evaluated, of {task[1]}[:5]" for task in (HAMMER, tasks[-1], PEN))
    for merge in (None, tmp_path / "results.csv"):
        assert rows("data (episodes, score)", "variant", "runs", "final", "best", merge=merge) == (
            f"{hammer} j 1 99.0 99.0, {expert} j 1 100.0 100.0, {human} i checkpoint=a/best.pt 1 97.0 97.0, "
            f"{human} i checkpoint=b/best.pt 1 98.0 98.0, {human} j 1 98.0 98.0"
        )
        assert "Replaced" not in (tmp_path / "report.md").read_text()


def test_runs_without_a_row_are_named(tmp_path, rows):
    """Once; a damaged or foreign file costs no other run. Of two finished runs of one identity the newest counts."""
    runs = [write_run(tmp_path / folder, (1, 2, n), started=n).name for folder, n in (("runs", 30), ("", 40), ("", 50))]
    online = {"offline_updates": 50, "online_steps": 50}
    tuned = write_run(tmp_path, (1, 2, 3), started=5, steps=[0, 50, 99], **online)
    early, stopped, cut, *damaged = (write_run(tmp_path, seed=seed) for seed in range(2, 11))
    damaged += [write_run(tmp_path, (1.0, 2.0, 3.0), started=6, **online)]
    text, last = ((path / "evaluations.csv").read_text() for path in (cut, damaged[6]))
    (early / "evaluations.csv").unlink()
    (stopped / "evaluations.csv").write_text(text.rsplit("\n", 2)[0] + "\n")
    (cut / "evaluations.csv").write_text(text[: -len("1234\n")])
    contents = ["", '{"learning_rate": 0.1}', '["args"]', '{"args": {"dataset_id": "x", "exp_name": 1}, "dataset": 2}']
    for path, content in zip(damaged, contents, strict=False):
        (path / "args.json").write_text(content)
    for path, content in zip(
        damaged[4:], (b"\xff", text.replace("wall_", ""), last.replace(",3.0,", ",x,")), strict=True
    ):
        (path / "evaluations.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert rows("final", "runs") == "50.0 1"
    text = (tmp_path / "report.md").read_text()
    assert f"name, arguments and seed: {runs[0]} by {runs[1]}, {runs[1]} by {runs[2]}.\n" in text
    (text,) = re.findall("Not finished: (.*)[.]\n", text)
    names = re.sub(r" \(damaged: \w+Error: [^)]*\)+", "!", text).split(", ")
    unfinished = [*(f"{path.name}!" for path in damaged), *(path.name for path in (early, stopped, cut, tuned))]
    assert sorted(names) == sorted(unfinished)


def test_merge(tmp_path, rows):
    """The folder's runs go before those of the earlier file, which is said where they differ."""
    old, new = tmp_path / "old", tmp_path / "new"
    for seed, score in ((1, 10.0), (2, 20.0)):
        write_run(old, (0, 5.0, score), seed=seed)
        write_run(old, (0, 5.0, score), HAMMER, seed=seed)
    rows(folder=old)
    run = write_run(new, (0, 5.0, 26.0), seed=2)
    merged = rows("runs", "final", folder=new, merge=old / "results.csv")
    assert merged == "2 15.0 ± 5.0, 2 18.0 ± 8.0"  # none over all sets: only one run has its arguments
    text, merged = (new / "report.md").read_text(), (new / "results.csv").read_text()
    assert f"seed: results.csv by {run.name}.\n" in text and "results.csv has no arguments" in text
    rows(folder=new, merge=new / "results.csv")
    assert "Replaced" not in (new / "report.md").read_text() and (new / "results.csv").read_text() == merged
    (old / "results.csv").write_text(merged.replace("dataset_episodes", "episodes"))
    with pytest.raises(SystemExit, match="is no results.csv of this report"):
        report.main(new, old / "results.csv")


def test_figure(tmp_path, monkeypatch):
    """A curve ends in the score. Titles tell the data, and nothing is cut off."""
    drawn, long = [], ("AdroitHandPen-v1", f"own/{'long' * 22}-v0")
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: drawn.append(figure))
    for seed in (1, 2):
        write_run(tmp_path, (1, 4 * seed, 2, 9 * seed), long, seed=seed, asked=[500, 500, 666, 1000])
    report.main(tmp_path)
    (lone := drawn.pop()).draw_without_rendering()
    boxes = [part.get_window_extent() for part in (lone.legends[0], lone.axes[0].title)]
    assert min(box.x0 for box in boxes) >= 0 and max(box.x1 for box in boxes) <= lone.bbox.width
    write_run(tmp_path, (1, 3, 2), HAMMER, data={"normalized_score": 44.0})
    for n in range(8):
        write_run(tmp_path, (1, 3, 2), HAMMER, data={"episodes": 5 + (n > 0)}, exp_name=f"v{n}")
    write_run(tmp_path, (5,), PEN, checkpoint="a/best.pt", total_updates=0, started=200)
    report.main(tmp_path)
    hammer, other, many, pen = drawn[0].axes
    curves = [[list(map(float, line.get_ydata())) for line in ax.lines] for ax in (hammer, pen)]
    assert curves == [[[1, 3, 2], [44, 44], [-3.25] * 2], [[1, 6, 2, 13.5], [55.5] * 2, [-3.25] * 2]]
    assert list(pen.lines[0].get_xdata()) == [0, 333, 666, 1000] and pen.lines[0].get_marker() == "."
    area = {*map(tuple, pen.collections[0].get_paths()[0].vertices.tolist())}
    assert area == {(0, 1), (333, 4), (333, 8), (666, 2), (1000, 9), (1000, 18)}
    titles = [ax.get_title().split("\n", 1)[1] for ax in (hammer, other, pen)]
    assert titles == [f"{HAMMER[1]}, 25 episodes", f"{HAMMER[1]}, 5 episodes", f"{long[1]}, 25 episodes"]
    assert (pen.get_xlabel(), *pen.get_subplotspec().get_geometry()[:2]) == ("global_step", 2, 2)
    labels = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert labels[:3] == ["iql, 1000 updates", "mean of the dataset", "random policy"]
    assert labels[-1] == "iql, 500@333->666->1000 updates, mean and range of the seeds"
    assert len({(line.get_color(), line.get_linestyle()) for line in many.lines[:7]}) == 7


def test_command(tmp_path):
    """In a folder with blanks and brackets. Without finished runs it says so; when nobody reads any more, nothing."""
    (folder := tmp_path / "my [1] runs").mkdir()
    call, (read, unread) = [sys.executable, SCRIPT, folder], os.pipe()
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "holds no finished run" in done.stderr
    write_run(folder)
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == 0 and (folder / "report.md").read_text() in done.stdout, done.stderr
    assert {path.name for path in folder.iterdir() if path.is_file()} == {"report.md", "results.csv", "figure.png"}
    os.close(read)
    assert subprocess.run(call, stdout=unread, stderr=subprocess.PIPE).stderr == b""
