"""Average precision against a plain loop, and against pycocotools given the same boxes by hand."""

import contextlib
import io

import numpy as np
import pytest

from cloc_mllm.evaluation.rows.rows import PredictionRow, ReferenceRow, ScoredPair
from cloc_mllm.evaluation.stats.average_precision import average_precision

pytest.importorskip("pycocotools")


def random_box(rng):
    x, y = np.sort(rng.random((2, 2)), axis=1)
    return (x[0], y[0], x[1], y[1])


def near(box, rng):
    noisy = np.clip(np.array(box) + 0.03 * rng.standard_normal(4), 0, 1)
    return (*np.minimum(noisy[:2], noisy[2:]), *np.maximum(noisy[:2], noisy[2:]))


def random_pairs(num, seed=0):
    rng = np.random.default_rng(seed)
    pairs = []
    for index in range(num):
        truths = [random_box(rng) for _ in range(rng.integers(1, 4))]
        answer = near(truths[0], rng) if rng.random() < 0.7 else random_box(rng)
        failure = "no_box" if rng.random() < 0.1 else None
        prediction = PredictionRow(
            f"q{index}",
            f"i{index // 2}",
            "text_to_box",
            boxes=[] if failure else [answer],
            confidence=None if failure else float(rng.random()),
            failure=failure,
        )
        reference = ReferenceRow(f"q{index}", f"i{index // 2}", "text_to_box", boxes=truths)
        pairs.append(ScoredPair(prediction, reference))
    return pairs


def iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    inner = max(width, 0) * max(height, 0)
    area = sum((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b))
    return inner / (area - inner) if inner else 0.0


def naive_ap(pairs, threshold):
    """COCO's: precision made falling from the right, read at 101 recalls."""
    answered = [pair for pair in pairs if not pair.prediction.failure]
    answered.sort(key=lambda pair: -pair.prediction.confidence)
    hits = [
        max(iou(pair.prediction.boxes[0], box) for box in pair.reference.boxes) >= threshold
        for pair in answered
    ]
    total = sum(len(pair.reference.boxes) for pair in pairs)
    recall = [sum(hits[: k + 1]) / total for k in range(len(hits))]
    precision = [sum(hits[: k + 1]) / (k + 1) for k in range(len(hits))]
    read = [
        max((p for p, r in zip(precision, recall, strict=True) if r >= at), default=0.0)
        for at in np.linspace(0, 1, 101)
    ]
    return sum(read) / 101


def test_equals_a_plain_loop():
    pairs = random_pairs(60)
    actual = average_precision(pairs)
    assert actual.n_boxes == sum(len(pair.reference.boxes) for pair in pairs)
    assert actual.ap_50 == pytest.approx(naive_ap(pairs, 0.5), abs=1e-9)
    assert actual.ap_75 == pytest.approx(naive_ap(pairs, 0.75), abs=1e-9)
    thresholds = [0.5 + 0.05 * k for k in range(10)]
    assert actual.ap == pytest.approx(np.mean([naive_ap(pairs, t) for t in thresholds]), abs=1e-9)
    assert 0 < actual.ap < actual.ap_50 < 1


def test_equals_pycocotools_on_pixel_boxes():
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    pairs = random_pairs(300, seed=1)

    def bbox(box):  # of a photo of 640 x 480
        x1, y1, x2, y2 = np.array(box) * [640, 480, 640, 480]
        return [x1, y1, x2 - x1, y2 - y1]

    truths, found = [], []
    for number, pair in enumerate(pairs, start=1):
        for box in pair.reference.boxes:
            width, height = bbox(box)[2:]
            truths.append(
                {"id": len(truths) + 1, "image_id": number, "category_id": 1, "iscrowd": 0}
                | {"bbox": bbox(box), "area": width * height}
            )
        if pair.prediction.boxes:
            found.append(
                {"image_id": number, "category_id": 1, "score": pair.prediction.confidence}
                | {"bbox": bbox(pair.prediction.boxes[0])}
            )
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "info": {},
            "images": [{"id": number} for number in range(1, 301)],
            "categories": [{"id": 1}],
            "annotations": truths,
        }
        coco.createIndex()
        evaluator = COCOeval(coco, coco.loadRes(found), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    actual = average_precision(pairs)
    assert [actual.ap, actual.ap_50, actual.ap_75] == pytest.approx(evaluator.stats[:3])


def test_the_order_of_confidences_counts():
    box, other = (0.1, 0.1, 0.5, 0.5), (0.6, 0.6, 0.9, 0.9)
    rows = [(box, 0.9, box), (other, 0.1, box)]

    def ap(rows):
        return average_precision(
            [
                ScoredPair(
                    PredictionRow(f"q{i}", "i", "t", boxes=[answer], confidence=confidence),
                    ReferenceRow(f"q{i}", "i", "t", boxes=[truth]),
                )
                for i, (answer, confidence, truth) in enumerate(rows)
            ]
        ).ap_50

    assert ap(rows) == pytest.approx(51 / 101)  # precision 1 up to recall one half
    assert ap([(box, 0.1, box), (other, 0.9, box)]) == pytest.approx(0.5 * 51 / 101)


def test_without_confidence_there_is_none_and_half_of_it_is_refused():
    def pair(index, confidence):
        return ScoredPair(
            PredictionRow(f"q{index}", "i", "t", boxes=[(0, 0, 1, 1)], confidence=confidence),
            ReferenceRow(f"q{index}", "i", "t", boxes=[(0, 0, 1, 1)]),
        )

    assert average_precision([pair(0, None), pair(1, None)]) is None
    with pytest.raises(ValueError, match=r"1 of 2 box answers have no confidence.*'q1'"):
        average_precision([pair(0, 0.5), pair(1, None)])
