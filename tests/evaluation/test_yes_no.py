from __future__ import annotations

import pytest
from cloc_mllm.evaluation.yes_no import is_failure, read_yes_no, score

from cloc_mllm.evaluation.rows.rows import PredictionRow, ReferenceRow, ScoredPair


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("yes", "yes"),
        ("Yes, there is a dog.", "yes"),
        ("No.", "no"),
        ("no, not that I can see. Yes?", "no"),
        ("There is no dog in the image.", "no"),
        ("There isn't a dog", "no"),
        ("It is not there", "no"),
        ("I'd say yes", "yes"),
        ("yes and no", "yes"),
        ("maybe yes, maybe not", None),
        ("a dog", None),
        ("Norway", None),
        ("eyes", None),
        ("", None),
    ],
)
def test_answers_are_read_by_whole_words(text: str, expected: str | None) -> None:
    assert read_yes_no(text) == expected


def make_pairs(*answers: tuple[str, str], kind: str = "random") -> list[ScoredPair]:
    """(true label, raw text) each on its own image."""
    return [
        ScoredPair(
            PredictionRow(str(index), f"i{index}", "pope", raw_text=text),
            ReferenceRow(str(index), f"i{index}", "pope", labels=[label], kind=kind),
        )
        for index, (label, text) in enumerate(answers)
    ]


def test_scores_equal_the_counts_by_hand() -> None:
    pairs = make_pairs(
        ("yes", "yes"), ("yes", "yes"), ("yes", "no"), ("yes", "a cat"), ("no", "yes"), ("no", "no")
    )
    actual = {name: values.mean() for name, values in score(pairs).items()}
    # TP 2, FP 1, FN 2 (one of them unparseable), TN 1
    expected = {"accuracy": 3 / 6, "precision": 2 / 3, "recall": 2 / 4, "f1": 4 / 7}
    assert actual == pytest.approx({**expected, "yes_rate": 3 / 6})
    assert [is_failure(pair) for pair in pairs] == [False, False, False, True, False, False]


def test_an_unparseable_answer_to_a_no_is_wrong_but_no_yes() -> None:
    actual = {name: values.mean() for name, values in score(make_pairs(("no", "?"))).items()}
    assert actual == {"accuracy": 0, "yes_rate": 0}


def test_scores_by_split() -> None:
    pairs = make_pairs(("yes", "yes"), ("no", "no")) + make_pairs(("no", "yes"), kind="popular")
    actual = score(pairs)
    assert actual["accuracy"].mean() == pytest.approx(2 / 3)
    assert (actual["accuracy/random"].mean(), actual["accuracy/popular"].mean()) == (1, 0)
    assert len(actual["f1/popular"].values) == 1
