"""Compositional scenes: what is asked is true, and the noun alone does not answer it."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from cloc_mllm.data.compositional import (
    COLOURS,
    KINDS,
    compositional_kind,
    generate_compositional,
)
from cloc_mllm.data.records import Record, Region
from cloc_mllm.data.scenes import ZERO_SHOT_CONCEPTS, Layout, Thing, draw_layout


@pytest.fixture(scope="module")
def scenes() -> list[Record]:
    return list(generate_compositional(36))


def asked(record: Record) -> list[Region]:
    return [region for region in record.regions if region.expressions]


def only(scenes: list[Record], kind: str) -> list[Record]:
    return [record for record in scenes if compositional_kind(record.source) == kind]


def area(region: Region) -> float:
    return (region.box[2] - region.box[0]) * (region.box[3] - region.box[1])


def test_the_kinds_take_turns_and_start_does_not_matter(scenes: list[Record]) -> None:
    assert [compositional_kind(record.source) for record in scenes] == list(KINDS) * 6
    part = list(generate_compositional(3, start=7))
    assert [record.image for record in part] == [record.image for record in scenes[7:10]]
    assert [record.regions for record in part] == [record.regions for record in scenes[7:10]]
    other = next(generate_compositional(1, seed=1))
    assert other.id != scenes[0].id and other.image != scenes[0].image


def test_every_scene_asks_for_one_or_two_things(scenes: list[Record]) -> None:
    for record in scenes:
        assert 1 <= len(asked(record)) <= 2
        texts = [text for region in asked(record) for text in region.expressions]
        assert len(set(texts)) == len(texts) == len(asked(record))
        assert all(text.startswith("the ") for text in texts)


def test_the_noun_alone_does_not_tell_which_is_meant(scenes: list[Record]) -> None:
    for record in scenes:
        categories = [region.category for region in record.regions]
        for region in asked(record):
            alone = compositional_kind(record.source) == "unseen concept"
            assert (categories.count(region.category) == 1) == alone
            assert region.category in region.expressions[0]


def test_a_crowd_is_larger_than_any_in_training(scenes: list[Record]) -> None:
    for record in only(scenes, "crowd"):
        same = [r for r in record.regions if r.category == asked(record)[0].category]
        assert len(same) >= 5
        for region in asked(record):
            if region.expressions[0].startswith("the largest"):
                assert area(region) == max(map(area, same))
            if region.expressions[0].startswith("the leftmost"):
                assert region.box[0] + region.box[2] == min(r.box[0] + r.box[2] for r in same)


def test_unseen_concepts_are_those_that_no_other_split_holds(scenes: list[Record]) -> None:
    for record in scenes:
        held_out = {region.category for region in record.regions} <= set(ZERO_SHOT_CONCEPTS)
        assert held_out == (compositional_kind(record.source) == "unseen concept")


def test_a_thing_has_the_colour_it_is_asked_by(scenes: list[Record]) -> None:
    channels = {"red": (0,), "green": (1,), "blue": (2,), "yellow": (0, 1), "purple": (0, 2)}
    for record in only(scenes, "colour"):
        pixels = np.asarray(Image.open(io.BytesIO(record.image)), dtype=float)
        for region in asked(record):
            colour = region.expressions[0].split()[1]
            assert colour in COLOURS
            strong = channels[colour]
            weak = [channel for channel in range(3) if channel not in strong]
            x1, y1, x2, y2 = (
                round(value * side)
                for value, side in zip(region.box, (record.width, record.height) * 2, strict=True)
            )
            inside = pixels[y1:y2, x1:x2]
            has_it = inside[..., strong].min(-1) > inside[..., weak].max(-1) + 40
            assert has_it.mean() > 0.1


@pytest.mark.parametrize("colour", COLOURS)
def test_a_tint_changes_the_thing_and_nothing_else(colour: str) -> None:
    def draw(tint: str) -> np.ndarray:
        thing = Thing("clock", 0, False, (0.25, 0.25, 0.75, 0.75), tint)
        layout = Layout(1.0, (thing,), (), ((),))
        return np.asarray(draw_layout(layout, np.random.default_rng(0), 80))

    changed = (draw(colour) != draw("")).any(2)
    assert changed[20:60, 20:60].mean() > 0.3
    changed[20:60, 20:60] = False
    assert not changed.any()


def test_other_sources_have_no_kind() -> None:
    assert compositional_kind("openmoji-scenes") == compositional_kind("refcoco") == ""
