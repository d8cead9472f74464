"""Environments, datasets and checkpoints: what becomes of good ones, and the sentence that bad ones get."""

import fcntl
import json
import os
import pickle
import re
import runpy
import shutil
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import Mock

import gymnasium as gym
import minari
import numpy as np
import pytest
import tiny_env
import torch
from processes import NOTHING, ROOT, SCRIPTS, by_script, refused, run, run_dir, saved_by
from tiny_env import ACTIONS, OBSERVATIONS, UNFIT_ACTIONS, Parts, episode, write

import iql_continuous as iql
import iql_finetune

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Minari wants an author, an e-mail address and more


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


def test_an_environment_that_does_not_do_is_refused():
    for kind, space in [*UNFIT_ACTIONS.items(), ("Endless", None)]:
        telling = f"-v0 has actions in {type(space).__name__}" if space else "no time limit"
        with pytest.raises(ValueError, match=telling):
            iql.make_env(f"tiny_env:{kind}-v0")()


@pytest.mark.parametrize("vector", [gym.vector.SyncVectorEnv, gym.vector.AsyncVectorEnv])
def test_an_evaluation_counts_each_episode_to_its_end_and_no_further(vector):
    """With as many environments as one likes, which end at different steps and do not all report successes."""
    for num_envs, kind in ((1, "Ending"), (4, "Ending"), (4, "Silent")):
        env, returns, successes = iql.make_env(f"tiny_env:{kind}-v0")(), [], []
        for k in range(7):
            env.reset(seed=1_000_000 + k)
            steps = []
            while not (steps and (steps[-1][2] or steps[-1][3])):
                steps.append(env.step(np.ones(2, np.float32)))
            returns.append(sum(step[1] for step in steps))
            successes.append(any(step[4].get("success", False) for step in steps))
        envs = vector([iql.make_env(f"tiny_env:{kind}-v0")] * num_envs)
        found = iql.evaluate(envs, lambda obs: np.ones((len(obs), 2), np.float32), episodes=7)
        envs.close()
        assert found[0].tolist() == pytest.approx(returns)
        assert (found[1] is None) if kind == "Silent" else (found[1].tolist() == successes and 0 < sum(successes) < 7)
    alone = gym.vector.SyncVectorEnv([iql.make_env("tiny_env:Ending-v0")])
    starts = [alone.reset(seed=1_000_000 + k)[0][0, 0] > 0 for k in range(7)]  # these report
    assert starts[0] and not all(starts)
    for k in range(7):  # once an episode has reported, all have
        assert iql.evaluate(alone, lambda obs: np.ones((1, 2), np.float32), k + 1)[1] is not None


@pytest.mark.parametrize("value", [np.nan, None, np.array([np.nan]), 0, np.array([True]), np.bool_(True), 1.0])
def test_success_may_be_an_array_of_one_and_neither_nan_nor_none_is_one(value, monkeypatch, tmp_path):
    plain, success = tiny_env.Tiny.step, bool(value == 1)
    monkeypatch.setattr(tiny_env.Tiny, "step", lambda *arguments: (*plain(*arguments)[:4], {"success": value}))
    run("iql_finetune", tmp_path, "--offline-updates 0 --learning-starts 0 --online-steps 20")
    saved = saved_by(tmp_path)
    assert saved["online_successes"] == 2 * [success] and saved["evaluations"][-1]["success_rate"] == success


# WHAT IS READ
def test_actions_are_read_in_the_unit_that_they_were_recorded_in(own_root):
    """Tiny-v0 takes [-2, 0] to [2, 1]; a wrapper around it may take others."""
    low, bound = np.array([-1, 0]), 1 - 1e-5  # the official code's
    actions = np.array([low, [1, 0.5], [0, 0.25], [0.5, 0.375], [9, 9], [-9, -9]])
    dataset = write("odd/set-v0", episode(6, actions=actions), action_space=tiny_env.box(low, [1, 0.5]))
    read = np.array([-bound, bound, 0, 0.5, bound, -bound])
    found = iql.load_transitions(dataset, tiny())[0]["actions"]
    np.testing.assert_allclose(found, np.stack([read, read], 1), rtol=0, atol=1e-7)


