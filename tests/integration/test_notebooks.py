"""The notebooks of the documentation run from a fresh folder, cell by cell."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.test_documentation import ROOT
from tests.integration.test_stage1 import clean_environment


def code_of(notebook: str) -> str:
    contents = json.loads((ROOT / "docs" / "notebooks" / notebook).read_text(encoding="utf-8"))
    cells = [cell for cell in contents["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] for cell in cells), "clear the outputs before a commit"
    return "\n\n".join("".join(cell["source"]) for cell in cells)


def run(notebook: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code_of(notebook)],
        cwd=folder,
        env=clean_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_first_boxes(tmp_path: Path) -> None:
    assert "['a bus']" in run("first_boxes.ipynb", tmp_path)


@pytest.mark.slow  # trains: minutes on a busy machine
def test_own_photos(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    run("own_photos.ipynb", tmp_path)
    assert (tmp_path / "mine" / "model" / "model.safetensors").is_file()
    assert (tmp_path / "sheet.png").is_file()
