"""Environments and datasets of many kinds: their actions, observations, rewards and what is said of them."""

import json
import sys

import gymnasium as gym
import minari
import numpy as np
import odd_env  # noqa: F401  registers the environments
import pytest
import torch
from minari.data_collector import EpisodeBuffer
from processes import run, run_dir

import iql_continuous as iql


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A Minari root of the test's own."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path / "minari"


def write(env_id, episodes, dataset_id="odd/set-v0", **more):
    """A dataset for an environment of the `episodes`, dicts of observations, actions and, where told, rewards."""
    env, buffers = gym.make(env_id), []
    for k, episode in enumerate(episodes):
        T = len(episode["actions"])
        ends = {"terminations": np.arange(T) == T + k % 2 - 1, "truncations": np.arange(T) == T - 1}
        buffers.append(EpisodeBuffer(**{"rewards": np.ones(T), **ends, **episode}))
    spaces = {"observation_space": env.observation_space, "action_space": env.action_space}
    return minari.create_dataset_from_buffers(dataset_id, buffers, env=env.spec, **spaces, **more)


def random_episodes(env_id, count=3, T=10):
    env = gym.make(env_id)
    observations = [np.stack([env.reset()[0] for _ in range(T + 1)]) for _ in range(count)]
    return [
        {"observations": obs, "actions": np.stack([env.action_space.sample() for _ in range(T)])}
        for obs in observations
    ]


def read(env_id, dataset, horizon=10):
    env = iql.check_env(env_id)
    return iql.load_transitions(dataset, env.observation_space, env.action_space, horizon)


# ACTIONS
ACTIONS = {
    "Matrix": ([-1, 0, 0.5, 1.0], [[-1, 0], [3, 4]]),
    "Scalar": ([0.25], 0.25),
    "IntAction": ([0.256, -1.0], [26, -100]),
    "Asymmetric": ([0.0, -0.5], [-1, 25]),
}


@pytest.mark.parametrize("kind", ACTIONS)
def test_the_environment_gets_actions_of_its_own_shape_dtype_and_range(kind):
    env = iql.make_env(f"{kind}-v0")()
    own = env.unwrapped.action_space
    given, wanted = ACTIONS[kind]
    assert env.action_space == gym.spaces.Box(-1, 1, (len(given),), np.float32)
    env.reset(seed=0)
    for action, result in ((given, wanted), (np.full(len(given), -1.5), own.low), (np.full(len(given), 1.5), own.high)):
        env.step(np.array(action, np.float32))
        assert env.unwrapped.action.shape == own.shape and env.unwrapped.action.dtype == own.dtype
        np.testing.assert_allclose(env.unwrapped.action, result, rtol=1e-6)


@pytest.mark.parametrize("kind", ACTIONS)
def test_the_datas_actions_become_those_that_do_the_same(kind, root, capsys):
    own = gym.make(f"{kind}-v0").action_space
    actions = np.stack([own.low, own.high, np.broadcast_to(ACTIONS[kind][1], own.shape)]).astype(own.dtype)
    dataset = write(f"{kind}-v0", [{"observations": np.zeros((4, 3)), "actions": actions}])
    transitions, _ = read(f"{kind}-v0", dataset)
    low, high, given = transitions["actions"]
    assert (low == np.float32(-1 + 1e-5)).all() and (high == np.float32(1 - 1e-5)).all()
    np.testing.assert_allclose(given, ACTIONS[kind][0], atol=0.005)  # 0.256 is 26 of 100
    assert "WARNING" not in capsys.readouterr().err


def test_actions_outside_the_bounds_are_clipped_and_their_share_is_said(root, capsys):
    actions = np.array([[0, 50], [1, 100], [1.1, 50], [-3, 0]], np.float32)
    dataset = write("Asymmetric-v0", [{"observations": np.zeros((5, 3)), "actions": actions}])
    transitions, _ = read("Asymmetric-v0", dataset)
    assert "WARNING: 25% of the actions of odd/set-v0 lie outside" in capsys.readouterr().err
    np.testing.assert_allclose(transitions["actions"][2], [1, 0], atol=2e-5)