def test_observations_are_flattened_as_the_environment_flattens_them(own_root, tmp_path):
    env = iql.make_env("tiny_env:Parts-v0")()
    own, flat = env.unwrapped.reset(seed=0)[0], env.reset(seed=0)[0].tolist()
    assert flat == [*own["z"], *own["a"][0]]
    matrices, wide = np.arange(44, dtype=np.float32).reshape(11, 2, 2), iql.make_env("tiny_env:Wide-v0")()
    parts = {name: np.stack(11 * [part]) for name, part in own.items()}
    dataset = write("odd/parts-v0", episode(observations=parts), observation_space=Parts.parts)
    transitions, _ = iql.load_transitions(dataset, env)
    assert transitions["observations"].tolist() == transitions["next_observations"].tolist() == 10 * [flat]
    space = wide.unwrapped.observation_space
    dataset = write("odd/wide-v0", episode(observations=matrices), observation_space=space)
    assert iql.load_transitions(dataset, wide)[0]["next_observations"].flatten().tolist() == list(range(4, 44))
    for script in SCRIPTS:
        run(script, tmp_path / script, f"--env-id tiny_env:Parts-v0 --dataset-id odd/parts-v0 {NOTHING[script]}")


def pen_episode(heights, **arrays):
    """An episode of pen in which the pen is this high, its steps worth 1, 2, 3..."""
    observations = np.random.default_rng(len(heights)).normal(size=(len(heights), 45))
    observations[:, 26], steps = heights, len(heights) - 1
    actions, last = np.zeros((steps, 24), np.float32), np.arange(steps) == steps - 1
    rest = {"actions": actions, "rewards": 1.0 + np.arange(steps), "terminations": last & False, "truncations": last}
    return tiny_env.EpisodeBuffer(observations=observations, **{**rest, **arrays})


def test_an_episode_of_pen_ends_where_d4rl_ends_it_as_a_termination(own_root):
    """What follows is left out, of the score too, and an episode that begins on the ground altogether."""
    high, ground, limit, env = 0.2, 0.074, 0.075, iql.make_env("AdroitHandPen-v1")()
    box = gym.spaces.Box(-np.inf, np.inf, (45,), np.float64)
    spaces = {"observation_space": box, "action_space": env.action_space}
    heights = [high, limit, high, ground, ground, high], [ground, ground, high], [high, high, limit]
    fallen = pen_episode([high, high, ground], terminations=np.array([False, True]))
    dataset = write("odd/pen-v0", *map(pen_episode, heights), fallen, **spaces)
    transitions, returns = iql.load_transitions(dataset, env)
    assert returns.tolist() == [6, 3, 3] and transitions["rewards"].tolist() == [1, 2, 3, 1, 2, 1, 2]
    assert transitions["terminations"].tolist() == [0, 0, 1, 0, 0, 0, 1]
    seen = np.concatenate([e.observations for e in dataset.iterate_episodes([0, 2, 3])])
    assert (transitions["observations"] == seen[[0, 1, 2, 6, 7, 9, 10]]).all()
    assert (transitions["next_observations"] == seen[[1, 2, 3, 7, 8, 10, 11]]).all()
    assert len(iql.load_transitions(dataset, env, max_episodes=2)[1]) == 1
    # sets that follow the rule stay as they are, and so does what is no pen
    bundled = iql.load_dataset("AdroitHandPen-v1", "bundled/pen/demos-v0")
    terminations = np.concatenate([e.terminations for e in bundled.iterate_episodes()])
    assert (iql.load_transitions(bundled, env)[0]["terminations"] == terminations).all()
    gym.register("NoPen-v0", entry_point=lambda: tiny_env.Tiny(*spaces.values()), max_episode_steps=10)
    assert iql.load_transitions(dataset, iql.make_env("NoPen-v0")())[1].tolist() == [15, 3, 3, 3]
    # the binary task ends nothing, and takes no other rewards than its own
    sparse = iql.make_env("AdroitHandPenSparse-v1")()
    dropped = pen_episode([high, ground, high], rewards=np.array([-1.0, 0.0]))
    transitions, returns = iql.load_transitions(write("odd/sparse-v0", dropped, **spaces), sparse)
    assert returns.tolist() == [-1] and not transitions["terminations"].any()
    with pytest.raises(SystemExit, match="^odd/pen-v0 has other rewards than AdroitHandPenSparse-v1, .*0 at the goal"):
        iql.load_transitions(dataset, sparse)
    dataset = write("odd/ground-v0", *2 * [pen_episode([ground, high])], **spaces)
    with pytest.raises(SystemExit, match="^odd/ground-v0 holds no episode: use another dataset"):
        iql.load_transitions(dataset, env)


