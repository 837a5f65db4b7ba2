from __future__ import annotations

import shutil

import pytest
from cloc_mllm.evaluation.captioning import meteor, score, words_of

from cloc_mllm.evaluation.rows.rows import PredictionRow, ReferenceRow, ScoredPair

pytest.importorskip("pycocoevalcap", reason="captioning needs pycocoevalcap (the eval extra)")

REFERENCES = [
    ["a red crab on the beach", "the small red crab"],
    ["a boat left of the pier", "the white boat"],
    ["a man in a striped shirt", "the man's striped shirt"],
]


def make_pairs(*answers: str) -> list[ScoredPair]:
    return [
        ScoredPair(
            PredictionRow(str(i), f"i{i}", "region_captioning", raw_text=text),
            ReferenceRow(str(i), f"i{i}", "region_captioning", labels=REFERENCES[i]),
        )
        for i, text in enumerate(answers)
    ]


def test_texts_are_words() -> None:
    assert words_of(" The man's hat, red. ") == "the man s hat red"
    assert words_of("?!") == ""


def test_cider_ranks_answers_and_counts_failures_as_zero() -> None:
    (actual,) = score(make_pairs("The small red crab!", "a pier", "")).values()
    assert actual.values[0] > actual.values[1] > actual.values[2] == 0
    assert list(actual.image_ids) == ["i0", "i1", "i2"]


def test_cider_equals_its_equation() -> None:
    """CIDEr-D of one-word texts by hand: only 1-grams count, and both sides are one unit vector."""
    references = [["crab"], ["boat"], ["man"]]
    pairs = [
        ScoredPair(
            PredictionRow(str(i), "i", "region_captioning", raw_text=text),
            ReferenceRow(str(i), "i", "region_captioning", labels=references[i]),
        )
        for i, text in enumerate(("crab", "man", "man"))
    ]
    # the mean over 1- to 4-grams, times ten: 10 / 4 for a hit
    assert score(pairs)["cider"].values.tolist() == pytest.approx([2.5, 0, 2.5])


@pytest.mark.slow  # its Java program takes half a minute to start
@pytest.mark.skipif(shutil.which("java") is None, reason="METEOR needs Java")
def test_meteor_ranks_answers() -> None:
    scores, of_all = meteor(make_pairs("the small red crab", "a pier", ""))
    assert scores.values[0] == pytest.approx(1.0)
    assert scores.values[0] > scores.values[1] > scores.values[2] == 0
    assert 0 < of_all < 1


def test_without_java_meteor_says_what_it_needs(monkeypatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match=r"METEOR is a Java program .*default-jre-headless"):
        meteor(make_pairs("a crab"))
