"""Phrase grounding against a plain loop, and what is asked of repeated phrases."""

from collections import Counter

import numpy as np
import pytest
from cloc_mllm.evaluation.region_benchmarks import phrase_queries

from cloc_mllm.evaluation import phrase_grounding
from cloc_mllm.evaluation.rows.rows import PredictionRow, ReferenceRow, ScoredPair

LEFT, RIGHT, ALL = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0), (0.0, 0.0, 1.0, 1.0)
TINY = (0.0, 0.0, 0.01, 0.01)


def pair(answers, truths, kind="people", failure=None, index=0):
    return ScoredPair(
        PredictionRow(f"q{index}", "i", "phrase_grounding", boxes=answers, failure=failure),
        ReferenceRow(f"q{index}", "i", "phrase_grounding", boxes=truths, kind=kind),
    )


def means(pairs):
    return {name: scores.mean() for name, scores in phrase_grounding.score(pairs).items()}


def overlap(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    inner = max(width, 0) * max(height, 0)
    return inner / (sum((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)) - inner)


def recall(pairs, k, merged):
    hits = 0
    for item in pairs:
        truths = np.array(item.reference.boxes)
        if merged:
            truths = np.array([[*truths[:, :2].min(0), *truths[:, 2:].max(0)]])
        answers = [] if item.prediction.failure else item.prediction.boxes[:k]
        hits += any(overlap(a, b) >= 0.5 for a in answers for b in truths.tolist())
    return hits / len(pairs)


def test_both_protocols_equal_a_plain_loop():
    rng = np.random.default_rng(0)

    def box():
        low, high = np.sort(rng.random((2, 2)), axis=0)
        return tuple(map(float, (*low, *high)))

    kinds = ["people", "clothing", "people/clothing", "scene"]
    pairs = [
        pair(
            [box() for _ in range(rng.integers(0, 14))],
            [box() for _ in range(rng.integers(1, 4))],
            kinds[rng.integers(4)],
            failure="no_box" if rng.random() < 0.1 else None,
            index=index,
        )
        for index in range(300)
    ]
    actual = means(pairs)
    for k in (1, 5, 10):
        assert actual[f"r_at_{k}"] == pytest.approx(recall(pairs, k, merged=False))
        assert actual[f"merged_r_at_{k}"] == pytest.approx(recall(pairs, k, merged=True))
    for kind in ("people", "clothing", "scene"):
        own = [item for item in pairs if kind in item.reference.kind]
        assert actual[f"r_at_1/{kind}"] == pytest.approx(recall(own, 1, merged=False))
        assert actual[f"merged_r_at_1/{kind}"] == pytest.approx(recall(own, 1, merged=True))
    assert len(actual) == 6 + 2 * 3
    assert actual["r_at_1"] < actual["r_at_5"] < actual["r_at_10"] < 1


@pytest.mark.parametrize(
    ("answers", "truths", "any_box", "merged"),
    [
        ([LEFT], [LEFT, RIGHT], 1, 1),  # half of all is IoU 0.5
        ([(0.0, 0.0, 0.4, 1.0)], [LEFT, RIGHT], 1, 0),
        ([ALL], [LEFT, RIGHT], 1, 1),
        ([ALL], [TINY, (0.99, 0.99, 1.0, 1.0)], 0, 1),
        ([TINY, ALL], [ALL], 0, 0),  # only the first counts at 1
        ([], [ALL], 0, 0),
    ],
)
def test_protocols_differ_where_they_should(answers, truths, any_box, merged):
    actual = means([pair(answers, truths)])
    assert (actual["r_at_1"], actual["merged_r_at_1"]) == (any_box, merged)


def test_one_box_answers_have_no_recall_at_five():
    assert set(means([pair([ALL], [ALL], kind="")])) == {"r_at_1", "merged_r_at_1"}
    assert "r_at_5" in means([pair([ALL], [ALL]), pair([TINY, ALL], [ALL], index=1)])


def test_baselines_need_no_model():
    references = [
        ReferenceRow(f"q{i}", f"i{i}", "phrase_grounding", boxes=[box])
        for i, box in enumerate([ALL, ALL, TINY])
    ]
    assert phrase_grounding.whole_image(references) == {"r_at_1": pytest.approx(2 / 3)}
    assert 0 < phrase_grounding.chance(references)["r_at_1"] < 1
    assert phrase_grounding.chance(references[:1]) == {}


def test_a_phrase_that_stands_twice_is_asked_twice_each_with_its_own_boxes(tmp_path):
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "Sentences").mkdir()
    objects = "".join(
        f"<object><name>{name}</name><bndbox><xmin>{x}</xmin><ymin>0</ymin><xmax>{x + 5}</xmax>"
        "<ymax>10</ymax></bndbox></object>"
        for name, x in (("1", 0), ("2", 5))
    )
    size = "<size><width>10</width><height>10</height></size>"
    (tmp_path / "Annotations" / "7.xml").write_text(f"<a>{size}{objects}</a>")
    (tmp_path / "Sentences" / "7.txt").write_text(
        "[/EN#1/people A man] and [/EN#2/people/other a man] .\n\n[/EN#1/people He] runs .\n"
    )
    notes = Counter()
    rows = list(phrase_queries(tmp_path, ["7"], notes))
    assert [query.text for query, _ in rows] == ["a man", "a man", "he"]
    assert [reference.boxes for _, reference in rows] == [[LEFT], [RIGHT], [LEFT]]
    assert [reference.kind for _, reference in rows] == ["people", "people/other", "people"]
    assert [query.id for query, _ in rows] == [
        "phrase_grounding/7/0/0",
        "phrase_grounding/7/0/1",
        "phrase_grounding/7/1/2",
    ]