def test_data_of_another_environment_are_warned_of(own_root, capsys):
    """Or of the same one with other arguments, wrappers or time limit, but not where the script sets the limit."""
    plain, env = 'kwargs {"render_mode": null}, wrappers [], time limit 10', gym.make("tiny_env:Ending-v0")
    wrapped, longer = gym.wrappers.NormalizeReward(env), gym.make("Ending-v0", max_episode_steps=40)
    origins = {plain: env, plain.replace("[]", "['NormalizeReward']"): wrapped, plain.replace("10", "40"): longer}
    for k, (origin, env) in enumerate(origins.items()):
        dataset = write(f"odd/set-v{k}", episode(), env=env.spec)
        for kind, kwargs in (("Ending", {}), ("Tiny", {}), ("Ending", {"action_space": gym.spaces.Box(-1, 1, (2,))})):
            iql.load_transitions(dataset, iql.make_env(f"tiny_env:{kind}-v0", **kwargs)())
            used = plain if not kwargs else 'kwargs {"action_space": "Box('
            said = f"WARNING: odd/set-v{k} was recorded in Ending-v0, {origin}, and not in {kind}-v0, {used}"
            assert (said in capsys.readouterr().err) == (k > 0 or kind == "Tiny" or bool(kwargs))
    for task in ("pen", "door"):  # 100 steps in this dataset's environment and 200 in the registered one
        env_id = f"AdroitHand{task.capitalize()}-v1"
        iql.load_transitions(iql.load_dataset(env_id, f"bundled/{task}/demos-v0"), iql.make_env(env_id)())
    assert "WARNING" not in capsys.readouterr().err


def test_the_dataset_that_is_read_is_the_one_that_is_named(own_root, monkeypatch, capsys):
    monkeypatch.setattr(minari, "download_dataset", there := Mock(side_effect=lambda name: write(name, episode())))
    for _ in range(2):  # downloaded once
        assert iql.load_dataset("AdroitHandPen-v1").id == "D4RL/pen/expert-v2"
    assert iql.load_dataset("AdroitHandPen-v1", "bundled/hammer/demos-v0").id == "bundled/hammer/demos-v0"
    there.assert_called_once_with("D4RL/pen/expert-v2")
    monkeypatch.setattr(minari, "download_dataset", Mock(side_effect=OSError(28, "No space left on device")))
    assert iql.load_dataset("AdroitHandHammer-v1").id == "bundled/hammer/demos-v0"  # not in place of a named one
    said = capsys.readouterr().out
    assert "No space left on device" in said and "Using bundled/hammer/demos-v0: ITS SCORES ARE NOT D4RL" in said
    monkeypatch.setattr(minari, "download_dataset", Mock(side_effect=PermissionError("401: token expired\nRequest: 5")))
    for named in (("AdroitHandPen-v1", "D4RL/pen/human-v2"), ("AdroitHandRelocate-v1",)):
        with pytest.raises(SystemExit, match="D4RL/.*: 401: token expired.*check the network") as error:
            iql.load_dataset(*named)
        assert "Request" not in str(error.value)
    with pytest.raises(SystemExit, match="Tiny-v0 has no default dataset: name one with --dataset-id"):
        iql.load_dataset("Tiny-v0")


def test_the_bundled_sets_are_found_through_a_link_and_missed_where_a_script_is_alone(own_root, tmp_path):
    (tmp_path / "linked.py").symlink_to(ROOT / "iql_continuous.py")
    alone = shutil.copy(ROOT / "iql_continuous.py", tmp_path / "alone.py")
    found = runpy.run_path(tmp_path / "linked.py")["load_dataset"]("AdroitHandHammer-v1")
    assert found.id == "bundled/hammer/demos-v0"
    with pytest.raises(SystemExit, match="D4RL/hammer/expert-v2 .*check the network"):
        runpy.run_path(alone)["load_dataset"]("AdroitHandHammer-v1")


# WHAT IS REFUSED
def edit(data, **metadata):
    path = data / "metadata.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **metadata}))


