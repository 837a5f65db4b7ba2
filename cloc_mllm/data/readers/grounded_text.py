"""Reads the texts and boxes of conversations, in LLaVA's, Ferret's and ms-swift's rows.

The three write boxes differently; each reader first puts the mark `BOX` where a box stands. A turn
then names its boxes in one of three ways:

1. a question that asks what is in one box, and nothing else, and an answer without boxes: the
   answer describes the box ("Provide a short description for this region: BOX" / "a man");
2. an answer of nothing but boxes: the question refers to them ("... the region this sentence
   describes: the man on the left." / BOX);
3. text with boxes in it: a box is named by the words before it ("The man BOX holds a bat BOX").

Whatever else is said of a box ("Is the man BOX taller?" / "No, the woman is.") names nothing.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple

BOX = "\ue000"  # a private character, which no text has
Kind = Literal["description", "expression", "phrase"]
_ONLY_BOXES = re.compile(rf"^(answer:)?(?:[\s.,;:()\[\]{BOX}]|\band\b)*$", re.IGNORECASE)
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


def _words(text: str) -> set[str]:
    return set(re.findall(r"[^\W_]+", text.replace("'", "").casefold()))


# a question of these words alone asks for nothing but what is in its box
_WHAT_IS_IN = _words(
    "a about an and answer area at box bounding brief briefly by can caption category class "
    "concise contained contains content contents could depicted describe describes description "
    "detail for give given here identify image in indicated inside is it item kind label "
    "located location marked me name object of one phrase photo picture please provide region "
    "see seen sentence short shown single tell that the there thing this type us visible what "
    "whats which who whos with within word words would you"
)
# answers and names of these words alone say nothing of what is there
_EMPTY_WORDS = _words(
    "a an and are as at be by can for from he her here him i in is it its me my no not of on "
    "one or our she that the their them there these they this those to was we were with yes you "
    "your"
)
_YES_OR_NO = re.compile(r"\s*(?:yes|no|not|none|nothing|correct|true|false|sorry)\b", re.IGNORECASE)
_TRAILING = re.compile(
    r"(?:\s+(?:is|are|was|were|be|being|at|in|on|within|inside|located|found|shown|seen|here|there|"
    r"which|that|can|appears?|located|positioned|situated))+$",
    re.IGNORECASE,
)
_NO_NAME_START = re.compile(
    r"(?:is|are|was|were|be|has|have|had|does|do|did|can|will|would|than|to|of|at|in|on|by|with|from|"
    r"near|and|or|but|next|behind|beside|under|above|while|because|so|as|for)\b",
    re.IGNORECASE,
)
_QUESTION_START = re.compile(
    r"(?:what|who|whose|which|where|when|why|how|is|are|was|were|do|does|did|can|could|will|would|has|"
    r"have|please|tell|give|show|name|describe)\b",
    re.IGNORECASE,
)
_SECOND_QUESTION = re.compile(
    r"\band (?:what|who|how|why|where|tell|describe|is|are)\b|\?", re.IGNORECASE
)


# how other formats write boxes into texts
_OTHER_NOTATIONS = {
    re.compile(mark): name
    for mark, name in {
        "bbox_2d": "JSON answers with `bbox_2d` (Qwen2.5-VL)",
        r"<\|box_start\|>": "boxes between <|box_start|> and <|box_end|> (Qwen2-VL)",
        "<box>": "boxes in <box> (Qwen-VL, InternVL)",
        "<bbox>": "<bbox> marks (ms-swift)",
        "<ref-object>": "<ref-object> marks (ms-swift)",
        "<bbox_location": "<bbox_location> marks (Ferret)",
        r"<loc_?\d": "location tokens <loc...> (PaliGemma, Florence-2)",
        "box_2d": "JSON answers with `box_2d` (Gemini)",
        "<patch_index_": "location tokens <patch_index_...> (Kosmos-2)",
        r"\{<\d+><": "numbers in {<..><..><..><..>} (MiniGPT-v2, GeoChat)",
        r"<points? x1?=": "points in <point x=... y=...> (Molmo)",
        "<poly>|<quad>": "corners in <poly> or <quad> (Qwen-VL)",
    }.items()
}


class Grounding(NamedTuple):
    """Boxes `first .. first + num_boxes - 1` of the conversation and what is said of them.

    Attributes:
        text: "" where nothing names them.
        pair: the number of the question with its answer.
    """

    first: int
    num_boxes: int
    text: str
    kind: Kind
    pair: int = 0


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
    return next((name for mark, name in named if any(map(mark.search, texts))), "")


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
        found = []
        if in_question == 1 and not in_answer and _describes(question, answer):
            found.append(Grounding(first, 1, answer.strip(), "description"))
        else:
            found += _named_inside(question, first)
        first += in_question
        if in_answer and not in_question and _ONLY_BOXES.match(answer):
            found.append(Grounding(first, in_answer, _referred(question), "expression"))
        else:
            found += _named_inside(answer, first)
        first += in_answer
        groundings += [one._replace(pair=position // 2) for one in found]
    return groundings


def _describes(question: str, answer: str) -> bool:
    """Whether an answer says what is in the one box of its question."""
    if not _words(question.replace(BOX, " ")) <= _WHAT_IS_IN or _YES_OR_NO.match(answer):
        return False
    return bool(answer.strip()) and not _says_nothing(answer)


def _says_nothing(text: str) -> bool:
    words = _words(text)
    return bool(words) and words <= _EMPTY_WORDS


def _referred(question: str) -> str:
    """The referring expression in a question: what follows a cue, or is quoted, or all of it.

    "" where the question is one of another kind, as in "Which of them is taller?".
    """
    cues = (cue.search(question) for cue in _CUES)
    cue = next(filter(None, cues), None)
    text = (question[cue.end() :] if cue else question).strip()
    if quoted := _QUOTED.search(text):
        return quoted["text"].strip()
    text = text[:-1].rstrip() if text.endswith((".", "?", "!")) else text
    is_other = _SECOND_QUESTION.search(text) or (cue is None and _QUESTION_START.match(text))
    return "" if is_other or _says_nothing(text) else text


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
    """The words of the last clause, from its last article or other determiner on.

    "" where they name nothing: "is taller than", "No", "It is at", "the region".
    """
    clause = _CLAUSE.split(before.rstrip(" \t([\"'"))[-1]
    determiners = list(_DETERMINER.finditer(clause))
    name = clause[determiners[-1].start() :] if determiners else clause
    name = _TRAILING.sub("", " ".join(name.split()[-_MAX_PHRASE_WORDS:]))
    starts = (_NO_NAME_START, _QUESTION_START, _YES_OR_NO)
    is_none = any(start.match(name) for start in starts) or name.endswith(" of")
    is_generic = _words(name) <= _WHAT_IS_IN | _EMPTY_WORDS and not name.startswith(("a ", "an "))
    return "" if is_none or is_generic else name
