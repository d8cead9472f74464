"""Bad input gets one sentence that says what is wrong, a non-zero exit and no traceback."""

import json
import os
import pickle
import runpy
import shutil
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gymnasium as gym
import pytest
import torch
from processes import ROOT, SCRIPTS, Hostile, assert_refused, finish, run, run_dir, start
from tiny_env import write_dataset

OUT_OF_RANGE = [
    *("--batch-size 0", "--eval-frequency 0", "--eval-episodes 0", "--eval-envs 0", "--max-episodes 0"),
    *("--beta -1", "--beta inf", "--beta nan"),
    *("--learning-rate 0", "--learning-rate nan", "--max-weight 0", "--reward-scale 0", "--reward-scale inf"),
    *("--expectile 0", "--expectile 1", "--expectile nan", "--gamma 1.1", "--gamma nan", "--tau -0.1"),
    *("--actor-dropout 1", "--actor-dropout nan", "--seed -1", "--seed 4294967296"),
]
OUT_OF_RANGE_OF = {
    "iql_continuous": ["--total-updates -1"],
    "iql_finetune": [
        *(
            "--offline-updates -1",
            "--online-steps -1",
            "--learning-starts -1",
            "--online-steps 5",  # of 20,000 before the first update
            "--updates-per-step 0",
            "--num-envs 0",
            "--buffer-size 0",
        ),
        *("--offline-fraction 1.1", "--offline-fraction nan", "--exploration-scale -1", "--exploration-scale nan"),
        *("--exploration-correlation -0.1", "--exploration-correlation 1", "--exploration-correlation nan"),
    ],
}


def exit_of(script, arguments, monkeypatch):
    """What a script's main block exits with, run inside this process: for what happens before anything is started."""
    monkeypatch.setattr(sys, "argv", [script, *arguments.split()])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # the script sets its own
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    return stop.value.code


@pytest.mark.parametrize(
    "script, argument",
    [(script, argument) for script in SCRIPTS for argument in OUT_OF_RANGE + OUT_OF_RANGE_OF[script]],
)
def test_an_argument_out_of_range_is_named_with_its_rule(script, argument, monkeypatch):
    name, value = argument.split()
    # an argument that is let through stops at the environment instead of training
    sentence = exit_of(script, f"{argument} --env-id Nowhere-v0", monkeypatch)
    assert sentence.startswith(f"{name} must be ")
    assert "nan" in sentence or str(float(value)) in sentence or value in sentence


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("arguments", ["--no-such-argument 1", "--batch-size many", "--beta"])
def test_an_argument_that_cannot_be_parsed_is_an_error_of_usage(script, arguments, monkeypatch, capsys):
    assert exit_of(script, arguments, monkeypatch) == 2
    assert arguments.split()[0] in capsys.readouterr().err


def damaged_datasets(root):
    """Add copies of tiny/good-v0 that are damaged, or hostile, one way each."""
    shutil.copytree(root / "tiny" / "good-v0", root / "tiny" / "renamed-v0")

    def copy(name):
        path = shutil.copytree(root / "tiny" / "good-v0", root / "tiny" / name) / "data"
        metadata = (path / "metadata.json").read_text().replace("tiny/good-v0", f"tiny/{name}")
        (path / "metadata.json").write_text(metadata)
        return path

    with open(copy("truncated-v0") / "main_data.hdf5", "r+b") as file:
        file.truncate(20_000)
    (copy("garbage-v0") / "main_data.hdf5").write_bytes(b"garbage")
    (copy("nofile-v0") / "main_data.hdf5").unlink()
    (copy("nometadata-v0") / "metadata.json").write_text("{")
    # Minari would make the environment that these metadata name, to learn its spaces: that is, start a process
    path = copy("hostile-v0") / "metadata.json"
    spec = {"id": "Hostile-v0", "entry_point": "subprocess:Popen", "kwargs": {"args": ["touch", "executed"]}}
    spec |= {"reward_threshold": None, "nondeterministic": False, "max_episode_steps": None}
    spec |= {"disable_env_checker": True, "additional_wrappers": [], "vector_entry_point": None}
    metadata = json.loads(path.read_text()) | {"env_spec": json.dumps(spec)}
    del metadata["observation_space"]
    path.write_text(json.dumps(metadata))


