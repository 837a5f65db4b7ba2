"""Questions to the smallest real models."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image

from cloc_mllm.data.scenes import CONCEPTS
from cloc_mllm.demo.engine import (
    MAX_NAMES,
    MAX_PHRASE_CHARS,
    MAX_PHRASES,
    DemoEngine,
    Grounding,
    Named,
    checked_phrase,
    parse_names,
    parse_phrases,
)
from cloc_mllm.demo.pictures import Picture, example_pictures, new_picture
from cloc_mllm.demo.strokes import Stroke
from cloc_mllm.inference.cloc_predictor import ClocPredictor
from cloc_mllm.models.cloc import Cloc
from cloc_mllm.models.phrases import Phrases
from cloc_mllm.models.vision_encoder import ImageFeatures

BOX = Stroke("box", ((0.1, 0.1), (0.6, 0.7)))
POINT = Stroke("point", ((0.4, 0.4),))
SCRIBBLE = Stroke("scribble", ((0.2, 0.2), (0.5, 0.3), (0.6, 0.6)))


@pytest.fixture(scope="module")
def pictures() -> list[Picture]:
    return example_pictures("scenes")


def ground(engine: DemoEngine, picture: Picture, *phrases: str) -> Grounding:
    return list(engine.ground(picture, phrases))[-1]


def name(engine: DemoEngine, picture: Picture, stroke: Stroke, names: tuple[str, ...]) -> Named:
    return list(engine.name(picture, stroke, names))[-1]


def test_both_models_say_where(full_engine: DemoEngine, pictures: list[Picture]) -> None:
    steps = list(full_engine.ground(pictures[0], ["the crab", "the boat"]))
    assert all(found.language_model is None for found in steps[0].found)
    assert steps[0].writing == ""
    assert [found.phrase for found in steps[-1].found] == ["the crab", "the boat"]
    assert steps[-1].writing is None
    for found in steps[-1].found:
        assert found.cloc.boxes and found.cloc.failure is None
        written = found.language_model
        assert written is not None
        assert (not written.boxes) == (written.failure is not None)
        assert len(written.scores) == len(written.boxes)


def test_the_language_model_is_heard_while_it_writes(
    full_engine: DemoEngine, pictures: list[Picture]
) -> None:
    steps = list(full_engine.ground(pictures[0], ["the crab"]))
    written = steps[-1].found[0].language_model
    assert written is not None
    heard = [step.writing for step in steps if step.writing]
    assert len(heard) > 2
    assert all(written.text.startswith(text) for text in heard)


def test_both_models_say_what(full_engine: DemoEngine, pictures: list[Picture]) -> None:
    named = name(full_engine, pictures[0], BOX, ("crab", "boat", "clock"))
    assert isinstance(named.answer, str)
    assert {name for name, _ in named.closest} == {"crab", "boat", "clock"}
    scores = [score for _, score in named.closest]
    assert scores == sorted(scores, reverse=True)
    assert sum(scores) == pytest.approx(1.0)


def test_without_a_language_model(cloc_engine: DemoEngine, pictures: list[Picture]) -> None:
    assert ground(cloc_engine, pictures[0], "the crab").found[0].language_model is None
    named = name(cloc_engine, pictures[0], BOX, CONCEPTS)
    assert named.answer is None
    assert len(named.closest) == 8
    with pytest.raises(ValueError, match="need a language model"):
        cloc_engine.ask_about(pictures[0], BOX, "What is this?")


@pytest.mark.parametrize("stroke", [BOX, POINT, SCRIBBLE], ids=lambda stroke: stroke.kind)
def test_a_model_that_learnt_boxes_says_which_it_reads(
    full_engine: DemoEngine, pictures: list[Picture], stroke: Stroke
) -> None:
    named = name(full_engine, pictures[0], stroke, ("crab", "boat"))
    expected = None if stroke is BOX else stroke.box(pictures[0].image.size)
    assert named.box == expected
    assert list(full_engine.ask_about(pictures[0], stroke, "What {colour} is it?"))


def test_without_names_a_model_ranks_its_own_phrases(
    cloc_predictor: ClocPredictor, pictures: list[Picture]
) -> None:
    phrases = Phrases(["a crab", "a boat"], cloc_predictor.embed_text(["a crab", "a boat"]), 1.0)
    own = ClocPredictor(cloc_predictor.model, cloc_predictor.tokenizer, phrases)
    named = name(DemoEngine(own), pictures[0], BOX, ())
    assert named.measure == "similarity" and named.num_names == 2
    assert {name for name, _ in named.closest} == {"a crab", "a boat"}
    named = name(DemoEngine(cloc_predictor), pictures[0], BOX, ())
    assert named.measure == "probability" and {name for name, _ in named.closest} < set(CONCEPTS)


def test_a_picture_is_encoded_once(
    cloc_engine: DemoEngine, pictures: list[Picture], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = []
    encode = Cloc.encode_image

    def count(self: Cloc, pixel_values: torch.Tensor) -> ImageFeatures:
        encoded.append(len(pixel_values))
        return encode(self, pixel_values)

    monkeypatch.setattr(Cloc, "encode_image", count)
    ground(cloc_engine, pictures[0], "the crab")
    name(cloc_engine, pictures[0], BOX, ("crab", "boat"))
    ground(cloc_engine, pictures[0], "the boat")
    assert len(encoded) == 1
    ground(cloc_engine, pictures[1], "the crab")
    assert len(encoded) == 2


def test_the_language_model_encodes_a_picture_once(
    full_engine: DemoEngine, pictures: list[Picture], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert full_engine.grounding is not None
    encoded = []
    vision = full_engine.grounding.model.vision
    encode = vision.encode_image
    monkeypatch.setattr(vision, "encode_image", lambda x: (encoded.append(len(x)), encode(x))[1])
    ground(full_engine, pictures[0], "the crab")
    name(full_engine, pictures[0], BOX, ("crab", "boat"))
    assert encoded == [1]


def test_visitors_with_different_pictures_do_not_meet(
    cloc_engine: DemoEngine, pictures: list[Picture]
) -> None:
    def boxes(engine: DemoEngine, picture: Picture) -> tuple:
        return ground(engine, picture, "crab").found[0].cloc.boxes

    expected = [boxes(DemoEngine(cloc_engine.cloc), picture) for picture in pictures[:2]]
    assert expected[0] != expected[1]
    with ThreadPoolExecutor(8) as pool:
        actual = list(pool.map(lambda i: boxes(cloc_engine, pictures[i % 2]), range(16)))
    assert actual == expected * 8


def test_a_visitor_who_leaves_holds_up_nobody(
    full_engine: DemoEngine, pictures: list[Picture]
) -> None:
    left = full_engine.ground(pictures[0], ["the crab"])
    next(left)
    next(left)  # the language model is writing
    assert ground(full_engine, pictures[1], "the boat").found


def test_memory_of_pictures_is_bounded(cloc_engine: DemoEngine) -> None:
    for shade in range(20):
        ground(cloc_engine, new_picture(Image.new("RGB", (32, 32), (shade, 0, 0))), "crab")
    assert len(cloc_engine._encoded) == 16


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


def test_phrases_are_split_at_commas() -> None:
    assert parse_phrases(" the crab, the boat ,") == ("the crab", "the boat")
    with pytest.raises(ValueError, match="type what"):
        parse_phrases(" ")
    with pytest.raises(ValueError, match=f"at most {MAX_PHRASES}"):
        parse_phrases(",".join(map(str, range(MAX_PHRASES + 1))))


def test_odd_phrases_are_answered(full_engine: DemoEngine, pictures: list[Picture]) -> None:
    odd = ["<script>", "\x00", "🦀" * 50, "\u202eabc", "</s> <loc_3>", "{phrase} {0}"]
    for found in ground(full_engine, pictures[0], *odd).found:
        assert found.cloc.boxes, ascii(found.phrase)
