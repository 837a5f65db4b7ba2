from __future__ import annotations

from pathlib import Path

import pytest

from cloc_mllm import shipped


@pytest.fixture
def assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(shipped, "ASSETS", tmp_path)
    return tmp_path


def test_shipped_model_is_found(assets: Path) -> None:
    (assets / "cloc").mkdir()
    (assets / "cloc" / "config.json").touch()
    assert shipped.shipped_directory("cloc") == assets / "cloc"


@pytest.mark.parametrize("kind", ["cloc", "mllm"])
def test_a_missing_one_says_what_to_do(kind: shipped.ModelKind, assets: Path) -> None:
    (assets / kind).mkdir()  # a folder without a model in it is none
    with pytest.raises(FileNotFoundError, match=f"make quickstart.*--{kind} DIR"):
        shipped.shipped_directory(kind)