def saved_models(folder):
    """Files for --checkpoint: a good one, and bad ones."""
    folder.mkdir()
    run("iql_continuous", folder, "--total-updates 0")
    good = folder / "good.pt"
    shutil.copy(run_dir(folder) / "model.pt", good)
    (folder / "truncated.pt").write_bytes(good.read_bytes()[:100_000])
    state = torch.load(good, weights_only=True)
    torch.save(state | {"version": 0}, folder / "version.pt")
    torch.save({"weights": torch.zeros(3)}, folder / "foreign.pt")
    torch.save(state | {"agent": Hostile()}, folder / "hostile.pt")
    with open(folder / "pickle.pt", "wb") as file:
        pickle.dump(Hostile(), file)


UNABLE = "raise ModuleNotFoundError('No module named %r' % __name__)"
# arguments after those of the tiny run, and words of the sentence; {} is the folder of saved_models
CASES = {
    "unknown environment": ("--env-id Nowhere-v0", "Nowhere-v0 cannot be made", "--env-id"),
    "unknown version": ("--env-id AdroitHandDoor-v99", "AdroitHandDoor-v99 cannot be made", "v1"),
    "unknown module": ("--env-id nowhere:Tiny-v0", "nowhere:Tiny-v0 cannot be made", "No module named 'nowhere'"),
    "Dict observations": ("--env-id tiny_env:DictObservation-v0", "has a Dict observation space", "only Box"),
    "discrete actions": ("--env-id tiny_env:DiscreteAction-v0", "has a Discrete action space", "only Box"),
    "unbounded actions": ("--env-id tiny_env:UnboundedAction-v0", "has unbounded actions", "finite bounds"),
    "no default dataset": ("--dataset-id None", "tiny_env:Tiny-v0 has no default dataset", "--dataset-id"),
    "dataset nowhere": ("--dataset-id tiny/nowhere-v0", "tiny/nowhere-v0 could not be downloaded", "check the network"),
    "other observations": ("--dataset-id tiny/wide-v0", "tiny/wide-v0", "observation_space is Box", "(4,)"),
    "other actions": ("--dataset-id tiny/threeactions-v0", "tiny/threeactions-v0", "action_space is Box", "(3,)"),
    "other kind of actions": ("--dataset-id tiny/discrete-v0", "tiny/discrete-v0", "action_space is Discrete(3)"),
    "empty dataset": ("--dataset-id tiny/empty-v0", "tiny/empty-v0 is empty"),
    "NaN": ("--dataset-id tiny/nan-v0", "tiny/nan-v0 holds NaN or infinity in its rewards"),
    "infinity": ("--dataset-id tiny/infinity-v0", "tiny/infinity-v0 holds NaN or infinity in its observations"),
    "arrays of two lengths": ("--dataset-id tiny/short-v0", "tiny/short-v0 cannot be read"),
    "arrays of two widths": ("--dataset-id tiny/narrow-v0", "tiny/narrow-v0 cannot be read"),
    "dataset of another name": ("--dataset-id tiny/renamed-v0", "tiny/renamed-v0 cannot be read", "tiny/good-v0"),
    "truncated dataset": ("--dataset-id tiny/truncated-v0", "tiny/truncated-v0 cannot be read", "delete"),
    "garbage dataset": ("--dataset-id tiny/garbage-v0", "tiny/garbage-v0 cannot be read", "delete"),
    "dataset without its file": ("--dataset-id tiny/nofile-v0", "tiny/nofile-v0 cannot be read", "delete"),
    "dataset with damaged metadata": ("--dataset-id tiny/nometadata-v0", "tiny/nometadata-v0 cannot be read"),
    "dataset that would run code": ("--dataset-id tiny/hostile-v0", "tiny/hostile-v0 cannot be read"),
    "wandb not installed": ("--track", "No module named 'wandb'"),
    "moviepy not installed": ("--capture-video", "MoviePy is not installed", "install"),
    "no checkpoint there": ("--checkpoint nowhere.pt", "nowhere.pt cannot be loaded (FileNotFoundError)"),
    "truncated checkpoint": ("--checkpoint {}/truncated.pt", "truncated.pt cannot be loaded"),
    "checkpoint of another version": ("--checkpoint {}/version.pt", "version.pt has format 0"),
    "checkpoint of something else": ("--checkpoint {}/foreign.pt", "foreign.pt cannot be loaded"),
    "checkpoint that would run code": ("--checkpoint {}/hostile.pt", "hostile.pt cannot be loaded"),
    "pickle that would run code": ("--checkpoint {}/pickle.pt", "pickle.pt cannot be loaded"),
    "checkpoint of another scale": ("--checkpoint {}/good.pt --reward-scale 0.1", "--reward-scale 0.05, as in its"),
    "checkpoint of another environment": (
        *("--checkpoint {}/good.pt --env-id tiny_env:Wide-v0 --dataset-id tiny/wide-v0",),
        *("trained on tiny_env:Tiny-v0, not on tiny_env:Wide-v0",),
    ),
}
CASES |= {f"fine-tuning: {name}": case for name, case in CASES.items() if name.startswith("checkpoint of another")}
CASES["fine-tuning: buffer smaller than the dataset"] = ("--buffer-size 9", "--buffer-size 9 is too small", "dataset's")


