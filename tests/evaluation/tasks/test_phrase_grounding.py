"""Phrase grounding against a plain loop, and what is asked of repeated phrases."""

from collections import Counter

import numpy as np
import pytest

from cloc_mllm.data.parquet import write_records
from cloc_mllm.data.scenes import generate_scenes
from cloc_mllm.evaluation.rows.rows import ReferenceRow
from cloc_mllm.evaluation.run import evaluate
from cloc_mllm.evaluation.tasks import phrase_grounding
from cloc_mllm.evaluation.tasks.phrase_grounding import PhraseGrounding, phrase_pairs
from tests.evaluation import helpers
from tests.evaluation.helpers import ALL, LEFT, RIGHT, cloc_config, query_sets, record

TINY = (0.0, 0.0, 0.01, 0.01)


def pair(answers, truths, kind="people", failure=None, index=0):
    answer = {"boxes": answers, "failure": failure}
    return helpers.pair(answer, query_id=f"q{index}", boxes=truths, kind=kind)


def means(pairs):
    return helpers.means(phrase_grounding.score(pairs))


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
    rows = list(phrase_pairs(tmp_path, ["7"], notes))
    assert [query.text for query, _ in rows] == ["a man", "a man", "he"]
    assert [reference.boxes for _, reference in rows] == [[LEFT], [RIGHT], [LEFT]]
    assert [reference.kind for _, reference in rows] == ["people", "people/other", "people"]
    assert [query.id for query, _ in rows] == [
        "phrase_grounding/7/0/0",
        "phrase_grounding/7/0/1",
        "phrase_grounding/7/1/2",
    ]


@pytest.mark.parametrize("annotations", ["", "lvis.json"])
def test_without_its_annotations_it_is_refused(annotations):
    got = annotations or "nothing"
    with pytest.raises(ValueError, match=rf"phrase_grounding needs annotations: .* got '{got}'"):
        query_sets(PhraseGrounding(annotations), [record("p")])


def test_phrases_are_grounded(cloc_dir, tmp_path):
    scenes = list(generate_scenes(2, split="test", long_side=64))
    for number, scene in enumerate(scenes):
        scene.id = str(number)
    write_records(scenes, tmp_path / "records")
    for folder in ("Annotations", "Sentences"):
        (tmp_path / folder).mkdir()
    for photo in "01":
        (tmp_path / "Sentences" / f"{photo}.txt").write_text("[/EN#1/people A man] runs .\n")
        (tmp_path / "Annotations" / f"{photo}.xml").write_text(
            "<a><size><width>10</width><height>10</height></size><object><name>1</name><bndbox>"
            "<xmin>0</xmin><ymin>0</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object></a>"
        )
    settings = cloc_config(
        cloc_dir,
        tmp_path / "out",
        data=str(tmp_path / "records"),
        tasks=[{"phrase_grounding": {"annotations": str(tmp_path)}}],
    )
    metrics = evaluate(settings).tasks["phrase_grounding"].metrics
    assert metrics["r_at_1"].n == metrics["r_at_1/people"].n == 2
