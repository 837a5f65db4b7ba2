"""Both sides of the feature cache's benchmark compute the same; one of them no tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloc_mllm.config import MllmConfig
from cloc_mllm.data.parquet import write_records
from cloc_mllm.models.vision_encoder import VisionEncoder
from feature_cache import matched_steps
from tests.tiny_mllm import cloc_dir, llm_dir, mllm_config

__all__ = ["cloc_dir", "llm_dir", "mllm_config"]


def test_only_the_plain_side_runs_the_encoder(
    mllm_config: MllmConfig, tiny_scenes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_records(tiny_scenes[:4], tmp_path / "records")
    sides = matched_steps(mllm_config, str(tmp_path / "records"), 4, 2, str(tmp_path / "cache"))
    cached, plain = (side() for side in sides)
    assert cached == pytest.approx(plain, abs=1e-4)
    monkeypatch.setattr(VisionEncoder, "forward", None)
    assert sides[0]() == cached
    with pytest.raises(TypeError):
        sides[1]()
