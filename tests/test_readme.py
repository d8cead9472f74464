"""README and docs: commands parse, flags exist, links lead somewhere, and the README's code runs."""

import importlib
import re
import shlex
import shutil
import sys

import tyro
from processes import ROOT, SCRIPTS, run, run_dir, saved_by

import iql_continuous as iql

README = ROOT / "README.md"
TEXTS = {path: path.read_text().replace("\\\n", " ") for path in (README, *ROOT.glob("docs/*.md"))}
ARGS = {script: importlib.import_module(script).Args for script in SCRIPTS}


def blocks(path, language):
    return re.findall(rf"```{language}\n(.*?)```", TEXTS[path], re.DOTALL)


def test_every_command_parses_and_every_flag_variable_and_link_exists():
    commands = re.findall(r"(?:python|uv run(?: --with \w+)?) (iql_\w+)\.py ([^`\n#]*)", "\n".join(TEXTS.values()))
    assert len(commands) > 15 and {script for script, _ in commands} == {*SCRIPTS}
    for script, flags in commands:
        tyro.cli(ARGS[script], args=shlex.split(flags))
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] in "".join(blocks(README, "bash"))
    names = {"help", "report", "script"}  # benchmark.sh's, and the tests'
    names |= {no + name.replace("_", "-") for args in ARGS.values() for name in vars(args()) for no in ("", "no-")}
    usage = (ROOT / "benchmark.sh").read_text().split("\n\n")[0]
    for path, text in TEXTS.items():
        for span in re.findall(r"`(--[^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
            assert set(re.findall(r"(?<!\S)--([a-z-]+)", span)) <= names, (path, span)
        for command in re.findall(r".*bash benchmark\.sh", text):
            variables = re.findall(r"\b([A-Z_]{3,})=", command)
            assert all(re.search(rf"^#  .*\b{name}\b", usage, re.MULTILINE) for name in variables), command
        for target, anchor in re.findall(r"\]\((?!\w+://)([^)#]*)#?([^)]*)\)", text):
            target = path.parent / target if target else path
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE) if anchor else []
            anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert target.exists() and (not anchor or anchor in anchors), (path, target, anchor)


def test_the_code_of_the_readme_needs_no_other_file(tmp_path, monkeypatch):
    flags = "--dataset-id bundled/hammer/demos-v0 --no-cuda --total-updates 1 --eval-episodes 1"
    run("iql_continuous", tmp_path, f"{flags} --eval-envs 1", tiny=False)
    (code,) = blocks(README, "python")
    shutil.copy(ROOT / "iql_continuous.py", tmp_path)
    (tmp_path / "own.py").write_text(code.replace("runs/RUN", str(run_dir(tmp_path))) + "print(action.tolist())\n")
    agent, env = iql.Agent(46, 26, iql.Args()), iql.make_env("AdroitHandHammer-v1")()
    agent.load_state_dict(saved_by(tmp_path, "best.pt")["agent"])
    action = agent.actor.act(env.reset(seed=0)[0][None])[0]
    monkeypatch.delitem(sys.modules, "iql_continuous")  # the copy is imported
    assert run(tmp_path / "own.py", tmp_path, tiny=False) == f"{action.tolist()}\n"
