"""README and docs: commands parse, links lead somewhere, and examples run and do what the text promises.

The README's commands run on pen, whose episodes are short, with fewer updates and episodes than they have there.
"""

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
    (path, script, flags)
    for path, text in TEXTS.items()
    for script, flags in re.findall(r"(?:python|uv run(?: --with \w+)?) (iql_\w+)\.py ([^`\n#]*)", text)
]
SHORT = "--eval-episodes 2 --final-episodes 4 --eval-envs 2 --no-cuda"
SHORT_ONLINE = "--offline-updates 2 --online-steps 3 --learning-starts 1"


def blocks(path, language):
    return re.findall(rf"```{language}\n(.*?)```", TEXTS[path], re.DOTALL)


def test_the_readme_shows_how_to_start_and_how_to_test():
    assert (README, "iql_continuous", "--env-id AdroitHandHammer-v1 --total-updates 10000") in COMMANDS
    tests = (ROOT / ".ci" / "run").read_text().splitlines()[-1]
    assert any(tests in block and "pip install -r requirements.txt" in block for block in blocks(README, "bash"))


def test_every_command_parses():
    assert len(COMMANDS) > 15 and {script for _, script, _ in COMMANDS} == {"iql_continuous", "iql_finetune"}
    for _, script, flags in COMMANDS:
        tyro.cli(importlib.import_module(script).Args, args=shlex.split(flags))


def test_every_flag_and_variable_in_the_text_exists():
    fields = [*dataclasses.fields(iql.Args), *dataclasses.fields(iql_finetune.Args)]
    names = {field.name.replace("_", "-") for field in fields} | {f"no-{f.name.replace('_', '-')}" for f in fields}
    names |= {"help", "report"}  # benchmark.sh's
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


def readme_flags(script, words, run_directory="runs/RUN"):
    """The flags of the README's only command of a script that has these words; for pen, where its run directory is."""
    (flags,) = [flags for path, name, flags in COMMANDS if path == README and name == script and words in flags]
    return flags.replace("Hammer", "Pen").replace("runs/RUN", str(run_directory))


@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    """The folder of the README's first short command, run without a network, and what it printed."""
    folder, flags = tmp_path_factory.mktemp("first"), readme_flags("iql_continuous", "--total-updates 10000")
    flags = f"{flags} {SHORT} --total-updates 2"  # what is given twice counts as given last
    return folder, run("iql_continuous", folder, flags, tiny=False, MINARI_DATASETS_PATH=str(folder / "none"))


def pairs(line):
    """What a printed line says, by name, without what the README's sample leaves out."""
    found = dict(re.findall(r"(\w+)=([-.\d]+)", line))
    return {name: value for name, value in found.items() if name not in ("episodic_return_std", "wall_seconds")}


def test_the_first_command_prints_lines_like_the_sample(first_run):
    (sample,) = [block.splitlines() for block in blocks(README, "text")]
    printed = first_run[1].splitlines()[:-1]  # the last one repeats the score
    assert len(printed) == len(sample) - 1  # two evaluations here, three there
    for line, shown in zip(printed, [*sample[:6], sample[-1]], strict=True):
        assert list(pairs(line)) == list(pairs(shown))
    assert printed[0] == sample[0].replace("hammer", "pen")
    assert printed[1].startswith(sample[1].partition("(")[0].replace("hammer", "pen"))
    assert "Using bundled/pen/demos-v0: ITS SCORES ARE NOT D4RL SCORES" in printed[1]
    # the sample's numbers of the dataset are right, to the digit
    env = iql.make_env("AdroitHandHammer-v1")()
    columns, returns = iql.load_transitions(iql.load_dataset(env.spec.id, "bundled/hammer/demos-v0"), env)
    summary = iql.summarize(returns, None, iql.ADROIT["hammer"][1:])
    summary = iql.describe({"transitions": len(columns["rewards"]), **summary})
    assert pairs(sample[3]) == pairs(summary)


