"""Small rules of English for words put into questions and captions: plurals, articles, numbers."""

from __future__ import annotations

import re

NUMBER_WORDS = {
    2: "two",
    3: "three",
    4: "four",
    5: "five",
    6: "six",
    7: "seven",
    8: "eight",
    9: "nine",
    10: "ten",
}
_ALREADY_PLURAL = ("grapes", "scissors", "glasses", "cherries", "people", "pants", "jeans")
_PLURALS = {
    "fish": "fish",
    "sheep": "sheep",
    "octopus": "octopuses",
    "person": "people",
    "man": "men",
    "woman": "women",
    "child": "children",
    "mouse": "mice",
    "knife": "knives",
    "foot": "feet",
    "skis": "skis",
}
_OTHER_SIDE = {"left": "right", "right": "left", "Left": "Right", "Right": "Left"}
_SIDES = re.compile(rf"\b(?:{'|'.join(_OTHER_SIDE)})\b")
# a phrase that starts with one of these is not given another article
_DETERMINERS = re.compile(
    r"(?:an?|the|this|that|these|those|some|any|no|one|two|three|four|five|six|seven|eight|nine|ten"
    r"|several|many|both|all|his|her|their|its|my|your|our|\d+)\b",
    re.IGNORECASE,
)


def mirrored(text: str) -> str:
    """The text of a mirrored picture: `left` and `right` change places."""
    return _SIDES.sub(lambda side: _OTHER_SIDE[side[0]], text)


def plural(noun: str) -> str:
    """Returns the plural of a noun, which may have words before it (`wine glass`)."""
    before, space, last = noun.rpartition(" ")
    if last in _ALREADY_PLURAL:
        return noun
    if last in _PLURALS:
        return before + space + _PLURALS[last]
    if last.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if last.endswith("y") and last[-2:-1] not in tuple("aeiou"):
        return noun[:-1] + "ies"
    return noun + "s"


def counted(noun: str, count: int) -> str:
    """Returns `two crabs`, `a crab`, or `an owl`."""
    if count > 1:
        return f"{NUMBER_WORDS.get(count, count)} {plural(noun)}"
    return with_article(noun)


def with_article(phrase: str) -> str:
    """Puts `a` or `an` before a phrase, unless it is plural or has an article or number."""
    if phrase.rpartition(" ")[2] in _ALREADY_PLURAL or _DETERMINERS.match(phrase):
        return phrase
    vowel_sound = phrase[:1].casefold() in tuple("aeiou") or phrase.startswith(("hour", "honest"))
    return f"{'an' if vowel_sound else 'a'} {phrase}"
