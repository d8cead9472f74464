#!/usr/bin/env bash
# Usage: [VARIABLE=value ...] bash benchmark.sh [--report]          (on Linux)
#
# Runs seeds of iql_continuous.py over tasks and datasets; then docs/report.py writes report.md, results.csv and
# figure.png into OUT. The same command again skips finished runs and resumes interrupted ones; with more UPDATES (with
# FINETUNE=1, more ONLINE_STEPS) it goes on with finished ones. --report only collects what is in OUT.
#
#   TASKS            environments, my_env:MyEnv-v0 if my_env.py is here (default: AdroitHandPen-v1 AdroitHandHammer-v1)
#   DATASETS         Minari ids: 'dapg/{task}/expert-v0', human for D4RL/{task}/human-v2 (default: human cloned expert)
#   VARIANTS         labels with their flags: "iql; bc --beta 0" sets IQL next to cloning (default: the script's name)
#   SEEDS            the seeds themselves, not how many (default: 1 2 3 4 5)
#   UPDATES          offline updates of a run (default: 1000000)
#   FINETUNE         1 runs iql_finetune.py: UPDATES or a --checkpoint, then ONLINE_STEPS online (default: 1000000)
#   SCRIPT           your edited copy of iql_continuous.py (FINETUNE=1: of iql_finetune.py), which runs alone. The same
#                    command without SCRIPT adds the original to OUT, and its report has both in one table
#   EXTRA            more flags for all runs, such as --eval-frequency 1000; paths in flags must be absolute
#   OUT              folder for run directories, logs and the script that is run (default: runs/benchmark[_finetune])
#   PYTHON           the Python that has requirements.txt (default: python)
#   WORKERS_PER_GPU  runs on a GPU, of CUDA_VISIBLE_DEVICES or all (default: 4): by turns, unless NVIDIA's MPS runs
#   WORKERS          runs at a time, of one thread each, without a GPU (default: nproc, which sees no container's quota)
#   ENGINE           slurm submits a job array, WORKERS_PER_GPU runs a job; collect with --report afterwards
#   SBATCH_FLAGS     flags for sbatch (default: --gres=gpu:1 --cpus-per-task=4)

# shellcheck disable=SC2086,SC2206,SC2317,SC2329 # flags are to be split; trap and xargs call functions
set -euo pipefail && unset CDPATH
die() { echo "benchmark.sh: $*" >&2 && exit 2; }
group() { setsid "$@" & wait $!; } # runs what stop ends, with all that it started
stop() { # STATUS
    trap '' HUP INT TERM PIPE && set +eu
    echo "stopping; the same command goes on"
    kill -- -$! $! # the second, if the first is not there yet
    for _ in {1..50}; do kill -0 -- -$! && sleep 0.1 || exit "$1"; done
    kill -KILL -- -$!; exit "$1"
} 2> /dev/null
trap 'stop 129' HUP && trap 'stop 130' INT && trap 'stop 143' TERM
[[ ${1:-} != --help ]] || exec sed -En '2,/^$/s/^# ?//p' "$0"
[[ ${1:-} == @(|--report) ]] || die "'$1' is no option, see --help. Variables stand before bash."
for tool in realpath nproc flock setsid; do [[ $(type -P $tool) ]] || die "$tool is missing: this needs Linux."; done
: "${TASKS:=AdroitHandPen-v1 AdroitHandHammer-v1}" "${DATASETS:=human cloned expert}" "${SEEDS:=1 2 3 4 5}" "${EXTRA=}"
: "${UPDATES:=1000000}" "${ONLINE_STEPS:=1000000}" "${FINETUNE:=0}" "${PYTHON:=python}" "${ENGINE:=local}"
: "${WORKERS=}" "${WORKERS_PER_GPU:=4}" "${SBATCH_FLAGS=--gres=gpu:1 --cpus-per-task=4}"
[[ $FINETUNE$ENGINE == [01]@(local|slurm) ]] || die "FINETUNE=$FINETUNE must be 0 or 1, ENGINE=$ENGINE local or slurm."
[[ $UPDATES$ONLINE_STEPS != *[!0-9]* ]] || die "UPDATES=$UPDATES and ONLINE_STEPS=$ONLINE_STEPS must be whole numbers."
[[ $ENGINE${SLURM_ARRAY_TASK_ID:-}$* != slurm ]] || command -v sbatch > /dev/null || die "ENGINE=slurm needs sbatch."
here=$(dirname "$(realpath "$0")") status=0 runs=() sets=()
[[ -e $here/docs/report.py ]] || die "$0 is a copy: run the repository's, on Slurm as ENGINE=slurm bash benchmark.sh."
command -v "$PYTHON" > /dev/null || die "'$PYTHON' is not there: set PYTHON to the Python that has requirements.txt."
name=continuous begin="" length="--total-updates $UPDATES"
((FINETUNE == 0)) || name=finetune begin="--offline-updates $UPDATES" length="--online-steps $ONLINE_STEPS"
: "${SCRIPT:=$here/iql_$name.py}" "${OUT:=runs/benchmark${begin:+_finetune}}"
PYTHON=$(realpath -s "$(command -v "$PYTHON")") SCRIPT=$(realpath -s "$SCRIPT") script=$(basename "$SCRIPT")
[[ $script =~ ^[[:alnum:]._-]+[.]py$ ]] || die "'$script' must be a name of letters, digits and ._- that ends in .py."
[[ -z ${MINARI_DATASETS_PATH:-} ]] || MINARI_DATASETS_PATH=$(realpath -m "$MINARI_DATASETS_PATH")
PYTHONPATH=$(tr : '\n' <<< "$PWD:${SCRIPT%/*}:${PYTHONPATH:-}" | grep . | xargs -d '\n' realpath -ms | paste -sd :)
[[ ${1:-} == --report ]] || mkdir -p "$OUT/logs"
cd "$OUT" 2> /dev/null || die "OUT=$OUT is no folder: nothing was run there yet." # where all runs start