@pytest.fixture(scope="module")
def refusals(minari_root, tmp_path_factory):
    """What became of every case, and the folder it ran in; two at a time."""
    damaged_datasets(minari_root)
    saved_models(models := tmp_path_factory.mktemp("models") / "models")
    absent = tmp_path_factory.mktemp("absent")  # makes these two not installed wherever the tests run
    for package in ("wandb", "moviepy"):
        (absent / f"{package}.py").write_text(UNABLE)

    def refuse(name):
        folder, path = tmp_path_factory.mktemp("case"), os.pathsep.join([str(absent), str(ROOT / "tests")])
        script = "iql_finetune" if name.startswith("fine-tuning") else "iql_continuous"
        return finish(start(script, folder, CASES[name][0].format(models), PYTHONPATH=path)), folder

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(CASES, pool.map(refuse, CASES), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused_with_a_sentence(name, refusals):
    done, folder = refusals[name]
    assert_refused(done, *CASES[name][1:])
    # no run is begun, and nothing in a file is executed
    assert {path.name for path in folder.iterdir()} <= {"videos"}


def test_an_environment_that_cannot_be_rendered_is_said_before_anything_is_trained(tmp_path):
    (tmp_path / "dark").touch()
    (tmp_path / "moviepy.py").touch()  # makes it installed wherever the tests run
    path = os.pathsep.join([str(tmp_path), str(ROOT / "tests")])
    done = finish(start("iql_continuous", tmp_path, "--capture-video", PYTHONPATH=path))
    assert_refused(done, "tiny_env:Tiny-v0 cannot be filmed", "leave --capture-video out: no screen")
    assert not (tmp_path / "runs").exists()


def copy_with_demonstrations(script, folder):
    """A copy of a script, with a stand-in for the bundled dataset of the door task beside it."""
    folder.mkdir()
    path, root = folder / f"{script}.py", folder / "tests" / "datasets"
    shutil.copy(ROOT / f"{script}.py", path)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setenv("MINARI_DATASETS_PATH", str(root))
        spaces = {"observation_space": gym.spaces.Box(-9, 9, (39,)), "action_space": gym.spaces.Box(-1, 1, (28,))}
        write_dataset("bundled/door/demos-v0", **spaces)
    return path


ADROIT = "--env-id AdroitHandDoor-v1 --eval-episodes 1 --eval-frequency 9999 --total-updates 1 --dataset-id "


def test_without_a_network_the_bundled_dataset_is_used_and_loudly_said(tmp_path):
    script = copy_with_demonstrations("iql_continuous", tmp_path / "copy")
    out = run(script, tmp_path / "run", ADROIT + "None")
    assert "D4RL/door/expert-v2 could not be downloaded" in out
    assert "!!!!!!!!" in out and "bundled/door/demos-v0: its scores are not D4RL scores" in out
    assert "final: AdroitHandDoor-v1 with bundled/door/demos-v0" in out.splitlines()[-1]


def test_a_dataset_that_was_asked_for_is_never_replaced_by_the_bundled_one(tmp_path):
    script = copy_with_demonstrations("iql_continuous", tmp_path / "copy")
    done = finish(start(script, tmp_path / "run", ADROIT + "D4RL/door/expert-v2"))
    assert_refused(done, "D4RL/door/expert-v2 could not be downloaded", "check the network and the id")


def test_a_script_alone_in_a_folder_says_that_nothing_can_be_downloaded(tmp_path):
    script = Path(shutil.copy(ROOT / "iql_continuous.py", tmp_path))
    done = finish(start(script, tmp_path / "run", ADROIT + "None"))
    assert_refused(done, "D4RL/door/expert-v2 could not be downloaded", "check the network and the id")
