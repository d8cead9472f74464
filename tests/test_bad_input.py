"""Bad input gets one sentence that says what is wrong, a non-zero exit and no traceback; a bug keeps its own."""

import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from processes import ROOT, SCRIPTS, Hostile, assert_refused, finish, run, run_dir, start

import iql_continuous
import iql_finetune

OUT_OF_RANGE = [
    *("batch_size 0", "eval_frequency 0", "eval_episodes 0", "final_episodes 0", "eval_envs 0", "max_episodes 0"),
    *("beta -1", "beta inf", "beta nan", "learning_rate 0", "learning_rate nan", "max_weight 0", "reward_scale 0"),
    *("reward_scale inf", "expectile 0", "expectile 1", "expectile nan", "gamma 1.1", "gamma nan", "tau -0.1"),
    *("actor_dropout 1", "actor_dropout nan", "seed -1", "seed 4294967296"),
]
OUT_OF_RANGE_OF = {
    iql_continuous: ["total_updates -1"],
    iql_finetune: [
        *("offline_updates -1", "online_steps -1", "learning_starts -1", "updates_per_step 0"),
        *("exploration_scale -1", "exploration_scale nan"),
    ],
}


@pytest.mark.parametrize("script", OUT_OF_RANGE_OF, ids=lambda script: script.__name__)
def test_an_argument_out_of_range_is_named_with_its_rule(script):
    for argument in OUT_OF_RANGE + OUT_OF_RANGE_OF[script]:
        name, value = argument.split()
        with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} must be .*, not "):
            script.Args(**{name: float(value) if "." in value or not value.lstrip("-").isdigit() else int(value)})


