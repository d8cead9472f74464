"""Bad input gets one sentence that says what is wrong, a non-zero exit and no traceback; a bug keeps its own."""

import os
import pickle
import shutil

import pytest
import torch
from processes import ROOT, SCRIPTS, assert_refused, finish, run, run_dir, start
from tiny_env import ACTIONS, OBSERVATIONS

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


@pytest.mark.parametrize(
    ("env_id", "sentence"),
    [
        ("Nowhere-v0", "Nowhere-v0 cannot be made, change --env-id"),
        ("nowhere:Tiny-v0", "nowhere:Tiny-v0 cannot be made.*No module named 'nowhere'"),
        ("tiny_env:NestedDict-v0", "only a Box or a Dict of Boxes"),
        ("tiny_env:DiscreteAction-v0", r"Discrete\(3\): only a Box"),
        ("tiny_env:UnboundedAction-v0", "range of inf in dimension 0 of its actions"),
        ("tiny_env:ZeroWidth-v0", r"range of 0\.0 in dimension 1 of its actions"),
        ("tiny_env:Endless-v0", "no time limit: register it with max_episode_steps"),
    ],
)
def test_an_environment_that_does_not_do_is_refused(env_id, sentence):
    with pytest.raises(SystemExit, match=sentence):
        iql_continuous.check_env(env_id)


@pytest.fixture(scope="module")
def damaged_datasets(minari_root):
    """Copies of tiny/good-v0 that are damaged, one way each."""

    def copy(name):
        path = shutil.copytree(minari_root / "tiny" / "good-v0", minari_root / "tiny" / name) / "data"
        metadata = path / "metadata.json"
        metadata.write_text(metadata.read_text().replace("tiny/good-v0", f"tiny/{name}"))
        return path

    with open(copy("truncated-v0") / "main_data.hdf5", "r+b") as file:
        file.truncate(20_000)
    shutil.rmtree(copy("nodata-v0"))
    (copy("nometadata-v0") / "metadata.json").write_text("{")
    path = copy("future-v0") / "metadata.json"
    path.write_text(path.read_text().replace('"minari_version": "', '"minari_version": "99.0", "was": "'))


@pytest.mark.parametrize(
    ("dataset_id", "sentence"),
    [
        (None, "tiny_env:Tiny-v0 has no default dataset: name one with --dataset-id"),
        ("tiny", "tiny is not the id of a dataset, which ends in a version"),
        ("tiny/nowhere-v0", "tiny/nowhere-v0 could not be downloaded.*check the network"),
        ("tiny/wide-v0", r"tiny/wide-v0 is not for this environment: its observation_space is Box.*\(4,\)"),
        ("tiny/discrete-v0", r"tiny/discrete-v0.*action_space is Discrete\(3\)"),
        ("tiny/empty-v0", "tiny/empty-v0 has 0 transitions"),
        ("tiny/one-v0", "tiny/one-v0 has 1 transitions"),
        ("tiny/nan-v0", "tiny/nan-v0 holds NaN or infinity in its rewards"),
        ("tiny/infinity-v0", "tiny/infinity-v0 holds NaN or infinity in its observations"),
        ("tiny/short-v0", "tiny/short-v0 has 10 observations for the 10 steps"),
        ("tiny/truncated-v0", "tiny/truncated-v0 cannot be read, delete"),
        ("tiny/nodata-v0", "tiny/nodata-v0 cannot be opened, delete"),
        ("tiny/nometadata-v0", "tiny/nometadata-v0 cannot be opened, delete"),
        ("tiny/future-v0", r"tiny/future-v0 is of Minari 99\.0"),
    ],
)
def test_a_dataset_that_does_not_do_is_refused(dataset_id, sentence, damaged_datasets):
    with pytest.raises(SystemExit, match=sentence):
        dataset = iql_continuous.load_dataset("tiny_env:Tiny-v0", dataset_id)
        iql_continuous.load_transitions(dataset, OBSERVATIONS, ACTIONS, 10)


