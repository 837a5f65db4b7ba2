"""Writes captions and referring expressions for scenes whose things and boxes are known.

Boxes are xyxy, normalised to the picture. An expression is given only if it singles out one thing
with a clear margin, so its answer is never a matter of taste.
"""

from __future__ import annotations

import itertools
from typing import Literal

import numpy as np

from cloc_mllm.box import Box
from cloc_mllm.data.english import counted

NamedBox = tuple[str, Box]
ExpressionKind = Literal["unique", "size", "ordinal", "relation"]

_SIZE_RATIO = 1.4  # "smaller" needs this ratio of areas
_GAP = 0.08  # "left of" and similar words need centres this far apart
_ORDINALS = ("first", "second", "third")
_RELATIONS = {
    "left of": (0, -1),
    "right of": (0, 1),
    "above": (1, -1),
    "below": (1, 1),
}


def refer_to_things(things: list[NamedBox]) -> tuple[tuple[str, ...], ...]:
    """Lists expressions for each thing: `the smaller crab`, `the second boat from the left`."""
    expressions: list[list[str]] = [[] for _ in things]
    for name in dict.fromkeys(name for name, _ in things):
        same = [i for i, (other, _) in enumerate(things) if other == name]
        if len(same) == 1:
            expressions[same[0]].append(f"the {name}")
        else:
            _refer_by_size(things, same, expressions)
            _refer_by_order(things, same, expressions)
        _refer_by_relation(things, same, expressions)
    return tuple(tuple(e) for e in expressions)


def expression_kind(expression: str) -> ExpressionKind:
    """The skill that an expression of `refer_to_things` needs."""
    if any(f" {relation} the " in expression for relation in _RELATIONS):
        return "relation"
    if expression.endswith((" from the left", " from the right")):
        return "ordinal"
    second = expression.split()[1:2]
    if second and second[0] in ("smaller", "larger", "smallest", "largest"):
        return "size"
    return "ordinal" if second and second[0] in ("leftmost", "rightmost") else "unique"


def describe_scene(rng: np.random.Generator, things: list[NamedBox]) -> tuple[str, ...]:
    """Writes two captions: all things that are there, and the same with one relation."""
    counts: dict[str, int] = {}
    for name, _ in things:
        counts[name] = counts.get(name, 0) + 1
    names = list(counts)
    rng.shuffle(names)
    phrases = [counted(name, counts[name]) for name in names]
    listing = phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"
    start = str(rng.choice(["", "a picture of ", "there is ", "a scene with "]))
    return (start + listing, _relation_caption(rng, things) or listing)


def _refer_by_size(things: list[NamedBox], same: list[int], out: list[list[str]]) -> None:
    order = sorted(same, key=lambda i: _area(things[i][1]))
    areas = [_area(things[i][1]) for i in order]
    small, large = ("smaller", "larger") if len(same) == 2 else ("smallest", "largest")
    if areas[1] > _SIZE_RATIO * areas[0]:
        out[order[0]].append(f"the {small} {things[order[0]][0]}")
    if areas[-1] > _SIZE_RATIO * areas[-2]:
        out[order[-1]].append(f"the {large} {things[order[-1]][0]}")


def _refer_by_order(things: list[NamedBox], same: list[int], out: list[list[str]]) -> None:
    order = sorted(same, key=lambda i: _centre(things[i][1], 0))
    xs = [_centre(things[i][1], 0) for i in order]
    if min(b - a for a, b in itertools.pairwise(xs)) < _GAP:
        return
    name = things[same[0]][0]
    out[order[0]].append(f"the leftmost {name}")
    out[order[-1]].append(f"the rightmost {name}")
    for rank, i in enumerate(order[:3]):
        out[i].append(f"the {_ORDINALS[rank]} {name} from the left")
    if len(same) == 3:
        out[order[1]].append(f"the second {name} from the right")


def _refer_by_relation(things: list[NamedBox], same: list[int], out: list[list[str]]) -> None:
    """Adds `the apple left of the clock` if just one apple is clearly left of the only clock."""
    names = [name for name, _ in things]
    anchors = [i for i in range(len(things)) if names.count(names[i]) == 1 and i not in same]
    for anchor in anchors:
        for relation, (axis, sign) in _RELATIONS.items():
            gaps = [
                sign * (_centre(things[i][1], axis) - _centre(things[anchor][1], axis))
                for i in same
            ]
            clear = [i for i, gap in zip(same, gaps, strict=True) if gap > _GAP]
            unclear = [gap for gap in gaps if -_GAP < gap <= _GAP]
            if len(clear) == 1 and not unclear:
                i = clear[0]
                out[i].append(f"the {names[i]} {relation} the {names[anchor]}")


def _relation_caption(rng: np.random.Generator, things: list[NamedBox]) -> str:
    names = [name for name, _ in things]
    unique = [i for i in range(len(things)) if names.count(names[i]) == 1]
    if len(unique) < 2:
        return ""
    a, b = rng.choice(unique, size=2, replace=False)
    dx = _centre(things[a][1], 0) - _centre(things[b][1], 0)
    dy = _centre(things[a][1], 1) - _centre(things[b][1], 1)
    if max(abs(dx), abs(dy)) < _GAP:
        return ""
    horizontal = "left of" if dx < 0 else "right of"
    vertical = "above" if dy < 0 else "below"
    relation = horizontal if abs(dx) >= abs(dy) else vertical
    return f"{counted(names[a], 1)} {relation} {counted(names[b], 1)}"


def _centre(box: Box, axis: int) -> float:
    return (box[axis] + box[axis + 2]) / 2


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
