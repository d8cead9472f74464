"""tests/datasets/record.py records what its README says, and a dataset has its id only once it is whole."""

import resource
from types import SimpleNamespace

import minari
import numpy as np
import pytest
import record
import torch

import iql_continuous as iql

# absolute actions and rewards, summed over the first ten steps of an episode with each noise
FIRST_STEPS = {"dapg/hammer/expert-v0": (124.861, -13.355), "dapg/pen/expert-v0": (181.959, -0.799)}
FIRST_STEPS |= {"dapg/hammer/mixed-v0": (595.142, -57.499), "dapg/pen/mixed-v0": (759.569, 13.833)}
FIRST_STEPS |= {"dapg/hammer/weak-v0": (502.736, -45.256), "dapg/pen/weak-v0": (628.079, 9.518)}
MIXED = "dapg/pen/mixed-v0"


@pytest.fixture(autouse=True)
def few_episodes(own_root, monkeypatch):
    monkeypatch.setattr(record, "DAPG", {name: (len(noises), noises) for name, (_, noises) in record.DAPG.items()})
    monkeypatch.setattr(record, "range", lambda first, end: range(first, min(end, first + 4)), raising=False)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def read(root, dataset_id):
    """A dataset's metadata, and its columns by name, each a list of episodes."""
    dataset, names = minari.MinariDataset(root / dataset_id / "data"), "observations actions rewards terminations"
    episodes = list(dataset.iterate_episodes())
    return dataset.storage.metadata, {name: [getattr(e, name) for e in episodes] for name in names.split()}


def test_the_default_sets_are_recorded_with_their_noises_and_the_same_again(own_root):
    record.dapg()
    for dataset_id, expected in FIRST_STEPS.items():
        metadata, columns = read(own_root, dataset_id)
        found = [sum(np.abs(a[:10]).sum() for a in columns["actions"]), sum(r[:10].sum() for r in columns["rewards"])]
        np.testing.assert_allclose(found, expected, rtol=0, atol=0.05)
        assert "DAPG's policies" in str(metadata["author"]) and "Not a file of D4RL's" in metadata["description"]
    _, first = read(own_root, MIXED)
    record.dapg((MIXED,), replace=True)
    for name, column in read(own_root, MIXED)[1].items():
        np.testing.assert_array_equal(np.concatenate(column), np.concatenate(first[name]))


@pytest.mark.parametrize("sentence", ["--replace records again", "stopped", "File too large"])
def test_what_goes_wrong_leaves_the_dataset_as_it_was(own_root, monkeypatch, sentence):
    def stop(dataset_id, *_, **__):
        (minari.storage.get_dataset_path(dataset_id) / "data").mkdir(parents=True)
        raise KeyboardInterrupt

    record.dapg((MIXED,))
    before = {path: path.is_file() and path.read_bytes() for path in own_root.rglob("*")}
    if sentence == "stopped":
        monkeypatch.setattr(minari, "create_dataset_from_buffers", stop)
    if sentence == "File too large":
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    with pytest.raises(SystemExit, match=f"{MIXED}.*{sentence}"):
        record.dapg((MIXED,), replace="replace" not in sentence)
    assert before == {path: path.is_file() and path.read_bytes() for path in own_root.rglob("*")}


@pytest.mark.parametrize("task, obs_dim, act_dim, solved", [("pen", 45, 24, 0.5144), ("door", 39, 28, 0.0613)])
def test_the_policy_of_a_checkpoint_is_sampled(own_root, tmp_path, monkeypatch, task, obs_dim, act_dim, solved):
    actor = (agent := iql.Agent(obs_dim, act_dim, SimpleNamespace(actor_dropout=0.1))).actor
    with torch.no_grad():
        actor.fc_mean.weight.mul_(0.1)
        actor.log_std.fill_(np.log(0.1))
        actor.obs_mean.normal_()
    args = {"env_id": f"AdroitHand{task.capitalize()}-v1", "exp_name": "", "dataset_id": "", "beta": 0, "seed": 1}
    torch.save({"args": args, "agent": agent.state_dict()}, path := tmp_path / "checkpoint.pt")

    record.binary(task, path)
    metadata, columns = read(own_root, f"awac/{task}/binary-v0")
    assert f"AdroitHand{task.capitalize()}Sparse-v1" in metadata["env_spec"] and metadata["total_episodes"] == 25 + 4
    assert {*np.concatenate(columns["rewards"])} == {0, -1} and not np.concatenate(columns["terminations"]).any()
    assert np.mean([(rewards == 0).mean() for rewards in columns["rewards"][:25]]) == pytest.approx(solved, abs=1e-4)
    for obs, actions in zip(columns["observations"][25:], columns["actions"][25:], strict=True):
        assert len(actions) == iql.ADROIT[task][0]
        assert (actions - actor.act(obs[:-1])).std() == pytest.approx(0.1, rel=0.1)

    with pytest.raises(SystemExit, match=f"is a policy for {args['env_id']}: name one for hammer"):
        record.demos("hammer", path, 0.0, replace=True)
    monkeypatch.setattr(record, "HERE", tmp_path)
    record.demos(task, path, 0.0)
    _, columns = read(tmp_path, f"bundled/{task}/demos-v0")
    np.testing.assert_allclose(columns["actions"][0], actor.act(columns["observations"][0][:-1]), atol=1e-5)
