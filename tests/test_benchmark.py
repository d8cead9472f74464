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

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
BENCHMARK = ROOT / "benchmark.sh"
# Files, lines, flags and signals are those of the scripts. It says how it was started and has a child process, as they
# have for evaluation. Seed 13 fails; "--slow" takes forever, "--deaf" does not listen to SIGTERM either.
STAND_IN = """
import argparse, json, os, signal, subprocess, sys, time
from pathlib import Path

def find_dataset(env_id, dataset_id):
    print("downloading", dataset_id)

def stop(signum, frame):
    child.kill()
    sys.exit(128 + signum)

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
    if args.resume:
        run_dir = Path(args.resume)
        text = (run_dir / "checkpoint.pt").read_text()
    else:
        run_dir = Path(f"runs/{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}")
        run_dir.mkdir(parents=True)
        score = 10 * 2**args.seed + 1000 * ("Hammer" in args.env_id) - (args.beta == "0")
        if args.offline_updates:
            last = args.offline_updates + args.online_steps
            rows = [(0, -1, 0, "offline"), (args.offline_updates, score, 60, "offline")]
            rows += [(last, 3 * score, 90, "online")]
        else:
            rows = [(0, -1, 0), (500, 2 * score, 60), (args.total_updates, score, 120)]
        text = "global_step,episodic_return_mean,episodic_return_std,normalized_score,success_rate,wall_seconds"
        text += ",phase" * bool(args.offline_updates) + "\\n"
        for step, score, seconds, *phase in rows:
            text += ",".join(map(str, (step, 1, 1, score, 0.5, seconds, *phase))) + "\\n"
        print("dataset: episodic_return=3.00, normalized_score=55.50 (std 1.00, 25 episodes)")
        print("random: episodic_return=1.00, normalized_score=-3.00 (std 1.00, 20 episodes)")
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
        (folder / "bin").mkdir()
        clean = {name: value for name, value in os.environ.items() if name not in VARIABLES.split()}
        self.env = {**clean, "PYTHON": sys.executable, "HOME": str(folder), self.mark: "1", "CUDA_VISIBLE_DEVICES": ""}
        self.env |= {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "WORKERS": "2", "UPDATES": "1000"}
        self.env |= {"TASKS": "AdroitHandPen-v1", "DATASETS": "human", "SEEDS": "1 2"}
        self.env.pop("MINARI_DATASETS_PATH", None)

    def add_tool(self, name, script):
        (self.folder / "bin" / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (self.folder / "bin" / name).chmod(0o755)

    def start(self, *args, **env):
        # fmt: off
        return subprocess.Popen(
            ["bash", "benchmark.sh", *args], cwd=self.folder, env={**self.env, **env}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
            # what started the tests may ignore SIGINT, as shells do in the background, and bash cannot undo that
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        # fmt: on

    def __call__(self, *args, status=0, **env):
        process = self.start(*args, **env)
        output, errors = process.communicate(timeout=60)
        assert process.returncode == status, output + errors
        return output + errors

    def logs(self):
        return {path.stem: path.read_text() for path in self.out.glob("logs/*.log")}

    def wait_for(self, pattern, count):
        deadline = time.time() + 30
        while len(found := list(self.out.glob(pattern))) < count:
            assert time.time() < deadline, f"{len(found)} {pattern}"
            time.sleep(0.1)

    def processes(self):
        """What still runs of everything that was started here."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (path / "environ").read_bytes():
                    found.append((path / "cmdline").read_bytes())
            except OSError:
                pass
        return found

    def table(self):
        """The cells of the table's rows below the head, by (environment, data, variant)."""
        lines = (self.out / "report.md").read_text().splitlines()
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")][1:]
        return {(row[0], row[1].split(" (")[0], row[2]): row[3:] for row in rows}


@pytest.fixture(scope="session")
def font_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("matplotlib")


@pytest.fixture
def benchmark(tmp_path, monkeypatch, font_cache):
    monkeypatch.setenv("MPLCONFIGDIR", str(font_cache))  # else each writes one into its HOME, which takes seconds
    return Benchmark(tmp_path)


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


