"""Generates scenes that test understanding: the noun alone does not tell which thing is meant.

Test data only, from random streams that no split of `scenes.py` uses. Colours, crowds and unseen
concepts never occur in the training scenes; they test whether a model generalises.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Literal

import numpy as np

from cloc_mllm.data.expressions import expression_kind, refer_to_things
from cloc_mllm.data.records import Record, Region
from cloc_mllm.data.scenes import (
    CONCEPTS,
    ZERO_SHOT_CONCEPTS,
    Layout,
    Thing,
    draw_layout,
    place_thing,
    sample_aspect,
)

Kind = Literal["relation", "ordinal", "size", "colour", "unseen concept", "crowd"]
KINDS: tuple[Kind, ...] = ("relation", "ordinal", "size", "colour", "unseen concept", "crowd")
COLOURS = ("red", "green", "blue", "yellow", "purple")

_SOURCE = "openmoji-compositional/"
_STREAM = 100  # the first of the random streams; the splits' are 0, 1, 2, ...
_MAX_TRIES = 1000
_MAX_ASKED = 2  # things asked for per scene, so that no kind has many more questions than another
_CROWD = (5, 8)
_CROWD_SIDES = (0.1, 0.12, 0.24)


def compositional_kind(source: str) -> str:
    """Reads the kind of scene from a record's source; "" for every other source."""
    return source.removeprefix(_SOURCE) if source.startswith(_SOURCE) else ""


def generate_compositional(
    num_scenes: int, *, seed: int = 0, long_side: int = 128, start: int = 0
) -> Iterator[Record]:
    """Generates scenes `start` to before `start + num_scenes`; the kinds take turns.

    Every thing is a region; the one or two that are asked for have one expression. In all kinds
    except `unseen concept` the scene has another thing of the same concept:

    | kind | asks for | scene |
    |---|---|---|
    | relation | `the apple left of the clock` | two or three apples, a clock, others |
    | ordinal | `the second boat from the left` | two or three boats, others |
    | size | `the smaller crab` | two or three crabs, others |
    | colour | `the red key` | keys in different colours, others |
    | unseen concept | `the pear` | three to five concepts that no training scene holds |
    | crowd | `the largest owl`, `the rightmost owl` | five to eight owls, two others |
    """
    for index in range(start, start + num_scenes):
        number = index % len(KINDS)
        kind = KINDS[number]
        rng = np.random.default_rng([seed, _STREAM + number, index])
        aspect, things, expressions = _scene(rng, kind)
        layout = Layout(aspect, tuple(things), (), tuple((text,) for text in expressions))
        image = draw_layout(layout, rng, long_side)
        encoded = io.BytesIO()
        image.save(encoded, "JPEG", quality=92)
        yield Record(
            id=f"compositional-{seed}-{index:06d}",
            image=encoded.getvalue(),
            width=image.width,
            height=image.height,
            captions=[],
            regions=[
                Region(thing.box, thing.name, expressions=[text] * bool(text), category=thing.name)
                for thing, text in zip(things, expressions, strict=True)
            ],
            source=_SOURCE + kind,
        )


def _scene(rng: np.random.Generator, kind: Kind) -> tuple[float, list[Thing], list[str]]:
    """Draws aspect, things and the text that asks for each ("" for none) until one has a text."""
    for _ in range(_MAX_TRIES):
        aspect = sample_aspect(rng)
        things = _PLACERS.get(kind, _few_alike)(rng, aspect)
        found = [_chosen(rng, texts, kind) for texts in _expressions(things, kind)]
        asked = rng.permutation(np.flatnonzero([text != "" for text in found]))[:_MAX_ASKED]
        if len(asked):
            expressions = [text if i in asked else "" for i, text in enumerate(found)]
            return aspect, things, expressions
    raise AssertionError(f"no scene of kind {kind!r} in {_MAX_TRIES} tries")


def _chosen(rng: np.random.Generator, texts: list[str], kind: Kind) -> str:
    """Draws one of the expressions that need the skill; in a crowd it names size or order."""
    wanted = {"unseen concept": ("unique",), "crowd": ("size", "ordinal")}.get(kind, (kind,))
    fitting = [text for text in texts if kind == "colour" or expression_kind(text) in wanted]
    return str(rng.choice(fitting)) if fitting else ""


def _expressions(things: list[Thing], kind: Kind) -> list[list[str]]:
    """All expressions of each thing; except for unseen concepts, only of things with a double."""
    names = [thing.name for thing in things]
    if kind == "colour":
        return [[f"the {thing.tint} {thing.name}"] * bool(thing.tint) for thing in things]
    found = refer_to_things([(thing.name, thing.box) for thing in things])
    alone = kind == "unseen concept"
    return [
        list(texts) if (names.count(name) == 1) == alone else []
        for name, texts in zip(names, found, strict=True)
    ]


def _few_alike(rng: np.random.Generator, aspect: float) -> list[Thing]:
    """Places two or three things of one concept and two others."""
    return _placed(rng, aspect, _names(rng, copies=int(rng.integers(2, 4)), others=2))


def _coloured(rng: np.random.Generator, aspect: float) -> list[Thing]:
    """Places two or three things of one concept in different colours, and two uncoloured ones."""
    copies = int(rng.integers(2, 4))
    colours = [*rng.choice(COLOURS, size=copies, replace=False).tolist(), "", ""]
    things = _placed(rng, aspect, _names(rng, copies, others=2))
    if len(things) < len(colours):
        return []  # one found no place, and nothing tells whose colour is missing: draw again
    return [replace(thing, tint=tint) for thing, tint in zip(things, colours, strict=True)]


def _unseen(rng: np.random.Generator, aspect: float) -> list[Thing]:
    chosen = rng.choice(ZERO_SHOT_CONCEPTS, size=int(rng.integers(3, 6)), replace=False)
    return _placed(rng, aspect, chosen.tolist())


def _crowd(rng: np.random.Generator, aspect: float) -> list[Thing]:
    copies = int(rng.integers(_CROWD[0], _CROWD[1] + 1))
    things = _placed(rng, aspect, _names(rng, copies, others=2), _CROWD_SIDES)
    return things if len(things) == copies + 2 else []


_PLACERS: dict[str, Callable[[np.random.Generator, float], list[Thing]]] = {
    "colour": _coloured,
    "unseen concept": _unseen,
    "crowd": _crowd,
}


def _names(rng: np.random.Generator, copies: int, others: int) -> list[str]:
    """Draws `copies` times one concept, then `others` different ones."""
    first, *rest = rng.choice(CONCEPTS, size=1 + others, replace=False).tolist()
    return [first] * copies + rest


def _placed(
    rng: np.random.Generator,
    aspect: float,
    names: list[str],
    sides: tuple[float, float, float] = (0.18, 0.2, 0.46),
) -> list[Thing]:
    """Places the things; those without a free place are left out."""
    things: list[Thing] = []
    for name in names:
        thing = place_thing(rng, name, aspect, things, sides)
        if thing is not None:
            things.append(thing)
    return things
