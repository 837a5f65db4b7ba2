import numpy as np
import pytest

from scoring import lmms_eval_module, lmms_eval_side, our_side, random_results


def test_both_sides_give_the_same_numbers():
    peer = lmms_eval_module()
    if peer is None:
        pytest.skip("lmms-eval is not installed (pip install --no-deps lmms-eval)")
    results = random_results(500)
    ours, theirs = our_side(results)(), lmms_eval_side(results, peer)()
    assert ours == theirs and 0.3 < ours["ACC@0.5"] < 0.7


def test_random_rows_hold_failures_and_boxes():
    rows = random_results(400)
    failed = np.array([not any(row["pred"]) for row in rows])
    assert 0.05 < failed.mean() < 0.2 and rows == random_results(400)
