"""Environments, datasets and checkpoints: what becomes of good ones, and the sentence that bad ones get."""

import fcntl
import json
import os
import pickle
import runpy
import shutil
import signal
import sys
from unittest.mock import Mock

import gymnasium as gym
import minari
import numpy as np
import odd_env
import pytest
import torch
from minari.data_collector import EpisodeBuffer
from processes import ROOT, SCRIPTS, TINY, assert_refused, finish, run, run_dir, saved_by, start
from tiny_env import ACTIONS, OBSERVATIONS

import iql_continuous as iql
import iql_finetune

SCRIPT = {"iql_continuous": iql, "iql_finetune": iql_finetune}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Minari wants an author, an e-mail address and more


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A Minari root of the test's own."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path / "minari"


def episode(steps=10, **arrays):
    """An episode as Tiny-v0 has them, but for these `arrays`."""
    rng, last = np.random.default_rng(0), np.arange(steps) == steps - 1
    observations = rng.normal(size=(steps + 1, 3)).astype(np.float32)
    good = {"observations": observations, "actions": np.zeros((steps, 2)), "rewards": np.ones(steps)}
    return EpisodeBuffer(**{**good, "terminations": last & False, "truncations": last, **arrays})


def write(*episodes, dataset_id="odd/set-v0", observation_space=OBSERVATIONS, action_space=ACTIONS, **more):
    spaces = {"observation_space": observation_space, "action_space": action_space}
    return minari.create_dataset_from_buffers(dataset_id, list(episodes), **spaces, **more)


def tiny():
    return iql.make_env("tiny_env:Tiny-v0")()


# ENVIRONMENTS AND EVALUATIONS
def test_actions_reach_the_environments_own_bounds():
    env = tiny()
    assert env.action_space == gym.spaces.Box(-1, 1, (2,))
    for action, own in (([-1, -1], [-2, 0]), ([1, 1], [2, 1]), ([0, 0.5], [0, 0.75])):
        before, _ = env.reset(seed=0)
        after = env.step(np.array(action, np.float32))[0]
        np.testing.assert_allclose(10 * (after - before)[:2], own, atol=1e-5)  # Tiny's point moves so


UNFIT = {
    "Endless": "no time limit",
    **dict.fromkeys(["MatrixAction", "IntAction", "ZeroWidth"], "-v0 has actions in Box"),
}
UNFIT["DiscreteAction"] = r"DiscreteAction-v0 has actions in Discrete\(3\)"


@pytest.mark.parametrize("kind", UNFIT)
def test_an_environment_that_does_not_do_is_refused(kind):
    with pytest.raises(ValueError, match=UNFIT[kind]):
        iql.make_env(f"tiny_env:{kind}-v0")()


@pytest.mark.parametrize("vector", [gym.vector.SyncVectorEnv, gym.vector.AsyncVectorEnv])
@pytest.mark.parametrize("num_envs", [1, 4])
def test_an_evaluation_counts_each_episode_to_its_end_and_no_further(vector, num_envs):
    """With as many environments as one likes, which end at different steps and do not all report successes."""
    for reports in (True, False):
        envs = vector([lambda: odd_env.Staircase(reports)] * num_envs)  # noqa: B023
        returns, successes = iql.evaluate(envs, lambda obs: np.zeros((len(obs), 1), np.float32), episodes=7)
        envs.close()
        lengths = [1, 2, 3, 4, 5, 1, 2]
        assert returns.tolist() == [sum(k + i for i in range(1, lengths[k] + 1)) for k in range(7)]
        assert (successes.tolist() if reports else successes) == ([k % 2 == 1 for k in range(7)] if reports else None)


# WHAT IS READ
def test_transitions_never_cross_an_episode_and_truncations_are_no_terminations(root):
    """Returns are of the time limit's ten steps."""
    T, episodes = 12, []
    for k, terminated in enumerate((True, False, True)):
        count, last = 100.0 * k + np.arange(T + 1), np.arange(T) == T - 1
        arrays = {"observations": np.stack([count, -count, count], 1).astype(np.float32), "rewards": count[:-1]}
        arrays |= {"terminations": last & terminated, "truncations": last & (not terminated)}
        episodes.append(episode(T, **arrays))
    transitions, returns = iql.load_transitions(write(*episodes), tiny(), max_episodes=2)
    count = np.array([*range(12), *range(100, 112)])
    assert (transitions["observations"] == np.stack([count, -count, count], 1)).all()
    assert (transitions["next_observations"] == np.stack([count + 1, -count - 1, count + 1], 1)).all()
    assert transitions["rewards"].tolist() == count.tolist()
    assert transitions["terminations"].tolist() == 11 * [0] + [1] + 12 * [0]
    assert returns.tolist() == [45, 1045]
    # float32 would not do for statistics of large numbers
    assert all(column.dtype == np.float64 for column in transitions.values())


