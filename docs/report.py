"""Table, results.csv and learning curves of the finished runs in a folder: python docs/report.py runs"""

import csv
import json
import signal
import sys
from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

# arguments that do not tell apart what is learned, or are told otherwise
SAME = """seed exp_name torch_deterministic cuda cudagraphs track wandb_project_name wandb_entity capture_video resume
checkpoint env_id dataset_id max_episodes total_updates offline_updates online_steps eval_envs""".split()
NUMBERS = ("final", "best", "success_rate", "regret", "wall_seconds", "random_score", "dataset_score")
COLUMNS = (*"environment data variant seed run script checkpoint updates unit".split(), *NUMBERS, "dataset_episodes")
SET = ("environment", "data", "dataset_episodes", "dataset_score", "unit")  # an id alone may name unlike data
HEAD = "environment|data (episodes, score)|variant|updates|runs|final|IQM of final|best|success".split("|")
NOTES = """
Scores are normalized as in D4RL: 0 is its random policy, 100 its expert. Environments without such a reference have
plain returns, and say so. Final is the last evaluation, best the best of a run, ± the standard deviation over seeds
(divisor n). IQM is the mean of the middle half of the runs, with the 95% interval of 10,000 stratified bootstrap
samples (Agarwal et al. 2021). "all" needs as many runs of each set. a+b updates are a offline and those of b online
steps; a->b were a at first and then lengthened to b (a@c->b after c of them), whose cosine the learning rate followed
from there on. data[:n] are the first n episodes. A checkpoint is evaluated once, whatever the seed. script= is the
checksum of the code. Single runs are in results.csv, published scores in docs/results.md.
"""
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito's, for all eyes


def key(item, names):
    """Its values of `names` as text, without the digits in which machines differ."""
    return tuple(f"{item[name]:.6g}" if isinstance(item[name], float) else str(item[name]) for name in names)


def group(items, *names):
    """The items in lists, by their values of `names`."""
    groups = {}
    for item in items:
        groups.setdefault(key(item, names), []).append(item)
    return groups


def read_run(path):
    """A result for each phase of the run that args.json at `path` is of. What is not finished has no scores."""
    run, table = json.loads(path.read_text(encoding="utf-8")), path.with_name("evaluations.csv")
    rows = list(csv.DictReader(table.read_text(encoding="utf-8").splitlines() if table.exists() else []))
    rows = [row for row in rows if row["wall_seconds"]]  # not one that was cut
    args, data = run["args"], run["args"]["dataset_id"]
    label = args["exp_name"].removesuffix("." + data.replace("/", "."))
    data += f"[:{args['max_episodes']}]" if args["max_episodes"] else ""
    data = data if "dataset" in run else f"only evaluated, of {data}"  # trained nothing: the data are its checkpoint's
    common = {"environment": args["env_id"], "data": data, "seed": str(args["seed"]), "run": path.parent.name}
    common |= {"checkpoint": "/".join(Path(args["checkpoint"] or "").parts[-2:]), "script": run.get("script", "")}
    common["args"] = {name: value for name, value in args.items() if name not in SAME}
    offline = args.get("offline_updates", 0)
    total = offline + args.get("online_steps", args.get("total_updates"))
    # fine-tuning has its cosine online; a row tells what length it was asked for
    later = [row for row in rows if row.get("online_steps") != "0"]
    asked = {int(row.get("total_steps") or row.get("total_updates") or total): row["global_step"] for row in later}
    lengths = [f"{n - offline}" + f"@{int(at) - offline}" * (at != str(n)) for n, at in asked.items()]
    updates = f"{(begin := 'checkpoint' if args['checkpoint'] else str(offline))}+{'->'.join(lengths)}"
    phases = [("", updates.removeprefix("0+"), rows)]
    if "online_steps" in args:
        phases = [(" offline", begin, [row for row in rows if row not in later]), (" online", updates, later)]
    last = rows[-1] if rows else {}
    done = last.get("global_step") == str(total)
    unit = "normalized" if last.get("normalized_score") else "return"
    score, dataset = "normalized_score" if unit == "normalized" else "episodic_return", run.get("dataset", {})
    common |= {f"{name}_score": float(run.get(name, {}).get(score, "nan")) for name in ("random", "dataset")}
    common |= {"unit": unit, "dataset_episodes": str(dataset.get("episodes", ""))}
    for phase, updates, rows in phases:
        result = common | {"variant": label, "phase": phase, "updates": updates}
        if done and rows:
            steps, scores = ([float(row[name]) for row in rows] for name in ("global_step", score))
            result |= {"curve": (steps, scores), "final": scores[-1], "best": max(scores)}
            result |= {name: float(rows[-1].get(name) or "nan") for name in ("success_rate", "regret", "wall_seconds")}
        if rows if done else phase != " offline":
            yield result


