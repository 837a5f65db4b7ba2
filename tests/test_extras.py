from __future__ import annotations

from pathlib import Path

import pytest

from cloc_mllm import extras


def test_the_command_works_from_where_people_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, project_root: Path
) -> None:
    monkeypatch.chdir(project_root)
    assert extras.install_command("demo") == "pip install '.[demo]'"
    monkeypatch.chdir(tmp_path)
    assert extras.install_command("demo") == f"pip install '{project_root}[demo]'"
    monkeypatch.setattr(extras, "__file__", str(tmp_path / "site" / "cloc_mllm" / "extras.py"))
    assert extras.install_command("demo") == "pip install '.[demo]'"
