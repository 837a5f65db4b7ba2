"""Encode once, prompt many."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cloc_mllm.data.tokenizer import load_text_tokenizer
from cloc_mllm.geometry import Boxes
from cloc_mllm.inference.cloc_predictor import ClocPredictor
from cloc_mllm.models.build import build_cloc, save_cloc
from tests.models.tiny import tiny_cloc, tiny_config
from tests.photos import encoded


@pytest.fixture(scope="module")
def predictor() -> ClocPredictor:
    return ClocPredictor(tiny_cloc(), load_text_tokenizer("builtin", 24))


def _picture(width: int = 90, height: int = 60) -> Image.Image:
    image = Image.new("RGB", (width, height), "white")
    image.paste((200, 30, 30), (10, 10, 40, 40))
    return image


def test_prompts_of_one_picture(predictor: ClocPredictor) -> None:
    predictor.set_image(_picture())
    boxes = Boxes.pixels([[10, 10, 40, 40], [0, 0, 90, 60]], 90, 60)
    embedded = predictor.embed_regions(boxes)
    torch.testing.assert_close(embedded.norm(dim=-1), torch.ones(2))
    torch.testing.assert_close(embedded, predictor.embed_regions(boxes.to_normalized()))
    probabilities = predictor.classify(boxes, ["a crab", "a clock", "a key"])
    torch.testing.assert_close(probabilities.sum(1), torch.ones(2))
    located = predictor.locate(["a crab", "the clock"])
    assert located.boxes.frame.kind == "normalized" and len(located.boxes) == 2
    assert ((located.boxes.xyxy >= 0) & (located.boxes.xyxy <= 1)).all()
    assert (located.scores.abs() <= 1.0001).all()


def test_the_next_picture_replaces_the_last(predictor: ClocPredictor) -> None:
    whole = Boxes.normalized([[0.0, 0.0, 1.0, 1.0]])
    predictor.set_image(_picture())
    first = predictor.embed_regions(whole)
    predictor.set_image(Image.new("RGB", (60, 90)))
    assert not torch.allclose(first, predictor.embed_regions(whole))


def test_a_photo_with_an_exif_orientation_is_turned(
    predictor: ClocPredictor, tmp_path: Path
) -> None:
    boxes = Boxes.pixels([[10, 10, 40, 40]], 90, 60)
    predictor.set_image(_picture())
    expected = predictor.embed_regions(boxes)
    data = encoded(_picture(), orientation=8)
    (tmp_path / "photo.png").write_bytes(data)
    photo = Image.open(io.BytesIO(data))
    for source in (photo, data, tmp_path / "photo.png", np.asarray(_picture())):
        predictor.set_image(source)
        assert torch.equal(predictor.embed_regions(boxes), expected)
    with pytest.raises(ValueError, match=r"pixels of a 60 x 90 picture, but the upright one is 90"):
        predictor.embed_regions(Boxes.pixels([[1, 1, 2, 2]], *photo.size))


def test_wrong_use_says_what_to_do(tmp_path: Path) -> None:
    fresh = ClocPredictor(tiny_cloc(), load_text_tokenizer("builtin", 24))
    with pytest.raises(ValueError, match="call set_image first"):
        fresh.locate(["a crab"])
    fresh.set_image(_picture())
    with pytest.raises(ValueError, match="at least one name"):
        fresh.classify(Boxes.normalized([[0, 0, 1, 1]]), [])
    with pytest.raises(FileNotFoundError, match="no CLOC model directory"):
        ClocPredictor.from_pretrained(tmp_path)


def test_from_a_saved_directory_and_a_file(tmp_path: Path) -> None:
    config = tiny_config()
    save_cloc(build_cloc(config), tmp_path / "m", config, load_text_tokenizer("builtin", 24))
    _picture().save(tmp_path / "p.png")
    predictor = ClocPredictor.from_pretrained(tmp_path / "m")
    predictor.set_image(tmp_path / "p.png")
    assert len(predictor.locate(["a crab"]).boxes) == 1
