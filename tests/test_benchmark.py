"""benchmark.sh on the real script once, else on a stand-in for it that learns nothing."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import processes
import pytest

ROOT, BASH = Path(__file__).parent.parent, shutil.which("bash")
# It says how it was started, has a child as the scripts have for evaluation, and stops as they do. It names its folder
# in its own way. Seed 13 fails; "--slow" takes forever until it is resumed, "--deaf" does not hear SIGTERM either.
STAND_IN = """
import argparse, json, os, signal, subprocess, sys, time
from pathlib import Path

def load_dataset(env_id, dataset_id):
    print("getting", dataset_id, "for", env_id, flush=True)
    if "slow" in dataset_id:
        Path(os.environ["HOME"], "getting").touch()
        time.sleep(600)
    if "lost" in dataset_id:
        sys.exit("There is no such set.")

def stop(signum, frame):
    print("Stopped", flush=True)
    child.kill()
    os._exit(128 + signum)

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name in ("env-id", "dataset-id", "exp-name", "resume", "beta", "seed"):
        parser.add_argument("--" + name)
    for name in ("total-updates", "offline-updates", "online-steps"):
        parser.add_argument("--" + name, type=int, default=0)
    for name in ("slow", "deaf"):
        parser.add_argument("--" + name, action="store_true")
    args = parser.parse_args()
    names = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MINARI_DATASETS_PATH")
    print("started:", json.dumps({"argv": sys.argv[1:], **{name: os.environ.get(name) for name in names}}))
    if args.seed == "13":
        sys.exit("There is no luck in 13.")
    run_dir = Path(args.resume or f"runs/{args.exp_name}-of-the-script__{args.seed}__{time.time_ns()}")
    run_dir.mkdir(parents=True, exist_ok=True)
    print(f"{run_dir}: {args.env_id} with {args.dataset_id}")
    done, total = run_dir / "checkpoint.pt", args.total_updates or args.offline_updates + args.online_steps
    if args.resume and total < int(done.read_text()):
        sys.exit(f"{run_dir} has done {done.read_text()} updates already.")
    child = subprocess.Popen(["sleep", "600"])
    signal.signal(signal.SIGTERM, signal.SIG_IGN if args.deaf else stop)
    done.write_text(str(total))
    time.sleep(600 * args.slow)
    child.kill()
    print("final: version 1")
