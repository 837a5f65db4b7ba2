"""The checkpoint in the package answers as its model card says."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloc_mllm.data.scenes import generate_scenes
from cloc_mllm.evaluation.config import EvalConfig
from cloc_mllm.evaluation.run import evaluate
from cloc_mllm.inference.commands import main_ground, main_refer
from cloc_mllm.shipped import ASSETS


def test_scores_on_test_scenes(tmp_path: Path) -> None:
    """40 of the 500 scenes; floors well under the model card's 93.0, 70.6, 89.4 and 97.0 %."""
    evaluation = evaluate(EvalConfig(output_dir=str(tmp_path), limit=40, bootstrap_samples=50))
    scores = {
        (task, name): metric.value
        for task, entry in evaluation.tasks.items()
        for name, metric in entry.metrics.items()
    }
    assert scores["region_classification", "macro_acc"] > 0.85
    assert scores["text_to_box", "acc_at_0_5"] > 0.6
    assert scores["rec", "acc_at_0_5"] > 0.75
    assert scores["referring", "exact_match"] > 0.9


def test_ground_and_refer_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = next(generate_scenes(1, split="test", long_side=512))
    picture = tmp_path / "scene.jpg"
    picture.write_bytes(record.image)
    assert main_ground([str(picture), "the boot", "--out", str(tmp_path / "drawn.png")]) == 0
    assert "the boot: " in capsys.readouterr().out
    box = [str(value) for value in record.regions[0].box]
    out = ["--normalized", "--out", str(tmp_path / "named.png")]
    assert main_refer([str(picture), *box, *out]) == 0
    assert record.regions[0].phrase in capsys.readouterr().out


def test_weights_stay_small() -> None:
    size = sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file())
    assert size < 25e6
