"""Reads the texts and boxes of conversations, in LLaVA's, Ferret's and ms-swift's rows.

The three write boxes differently; each reader first puts the mark `BOX` where a box stands. A turn
then names its boxes in one of three ways:

1. a question with boxes, an answer without: the answer describes the boxes ("Provide a short
   description for this region: BOX" / "a man on a bench");
2. an answer of nothing but boxes: the question refers to them ("... the region this sentence
   describes: the man on the left." / BOX);
3. text with boxes in it: a box is named by the words before it ("The man BOX holds a bat BOX").
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple

BOX = "\ue000"  # a private character, which no text has
Kind = Literal["description", "expression", "phrase"]
_ONLY_BOXES = re.compile(rf"^(answer:)?[\s.,;:()\[\]{BOX}]*$", re.IGNORECASE)
# what stands before a referring expression, the surest first
_CUES = [
    re.compile(cue, re.IGNORECASE)
    for cue in (
        r"\bdescribes?:?\s",
        r":\s",
        r"\b(?:region|box|location|coordinates?|position) of\s",
        r"\bwhere (?:is|are)\s",
        r"^(?:please )?(?:find|locate|detect|point (?:at|to|out)|show(?: me)?)\s",
    )
]
_QUOTED = re.compile(r"[\"“](?P<text>[^\"”]+)[\"”]")
_CLAUSE = re.compile(rf"[.,;:!?\n{BOX}]")
_DETERMINER = re.compile(
    r"\b(?:a|an|the|this|that|these|those|his|her|its|their|my|your|our|some|two|three|four|five"
    r"|six|another|other)\b",
    re.IGNORECASE,
)
_MAX_PHRASE_WORDS = 12


# how other formats write boxes into texts
_OTHER_NOTATIONS = {
    "bbox_2d": "JSON answers with `bbox_2d` (Qwen2.5-VL)",
    "<|box_start|>": "boxes between <|box_start|> and <|box_end|> (Qwen2-VL)",
    "<box>": "boxes in <box> (Qwen-VL, InternVL)",
    "<bbox>": "<bbox> marks (ms-swift)",
    "<ref-object>": "<ref-object> marks (ms-swift)",
    "<bbox_location": "<bbox_location> marks (Ferret)",
    "<loc": "location tokens <loc...> (PaliGemma, Florence-2)",
    "box_2d": "JSON answers with `box_2d` (Gemini)",
}


class Grounding(NamedTuple):
    """Boxes `first .. first + num_boxes - 1` of the conversation and what is said of them."""

    first: int
    num_boxes: int
    text: str
    kind: Kind


def foreign_notation(texts: Sequence[str], own: Collection[str] = ()) -> str:
    """Names the notation in which another format writes boxes into these texts.

    Args:
        own: marks of the format itself; texts that have one are its own.

    Returns:
        "" for none.
    """
    if any(mark in text for mark in own for text in texts):
        return ""
    named = _OTHER_NOTATIONS.items()
    return next((name for mark, name in named if any(mark in text for text in texts)), "")


def ground_turns(turns: Sequence[str]) -> list[Grounding]:
    """Texts of alternating question and answer, boxes as `BOX` -> groundings, in their order.

    Boxes are numbered through the conversation. A box that nothing names has the text "".
    """
    groundings = []
    first = 0
    for position in range(0, len(turns), 2):
        question = turns[position]
        answer = turns[position + 1] if position + 1 < len(turns) else ""
        in_question, in_answer = question.count(BOX), answer.count(BOX)
        if in_question and not in_answer and answer.strip():
            groundings.append(Grounding(first, in_question, answer.strip(), "description"))
        else:
            groundings += _named_inside(question, first)
        first += in_question
        if in_answer and not in_question and _ONLY_BOXES.match(answer):
            groundings.append(Grounding(first, in_answer, _referred(question), "expression"))
        else:
            groundings += _named_inside(answer, first)
        first += in_answer
    return groundings


def _referred(question: str) -> str:
    """The referring expression in a question: what follows a cue, or is quoted, or all of it."""
    cues = (cue.search(question) for cue in _CUES)
    cue = next(filter(None, cues), None)
    text = (question[cue.end() :] if cue else question).strip()
    if quoted := _QUOTED.search(text):
        return quoted["text"].strip()
    return text[:-1].rstrip() if text.endswith((".", "?", "!")) else text


def _named_inside(text: str, first: int) -> list[Grounding]:
    groundings = []
    start = count = 0
    name = ""
    for number, position in enumerate(i for i, char in enumerate(text) if char == BOX):
        between = text[start:position]
        if number and not re.sub(r"and|[\s,;()\[\]]", "", between):
            count += 1  # several boxes after one name
        else:
            if count:
                groundings.append(Grounding(first + number - count, count, name, "phrase"))
            name, count = _last_name(between), 1
        start = position + 1
    if count:
        total = text.count(BOX)
        groundings.append(Grounding(first + total - count, count, name, "phrase"))
    return groundings


def _last_name(before: str) -> str:
    """The words of the last clause, from its last article or other determiner on."""
    clause = _CLAUSE.split(before.rstrip(" \t([\"'"))[-1]
    determiners = list(_DETERMINER.finditer(clause))
    name = clause[determiners[-1].start() :] if determiners else clause
    return " ".join(name.split()[-_MAX_PHRASE_WORDS:])