"""
REPORT = "import sys, pathlib; print(len(list(pathlib.Path(sys.argv[1]).glob('runs/*'))), 'runs in', sys.argv[1])"
VARIABLES = "TASKS DATASETS VARIANTS SEEDS UPDATES FINETUNE ONLINE_STEPS SCRIPT EXTRA OUT PYTHON WORKERS_PER_GPU ENGINE"
VARIABLES = [*VARIABLES.split(), "WORKERS", "SBATCH_FLAGS"]
# CUDA_VISIBLE_DEVICES, what nvidia-smi does, what benchmark.sh says of it, and the devices of the runs
SLOTS = [(None, "printf '0\\n1\\n'", "4 at a time on 2 GPUs and 12 cores", ["0", "0", "1", "1"])]
SLOTS += [("4, GPU-a,MIG-b", "exit 1", "6 at a time on 3 GPUs and 12 cores", ["4", "4", "GPU-a", "GPU-a", "MIG-b"])]
SLOTS += [(None, "echo NVIDIA-SMI has failed; exit 9", "12 at a time on 0 GPUs and 12 cores", [""] * 5)]


class Benchmark:
    """benchmark.sh in a folder of its own beside stand-ins for the scripts; `env` is what it is started with."""

    def __init__(self, folder):
        self.folder, self.out = folder, folder / "runs" / "benchmark"
        shutil.copy(ROOT / "benchmark.sh", folder)
        for name in ("bin", "docs"):
            (folder / name).mkdir()
        for name in ("iql_continuous.py", "iql_finetune.py"):
            (folder / name).write_text(STAND_IN)
        (folder / "docs" / "report.py").write_text(REPORT)
        self.env = {name: value for name, value in os.environ.items() if name not in VARIABLES}
        self.env |= {"PYTHON": sys.executable, "HOME": str(folder), "CUDA_VISIBLE_DEVICES": ""}
        self.env |= {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "WORKERS": "2", "UPDATES": "1000"}
        self.env |= {"TASKS": "AdroitHandPen-v1", "DATASETS": "human", "SEEDS": "1 2"}

    def add_tool(self, name, script):
        (self.folder / "bin" / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (self.folder / "bin" / name).chmod(0o755)

    def start(self, *args, script="benchmark.sh", **env):
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
        # what started the tests may ignore SIGINT, as shells do in the background, and bash cannot undo that
        streams["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
        return subprocess.Popen([BASH, script, *args], cwd=self.folder, env={**self.env, **env}, **streams)

    def __call__(self, *args, status=0, **env):
        process = self.start(*args, **env)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == status, output
        return output

    def logs(self):
        return {path.stem: path.read_text() for path in sorted(self.out.glob("logs/*.log"))}

    def starts(self):
        """How each run was started the last time."""
        return {name: json.loads(re.findall("^started: (.*)$", log, re.M)[-1]) for name, log in self.logs().items()}

    def wait_for(self, condition):
        deadline = time.time() + 120
        while not condition():
            assert time.time() < deadline, (self.processes(), self.logs())
            time.sleep(0.05)

    def wait_for_checkpoints(self, count):
        self.wait_for(lambda: len(list(self.out.glob("runs/*/checkpoint.pt"))) >= count)

    def processes(self):
        """The numbers of all that was started here and still runs; a zombie has no environment."""
        command = f"grep -lsxz HOME={self.folder} /proc/[0-9]*/environ"
        found = subprocess.run(command, shell=True, capture_output=True, text=True).stdout
        return [int(path.split("/")[2]) for path in found.split()]


@pytest.fixture
def benchmark(tmp_path):
    benchmark = Benchmark(tmp_path)
    yield benchmark
    if left := benchmark.processes():  # of a test that failed
        subprocess.run(["kill", "-KILL", *map(str, left)])


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck():
    subprocess.run(["shellcheck", ROOT / "benchmark.sh"], check=True)


def test_a_real_run_with_its_report(benchmark):
    """A copy under its own name goes on with a run that was begun by the benchmark's command; the report marks it."""
    shutil.copytree(ROOT / "docs", benchmark.folder / "docs", dirs_exist_ok=True)
    (benchmark.out / "logs").mkdir(parents=True)
    script = Path(shutil.copy(ROOT / "iql_continuous.py", benchmark.out / "mine.py"))
    flags = "--eval-frequency 2 --eval-episodes 1 --final-episodes 2 --eval-envs 1 --max-episodes 3"
    command = f"--env-id tiny_env:Tiny-v0 --dataset-id tiny/good-v0 --exp-name mine.tiny.good-v0 {flags} --seed 3"
    printed = processes.run(script, benchmark.out, f"{command} --total-updates 2", tiny=False)
    (benchmark.out / "logs" / "tiny_env_Tiny-v0__mine.tiny.good-v0__3.log").write_text(f"mine.py {command}\n{printed}")
    env = {"SCRIPT": str(script), "TASKS": "tiny_env:Tiny-v0", "DATASETS": "tiny/good-v0", "SEEDS": "3", "EXTRA": flags}
    output = benchmark(UPDATES="4", PYTHONPATH=str(ROOT / "tests"), **env)
    assert (benchmark.out / "report.md").read_text() in output
    (run,) = csv.DictReader((benchmark.out / "results.csv").open())
    assert list(run.values())[1:5] == ["tiny/good-v0[:3]", "mine", "3", "2->4"]
    *_, last = csv.DictReader((processes.run_dir(benchmark.out) / "evaluations.csv").open())
    assert (last["global_step"], float(last["episodic_return"])) == ("4", float(run["final"]))


def test_commands(benchmark):
    """Each task, dataset, variant and seed once, in an odd folder without locks and through a symbolic link."""
    benchmark.add_tool("flock", "exit 71")
    (benchmark.folder / "link").mkdir()
    (benchmark.folder / "link" / "it.sh").symlink_to("../benchmark.sh")
    tasks = {"pen": "AdroitHandPen-v1", "hammer": "AdroitHandHammer-v1"}
    env = {"DATASETS": "human own/{task}-v0", "VARIANTS": "iql;\n bc\n --beta 0", "OUT": "my [1] out"}
    env |= {"TASKS": " ".join(tasks.values()), "MINARI_DATASETS_PATH": "sets", "EXTRA": "--beta 2\n--beta 3"}
    benchmark.out = benchmark.folder / "my [1] out"
    output = benchmark(script="link/it.sh", **env)
    assert f"16 runs in {benchmark.out}" in output and output.count("is not locked") == 16
    data, variants, wanted = ("D4RL/{}/human-v2", "own/{}-v0"), (("iql", ""), ("bc", "--beta 0")), {}
    for (task, env_id), data_id, (label, flags), seed in product(tasks.items(), data, variants, "12"):
        name = f"{label}.{data_id.format(task).replace('/', '.')}"
        command = f"--env-id {env_id} --dataset-id {data_id.format(task)} --exp-name {name} --beta 2 --beta 3 {flags}"
        wanted[f"{env_id}__{name}__{seed}"] = [*command.split(), "--seed", seed, "--total-updates", "1000"]
    assert {name: start["argv"] for name, start in benchmark.starts().items()} == wanted
    assert {start["MINARI_DATASETS_PATH"] for start in benchmark.starts().values()} == {str(benchmark.folder / "sets")}
    assert (benchmark.out / "tests").readlink() == benchmark.folder / "tests"  # where the bundled sets are


