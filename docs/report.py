"""Table, results.csv and learning curves of the finished runs in a folder: python docs/report.py runs"""

import csv
import json
import sys
from pathlib import Path
from typing import Optional

import matplotlib
import numpy as np
import tyro
from matplotlib.ticker import EngFormatter
from tyro.conf import Positional

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# IQL's scores elsewhere, by data and phase: CORL's final and best, the paper's
PUBLISHED = {
    ("D4RL/pen/human-v2", ""): ("78.49 ± 8.21, 106.15 ± 10.28", "71.5"),
    ("D4RL/pen/cloned-v2", ""): ("83.42 ± 8.19, 114.05 ± 4.78", "37.3"),
    ("D4RL/pen/expert-v2", ""): ("128.05 ± 9.21, 140.01 ± 6.36", ""),
    ("D4RL/hammer/human-v2", ""): ("1.79 ± 0.80, 6.86 ± 2.38", "1.4"),
    ("D4RL/hammer/cloned-v2", ""): ("1.50 ± 0.69, 11.63 ± 1.70", "2.1"),
    ("D4RL/hammer/expert-v2", ""): ("128.68 ± 0.33, 129.76 ± 0.37", ""),
    ("D4RL/pen/cloned-v2", "offline"): ("84.19 ± 3.96", ""),
    ("D4RL/pen/cloned-v2", "online"): ("102.02 ± 20.75", ""),
    ("D4RL/hammer/cloned-v2", "offline"): ("1.35 ± 0.32", ""),
    ("D4RL/hammer/cloned-v2", "online"): ("57.27 ± 28.49", ""),
}
PUBLISHED_UPDATES = {"": "1000000", "offline": "1000000", "online": "1000000+1000000"}
IQL = ("iql", "iql_continuous", "iql_finetune")  # labels that stand for the published algorithm
# arguments that do not tell apart what is learned, or are told otherwise
SAME = """seed exp_name torch_deterministic cuda cudagraphs compile track wandb_project_name wandb_entity capture_video
checkpoint resume env_id dataset_id max_episodes total_updates offline_updates online_steps updates_per_step
eval_envs""".split()
IDENTITY = ("environment", "data", "variant", "seed", "updates")
NUMBERS = ("final", "best", "success_rate", "wall_seconds", "random_score", "dataset_score")
COLUMNS = (*IDENTITY, "unit", *NUMBERS, "dataset_episodes")
HEAD = "environment|data|variant|updates|runs|unit|final|final IQM|best|best IQM|success|minutes|random policy|"
HEAD += "IQL in CORL|IQL's paper"
NOTES = """
Scores are normalized as in D4RL: 0 is its random policy, 100 its expert. Where an environment has no such reference
they are plain returns (see unit). Final is the last evaluation, best the best of a run. The last one has more episodes
than the others, so a curve may bend at its end. ± is the standard deviation over seeds (divisor n). IQM is the mean of
the middle half of the runs, with the 95% interval of 10,000 stratified bootstrap samples of the runs (Agarwal et al.
2021). Minutes are a run's wall time. a+b updates are a offline and those of b online steps.

Data are the Minari ids that the runs read, with the number and the mean score of the episodes found there; [:n] means
the first n episodes. Published numbers stand only beside published sets and as many updates: CORL's final, best (v1
sets, 4 seeds, 1M updates and, if online, 1M steps) are from the README of github.com/corl-team/CORL, the paper's
(arXiv:2110.06169, v0 sets) as later papers quote them.
"""
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito's, for all eyes


def read_folder(folder):
    """The run directories of a folder, the oldest first: their arguments, what was measured and their evaluations."""
    runs = []
    for path in [*folder.glob("*/args.json"), *folder.glob("runs/*/args.json")]:
        run, rows = json.loads(path.read_text()), []
        if (path.parent / "evaluations.csv").exists():
            with open(path.parent / "evaluations.csv", newline="") as file:
                rows = list(csv.DictReader(file))
        args = run["args"]
        first, checkpoint, per_step = (args.get(name) for name in ("max_episodes", "checkpoint", "updates_per_step"))
        run |= {"environment": args["env_id"], "seed": str(args["seed"]), "variant": args["exp_name"].split(".")[0]}
        run |= {"data": (args.get("dataset_id") or "") + (f"[:{first}]" if first else "")}
        if "total_updates" in args:
            total = args["total_updates"]
            updates = {"": f"checkpoint+{total}" if checkpoint else f"{total}"}
        else:
            total = (0 if checkpoint else args["offline_updates"]) + args["online_steps"] * per_step
            updates = {"offline": "checkpoint" if checkpoint else f"{args['offline_updates']}"}
            updates["online"] = f"{updates['offline']}+{args['online_steps']}" + f"*{per_step}" * (per_step > 1)
        done = bool(rows) and rows[-1]["global_step"] == str(total) and bool(rows[-1]["wall_seconds"])
        runs.append(run | {"rows": rows, "updates": updates, "done": done, "started": path.parent.name.split("__")[-1]})
    return sorted(runs, key=lambda run: run["started"])


