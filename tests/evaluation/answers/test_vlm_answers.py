"""Real answers: our IoU agrees with the stored decisions, our parser loses none of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.evaluation.answers.vlm_answers import FILES, differences, load

pytestmark = pytest.mark.skipif(not FILES, reason="no real answers: ../shared/data is absent")
REASONS = {
    "cut at the image's edge",
    "theirs rounds to thousandths",
    "theirs takes the last box",
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_our_iou_decides_each_extracted_box_as_stored(path: Path) -> None:
    accuracy, rows = load(path)
    decided = [row.iou_of_extracted() > 0.5 for row in rows]
    assert decided == [row.stored for row in rows] and len(rows) == 500
    assert 100 * sum(decided) / len(decided) == pytest.approx(accuracy)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_reading_the_raw_answers_reaches_the_stored_accuracy(path: Path) -> None:
    accuracy, rows = load(path)
    assert sum(row.right(lenient=True) for row in rows) >= sum(row.stored for row in rows)
    if accuracy == 0:
        assert {row.reason() for row in rows} == {"theirs holds thousandths against pixels"}


def test_every_row_decided_otherwise_has_a_reason() -> None:
    found = list(differences())
    for name, row, right, reason in found:
        print(name, row.index, "stored", row.stored, "ours", right, reason)
    assert {reason for _, _, _, reason in found} == REASONS
    assert len(found) == 8
