"""`cloc-mllm phrases`, and where its list goes from there."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
from PIL import Image

from cloc_mllm.cli import main
from cloc_mllm.config import MllmConfig
from cloc_mllm.data.parquet import write_records
from cloc_mllm.data.records import Record, Region
from cloc_mllm.geometry import Boxes
from cloc_mllm.inference.cloc_predictor import ClocPredictor
from cloc_mllm.mllm import build_mllm
from cloc_mllm.train.alignment import forget_phrases
from tests.photos import encoded

BOX = (0.1, 0.1, 0.6, 0.6)
PICTURE = encoded(Image.new("RGB", (8, 8), "teal"))


@pytest.fixture
def own(cloc_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cloc_dir, tmp_path / "cloc"))


def records(directory: Path, *phrases: str) -> str:
    regions = [Region(BOX, phrase) for phrase in phrases]
    write_records([Record("r", PICTURE, 8, 8, [], regions, "test")], directory)
    return str(directory)


def test_a_model_of_ones_own_names_regions_by_its_datas_phrases(
    own: Path, tmp_path: Path, mllm_config: MllmConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    data = records(tmp_path / "data", "a weld", "the weld", "a crack", "him")
    assert main(["phrases", "--cloc", str(own), "--data", data]) == 0
    said = capsys.readouterr().out
    assert "phrases.safetensors: 2 phrases, the most frequent are\n" in said
    assert "       2  a weld\n       1  a crack\n" in said
    predictor = ClocPredictor.from_pretrained(own)
    assert predictor.phrases is not None and predictor.phrases.counts is not None
    assert predictor.phrases.counts.tolist() == [2, 1]
    assert predictor.phrases.scale == pytest.approx(predictor.model.region_scale)
    closest = predictor.closest(PICTURE, Boxes.normalized([list(BOX)]))
    assert sorted(closest.labels) == ["a crack", "a weld"]
    # an MLLM takes the list along, unless its regions move away from it
    config = dataclasses.replace(mllm_config, cloc=str(own))
    processor = build_mllm(config)[1]
    assert processor.phrases is not None and processor.phrases.texts == ["a weld", "a crack"]
    forget_phrases(processor, ("projector.",))
    assert processor.phrases is not None
    forget_phrases(processor, ("projector.", "vision."))
    assert processor.phrases is None
    config = dataclasses.replace(config, freeze_vision_encoder=False)
    assert build_mllm(config)[1].phrases is None


@pytest.mark.parametrize(
    ("phrases", "arguments", "message"),
    [
        (["it"], [], "no region whose phrase can be a name"),
        (["a weld"], ["--num", "0"], "--num is 0; expected at least 1"),
        (["a weld"], ["--cloc", "photos"], "--cloc photos is no directory; expected what stage 1"),
    ],
)
def test_what_gives_no_list_is_refused(
    own: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    phrases: list[str],
    arguments: list[str],
    message: str,
) -> None:
    data = records(tmp_path / "data", *phrases)
    assert main(["phrases", "--cloc", str(own), "--data", data, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (own / "phrases.safetensors").exists()