def name_variants(runs):
    """Where runs of one name had different arguments, these become a part of the name."""
    groups = {}
    for run in runs:
        key = (run["environment"], run["data"], run["variant"], *run["updates"].values())
        groups.setdefault(key, []).append(run)
    for group in groups.values():
        names = [name for name in group[0]["args"] if name not in SAME]
        names = [name for name in names if len({str(run["args"].get(name)) for run in group}) > 1]
        if group[0]["args"].get("beta") == 0 and group[0]["variant"] in IQL and "beta" not in names:
            names.append("beta")  # behaviour cloning
        for run in group:
            run["variant"] = " ".join([run["variant"], *(f"{name}={run['args'].get(name)}" for name in names)])


def summarize(run):
    """The rows of results.csv for a finished run: one, or one for each phase. They have their curve too."""
    unit, score = ("normalized", "normalized_score") if run["rows"][-1]["normalized_score"] else ("return", None)
    measured = {f"{name}_score": run.get(name, {}).get(score or "episodic_return") for name in ("random", "dataset")}
    for phase, updates in run["updates"].items():
        phases = {None: "", "0": "offline"}
        rows = [row for row in run["rows"] if phases.get(row.get("online_steps"), "online") == phase]
        if not rows:  # a checkpoint's fine-tuning has no offline phase
            continue
        steps = [float(row["global_step"]) for row in rows]
        scores = [float(row[score or "episodic_return"]) for row in rows]
        result = {name: run[name] for name in IDENTITY} | {"variant": f"{run['variant']} {phase}".strip()}
        result |= {"updates": updates, "unit": unit, "final": scores[-1], "best": max(scores), "curve": (steps, scores)}
        result |= {name: float(rows[-1][name] or "nan") for name in ("success_rate", "wall_seconds")}
        result |= {name: float("nan" if value is None else value) for name, value in measured.items()}
        yield result | {"dataset_episodes": str(run.get("dataset", {}).get("episodes", "?"))}


def read_csv(path):
    """Runs of an earlier results.csv, which have no curve."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    if any(tuple(row) != COLUMNS for row in rows):
        sys.exit(f"{path} is no results.csv of this report: its columns must be {','.join(COLUMNS)}.")
    return [row | {name: float(row[name]) for name in NUMBERS} for row in rows]


def collect(folder, earlier):
    """All results, and the number of runs that are not finished. Of two with one identity the last counts."""
    runs = read_folder(folder)
    name_variants(runs)
    results = read_csv(earlier) if earlier else []
    results += [result for run in runs if run["done"] for result in summarize(run)]
    results = {tuple(result[name] for name in IDENTITY): result for result in results}
    left = set()
    for run in runs:
        phase, updates = list(run["updates"].items())[-1]
        left.add((run["environment"], run["data"], f"{run['variant']} {phase}".strip(), run["seed"], updates))
    order = sorted(results, key=lambda key: (*key[:2], key[2][:3] != "iql", key[2], key[4], int(key[3])))
    return [results[key] for key in order], len(left - set(results))


def iqm(scores):
    """Mean of the middle half along the last axis, as scipy.stats.trim_mean(scores, 0.25)."""
    cut = scores.shape[-1] // 4
    return np.sort(scores)[..., cut : scores.shape[-1] - cut].mean(-1)


def interval(strata):
    """95% percentile interval of the IQM over all runs when each stratum's runs are drawn anew, 10,000 times."""
    rng = np.random.default_rng(0)
    samples = [scores[rng.integers(len(scores), size=(10_000, len(scores)))] for scores in strata]
    return np.percentile(iqm(np.concatenate(samples, 1)), (2.5, 97.5))


