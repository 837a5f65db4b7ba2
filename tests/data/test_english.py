"""Plurals, articles and numbers of the words that questions hold."""

from __future__ import annotations

import pytest

from cloc_mllm.data.english import counted, mirrored, plural, with_article


@pytest.mark.parametrize(
    ("noun", "expected"),
    [
        ("crab", "crabs"),
        ("wine glass", "wine glasses"),
        ("butterfly", "butterflies"),
        ("key", "keys"),
        ("bus", "buses"),
        ("sheep", "sheep"),
        ("person", "people"),
        ("young woman", "young women"),
    ],
)
def test_plural(noun: str, expected: str) -> None:
    assert plural(noun) == expected


@pytest.mark.parametrize(
    ("phrase", "expected"),
    [
        ("crab", "a crab"),
        ("owl", "an owl"),
        ("hourglass", "an hourglass"),
        ("scissors", "scissors"),
        ("the smaller crab", "the smaller crab"),
        ("Two men", "Two men"),
        ("thermos", "a thermos"),
        ("", "a "),
    ],
)
def test_article(phrase: str, expected: str) -> None:
    assert with_article(phrase) == expected


@pytest.mark.parametrize(("count", "expected"), [(1, "an owl"), (3, "three owls"), (12, "12 owls")])
def test_count(count: int, expected: str) -> None:
    assert counted("owl", count) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the left-hand dog, right of a leftover", "the right-hand dog, left of a leftover"),
        ("Left of the mug", "Right of the mug"),
        ("a bright mug", "a bright mug"),
    ],
)
def test_a_mirrored_text_exchanges_left_and_right(text: str, expected: str) -> None:
    assert mirrored(text) == expected and mirrored(expected) == text