def test_finetune(benchmark):
    """What a run begins with cannot be changed, but it can be lengthened."""
    benchmark.out = benchmark.folder / "runs" / "benchmark_finetune"
    benchmark(FINETUNE="1", ONLINE_STEPS="300", SEEDS="1")
    (start,) = benchmark.starts().values()
    assert start["argv"][-6:] == "--offline-updates 1000 --seed 1 --online-steps 300".split()
    assert "has other flags" in benchmark(FINETUNE="1", ONLINE_STEPS="300", SEEDS="1", UPDATES="2000", status=2)
    benchmark(FINETUNE="1", ONLINE_STEPS="1400", SEEDS="1")
    (start,) = benchmark.starts().values()
    assert (start["argv"][0], start["argv"][2:]) == ("--resume", ["--online-steps", "1400"])


def test_finished_runs_go_on_with_more_updates(benchmark):
    """With fewer they end in a message, and nothing is lost. A run whose folder is gone is done again."""
    benchmark()
    logs = benchmark.logs()
    assert benchmark().count("was finished before") == 2
    assert benchmark.logs() == logs
    benchmark(UPDATES="2000", SEEDS="1")
    (run,) = benchmark.out.glob("runs/*__1__*")
    first, _ = benchmark.starts().values()
    assert first["argv"] == ["--resume", f"runs/{run.name}", "--total-updates", "2000"]
    shutil.rmtree(*benchmark.out.glob("runs/*__2__*"))
    assert "has done 2000 updates already" in benchmark(status=1)
    assert len(list(benchmark.out.glob("runs/*"))) == 2
    benchmark(UPDATES="2000")


def test_results_of_two_versions_do_not_mix(benchmark):
    """Not by an edit, not under one label; the old version can be gone on with."""
    benchmark()
    logs, script = benchmark.logs(), benchmark.folder / "iql_continuous.py"
    script.write_text(script.read_text().replace("version 1", "version 2"))
    output = benchmark(SEEDS="3", UPDATES="2000", status=2)
    assert "benchmark is of another iql_continuous.py: set OUT, rename yours" in output
    script.rename(script.with_name("my.variant.py"))
    output = benchmark(SEEDS="3", VARIANTS="mine; iql_continuous", SCRIPT="my.variant.py", status=2)
    assert "iql_continuous is the label of another script's runs" in output
    assert benchmark.logs() == logs
    benchmark(SEEDS="3", SCRIPT="my.variant.py")
    benchmark(SEEDS="4", SCRIPT="runs/benchmark/iql_continuous.py")
    found = {tuple(name.split("__")[1:]): log.split("version ")[1][0] for name, log in benchmark.logs().items()}
    old = {("iql_continuous.D4RL.pen.human-v2", seed): "1" for seed in "124"}
    assert found == {**old, ("my.variant.D4RL.pen.human-v2", "3"): "2"}


def test_other_flags_need_another_folder(benchmark):
    """But those of a run that never began can be corrected."""
    assert "unrecognized arguments: --bta 1" in benchmark(EXTRA="--bta 1", status=1)
    benchmark(EXTRA="--beta 1")
    logs = benchmark.logs()
    assert "has other flags" in benchmark(SEEDS="3 1", EXTRA="--beta 2", status=2)
    assert benchmark.logs() == logs


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stop(benchmark, number):
    """Meanwhile no other call starts the same runs; afterwards nothing runs, not even what does not listen."""
    flags = "--slow --deaf" if number == signal.SIGTERM else "--slow"
    process = benchmark.start(EXTRA=flags, SEEDS="1 2 3")
    benchmark.wait_for_checkpoints(2)
    assert benchmark(EXTRA=flags, status=1).count("it is being run already") == 2
    assert len(benchmark.processes()) >= 7  # itself, xargs, its shells, two runs and their children
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + number and "stopping; the same command goes on" in output, output
    benchmark.wait_for(lambda: not benchmark.processes())
    assert len(list(benchmark.out.glob("runs/*"))) == 2
    assert [log.count("Stopped") for log in benchmark.logs().values()] == [0 if "--deaf" in flags else 1] * 2


