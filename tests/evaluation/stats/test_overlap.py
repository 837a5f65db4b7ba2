"""IoU against exact arithmetic and against independent implementations."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_iou as torchvision_box_iou

from cloc_mllm.evaluation.stats.overlap import paired_iou
from cloc_mllm.geometry import elementwise_iou
from scoring import lmms_eval_module

NUM_CASES = 10_000
# rows hold boxes in 0..1; answers that are only read may be in pixels
coordinate = st.one_of(
    st.floats(0, 1, width=32),
    st.floats(0, 4096, width=32),
    st.sampled_from([0.0, 0.5, 1.0, 1e-9, 1 - 2**-53]),
)
box = st.tuples(*[coordinate] * 4)


def exact_iou(a, b):
    """In rational numbers; None for a box without area."""
    a, b = [Fraction(x) for x in a], [Fraction(x) for x in b]
    if any(c[2] <= c[0] or c[3] <= c[1] for c in (a, b)):
        return None
    width = max(Fraction(0), min(a[2], b[2]) - max(a[0], b[0]))
    height = max(Fraction(0), min(a[3], b[3]) - max(a[1], b[1]))
    areas = sum((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b))
    return width * height / (areas - width * height)


def random_and_adversarial() -> tuple[np.ndarray, np.ndarray]:
    """Pairs with an area: random, pixels, equal, touching, contained, thin, nearly equal."""
    rng = np.random.default_rng(0)
    part = NUM_CASES // 8

    def boxes(count, scale=1.0):
        return np.sort(rng.random((count, 2, 2)), axis=1).reshape(-1, 4) * scale

    a = [boxes(part), boxes(part, 640), boxes(part), boxes(part), boxes(part), boxes(part)]
    right = a[3] + np.array([1, 0, 1, 0]) * (a[3][:, 2:3] - a[3][:, :1])
    middle = a[4] * 0.5 + 0.5 * np.tile((a[4][:, :2] + a[4][:, 2:]) / 2, 2)
    b = [boxes(part), boxes(part, 640), a[2], right, middle, np.nextafter(a[5], 2)]
    thin, whole = boxes(part), np.floor(boxes(part, 1000))
    thin[:, 2] = thin[:, 0] + 1e-6
    whole[:, 2:] += 1
    return np.concatenate([*a, thin, whole]), np.concatenate([*b, boxes(part), whole[::-1]])


@given(box, box)
@settings(max_examples=2000)
def test_equals_exact_arithmetic(a, b):
    actual = paired_iou(np.array([a]), np.array([b]))[0]
    expected = exact_iou(a, b)
    assert 0 <= actual <= 1
    assert actual == pytest.approx(0 if expected is None else float(expected), abs=1e-12)


def test_equals_torchvision_and_geometry():
    a, b = random_and_adversarial()
    actual = paired_iou(a, b)
    chunks = zip(torch.from_numpy(a).split(500), torch.from_numpy(b).split(500), strict=True)
    expected = torch.cat([torchvision_box_iou(x, y).diagonal() for x, y in chunks])
    assert len(actual) == NUM_CASES and 0.2 < actual.mean() < 0.8
    np.testing.assert_array_equal(actual, expected.numpy())
    ours = elementwise_iou(torch.from_numpy(a), torch.from_numpy(b))
    np.testing.assert_array_equal(actual, ours.numpy())


def test_equals_pycocotools():
    mask_utils = pytest.importorskip("pycocotools.mask")
    a, b = random_and_adversarial()
    as_xywh = [np.hstack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]]) for boxes in (a, b)]
    expected = [mask_utils.iou(x[None], y[None], [0])[0, 0] for x, y in zip(*as_xywh, strict=True)]
    # it is given widths, so right edges differ in the last digit; thin boxes feel that most
    np.testing.assert_allclose(paired_iou(a, b), expected, atol=1e-9)


def test_equals_lmms_eval():
    peer = lmms_eval_module()
    if peer is None:
        pytest.skip("lmms-eval is not installed (pip install --no-deps lmms-eval)")
    a, b = random_and_adversarial()
    expected = [peer.compute_iou(x, y) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    np.testing.assert_array_equal(paired_iou(a, b), expected)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((0, 0, 0, 0), (0, 0, 0, 0)),
        ((0.2, 0.2, 0.2, 0.8), (0.2, 0.2, 0.2, 0.8)),
        ((0.8, 0.8, 0.2, 0.2), (0.2, 0.2, 0.8, 0.8)),
        ((0.8, 0.2, 0.2, 0.8), (0.2, 0.2, 0.8, 0.8)),
    ],
    ids=["two points", "two lines", "inverted", "inverted in x"],
)
def test_boxes_that_make_others_raise_overlap_nothing(a, b):
    assert paired_iou(np.array([a], dtype=float), np.array([b], dtype=float)) == [0]
