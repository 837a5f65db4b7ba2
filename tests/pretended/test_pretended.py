"""Every path runs on GPUs that are pretended: on `cuda:0`, on `cuda:1` of two, and on two ranks.

The pretence raises where CUDA would (`pretend_cuda.py`) and counts what the host waits for.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pretended.cases import CASES, RANKS, SECOND

pytest.importorskip("deepspeed")

ROOT = Path(__file__).resolve().parents[2]
NAMES = [*CASES, *SECOND, *RANKS]


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The error of each case, "" if it has none; one process runs all, and one per rank."""
    if shutil.which("g++") is None:
        pytest.skip("the pretence needs g++")
    directory = tmp_path_factory.mktemp("pretended")
    output = directory / "errors.json"
    environment = os.environ | {
        "DS_ACCELERATOR": "cuda",
        "PRETENDED_ROOT": str(directory),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "tests.pretended.cases", str(output)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert output.is_file(), done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(output.read_text())


@pytest.mark.parametrize("name", NAMES)
def test_runs_as_on_a_gpu(errors: dict[str, str], name: str) -> None:
    assert errors[name] == "", errors[name]