BROKEN = {
    "no folder": (shutil.rmtree, "opened.*doesn't exist"),
    "no data": (lambda data: (data / "main_data.hdf5").unlink(), "opened, or is not all at .*odd/set-v0 yet"),
    "cut data": (lambda data: os.truncate(data / "main_data.hdf5", 9000), "truncated file"),
    "no metadata": (lambda data: (data / "metadata.json").unlink(), "No data found"),
    "cut metadata": (lambda data: os.truncate(data / "metadata.json", 100), "JSONDecodeError"),
    "of another Minari": (lambda data: edit(data, minari_version="99.0"), "generated by Minari 99.0"),
    "empty metadata": (lambda data: (data / "metadata.json").write_text("{}"), "opened"),
    "fewer episodes": (lambda data: edit(data, total_episodes=2), "read: .*episode_1"),
    "locked by HDF5": (lambda data: fcntl.flock(os.open(data / "main_data.hdf5", 0), fcntl.LOCK_EX), "read: .*lock"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_dataset_is_named_and_nobody_is_told_to_delete_it(how, own_root):
    """Another process may be downloading it, or somebody else may be writing it."""
    write("odd/set-v0", episode())
    BROKEN[how][0](own_root / "odd" / "set-v0" / "data")
    with pytest.raises(SystemExit, match=f"^odd/set-v0 cannot be .*{BROKEN[how][1]}") as error:
        iql.load_transitions(iql.load_dataset("Tiny-v0", "odd/set-v0"), tiny())
    assert "delete" not in str(error.value)


def test_what_cannot_be_opened_for_another_reason_keeps_it(own_root, monkeypatch):
    write("odd/set-v0", episode())
    edit(own_root / "odd" / "set-v0" / "data", data_format="arrow")
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # not installed
    with pytest.raises(ImportError, match="pip install"):
        iql.load_dataset("Tiny-v0", "odd/set-v0")
    for name in ("odd", str(own_root), "bundled/pen", "", "odd/set-v0"):  # the first four hold datasets
        if name == "odd/set-v0":
            monkeypatch.setattr(minari, "MinariDataset", Mock(side_effect=PermissionError(13, "Permission denied")))
        with pytest.raises(SystemExit, match=f"^{name} cannot be opened, .*Error"):
            iql.load_dataset("Tiny-v0", name)


def test_a_dataset_that_does_not_fit_or_is_not_finite_is_refused(own_root):
    shapes = [("observations", (11, 4)), ("observations", (10, 3)), ("actions", (10, 3)), ("actions", (11, 2))]
    shapes += [("actions", (10,)), ("rewards", (10, 1)), ("terminations", (11,))]
    not_finite = [("observations", -2, np.nan), ("next_observations", -1, np.inf), ("rewards", 0, np.nan)]
    not_finite += [("actions", 0, np.nan), ("actions", 0, -np.inf)]
    cases = []
    for name, shape in shapes:
        telling = f"does not fit Tiny-v0: .*{re.escape(str(shape))}"
        cases.append(("Tiny", [episode(), episode(**{name: np.zeros(shape, np.float32)})], OBSERVATIONS, telling))
    for name in ("terminations", "truncations"):
        flags = {name: np.arange(10) == 3}
        cases.append(("Tiny", [episode(), episode(**flags)], OBSERVATIONS, "has an episode that goes on after a term"))
    for kind, keys, steps in (("Tiny", "za", 11), ("Parts", "z", 11), ("Parts", "za", 10)):
        space = gym.spaces.Dict({key: Parts.parts[key] for key in keys})
        parts = {key: np.zeros((steps, *part.shape), np.float32) for key, part in space.items()}
        cases.append((kind, [episode(observations=parts)], space, "does not fit"))
    for name, place, value in not_finite:
        wrong = episode()
        getattr(wrong, name.removeprefix("next_"))[place] = value
        cases.append(("Tiny", [episode(), wrong], OBSERVATIONS, f"holds NaN or infinity in its {name}"))
    for k, (kind, episodes, space, telling) in enumerate(cases):
        dataset = write(f"odd/set-v{k}", *episodes, observation_space=space)
        with pytest.raises(SystemExit, match=f"^odd/set-v{k} {telling}"):
            iql.load_transitions(dataset, iql.make_env(f"tiny_env:{kind}-v0")())


def test_a_dataset_in_other_spaces_is_refused(own_root):
    unreadable = [gym.spaces.Discrete(3), gym.spaces.MultiBinary(3), gym.spaces.Tuple([OBSERVATIONS])]
    unreadable += [gym.spaces.Dict(z=OBSERVATIONS, a=gym.spaces.Dict(b=OBSERVATIONS))]
    told = "only a Box or a Dict of them can be read"
    cases = [({"observation_space": space}, told) for space in unreadable]
    cases += [({"action_space": space}, told) for space in [*unreadable, gym.spaces.Dict(a=ACTIONS)]]
    bounds = ([-np.inf, 0], [2, 1]), ([-2, 0], [2, np.inf]), ([-2, 0], [2, 0])
    unbounded = [{"action_space": tiny_env.box(*pair)} for pair in bounds]
    cases += [(spaces, "has actions in Box.*use a dataset with finite bounds") for spaces in unbounded]
    good = write("odd/set-v0", episode())
    for spaces, telling in cases:
        odd = {"observation_space": OBSERVATIONS, "action_space": ACTIONS, "total_episodes": 1, **spaces}
        odd = SimpleNamespace(id="odd/set-v0", env_spec=None, iterate_episodes=good.iterate_episodes, **odd)
        with pytest.raises(SystemExit, match=f"^odd/set-v0 .*{telling}"):
            iql.load_transitions(odd, tiny())
    vars(odd).update(action_space=tiny_env.box([-2, -3e38], [2, 3e38]))  # wider than a float32, and yet finite
    assert np.isfinite(iql.load_transitions(odd, tiny())[0]["actions"]).all()
    odd.iterate_episodes = lambda *_: []
    with pytest.raises(SystemExit, match="^odd/set-v0 holds no episode: use another dataset"):
        iql.load_transitions(odd, tiny())


def test_a_checkpoint_that_does_not_do_is_refused_and_nothing_in_it_is_executed(monkeypatch, tmp_path):
    run("iql_continuous", tmp_path / "runs", NOTHING["iql_continuous"])
    saved, path = saved_by(tmp_path / "runs"), tmp_path / "bad.pt"
    data = (run_dir(tmp_path / "runs") / "checkpoint.pt").read_bytes()
    flipped, deflated = bytearray(data), bytearray(data)
    flipped[len(data) // 2] ^= 1  # within the weights
    deflated[data.index(b"PK\x01\x02") + 10] = 8  # says that a part is compressed, which none is
    hostile = type("Hostile", (), {"__reduce__": lambda self: (os.system, ("touch executed",))})()  # if unpickled
    bad = [None, b"", data[:100_000], flipped, deflated, pickle.dumps(hostile), torch.zeros(3), [1, 2]]
    monkeypatch.chdir(tmp_path)
    for content in [*bad, {"weights": torch.zeros(3)}, {**saved, "agent": hostile}]:
        if isinstance(content, (bytes, bytearray)):
            path.write_bytes(content)
        elif content is not None:
            torch.save(content, path)
        with pytest.raises(SystemExit, match="bad.pt is missing, damaged or not a checkpoint of these scripts"):
            iql.load(path)
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "bad.pt"}


# BY WHOLE RUNS
@by_script
def test_a_run_standardizes_what_varies_and_scores_by_the_datasets_own_reference(script, own_root, tmp_path):
    """On a set with large numbers and one that never changes, of 30 steps where the environment has 10."""
    observations = np.random.default_rng(1).normal(1e6, 10, (31, 3)).astype(np.float32)
    observations[:, 2] = 0.5
    dataset = write("odd/scored-v0", episode(30, observations=observations, rewards=np.ones(30)))
    dataset.storage.update_metadata({"ref_min_score": -10.0, "ref_max_score": 50.0})
    run(script, tmp_path / "run", f"{NOTHING[script]} --dataset-id odd/scored-v0 --reward-scale 3")
    saved, obs = saved_by(tmp_path / "run"), observations[:-1].astype(np.float64)
    np.testing.assert_allclose(saved["agent"]["actor.obs_mean"], obs.mean(0), rtol=1e-12)
    np.testing.assert_allclose(saved["agent"]["actor.obs_std"], [*(obs.std(0)[:2] + 1e-3), 1], rtol=1e-9)
    agent = iql.Agent(3, 2, iql.Args())
    agent.load_state_dict(saved["agent"])
    exact = (obs + 0.01 - saved["agent"]["actor.obs_mean"].numpy()) / saved["agent"]["actor.obs_std"].numpy()
    np.testing.assert_allclose(agent.actor.normalize(obs + 0.01), exact, atol=1e-5)  # float32 would be off by 0.003
    measured = json.loads((run_dir(tmp_path / "run") / "args.json").read_text())
    write("odd/plain-v0", episode())  # has none: the checkpoint's
    flags = f"{NOTHING[script]} --checkpoint {run_dir(tmp_path / 'run')}/best.pt --dataset-id odd/plain-v0"
    run(script, tmp_path / "other", flags)
    rows = [*saved["evaluations"], *saved_by(tmp_path / "other")["evaluations"]]
    assert measured["dataset"]["episodic_return"] == 10
    for row in [measured["dataset"], measured["random"], *rows]:
        assert row["normalized_score"] == pytest.approx(100 * (row["episodic_return"] + 10) / 60)


@pytest.mark.parametrize("script", [iql, iql_finetune], ids=SCRIPTS)
def test_an_argument_out_of_range_is_refused(script, tmp_path, capsys):
    own = "total_updates" if script is iql else "offline_updates online_steps learning_starts exploration_scale"
    at_least_0 = [*own.split(), "max_weight", "beta"]
    at_least_1 = "batch_size eval_frequency eval_episodes eval_envs max_episodes".split()
    between = [("gamma", -1), ("gamma", 2), ("tau", -1), ("tau", 2), ("expectile", 0), ("expectile", 1)]
    cases = [("between 0 and 1", *case) for case in (*between, ("actor_dropout", -1), ("actor_dropout", 1))]
    cases += [("at least 1", name, value) for name in at_least_1 for value in (-1, 0)]
    cases += [("at least 0", name, -1) for name in (*at_least_0, "learning_rate")]
    cases += [("at least 0", "learning_rate", 0)]
    floats = [name for name, value in vars(script.Args()).items() if isinstance(value, float) or name == "reward_scale"]
    cases += [("between 0 and 1|nothing NaN", name, np.nan) for name in floats]
    cases += [("", name, 0) for name in (*at_least_0, "gamma", "tau", "actor_dropout")]
    cases += [("", name, 1) for name in (*at_least_1, "gamma", "tau")]
    for telling, name, value in cases:
        with pytest.raises(ValueError, match=telling) if telling else nullcontext():
            script.Args(**{name: value})
    if script is iql_finetune:
        assert script.Args(checkpoint="x").offline_updates == 0
        with pytest.raises(ValueError, match="--checkpoint takes the place of .* leave out --offline-updates"):
            script.Args(checkpoint="x", offline_updates=5)
    assert refused("2", script.__name__, tmp_path, "--actor-dropout 1") == 2  # tyro's status
    assert "--actor-dropout must lie between" in " ".join(capsys.readouterr().err.split())
    for steps in (1, 10) if script is iql_finetune else ():
        flags = f"--online-steps {steps} --learning-starts 10"
        refused("--online-steps must be more than --learning-starts, or 0.", "iql_finetune", tmp_path, flags)
    assert not any(tmp_path.iterdir())


@by_script
def test_errors_of_others_keep_their_names_and_without_cuda_nothing_asks_cuda(script, tmp_path, monkeypatch):
    def poison():
        assert sys._getframe(1).f_globals["__name__"] != "__main__", "the script asked CUDA"  # PyTorch itself may
        return False

    monkeypatch.setattr(torch.cuda, "is_available", poison)
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: pytest.fail("the script used CUDA"))
    run(script, tmp_path / "run", NOTHING[script])
    text, own = (ROOT / f"{script}.py").read_text(), tmp_path / f"{script}.py"
    for line in ("    space = dataset.observation_space\n", "    agent.train()\n"):  # a researcher's own mistake
        own.write_text(text.replace(line, f"{line}    undefined_name\n"))
        with pytest.raises(NameError, match="undefined_name"):
            run(own, tmp_path / "own")
    monkeypatch.setattr(tiny_env.Tiny, "step", Mock(side_effect=ZeroDivisionError("the environment's own mistake")))
    with pytest.raises(ZeroDivisionError, match="own mistake"):
        run(script, tmp_path / "x")


def test_a_script_alone_in_a_folder_ends_in_a_sentence_and_leaves_nothing(own_root, tmp_path):
    """In a process of its own, which imports everything."""
    write("odd/set-v0", episode(rewards=np.full(10, np.nan)))
    (tmp_path / "work").mkdir()
    shutil.copy(ROOT / "iql_finetune.py", tmp_path / "work")
    command = [sys.executable, "iql_finetune.py", *"--env-id tiny_env:Tiny-v0 --dataset-id odd/set-v0".split()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run(command, cwd=tmp_path / "work", env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["iql_finetune.py"]
    assert done.stderr.endswith("odd/set-v0 holds NaN or infinity in its rewards: use a dataset without.\n")
