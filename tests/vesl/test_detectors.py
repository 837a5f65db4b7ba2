"""Boxes of detectors, found again where a picture was painted, and scores that belong to phrases.

Weights are random, so what a detector sees is put in its place: a forward pass that finds the red
square in the pixels the model is given and answers in the model's own frame.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from cloc_mllm.data.records import Record
from cloc_mllm.geometry import elementwise_iou
from cloc_mllm.vesl.detector import load_detector
from tests.vesl.tiny_detectors import save_tiny_grounding_dino, save_tiny_owlv2

SIZES = [(301, 80), (67, 240), (113, 97), (64, 64), (640, 479)]


@pytest.fixture(scope="module")
def owlv2_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_owlv2(tmp_path_factory.mktemp("owlv2"))


@pytest.fixture(scope="module")
def owlv2(owlv2_directory: Path) -> Any:
    return load_detector("owlv2", str(owlv2_directory))


@pytest.fixture(scope="module")
def grounding_dino(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = save_tiny_grounding_dino(tmp_path_factory.mktemp("grounding_dino"))
    return load_detector("grounding_dino", str(directory))


@pytest.fixture(scope="module")
def cloc() -> Any:
    return load_detector("cloc", "scenes")


def _painted(width: int, height: int) -> tuple[Image.Image, Tensor]:
    """A blue picture with a red rectangle, and its corners in pixels."""
    x1, y1, x2, y2 = width // 5, height // 3, width // 2, height - height // 7
    image = Image.new("RGB", (width, height), (20, 40, 220))
    image.paste((255, 0, 0), (x1, y1, x2, y2))
    return image, torch.tensor([x1, y1, x2, y2], dtype=torch.float32)


Change = Callable[[Any, dict[str, Any]], None]


def _change_output(detector: Any, monkeypatch: pytest.MonkeyPatch, change: Change) -> None:
    forward = detector.model.forward

    def changed(**inputs: Any) -> Any:
        output = forward(**inputs)
        change(output, inputs)
        return output

    monkeypatch.setattr(detector.model, "forward", changed)


def _see_red(detector: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One box an image: the extent of what is red in the pixels, as shares of them (cxcywh)."""
    processor = detector.processor.image_processor
    mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)

    def change(output: Any, inputs: dict[str, Any]) -> None:
        pixels = inputs["pixel_values"] * std[:, None, None] + mean[:, None, None]
        red, green, blue = pixels.unbind(1)
        boxes = []
        for mask in (red > 0.5) & (green < 0.25) & (blue < 0.45):
            ys, xs = mask.nonzero().unbind(1)
            x1, x2 = xs.min() / mask.shape[1], (xs.max() + 1) / mask.shape[1]
            y1, y2 = ys.min() / mask.shape[0], (ys.max() + 1) / mask.shape[0]
            boxes.append(torch.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]))
        output.pred_boxes = torch.stack(boxes)[:, None]
        output.logits = output.logits[:, :1]

    _change_output(detector, monkeypatch, change)


def _assert_on_paint(detector: Any, wh: tuple[int, int], scale: float) -> None:
    """Within one and a half of the model's pixels (`scale` of them to one of the picture)."""
    image, expected = _painted(*wh)
    (found,) = detector.detect([image], [["a red box"]])
    actual = found.boxes[0] * torch.tensor([*wh, *wh])
    torch.testing.assert_close(actual, expected, rtol=0, atol=1.5 * max(1, 1 / scale))


@pytest.mark.parametrize("wh", SIZES, ids=str)
def test_owlv2_boxes_lie_on_the_paint(
    owlv2: Any, monkeypatch: pytest.MonkeyPatch, wh: tuple[int, int]
) -> None:
    _see_red(owlv2, monkeypatch)
    _assert_on_paint(owlv2, wh, scale=64 / max(wh))


