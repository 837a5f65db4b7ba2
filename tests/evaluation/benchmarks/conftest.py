from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.tiny_mllm import cloc_dir, llm_dir, mllm_dir

__all__ = ["cloc_dir", "llm_dir", "mllm_dir"]


@pytest.fixture
def photos(tmp_path: Path) -> Callable[..., Path]:
    """Writes named photos of 100 x 50 pixels into a folder and returns it."""

    def write(*names: str) -> Path:
        folder = tmp_path / "photos"
        folder.mkdir(exist_ok=True)
        for name in names:
            data = io.BytesIO()
            Image.new("RGB", (100, 50), "green").save(data, "JPEG")
            (folder / name).write_bytes(data.getvalue())
        return folder

    return write


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
