#!/usr/bin/env bash
# Runs seeds of iql_continuous.py (or iql_finetune.py) over tasks and datasets and ends with a table and a figure.
set -uo pipefail

usage() {
    cat << 'EOT'
Usage: [VARIABLE=value ...] bash benchmark.sh [--report | --help]

Runs what is not finished yet, then docs/report.py writes report.md, results.csv and figure.png into OUT. Run again, it
skips finished runs and resumes interrupted ones. --report only collects what is there.

What is run
  TASKS            Adroit environments (default: AdroitHandPen-v1 AdroitHandHammer-v1)
  DATASETS         Minari ids, human means D4RL/{task}/human-v2, {task} the task (default: human cloned expert)
  VARIANTS         labels with their flags, between semicolons; "iql; bc --beta 0" sets IQL next to behaviour cloning.
                   Published numbers are put beside the label iql (default: iql)
  SEEDS            the seeds themselves, not how many (default: 1 2 3 4 5)
  UPDATES          offline updates of a run (default: 1000000)
  FINETUNE         1 runs iql_finetune.py: UPDATES offline, then ONLINE_STEPS online (default: 0)
  ONLINE_STEPS     environment steps of the online part (default: 1000000)
  EXTRA            more flags for all runs, such as --eval-frequency 1000; paths in flags must be absolute
  OUT              folder for all that is written (default: runs/benchmark, with FINETUNE=1 runs/benchmark_finetune):
                   run directories with checkpoint.pt and best.pt in OUT/runs, what they print in OUT/logs
  PYTHON           the Python that has requirements.txt (default: python)

Where it is run
  ENGINE           local: on this machine; slurm: as a job array, collect with --report afterwards (default: local)
  WORKERS_PER_GPU  runs that share a GPU; GPUs are those of CUDA_VISIBLE_DEVICES or, if it is unset, all (default: 4).
                   They take turns on it unless NVIDIA's MPS runs, which nvidia-cuda-mps-control -d starts
  WORKERS          runs at a time where there is no GPU (default: one a core, with one thread)
  GPUS, CPUS       of a job of the Slurm array, which takes on WORKERS_PER_GPU runs a GPU or, with GPUS=0, one a core
                   (default: 1 GPU, 4 cores)
  PARTITION, TIME_LIMIT, SBATCH_FLAGS: of a job of the Slurm array, more flags for sbatch (default: none)
EOT
}

die() { echo "benchmark.sh: $*" >&2 && exit 2; }

