"""The README's commands run: each as it stands there, made short and put on the bundled data."""

import importlib
import re
import shlex

import pytest
import tyro
from conftest import ROOT, run_script

BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
COMMANDS = [line.split("#")[0].strip() for line in "".join(BLOCKS).splitlines() if line.startswith("python iql_")]
SHORT = {
    "iql_continuous.py": "--total-updates 2",
    "iql_finetune.py": "--offline-updates 2 --online-steps 2 --learning-starts 1",
}
DOCS = re.findall(
    r"^python (iql_\w+)\.py (.*)$",
    "".join(path.read_text() for path in (ROOT / "docs").glob("*.md")).replace("\\\n", ""),
    re.MULTILINE,
)


def test_the_readme_shows_how_to_start_and_how_to_test():
    assert "python iql_continuous.py --env-id AdroitHandHammer-v1 --total-updates 10000" in COMMANDS
    tests = (ROOT / ".ci" / "run").read_text().splitlines()[-1]
    assert any(tests in block and "pip install -r requirements.txt" in block for block in BLOCKS)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """The directory of a short run of each task."""
    folder = tmp_path_factory.mktemp("run")
    for task in ("Hammer", "Pen"):
        flags = f"--env-id AdroitHand{task}-v1 --dataset-id bundled/{task.lower()}/demos-v0 --eval-episodes 1"
        run_script("iql_continuous.py", f"{flags} --final-episodes 1 --total-updates 1", folder)
    return {task: next(folder.glob(f"runs/AdroitHand{task}*")) for task in ("Hammer", "Pen")}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_runs(command, finished_run, tmp_path):
    _, script, *flags = shlex.split(command)
    task = "Pen" if "Pen" in command else "Hammer"
    flags = [flag.replace("runs/RUN", str(finished_run[task])) for flag in flags if flag != "--capture-video"]
    # what is given twice counts as given last
    flags += ["--eval-episodes", "1", "--final-episodes", "1", *SHORT[script].split()]
    if "--resume" not in flags:
        flags += ["--dataset-id", f"bundled/{task.lower()}/demos-v0"]
    assert "final: " in run_script(script, " ".join(flags), tmp_path)


@pytest.mark.parametrize("script, flags", DOCS)
def test_a_command_of_the_docs_parses(script, flags):
    tyro.cli(importlib.import_module(script).Args, args=shlex.split(flags.split("#")[0]))
