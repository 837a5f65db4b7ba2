import numpy as np
import pytest

from cloc_mllm.evaluation.rows.rows import ReferenceRow
from cloc_mllm.evaluation.stats.bootstrap import Bootstrap
from cloc_mllm.evaluation.stats.breakdown import RULES, breakdowns, groups_of

LARGE = (0.0, 0.0, 0.5, 0.5)


def row(box=LARGE, text="the crab", **values):
    boxes = values.pop("boxes", [box])
    return ReferenceRow("q", "i", "rec", boxes=boxes, labels=[text], **values)


@pytest.mark.parametrize(
    ("name", "reference", "expected"),
    [
        ("kind", row(kind="size"), "size"),
        ("kind", row(), "unknown"),
        ("box size", row((0, 0, 0.05, 0.05)), "small"),
        ("box size", row((0, 0, 0.1, 0.1)), "medium"),
        ("box size", row((0, 0, 0.2, 0.2)), "large"),
        ("box size", row(boxes=[(0, 0, 0.01, 0.01), (0, 0, 0.2, 0.2)]), "large"),
        ("position", row((0.0, 0.0, 0.2, 0.2)), "top left"),
        ("position", row((0.4, 0.9, 0.6, 1.0)), "bottom centre"),
        ("position", row((0.9, 0.4, 1.0, 0.6)), "middle right"),
        ("expression length", row(text="crab"), "1-2 words"),
        ("expression length", row(text="the smaller crab"), "3-4 words"),
        ("expression length", row(text="a b c d e"), "5-7 words"),
        ("spatial words", row(text="Left-most crab"), "with"),
        ("spatial words", row(text="the leftover crab"), "without"),
        ("distractors", row(num_distractors=0), "0"),
        ("distractors", row(num_distractors=3), "3+"),
        ("distractors", row(), "unknown"),
    ],
)
def test_the_group_of_a_query(name, reference, expected):
    assert name in RULES
    assert groups_of([reference])[name] == [expected]


def test_sizes_are_in_pixels_where_all_images_are_known():
    box = (0.0, 0.0, 0.25, 0.25)
    known = [row(box, width=100, height=100), row(box, width=1000, height=1000)]
    assert groups_of(known)["box size"] == ["small", "large"]
    by_share = groups_of([*known, row(box)])  # one size is not known
    assert by_share["box size"] == ["large"] * 3


def test_every_query_is_in_one_group_of_each_breakdown():
    rng = np.random.default_rng(0)
    corners = np.sort(rng.random((200, 2, 2)), axis=1).reshape(200, 4)
    references = [
        ReferenceRow(
            f"q{i}",
            f"i{i // 4}",
            "rec",
            boxes=[tuple(box)],
            labels=["the crab left of it"[: 3 + i % 16]],
            kind=("a", "b", "")[i % 3],
            num_distractors=(0, 1, 5, None)[i % 4],
        )
        for i, box in enumerate(corners)
    ]
    right = (rng.random(200) < 0.5).astype(float)
    found = breakdowns(references, right, Bootstrap(50))
    assert list(found) == list(RULES)
    for groups in found.values():
        assert sum(entry.n for entry in groups.values()) == 200
        mean = sum(entry.n * entry.value for entry in groups.values()) / 200
        assert mean == pytest.approx(right.mean())
    assert list(found["distractors"]) == ["0", "1", "3+", "unknown"]
    assert next(iter(found["position"])) == "top left"


def test_the_kind_says_what_the_noun_alone_would_score():
    references = [
        row(kind="size", num_distractors=1),
        row(kind="size", num_distractors=3),
        row(kind="unique", num_distractors=0),
        row(kind="photo"),
    ]
    kinds = breakdowns(references, np.ones(4), Bootstrap(10))["kind"]
    assert kinds["size"].noun_only == pytest.approx((1 / 2 + 1 / 4) / 2)
    assert kinds["unique"].noun_only == 1
    assert kinds["photo"].noun_only is None


def test_one_group_is_no_breakdown():
    assert breakdowns([row(), row()], np.ones(2), Bootstrap(10)) == {}