def test_two_tasks_two_seeds(tmp_path):
    """The tiny real benchmark; run again, it has nothing to do."""
    keep = {name: value for name, value in os.environ.items() if name not in VARIABLES.split()}
    env = {**keep, "PYTHON": sys.executable, "OUT": str(tmp_path / "out"), "DATASETS": "bundled/{task}/demos-v0"}
    env |= {
        "SEEDS": "1 2",
        "UPDATES": "200",
        "EXTRA": "--eval-frequency 100 --eval-episodes 2 --max-episodes 5",
        "HOME": str(tmp_path),
    }
    for _ in range(2):
        done = subprocess.run(["bash", BENCHMARK], env=env, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        with open(tmp_path / "out" / "results.csv") as file:
            runs = list(csv.DictReader(file))
        assert [(run["environment"], run["data"], run["seed"], run["steps"]) for run in runs] == [
            (f"AdroitHand{task}-v1", f"bundled/{task.lower()}/demos-v0", seed, "200")
            for task in ("Hammer", "Pen")
            for seed in "12"
        ]
        for run in runs:
            (path,) = (tmp_path / "out" / "runs").glob(
                f"{run['environment']}__iql.{run['data'].replace('/', '.')}__{run['seed']}__*"
            )
            *_, before, last = [line.split(",") for line in (path / "evaluations.csv").read_text().splitlines()]
            assert (last[0], last[3], last[4]) == ("200", run["final"], run["success_rate"])
            assert float(run["best"]) >= max(float(before[3]), float(last[3]))
            assert float(run["dataset_score"]) > float(run["random_score"])
        assert (tmp_path / "out" / "figure.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert (tmp_path / "out" / "report.md").read_text() in done.stdout
    assert "4 finished before" in done.stdout
    assert len(list((tmp_path / "out" / "runs").iterdir())) == 4


def test_report(benchmark):
    """The statistics, computed in another way, and where the published numbers stand."""
    seeds = range(1, 7)
    benchmark(
        TASKS="AdroitHandPen-v1 AdroitHandHammer-v1",
        DATASETS="human own/{task}-v0",
        VARIANTS="iql; bc --beta 0",
        SEEDS=" ".join(map(str, seeds)),
        WORKERS="8",
    )
    table = benchmark.table()
    pen = np.array([10 * 2.0**seed for seed in seeds])
    steps, runs, final, final_iqm, best, best_iqm, success, minutes, corl, paper = table[
        "AdroitHandPen-v1", "D4RL/pen/human-v2", "iql"
    ]
    assert (steps, runs, success, minutes) == ("1000", "6", "0.50 ± 0.00", "2.0")
    assert final == f"{pen.mean():.1f} ± {pen.std():.1f}"
    assert best == f"{2 * pen.mean():.1f} ± {2 * pen.std():.1f}"
    middle, low, high = map(float, re.findall(r"[\d.]+", final_iqm))
    assert middle == round(pen[1:5].mean(), 1)
    rng = np.random.default_rng(5)
    draws = [np.sort(rng.choice(pen, 6))[1:5].mean() for _ in range(10_000)]
    assert np.allclose((low, high), np.percentile(draws, (2.5, 97.5)), rtol=0.05)
    assert float(best_iqm.split()[0]) == 2 * middle
    assert "78.49" in corl and paper == "71.5"
    # no published number beside another algorithm or other data
    assert table["AdroitHandPen-v1", "D4RL/pen/human-v2", "bc"][-2:] == ["", ""]
    assert table["AdroitHandPen-v1", "own/pen-v0", "iql"][-2:] == ["", ""]
    assert "55.5" in (benchmark.out / "report.md").read_text()
    # over all sets the bootstrap draws within each: 4 strata, two of them far from the others
    pooled = table["all", "4 sets", "iql"]
    strata = [pen, pen, pen + 1000, pen + 1000]
    draws = [np.sort(np.concatenate([rng.choice(x, 6) for x in strata]))[6:18].mean() for _ in range(10_000)]
    middle, low, high = map(float, re.findall(r"[\d.]+", pooled[3]))
    assert pooled[1:3] == ["24", f"{np.mean(strata):.1f}"]
    assert middle == round(np.sort(np.concatenate(strata))[6:18].mean(), 1)
    assert np.allclose((low, high), np.percentile(draws, (2.5, 97.5)), rtol=0.05)


def test_finetune(benchmark):
    output = benchmark(FINETUNE="1", ONLINE_STEPS="300", OUT="runs/benchmark", DATASETS="cloned")
    rows = {key[2]: row for key, row in benchmark.table().items()}
    assert (rows["iql offline"][0], rows["iql offline"][2]) == ("1000", "30.0 ± 10.0")
    assert (rows["iql online"][0], rows["iql online"][2]) == ("1300", "90.0 ± 30.0")
    assert ("84.19" in rows["iql offline"][-2], "102.02" in rows["iql online"][-2]) == (True, True), output


@pytest.mark.parametrize("to_group", [True, False], ids=["SIGINT to all", "SIGTERM to the script"])
def test_stop_and_resume(benchmark, to_group):
    process = benchmark.start(EXTRA="--slow", SEEDS="1 2 3")
    benchmark.wait_for("runs/*/checkpoint.pt", 2)
    assert len(benchmark.processes()) >= 5  # itself, two runs and their children
    os.killpg(process.pid, signal.SIGINT) if to_group else process.terminate()
    output, errors = process.communicate(timeout=20)
    assert process.returncode == (130 if to_group else 143), output + errors
    assert benchmark.processes() == []
    assert len(list(benchmark.out.glob("runs/*"))) == 2  # nothing was started after the signal
    for path in benchmark.out.glob("runs/*__2__*/checkpoint.pt"):
        path.unlink()  # as if this one had been killed before its first

    process = benchmark.start(EXTRA="--slow", SEEDS="1 2 3")
    benchmark.wait_for("runs/*/checkpoint.pt", 3)
    process.terminate()
    process.communicate(timeout=20)
    logs = benchmark.logs()
    (resumed,) = (log for name, log in logs.items() if name.endswith("__1"))
    (afresh,) = (log for name, log in logs.items() if name.endswith("__2"))
    (run_dir,) = benchmark.out.glob("runs/*__1__*")
    assert started(resumed)["argv"] == ["--resume", f"runs/{run_dir.name}"]
    assert "final: done" in resumed and resumed.count("started:") == 2  # appended, not overwritten
    assert "--resume" not in started(afresh)["argv"]
    benchmark(EXTRA="--slow", SEEDS="1 2 3")
    assert all("final: done" in log for log in benchmark.logs().values())
    assert {name[-1]: row for name, row in benchmark.table().items()}["iql"][1] == "3"
    logs = benchmark.logs()
    assert "3 finished before" in benchmark(EXTRA="--slow", SEEDS="1 2 3")
    assert benchmark.logs() == logs


def test_second_signal_kills(benchmark):
    process = benchmark.start(EXTRA="--slow --deaf")
    benchmark.wait_for("runs/*/evaluations.csv", 2)
    process.terminate()
    time.sleep(1.5)
    assert process.poll() is None and len(benchmark.processes()) >= 5
    process.terminate()
    process.communicate(timeout=20)
    assert process.returncode == 143
    assert benchmark.processes() == []


def test_failed_run(benchmark):
    output = benchmark(SEEDS="13 1 2", status=1)
    assert "2 done, 0 running, 1 failed, 0 waiting" in output
    assert "There is no luck in 13." in output
    assert "__13 is not finished" in output and "__1 is not finished" not in output
    assert benchmark.table()["AdroitHandPen-v1", "D4RL/pen/human-v2", "iql"][1] == "2"
    assert "1 more runs are not finished" in (benchmark.out / "report.md").read_text()
    assert "There is no luck in 13." in benchmark("--report", status=1)


def test_a_run_is_not_started_twice(benchmark):
    process = benchmark.start(EXTRA="--slow")
    benchmark.wait_for("runs/*/checkpoint.pt", 2)
    output = benchmark(EXTRA="--slow", status=1)
    assert output.count("is being run by another process") == 2
    assert len(list(benchmark.out.glob("runs/*"))) == 2
    process.terminate()
    process.communicate(timeout=20)


@pytest.mark.parametrize("visible", [None, "4,GPU-abc"])
def test_gpus(benchmark, visible):
    benchmark.add_tool("nvidia-smi", "printf '0\\n1\\n'")
    benchmark.add_tool("nproc", "echo ${OMP_NUM_THREADS:-18}")
    benchmark.env.pop("CUDA_VISIBLE_DEVICES")
    env = {"CUDA_VISIBLE_DEVICES": visible} if visible else {}
    output = benchmark(WORKERS_PER_GPU="3", SEEDS="1 2 3 4 5 6", EXTRA="--beta 1", OMP_NUM_THREADS="1", **env)
    assert "6 at a time on 2 GPUs and 18 cores" in output
    starts = [started(log) for log in benchmark.logs().values()]
    first, second = (visible or "0,1").split(",")
    assert sorted(start["CUDA_VISIBLE_DEVICES"] for start in starts) == sorted([first] * 3 + [second] * 3)
    assert {start["OMP_NUM_THREADS"] for start in starts} == {"3"}
    assert {start["argv"][start["argv"].index("--eval-envs") + 1] for start in starts} == {"3"}


def test_cpu(benchmark):
    """One worker a core; nvidia-smi without a driver is no GPU."""
    benchmark.add_tool("nvidia-smi", "echo NVIDIA-SMI has failed; exit 9")
    benchmark.add_tool("nproc", "echo 3")
    benchmark.env.pop("WORKERS")
    benchmark.env.pop("CUDA_VISIBLE_DEVICES")
    assert "3 at a time on 0 GPUs and 3 cores" in benchmark()
    assert {
        (start["CUDA_VISIBLE_DEVICES"], start["OMP_NUM_THREADS"], start["argv"][1])
        for start in map(started, benchmark.logs().values())
    } == {("", "1", "1")}


def test_datasets_are_downloaded_once(benchmark):
    (benchmark.folder / "sets" / "D4RL" / "pen" / "human-v2" / "data").mkdir(parents=True)
    output = benchmark(DATASETS="human cloned", MINARI_DATASETS_PATH="sets")
    assert re.findall("downloading (.*)", output) == ["D4RL/pen/cloned-v2"]
    # the runs are started elsewhere, a relative path would mislead them
    paths = {started(log)["MINARI_DATASETS_PATH"] for log in benchmark.logs().values()}
    assert paths == {str(benchmark.folder / "sets")}


def test_slurm(benchmark):
    """What sbatch is told; its jobs are then run here."""
    benchmark.add_tool("sbatch", 'printf "%s\\n" "$@" > "$HOME/sbatch"; env > "$HOME/sbatch_env"')
    env = {"ENGINE": "slurm", "SEEDS": "1 2 3 4 13", "GPUS": "0", "CPUS": "2", "PARTITION": "night", "TIME_LIMIT": "60"}
    del benchmark.env["WORKERS"]
    benchmark(SBATCH_FLAGS="--account me --nice", **env)
    told = (benchmark.folder / "sbatch").read_text().splitlines()
    wanted = ["--array=0,1,2", "--cpus-per-task=2", "--partition=night", "--time=60", f"--chdir={benchmark.out}"]
    assert set([*wanted, "--account", "me", "--nice"]) <= set(told)
    assert not any(flag.startswith("--gres") for flag in told)
    (wrapped,) = (flag.removeprefix("--wrap=") for flag in told if flag.startswith("--wrap="))
    job_env = dict(
        line.split("=", 1) for line in (benchmark.folder / "sbatch_env").read_text().splitlines() if "=" in line
    )
    for task, status in (("0", 0), ("1", 0), ("2", 1)):
        job_env |= {"SLURM_ARRAY_TASK_ID": task, "SLURM_CPUS_PER_TASK": "2"}
        job = subprocess.run(["sh", "-c", wrapped], env=job_env, cwd=benchmark.out, capture_output=True, text=True)
        assert job.returncode == status, job.stdout + job.stderr
        assert f"{1 if task == '2' else 2} runs into" in job.stdout
    assert "There is no luck in 13." in benchmark("--report", status=1)
    assert benchmark.table()["AdroitHandPen-v1", "D4RL/pen/human-v2", "iql"][1] == "4"
    benchmark(**env)  # only what is not finished, by the same number
    assert "--array=2" in (benchmark.folder / "sbatch").read_text().splitlines()
    benchmark(**env | {"GPUS": "2", "WORKERS_PER_GPU": "2"})
    told = (benchmark.folder / "sbatch").read_text().splitlines()
    assert {"--gres=gpu:2", "--array=1"} <= set(told)


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
    for name in "bash env nproc realpath dirname mkdir setsid flock".split():
        (benchmark.folder / "bin" / name).symlink_to(shutil.which(name))
    assert "sbatch is not on the PATH" in benchmark(ENGINE="slurm", PATH=str(benchmark.folder / "bin"), status=2)


def test_sbatch_refuses(benchmark):
    benchmark.add_tool("sbatch", "echo invalid partition >&2; exit 1")
    output = benchmark(ENGINE="slurm", status=2)
    assert "invalid partition" in output and "sbatch refused" in output


def test_options(benchmark):
    assert "--no is not an option" in benchmark("--no", status=2)
    assert "--task is for the jobs of a Slurm array" in benchmark("--task", status=2)
    assert "holds no finished run" in benchmark("--report", status=1)


def test_other_flags_need_another_folder(benchmark):
    benchmark()
    logs = benchmark.logs()
    assert "was run with other flags" in benchmark(UPDATES="2000", status=2)
    assert "was run with other flags" in benchmark(SEEDS="3", EXTRA="--beta 1", status=2)
    assert benchmark.logs() == logs
    benchmark(SEEDS="3", WORKERS="1")  # how many run at a time is no such flag
