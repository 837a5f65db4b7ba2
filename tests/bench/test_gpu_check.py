"""The GPU check runs to its end without a GPU, and says what it left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import gpu_check


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there: run `make gpu-check`")
def test_without_a_gpu_the_check_runs_to_its_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "check.json"

    assert gpu_check.main(["--output", str(output)]) == 0

    told = capsys.readouterr().out
    assert told.count("left out: no GPU") == 4  # two parts, as they end and in the table
    results = json.loads(output.read_text())["results"]
    assert list(results) == ["tests", "losses", "steps", "training", "stage 2"]
    assert not any("FAILED" in row.get("result", "") for rows in results.values() for row in rows)
    assert [row["what"] for row in results["steps"]] == [
        "gpu-check-tiny clip, ours",
        "gpu-check-tiny clip, open_clip",
        "gpu-check-tiny cloc, ours",
    ]
    assert all(row["images_per_second"] > 0 for row in results["steps"])


def test_a_part_that_fails_is_told_and_the_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> list[gpu_check.Row]:
        raise ValueError("losses differ")

    monkeypatch.setattr(gpu_check, "equal_losses", fail)
    for part in ("training_steps", "training_run", "stage2_steps"):
        monkeypatch.setattr(gpu_check, part, lambda *_: [{"what": "fake", "result": "done"}])

    assert gpu_check.main(["--output", str(tmp_path / "check.json")]) == 1

    told = capsys.readouterr().out
    assert "FAILED: losses differ" in told
    assert told.count("stage 2   fake") == 2
