"""docs/how-to/chats.md: ten rows from nothing to an answer, as the page says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.test_documentation import ROOT, run
from tests.integration.test_stage1 import clean_environment

BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```", re.M | re.S)


def test_ten_rows_from_nothing_to_an_answer(tmp_path: Path) -> None:
    numbers = re.compile(r"\d+")
    page = (ROOT / "docs" / "how-to" / "chats.md").read_text()
    (_, rows), (_, commands), (_, question) = BLOCK.findall(page)
    run(rows, tmp_path)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**clean_environment(), "PATH": path}
    shell = ["bash", "-e", "-c", commands]
    result = subprocess.run(shell, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "chats:              10 kept         0 dropped" in result.stdout
    assert (tmp_path / "sheet.png").is_file()
    printed = run(question, tmp_path).splitlines()
    promised = re.findall(r"^print\(.*\)  # (.*)$", question, re.M)
    # the true boxes are learnt by heart; which of two bins a coordinate takes differs by machine
    assert [numbers.sub("", line) for line in printed] == [numbers.sub("", of) for of in promised]
    for actual, expected in zip(printed, promised, strict=True):
        found = list(map(int, numbers.findall(actual)))
        assert found == pytest.approx(list(map(int, numbers.findall(expected))), abs=3)