@pytest.mark.parametrize(
    "kind, telling",
    [
        ("ZeroWidth", r"range of 0\.0 in dimension 1 of its actions"),
        ("Huge", "range of inf in dimension 2 of its actions"),
        ("NestedParts", r"NestedParts-v0 has Dict\(.*in its observations"),
        ("DiscreteParts", r"DiscreteParts-v0 has Discrete\(3\) in its observations"),
    ],
)
def test_what_cannot_be_scaled_or_flattened_is_refused(kind, telling):
    with pytest.raises(SystemExit, match=telling):
        iql.check_env(f"{kind}-v0")


def test_an_environment_need_not_know_of_rendering():
    iql.make_env("NoRenderMode-v0")()


# OBSERVATIONS
def test_bytes_are_observations(root):
    dataset = write("Image-v0", episodes := random_episodes("Image-v0"))
    transitions, _ = read("Image-v0", dataset)
    assert transitions["observations"].shape == (30, 48)
    assert (transitions["next_observations"][:10] == episodes[0]["observations"][1:].reshape(10, -1)).all()
    obs, _ = iql.make_env("Image-v0")().reset(seed=0)
    actor = iql.Actor(48, 1)
    actor.obs_mean.fill_(100)
    torch.testing.assert_close(actor.normalize(obs), torch.tensor(obs.astype(np.float32) - 100))


def test_a_dict_is_flattened_in_the_environments_order_there_and_in_the_data(root):
    obs, _ = iql.make_env("Parts-v0")().reset(seed=0)
    assert obs.tolist() == [1, 2, 3, 4, 5]
    observations = {"z": np.ones((4, 1), np.float32), "a": np.tile(np.float32([[2, 3], [4, 5]]), (4, 1, 1))}
    dataset = write("Parts-v0", [{"observations": observations, "actions": np.zeros((3, 2), np.float32)}])
    transitions, _ = read("Parts-v0", dataset)
    assert transitions["observations"].tolist() == transitions["next_observations"].tolist() == 3 * [obs.tolist()]


# EPISODES
@pytest.mark.parametrize(
    "kind",
    [
        "Asymmetric",
        "ArrayReward",
    ],
)
def test_episodes_are_counted_where_rewards_are_arrays_and_success_is_told_only_where_it_is(kind):
    envs = iql.make_eval_envs(f"{kind}-v0", 2)
    try:
        returns, successes = iql.evaluate(envs, lambda obs: np.zeros(envs.action_space.shape, np.float32), 5)
    finally:
        envs.close(terminate=True)
    assert returns.tolist() == [55, 15, 55, 15, 55]
    assert successes.tolist() == [False, True, False, True, False]


def test_the_datas_rewards_may_be_arrays(root):
    episode = random_episodes("ArrayReward-v0", 1)[0] | {"rewards": np.arange(10.0)[:, None]}
    transitions, returns = read("ArrayReward-v0", write("ArrayReward-v0", [episode]), horizon=4)
    assert transitions["rewards"].tolist() == list(range(10)) and returns.tolist() == [0 + 1 + 2 + 3]


def test_an_episode_that_lacks_its_last_observation_is_named(root):
    episodes = random_episodes("Asymmetric-v0")
    episodes[1]["observations"] = episodes[1]["observations"][:-1]
    with pytest.raises(SystemExit, match="odd/set-v0 has 10 observations for the 10 steps of an episode, not 11"):
        read("Asymmetric-v0", write("Asymmetric-v0", episodes))


# DATASETS
def test_data_of_another_environment_are_warned_of(root, capsys):
    write("Asymmetric-v0", random_episodes("Asymmetric-v0"))
    iql.load_dataset("odd_env:Asymmetric-v0", "odd/set-v0")
    assert "WARNING" not in capsys.readouterr().err
    iql.load_dataset("odd_env:IntAction-v0", "odd/set-v0")
    assert "was recorded in Asymmetric-v0, not in odd_env:IntAction-v0" in capsys.readouterr().err


@pytest.mark.parametrize(
    "key, value, telling",
    [("data_format", "arrow", "pyarrow"), ("minari_version", "0.0.1", f"Minari 0.0.1.*Minari {minari.__version__}")],
)
def test_what_a_dataset_needs_is_named_and_it_is_not_called_broken(key, value, telling, root, monkeypatch):
    write("Asymmetric-v0", random_episodes("Asymmetric-v0"))
    path = root / "odd" / "set-v0" / "data" / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    for name in ("pyarrow", "pyarrow.dataset"):
        monkeypatch.setitem(sys.modules, name, None)  # not installed
    with pytest.raises(SystemExit, match=telling) as error:
        iql.load_dataset("odd_env:Asymmetric-v0", "odd/set-v0")
    assert "delete" not in str(error.value)