def test_actions_are_read_in_the_unit_that_they_were_recorded_in(root):
    """Tiny-v0 takes [-2, 0] to [2, 1]; a wrapper around it may take others."""
    bound = 1 - 1e-5  # the official code's
    for name, space in (("own", ACTIONS), ("rescaled", gym.spaces.Box(-1, 1, (2,)))):
        low, high = space.low, space.high
        actions = np.array([low, high, (low + high) / 2, 0.25 * low + 0.75 * high, high + 1, low - 1])
        dataset = write(episode(6, actions=actions), dataset_id=f"odd/{name}-v0", action_space=space)
        transitions, _ = iql.load_transitions(dataset, tiny())
        read = np.array([-bound, bound, 0, 0.5, bound, -bound])
        np.testing.assert_allclose(transitions["actions"], np.stack([read, read], 1), rtol=0, atol=1e-7)


def test_an_image_and_a_dict_are_flattened_as_the_environment_flattens_them(root):
    for kind in ("Parts", "Image"):
        env = iql.make_env(f"odd_env:{kind}-v0")()
        own, _ = env.unwrapped.reset()
        flat, _ = env.reset(seed=0)
        assert flat.tolist() == ([1, 2, 3, 4, 5] if kind == "Parts" else list(range(200, 248)))
        parts = {name: np.stack(4 * [part]) for name, part in own.items()} if kind == "Parts" else np.stack(4 * [own])
        space = env.unwrapped.observation_space
        dataset = write(episode(3, observations=parts), dataset_id=f"odd/{kind}-v0", observation_space=space)
        transitions, _ = iql.load_transitions(dataset, env)
        assert transitions["observations"].tolist() == transitions["next_observations"].tolist() == 3 * [flat.tolist()]


def test_data_of_another_environment_are_warned_of(root, capsys):
    dataset = write(episode(), env=gym.spec("Ending-v0"))
    iql.load_transitions(dataset, iql.make_env("tiny_env:Ending-v0")())
    assert "WARNING" not in capsys.readouterr().err
    iql.load_transitions(dataset, tiny())
    plain = 'kwargs {"render_mode": null}'
    said = f"WARNING: odd/set-v0 was recorded in Ending-v0, {plain}, and not in Tiny-v0, {plain}."
    assert said in capsys.readouterr().err
    # the same environment with other arguments: another maze, say
    iql.load_transitions(dataset, iql.make_env("tiny_env:Ending-v0", action_space=gym.spaces.Box(-1, 1, (2,)))())
    assert f"Ending-v0, {plain}, and not in Ending-v0, kwargs " + '{"action_space": "Box(' in capsys.readouterr().err


def test_the_dataset_that_is_read_is_the_one_that_is_named(root, monkeypatch, capsys):
    monkeypatch.setattr(
        minari, "download_dataset", there := Mock(side_effect=lambda name: write(episode(), dataset_id=name))
    )
    for _ in range(2):  # downloaded once
        assert iql.load_dataset("AdroitHandPen-v1").id == "D4RL/pen/expert-v2"
    assert iql.load_dataset("AdroitHandPen-v1", "bundled/hammer/demos-v0").id == "bundled/hammer/demos-v0"
    there.assert_called_once_with("D4RL/pen/expert-v2")
    # a bundled set takes the place of the default one, but of none that is named
    monkeypatch.setattr(minari, "download_dataset", Mock(side_effect=OSError(28, "No space left on device")))
    assert iql.load_dataset("AdroitHandHammer-v1").id == "bundled/hammer/demos-v0"
    said = capsys.readouterr().out
    assert "No space left on device" in said and "Using bundled/hammer/demos-v0: ITS SCORES ARE NOT D4RL" in said
    monkeypatch.setattr(minari, "download_dataset", Mock(side_effect=PermissionError("401: token expired\nRequest: 5")))
    for named in (("AdroitHandPen-v1", "D4RL/pen/human-v2"), ("AdroitHandRelocate-v1",)):
        with pytest.raises(SystemExit, match="D4RL/.*: 401: token expired.*check the network") as error:
            iql.load_dataset(*named)
        assert "Request" not in str(error.value)
    with pytest.raises(SystemExit, match="Tiny-v0 has no default dataset: name one with --dataset-id"):
        iql.load_dataset("Tiny-v0")


