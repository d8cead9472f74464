"""README and docs: commands parse, flags exist, links lead somewhere, and their code runs, with few updates."""

import dataclasses
import importlib
import re
import shlex
import shutil

import pytest
import tyro
from processes import ROOT, run, run_dir, saved_by

import iql_continuous as iql
import iql_finetune

README = ROOT / "README.md"
# the lab notes are of older versions
TEXTS = {path: path.read_text().replace("\\\n", " ") for path in (README, *ROOT.glob("docs/[!l]*.md"))}
COMMANDS = [
    (script, flags)
    for text in TEXTS.values()
    for script, flags in re.findall(r"(?:python|uv run(?: --with \w+)?) (iql_\w+)\.py ([^`\n#]*)", text)
]


def blocks(path, language):
    return re.findall(rf"```{language}\n(.*?)```", TEXTS[path], re.DOTALL)


def test_every_command_parses_and_every_flag_and_variable_in_the_text_exists():
    assert len(COMMANDS) > 15 and {script for script, _ in COMMANDS} == {"iql_continuous", "iql_finetune"}
    for script, flags in COMMANDS:
        tyro.cli(importlib.import_module(script).Args, args=shlex.split(flags))
    tests = (ROOT / ".ci" / "run").read_text().splitlines()[-1]
    assert any(tests in block and "pip install -r requirements.txt" in block for block in blocks(README, "bash"))
    fields = [*dataclasses.fields(iql.Args), *dataclasses.fields(iql_finetune.Args)]
    names = {field.name.replace("_", "-") for field in fields} | {f"no-{f.name.replace('_', '-')}" for f in fields}
    names |= {"help", "report", "script"}  # benchmark.sh's, and the tests'
    usage = (ROOT / "benchmark.sh").read_text().split("\n\n")[0]
    for path, text in TEXTS.items():
        for span in re.findall(r"`(--[^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
            assert set(re.findall(r"(?<!\S)--([a-z-]+)", span)) <= names, (path, span)
        for command in re.findall(r".*bash benchmark\.sh", text):
            for variable in re.findall(r"\b([A-Z_]{3,})=", command):
                assert f"#   {variable} " in usage, (path, command)


def test_every_link_leads_somewhere():
    for path, text in TEXTS.items():
        for link in re.findall(r"\]\(([^)]+)\)", text):
            target, _, anchor = link.partition("#")
            if "://" in target:
                continue
            target = (path.parent / target).resolve() if target else path
            assert target.exists(), (path, link)
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE) if anchor else []
            anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert not anchor or anchor in anchors, (path, link)


def test_the_code_of_the_readme_and_of_the_details_runs(tmp_path, own_root, monkeypatch):
    own, record = tmp_path / "own", tmp_path / "record"
    flags = "--dataset-id bundled/hammer/demos-v0 --no-cuda --total-updates 1 --eval-episodes 1 --final-episodes 1"
    run("iql_continuous", own, f"{flags} --eval-envs 1", tiny=False)
    (code,) = blocks(README, "python")
    shutil.copy(ROOT / "iql_continuous.py", own)  # and no other file
    (own / "own.py").write_text(code.replace("runs/RUN", str(run_dir(own))) + "print(action.tolist())\n")
    agent, env = iql.Agent(46, 26, iql.Args()), iql.make_env("AdroitHandHammer-v1")()
    agent.load_state_dict(saved_by(own, "best.pt")["agent"])
    action = agent.actor.act(env.reset(seed=0)[0][None])[0]
    assert run(own / "own.py", own, tiny=False) == f"{action.tolist()}\n"

    details = ROOT / "docs" / "details.md"
    record.mkdir()
    for name, code in zip(("my_env.py", "record.py"), blocks(details, "python"), strict=True):
        (record / name).write_text(code)
    ((first, command, *_),) = [block.splitlines() for block in blocks(details, "bash") if "record.py" in block]
    assert first == "python record.py" and command.startswith("python iql_continuous.py --env-id my_env:")
    monkeypatch.syspath_prepend(record)
    with pytest.warns(UserWarning):  # Minari wants an author, an e-mail address and more
        run(record / "record.py", record, tiny=False)
    flags = f"{command.partition('.py ')[2]} --total-updates 1 --no-cuda"
    assert "dataset: transitions=1000, episodes=50, " in run("iql_continuous", record, flags, tiny=False)
