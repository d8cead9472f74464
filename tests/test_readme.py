"""The README's commands run: each as it stands there, made short and put on the bundled data."""

import re
import shlex

import pytest
from conftest import ROOT, run_script

BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
COMMANDS = [line.split("#")[0].strip() for line in "".join(BLOCKS).splitlines() if line.startswith("python iql_")]
SHORT = {
    "iql_continuous.py": "--total-updates 2",
    "iql_finetune.py": "--offline-updates 2 --online-steps 2 --learning-starts 1",
}


def test_the_readme_shows_how_to_start_and_how_to_test():
    assert "python iql_continuous.py --env-id AdroitHandHammer-v1 --total-updates 10000" in COMMANDS
    tests = (ROOT / ".ci" / "run").read_text().splitlines()[-1]
    assert any(tests in block and "pip install -r requirements.txt" in block for block in BLOCKS)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_runs(command, tmp_path):
    _, script, *flags = shlex.split(command)
    if "runs/RUN/model.pt" in flags:
        env_id = flags[flags.index("--env-id") + 1]
        flags_of_run = f"--env-id {env_id} --total-updates 0 --eval-episodes 1 --save-model"
        run_script("iql_continuous.py", flags_of_run, tmp_path)
        (model,) = tmp_path.glob("runs/*/model.pt")
        flags = [str(model) if flag == "runs/RUN/model.pt" else flag for flag in flags]
    flags = [flag for flag in flags if flag != "--capture-video"]  # needs a display and moviepy
    task = "pen" if "Pen" in command else "hammer"
    # what is given twice counts as given last
    flags += ["--dataset-id", f"bundled/{task}/demos-v0", "--eval-episodes", "1", *SHORT[script].split()]
    assert "final: " in run_script(script, " ".join(flags), tmp_path)
