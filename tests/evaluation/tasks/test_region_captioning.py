from __future__ import annotations

import shutil
import sys

import pytest

from cloc_mllm.data.records import Region
from cloc_mllm.evaluation.rows.rows import ScoredPair
from cloc_mllm.evaluation.tasks.region_captioning import RegionCaptioning, meteor, score, words
from tests.evaluation.helpers import LEFT, pair, query_sets, record

pytest.importorskip("pycocoevalcap", reason="captioning needs pycocoevalcap (the eval extra)")

REFERENCES = [
    ["a red crab on the beach", "the small red crab"],
    ["a boat left of the pier", "the white boat"],
    ["a man in a striped shirt", "the man's striped shirt"],
]


def make_pairs(*answers: str) -> list[ScoredPair]:
    return [
        pair({"raw_text": text}, query_id=str(i), image_id=f"i{i}", labels=REFERENCES[i])
        for i, text in enumerate(answers)
    ]


def test_texts_are_words() -> None:
    assert words(" The man's hat, red. ") == "the man s hat red"
    assert words("?!") == ""


def test_cider_ranks_answers_and_counts_failures_as_zero() -> None:
    (actual,) = score(make_pairs("The small red crab!", "a pier", "")).values()
    assert actual.values[0] > actual.values[1] > actual.values[2] == 0
    assert list(actual.image_ids) == ["i0", "i1", "i2"]


def test_cider_equals_its_equation() -> None:
    """CIDEr-D of one-word texts by hand: only 1-grams count, and both sides are one unit vector."""
    references = [["crab"], ["boat"], ["man"]]
    pairs = [
        pair({"raw_text": text}, query_id=str(i), labels=references[i])
        for i, text in enumerate(("crab", "man", "man"))
    ]
    # the mean over 1- to 4-grams, times ten: 10 / 4 for a hit
    assert score(pairs)["cider"].values.tolist() == pytest.approx([2.5, 0, 2.5])


@pytest.mark.slow  # its Java program takes half a minute to start
@pytest.mark.skipif(shutil.which("java") is None, reason="METEOR needs Java")
def test_meteor_ranks_answers() -> None:
    scores, together = meteor(make_pairs("the small red crab", "a pier", ""))
    assert scores.values[0] == pytest.approx(1.0)
    assert scores.values[0] > scores.values[1] > scores.values[2] == 0
    assert 0 < together < 1


def test_without_java_meteor_says_what_it_needs_before_anything_is_answered(monkeypatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert len(query_sets(RegionCaptioning(), [record("photo")])) == 1
    with pytest.raises(ValueError, match=r"METEOR is a Java program .*default-jre-headless"):
        query_sets(RegionCaptioning(meteor=True), [record("photo")])


def test_without_its_scorer_nothing_is_asked(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    with pytest.raises(ModuleNotFoundError, match="pycocoevalcap"):
        query_sets(RegionCaptioning(), [record("photo")])


def test_each_box_is_asked_once_with_all_its_texts() -> None:
    regions = [
        Region(LEFT, "left dog", expressions=["left dog", "the dog"]),
        Region(LEFT, "brown dog"),
    ]
    (asked,) = query_sets(RegionCaptioning(), [record("photo", regions, source="refcoco")])
    (query,), (reference,) = asked.queries, asked.references
    assert (query.text, query.boxes) == ("", (LEFT,))  # the model's own question about a region
    assert reference.labels == ["left dog", "the dog", "brown dog"]
    assert (asked.answer, asked.max_new_tokens) == ("text", 48)


def test_records_without_regions_give_no_question() -> None:
    (asked,) = query_sets(RegionCaptioning(), [record("photo")])
    assert asked.queries == []