def test_runs_that_were_killed_go_on(benchmark):
    """From their checkpoint, or afresh if they have none yet."""
    env = {"EXTRA": "--slow", "SEEDS": "1 2 3"}
    process = benchmark.start(**env)
    benchmark.wait_for_checkpoints(2)
    for pid in benchmark.processes():
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=120)
    benchmark.wait_for(lambda: not benchmark.processes())
    (first,), (second,) = (list(benchmark.out.glob(f"runs/*__{seed}__*")) for seed in (1, 2))
    (second / "checkpoint.pt").unlink()
    process = benchmark.start(**env)
    benchmark.wait_for_checkpoints(3)
    process.terminate()
    process.communicate(timeout=120)
    resumed, afresh, _ = benchmark.starts().values()
    assert resumed["argv"] == ["--resume", f"runs/{first.name}", "--total-updates", "1000"]
    assert "--resume" not in afresh["argv"]
    benchmark(**env)
    assert [log.count("started:") for log in benchmark.logs().values()] == [2, 3, 2]  # appended, not overwritten


@pytest.mark.parametrize("moment", ["comparing", "getting"])
def test_stop_before_the_runs(benchmark, moment):
    """Also while bash waits for a command that the signal does not reach."""
    benchmark.add_tool("cmp", f'touch "$HOME/comparing" && sleep {int(moment == "comparing")}')
    process = benchmark.start(DATASETS="own/slow-v0")
    benchmark.wait_for((benchmark.folder / moment).exists)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode == 130
    benchmark.wait_for(lambda: not benchmark.processes())
    assert not benchmark.logs()


def test_failed_runs(benchmark):
    """The others go on. What the last call did not ask for does not count, but a report that fails does."""
    output = benchmark(SEEDS="13 1 2", status=1)
    assert output.count("getting D4RL/pen/human-v2 for AdroitHandPen-v1\n") == 1  # before runs that start together
    assert output.count(" FAILED ") == 1 and output.count(" finished ") == 2
    failed = "logs/AdroitHandPen-v1__iql_continuous.D4RL.pen.human-v2__13.log <==\n"
    for text in (output, benchmark("--report", status=1)):
        assert failed in text and "There is no luck in 13." in text and text.count("<==") == 1 and "2 runs in" in text
    benchmark(SEEDS="1")
    benchmark.add_tool("mortal", f'[[ $* != *--resume* ]] || kill -KILL $$; exec {sys.executable} "$@"')
    assert " FAILED " in benchmark(SEEDS="1", UPDATES="2000", PYTHON="mortal", status=1)  # without a word in its log
    (benchmark.folder / "docs" / "report.py").write_text("raise SystemExit(3)")
    benchmark(SEEDS="1", status=1)


@pytest.mark.parametrize("engine", ["local", "slurm"])
def test_no_run_is_begun_without_its_dataset(benchmark, engine):
    benchmark.add_tool("sbatch", 'touch "$HOME/sbatch"')
    output = benchmark(ENGINE=engine, DATASETS="own/lost-v0 human own/lost-v1", status=1)
    lost = [f"AdroitHandPen-v1 own/lost-v{version}: There is no such set." for version in (0, 1)]
    assert output.splitlines()[-3:] == ["No run is begun, for datasets that cannot be had:", *lost]
    assert not benchmark.logs() and not (benchmark.folder / "sbatch").exists()


@pytest.mark.parametrize("visible, smi, slots, devices", SLOTS)
def test_slots(benchmark, visible, smi, slots, devices):
    """Five seeds, at once where they can: a slot that is free again would be used twice. A run has one thread."""
    benchmark.add_tool("nvidia-smi", smi)
    benchmark.add_tool("nproc", "echo ${OMP_NUM_THREADS:-12}")
    for name in ("CUDA_VISIBLE_DEVICES", "WORKERS", "SEEDS"):
        del benchmark.env[name]
    env = {"CUDA_VISIBLE_DEVICES": visible} if visible else {}
    process = benchmark.start(WORKERS_PER_GPU="2", EXTRA="--slow", OMP_NUM_THREADS="5", **env)
    benchmark.wait_for_checkpoints(len(devices))
    process.terminate()
    output, starts = process.communicate(timeout=120)[0], benchmark.starts()
    assert slots in output and "5 runs into" in output
    assert sorted(start["CUDA_VISIBLE_DEVICES"] for start in starts.values()) == devices
    assert {start["OMP_NUM_THREADS"] for start in starts.values()} == {"1"}
    assert [name[-1] for name in starts] == list("12345"[: len(devices)])


