"""The measurement of loading, merging and saving runs on a tiny language model."""

from __future__ import annotations

from pathlib import Path

import weights
from tests.tiny_mllm import llm_dir

__all__ = ["llm_dir"]


def test_each_step_has_a_row(llm_dir: Path, tmp_path: Path) -> None:
    size, rows = weights.measure(llm_dir, "float32", tmp_path / "out")
    names = ["build_mllm, LoRA", "merge_and_save", "save_adapter"]
    assert [row.name for row in rows] == [*names, "from_pretrained", "load_adapter"]
    assert size > 0 and all(row.peak >= 0 for row in rows)