# WHOLE RUNS
LENGTHS = {
    "iql_continuous": "--total-updates 20",
    "iql_finetune": "--offline-updates 10 --online-steps 15 --learning-starts 12",
}


@pytest.mark.parametrize("script", LENGTHS)
def test_a_run_standardizes_what_varies_and_scores_by_the_datasets_own_reference(script, root, tmp_path):
    episodes = random_episodes("Odd-v0")
    write("Odd-v0", episodes, ref_min_score=-10.0, ref_max_score=30.0)
    out = run(script, tmp_path / "work", f"--env-id odd_env:Odd-v0 --dataset-id odd/set-v0 {LENGTHS[script]}")
    assert "success_rate=0.5," in out.splitlines()[-1]
    path = run_dir(tmp_path / "work")
    measured = json.loads((path / "args.json").read_text())["dataset"]
    assert measured["episodic_return"] == 10 and measured["normalized_score"] == 50  # of -10 to 30
    agent = torch.load(path / "checkpoint.pt", weights_only=True)["agent"]
    obs = np.concatenate([episode["observations"][:-1] for episode in episodes])
    mean, std = agent["actor.obs_mean"].numpy(), agent["actor.obs_std"].numpy()
    np.testing.assert_allclose(mean - [1e8, 1e8, 0], obs.mean(0) - [1e8, 1e8, 0], atol=1e-6)
    np.testing.assert_allclose(std, [*(obs.std(0)[:2] + 1e-3), 1.0], rtol=1e-6)  # the third never changes
    actor = iql.Actor(3, 4)
    actor.obs_mean.copy_(torch.tensor(mean)), actor.obs_std.copy_(torch.tensor(std))
    np.testing.assert_allclose(actor.normalize(obs).std(0, correction=0), [1, 1, 0], atol=0.01)
    np.testing.assert_allclose(actor.normalize(obs), (obs - mean) / std, atol=1e-6)


@pytest.fixture(scope="module")
def maze_root(tmp_path_factory):
    """A Minari root with three episodes of PointMaze_UMaze-v3: towards the goal, with noise."""
    path, rng = tmp_path_factory.mktemp("pointmaze"), np.random.default_rng(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(path))
        env, episodes = gym.make("PointMaze_UMaze-v3", max_episode_steps=100), []
        for seed in range(3):
            obs, _ = env.reset(seed=seed)
            observations, actions, rewards, done = [obs], [], [], False
            while not done:
                towards = 5 * (obs["desired_goal"] - obs["achieved_goal"]) - obs["observation"][2:]
                actions.append(np.clip(towards + rng.normal(0, 0.3, 2), -1, 1).astype(np.float32))
                obs, reward, terminated, truncated, _ = env.step(actions[-1])
                observations.append(obs)
                rewards.append(reward)
                done = terminated or truncated
            columns = {name: np.array([obs[name] for obs in observations]) for name in obs}
            episodes.append({"observations": columns, "actions": np.array(actions), "rewards": np.array(rewards)})
        write("PointMaze_UMaze-v3", episodes, "pointmaze/umaze/tiny-v0")
    return path


@pytest.mark.parametrize("script", LENGTHS)
def test_a_goal_environment_is_learned_from(script, maze_root, tmp_path):
    flags = f"--env-id PointMaze_UMaze-v3 --dataset-id pointmaze/umaze/tiny-v0 {LENGTHS[script]}"
    flags += " --final-episodes 2 --eval-frequency 1000"
    out = run(script, tmp_path, flags, MINARI_DATASETS_PATH=str(maze_root))
    final = out.splitlines()[-1]
    assert final.startswith("final: PointMaze_UMaze-v3") and "success_rate=" in final
    agent = torch.load(run_dir(tmp_path) / "checkpoint.pt", weights_only=True)["agent"]
    assert agent["actor.obs_mean"].shape == (8,)
