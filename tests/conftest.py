import os

os.environ["OMP_NUM_THREADS"] = "1"  # tests side by side would wait for each other's threads
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded, and without a network that is known at once

import subprocess
import sys
import warnings
from pathlib import Path

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
    """Tests and what they start see this Minari root instead of the user's, with two datasets for Tiny-v0."""
    root = tmp_path_factory.mktemp("minari")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Minari wants an author, an e-mail address and more
        patch.setenv("MINARI_DATASETS_PATH", str(root))
        write_dataset("tiny/good-v0")
        write_dataset("tiny/other-v0", episodes=7, seed=1)
        yield root
