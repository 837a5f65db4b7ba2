"""Questions to the smallest real models."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from PIL import Image

from cloc_mllm.data.scenes import CONCEPTS
from cloc_mllm.demo.engine import (
    MAX_NAMES,
    MAX_PHRASE_CHARS,
    DemoEngine,
    checked_phrase,
    parse_names,
)
from cloc_mllm.demo.pictures import Picture, example_pictures, new_picture
from cloc_mllm.inference.cloc_predictor import ClocPredictor
from cloc_mllm.inference.phrases import Phrases
from cloc_mllm.models.cloc import Cloc
from cloc_mllm.models.vision_encoder import ImageFeatures

BOX = (0.1, 0.1, 0.6, 0.7)


@pytest.fixture(scope="module")
def pictures() -> list[Picture]:
    return [replace(picture, box=BOX) for picture in example_pictures(2)]


def test_both_models_say_where(full_engine: DemoEngine, pictures: list[Picture]) -> None:
    found = full_engine.find(pictures[0], " the crab ")
    assert found.cloc_head.boxes and found.cloc_head.failure is None
    assert found.language_model is not None
    assert (not found.language_model.boxes) == (found.language_model.failure is not None)


def test_both_models_say_what(full_engine: DemoEngine, pictures: list[Picture]) -> None:
    named = full_engine.name(pictures[0], ("crab", "boat", "clock"))
    assert isinstance(named.answer, str)
    assert {name for name, _ in named.closest} == {"crab", "boat", "clock"}
    scores = [score for _, score in named.closest]
    assert scores == sorted(scores, reverse=True)
    assert sum(scores) == pytest.approx(1.0)


def test_without_a_language_model(cloc_engine: DemoEngine, pictures: list[Picture]) -> None:
    assert cloc_engine.find(pictures[0], "the crab").language_model is None
    named = cloc_engine.name(pictures[0], CONCEPTS)
    assert named.answer is None
    assert len(named.closest) == 8


def test_without_names_a_model_ranks_its_own_phrases(
    cloc_predictor: ClocPredictor, pictures: list[Picture]
) -> None:
    phrases = Phrases(["a crab", "a boat"], cloc_predictor.embed_text(["a crab", "a boat"]))
    own = ClocPredictor(cloc_predictor.model, cloc_predictor.tokenizer, phrases)
    named = DemoEngine(own).name(pictures[0], ())
    assert named.measure == "similarity"
    assert {name for name, _ in named.closest} == {"a crab", "a boat"}
    named = DemoEngine(cloc_predictor).name(pictures[0], ())
    assert named.measure == "probability" and {name for name, _ in named.closest} < set(CONCEPTS)


def test_naming_needs_a_box(cloc_engine: DemoEngine, pictures: list[Picture]) -> None:
    with pytest.raises(ValueError, match="click two opposite corners"):
        cloc_engine.name(replace(pictures[0], box=None), ("crab",))


def test_a_picture_is_encoded_once(
    cloc_engine: DemoEngine, pictures: list[Picture], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = []
    encode = Cloc.encode_image

    def count(self: Cloc, pixel_values: torch.Tensor) -> ImageFeatures:
        encoded.append(len(pixel_values))
        return encode(self, pixel_values)

    monkeypatch.setattr(Cloc, "encode_image", count)
    cloc_engine.find(pictures[0], "the crab")
    cloc_engine.name(pictures[0], ("crab", "boat"))
    cloc_engine.find(replace(pictures[0], box=None), "the boat")
    assert len(encoded) == 1
    cloc_engine.find(pictures[1], "the crab")
    assert len(encoded) == 2


def test_the_language_model_encodes_a_picture_once(
    full_engine: DemoEngine, pictures: list[Picture], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert full_engine.grounding is not None
    encoded = []
    vision = full_engine.grounding.model.vision
    encode = vision.encode_image
    monkeypatch.setattr(vision, "encode_image", lambda x: (encoded.append(len(x)), encode(x))[1])
    full_engine.find(pictures[0], "the crab")
    full_engine.name(pictures[0], ("crab", "boat"))
    assert encoded == [1]


def test_visitors_with_different_pictures_do_not_meet(
    cloc_engine: DemoEngine, pictures: list[Picture]
) -> None:
    expected = [
        DemoEngine(cloc_engine.cloc).find(picture, "crab").cloc_head.boxes for picture in pictures
    ]
    assert expected[0] != expected[1]
    with ThreadPoolExecutor(8) as pool:
        actual = list(
            pool.map(lambda i: cloc_engine.find(pictures[i % 2], "crab").cloc_head.boxes, range(16))
        )
    assert actual == expected * 8


def test_memory_of_pictures_is_bounded(cloc_engine: DemoEngine) -> None:
    for shade in range(12):
        cloc_engine.find(new_picture(Image.new("RGB", (32, 32), (shade, 0, 0))), "crab")
    assert len(cloc_engine._encoded) == 8


@pytest.mark.parametrize(
    ("phrase", "message"),
    [
        ("", "type what"),
        (" \n ", "type what"),
        ("x" * (MAX_PHRASE_CHARS + 1), "at most 300"),
        ("crab \ud800", "half a character"),
        ("the <image>", "leave it out"),
        ("<region>", "leave it out"),
    ],
    ids=["empty", "blank", "long", "surrogate", "image", "region"],
)
def test_phrases_that_are_refused(phrase: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked_phrase(phrase)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("crab, red boat", ("crab", "red boat")),
        ("crab\nboat,,crab , ", ("crab", "boat")),
        ("  ", ()),
        ("蟹, <b>", ("蟹", "<b>")),
    ],
)
def test_names_are_read(text: str, expected: tuple[str, ...]) -> None:
    assert parse_names(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (",".join(map(str, range(MAX_NAMES + 1))), f"at most {MAX_NAMES}"),
        ("x" * 400, "at most 300"),
        ("x" * 100_000, "shorten it"),
    ],
    ids=["many", "long", "huge"],
)
def test_names_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_names(text)


def test_odd_phrases_are_answered(full_engine: DemoEngine, pictures: list[Picture]) -> None:
    for phrase in ("<script>", "\x00", "🦀" * 50, "\u202eabc", "</s> <loc_3>"):
        assert full_engine.find(pictures[0], phrase).cloc_head.boxes, ascii(phrase)
