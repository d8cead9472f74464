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

ROOT, BASH, TOOLS = Path(__file__).parent.parent, shutil.which("bash"), "realpath nproc flock setsid".split()
# It says how it was started, has a child as the scripts have for evaluation, and stops as they do. It names its folder
# in its own way. Seed 13 fails; "--slow" takes forever until it is resumed, "--deaf" does not hear SIGTERM either.
STAND_IN = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace as Some
def make_env(env_id):
    if "lost" in env_id:
        raise ImportError("There is no such module.")
    return lambda: Some(observation_space=Some(shape=(3,)), action_space=Some(shape=(2,)))
def load_dataset(env_id, dataset_id):
    print("getting", dataset_id, "for", env_id, flush=True)
    if "slow" in dataset_id:
        Path(os.environ["HOME"], "getting").touch()
        time.sleep(600)
    if "lost" in dataset_id:
        sys.exit("There is no such set.")
def stop(signum, frame):
    os.write(1, b"Stopped\\n")
    child.kill()
    os._exit(128 + signum)
if __name__ == "__main__":
    args, names = sys.argv[1:], ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MINARI_DATASETS_PATH", "PYTHONPATH")
    print("started:", json.dumps({"argv": args, **{name: os.environ.get(name) for name in names}}))
    given = dict(zip(args, [*args[1:], ""]))
    env_id, dataset_id, exp_name, seed = (given.get("--" + name) for name in "env-id dataset-id exp-name seed".split())
    if seed == "13" or "--bta" in args:
        sys.exit("There is no luck in this.")
    run_dir = Path(given.get("--resume", f"runs/{exp_name}-of-the-script__{seed}__{time.time_ns()}"))
    run_dir.mkdir(parents=True, exist_ok=True)
    print(f"{run_dir}: {env_id} with {dataset_id}")
    total = sum(int(given.get("--" + name, 0)) for name in "total-updates offline-updates online-steps".split())
    if "--resume" in args and total < int((run_dir / "checkpoint.pt").read_text()):
        sys.exit(f"{run_dir} is longer already.")
    child = subprocess.Popen(["sleep", "600"])
    signal.signal(signal.SIGTERM, signal.SIG_IGN if "--deaf" in args else stop)
    (run_dir / "checkpoint.pt").write_text(str(total))
    time.sleep(600 * ("--slow" in args))
    child.kill()
    print("final: version 1")