def table_row(strata, environment, data, random="", published=("", "")):
    """A line of the table for lists of runs: one list, of several seeds, or one for each dataset."""
    runs = [run for stratum in strata for run in stratum]
    cells = [environment, data, runs[0]["variant"], runs[0]["updates"], str(len(runs)), runs[0]["unit"]]
    for name, digits in (("final", 1), ("best", 1), ("success_rate", 2)):
        values = [np.array([run[name] for run in stratum]) for stratum in strata]
        pooled = np.concatenate(values)
        cells.append(f"{pooled.mean():.{digits}f}" + (f" ± {pooled.std():.{digits}f}" if len(strata) == 1 else ""))
        if name != "success_rate":
            cells.append("{:.1f} [{:.1f}, {:.1f}]".format(iqm(pooled), *interval(values)))
    cells += [f"{np.mean([run['wall_seconds'] for run in runs]) / 60:.1f}", random, *published]
    return ("| " + " | ".join(cells) + " |\n").replace("nan ± nan", "").replace("nan", "")


def make_table(groups, unfinished):
    """The report in Markdown."""
    text, pools = f"| {HEAD.replace('|', ' | ')} |\n{'|---' * (HEAD.count('|') + 1)}|\n", {}
    for (environment, data, variant, updates, unit), runs in groups.items():
        found = f"{data} ({runs[0]['dataset_episodes']} episodes, {runs[0]['dataset_score']:.1f})"
        label, _, phase = variant.partition(" ")
        comparable = label in IQL and updates == PUBLISHED_UPDATES.get(phase) and unit == "normalized"
        published = PUBLISHED.get((data, phase), ("", "")) if comparable else ("", "")
        text += table_row([runs], environment, found, f"{runs[0]['random_score']:.1f}", published)
        if unit == "normalized":
            pools.setdefault((variant, updates), []).append(runs)
    text += "".join(table_row(strata, "all", f"{len(strata)} sets") for strata in pools.values() if len(strata) > 1)
    return text + (f"\n{unfinished} more runs are not finished.\n" if unfinished else "") + NOTES


def draw(groups, path):
    """Learning curves, if there are any: a row of panels for each environment, a panel for each of its datasets."""
    panels, legend, colors = {}, {}, {}
    for (environment, data, variant, updates, unit), runs in groups.items():
        if runs := [run for run in runs if "curve" in run]:
            panels.setdefault(environment, {}).setdefault((data, unit), {})[f"{variant}, {updates} updates"] = runs
    if not panels:
        return
    columns = max(map(len, panels.values()))
    size = (max(6, 1 + 3.5 * columns), 1 + 2.7 * len(panels))
    figure, axes = plt.subplots(len(panels), columns, figsize=size, squeeze=False, layout="constrained", dpi=150)
    for row, (environment, datasets) in zip(axes, panels.items(), strict=True):
        for ax in row[len(datasets) :]:
            ax.axis("off")
        for ax, ((data, unit), variants) in zip(row, datasets.items(), strict=False):
            for name, runs in variants.items():
                color = colors.setdefault(name, COLORS[len(colors) % len(COLORS)])
                steps = runs[0]["curve"][0]
                scores = np.array([np.interp(steps, *run["curve"]) for run in runs])
                ax.fill_between(steps, scores.min(0), scores.max(0), color=color, alpha=0.2, linewidth=0)
                (legend[f"{name}, mean and range of the seeds"],) = ax.plot(steps, scores.mean(0), color=color)
            legend["mean of the dataset"] = ax.axhline(runs[0]["dataset_score"], color="black", linestyle="--")
            legend["random policy"] = ax.axhline(runs[0]["random_score"], color="gray", linestyle=":")
            ax.set(title=f"{environment}\n{data}", xlabel="updates")
            ax.set(ylabel="normalized score" if unit == "normalized" else "return")
            ax.xaxis.set_major_formatter(EngFormatter(sep=""))
            ax.grid(alpha=0.3)
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path)


def main(folder: Positional[Path], out: Optional[Path] = None, merge: Optional[Path] = None):
    """Table, results.csv and learning curves of the finished runs in a folder.

    Args:
        folder: where the run directories are, or a folder `runs` with them
        out: where report.md, results.csv and figure.png go (default: the folder)
        merge: an earlier results.csv, whose runs count too if the folder does not have them
    """
    out = out or folder
    results, unfinished = collect(folder, merge)
    if not results:
        sys.exit(f"{folder} holds no finished run, so there is no report ({unfinished} are not finished).")
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(results)
    groups = {}
    for result in results:
        key = tuple(result[name] for name in ("environment", "data", "variant", "updates", "unit"))
        groups.setdefault(key, []).append(result)
    table = make_table(groups, unfinished)
    (out / "report.md").write_text(table, encoding="utf-8")
    draw(groups, out / "figure.png")
    sys.stdout.reconfigure(encoding="utf-8")
    print(f"{table}\nThis is {out / 'report.md'}; results.csv and, if there are curves, figure.png are beside it.")


if __name__ == "__main__":
    tyro.cli(main)