def saved_models(folder):
    """Files for --checkpoint: a good one, and bad ones."""
    folder.mkdir()
    run("iql_continuous", folder, "--total-updates 0")
    good = folder / "good.pt"
    shutil.copy(run_dir(folder) / "checkpoint.pt", good)
    (folder / "truncated.pt").write_bytes(good.read_bytes()[:100_000])
    data = bytearray(good.read_bytes())
    data[len(data) // 2] ^= 1  # within the weights
    (folder / "flipped.pt").write_bytes(data)
    state = torch.load(good, weights_only=True)
    torch.save({"weights": torch.zeros(3)}, folder / "foreign.pt")
    torch.save(state | {"agent": Hostile()}, folder / "hostile.pt")
    with open(folder / "pickle.pt", "wb") as file:
        pickle.dump(Hostile(), file)


UNABLE = "raise ModuleNotFoundError('No module named %r' % __name__)"
# arguments after those of the tiny run, and words of the sentence; {} is the folder of saved_models
CASES = {
    "argument out of range": ("--expectile 2", "--help"),
    "unknown environment": ("--env-id Nowhere-v0", "Nowhere-v0 cannot be made", "--env-id"),
    "unknown module": ("--env-id nowhere:Tiny-v0", "nowhere:Tiny-v0 cannot be made", "No module named 'nowhere'"),
    "nested Dict": ("--env-id tiny_env:NestedDict-v0", "only a Box or a Dict of Boxes"),
    "discrete actions": ("--env-id tiny_env:DiscreteAction-v0", "Discrete(3)", "only a Box"),
    "unbounded actions": ("--env-id tiny_env:UnboundedAction-v0", "range of inf in dimension 0 of its actions"),
    "zero width": ("--env-id tiny_env:ZeroWidth-v0", "range of 0.0 in dimension 1 of its actions"),
    "no time limit": ("--env-id tiny_env:Endless-v0", "no time limit", "max_episode_steps"),
    "no default dataset": ("--dataset-id None", "tiny_env:Tiny-v0 has no default dataset", "--dataset-id"),
    "dataset nowhere": ("--dataset-id tiny/nowhere-v0", "tiny/nowhere-v0 could not be downloaded", "check the network"),
    "other observations": ("--dataset-id tiny/wide-v0", "tiny/wide-v0", "observation_space is Box", "(4,)"),
    "other kind of actions": ("--dataset-id tiny/discrete-v0", "tiny/discrete-v0", "action_space is Discrete(3)"),
    "empty dataset": ("--dataset-id tiny/empty-v0", "tiny/empty-v0 has 0 transitions"),
    "one transition": ("--dataset-id tiny/one-v0", "tiny/one-v0 has 1 transitions"),
    "NaN": ("--dataset-id tiny/nan-v0", "tiny/nan-v0 holds NaN or infinity in its rewards"),
    "infinity": ("--dataset-id tiny/infinity-v0", "tiny/infinity-v0 holds NaN or infinity in its observations"),
    "no last observation": ("--dataset-id tiny/short-v0", "tiny/short-v0 has 10 observations for the 10 steps"),
    "truncated dataset": ("--dataset-id tiny/truncated-v0", "tiny/truncated-v0 cannot be read", "delete"),
    "folder without data": ("--dataset-id tiny/nodata-v0", "tiny/nodata-v0 cannot be opened, delete"),
    "damaged metadata": ("--dataset-id tiny/nometadata-v0", "tiny/nometadata-v0 cannot be opened, delete"),
    "other Minari": ("--dataset-id tiny/future-v0", "tiny/future-v0 is of Minari 99.0"),
    "wandb not installed": ("--track", "--track needs wandb"),
    "moviepy not installed": ("--capture-video", "--capture-video needs another package", "moviepy"),
    "cannot be filmed": ("--capture-video --env-id tiny_env:Dark-v0", "cannot be filmed", "no screen"),
    "no checkpoint there": ("--checkpoint nowhere.pt", "nowhere.pt cannot be loaded (FileNotFoundError)"),
    "truncated checkpoint": ("--checkpoint {}/truncated.pt", "truncated.pt cannot be loaded"),
    "flipped bit": ("--checkpoint {}/flipped.pt", "flipped.pt cannot be loaded (BadZipFile)"),
    "checkpoint of something else": ("--checkpoint {}/foreign.pt", "foreign.pt is not a checkpoint"),
    "checkpoint that would run code": ("--checkpoint {}/hostile.pt", "hostile.pt cannot be loaded"),
    "pickle that would run code": ("--checkpoint {}/pickle.pt", "pickle.pt cannot be loaded"),
    "checkpoint of another environment": (
        "--checkpoint {}/good.pt --env-id tiny_env:Wide-v0",
        "was trained on tiny_env:Tiny",
    ),
}


def damaged_datasets(root):
    """Add copies of tiny/good-v0 that are damaged, one way each."""

    def copy(name):
        path = shutil.copytree(root / "tiny" / "good-v0", root / "tiny" / name) / "data"
        metadata = path / "metadata.json"
        metadata.write_text(metadata.read_text().replace("tiny/good-v0", f"tiny/{name}"))
        return path

    with open(copy("truncated-v0") / "main_data.hdf5", "r+b") as file:
        file.truncate(20_000)
    shutil.rmtree(copy("nodata-v0"))
    (copy("nometadata-v0") / "metadata.json").write_text("{")
    path = copy("future-v0") / "metadata.json"
    path.write_text(path.read_text().replace('"minari_version": "', '"minari_version": "99.0", "was": "'))


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
        return finish(start("iql_continuous", folder, CASES[name][0].format(models), PYTHONPATH=path)), folder

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(CASES, pool.map(refuse, CASES), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused_with_a_sentence(name, refusals):
    done, folder = refusals[name]
    if name == "argument out of range":
        assert done.returncode == 2 and "--expectile must be between 0 and 1, not 2.0" in done.stderr
    else:
        assert_refused(done, *CASES[name][1:])
    # no run is begun, and nothing in a file is executed
    assert {path.name for path in folder.iterdir()} <= {"videos"}


def test_a_script_alone_in_a_folder_says_that_nothing_can_be_downloaded(tmp_path):
    script = shutil.copy(ROOT / "iql_continuous.py", tmp_path)
    done = finish(
        start(tmp_path / "iql_continuous.py", tmp_path / "run", "--env-id AdroitHandDoor-v1 --dataset-id None")
    )
    assert script and assert_refused(done, "D4RL/door/expert-v2 could not be downloaded", "check the network") is None


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("place", ["def load_transitions(", "def update("])
def test_a_researchers_own_mistake_keeps_its_traceback(script, place, tmp_path):
    text = (ROOT / f"{script}.py").read_text()
    begin = text.index('"""\n', text.index('"""', text.index(place)) + 3) + 4
    (tmp_path / f"{script}.py").write_text(text[:begin] + "    undefined_name\n" + text[begin:])
    done = finish(start(tmp_path / f"{script}.py", tmp_path, ""))
    assert done.returncode != 0 and "NameError: name 'undefined_name'" in done.stderr and "Traceback" in done.stderr


def test_an_environment_that_raises_keeps_its_traceback(tmp_path):
    (tmp_path / "raise").touch()
    (tmp_path / "runs").mkdir()
    done = finish(start("iql_continuous", tmp_path, ""))
    assert done.returncode != 0 and "ZeroDivisionError: the environment's own mistake" in done.stderr


def test_without_cuda_nothing_asks_cuda(tmp_path):
    text = (ROOT / "iql_continuous.py").read_text()
    poison = "torch.cuda.is_available = lambda: 1 / 0\ntorch.cuda._lazy_init = lambda: 1 / 0\n\n\n@dataclass"
    (tmp_path / "iql_continuous.py").write_text(text.replace("\n@dataclass", "\n" + poison, 1))
    run(tmp_path / "iql_continuous.py", tmp_path, "--total-updates 10")
    done = finish(start(tmp_path / "iql_continuous.py", tmp_path, "--cuda"))
    assert "ZeroDivisionError" in done.stderr  # the poison works