def name_variants(results):
    """What tells runs of one name apart becomes a part of it: arguments, and checkpoints unless each has its seed."""
    for same in group(results, *SET, "variant", "phase", "updates").values():
        names = dict.fromkeys(name for row in same for name in row["args"])
        names = [name for name in names if len({str(row["args"].get(name)) for row in same}) > 1]
        for row in same:
            row["variant"] = " ".join([row["variant"], *(f"{name}={row['args'].get(name)}" for name in names)])
    for same in group(results, *SET, "variant", "phase", "updates").values():
        shared = len(group(same, "seed", "checkpoint")) > len(group(same, "seed"))
        for row in same:
            row["variant"] += (f" checkpoint={row['checkpoint']}" if shared else "") + row["phase"]
    return results


def collect(folder, earlier):
    """The newest result of each identity in order, and a text on the other runs."""
    found, merged, results, replaced, unfinished = [], [], {}, {}, []
    paths = [*folder.glob("*/args.json"), *folder.glob("runs/*/args.json")]
    for path in sorted(paths, key=lambda path: path.parent.name.split("__")[-1]):
        try:
            found += list(read_run(path))
        except (OSError, ValueError, LookupError, TypeError, AttributeError, csv.Error) as error:  # not the scripts'
            unfinished.append(f"{path.parent.name} (damaged: {type(error).__name__}: {error})")
    if earlier:
        try:
            for row in csv.DictReader(earlier.read_text(encoding="utf-8").splitlines()):
                row = {name: row[name] for name in COLUMNS} | {name: float(row[name]) for name in NUMBERS}
                merged.append(
                    row | {"variant": row["variant"].split(" script=")[0], "from": earlier.name, "args": None}
                )
        except (OSError, ValueError, LookupError, TypeError, csv.Error) as error:
            sys.exit(f"{earlier} is no results.csv of this report ({type(error).__name__}: {error}).")
    for row in merged + [row for row in name_variants(found) if "final" in row]:
        alone = row["updates"] in ("checkpoint", "checkpoint+0")  # the seed of an evaluation changes nothing
        identity = key(row, (*SET, "variant", "updates", "script", "checkpoint" if alone else "seed"))
        old = results.get(identity, row)
        if any(str(old[name]) != str(row[name]) for name in {*COLUMNS} - {"wall_seconds", "run", "seed"}):
            replaced[f"{old.get('from', old['run'])} by {row['run']}"] = True
        results[identity] = row
    for same in group(results.values(), *SET, "variant", "updates").values():
        for row in same if len(group(same, "script")) > 1 else []:
            row["variant"] += f" script={row['script'] or 'unknown'}"
    unfinished += [row["run"] for row in found if "final" not in row]
    others = {"Replaced by another run of the same name, arguments and seed": replaced, "Not finished": unfinished}
    text = "".join(f"\n{head}: {', '.join(names)}.\n" for head, names in others.items() if names)
    text += f"\n{earlier.name} has no arguments: its variants are told apart by their names.\n" if merged else ""
    order = sorted(results, key=lambda k: (k[: len(SET)], k[-4][:3] != "iql", k[-4:-1], k[-1].zfill(9)))
    return [results[identity] for identity in order], text


def iqm(strata):
    """Mean of the middle half of all runs, and its 95% interval when each stratum's runs are drawn 10,000 times."""
    rng, means = np.random.default_rng(0), []
    drawn = [scores[rng.integers(len(scores), size=(10_000, len(scores)))] for scores in strata]
    for scores in (np.concatenate(strata), np.concatenate(drawn, 1)):
        cut = scores.shape[-1] // 4
        means.append(np.sort(scores)[..., cut : scores.shape[-1] - cut].mean(-1))
    return "{:z.1f} [{:z.1f}, {:z.1f}]".format(means[0], *np.percentile(means[1], (2.5, 97.5)))