def test_owlv2_at_another_input_size(
    owlv2_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = load_detector("owlv2", str(owlv2_directory), image_size=96)
    (found,) = detector.detect([_painted(113, 97)[0]], [["a red box"]])
    assert found.boxes.shape == (12 * 12, 4)  # patches of 8 px
    _see_red(detector, monkeypatch)
    _assert_on_paint(detector, (113, 97), scale=96 / 113)


@pytest.mark.parametrize("wh", SIZES, ids=str)
def test_grounding_dino_boxes_lie_on_the_paint(
    grounding_dino: Any, monkeypatch: pytest.MonkeyPatch, wh: tuple[int, int]
) -> None:
    _see_red(grounding_dino, monkeypatch)
    _assert_on_paint(grounding_dino, wh, scale=min(96 / min(wh), 160 / max(wh)))


def test_owlv2_scores_do_not_depend_on_the_other_images(owlv2: Any) -> None:
    images = [_painted(80, 60)[0], _painted(60, 80)[0]]
    phrases = [["a crab"], ["a clock", "a red box", "a dog"]]
    together = owlv2.detect(images, phrases)
    for image, own, actual in zip(images, phrases, together, strict=True):
        (expected,) = owlv2.detect([image], [own])
        assert actual.scores.shape == (64, len(own))
        torch.testing.assert_close(actual.scores, expected.scores)
        torch.testing.assert_close(actual.boxes, expected.boxes)


def _only_letter_b(detector: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every query is sure of the tokens that are an inner `b`, and of nothing else."""
    token = detector.processor.tokenizer.convert_tokens_to_ids("##b")

    def change(output: Any, inputs: dict[str, Any]) -> None:
        is_b = inputs["input_ids"][0] == token
        output.logits = torch.full_like(output.logits, -6.0)
        output.logits[0, :, : len(is_b)][:, is_b] = 6.0

    _change_output(detector, monkeypatch, change)


def test_grounding_dino_scores_a_phrase_by_its_own_tokens(
    grounding_dino: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _only_letter_b(grounding_dino, monkeypatch)
    (found,) = grounding_dino.detect([_painted(80, 60)[0]], [["a dog", "a crab", "a key"]])
    assert found.boxes.shape == (20, 4)
    expected = torch.tensor([-6.0, 6.0, -6.0]).sigmoid().expand(20, 3)
    torch.testing.assert_close(found.scores, expected)


def test_grounding_dino_asks_in_several_texts_what_is_too_long_for_one(
    grounding_dino: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _only_letter_b(grounding_dino, monkeypatch)
    phrases = ["a red dog", "a blue clock", "a big crab", "a small key", "a grey crab"]
    (found,) = grounding_dino.detect([_painted(80, 60)[0]], [phrases])
    num_texts = len(found.boxes) // 20  # of at most 32 letters each
    assert num_texts > 1
    is_sure = (found.scores > 0.5).reshape(num_texts, 20, len(phrases)).all(1).any(0)
    assert is_sure.tolist() == [False, False, True, False, True]


def test_cloc_finds_what_scenes_hold(cloc: Any, tiny_scenes: list[Record]) -> None:
    """Measured: 0.79 of 53 regions that are the only ones of their phrase."""
    images = [record.load_image() for record in tiny_scenes]
    phrases = [sorted({region.phrase for region in record.regions}) for record in tiny_scenes]
    hits = []
    for record, own, found in zip(tiny_scenes, phrases, cloc.detect(images, phrases), strict=True):
        assert found.scores.shape == (len(own), len(own))
        assert (found.scores <= 1).all()
        for column, phrase in enumerate(own):
            true = [region.box for region in record.regions if region.phrase == phrase]
            if len(true) == 1:
                iou = elementwise_iou(found.boxes[column : column + 1], torch.tensor(true))
                hits.append(iou.item() >= 0.5)
    assert sum(hits) / len(hits) > 0.6


def test_cloc_labels_do_not_depend_on_the_other_images(
    cloc: Any, tiny_scenes: list[Record]
) -> None:
    images = [record.load_image() for record in tiny_scenes[:3]]
    phrases = [[region.phrase for region in record.regions] for record in tiny_scenes[:3]]
    for image, own, actual in zip(images, phrases, cloc.detect(images, phrases), strict=True):
        (expected,) = cloc.detect([image], [own])
        torch.testing.assert_close(actual.boxes, expected.boxes, rtol=0, atol=1e-5)
        torch.testing.assert_close(actual.scores, expected.scores, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["cloc", "owlv2", "grounding_dino"])
def test_no_such_model(name: Any, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        load_detector(name, str(tmp_path / "nowhere"))