"""
REPORT = "import sys, pathlib; print(len(list(pathlib.Path(sys.argv[1]).glob('runs/*'))), 'runs in', sys.argv[1])"
VARIABLES = {*re.findall(r'"\$\{([A-Z_]+):?=', (ROOT / "benchmark.sh").read_text())}
FIXED = "env-id dataset-id exp-name seed resume total-updates offline-updates online-steps".split()
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
DEFAULTS = (("Pen", "Hammer"), ("human", "cloned", "expert"))
# CUDA_VISIBLE_DEVICES, what nvidia-smi does, what benchmark.sh says of it, and the devices of the runs
SLOTS = [(None, "printf '0\\n1\\n'", "4 at a time on 2 GPUs and 12 cores", ["0", "0", "1", "1"])]
SLOTS += [("4, GPU-a,MIG-b", "exit 1", "6 at a time on 3 GPUs and 12 cores", ["4", "4", "GPU-a", "GPU-a", "MIG-b"])]
SLOTS += [(None, "echo NVIDIA-SMI has failed; exit 9", "12 at a time on 0 GPUs and 12 cores", [""] * 5)]


class Benchmark:
    """benchmark.sh in a folder of its own beside stand-ins for the scripts; `env` is what it is started with."""

    def __init__(self, folder):
        self.folder, self.out = folder, folder / "runs" / "benchmark"
        for name in ("bin", "docs", "tools", "elsewhere/runs/benchmark"):
            (folder / name).mkdir(parents=True)
        for name in ("benchmark.sh", "elsewhere/slurm_script"):  # sbatch runs such a copy
            shutil.copy(ROOT / "benchmark.sh", folder / name)
        for name in TOOLS:
            (folder / "tools" / name).symlink_to(shutil.which(name))
        for name in ("iql_continuous.py", "iql_finetune.py"):
            (folder / name).write_text(STAND_IN)
        (folder / "docs" / "report.py").write_text(REPORT)
        self.env = {name: value for name, value in os.environ.items() if name not in VARIABLES}
        self.env |= {"PYTHON": sys.executable, "HOME": str(folder), "CUDA_VISIBLE_DEVICES": "", "CDPATH": "elsewhere"}
        self.env |= {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "WORKERS": "2", "UPDATES": "1000"}
        self.env |= {"TASKS": "AdroitHandPen-v1", "DATASETS": "human", "SEEDS": "1 2"}

    def add_tool(self, name, script):
        (self.folder / "bin" / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (self.folder / "bin" / name).chmod(0o755)

    def start(self, *args, script="benchmark.sh", **env):
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
        # what started the tests may ignore signals, as shells in the background and nohup do, and bash cannot undo that
        streams["preexec_fn"] = lambda: [signal.signal(number, signal.SIG_DFL) for number in STOPS]
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

    def wait_for(self, condition, process=None):
        """Fails when the process has ended before."""
        deadline = time.time() + 30
        while not condition():
            alive = process is None or process.poll() is None
            assert alive and time.time() < deadline, (self.processes(), self.logs())
            time.sleep(0.05)

    def start_slow(self, checkpoints, **env):
        """Runs that take forever, when so many have a checkpoint."""
        process = self.start(**{"EXTRA": "--slow", **env})
        self.wait_for(lambda: len(list(self.out.glob("runs/*/checkpoint.pt"))) >= checkpoints, process)
        return process

    def end(self, process, status):
        """What a process said until this end, which leaves nothing behind."""
        assert process.wait(timeout=30) == status, self.logs()  # before its pipe, which what it left may hold
        output, _ = process.communicate(timeout=30)
        self.wait_for(lambda: not self.processes())
        return output

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
    """One's own script on one's own environment goes on with what it began before; the report marks that."""
    shutil.copytree(ROOT / "docs", benchmark.folder / "docs", dirs_exist_ok=True)
    shutil.copy(ROOT / "tests" / "tiny_env.py", benchmark.folder)
    (benchmark.out / "logs").mkdir(parents=True)
    script = Path(shutil.copy(ROOT / "iql_continuous.py", benchmark.out / "mine.py"))
    flags = "--eval-frequency 2 --eval-episodes 2 --eval-envs 1 --max-episodes 3"
    command = f"--env-id tiny_env:Tiny-v0 --dataset-id tiny/good-v0 --exp-name mine.tiny.good-v0 {flags} --seed 3"
    printed = processes.run(script, benchmark.out, f"{command} --total-updates 2", tiny=False)
    (benchmark.out / "logs" / "tiny_env_Tiny-v0__mine.tiny.good-v0__3.log").write_text(f"mine.py {command}\n{printed}")
    env = {"SCRIPT": str(script), "TASKS": "tiny_env:Tiny-v0", "DATASETS": "tiny/good-v0", "SEEDS": "3", "EXTRA": flags}
    output, run = benchmark(UPDATES="4", **env), processes.run_dir(benchmark.out)
    assert (benchmark.out / "report.md").read_text() in output
    (row,) = csv.DictReader((benchmark.out / "results.csv").open())
    *_, last = csv.DictReader((run / "evaluations.csv").open())
    assert list(row.values())[1:5] == ["tiny/good-v0[:3]", "mine", "3", run.name] and row["updates"] == "2->4"
    assert (last["global_step"], float(last["episodic_return"])) == ("4", float(row["final"]))


def test_commands(benchmark):
    """Each task, dataset, variant and seed once, in an odd folder without locks and through a symbolic link."""
    benchmark.add_tool("flock", "exit 71")
    (benchmark.folder / "link").mkdir()
    (benchmark.folder / "link" / "it.sh").symlink_to("../benchmark.sh")
    tasks = {"pen": "AdroitHandPen-v1", "hammer": "AdroitHandHammer-v1"}
    env = {"DATASETS": "human own/{task}-v0", "VARIANTS": "iql;\n bc\n --beta 0", "OUT": "my [1] out", "SEEDS": "12 1"}
    env |= {"TASKS": " ".join(tasks.values()), "MINARI_DATASETS_PATH": "sets", "EXTRA": "--beta 2\n--beta *"}
    benchmark.out = benchmark.folder / "my [1] out"
    output = benchmark(script="link/it.sh", **env)
    assert f"16 runs in {benchmark.out}" in output and output.count("is not locked") == 16
    data, variants, wanted = ("D4RL/{}/human-v2", "own/{}-v0"), (("iql", ""), ("bc", "--beta 0")), {}
    for (task, env_id), data_id, (label, flags), seed in product(tasks.items(), data, variants, ("12", "1")):
        name = f"{label}.{data_id.format(task).replace('/', '.')}"
        command = f"--env-id {env_id} --dataset-id {data_id.format(task)} --exp-name {name} --beta 2 --beta * {flags}"
        wanted[f"{env_id}__{name}__{seed}"] = [*command.split(), "--seed", seed, "--total-updates", "1000"]
    assert {name: start["argv"] for name, start in benchmark.starts().items()} == wanted
    assert {start["MINARI_DATASETS_PATH"] for start in benchmark.starts().values()} == {str(benchmark.folder / "sets")}
    assert (benchmark.out / "tests").readlink() == benchmark.folder / "tests"  # where the bundled sets are


def test_finetune(benchmark):
    """What a run begins with cannot be changed, but it can be lengthened. A checkpoint takes the place of UPDATES."""
    benchmark.out = benchmark.folder / "runs" / "benchmark_finetune"
    env = {"FINETUNE": "1", "ONLINE_STEPS": "300", "SEEDS": "1", "VARIANTS": "iql; own --checkpoint /a"}
    cost = "2 runs of 1000 updates (none with --checkpoint) and 300 online steps; online.bin takes 2.4e-05 GB\n"
    assert cost in benchmark(**env)
    iql, own = (start["argv"][6:] for start in benchmark.starts().values())
    assert iql == "--offline-updates 1000 --seed 1 --online-steps 300".split()
    assert own == "--checkpoint /a --seed 1 --online-steps 300".split()
    assert "has other flags" in benchmark(**env, UPDATES="2000", status=2)
    benchmark(**env | {"ONLINE_STEPS": "1400"})
    start, _ = benchmark.starts().values()
    assert (start["argv"][0], start["argv"][2:]) == ("--resume", ["--online-steps", "1400"])
    benchmark(**env | {"VARIANTS": "all", "EXTRA": "--checkpoint=/a"})
    assert benchmark.starts()["AdroitHandPen-v1__all.D4RL.pen.human-v2__1"]["argv"][6] == "--checkpoint=/a"


def test_the_same_command_again(benchmark):
    """Finished runs go on with more updates, not with fewer or with other flags, unless they never began."""
    assert "There is no luck in this." in benchmark(EXTRA="--bta 1", status=1)
    benchmark()
    logs = benchmark.logs()
    assert benchmark().count("was finished before") == 2
    assert "has other flags" in benchmark(SEEDS="3 1", EXTRA="--beta 2", status=2)
    assert benchmark.logs() == logs
    benchmark(UPDATES="2000", SEEDS="1")
    (run,) = benchmark.out.glob("runs/*__1__*")
    first, _ = benchmark.starts().values()
    assert first["argv"] == ["--resume", f"runs/{run.name}", "--total-updates", "2000"]
    shutil.rmtree(*benchmark.out.glob("runs/*__2__*"))  # it is done again
    assert "is longer already" in benchmark(status=1)
    assert len(list(benchmark.out.glob("runs/*"))) == 2
    benchmark(UPDATES="2000")


def test_results_of_two_versions_do_not_mix(benchmark):
    """Not by an edit, not under one label; both can be gone on with. A label may be a part of another."""
    benchmark(VARIANTS="iql_continuous; my; x__bc")
    logs, script = benchmark.logs(), benchmark.folder / "iql_continuous.py"
    script.write_text(script.read_text().replace("version 1", "version 2"))
    output = benchmark(SEEDS="3", UPDATES="2000", status=2)
    assert "benchmark has another iql_continuous.py: rename yours, as SCRIPT=my_variant2.py, and the report" in output
    script.rename(script.with_name("my.variant.py"))
    output = benchmark(SEEDS="3", VARIANTS="mine; iql_continuous", SCRIPT="my.variant.py", status=2)
    assert "iql_continuous is the label of another script's runs" in output and benchmark.logs() == logs
    benchmark(SEEDS="3", SCRIPT="my.variant.py", VARIANTS="my.variant; bc")
    benchmark(SEEDS="4", SCRIPT="runs/benchmark/iql_continuous.py", VARIANTS="iql_continuous; my; x__bc")
    names = {name.split("__", 1)[1].replace(".D4RL.pen.human-v2__", " "): log for name, log in benchmark.logs().items()}
    found = {f"{name} {re.search('version (.)', log)[1]}" for name, log in names.items()}
    old = {f"{label} {seed} 1" for label in ("iql_continuous", "my", "x__bc") for seed in (1, 2, 4)}
    assert found == old | {"my.variant 3 2", "bc 3 2"}


def test_two_that_begin_together(benchmark):
    """Neither runs the half of the script that the other has copied so far."""
    half = 'head -c 99 "$1" > "$2"; touch "$HOME/copying"; until [[ -e $HOME/go ]]; do sleep 0.02; done'
    benchmark.add_tool("cp", f'[[ -e $HOME/copying ]] || {{ {half}; }}; exec {shutil.which("cp")} "$@"')
    process = benchmark.start()
    benchmark.wait_for((benchmark.folder / "copying").exists, process)
    benchmark()
    (benchmark.folder / "go").touch()
    assert benchmark.end(process, 0).count("was finished before") == 2


@pytest.mark.parametrize("number", STOPS)
def test_stop(benchmark, number):
    """Meanwhile no other call starts the same runs; afterwards nothing runs, not even what does not listen."""
    flags = "--slow --deaf" if number == signal.SIGTERM else "--slow"
    process = benchmark.start_slow(2, EXTRA=flags, SEEDS="1 2 3")
    assert benchmark(EXTRA=flags, status=1).count("it is being run already") == 2
    assert len(benchmark.processes()) >= 7  # itself, xargs, its shells, two runs and their children
    if number == signal.SIGINT:  # Ctrl-C reaches all in a terminal: of `bash benchmark.sh | tee` nobody reads any more
        process.stdout.close()
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    output = benchmark.end(process, 128 + number)
    assert number == signal.SIGINT or "stopping; the same command goes on" in output
    assert len(list(benchmark.out.glob("runs/*"))) == 2
    assert [log.count("Stopped") for log in benchmark.logs().values()] == [0 if "--deaf" in flags else 1] * 2


def test_runs_that_were_killed_go_on(benchmark):
    """From their checkpoint, or afresh if they have none yet."""
    process = benchmark.start_slow(2, SEEDS="1 2 3")
    for pid in benchmark.processes():
        os.kill(pid, signal.SIGKILL)
    benchmark.end(process, -signal.SIGKILL)
    (first,), (second,) = (list(benchmark.out.glob(f"runs/*__{seed}__*")) for seed in (1, 2))
    (second / "checkpoint.pt").unlink()
    process = benchmark.start_slow(3, SEEDS="1 2 3")
    process.terminate()
    benchmark.end(process, 143)
    resumed, afresh, _ = (start["argv"] for start in benchmark.starts().values())
    assert resumed == ["--resume", f"runs/{first.name}", "--total-updates", "1000"] and "--resume" not in afresh
    benchmark(SEEDS="1 2 3", EXTRA="--slow")
    assert [log.count("started:") for log in benchmark.logs().values()] == [2, 3, 2]  # appended, not overwritten


@pytest.mark.parametrize("moment", ["comparing", "getting"])
def test_stop_before_the_runs(benchmark, moment):
    """Also while bash waits for a command that the signal does not reach."""
    benchmark.add_tool("cmp", f'touch "$HOME/comparing" && sleep {int(moment == "comparing")}')
    process = benchmark.start(DATASETS="own/slow-v0")
    benchmark.wait_for((benchmark.folder / moment).exists, process)
    process.send_signal(signal.SIGINT)
    benchmark.end(process, 130)
    assert not benchmark.logs()


def test_failed_runs(benchmark):
    """The others go on. What the last call did not ask for does not count, but a report that fails does."""
    output = benchmark(SEEDS="13 1 2", status=1)
    assert output.count("getting D4RL/pen/human-v2 for AdroitHandPen-v1\n") == 1  # before runs that start together
    assert output.count(" FAILED ") == 1 and output.count(" finished ") == 2
    failed = "logs/AdroitHandPen-v1__iql_continuous.D4RL.pen.human-v2__13.log <==\n"
    for text in (output, benchmark("--report", status=1)):
        assert failed in text and "There is no luck in this." in text and text.count("<==") == 1 and "2 runs in" in text
    benchmark(SEEDS="1")
    benchmark.add_tool("mortal", f'[[ $* != *--resume* ]] || kill -KILL $$; exec {sys.executable} "$@"')
    assert " FAILED " in benchmark(SEEDS="1", UPDATES="2000", PYTHON="mortal", status=1)  # without a word in its log
    (benchmark.folder / "docs" / "report.py").write_text("raise SystemExit(3)")
    benchmark(SEEDS="1", status=1)


@pytest.mark.parametrize("engine", ["local", "slurm"])
def test_no_run_is_begun_without_its_environment_and_dataset(benchmark, engine):
    benchmark.add_tool("sbatch", 'touch "$HOME/sbatch"')
    tasks, data = "AdroitHandPenSparse-v1 my:lost-v0", ("lost/lost-v0", "D4RL/lost/human-v2")
    output = benchmark(ENGINE=engine, TASKS=tasks, DATASETS="lost/{task}-v0 human", status=1)
    lost = ["AdroitHandPenSparse-v1 lost/pen-v0: There is no such set."]
    lost += [f"my:lost-v0 {name}: There is no such module." for name in data]
    assert output.splitlines()[-4:] == ["No run is begun, for environments or datasets that cannot be had:", *lost]
    assert not benchmark.logs() and not (benchmark.folder / "sbatch").exists()


@pytest.mark.parametrize("visible, smi, slots, devices", SLOTS)
def test_slots(benchmark, visible, smi, slots, devices):
    """Five seeds, at once where they can: a slot that is free again would be used twice. A run has one thread."""
    benchmark.add_tool("nvidia-smi", smi)
    benchmark.add_tool("nproc", "echo ${OMP_NUM_THREADS:-12}")
    for name in ("CUDA_VISIBLE_DEVICES", "WORKERS", "SEEDS"):
        del benchmark.env[name]
    env = {"CUDA_VISIBLE_DEVICES": visible} if visible else {}
    process = benchmark.start_slow(len(devices), WORKERS_PER_GPU="2", OMP_NUM_THREADS="5", **env)
    process.terminate()
    output, starts = benchmark.end(process, 143), benchmark.starts()
    assert slots in output and "5 runs into" in output
    assert sorted(start["CUDA_VISIBLE_DEVICES"] for start in starts.values()) == devices
    assert {start["OMP_NUM_THREADS"] for start in starts.values()} == {"1"}
    assert [name[-1] for name in starts] == list("12345"[: len(devices)])


def test_slurm_and_defaults(benchmark):
    """What sbatch is told; its jobs are then run here. Modules are found here, beside SCRIPT and in PYTHONPATH."""
    benchmark.add_tool("sbatch", 'printf "%s\\n" "$@" > "$HOME/sbatch"; env > "$HOME/sbatch_env"')
    benchmark.add_tool("nproc", "echo 12")
    folder, own = benchmark.folder, benchmark.folder / "own"

    def run_job(task, status=0):
        told = (folder / "sbatch").read_text().splitlines()
        (wrapped,) = (flag.removeprefix("--wrap=") for flag in told if flag.startswith("--wrap="))
        env = dict(re.findall("^(.*?)=(.*)$", (folder / "sbatch_env").read_text(), re.M))
        env |= {"SLURM_ARRAY_TASK_ID": task, "SLURM_CPUS_PER_TASK": "2"}
        job = subprocess.run(["sh", "-c", wrapped], env=env, cwd=benchmark.out, capture_output=True, text=True)
        assert job.returncode == status, job.stdout + job.stderr
        assert "2 runs into" in job.stdout and ", 2 at a time on 0 GPUs" in job.stdout
        assert "getting" not in job.stdout and "runs in /" not in job.stdout
        return told

    usage = benchmark("--help")
    assert len(VARIABLES) == 15 and all(re.search(rf"\b{name}\b", usage) for name in VARIABLES)
    for name in VARIABLES & {*benchmark.env} - {"PYTHON"}:
        del benchmark.env[name]
    cost = "30 runs of 1000000 updates (none with --checkpoint) and 1000000 online steps; online.bin takes 1.2 GB\n"
    assert cost in benchmark(ENGINE="slurm", FINETUNE="1")
    output = benchmark(ENGINE="slurm")
    wanted = [(f"D4RL/{task.lower()}/{data}-v2", f"AdroitHand{task}-v1") for task, data in product(*DEFAULTS)]
    assert re.findall("^getting (.*) for (.*)$", output, re.M) == wanted and "30 runs of 1000000 updates\n" in output
    assert {"--array=0-7", "--gres=gpu:1", "--cpus-per-task=4"} <= {*run_job("7")}
    assert [*benchmark.starts()] == [f"AdroitHandHammer-v1__iql_continuous.D4RL.hammer.expert-v2__{n}" for n in (4, 5)]

    own.mkdir()
    (own / "my.py").write_text(STAND_IN)
    benchmark.env |= {"OUT": "my [1] out", "TASKS": "AdroitHandPen-v1", "DATASETS": "human", "SEEDS": "1 2 13 3"}
    env = {"SCRIPT": "own/my.py", "PYTHONPATH": "lib:/x", "SBATCH_FLAGS": "--account me --nice"}
    benchmark(ENGINE="slurm", WORKERS_PER_GPU="2", **env)
    (own / "my.py").write_text("edited while the jobs wait")
    benchmark.out = folder / "my [1] out"
    told = [run_job("0"), run_job("1", status=1)][0]
    assert {"--array=0-1", "--account", "me", "--nice", f"--output={benchmark.out}/logs/%A_%a.out"} <= {*told}
    assert told.index("--export=ALL") > told.index("--nice")  # the last one counts
    starts = benchmark.starts()
    assert [*starts] == [f"AdroitHandPen-v1__my.D4RL.pen.human-v2__{seed}" for seed in (1, 13, 2, 3)]
    assert all(start["PYTHONPATH"].endswith(f":{folder}:{own}:{folder}/lib:/x") for start in starts.values())
    output = benchmark("--report", status=1)
    assert "There is no luck in this." in output and "3 runs in" in output


@pytest.mark.parametrize(
    ("env", "sentence"),
    [
        ({"ENGINE": "foo"}, "ENGINE=foo"),
        ({"FINETUNE": "yes"}, "FINETUNE=yes must be 0 or 1"),
        ({"UPDATES": "1e6"}, "UPDATES=1e6 and ONLINE_STEPS=1000000 must be whole numbers"),
        ({"WORKERS": "0"}, "WORKERS=0 "),
        ({"VARIANTS": "iql; --beta 0"}, "VARIANTS are labels with flags, not '--beta 0'"),
        ({"VARIANTS": "iql;"}, "VARIANTS are labels with flags, not ' '"),
        ({"VARIANTS": "iql; iql --beta 0"}, "AdroitHandPen-v1__iql.D4RL.pen.human-v2__1 is asked for twice"),
        ({"PYTHON": "no_such_python"}, "'no_such_python' is not there"),
        ({"SCRIPT": "no_such.py"}, "no_such.py"),
        ({"SCRIPT": "my variant.py"}, "'my variant.py' must be a name of"),
        ({"EXTRA": "--exp_name=x"}, "leave --exp_name to the variables"),
        ({"VARIANTS": "a --beta 0\n--total-updates 5; b"}, "leave --total-updates to the variables"),
        *(({"EXTRA": f"--beta 1 --{flag} 1"}, f"leave --{flag} to the variables") for flag in FIXED),
        ({"ENGINE": "slurm", "PATH": "tools"}, "ENGINE=slurm needs sbatch"),
        ({"script": "elsewhere/slurm_script"}, "is a copy: run the repository's, on Slurm as ENGINE=slurm bash"),
        *(({"without": tool, "PATH": "tools"}, f"{tool} is missing: this needs Linux") for tool in TOOLS),
        ({"options": ["--report"]}, "nothing was run there yet"),
        ({"options": ["--reprot"]}, "'--reprot' is no option"),
        ({"options": ["SEEDS=1"]}, "'SEEDS=1' is no option, see --help. Variables stand before bash."),
    ],
)
def test_what_is_mistyped_or_missing_is_named(benchmark, env, sentence):
    (benchmark.folder / "tools" / env.get("without", "none")).unlink(missing_ok=True)
    process = benchmark.start(*env.pop("options", ()), **env)
    output, _ = process.communicate(timeout=30)
    assert process.returncode != 0 and sentence in output.splitlines()[-1] and not benchmark.logs(), output