class Hostile:
    """Unpickling it creates a file `executed` in the working directory."""

    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A folder with a run's checkpoint, good.pt, and bad ones."""
    folder = tmp_path_factory.mktemp("checkpoints")
    run("iql_continuous", folder, "--total-updates 0")
    good = folder / "good.pt"
    shutil.copy(run_dir(folder) / "checkpoint.pt", good)
    (folder / "truncated.pt").write_bytes(good.read_bytes()[:100_000])
    data = bytearray(good.read_bytes())
    data[len(data) // 2] ^= 1  # within the weights
    (folder / "flipped.pt").write_bytes(data)
    data = bytearray(good.read_bytes())
    data[data.index(b"PK\x01\x02") + 10] ^= 8  # says that a part is compressed, which none is
    (folder / "method.pt").write_bytes(data)
    torch.save({"weights": torch.zeros(3)}, folder / "foreign.pt")
    torch.save(torch.load(good, weights_only=True) | {"agent": Hostile()}, folder / "hostile.pt")
    (folder / "pickle.pt").write_bytes(pickle.dumps(Hostile()))
    return folder


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("nowhere", r"nowhere\.pt cannot be loaded \(FileNotFoundError\)"),
        ("truncated", r"truncated\.pt cannot be loaded \(BadZipFile\)"),
        ("flipped", r"flipped\.pt cannot be loaded \(BadZipFile\)"),
        ("method", r"method\.pt cannot be loaded \(error\)"),
        ("foreign", r"foreign\.pt is not a checkpoint"),
        ("hostile", r"hostile\.pt cannot be loaded \(UnpicklingError\)"),
        ("pickle", r"pickle\.pt cannot be loaded \(BadZipFile\)"),
    ],
)
def test_a_checkpoint_that_does_not_do_is_refused(name, sentence, checkpoints, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=sentence):
        iql_continuous.load(checkpoints / f"{name}.pt")
    assert not any(tmp_path.iterdir())  # nothing in a file is executed


UNABLE = "raise ModuleNotFoundError('No module named %r' % __name__)"


@pytest.mark.parametrize(
    ("script", "arguments", "telling"),
    [
        ("iql_continuous", "--env-id tiny_env:ZeroWidth-v0", "range of 0.0"),
        ("iql_finetune", "--dataset-id tiny/nan-v0", "holds NaN"),
        ("iql_continuous", "--checkpoint {}/flipped.pt", "flipped.pt cannot be loaded"),
        ("iql_finetune", "--checkpoint {}/good.pt --env-id tiny_env:Wide-v0", "good.pt is of tiny_env:Tiny-v0, not of"),
        ("iql_continuous", "--track", "--track needs wandb"),
        ("iql_finetune", "--capture-video", "--capture-video needs another package"),
        ("iql_continuous", "--capture-video --env-id tiny_env:Dark-v0", "cannot be filmed"),
    ],
)
def test_a_refused_run_ends_with_the_sentence_and_leaves_nothing(script, arguments, telling, checkpoints, tmp_path):
    (tmp_path / "absent").mkdir()  # makes these two not installed wherever the tests run
    for package in ("wandb", "moviepy"):
        (tmp_path / "absent" / f"{package}.py").write_text(UNABLE)
    path = os.pathsep.join([str(tmp_path / "absent"), str(ROOT / "tests")])
    done = finish(start(script, tmp_path / "run", arguments.format(checkpoints), PYTHONPATH=path))
    assert_refused(done, telling)
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {"videos"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_argument_out_of_range_ends_a_run(script, tmp_path):
    done = finish(start(script, tmp_path, "--expectile 2"))
    assert done.returncode == 2 and "--expectile must be between 0 and 1, not 2.0" in done.stderr  # tyro frames it
    assert "Traceback" not in done.stderr


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


POISON = """
def poison():
    assert sys._getframe(1).f_globals is not globals(), "the script asked CUDA"  # PyTorch's optimizers may
    return False


torch.cuda.is_available = poison
torch.cuda._lazy_init = lambda: 1 / 0


@dataclass"""


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_cuda_nothing_asks_cuda(script, tmp_path):
    path = tmp_path / f"{script}.py"
    path.write_text((ROOT / path.name).read_text().replace("\n@dataclass", POISON, 1))
    run(path, tmp_path, "--total-updates 10" if script == "iql_continuous" else "--online-steps 20")
    assert "the script asked CUDA" in finish(start(path, tmp_path, "--cuda")).stderr