def test_the_bundled_sets_are_found_through_a_link_and_missed_where_a_script_is_alone(root, tmp_path):
    (tmp_path / "linked.py").symlink_to(ROOT / "iql_continuous.py")
    shutil.copy(ROOT / "iql_continuous.py", tmp_path / "alone.py")
    linked, alone = (runpy.run_path(tmp_path / f"{name}.py")["load_dataset"] for name in ("linked", "alone"))
    assert linked("AdroitHandHammer-v1").id == "bundled/hammer/demos-v0"
    with pytest.raises(SystemExit, match="D4RL/hammer/expert-v2 .*check the network"):
        alone("AdroitHandHammer-v1")


# WHAT IS REFUSED
def edit(data, **metadata):
    path = data / "metadata.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **metadata}))


BROKEN = {
    "no folder": (shutil.rmtree, "doesn't exist"),
    "no data": (lambda data: (data / "main_data.hdf5").unlink(), "is not all at .*odd/set-v0 yet"),
    "cut data": (lambda data: os.truncate(data / "main_data.hdf5", 9000), "truncated file"),
    "no metadata": (lambda data: (data / "metadata.json").unlink(), "No data found"),
    "cut metadata": (lambda data: os.truncate(data / "metadata.json", 100), "JSONDecodeError"),
    "of another Minari": (lambda data: edit(data, minari_version="99.0"), "generated by Minari 99.0"),
    "empty metadata": (lambda data: (data / "metadata.json").write_text("{}"), ""),
    "fewer episodes": (lambda data: edit(data, total_episodes=2), "episode_1"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_dataset_is_named_and_nobody_is_told_to_delete_it(how, root):
    """Another process may be downloading it."""
    change, telling = BROKEN[how]
    write(episode())
    change(root / "odd" / "set-v0" / "data")
    with pytest.raises(SystemExit, match=f"^odd/set-v0 cannot be .*{telling}") as error:
        iql.load_transitions(iql.load_dataset("Tiny-v0", "odd/set-v0"), tiny())
    assert "delete" not in str(error.value)


def test_nothing_else_is_to_be_deleted(root, monkeypatch):
    """Not what somebody else writes at the moment, what needs another package, and what may not be read."""
    write(episode())
    with open(root / "odd" / "set-v0" / "data" / "main_data.hdf5") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as HDF5 does
        with pytest.raises(SystemExit, match="^odd/set-v0 cannot be read: .*lock"):
            iql.load_transitions(iql.load_dataset("Tiny-v0", "odd/set-v0"), tiny())
    edit(root / "odd" / "set-v0" / "data", data_format="arrow")
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # not installed
    with pytest.raises(ImportError, match="pip install"):
        iql.load_dataset("Tiny-v0", "odd/set-v0")
    monkeypatch.setattr(minari, "MinariDataset", Mock(side_effect=PermissionError(13, "Permission denied")))
    with pytest.raises(SystemExit, match="^odd/set-v0 cannot be opened, .*PermissionError"):
        iql.load_dataset("Tiny-v0", "odd/set-v0")


@pytest.mark.parametrize("dataset_id", ["odd", "{root}", "bundled/pen"])
def test_a_folder_that_is_no_dataset_is_not_to_be_deleted(dataset_id, root):
    write(episode())
    with pytest.raises(SystemExit) as error:
        iql.load_dataset("Tiny-v0", dataset_id.format(root=root))
    assert "delete" not in str(error.value)


OF_OTHER_SHAPES = [("observations", (11, 4)), ("observations", (10, 3)), ("actions", (10, 3)), ("actions", (11, 2))]
OF_OTHER_SHAPES += [("actions", (10,)), ("rewards", (10, 1)), ("terminations", (11,))]


def test_a_dataset_that_does_not_fit_is_refused(root):
    for k, (name, shape) in enumerate(OF_OTHER_SHAPES):
        dataset = write(episode(), episode(**{name: np.zeros(shape, np.float32)}), dataset_id=f"odd/misfit-v{k}")
        with pytest.raises(SystemExit) as error:
            iql.load_transitions(dataset, tiny())
        assert f"odd/misfit-v{k} does not fit Tiny-v0" in str(error.value) and str(shape) in str(error.value)


@pytest.mark.parametrize(
    ("env_id", "keys", "steps"),
    [("tiny_env:Tiny", "za", 11), ("odd_env:Parts", "z", 11), ("odd_env:Parts", "za", 10)],
)
def test_a_dict_that_does_not_fit_is_refused(env_id, keys, steps, root):
    space = gym.spaces.Dict({key: odd_env.Parts.observation_space[key] for key in keys})
    parts = {key: np.zeros((steps, *part.shape), np.float32) for key, part in space.items()}
    dataset = write(episode(observations=parts), observation_space=space)
    with pytest.raises(SystemExit, match="odd/set-v0 does not fit"):
        iql.load_transitions(dataset, iql.make_env(f"{env_id}-v0")())


NAN, INFINITY = float("nan"), float("inf")
UNFINITE = [("observations", -2, NAN), ("next_observations", -1, INFINITY), ("rewards", 0, NAN), ("actions", 0, NAN)]


@pytest.mark.parametrize("name, place, value", [*UNFINITE, ("actions", 0, INFINITY)])
def test_a_dataset_that_is_not_finite_is_refused(name, place, value, root):
    wrong = episode()
    getattr(wrong, name.removeprefix("next_"))[place] = value
    dataset = write(episode(), wrong)
    with pytest.raises(SystemExit, match=f"odd/set-v0 holds NaN or infinity in its {name}"):
        iql.load_transitions(dataset, tiny())


LENGTH = {"iql_continuous": "--total-updates 10"}
LENGTH["iql_finetune"] = "--offline-updates 10 --online-steps 20 --learning-starts 10"


@pytest.fixture(scope="module")
def finished(minari_root, tmp_path_factory):
    """The run directory of each script, on a set with large numbers, one that never changes, and scores of its own."""
    observations = np.random.default_rng(1).normal(1e6, 10, (31, 3)).astype(np.float32)
    observations[:, 2] = 0.5
    dataset = write(episode(30, observations=observations), dataset_id="odd/scored-v0")
    dataset.storage.update_metadata({"ref_min_score": -10.0, "ref_max_score": 50.0})
    folders = {script: tmp_path_factory.mktemp(script) for script in SCRIPTS}
    for script, folder in folders.items():
        run(script, folder, f"{LENGTH[script]} --dataset-id odd/scored-v0")
    return {script: run_dir(folder) for script, folder in folders.items()}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_standardizes_what_varies_and_scores_by_the_datasets_own_reference(script, finished, tmp_path):
    obs = next(minari.load_dataset("odd/scored-v0").iterate_episodes()).observations[:-1].astype(np.float64)
    saved = torch.load(finished[script] / "checkpoint.pt", weights_only=True)
    np.testing.assert_allclose(saved["agent"]["actor.obs_mean"], obs.mean(0), rtol=1e-12)
    np.testing.assert_allclose(saved["agent"]["actor.obs_std"], [*(obs.std(0)[:2] + 1e-3), 1], rtol=1e-9)
    measured = json.loads((finished[script] / "args.json").read_text())
    assert measured["dataset"]["episodic_return"] == 10  # of 30 steps
    rows = [measured["dataset"], measured["random"], *saved["evaluations"]]
    if script == "iql_continuous":
        run(script, tmp_path, f"--checkpoint {finished[script]}/best.pt --total-updates 0 --dataset-id None")
        rows += saved_by(tmp_path)["evaluations"]  # without the dataset
    for row in rows:
        assert row["normalized_score"] == pytest.approx(100 * (row["episodic_return"] + 10) / 60)


class Hostile:
    """Unpickling it creates a file `executed` in the working directory."""

    def __reduce__(self):
        return os.system, ("touch executed",)


def test_a_checkpoint_that_does_not_do_is_refused_and_nothing_in_it_is_executed(finished, monkeypatch, tmp_path):
    good, path = finished["iql_continuous"] / "checkpoint.pt", tmp_path / "bad.pt"
    data = good.read_bytes()
    flipped, deflated = bytearray(data), bytearray(data)
    flipped[len(data) // 2] ^= 1  # within the weights
    deflated[data.index(b"PK\x01\x02") + 10] = 8  # says that a part is compressed, which none is
    bad = [None, b"", data[:100_000], flipped, deflated, pickle.dumps(Hostile()), torch.zeros(3), [1, 2]]
    bad += [{"weights": torch.zeros(3)}, {**torch.load(good, weights_only=True), "agent": Hostile()}]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for content in bad:
        if isinstance(content, (bytes, bytearray)):
            path.write_bytes(content)
        elif content is not None:
            torch.save(content, path)
        with pytest.raises(SystemExit, match="bad.pt is missing, damaged or not a checkpoint of these scripts"):
            iql.load(path)
    assert not any((tmp_path / "here").iterdir())


OUT_OF_RANGE = {
    "at least 1": "batch_size=0 eval_frequency=0 eval_episodes=0 final_episodes=0 eval_envs=0",
    "episodes and environments": "max_episodes=0 max_episodes=-1",
    "between 0 and 1": "expectile=0 expectile=1 gamma=-1 gamma=2 tau=-1 tau=2 actor_dropout=-1 actor_dropout=1",
    "--learning-rate must be above 0": "learning_rate=0 learning_rate=nan",
    "at least 0": "max_weight=-1 beta=-1",
}
LENGTHS = {iql: "total_updates=-1"}
LENGTHS[iql_finetune] = "offline_updates=-1 online_steps=-1 learning_starts=-1 exploration_scale=-1"


@pytest.mark.parametrize("script", LENGTHS, ids=SCRIPTS)
def test_an_argument_out_of_range_is_refused(script):
    for telling, arguments in [*OUT_OF_RANGE.items(), ("at least 0", LENGTHS[script])]:
        for argument in arguments.split():
            name, value = argument.split("=")
            with pytest.raises(ValueError, match=telling):
                script.Args(**{name: float(value)})


@pytest.fixture
def ending(monkeypatch, tmp_path):
    """Runs a script in this process and without others; returns what it ends with, None if that is its good end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(gym.vector, "AsyncVectorEnv", gym.vector.SyncVectorEnv)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda *_: None)

    def run_here(path, arguments):
        monkeypatch.setattr(sys, "argv", [str(path), *arguments.split()])
        try:
            runpy.run_path(str(path), run_name="__main__")
        except (SystemExit, NameError) as error:
            return str(error)

    return run_here


FREE = "resume eval_frequency final_episodes eval_envs capture_video track wandb_project_name wandb_entity".split()


def other_values(script):
    """A flag for each argument with another value than that of the tiny run."""
    for name, value in vars(script.Args()).items():
        if isinstance(value, bool):
            yield name, f"--{'no-' if value else ''}{name.replace('_', '-')}"
        else:
            other = {"expectile": 0.6, "gamma": 0.5, "tau": 0.5, "actor_dropout": 0.5, "seed": 99}.get(name, 7)
            yield name, f"--{name.replace('_', '-')} {'another' if isinstance(value, str) or name in TEXTS else other}"


TEXTS = "wandb_entity checkpoint dataset_id".split()


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_would_make_another_run_is_refused(script, finished, ending, tmp_path, capsys):
    copied = shutil.copytree(finished[script], tmp_path / "copied")
    path, length = (
        ROOT / f"{script}.py",
        {"iql_continuous": "--total-updates", "iql_finetune": "--online-steps"}[script],
    )
    before = {file: file.read_bytes() for file in copied.iterdir()}
    for name, flag in other_values(SCRIPT[script]):
        # a finished run takes nothing anew, a longer one what does not change what is learned
        if name not in ("resume", "cuda", "total_updates", "online_steps"):
            assert f"{copied} takes no other {name} at step" in ending(path, f"--resume {copied} {flag}"), flag
            if name not in FREE:
                longer = f"--resume {copied} {length} 60 {flag}"
                assert f"takes no other {name} at step" in ending(path, longer), flag
    assert f"takes no other {length[2:].replace('-', '_')}" in ending(path, f"--resume {copied} {length} 5")
    assert ending(path, f"--resume {copied}") == "" and "is finished: global_step=" in capsys.readouterr().out
    (other,) = set(SCRIPTS) - {script}
    assert "of another script" in ending(path, f"--resume {finished[other]}")
    assert "nowhere/checkpoint.pt is missing" in ending(path, "--resume nowhere")
    assert ending(path, "--expectile 2") == "2"  # tyro's status
    assert "--actor-dropout must lie" in capsys.readouterr().err
    wide = f"--checkpoint {copied}/best.pt --no-cuda --env-id tiny_env:Wide-v0"
    assert "tiny_env:Tiny-v0, not of tiny_env:Wide-v0" in ending(path, wide)
    assert before == {file: file.read_bytes() for file in copied.iterdir()}
    state, longer = torch.load(finished[script] / "checkpoint.pt", weights_only=True), f"{length} 60"
    for changed, telling in (({"cuda": True}, "another device"), ({"dataset_id": "tiny/other-v0"}, "has changed")):
        torch.save({**state, "args": {**state["args"], **changed}}, copied / "checkpoint.pt")
        assert telling in ending(path, f"--resume {copied} {longer}")
    torch.save({name: value for name, value in state.items() if name != "fingerprint"}, copied / "checkpoint.pt")
    assert "of another script or version" in ending(path, f"--resume {copied} {longer}")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("place", ["def load_transitions(", "def update("])
def test_a_researchers_own_mistake_keeps_its_name(script, place, ending, tmp_path):
    text = (ROOT / f"{script}.py").read_text()
    begin = text.index('"""\n', text.index('"""', text.index(place)) + 3) + 4
    (tmp_path / f"{script}.py").write_text(text[:begin] + "    undefined_name\n" + text[begin:])
    assert ending(tmp_path / f"{script}.py", f"{TINY} {LENGTH[script]}") == "name 'undefined_name' is not defined"


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_cuda_nothing_asks_cuda(script, ending, monkeypatch):
    def poison():
        assert sys._getframe(1).f_globals["__name__"] != "__main__", "the script asked CUDA"  # PyTorch itself may
        return False

    monkeypatch.setattr(torch.cuda, "is_available", poison)
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: pytest.fail("the script used CUDA"))
    assert ending(ROOT / f"{script}.py", f"{TINY} {LENGTH[script]}") is None


# WHOLE RUNS
def test_a_refused_run_ends_with_its_sentence_and_leaves_nothing(root, tmp_path):
    write(episode(rewards=np.full(10, np.nan)))
    done = finish(start("iql_finetune", tmp_path / "work", "--dataset-id odd/set-v0"))
    assert_refused(done, "odd/set-v0 holds NaN or infinity in its rewards")
    assert not any((tmp_path / "work").iterdir())


def test_an_environment_that_raises_keeps_its_traceback(tmp_path):
    (tmp_path / "raise").touch()
    (tmp_path / "runs").mkdir()
    done = finish(start("iql_continuous", tmp_path, ""))
    assert done.returncode != 0 and "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1] == "ZeroDivisionError: the environment's own mistake"


def test_args_json_names_the_bundled_set_that_took_the_default_ones_place(root, tmp_path):
    run("iql_continuous", tmp_path, "--env-id AdroitHandPen-v1 --dataset-id None --total-updates 0")
    assert json.loads((run_dir(tmp_path) / "args.json").read_text())["args"]["dataset_id"] == "bundled/pen/demos-v0"


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_goal_environment_is_learned_from(script, root, tmp_path):
    env = gym.make("PointMaze_UMaze-v3", max_episode_steps=30)
    seen, actions = [env.reset(seed=0)[0]], []
    while len(actions) < 30:
        actions.append(env.action_space.sample())
        seen.append(env.step(actions[-1])[0])
    observations = {name: np.array([obs[name] for obs in seen]) for name in seen[0]}
    spaces = {"observation_space": env.observation_space, "action_space": env.action_space}
    write(episode(30, observations=observations, actions=np.array(actions)), **spaces)
    flags = f"--env-id PointMaze_UMaze-v3 --dataset-id odd/set-v0 {LENGTH[script]} --eval-frequency 100"
    final = run(script, tmp_path, flags).splitlines()[-1]
    assert final.startswith("final: PointMaze_UMaze-v3") and "success_rate=" in final
    assert saved_by(tmp_path)["agent"]["actor.obs_mean"].shape == (8,)
