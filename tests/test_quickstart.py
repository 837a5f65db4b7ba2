"""The start of the quickstart; the whole road is `cloc-mllm quickstart --budget 0.02`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from cloc_mllm.cli import main


@pytest.mark.parametrize(("package", "extra"), [("matplotlib", "eval"), ("deepspeed", "train")])
def test_a_missing_package_is_named_before_anything_is_done(
    package: str,
    extra: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # importing it fails from now on
    assert main(["quickstart", "--budget", "0.001", "--output_dir", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert said.err == (
        f"cloc-mllm: error: {package} is not installed; run: pip install 'cloc-mllm[{extra}]'\n"
    )
    assert said.out == "" and not (tmp_path / "out").exists()


def test_another_budget_in_the_same_directory_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "budget.json").write_text("0.5")
    assert main(["quickstart", "--budget", "0.001", "--output_dir", str(tmp_path)]) == 2
    assert f"{tmp_path} was begun with --budget 0.5, not 0.001" in capsys.readouterr().err