def make_table(results):
    """The table in Markdown, without columns that would be empty."""
    entries, lines, columns = [], [HEAD], []
    for (environment, data, episodes, _, unit, *_), rows in group(results, *SET, "variant", "updates").items():
        found = f"{data} ({episodes}, {rows[0]['dataset_score']:z.1f})".replace(" (, nan)", "")
        entries.append((environment + (" (returns)" if unit == "return" else ""), found, [rows]))
    comparable = [row for row in results if row["unit"] == "normalized" and row["dataset_episodes"] and row["args"]]
    for rows in group(comparable, "variant", "updates", "args", "script").values():
        strata = list(group(rows, *SET).values())
        entries += [("all", f"{len(strata)} sets", strata)] if len(strata) > 1 == len({*map(len, strata)}) else []
    for environment, data, strata in entries:
        rows = [row for stratum in strata for row in stratum]
        finals = [np.array([row["final"] for row in stratum]) for stratum in strata]
        final, best, success = (np.mean([row[name] for row in rows]) for name in ("final", "best", "success_rate"))
        spread = f" ± {finals[0].std():.1f}" if len(rows) > len(strata) == 1 else ""
        cells = [environment, data, rows[0]["variant"], rows[0]["updates"], str(len(rows)), f"{final:z.1f}{spread}"]
        cells += [iqm(finals) if len(rows) > len(strata) else "", f"{best:z.1f}", f"{success:.2f}".replace("nan", "")]
        lines.append(cells)
    for head, *cells in zip(*lines, strict=True):
        if any(cells):
            width = max(map(len, (head, *cells)))
            columns.append([cell.ljust(width) for cell in (head, "-" * width, *cells)])
    return "".join(f"| {' | '.join(line)} |\n" for line in zip(*columns, strict=True))


def draw(results, path):
    """Learning curves, if there are any: a panel for each environment and dataset."""
    results = [row for row in results if "curve" in row and row["dataset_episodes"]]
    panels, legend, styles = group(results, *SET), {}, {}
    if not panels:
        return
    lines = -(-len(panels) // (columns := {1: 1, 2: 2, 4: 2}.get(len(panels), 3)))
    figure = Figure(figsize=(max(8, 1 + 3.5 * columns), 1.5 + 2.7 * lines), layout="constrained", dpi=150)
    for i, ((environment, data, episodes, _, unit), panel) in enumerate(panels.items()):
        ax = figure.add_subplot(lines, columns, i + 1)
        for (variant, updates), rows in group(panel, "variant", "updates").items():
            name = f"{variant}, {updates} updates"
            color, style = styles.setdefault(name, (COLORS[len(styles) % 6], ("-", "-.", ":")[len(styles) // 6 % 3]))
            name += ", mean and range of the seeds" if len(rows) > 1 else ""
            steps = rows[0]["curve"][0]
            scores = np.array([np.interp(steps, *row["curve"]) for row in rows])
            ax.fill_between(steps, scores.min(0), scores.max(0), color=color, alpha=0.2, linewidth=0)
            (legend[name],) = ax.plot(steps, scores.mean(0), style, color=color, marker=".")
        legend["mean of the dataset"] = ax.axhline(panel[0]["dataset_score"], color="black", linestyle="--")
        legend["random policy"] = ax.axhline(panel[0]["random_score"], color="gray", linestyle=":")
        ax.set_title(f"{environment}\n{data}, {episodes} episodes", fontsize="medium", wrap=True)
        ax.set(xlabel="global_step", ylabel=f"score ({unit})")
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
        ax.grid(alpha=0.3)
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=1 + columns // 3, frameon=False)
    figure.savefig(path)


def main(folder: tyro.conf.Positional[Path], merge: Path | None = None):
    """Write report.md, results.csv and figure.png of a folder's runs; --merge adds those of an earlier results.csv."""
    results, others = collect(folder, merge)
    if not results:
        sys.exit(f"{folder} holds no finished run, so there is no report.{others}")
    with open(folder / "results.csv", "w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *([row[name] for name in COLUMNS] for row in results)])
    text = make_table(results) + others + NOTES
    (folder / "report.md").write_text(text, encoding="utf-8")
    draw(results, folder / "figure.png")
    sys.stdout.reconfigure(encoding="utf-8")
    print(f"{text}\nThis is {folder / 'report.md'}; results.csv and, if there are curves, figure.png are beside it.")


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):  # a closed pipe ends it quietly
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    tyro.cli(main)
