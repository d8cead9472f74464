import os

os.environ["OMP_NUM_THREADS"] = "1"  # tests side by side would wait for each other's threads
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded, and without a network that is known at once

import signal
import sys
import warnings
from contextlib import suppress

import numpy as np
import pytest
from processes import ROOT, finish, started
from tiny_env import episode, write

sys.path[:0] = [str(ROOT), str(ROOT / "docs"), str(ROOT / "tests" / "datasets")]


def pytest_addoption(parser):
    parser.addoption("--script", help="an edited copy of a script: tests/test_variant.py runs on it, alone")


def pytest_configure(config):
    script = config.getoption("--script")
    if script and not (config.invocation_params.dir / script).is_file():
        raise pytest.UsageError(f"{script}: no such file")


def pytest_ignore_collect(collection_path, config):
    if config.getoption("--script") and collection_path.suffix == ".py":
        return collection_path.name != "test_variant.py"


@pytest.fixture(autouse=True)
def no_process_left_behind():
    yield
    for process in [*started]:  # of a test that failed
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        finish(process)


@pytest.fixture(scope="session", autouse=True)
def minari_root(tmp_path_factory):
    """Tests and what they start see this Minari root instead of the user's, with two datasets for Tiny-v0."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Minari wants an author, an e-mail address and more
        patch.setenv("MINARI_DATASETS_PATH", str(tmp_path_factory.mktemp("minari")))
        ends = [{"terminations": np.arange(10) == 9, "truncations": np.zeros(10, bool)}, {}]
        write("tiny/good-v0", *(episode(seed=seed, **ends[seed % 2]) for seed in range(4)))
        write("tiny/other-v0", *(episode(seed=seed, **ends[0]) for seed in range(4, 11)))
        yield


@pytest.fixture
def own_root(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path / "minari"
