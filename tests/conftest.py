import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


def run_script(script, flags, cwd):
    """Run one of the repository's scripts in `cwd`, away from the user's own datasets; returns its stdout."""
    command = [sys.executable, ROOT / script, *flags.split()]
    environment = {**os.environ, "MINARI_DATASETS_PATH": str(cwd / "no_datasets"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout
