"""Built-in scenes: reproducible, and what they say is true of what they show."""

from __future__ import annotations

import hashlib
import io

import numpy as np
import pytest
from PIL import Image

from cloc_mllm.data.expressions import expression_kind, refer_to_things
from cloc_mllm.data.scenes import (
    CONCEPTS,
    ZERO_SHOT_CONCEPTS,
    Layout,
    Thing,
    draw_layout,
    generate_scenes,
    sample_layout,
    scene_rng,
)


def test_scenes_do_not_depend_on_where_generation_starts() -> None:
    whole = list(generate_scenes(4, split="train", seed=3))
    part = list(generate_scenes(2, split="train", seed=3, start=2))
    assert [record.image for record in whole[2:]] == [record.image for record in part]
    assert [record.regions for record in whole[2:]] == [record.regions for record in part]


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", "c954f43e12d7b18a"),
        ("validation", "f912eda3c93e8963"),
        ("test", "ec93c2910f64df07"),
        ("zero_shot", "aef1252341443dc2"),
    ],
)
def test_the_layouts_of_a_split_never_change(split: str, expected: str) -> None:
    """Models in the wild were trained on these: a new kind of scene must not move them."""
    digest = hashlib.sha256()
    for index in range(30):
        concepts = ZERO_SHOT_CONCEPTS if split == "zero_shot" else CONCEPTS
        layout = sample_layout(scene_rng(0, split, index), concepts)  # type: ignore[arg-type]
        for thing in layout.things:
            box = [round(value, 4) for value in thing.box]
            digest.update(repr((thing.name, thing.angle, thing.mirrored, box)).encode())
        digest.update(repr((layout.captions, layout.expressions)).encode())
    assert digest.hexdigest()[:16] == expected


def test_splits_and_seeds_differ() -> None:
    def captions(split: str, seed: int) -> list[list[str]]:
        return [r.captions for r in generate_scenes(5, split=split, seed=seed)]  # type: ignore[arg-type]

    assert captions("train", 0) != captions("test", 0) != captions("test", 1)


def test_zero_shot_scenes_show_only_held_out_concepts() -> None:
    assert len(CONCEPTS) > 100 and not set(CONCEPTS) & set(ZERO_SHOT_CONCEPTS)
    for record in generate_scenes(20, split="zero_shot"):
        assert {region.phrase for region in record.regions} <= set(ZERO_SHOT_CONCEPTS)


def test_records_are_whole() -> None:
    for record in generate_scenes(30, split="validation", long_side=96):
        image = Image.open(io.BytesIO(record.image))
        assert image.size == (record.width, record.height) and max(image.size) == 96
        assert len(record.captions) == 2 and 1 <= len(record.regions) <= 6
        for region in record.regions:
            x1, y1, x2, y2 = region.box
            assert 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1


def test_a_thing_is_drawn_inside_its_box_and_fills_it() -> None:
    box = (0.25, 0.3, 0.7, 0.8)
    layout = Layout(1.0, (Thing("apple", 0, False, box),), ("",), ((),))
    rng = np.random.default_rng(0)
    drawn = np.asarray(draw_layout(layout, rng, 200), dtype=int)
    background = draw_layout(Layout(1.0, (), ("",), ()), np.random.default_rng(0), 200)
    changed = np.abs(drawn - np.asarray(background, dtype=int)).sum(2) > 30
    rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    found = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) / 200
    np.testing.assert_allclose(found, box, atol=0.015)


@pytest.mark.parametrize(
    ("things", "expected"),
    [
        pytest.param(
            [("apple", (0.1, 0.1, 0.3, 0.3)), ("clock", (0.6, 0.1, 0.8, 0.3))],
            [
                {"the apple", "the apple left of the clock"},
                {"the clock", "the clock right of the apple"},
            ],
            id="unique and relation",
        ),
        pytest.param(
            [("crab", (0.0, 0.0, 0.2, 0.2)), ("crab", (0.5, 0.0, 0.9, 0.4))],
            [
                {"the smaller crab", "the leftmost crab", "the first crab from the left"},
                {"the larger crab", "the rightmost crab", "the second crab from the left"},
            ],
            id="size and order of two",
        ),
        pytest.param(
            [("crab", (0.0, 0.0, 0.2, 0.2)), ("crab", (0.0, 0.5, 0.2, 0.7))],
            [set(), set()],
            id="nothing singles out one of two alike",
        ),
        pytest.param(
            [
                ("apple", (0.0, 0.4, 0.2, 0.6)),
                ("apple", (0.8, 0.4, 1.0, 0.6)),
                ("clock", (0.4, 0.4, 0.6, 0.6)),
            ],
            [
                {
                    "the leftmost apple",
                    "the first apple from the left",
                    "the apple left of the clock",
                },
                {
                    "the rightmost apple",
                    "the second apple from the left",
                    "the apple right of the clock",
                },
                {"the clock"},
            ],
            id="a relation that needs the anchor",
        ),
    ],
)
def test_referring_expressions(things: list, expected: list[set[str]]) -> None:
    assert [set(e) for e in refer_to_things(things)] == expected


def test_every_expression_names_one_thing_and_has_a_kind() -> None:
    kinds = set()
    for index in range(200):
        layout = sample_layout(scene_rng(0, "test", index))
        expressions = [e for thing_texts in layout.expressions for e in thing_texts]
        assert len(expressions) == len(set(expressions)), layout
        kinds |= {expression_kind(e) for e in expressions}
    assert kinds == {"unique", "size", "ordinal", "relation"}


def test_unknown_split_is_named() -> None:
    with pytest.raises(ValueError, match="unknown split 'dev'; expected one of train, validation"):
        scene_rng(0, "dev", 0)  # type: ignore[arg-type]