def test_watching_a_checkpoint_gives_its_score_again(first_run, tmp_path):
    flags = readme_flags("iql_continuous", "--capture-video", run_dir(first_run[0])).replace("best", "checkpoint")
    printed = run("iql_continuous", tmp_path, f"{flags} --no-capture-video {SHORT}", tiny=False)
    row, score = saved_by(first_run[0])["evaluations"][-1], saved_by(tmp_path)["evaluations"][-1]
    assert all(row[name] == score[name] for name in row.keys() - {"global_step", "total_updates", "wall_seconds"})
    assert row["episodes"] == 4 and f"normalized_score={round(row['normalized_score'], 2)}" in printed


def test_a_run_is_resumed_and_lengthened(first_run, tmp_path):
    directory = shutil.copytree(run_dir(first_run[0]), tmp_path / "runs" / "RUN")
    flags = readme_flags("iql_continuous", "--total-updates 2000000", directory)
    run("iql_continuous", tmp_path, f"{flags} --total-updates 4", tiny=False)
    lengths = [(row["global_step"], row["total_updates"]) for row in saved_by(tmp_path)["evaluations"]]
    assert lengths == [(0, 2), (2, 2), (4, 4)]


def test_fine_tuning_begins_with_the_checkpoints_policy(first_run, tmp_path):
    flags = readme_flags("iql_finetune", "--checkpoint", run_dir(first_run[0]))
    run("iql_finetune", tmp_path, f"{flags} {SHORT} {SHORT_ONLINE} --dataset-id bundled/pen/demos-v0", tiny=False)
    before, after = saved_by(tmp_path)["evaluations"]
    for name in ("episodic_return", "normalized_score"):
        assert before[name] == saved_by(first_run[0])["evaluations"][-1][name]
    assert after["online_steps"] == after["total_steps"] == 3 and before["online_steps"] == 0


def test_the_code_for_ones_own_code_needs_no_other_file(first_run, tmp_path):
    (code,) = blocks(README, "python")
    code = code.replace("Hammer", "Pen").replace("runs/RUN", str(run_dir(first_run[0])))
    (tmp_path / "own.py").write_text(code + "print(action.tolist())\n")
    shutil.copy(ROOT / "iql_continuous.py", tmp_path)
    printed = run(tmp_path / "own.py", tmp_path, tiny=False, PYTHONPATH=str(tmp_path))
    agent, env = iql.Agent(45, 24, iql.Args()), iql.make_env("AdroitHandPen-v1")()
    agent.load_state_dict(saved_by(first_run[0], "best.pt")["agent"])
    assert printed == f"{agent.actor.act(env.reset(seed=0)[0][None])[0].tolist()}\n"


def test_ones_own_dataset_is_recorded_and_learned_from(tmp_path):
    details = ROOT / "docs" / "details.md"
    for name, code in zip(("my_env.py", "record.py"), blocks(details, "python"), strict=True):
        (tmp_path / name).write_text(code)
    (commands,) = [block.splitlines() for block in blocks(details, "bash") if "record.py" in block]
    assert commands[0] == "python record.py" and commands[1].startswith("python iql_continuous.py --env-id my_env:")
    environment = {"MINARI_DATASETS_PATH": str(tmp_path), "PYTHONPATH": ""}
    run(tmp_path / "record.py", tmp_path, tiny=False, **environment)
    flags = commands[1].removeprefix("python iql_continuous.py ") + " --total-updates 300 --batch-size 64"
    printed = run("iql_continuous", tmp_path, f"{flags} --eval-envs 2 --no-cuda", tiny=False, **environment)
    dataset = float(re.search(r"dataset: transitions=1000, episodes=50, episodic_return=([-.\d]+)", printed)[1])
    learned = saved_by(tmp_path)["evaluations"][-1]["episodic_return"]
    assert dataset < -10 and learned > -6.5, (dataset, learned)
