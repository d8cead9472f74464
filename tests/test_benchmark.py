"""benchmark.sh on the real script with the bundled data once, else on a stand-in for it that learns nothing."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BENCHMARK = ROOT / "benchmark.sh"
# Files, lines, flags and signals are those of the scripts. It says how it was started and has a child process, as they
# have for evaluation. Seed 13 fails; "--slow" takes forever, "--deaf" does not listen to SIGTERM either.
STAND_IN = """
import argparse, json, os, signal, subprocess, sys, time
from pathlib import Path

def load_dataset(env_id, dataset_id):
    print("downloading", dataset_id, "for", env_id, flush=True)
    if "slow" in dataset_id:
        Path(os.environ["HOME"], "downloading").touch()
        time.sleep(600)
    if "lost" in dataset_id:
        sys.exit("There is no such set.")

def stop(signum, frame):
    child.kill()
    os._exit(128 + signum)

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name in ("env-id", "dataset-id", "exp-name", "resume", "eval-envs", "beta"):
        parser.add_argument("--" + name)
    for name in ("total-updates", "offline-updates", "online-steps", "seed"):
        parser.add_argument("--" + name, type=int)
    for name in ("slow", "deaf"):
        parser.add_argument("--" + name, action="store_true")
    args = parser.parse_args()
    env = {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MINARI_DATASETS_PATH")}
    print("started:", json.dumps({"argv": sys.argv[1:], **env}))
    child = subprocess.Popen(["sleep", "600"])
    signal.signal(signal.SIGTERM, signal.SIG_IGN if args.deaf else stop)
    run_dir = Path(args.resume or f"runs/{args.env_id}__{args.exp_name}__{args.seed}__{time.time_ns()}")
    if args.resume:
        text = (run_dir / "checkpoint.pt").read_text()
    else:
        run_dir.mkdir(parents=True)
        (run_dir / "args.json").write_text(json.dumps({"args": vars(args)}))
        last = args.total_updates or args.offline_updates + args.online_steps
        text = f"global_step,normalized_score,wall_seconds\\n{last},5,6\\n"
    if args.seed == 13:
        child.kill()
        sys.exit("There is no luck in 13.")
    (run_dir / "evaluations.csv").write_text(text)
    if args.slow and not args.resume:
        if not args.deaf:
            (run_dir / "checkpoint.pt").write_text(text)
        time.sleep(600)
    child.kill()
    print("final: done")
"""
# The real report has tests of its own.
REPORT = """
import sys
from pathlib import Path

dirs = list(Path(sys.argv[1]).glob("runs/*/args.json"))
print(f"{len(dirs)} run directories in {sys.argv[1]}")
sys.exit(not dirs and "holds no finished run")
"""
VARIABLES = (
    "TASKS DATASETS VARIANTS SEEDS UPDATES FINETUNE ONLINE_STEPS EXTRA OUT PYTHON ENGINE WORKERS_PER_GPU WORKERS"
)
VARIABLES += " GPUS CPUS PARTITION TIME_LIMIT SBATCH_FLAGS"


class Benchmark:
    """benchmark.sh in a folder of its own beside stand-ins for the scripts; `env` is what it is started with."""

    def __init__(self, folder):
        self.folder, self.out, self.mark = folder, folder / "runs" / "benchmark", f"MARK_{uuid.uuid4().hex}"
        shutil.copy(BENCHMARK, folder)
        for name in ("iql_continuous.py", "iql_finetune.py"):
            (folder / name).write_text(STAND_IN)
        for name in ("bin", "docs"):
            (folder / name).mkdir()
        (folder / "docs" / "report.py").write_text(REPORT)
        clean = {name: value for name, value in os.environ.items() if name not in VARIABLES.split()}
        self.env = {**clean, "PYTHON": sys.executable, "HOME": str(folder), self.mark: "1", "CUDA_VISIBLE_DEVICES": ""}
        self.env |= {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "WORKERS": "2", "UPDATES": "1000"}
        self.env |= {"TASKS": "AdroitHandPen-v1", "DATASETS": "human", "SEEDS": "1 2"}
        self.env["MINARI_DATASETS_PATH"] = "sets"
        (folder / "sets" / "D4RL" / "pen" / "human-v2" / "data").mkdir(parents=True)

    def add_tool(self, name, script):
        (self.folder / "bin" / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (self.folder / "bin" / name).chmod(0o755)

    def start(self, *args, script="benchmark.sh", **env):
        # fmt: off
        return subprocess.Popen(
            ["bash", script, *args], cwd=self.folder, env={**self.env, **env}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
            # what started the tests may ignore SIGINT, as shells do in the background, and bash cannot undo that
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        # fmt: on

    def __call__(self, *args, status=0, **env):
        process = self.start(*args, **env)
        output, errors = process.communicate(timeout=120)
        assert process.returncode == status, output + errors
        return output + errors

    def logs(self):
        return {path.stem: path.read_text() for path in sorted(self.out.glob("logs/*.log"))}

    def wait_for(self, pattern, count=1):
        deadline = time.time() + 120
        while len(found := list(self.folder.glob(pattern))) < count:
            assert time.time() < deadline, f"{len(found)} {pattern}"
            time.sleep(0.05)

    def processes(self):
        """By number, what still runs of everything that was started here; a zombie has no environment."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (path / "environ").read_bytes():
                    found[int(path.name)] = (path / "cmdline").read_bytes()
            except OSError:
                pass
        return found

    def wait_until_gone(self):
        """A process that was killed may take a moment to end."""
        deadline = time.time() + 60
        while left := self.processes():
            assert time.time() < deadline, left
            time.sleep(0.05)


@pytest.fixture
def benchmark(tmp_path):
    benchmark = Benchmark(tmp_path)
    yield benchmark
    for pid in benchmark.processes():  # of a test that failed
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def started(log):
    """How the stand-in was started the last time, from its log."""
    return json.loads(re.findall("^started: (.*)$", log, re.M)[-1])


def test_shell():
    subprocess.run(["bash", "-n", BENCHMARK], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    subprocess.run(["shellcheck", BENCHMARK], check=True)


def test_help_lists_the_variables(benchmark):
    text = benchmark("--help")
    assert [name for name in VARIABLES.split() if not re.search(rf"\b{name}\b", text)] == []
    assert "nvidia-cuda-mps-control -d" in text


def test_two_tasks(tmp_path):
    """The tiny real benchmark with its report; run again, it has nothing to do."""
    keep = {name: value for name, value in os.environ.items() if name not in VARIABLES.split()}
    env = {**keep, "PYTHON": sys.executable, "OUT": str(tmp_path / "out"), "DATASETS": "bundled/{task}/demos-v0"}
    env |= {"SEEDS": "3", "UPDATES": "20", "HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": "", "WORKERS": "2"}
    env["EXTRA"] = "--eval-frequency 10 --eval-episodes 1 --final-episodes 2 --max-episodes 5"
    for _ in range(2):
        done = subprocess.run(["bash", BENCHMARK], env=env, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        with open(tmp_path / "out" / "results.csv") as file:
            runs = list(csv.DictReader(file))
        assert [(run["environment"], run["data"], run["variant"], run["seed"], run["updates"]) for run in runs] == [
            (f"AdroitHand{task}-v1", f"bundled/{task.lower()}/demos-v0[:5]", "iql", "3", "20")
            for task in ("Hammer", "Pen")
        ]
        for run in runs:
            (path,) = (tmp_path / "out" / "runs").glob(f"{run['environment']}__iql.*__{run['seed']}__*")
            with open(path / "evaluations.csv") as file:
                *_, before, last = csv.DictReader(file)
            assert (last["global_step"], float(last["normalized_score"])) == ("20", float(run["final"]))
            assert float(last["success_rate"]) == float(run["success_rate"])
            assert float(run["best"]) >= max(float(row["normalized_score"]) for row in (before, last))
            assert float(run["dataset_score"]) > float(run["random_score"])
            assert run["dataset_episodes"] == "5"
        assert (tmp_path / "out" / "figure.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert (tmp_path / "out" / "report.md").read_text() in done.stdout
    assert "2 finished before" in done.stdout
    assert len(list((tmp_path / "out" / "runs").iterdir())) == 2


def test_commands(benchmark):
    """Each task, dataset, variant and seed once, in a folder with blanks and brackets and through a symbolic link."""
    (benchmark.folder / "link").mkdir()
    (benchmark.folder / "link" / "it.sh").symlink_to("../benchmark.sh")
    (benchmark.folder / "sets" / "own" / "pen-v0" / "data").mkdir(parents=True)
    env = {"DATASETS": "human own/{task}-v0", "VARIANTS": "iql;\n bc --beta 0", "OUT": "my [1] out"}
    benchmark.add_tool("nproc", "echo 2")
    process = benchmark.start(script="link/it.sh", **env)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, output + errors
    benchmark.out = benchmark.folder / "my [1] out"
    assert f"8 run directories in {benchmark.out}" in output
    wanted = {}
    for data in ("D4RL/pen/human-v2", "own/pen-v0"):
        for label, flags in (("iql", ""), ("bc", "--beta 0")):
            for seed in "12":
                name = f"{label}.{data.replace('/', '.')}"
                flags_of_it = f"--total-updates 1000 --env-id AdroitHandPen-v1 --dataset-id {data} --exp-name {name}"
                wanted[f"AdroitHandPen-v1__{name}__{seed}"] = (
                    f"--eval-envs 1 {flags_of_it} {flags} --seed {seed}".split()
                )
    assert {name: started(log)["argv"] for name, log in benchmark.logs().items()} == wanted


def test_finetune(benchmark):
    benchmark(FINETUNE="1", ONLINE_STEPS="300", SEEDS="1")
    (log,) = (benchmark.folder / "runs" / "benchmark_finetune" / "logs").iterdir()
    first, *_ = log.read_text().splitlines()
    assert first.startswith(
        "command: iql_finetune.py --offline-updates 1000 --online-steps 300 --env-id AdroitHandPen-v1"
    )


@pytest.mark.parametrize("to_group", [True, False], ids=["SIGINT to all", "SIGTERM to the script"])
def test_stop_and_resume(benchmark, to_group):
    process = benchmark.start(EXTRA="--slow", SEEDS="1 2 3")
    benchmark.wait_for("runs/*/runs/*/checkpoint.pt", 2)
    assert len(benchmark.processes()) >= 7  # itself, xargs, its shells, two runs and their children
    os.killpg(process.pid, signal.SIGINT) if to_group else process.terminate()
    output, errors = process.communicate(timeout=120)
    assert process.returncode == (130 if to_group else 143), output + errors
    assert "stopped with 0 of 3 runs done" in errors
    benchmark.wait_until_gone()
    assert len(list(benchmark.out.glob("runs/*"))) == 2  # nothing was started after the signal
    (first,) = benchmark.out.glob("runs/*__1__*")
    for path in benchmark.out.glob("runs/*__2__*/checkpoint.pt"):
        path.unlink()  # as if this one had been killed before its first

    process = benchmark.start(EXTRA="--slow", SEEDS="1 2 3")
    benchmark.wait_for("runs/*/runs/*/checkpoint.pt", 3)
    process.terminate()
    process.communicate(timeout=120)
    resumed, afresh, _ = benchmark.logs().values()
    assert started(resumed)["argv"] == ["--resume", f"runs/{first.name}"]
    assert "final: done" in resumed and resumed.count("started:") == 2  # appended, not overwritten
    assert "--resume" not in started(afresh)["argv"] and afresh.count("started:") == 2
    benchmark(EXTRA="--slow", SEEDS="1 2 3")
    logs = benchmark.logs()
    assert all("final: done" in log for log in logs.values())
    assert "3 finished before" in benchmark(EXTRA="--slow", SEEDS="1 2 3")
    assert benchmark.logs() == logs


def test_deaf_runs_are_killed(benchmark):
    process = benchmark.start(EXTRA="--slow --deaf")
    benchmark.wait_for("runs/*/runs/*/evaluations.csv", 2)
    process.terminate()
    process.communicate(timeout=120)
    assert process.returncode == 143
    benchmark.wait_until_gone()


def test_stop_while_downloading(benchmark):
    process = benchmark.start(DATASETS="own/slow-v0")
    benchmark.wait_for("downloading")
    process.terminate()
    process.communicate(timeout=120)
    assert process.returncode == 143
    benchmark.wait_until_gone()
    assert not list(benchmark.out.glob("runs/*"))


def test_failed_run(benchmark):
    output = benchmark(SEEDS="13 1 2", status=1)
    assert "2 done, 0 running, 1 failed, 0 waiting" in output
    assert "There is no luck in 13." in output
    assert "__13 is not finished" in output and "__1 is not finished" not in output
    assert "3 run directories in" in output
    assert "There is no luck in 13." in benchmark("--report", status=1)


def test_a_run_is_not_started_twice(benchmark):
    process = benchmark.start(EXTRA="--slow")
    benchmark.wait_for("runs/*/runs/*/checkpoint.pt", 2)
    output = benchmark(EXTRA="--slow", status=1)
    assert output.count("is being run by another process") == 2
    assert len(list(benchmark.out.glob("runs/*"))) == 2
    process.terminate()
    process.communicate(timeout=120)


@pytest.mark.parametrize("visible", [None, "4,GPU-abc"])
def test_gpus(benchmark, visible):
    benchmark.add_tool("nvidia-smi", "printf '0\\n1\\n'")
    benchmark.add_tool("nproc", "echo ${OMP_NUM_THREADS:-12}")
    benchmark.env.pop("CUDA_VISIBLE_DEVICES")
    env = {"CUDA_VISIBLE_DEVICES": visible} if visible else {}
    # all at once: a slot that is free again would be used twice
    process = benchmark.start(WORKERS_PER_GPU="2", SEEDS="1 2 3 4", EXTRA="--slow", OMP_NUM_THREADS="1", **env)
    benchmark.wait_for("runs/*/runs/*/checkpoint.pt", 4)
    process.terminate()
    output, _ = process.communicate(timeout=120)
    assert "4 at a time on 2 GPUs and 12 cores" in output
    starts = [started(log) for log in benchmark.logs().values()]
    first, second = (visible or "0,1").split(",")
    assert sorted(start["CUDA_VISIBLE_DEVICES"] for start in starts) == sorted([first] * 2 + [second] * 2)
    assert {start["OMP_NUM_THREADS"] for start in starts} == {"3"}
    assert {start["argv"][:2][1] for start in starts} == {"3"}


def test_cpu(benchmark):
    """One worker a core; nvidia-smi without a driver is no GPU."""
    benchmark.add_tool("nvidia-smi", "echo NVIDIA-SMI has failed; exit 9")
    benchmark.add_tool("nproc", "echo 3")
    benchmark.env.pop("WORKERS")
    benchmark.env.pop("CUDA_VISIBLE_DEVICES")
    assert "3 at a time on 0 GPUs and 3 cores" in benchmark()
    starts = [started(log) for log in benchmark.logs().values()]
    assert {(start["CUDA_VISIBLE_DEVICES"], start["OMP_NUM_THREADS"]) for start in starts} == {("", "1")}
    assert {tuple(start["argv"][:2]) for start in starts} == {("--eval-envs", "1")}


def test_datasets_are_downloaded_once(benchmark):
    output = benchmark(DATASETS="human cloned own/lost-v0", SEEDS="1 2")
    assert sorted(re.findall("downloading (.*)", output)) == [
        "D4RL/pen/cloned-v2 for AdroitHandPen-v1",
        "own/lost-v0 for AdroitHandPen-v1",
    ]
    assert "There is no such set.\nIts runs will fail, the others go on." in output
    # the runs are started elsewhere, a relative path would mislead them
    paths = {started(log)["MINARI_DATASETS_PATH"] for log in benchmark.logs().values()}
    assert paths == {str(benchmark.folder / "sets")}


def test_slurm(benchmark):
    """What sbatch is told; its jobs are then run here."""
    benchmark.add_tool("sbatch", 'printf "%s\\n" "$@" > "$HOME/sbatch"; env > "$HOME/sbatch_env"')
    env = {"ENGINE": "slurm", "SEEDS": "1 2 13", "GPUS": "0", "CPUS": "2", "PARTITION": "night", "TIME_LIMIT": "60"}
    env["OUT"] = "my [1] out"
    del benchmark.env["WORKERS"]
    benchmark.out = benchmark.folder / "my [1] out"
    benchmark(SBATCH_FLAGS="--account me --nice", **env)
    told = (benchmark.folder / "sbatch").read_text().splitlines()
    wanted = ["--array=0,1", "--cpus-per-task=2", "--partition=night", "--time=60", f"--chdir={benchmark.out}"]
    assert set([*wanted, "--account", "me", "--nice"]) <= set(told)
    assert not any(flag.startswith("--gres") for flag in told)
    (wrapped,) = (flag.removeprefix("--wrap=") for flag in told if flag.startswith("--wrap="))
    lines = (benchmark.folder / "sbatch_env").read_text().splitlines()
    job_env = dict(line.split("=", 1) for line in lines if "=" in line)
    for task, status in (("0", 0), ("1", 1)):
        job_env |= {"SLURM_ARRAY_TASK_ID": task, "SLURM_CPUS_PER_TASK": "2"}
        job = subprocess.run(["sh", "-c", wrapped], env=job_env, cwd=benchmark.out, capture_output=True, text=True)
        assert job.returncode == status, job.stdout + job.stderr
        assert f"{2 - status} runs into" in job.stdout and "run directories" not in job.stdout
    output = benchmark("--report", status=1, OUT="my [1] out")
    assert "There is no luck in 13." in output and "3 run directories in" in output
    benchmark(**env)  # only what is not finished, by the same number
    assert "--array=1" in (benchmark.folder / "sbatch").read_text().splitlines()
    benchmark(**env | {"GPUS": "2", "WORKERS_PER_GPU": "1"})
    told = (benchmark.folder / "sbatch").read_text().splitlines()
    assert {"--gres=gpu:2", "--array=1"} <= set(told)
    (benchmark.folder / "sbatch").unlink()
    assert "2 finished before" not in benchmark(**env | {"SEEDS": "1 2"})  # but the report
    assert not (benchmark.folder / "sbatch").exists()


@pytest.mark.parametrize(
    ("env", "sentence"),
    [
        ({"ENGINE": "foo"}, "ENGINE must be local or slurm, not 'foo'"),
        ({"FINETUNE": "yes"}, "FINETUNE must be 0 or 1, not 'yes'"),
        ({"UPDATES": "1e6"}, "UPDATES must be a whole number of at least 1, not '1e6'"),
        ({"WORKERS": "0"}, "WORKERS must be a whole number of at least 1, not '0'"),
        ({"SEEDS": "1 x"}, "SEEDS must be whole numbers, not 'x'"),
        ({"SEEDS": "1 1"}, "would run twice"),
        ({"DATASETS": ""}, "DATASETS, VARIANTS or SEEDS is empty"),
        ({"DATASETS": "a/b"}, "DATASETS must be short names or Minari ids that end in a version (-v2), not 'a/b'"),
        ({"TASKS": "Pendulum-v1"}, "TASKS must be Adroit tasks with dense rewards"),
        ({"VARIANTS": "iql; --beta 0"}, "VARIANTS must start with a label"),
        ({"PYTHON": "no_such_python"}, "no_such_python is not on the PATH"),
        ({"OUT": "benchmark.sh/out"}, "benchmark.sh/out cannot be written, choose another folder with OUT"),
    ],
)
def test_errors(benchmark, env, sentence):
    output = benchmark(status=2, **env)
    assert sentence in output
    assert output.splitlines()[-1].startswith("benchmark.sh: ") and "Traceback" not in output
    assert not list(benchmark.out.glob("runs/*"))


def test_missing_package(benchmark):
    benchmark.add_tool("bare_python", f'exec "{sys.executable}" -S "$@"')
    assert "lacks torch, minari or matplotlib" in benchmark(PYTHON="bare_python", status=2)


def test_no_sbatch(benchmark):
    for name in "bash env nproc realpath dirname mkdir setsid flock xargs grep".split():
        (benchmark.folder / "bin" / name).symlink_to(shutil.which(name))
    assert "sbatch is not on the PATH" in benchmark(ENGINE="slurm", PATH=str(benchmark.folder / "bin"), status=2)


def test_sbatch_refuses(benchmark):
    benchmark.add_tool("sbatch", "echo invalid partition >&2; exit 1")
    output = benchmark(ENGINE="slurm", status=2)
    assert "invalid partition" in output and "sbatch refused" in output


def test_options(benchmark):
    assert "--no is not an option" in benchmark("--no", status=2)
    assert "holds no finished run" in benchmark("--report", status=1)


def test_other_flags_need_another_folder(benchmark):
    benchmark()
    logs = benchmark.logs()
    assert "was run with other flags" in benchmark(UPDATES="2000", status=2)
    assert "was run with other flags" in benchmark(SEEDS="1 3", EXTRA="--beta 1", status=2)
    assert benchmark.logs() == logs
    benchmark(SEEDS="2", WORKERS="1")  # how many run at a time is no such flag
