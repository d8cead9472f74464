#!/usr/bin/env bash
# Runs seeds of iql_continuous.py (or iql_finetune.py) over tasks and datasets and ends with a table and a figure.
set -uo pipefail

usage() {
    cat << 'EOF'
Usage: [VARIABLE=value ...] bash benchmark.sh [--report | --help]

Runs what is not finished yet, then writes report.md, results.csv and figure.png into OUT. Run again, it skips finished
runs and resumes interrupted ones. --report only collects what is there.

What is run
  TASKS            Adroit environments (default: AdroitHandPen-v1 AdroitHandHammer-v1)
  DATASETS         short names (human means D4RL/{task}/human-v2) or Minari ids, where {task} becomes pen, hammer, ...
                   (default: human cloned expert)
  VARIANTS         labels, each with the flags that make it, separated by semicolons; "iql; bc --beta 0" sets IQL next
                   to behaviour cloning. Published numbers are put beside the label iql (default: iql)
  SEEDS            the seeds themselves, not how many (default: 1 2 3 4 5)
  UPDATES          offline updates of a run (default: 1000000)
  FINETUNE         1 runs iql_finetune.py: UPDATES offline, then ONLINE_STEPS online (default: 0)
  ONLINE_STEPS     environment steps of the online part (default: 1000000)
  EXTRA            more flags for all runs, such as --eval-frequency 1000; paths in flags must be absolute
  OUT              folder for all that is written (default: runs/benchmark, with FINETUNE=1 runs/benchmark_finetune)
  PYTHON           the Python that has requirements.txt (default: python)

Where it is run
  ENGINE           local: on this machine; slurm: as a job array, collect with --report afterwards (default: local)
  WORKERS_PER_GPU  runs that share a GPU; GPUs are those of CUDA_VISIBLE_DEVICES or, if it is unset, all (default: 4)
  WORKERS          runs at a time where there is no GPU (default: one a core)
  GPUS, CPUS       with ENGINE=slurm: GPUs (default: 1, 0 for none) and cores (default: 4) of a job of the array, which
                   takes on WORKERS_PER_GPU runs a GPU or, without GPUs, one a core
  PARTITION, TIME_LIMIT, SBATCH_FLAGS
                   with ENGINE=slurm: partition, time limit of a job and more flags for sbatch (default: none)
EOF
}

die() {
    echo "benchmark.sh: $*" >&2
    exit 2
}

# ---- settings -------------------------------------------------------------------------------------------------------

