"""Noun phrases of captions: what is asked for, and why the rest is not."""

from __future__ import annotations

import pytest

pytest.importorskip("spacy")

from cloc_mllm.vesl.phrases import PhraseExtractor, Phrases


@pytest.fixture(scope="module")
def extractor() -> PhraseExtractor:
    return PhraseExtractor()


def _one(extractor: PhraseExtractor, *captions: str) -> Phrases:
    (phrases,) = extractor.extract([captions])
    return phrases


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        (
            "A man in a red shirt is riding past an old brick building .",
            ["a man", "a red shirt", "an old brick building"],
        ),
        ("two crabs, a hot dog and a t-shirt", ["crabs", "a hot dog", "a t-shirt"]),
        ("The dog's collar", ["the dog", "collar"]),
        ("his bike", ["bike"]),
        ("a running child", ["a running child"]),
        ("golden retriever - free download", ["golden retriever"]),
        ("", []),
        ("!!! 😀 ???", []),
    ],
)
def test_the_grammar(extractor: PhraseExtractor, caption: str, expected: list[str]) -> None:
    assert _one(extractor, caption).queries == expected


@pytest.mark.parametrize(
    ("caption", "phrase", "reason"),
    [
        ("They look at a kite", "they", "no_noun"),
        ("A kite in the background", "the background", "stop_words"),
        ("A stock photo of a kite", "a stock photo", "web_words"),
        ("A kite. The kite is up.", "the kite", "duplicate"),
        ("A dog runs after the dogs", "the dogs", "duplicate"),
        ("a big old dark red round warm shiny soft new kite", None, "too_long"),
    ],
)
def test_why_a_phrase_is_dropped(
    extractor: PhraseExtractor, caption: str, phrase: str | None, reason: str
) -> None:
    dropped = _one(extractor, caption, "a kite").dropped
    reasons = {item.reason for item in dropped if phrase in (None, item.phrase)}
    assert reason in reasons


def test_at_most_so_many_queries() -> None:
    captions = ["a dog, a cat, a horse, a boat, a car"]
    (phrases,) = PhraseExtractor(max_queries=3).extract([captions])
    assert phrases.queries == ["a dog", "a cat", "a horse"]
    assert [item.reason for item in phrases.dropped] == ["too_many", "too_many"]


def test_names_are_bare_and_singular() -> None:
    (phrases,) = PhraseExtractor(form="name").extract([["two small dogs and the hot dogs"]])
    assert phrases.queries == ["small dog", "hot dog"]


def test_images_do_not_mix(extractor: PhraseExtractor) -> None:
    first, second, third = extractor.extract([["a dog"], [], ["a cat", "a dog"]])
    assert [first.queries, second.queries, third.queries] == [["a dog"], [], ["a cat", "a dog"]]