report() { # LOG...: with the end of those that are not finished
    "$PYTHON" "$here/docs/report.py" "$PWD" || status=1
    for log in "$@"; do
        [[ ! -f $log || $(tail -n 1 "$log") == finished:* ]] || { status=1 && echo Unfinished: && tail -vn 10 "$log"; }
    done >&2
    exit $status
}
[[ ${1:-} != --report ]] || report logs/*.log
[[ -e $script ]] || { cp "$SCRIPT" "$script.$HOSTNAME.$$" && mv -f "$script.$HOSTNAME.$$" "$script"; } # never half
cmp "$SCRIPT" "$script" || die "$OUT has another $script: rename yours, as SCRIPT=my_variant2.py, and the report has" \
    "both; or set another OUT, or go on with the other: SCRIPT=$OUT/$script."
[[ -d tests ]] || ln -sfn "$here/tests" tests # the bundled datasets
export PYTHON PYTHONPATH OUT=$PWD SCRIPT=$PWD/$script LENGTH=$length
folder() { sed -En 's|^(runs/[^ :/]+): .*|\1|p' "$1" 2> /dev/null | tail -n 1; } # of a log's run, as the script says
taken=$(head -qn 1 logs/*.log 2> /dev/null | while read -r other _ _ _ dataset _ label _; do
    [[ $other == "$script" ]] || echo " ${label%".${dataset//\//.}"} " # labels of other scripts' runs
done) || true
IFS=';' read -rd '' -a variants <<< "${VARIANTS:=${script%.py}}" || true
fixed="env.id|dataset.id|exp.name|seed|resume|total.updates|offline.updates|online.steps" # by labels and variables
[[ ! " $EXTRA $VARIANTS" =~ [[:space:]]--($fixed) ]] || die "leave --${BASH_REMATCH[1]} to the variables, see --help."
for env in $TASKS; do
    task=${env##*:} task=${task#AdroitHand} task=${task%-v*} task=${task%Sparse} task=${task,,}
    for dataset in $DATASETS; do
        [[ $dataset == */* ]] || dataset="D4RL/{task}/$dataset-v2"
        dataset=${dataset//'{task}'/$task} && sets+=("$env $dataset")
        for variant in "${variants[@]}"; do
            read -r label flags <<< "${variant//$'\n'/ }"
            [[ $label =~ ^[[:alnum:]][[:alnum:]._-]*$ ]] || die "VARIANTS are labels with flags, not '$label $flags'."
            [[ $taken != *" $label "* ]] || die "$label is the label of another script's runs in $OUT: choose another."
            [[ " $EXTRA $flags" =~ [[:space:]]--checkpoint[[:space:]=] ]] && first="" || first=$begin
            for seed in $SEEDS; do
                name=${env//[:\/]/_}__$label.${dataset//\//.}__$seed
                [[ " ${runs[*]%% *} " != *" logs/$name.log "* ]] || die "$name is asked for twice: name it once."
                command="$script --env-id $env --dataset-id $dataset --exp-name $label.${dataset//\//.}"
                read -rd '' -a words <<< "$command $first $EXTRA $flags --seed $seed" || true
                [[ ! -e $(folder "logs/$name.log") || $(head -n 1 "logs/$name.log") == "${words[*]}" ]] ||
                    die "$OUT/logs/$name.log has other flags: set another OUT, or another label in VARIANTS."
                runs+=("logs/$name.log ${words[*]}") # a run's log and its command
            done
        done
    done
done

run() { # LOG SCRIPT FLAG...: begins a run, or goes on with it, on the GPU of xargs' SLOT
    log=$1 name=$(basename "$1" .log) gpus=($GPUS) && shift
    export CUDA_VISIBLE_DEVICES=${gpus:+${gpus[SLOT % ${#gpus[@]}]}}
    exec 9>> "$log" # the run inherits it, with the lock
    flock -n 9 || { (($? > 1)) && echo "$name is not locked, $OUT has no locks: do not start this twice at a time"; } ||
        { echo "FAILED $name: it is being run already" && return 1; }
    dir=$(folder "$log")
    [[ ! -e $dir || $(tail -n 1 "$log") != "finished: $LENGTH" ]] || { echo "$name was finished before" && return; }
    [[ -e $dir ]] || echo "$*" > "$log" # nothing was trained: its flags may be corrected
    [[ ! -f $dir/checkpoint.pt ]] || set -- "$1" --resume "$dir"
    "$PYTHON" -u "$@" $LENGTH >&9 2>&1 || { echo "$(date +%T) FAILED $name" && return 1; }
    echo "finished: $LENGTH" >&9 && echo "$(date +%T) finished $name"
}

if [[ $ENGINE == slurm && -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
    runs=("${runs[@]:SLURM_ARRAY_TASK_ID * WORKERS_PER_GPU:WORKERS_PER_GPU}")
else
    group "$PYTHON" -c 'import runpy, sys; script, lost, size = runpy.run_path(sys.argv[1]), "", 0
for ids in map(str.split, sys.argv[4:]): # once, before all runs
    try: env, _ = script["make_env"](ids[0])(), script["load_dataset"](*ids)
    except (Exception, SystemExit) as error: lost += "\n{} {}: {}".format(*ids, error) # one may raise whatever it likes
    else: size += 4e-9 * int(sys.argv[3]) * (2 * env.observation_space.shape[0] + env.action_space.shape[0] + 2)
lost and sys.exit("No run is begun, for environments or datasets that cannot be had:" + lost)
print(sys.argv[2] + f"; online.bin takes {size:.3g} GB" * bool(size))' "$script" \
        "${#runs[@]} runs of $UPDATES updates${begin:+ (none with --checkpoint) and $ONLINE_STEPS online steps}" \
        $((FINETUNE * ONLINE_STEPS * ${#runs[@]} / ${#sets[@]})) "${sets[@]}"
    [[ $ENGINE == local ]] || exec sbatch --job-name=iql --output="$OUT/logs/%A_%a.out" $SBATCH_FLAGS --export=ALL \
        --array="0-$(((${#runs[@]} - 1) / WORKERS_PER_GPU))" --wrap="exec bash $(printf %q "$here/benchmark.sh")"
fi
cores=${SLURM_CPUS_PER_TASK:-$(env -u OMP_NUM_THREADS nproc)} # nproc would believe OMP_NUM_THREADS
devices=${CUDA_VISIBLE_DEVICES-$(nvidia-smi --query-gpu=index --format=csv,noheader 2> /dev/null || true)}
mapfile -t gpus < <(tr ', ' '\n' <<< "$devices" | grep -xE '[0-9]+|(GPU|MIG)-.+') # not -1 or an error message
slots=$((${#gpus[@]} ? ${#gpus[@]} * WORKERS_PER_GPU : ${WORKERS:-cores}))
((slots > 0)) || die "WORKERS=$WORKERS and WORKERS_PER_GPU=$WORKERS_PER_GPU must be at least 1."
export -f run folder && export GPUS=${gpus[*]} OMP_NUM_THREADS=1 # more would give other bits on other machines
echo "${#runs[@]} runs into $OUT, $slots at a time on ${#gpus[@]} GPUs and $cores cores"
group xargs -a <(printf '%s\n' "${runs[@]}") -d '\n' -n 1 -P "$slots" --process-slot-var=SLOT \
    bash -c "set -f && run \$1" run || status=1
[[ $ENGINE == slurm ]] || report "${runs[@]%% *}"
exit $status