mode=${1:-run} # --task is for the jobs of the array
case $mode in
    -h | --help) usage && exit ;;
    run | --report | --task) (($# <= 1)) || die "only one option is understood, see --help." ;;
    *) die "$mode is not an option, see --help." ;;
esac
((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || die "bash $BASH_VERSION is too old, use 4.4 or newer."

: "${FINETUNE:=0}" "${ENGINE:=local}" "${PYTHON:=python}"
[[ $FINETUNE == [01] ]] || die "FINETUNE must be 0 or 1, not '$FINETUNE'."
[[ $ENGINE == local || $ENGINE == slurm ]] || die "ENGINE must be local or slurm, not '$ENGINE'."

integer() { # NAME DEFAULT MINIMUM
    local value=${!1:-$2}
    if ! [[ $value =~ ^(0|[1-9][0-9]{0,11})$ ]] || ((value < $3)); then
        die "$1 must be a whole number of at least $3, not '$value'."
    fi
    printf -v "$1" %s "$value"
}
cores=${SLURM_CPUS_PER_TASK:-$(env -u OMP_NUM_THREADS nproc)} # nproc believes OMP_NUM_THREADS
integer UPDATES 1000000 1
integer ONLINE_STEPS 1000000 1
integer WORKERS_PER_GPU 4 1
integer WORKERS "$cores" 1
integer GPUS 1 0
integer CPUS 4 1

for tool in "$PYTHON" setsid flock; do
    command -v "$tool" > /dev/null || die "$tool is not on the PATH: install it or, for Python, set PYTHON."
done
PYTHON=$(realpath -s "$(command -v "$PYTHON")")
"$PYTHON" -c 'import sys; from importlib.util import find_spec
sys.exit(not all(map(find_spec, ("torch", "minari", "matplotlib"))))' ||
    die "$PYTHON lacks torch, minari or matplotlib: run \`$PYTHON -m pip install -r requirements.txt\`."

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if ((FINETUNE)); then : "${OUT:=runs/benchmark_finetune}"; else : "${OUT:=runs/benchmark}"; fi
if ! mkdir -p "$OUT/logs" "$OUT/runs" || [[ ! -w $OUT/logs || ! -w $OUT/runs ]]; then
    die "$OUT cannot be written, choose another folder with OUT."
fi
# the scripts are started in OUT, where they write: no path may be relative to the folder this was called in
OUT=$(realpath "$OUT")
[[ -z ${MINARI_DATASETS_PATH:-} ]] || MINARI_DATASETS_PATH=$(realpath -m "$MINARI_DATASETS_PATH")

# ---- the runs -------------------------------------------------------------------------------------------------------

# A run is called ENV__LABEL.DATASET__SEED, with dots for the slashes of the dataset's id. OUT/logs/NAME.log starts with
# its command, OUT/runs/NAME__STARTED is its directory, the newest if there are several.
names=()
declare -A command # by name: script and flags, the seed last

list_runs() {
    local tasks datasets variants seeds extra script env task dataset variant flags label seed name
    read -rd "" -a tasks <<< "${TASKS-AdroitHandPen-v1 AdroitHandHammer-v1}"
    read -rd "" -a datasets <<< "${DATASETS-human cloned expert}"
    variants=${VARIANTS-iql}
    IFS=';' read -ra variants <<< "${variants//$'\n'/ }"
    read -rd "" -a seeds <<< "${SEEDS-1 2 3 4 5}"
    read -rd "" -a extra <<< "${EXTRA-}"
    script="iql_continuous.py --total-updates $UPDATES"
    ((!FINETUNE)) || script="iql_finetune.py --offline-updates $UPDATES --online-steps $ONLINE_STEPS"
    [[ -f $here/${script%% *} ]] || die "$here/${script%% *} does not exist: benchmark.sh must stand beside it."
    for env in "${tasks[@]}"; do
        [[ $env =~ ^AdroitHand(Pen|Hammer|Door|Relocate)(Dense)?-v[0-9]+$ ]] ||
            die "TASKS must be Adroit tasks with dense rewards, such as AdroitHandPen-v1, not '$env'."
        task=${BASH_REMATCH[1],,}
        for dataset in "${datasets[@]}"; do
            [[ $dataset == */* ]] || dataset="D4RL/{task}/$dataset-v2"
            dataset=${dataset//'{task}'/$task}
            [[ $dataset =~ ^[A-Za-z0-9_/-]+-v[0-9]+$ ]] ||
                die "DATASETS must be short names or Minari ids that end in a version (-v2), not '$dataset'."
            for variant in "${variants[@]}"; do
                read -r label flags <<< "$variant"
                [[ $label =~ ^[A-Za-z0-9][A-Za-z0-9-]*$ ]] ||
                    die "VARIANTS must start with a label of letters, digits and hyphens, not '$label'."
                for seed in "${seeds[@]}"; do
                    [[ $seed =~ ^(0|[1-9][0-9]{0,9})$ ]] || die "SEEDS must be whole numbers, not '$seed'."
                    name=${env}__$label.${dataset//\//.}__$seed
                    [[ -z ${command[$name]:-} ]] || die "$name would run twice: name everything only once."
                    names+=("$name")
                    command[$name]="$script --env-id $env --dataset-id $dataset --exp-name $label.${dataset//\//.}"
                    command[$name]+=" ${extra[*]} $flags --seed $seed"
                done
            done
        done
    done
    ((${#names[@]})) || die "there is nothing to run: TASKS, DATASETS, VARIANTS or SEEDS is empty."
}

# Note the commands in the logs. What OUT holds under the same label must have been run with the same flags.
note_commands() {
    local name log first
    for name in "${names[@]}"; do
        for log in "$OUT/logs/${name%__*}"__*.log; do
            [[ -s $log ]] || continue
            IFS= read -r first < "$log"
            [[ ${first% *} == "command: ${command[$name]% *}" ]] ||
                die "$log was run with other flags than now: set OUT to another folder, or another label in VARIANTS."
        done
        log=$OUT/logs/$name.log
        [[ -s $log ]] || echo "command: ${command[$name]}" > "$log" || die "$log cannot be written: make room."
    done
}

newest() { # NAME: sets run_dir
    local found=("$OUT/runs/$1"__*)
    run_dir=${found[-1]}
}

finished() { # NAME
    newest "$1"
    [[ -f $run_dir/evaluations.csv ]] && grep -q '^final: ' "$OUT/logs/$1.log"
}

# Datasets that are not there yet, each once: runs that start together would download over one another.
download() { # NAME...
    local name dataset minari=${MINARI_DATASETS_PATH:-$HOME/.minari/datasets}
    local -A wanted
    for name in "$@"; do
        dataset=${name#*.}
        dataset=${dataset%__*}
        dataset=${dataset//./\/}
        [[ -d $here/tests/datasets/$dataset/data || -d $minari/$dataset/data ]] || wanted[$dataset]=${name%%__*}
    done
    for dataset in "${!wanted[@]}"; do
        ((!${stop:-0})) || return
        (cd "$here" && "$PYTHON" -c 'import sys; from iql_continuous import find_dataset; find_dataset(*sys.argv[1:])' \
            "${wanted[$dataset]}" "$dataset") || echo "Its runs will fail, the others go on." >&2
    done
}

# ---- on this machine ------------------------------------------------------------------------------------------------

start() { # NAME GPU: in the background, in a session of its own that Ctrl-C does not reach; sets pid
    local words log=$OUT/logs/$1.log
    read -ra words <<< "${command[$1]}"
    newest "$1"
    if [[ -f $run_dir/checkpoint.pt ]]; then
        words=("${words[0]}" --resume "runs/${run_dir##*/}")
    else
        words=("${words[0]}" --eval-envs "$eval_envs" "${words[@]:1}")
    fi
    (
        exec 9>> "$log"
        # the run inherits the lock: a second benchmark.sh cannot start it again, even if this one is killed
        flock --nonblock --conflict-exit-code 75 9 || (($? != 75)) ||
            die "$1 is being run by another process, wait for it."
        cd "$OUT" || exit
        exec env CUDA_VISIBLE_DEVICES="$2" OMP_NUM_THREADS="$threads" PYTHONUNBUFFERED=1 TQDM_DISABLE=1 \
            setsid "$PYTHON" "$here/${words[0]}" "${words[@]:1}" < /dev/null >&9 2>&1
    ) &
    pid=$!
}

# shellcheck disable=SC2317 # traps call it
interrupt() { # STATUS: the first time runs may checkpoint, the second time they and all their processes are killed
    local pid
    for pid in "${pids[@]}"; do
        if ((stop)); then kill -KILL -- "-$pid" "$pid"; else kill -"$gentle" "$pid"; fi
    done 2> /dev/null
    ((stop)) || echo "stopping ${#pids[@]} runs, they checkpoint first; once more kills them." >&2
    stop=$1
}

clock() { # SECONDS
    printf '%d:%02d:%02d' $(($1 / 3600)) $(($1 / 60 % 60)) $(($1 % 60))
}

# Prints where all stands; the time left comes from the steps that the evaluations.csv have reached.
progress() { # NAME...
    local name files=() steps total gained left=""
    for name in "$@"; do
        newest "$name"
        [[ ! -f $run_dir/evaluations.csv ]] || files+=("$run_dir/evaluations.csv")
    done
    steps=$(tail -qn 1 "${files[@]}" < /dev/null | awk -F, '{ steps += $1 } END { printf "%.0f", steps }')
    total=$((($# - failed) * (UPDATES + FINETUNE * ONLINE_STEPS)))
    : "${steps_before:=$steps}"
    gained=$((steps - steps_before))
    ((gained <= 0 || total <= steps)) || left=", about $(clock $(((total - steps) * SECONDS / gained))) left"
    echo "[$(clock $SECONDS)] $complete done, ${#pids[@]} running, $failed failed, ${#queue[@]} waiting$left"
}

run_here() { # NAME...
    local devices=() slots threads eval_envs queue=() pids=() running=() slot name pid
    # Slurm itself sends a SIGTERM to all processes, and of the same signal a second one stops a run at once
    local gentle=TERM
    [[ $mode != --task ]] || gentle=INT
    local stop=0 complete=0 failed=0 steps_before="" changed=1 next=0
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        [[ $CUDA_VISIBLE_DEVICES =~ ^(-1|NoDevFiles)?$ ]] || IFS=, read -ra devices <<< "$CUDA_VISIBLE_DEVICES"
    else
        mapfile -t devices < <(nvidia-smi --query-gpu=index --format=csv,noheader 2> /dev/null | grep -xE '[0-9]+')
    fi
    slots=$((${#devices[@]} ? ${#devices[@]} * WORKERS_PER_GPU : WORKERS))
    threads=$((cores > slots ? cores / slots : 1))
    eval_envs=$((threads < 10 ? threads : 10))
    for name in "$@"; do
        if finished "$name"; then ((complete += 1)); else queue+=("$name"); fi
    done
    echo "$# runs into $OUT, $complete finished before; $slots at a time on ${#devices[@]} GPUs and $cores cores"
    trap 'interrupt 130' INT
    trap 'interrupt 143' TERM
    trap 'interrupt 129' HUP
    download "${queue[@]}"
    SECONDS=0
    while ((${#pids[@]} || (!stop && ${#queue[@]}))); do
        for ((slot = 0; slot < slots; slot++)); do
            pid=${pids[slot]:-}
            if [[ -n $pid ]] && ! kill -0 "$pid" 2> /dev/null; then
                wait "$pid" 2> /dev/null # where bash would tell how it was killed
                unset "pids[slot]"
                changed=1
                if finished "${running[slot]}"; then ((complete += 1)); elif ((!stop)); then ((failed += 1)); fi
            fi
            if ((!stop && ${#queue[@]})) && [[ -z ${pids[slot]:-} ]]; then
                start "${queue[0]}" "${devices[slot % (${#devices[@]} + !${#devices[@]})]:-}"
                pids[slot]=$pid
                running[slot]=${queue[0]}
                queue=("${queue[@]:1}")
                ((!stop)) || kill -"$gentle" "$pid" # the signal came in between
            fi
        done
        if ((changed || SECONDS >= next)); then
            progress "$@"
            changed=0 next=$((SECONDS + 60))
        fi
        sleep 0.5
    done
    trap - INT TERM HUP
    ((!stop)) || {
        echo "stopped with $complete of $# runs done; the same command goes on from here." >&2
        exit "$stop"
    }
}

# ---- on a Slurm cluster ---------------------------------------------------------------------------------------------

share=$((GPUS ? GPUS * WORKERS_PER_GPU : CPUS)) # runs of a job: as many as it works on at a time

submit() {
    local i tasks=() flags more
    command -v sbatch > /dev/null || die "sbatch is not on the PATH: call this where Slurm is, or set ENGINE=local."
    for ((i = 0; i < ${#names[@]}; i++)); do
        finished "${names[i]}" || tasks[i / share]=$((i / share))
    done
    ((${#tasks[@]})) || return
    flags=(--job-name=iql --array="$(IFS=, && echo "${tasks[*]}")" --cpus-per-task="$CPUS" --chdir="$OUT")
    flags+=(--output="$OUT/logs/slurm-%A_%a.out" --signal=B:TERM@60 --export=ALL)
    [[ -z ${PARTITION:-} ]] || flags+=(--partition="$PARTITION")
    [[ -z ${TIME_LIMIT:-} ]] || flags+=(--time="$TIME_LIMIT")
    ((GPUS == 0)) || flags+=(--gres="gpu:$GPUS")
    read -ra more <<< "${SBATCH_FLAGS:-}"
    download "${names[@]}"
    export OUT PYTHON
    sbatch "${flags[@]}" "${more[@]}" --wrap="exec bash $(printf %q "$here/benchmark.sh") --task" ||
        die "sbatch refused the jobs for the reason above: change PARTITION, TIME_LIMIT, GPUS, CPUS or SBATCH_FLAGS."
    echo "When squeue no longer lists them: OUT=$OUT bash benchmark.sh --report. Submitted again, it resumes the rest."
    exit
}

# ---- report ---------------------------------------------------------------------------------------------------------

report() {
    PYTHONUTF8=1 "$PYTHON" - "$OUT" << 'EOF'
import csv
import re
import sys
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.ticker import EngFormatter

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# IQL's scores elsewhere, by data and variant: CORL's final and best, the paper's
PUBLISHED = {
    ("D4RL/pen/human-v2", "iql"): ("78.49 ± 8.21, 106.15 ± 10.28", "71.5"),
    ("D4RL/pen/cloned-v2", "iql"): ("83.42 ± 8.19, 114.05 ± 4.78", "37.3"),
    ("D4RL/pen/expert-v2", "iql"): ("128.05 ± 9.21, 140.01 ± 6.36", ""),
    ("D4RL/hammer/human-v2", "iql"): ("1.79 ± 0.80, 6.86 ± 2.38", "1.4"),
    ("D4RL/hammer/cloned-v2", "iql"): ("1.50 ± 0.69, 11.63 ± 1.70", "2.1"),
    ("D4RL/hammer/expert-v2", "iql"): ("128.68 ± 0.33, 129.76 ± 0.37", ""),
    ("D4RL/pen/cloned-v2", "iql offline"): ("84.19 ± 3.96", ""),
    ("D4RL/pen/cloned-v2", "iql online"): ("102.02 ± 20.75", ""),
    ("D4RL/hammer/cloned-v2", "iql offline"): ("1.35 ± 0.32", ""),
    ("D4RL/hammer/cloned-v2", "iql online"): ("57.27 ± 28.49", ""),
}
HEAD = "environment|data|variant|steps|runs|final|final IQM|best|best IQM|success|minutes|IQL in CORL|IQL's paper"
NOTES = """
Scores are normalized as in D4RL: 0 is its random policy, 100 its expert. Final is the last evaluation, best the best of
a run; ± is the standard deviation over seeds (divisor n); IQM is the mean of the middle half of the runs, with the 95%
interval of 10,000 stratified bootstrap samples of the runs (Agarwal et al. 2021). Minutes are a run's wall time.

Data are the Minari ids that the runs read, with the number and the mean score of the episodes found there. Published
numbers compare only where these are the published sets: CORL's final, best (v1 sets, 4 seeds, 1M updates and, if
online, 1M steps) are from the README of github.com/corl-team/CORL, the paper's (arXiv:2110.06169, v0 sets) as later
papers quote them.
"""
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito's, for all eyes


def read_runs(out):
    """A dict for each finished run, one for each phase if it has phases, and the number of runs not finished."""
    runs, unfinished = [], 0
    for log in sorted(out.glob("logs/*.log")):
        text, files = log.read_text(errors="replace"), sorted(out.glob(f"runs/{log.stem}__*/evaluations.csv"))
        if not files or not re.search("^final: ", text, re.M):
            unfinished += 1
            continue
        environment, variant, data, seed = re.fullmatch(r"(.+?)__(.+?)\.(.+)__(\d+)", log.stem).groups()
        # a run that was started anew said all this twice
        found = re.findall(r"^(dataset|random): .*normalized_score=(\S+) .* (\d+) episodes", text, re.M)
        score, episodes = ({name: row[i] for name, *row in found} for i in (0, 1))
        with open(files[-1]) as file:
            rows = list(csv.DictReader(file))
        for phase in dict.fromkeys(row.get("phase", "") for row in rows):
            part = [row for row in rows if row.get("phase", "") == phase]
            steps, scores = ([float(row[name]) for row in part] for name in ("global_step", "normalized_score"))
            run = {"environment": environment, "data": data.replace(".", "/"), "variant": f"{variant} {phase}".strip()}
            run |= {"seed": int(seed), "steps": int(steps[-1]), "final": scores[-1], "best": max(scores)}
            run |= {name: float(part[-1][name]) for name in ("success_rate", "wall_seconds")}
            run |= {
                "random_score": float(score.get("random", "nan")),
                "dataset_score": float(score.get("dataset", "nan")),
            }
            runs.append(run | {"dataset_episodes": episodes.get("dataset", "?"), "curve": (steps, scores)})
    runs.sort(
        key=lambda run: (run["environment"], run["data"], run["variant"][:3] != "iql", run["variant"], run["seed"])
    )
    return runs, unfinished


def iqm(scores):
    """Mean of the middle half along the last axis, as scipy.stats.trim_mean(scores, 0.25)."""
    cut = scores.shape[-1] // 4
    return np.sort(scores)[..., cut : scores.shape[-1] - cut].mean(-1)


def interval(strata):
    """95% percentile interval of the IQM over all runs when each stratum's runs are drawn anew, 10,000 times."""
    rng = np.random.default_rng(0)
    samples = [scores[rng.integers(len(scores), size=(10_000, len(scores)))] for scores in strata]
    return np.percentile(iqm(np.concatenate(samples, 1)), (2.5, 97.5))


def table_row(strata, environment, data, published=("", "")):
    """A line of the table for lists of runs: one list, of several seeds, or one for each dataset."""
    runs = [run for stratum in strata for run in stratum]
    cells = [environment, data, runs[0]["variant"], str(runs[0]["steps"]), str(len(runs))]
    for name, digits in (("final", 1), ("best", 1), ("success_rate", 2)):
        values = [np.array([run[name] for run in stratum]) for stratum in strata]
        pooled = np.concatenate(values)
        cells.append(f"{pooled.mean():.{digits}f}" + (f" ± {pooled.std():.{digits}f}" if len(strata) == 1 else ""))
        if name != "success_rate":
            cells.append("{:.1f} [{:.1f}, {:.1f}]".format(iqm(pooled), *interval(values)))
    cells.append(f"{np.mean([run['wall_seconds'] for run in runs]) / 60:.1f}")
    return "| " + " | ".join([*cells, *published]) + " |\n"


def make_table(panels, unfinished):
    """The report in Markdown."""
    text, pools = f"| {HEAD.replace('|', ' | ')} |\n{'|---' * (HEAD.count('|') + 1)}|\n", {}
    for environment, datasets in panels.items():
        for data, variants in datasets.items():
            for variant, runs in variants.items():
                found = f"{data} ({runs[0]['dataset_episodes']} episodes, {runs[0]['dataset_score']:.1f})"
                text += table_row([runs], environment, found, PUBLISHED.get((data, variant), ("", "")))
                pools.setdefault(variant, []).append(runs)
    text += "".join(table_row(strata, "all", f"{len(strata)} sets") for strata in pools.values() if len(strata) > 1)
    return text + (f"\n{unfinished} more runs are not finished.\n" if unfinished else "") + NOTES


def draw(panels, path):
    """Learning curves: a row of panels for each environment, a panel for each of its datasets."""
    columns, legend, colors = max(map(len, panels.values())), {}, {}
    size = (max(6, 1 + 3.5 * columns), 1 + 2.7 * len(panels))
    figure, axes = plt.subplots(len(panels), columns, figsize=size, squeeze=False, layout="constrained", dpi=150)
    for row, (environment, datasets) in zip(axes, panels.items(), strict=True):
        for ax in row[len(datasets) :]:
            ax.axis("off")
        for ax, (data, variants) in zip(row, datasets.items(), strict=False):
            for variant, runs in variants.items():
                steps, scores = runs[0]["curve"][0], np.array([run["curve"][1] for run in runs])
                color = colors.setdefault(variant, COLORS[len(colors) % len(COLORS)])
                ax.fill_between(steps, scores.min(0), scores.max(0), color=color, alpha=0.2, linewidth=0)
                (legend[f"{variant}, mean and range of the seeds"],) = ax.plot(steps, scores.mean(0), color=color)
            legend["mean of the dataset"] = ax.axhline(runs[0]["dataset_score"], color="black", linestyle="--")
            legend["random policy"] = ax.axhline(runs[0]["random_score"], color="gray", linestyle=":")
            ax.set(title=f"{environment}\n{data}", xlabel="steps", ylabel="normalized score")
            ax.xaxis.set_major_formatter(EngFormatter(sep=""))
            ax.grid(alpha=0.3)
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path)


out = Path(sys.argv[1])
runs, unfinished = read_runs(out)
if not runs:
    sys.exit(f"{out} holds no finished run, so there is no report: run some, or set OUT to where they are.")
panels = {}  # runs by environment, data and variant
for run in runs:
    datasets = panels.setdefault(run["environment"], {})
    datasets.setdefault(run["data"], {}).setdefault(run["variant"], []).append(run)
with open(out / "results.csv", "w", newline="") as file:
    writer = csv.DictWriter(file, [name for name in runs[0] if name != "curve"], extrasaction="ignore")
    writer.writeheader()
    writer.writerows(runs)
table = make_table(panels, unfinished)
(out / "report.md").write_text(table)
draw(panels, out / "figure.png")
print(f"\n{table}\nThis is {out}/report.md; results.csv and figure.png are beside it.")
EOF
}

# ---- main -----------------------------------------------------------------------------------------------------------

if [[ $mode == --report ]]; then
    for log in "$OUT"/logs/*.log; do
        [[ ! -f $log ]] || names+=("$(basename "$log" .log)")
    done
else
    list_runs
    note_commands
    if [[ $mode == --task ]]; then
        [[ -n ${SLURM_ARRAY_TASK_ID:-} ]] || die "--task is for the jobs of a Slurm array, which ENGINE=slurm submits."
        names=("${names[@]:SLURM_ARRAY_TASK_ID * share:share}")
        ((GPUS)) || export CUDA_VISIBLE_DEVICES=""
        run_here "${names[@]}"
    elif [[ $ENGINE == slurm ]]; then
        submit
    else
        run_here "${names[@]}"
    fi
fi
status=0
[[ $mode == --task ]] || report || status=1
for name in "${names[@]}"; do
    finished "$name" && continue
    status=1
    printf '\n%s is not finished, its log %s ends with:\n' "$name" "$OUT/logs/$name.log"
    tail -n 10 "$OUT/logs/$name.log" | sed 's/^/    /'
done >&2
exit $status