mode=${1:-run} # --task is for the jobs of the array
case $mode in
    -h | --help) usage && exit ;;
    run | --report | --task) (($# <= 1)) || die "only one option is understood, see --help." ;;
    *) die "$mode is not an option, see --help." ;;
esac
: "${FINETUNE:=0}" "${EXTRA:=}" "${ENGINE:=local}" "${PYTHON:=python}"
[[ $FINETUNE == [01] ]] || die "FINETUNE must be 0 or 1, not '$FINETUNE'."
[[ $ENGINE == local || $ENGINE == slurm ]] || die "ENGINE must be local or slurm, not '$ENGINE'."
cores=${SLURM_CPUS_PER_TASK:-$(env -u OMP_NUM_THREADS nproc)} # nproc believes OMP_NUM_THREADS
while read -r name default minimum; do
    printf -v "$name" %s "${!name:-$default}"
    [[ ${!name} =~ ^(0|[1-9][0-9]{0,11})$ && ${!name} -ge $minimum ]] ||
        die "$name must be a whole number of at least $minimum, not '${!name}'."
done < <(printf '%s %s %s\n' UPDATES 1000000 1 ONLINE_STEPS 1000000 1 WORKERS_PER_GPU 4 1 \
    WORKERS "$cores" 1 GPUS 1 0 CPUS 4 1)
for tool in "$PYTHON" setsid flock xargs; do
    command -v "$tool" > /dev/null || die "$tool is not on the PATH: install it or, for Python, set PYTHON."
done
PYTHON=$(realpath -s "$(command -v "$PYTHON")")
"$PYTHON" -c 'from importlib.util import find_spec
exit(not all(map(find_spec, ("torch", "minari", "matplotlib"))))' ||
    die "$PYTHON lacks torch, minari or matplotlib: run \`$PYTHON -m pip install -r requirements.txt\`."
here=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
: "${OUT:=runs/benchmark$( ((!FINETUNE)) || echo _finetune)}"
{ mkdir -p "$OUT/logs" "$OUT/runs" && [[ -w $OUT/logs && -w $OUT/runs ]]; } ||
    die "$OUT cannot be written, choose another folder with OUT."
# the scripts are started in OUT, where they write: no path may be relative to the folder this was called in
OUT=$(realpath "$OUT")
[[ -z ${MINARI_DATASETS_PATH:-} ]] || MINARI_DATASETS_PATH=$(realpath -m "$MINARI_DATASETS_PATH")
export OUT PYTHON here

# A run is called ENV__LABEL.DATASET__SEED, with dots for the slashes of the dataset's id. OUT/logs/NAME.log starts with
# its command, OUT/runs/NAME__STARTED is its directory, the newest if there are several.
names=() jobs=()
declare -A command wanted # by name: script and flags; by dataset: its environment
share=$((GPUS ? GPUS * WORKERS_PER_GPU : CPUS)) # runs of a Slurm job: as many as it works on at a time

finished() { grep -q '^final: ' "$OUT/logs/$1.log"; }

stop=0 status=0 group=""
# shellcheck disable=SC2317 # traps call it
interrupt() { # STATUS: of the download or of all runs, which have a process group that Ctrl-C does not reach
    stop=$1
    [[ -z $group ]] || kill -TERM -- "-$group" 2> /dev/null
}

download() { # what is not there, one after another: runs that start together would download over one another
    local dataset minari=${MINARI_DATASETS_PATH:-$HOME/.minari/datasets}
    for dataset in "${!wanted[@]}"; do
        [[ ! -d $here/tests/datasets/$dataset/data && ! -d $minari/$dataset/data ]] || continue
        (cd "$here" && exec setsid "$PYTHON" -c 'import sys; from iql_continuous import load_dataset
load_dataset(*sys.argv[1:])' "${wanted[$dataset]}" "$dataset") &
        group=$!
        wait "$group" || ((stop)) || echo "Its runs will fail, the others go on." >&2
        ((!stop)) || exit "$stop"
    done
}

# shellcheck disable=SC2317 # xargs calls it
start() { # NAME: starts the run or goes on with it, on the GPU of xargs' SLOT; prints its name when it has ended
    local log=$OUT/logs/$1.log words devices found
    # the run inherits the lock: a second benchmark.sh cannot start it again, even if this one is killed
    exec 9>> "$log"
    flock --nonblock --conflict-exit-code 75 9 || (($? != 75)) ||
        { echo "$1" && echo "$1 is being run by another process, wait for it." >&2 && return; }
    read -ra words < "$log"
    found=("$OUT/runs/$1"__*)
    words=("$here/${words[1]}" --eval-envs "$EVAL_ENVS" "${words[@]:2}")
    [[ ! -f ${found[-1]}/checkpoint.pt ]] || words=("${words[0]}" --resume "runs/${found[-1]##*/}")
    read -ra devices <<< "$DEVICES"
    export CUDA_VISIBLE_DEVICES=${devices[SLOT % (${#devices[@]} + !${#devices[@]})]:-}
    # the run has its end of the pipe too, as file 8
    cd "$OUT" && PYTHONUNBUFFERED=1 "$PYTHON" "${words[@]}" < /dev/null 8>&1 1>&9 2>&9
    echo "$1"
}

run_here() { # NAME...
    local devices=() slots queue=() complete=0 failed=0 left running tick=0 stopping=0 name
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        [[ $CUDA_VISIBLE_DEVICES =~ ^(-1|NoDevFiles)?$ ]] || IFS=, read -ra devices <<< "$CUDA_VISIBLE_DEVICES"
    else
        mapfile -t devices < <(nvidia-smi --query-gpu=index --format=csv,noheader 2> /dev/null | grep -xE '[0-9]+')
    fi
    slots=$((${#devices[@]} ? ${#devices[@]} * WORKERS_PER_GPU : WORKERS))
    OMP_NUM_THREADS=$((cores > slots ? cores / slots : 1))
    EVAL_ENVS=$((OMP_NUM_THREADS < 10 ? OMP_NUM_THREADS : 10)) DEVICES=${devices[*]}
    for name in "$@"; do
        if finished "$name"; then ((complete += 1)); else queue+=("$name"); fi
    done
    echo "$# runs into $OUT, $complete finished before; $slots at a time on ${#devices[@]} GPUs and $cores cores"
    ((${#queue[@]})) || return
    download
    export OMP_NUM_THREADS EVAL_ENVS DEVICES
    # all that runs has a pipe open, which ends with the last process
    exec 7< <(export -f start && exec setsid xargs -n 1 -P "$slots" --process-slot-var=SLOT \
        bash -c "start \"\$1\"" start <<< "${queue[*]}")
    group=$!
    while :; do
        if ((tick++ % 60 == 0)); then
            left=$(($# - complete - failed)) running=$((left < slots ? left : slots))
            echo "$(date '+%F %T') $complete done, $running running, $failed failed, $((left - running)) waiting"
        fi
        if IFS= read -r -t 1 name <&7; then
            tick=0
            if finished "$name"; then ((complete += 1)); else ((failed += 1)); fi
        elif (($? <= 128)); then break; fi
        ((!stop)) || kill -"$((stopping++ < 5 ? 15 : 9))" -- "-$group" 2> /dev/null
    done
    ((!stop)) || { echo "stopped with $complete of $# runs done; the same command goes on." >&2 && exit "$stop"; }
}

trap 'interrupt 129' HUP
trap 'interrupt 130' INT
trap 'interrupt 143' TERM
if [[ $mode == --report ]]; then
    for log in "$OUT"/logs/*.log; do
        [[ ! -f $log ]] || names+=("$(basename "$log" .log)")
    done
else
    read -rd "" -a tasks <<< "${TASKS-AdroitHandPen-v1 AdroitHandHammer-v1}"
    read -rd "" -a datasets <<< "${DATASETS-human cloned expert}"
    IFS=';' read -rd "" -a variants <<< "${VARIANTS-iql}"
    read -rd "" -a seeds <<< "${SEEDS-1 2 3 4 5}"
    script="iql_continuous.py --total-updates $UPDATES"
    ((!FINETUNE)) || script="iql_finetune.py --offline-updates $UPDATES --online-steps $ONLINE_STEPS"
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
                read -r label flags <<< "${variant//$'\n'/ }"
                [[ $label =~ ^[A-Za-z0-9][A-Za-z0-9-]*$ ]] ||
                    die "VARIANTS must start with a label of letters, digits and hyphens, not '$label'."
                for seed in "${seeds[@]}"; do
                    [[ $seed =~ ^(0|[1-9][0-9]{0,9})$ ]] || die "SEEDS must be whole numbers, not '$seed'."
                    name=${env}__$label.${dataset//\//.}__$seed
                    [[ -z ${command[$name]:-} ]] || die "$name would run twice: name everything only once."
                    names+=("$name") wanted[$dataset]=$env
                    command[$name]="command: $script --env-id $env --dataset-id $dataset"
                    command[$name]+=" --exp-name $label.${dataset//\//.} ${EXTRA//$'\n'/ } $flags --seed $seed"
                done
            done
        done
    done
    ((${#names[@]})) || die "there is nothing to run: TASKS, DATASETS, VARIANTS or SEEDS is empty."
    for name in "${names[@]}"; do
        log=$OUT/logs/$name.log
        [[ -s $log ]] || echo "${command[$name]}" > "$log" || die "$log cannot be written: make room."
        IFS= read -r first < "$log"
        [[ $first == "${command[$name]}" ]] ||
            die "$log was run with other flags than now: set OUT to another folder, or another label in VARIANTS."
    done
fi
if [[ $mode == --task ]]; then
    names=("${names[@]:SLURM_ARRAY_TASK_ID * share:share}")
    ((GPUS)) || export CUDA_VISIBLE_DEVICES=""
fi
if [[ $mode == run && $ENGINE == slurm ]]; then
    command -v sbatch > /dev/null || die "sbatch is not on the PATH: call this where Slurm is, or set ENGINE=local."
    for i in "${!names[@]}"; do
        finished "${names[i]}" || jobs[i / share]=$((i / share))
    done
    ((${#jobs[@]})) || mode=--report # nothing is left to run
fi
if [[ $mode == run && $ENGINE == slurm ]]; then
    flags=(--job-name=iql --array="$(IFS=, && echo "${jobs[*]}")" --cpus-per-task="$CPUS" --chdir="$OUT")
    flags+=(--output="$OUT/logs/slurm-%A_%a.out" --signal=B:TERM@30 --export=ALL)
    flags+=(${PARTITION:+--partition="$PARTITION"} ${TIME_LIMIT:+--time="$TIME_LIMIT"})
    ((GPUS == 0)) || flags+=(--gres="gpu:$GPUS")
    read -ra more <<< "${SBATCH_FLAGS:-}"
    download
    sbatch "${flags[@]}" "${more[@]}" --wrap="exec bash $(printf %q "$here/benchmark.sh") --task" ||
        die "sbatch refused the jobs for the reason above: change PARTITION, TIME_LIMIT, GPUS, CPUS or SBATCH_FLAGS."
    echo "When squeue lists no more of them, OUT=$(printf %q "$OUT") bash benchmark.sh --report collects the results."
    exit
elif [[ $mode != --report ]]; then
    run_here "${names[@]}"
fi
[[ $mode == --task ]] || "$PYTHON" "$here/docs/report.py" "$OUT" || status=1
for name in "${names[@]}"; do
    finished "$name" && continue
    status=1
    printf '\n%s is not finished, its log %s ends with:\n' "$name" "$OUT/logs/$name.log"
    tail -n 10 "$OUT/logs/$name.log" | sed 's/^/    /'
done >&2
exit $status