def test_slurm(benchmark):
    """What sbatch is told; its jobs are then run here."""
    benchmark.add_tool("sbatch", 'printf "%s\\n" "$@" > "$HOME/sbatch"; env > "$HOME/sbatch_env"')
    benchmark.add_tool("nproc", "echo 12")
    (benchmark.folder / "my.py").write_text(STAND_IN)
    benchmark.out = benchmark.folder / "my [1] out"
    env = {"OUT": "my [1] out", "SCRIPT": "my.py", "ENGINE": "slurm", "WORKERS_PER_GPU": "2", "WORKERS": ""}
    benchmark(SEEDS="1 2 13 3", SBATCH_FLAGS="--account me --nice", **env)
    told = (benchmark.folder / "sbatch").read_text().splitlines()
    assert {"--array=0-1", "--account", "me", "--nice", f"--output={benchmark.out}/logs/%A_%a.out"} <= set(told)
    assert told.index("--export=ALL") > told.index("--nice")  # the last one counts
    (wrapped,) = (flag.removeprefix("--wrap=") for flag in told if flag.startswith("--wrap="))
    job_env = dict(re.findall("^(.*?)=(.*)$", (benchmark.folder / "sbatch_env").read_text(), re.M))
    (benchmark.folder / "my.py").write_text("edited while the jobs wait")
    for task, status in (("0", 0), ("1", 1)):
        job_env |= {"SLURM_ARRAY_TASK_ID": task, "SLURM_CPUS_PER_TASK": "2"}
        job = subprocess.run(["sh", "-c", wrapped], env=job_env, cwd=benchmark.out, capture_output=True, text=True)
        assert job.returncode == status, job.stdout + job.stderr
        assert "2 runs into" in job.stdout and ", 2 at a time on 0 GPUs" in job.stdout
        assert "getting" not in job.stdout and "runs in /" not in job.stdout
    assert list(benchmark.starts()) == [f"AdroitHandPen-v1__my.D4RL.pen.human-v2__{seed}" for seed in (1, 13, 2, 3)]
    output = benchmark("--report", status=1, OUT="my [1] out")
    assert "There is no luck in 13." in output and "3 runs in" in output


@pytest.mark.parametrize(
    ("env", "sentence"),
    [
        ({"ENGINE": "foo"}, "ENGINE=foo"),
        ({"FINETUNE": "yes"}, "FINETUNE=yes must be 0 or 1"),
        ({"WORKERS": "0"}, "WORKERS=0 "),
        ({"VARIANTS": "iql; --beta 0"}, "VARIANTS are labels with flags, not '--beta 0'"),
        ({"VARIANTS": "iql;"}, "VARIANTS are labels with flags, not ' '"),
        ({"VARIANTS": "iql; iql --beta 0"}, "AdroitHandPen-v1__iql.D4RL.pen.human-v2__1 is asked for twice"),
        ({"PYTHON": "no_such_python"}, "'no_such_python' is not there"),
        ({"SCRIPT": "no_such.py"}, "no_such.py"),
        ({"SCRIPT": "my variant.py"}, "'my variant.py' must be a name of"),
        ({"EXTRA": "--exp_name=x"}, "EXTRA and VARIANTS cannot have --exp_name"),
        ({"VARIANTS": "a --beta 0\n--total-updates 5; b"}, "EXTRA and VARIANTS cannot have --total-updates"),
        ({"ENGINE": "slurm", "PATH": "no_tools"}, "ENGINE=slurm needs sbatch"),
        ({"options": ["--report"]}, "nothing was run there yet"),
        ({"options": ["--reprot"]}, "'--reprot' is no option"),
        ({"options": ["SEEDS=1"]}, "'SEEDS=1' is no option, see --help. Variables stand before bash."),
    ],
)
def test_what_is_mistyped_is_named(benchmark, env, sentence):
    process = benchmark.start(*env.pop("options", ()), **env)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and sentence in output.splitlines()[-1], output
    assert not benchmark.logs()


def test_help_lists_the_variables(benchmark):
    text = benchmark("--help")
    assert [name for name in VARIABLES if not re.search(rf"\b{name}\b", text)] == []
