import os

os.environ["OMP_NUM_THREADS"] = "1"  # tests side by side would wait for each other's threads
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded, and without a network that is known at once

import subprocess
import sys
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from processes import kill_started
from tiny_env import write_dataset

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


def run_script(script, flags, cwd):
    """Run one of the repository's scripts in `cwd`, away from the user's own datasets; returns its stdout."""
    command = [sys.executable, ROOT / script, *flags.split()]
    environment = {**os.environ, "MINARI_DATASETS_PATH": str(cwd / "no_datasets")}
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(autouse=True)
def nothing_left_behind():
    yield
    kill_started()


@pytest.fixture(scope="session", autouse=True)
def minari_root(tmp_path_factory):
    """Tests and what they start see this Minari root instead of the user's: tiny/good-v0 and others it fits or not."""

    def nan_reward(arrays):
        arrays["rewards"][3] = np.nan

    def infinite_observation(arrays):
        arrays["observations"][3, 1] = np.inf

    def one_observation_short(arrays):
        arrays["observations"] = arrays["observations"][:-1]

    def narrow_observations(arrays):
        arrays["observations"] = arrays["observations"][:, :2]

    root = tmp_path_factory.mktemp("minari")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Minari wants an author, an e-mail address and more
        patch.setenv("MINARI_DATASETS_PATH", str(root))
        write_dataset("tiny/good-v0")
        write_dataset("tiny/other-v0", episodes=7, seed=1)
        write_dataset("tiny/empty-v0", episodes=0)
        write_dataset("tiny/wide-v0", observation_space=gym.spaces.Box(-10, 10, (4,)))
        write_dataset("tiny/threeactions-v0", action_space=gym.spaces.Box(-1, 1, (3,)))
        write_dataset("tiny/discrete-v0", action_space=gym.spaces.Discrete(3))
        write_dataset("tiny/nan-v0", change=nan_reward)
        write_dataset("tiny/infinity-v0", change=infinite_observation)
        write_dataset("tiny/short-v0", change=one_observation_short)
        write_dataset("tiny/narrow-v0", change=narrow_observations)
        write_dataset("tiny/one-v0", episodes=1, steps=1)
        yield root
