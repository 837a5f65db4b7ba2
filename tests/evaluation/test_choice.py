from __future__ import annotations

import pytest
from cloc_mllm.evaluation.choice import is_failure, read_choice, score

from cloc_mllm.evaluation.rows.rows import PredictionRow, ReferenceRow, ScoredPair


@pytest.mark.parametrize(
    ("text", "choices", "expected"),
    [
        ("It is a cat.", ["cat", "dog"], "cat"),
        ("CAT", ["cat", "dog"], "cat"),
        ("a catalog", ["cat", "dog"], None),
        ("a catalog", ["cat", "catalog"], "catalog"),
        ("a tomcat", ["cat", "dog"], None),
        ("a cat or a dog", ["cat", "dog"], None),
        ("It is not a cat but a dog", ["cat", "dog"], None),
        ("a bird", ["cat", "dog"], None),
        ("", ["cat", "dog"], None),
        ("an apple juice", ["apple", "apple juice"], "apple juice"),
        ("an apple", ["apple", "apple juice"], "apple"),
        ("an apple in apple juice", ["apple", "apple juice"], None),
        ("an alarm-clock", ["alarm clock", "dog"], "alarm clock"),
        ("an alarm_clock", ["alarm clock", "dog"], "alarm clock"),
        ("t.v.", ["t.v.", "dog"], "t.v."),
        ("tXvX", ["t.v.", "dog"], None),
    ],
)
def test_one_name_in_whole_words_is_a_choice(text, choices, expected) -> None:
    assert read_choice(text, choices) == expected
    assert read_choice(text, choices[::-1]) == expected


def make_pairs(*answers: str, kinds: tuple[str, ...] = ("box",)) -> list[ScoredPair]:
    """Things whose true name is cat: answers to `cat or dog`, `dog or cat`, in turn."""
    pairs = []
    for index, text in enumerate(answers):
        row_id = f"ref_lvis/{index // 2}/{kinds[index // 2 % len(kinds)]}/{index % 2}"
        choices = ["cat", "dog"] if index % 2 == 0 else ["dog", "cat"]
        reference = ReferenceRow(row_id, f"i{index // 2}", "ref_lvis", labels=["cat"])
        reference = ReferenceRow(
            **{**reference.__dict__, "choices": choices, "kind": row_id.split("/")[2]}
        )
        prediction = PredictionRow(row_id, f"i{index // 2}", "ref_lvis", raw_text=text)
        pairs.append(ScoredPair(prediction, reference))
    return pairs


def test_both_orders_make_a_pair() -> None:
    pairs = make_pairs("cat", "cat", "cat", "dog", "catalog", "cat")
    actual = {name: values.mean() for name, values in score(pairs).items()}
    assert actual == pytest.approx(
        {
            "acc": 4 / 6,
            "pair_acc": 1 / 3,
            "first_rate": 3 / 5,
            "acc/true_first": 2 / 3,
            "acc/true_second": 2 / 3,
        }
    )
    assert [is_failure(pair) for pair in pairs] == [False] * 4 + [True, False]


def test_a_model_that_always_names_the_first_shows_its_bias() -> None:
    actual = {k: v.mean() for k, v in score(make_pairs("cat", "dog", "cat", "dog")).items()}
    assert (actual["acc"], actual["pair_acc"], actual["first_rate"]) == (0.5, 0, 1)
    assert (actual["acc/true_first"], actual["acc/true_second"]) == (1, 0)


def test_kinds_of_region_prompts_are_told_apart() -> None:
    actual = score(make_pairs("cat", "cat", "dog", "dog", kinds=("box", "point")))
    assert (actual["pair_acc/box"].mean(), actual["acc/point"].mean()) == (1, 0)


def test_a_thing_asked_in_one_order_is_no_pair() -> None:
    assert "pair_acc" not in score(make_pairs("cat"))
