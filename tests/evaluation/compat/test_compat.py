"""Other projects' scorers: the eleven ways, their quirks, and lmms-eval's own code."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cloc_mllm.evaluation.compat import COMPATS, BoxAnswers, compat_scores
from cloc_mllm.evaluation.rows.rows import PredictionRow, ReferenceRow, ScoredPair
from scoring import lmms_eval_module, lmms_eval_side
from tests.evaluation.compat.eleven_ways import COLUMNS, ELEVEN_WAYS, SIZE, TRUTH, ious, table

CASES = [
    pytest.param(text, declared, column, expected, id=f"{name}-{column}")
    for name, text, declared, values in ELEVEN_WAYS
    for column, expected in zip(COLUMNS, values, strict=True)
]


@pytest.mark.parametrize(("text", "declared", "column", "expected"), CASES)
def test_eleven_ways(text, declared, column, expected):
    actual = dict(zip(COLUMNS, ious(text, declared), strict=True))[column]
    assert actual == pytest.approx(expected, abs=0.006)


def test_the_docs_show_the_eleven_ways(project_root):
    assert table() in (project_root / "docs" / "how-to" / "score.md").read_text(encoding="utf-8")


def answered(*answers: str, truth=TRUTH, size=SIZE) -> BoxAnswers:
    count = len(answers)
    return BoxAnswers(list(answers), np.array([truth] * count), np.array([size] * count))


@pytest.mark.parametrize(
    ("name", "text", "metric", "expected"),
    [
        ("lmms-eval", "first [0.2, 0.2, 0.5, 0.75] [0, 0, 1, 1]", "IoU", 1),
        ("lmms-eval", "[0.2 , 0.2, 0.5, 0.75]", "IoU", 0),
        ("lmms-eval-grounding", "0 0 1 1 and 200 200 500 750", "IoU", 1),
        ("lmms-eval-grounding", '{"a": {"box": ["128", "96", "320", "360"]}}', "IoU", 1),
        ("vlmevalkit", "200 and 200 to 500 by 750", "Average IoU", 1),
        ("vlmevalkit", "[1200, 360, 128, 96]", "Average IoU", 192 / 512),
        ("vlmevalkit", "1 2 3", "Average IoU", 0),
        ("internvl", "[[200, 200, 500, 750]] [0, 0, 1, 1]", "Precision @ 1", 1),
        ("internvl", "[a, b, c, d] [200, 200, 500, 750]", "Precision @ 1", 0),
        ("internvl", "[[\n200, 200, 500, 750]]", "Precision @ 1", 0),
        ("ferret", "a dog [0, 0, 9, 9]. crab [200, 200, 500, 750].", "Precision @ 1", 0),
        ("ferret", "a dog [0, 0, 9, 9]. crab [200, 200, 500, 750].", "upper bound", 1),
        ("ferret", "crab [200, 200, 500, 750] dog [0, 0, 9, 9] x [1].", "upper bound", 0),
        ("ferret", "crab [200, 200, 500, 750.0]", "upper bound", 0),
    ],
)  # fmt: skip
def test_quirks(name, text, metric, expected):
    assert COMPATS[name](answered(text)).metrics[metric] == pytest.approx(expected, abs=1e-4)


def test_no_answer_has_its_centre_in_a_box_at_the_corner():
    scores = COMPATS["lmms-eval"](answered("nothing", truth=(0, 0, 0.5, 0.5)))
    assert scores.metrics["Center_ACC"] == 1 and scores.metrics["ACC@0.1"] == 0


@pytest.mark.parametrize(
    ("name", "text", "truth"),
    [("lmms-eval", "nothing", (0.1, 0.1, 0.1, 0.4)), ("ferret", "crab [1, 2].", TRUTH)],
)
def test_answers_on_which_the_original_ends_are_counted_and_wrong(name, text, truth):
    scores = COMPATS[name](answered(text, truth=truth))
    assert scores.num_raised == 1 and scores.iou[0] == 0


PIECES = [text for _, text, _, _ in ELEVEN_WAYS]
PIECES += [*"0123456789.,-[](){} \n", ", ", "[0.1, 0.1, 0.4, 0.6]", "[nan, 1, 2, 3]", "[1, 2]"]
PIECES += ['{"bbox": [1, 2, 3, "4"]}', "```json", "```", '"box": [130, 99, 300, 360]', "٣", "1e9"]
texts = st.one_of(st.text(max_size=40), st.lists(st.sampled_from(PIECES), max_size=9).map("".join))


@pytest.mark.parametrize("name", COMPATS)
@given(answers=st.lists(texts, min_size=1, max_size=4))
@settings(max_examples=200)
@example(answers=["[" * 3000 + "]" * 3000, "9" * 400, f"[{'9' * 400}, 1, 1, 1]", "\ud800", ""])
@example(answers=[f"[{'9' * 5000}, 1, 1, 1]", f'[{{"bbox": [1, 2, 3, {"9" * 400}]}}]'])
def test_no_text_makes_a_scorer_raise(name, answers):
    scores = COMPATS[name](answered(*answers))
    assert len(scores.iou) == len(answers)
    assert all(0 <= value <= 1 for value in [*scores.iou, *scores.metrics.values()])


def peer(file: str) -> ModuleType:
    module = lmms_eval_module(file)
    if module is None:
        pytest.skip("lmms-eval is not installed (pip install --no-deps lmms-eval)")
    return module


def boxes():
    """Normalised boxes with an area, some at the corner."""
    side = st.tuples(st.integers(0, 90), st.integers(1, 10))
    return st.tuples(side, side).map(
        lambda s: (s[0][0] / 100, s[1][0] / 100, sum(s[0]) / 100, sum(s[1]) / 100)
    )


@given(rows=st.lists(st.tuples(texts, boxes()), min_size=1, max_size=5))
@settings(max_examples=300)
def test_bbox_rec_equals_lmms_eval(rows):
    module = peer("tasks/refcoco/utils_rec.py")
    results = [
        module.refcoco_bbox_rec_process_result(
            {"question_id": "q", "answer": "", "bbox": list(truth)}, [text]
        )["refcoco_IoU"]
        for text, truth in rows
    ]
    expected = lmms_eval_side(results, module)()
    given_rows = BoxAnswers(
        [text for text, _ in rows], np.array([t for _, t in rows]), np.zeros((1, 2))
    )
    actual = COMPATS["lmms-eval"](given_rows)
    if np.isfinite(list(expected.values())).all():
        assert actual.metrics == expected


@given(rows=st.lists(st.tuples(texts, boxes()), min_size=1, max_size=5))
@settings(max_examples=300)
def test_refcoco_grounding_equals_lmms_eval(rows):
    pytest.importorskip("loguru", reason="lmms-eval logs with it")
    module = peer("tasks/refcoco_grounding/utils.py")
    given_rows = answered(*[text for text, _ in rows], size=(1024, 512))
    given_rows = BoxAnswers(given_rows.answers, np.array([t for _, t in rows]), given_rows.sizes)
    documents = [
        {
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "answer": "",
            "image": SimpleNamespace(size=(1024, 512)),
        }
        for x1, y1, x2, y2 in given_rows.truths_px.tolist()
    ]
    results = [
        module.refcoco_grounding_process_result(document, [text])["refcoco_grounding_IoU"]
        for document, (text, _) in zip(documents, rows, strict=True)
    ]
    actual = COMPATS["lmms-eval-grounding"](given_rows).metrics
    # it is given widths, so right edges differ in the last digit
    assert actual["IoU"] == pytest.approx(module.refcoco_grounding_iou(results), abs=1e-9)
    assert actual["ACC@0.5"] == module.refcoco_grounding_acc05(results)
    assert actual["Center_ACC"] == module.refcoco_grounding_center_acc(results)


def pair(row_id="q1", raw_text="[200, 200, 500, 750]", boxes=(TRUTH,), **values):
    reference = {"width": 640, "height": 480, **values.pop("reference", {})}
    return ScoredPair(
        PredictionRow(row_id, "i", "rec", raw_text=raw_text, **values),
        ReferenceRow(row_id, "i", "rec", boxes=list(boxes), **reference),
    )


def test_scores_rows():
    scores = compat_scores("internvl", [pair("q1"), pair("q2", raw_text="")])
    assert scores.metrics == {"Precision @ 1": 0.5}


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("coco", [pair()], "unknown compat 'coco'; expected some of: lmms-eval, .*ferret"),
        ("ferret", [pair("q7", raw_text="", **{"boxes": (TRUTH, TRUTH)})], "one true box: 'q7'"),
        ("ferret", [pair("q7", reference={"width": 0})], "needs width and height.*: 'q7'"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_scored_are_named(name, rows, message):
    with pytest.raises(ValueError, match=message):
        compat_scores(name, rows)


def test_boxes_without_words_are_refused():
    prediction = PredictionRow("q9", "i", "rec", boxes=[TRUTH])
    rows = [ScoredPair(prediction, ReferenceRow("q9", "i", "rec", boxes=[TRUTH]))]
    with pytest.raises(ValueError, match="there are boxes without a raw_text: 'q9'"):
        compat_scores("lmms-eval", rows)
