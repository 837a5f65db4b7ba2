"""RefCOCO, RefCOCO+ and RefCOCOg on a declared split: one query per expression, one true box. Rows
and scores are those of the task `rec`. Counts: Kazemzadeh et al. 2014, Yu et al. 2016 (UNC splits),
Mao et al. 2016 (UMD splits)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cloc_mllm.evaluation.queries import Coverage, QuerySet
from cloc_mllm.evaluation.tasks import EvalData, Task, rec

SCORERS = rec.SCORERS
NUM_EXPRESSIONS = {
    "refcoco_val": 10_834,
    "refcoco_testA": 5_657,
    "refcoco_testB": 5_095,
    "refcoco+_val": 10_758,
    "refcoco+_testA": 5_726,
    "refcoco+_testB": 4_889,
    "refcocog_val": 4_896,
    "refcocog_test": 9_602,
}


@dataclass
class RefCoco(Task):
    """RefCOCO, RefCOCO+, RefCOCOg: one box per expression.

    Args:
        split: refcoco_val, refcoco_testA, refcoco_testB, refcoco+_val, refcoco+_testA,
            refcoco+_testB, refcocog_val or refcocog_test.
        questions: the split's JSON rows, whole.
        images: folder, tar or zip of the COCO train2014 photos.
    """

    split: str
    questions: Path
    images: Path

    reads_records = False

    def query_sets(self, data: EvalData) -> list[QuerySet]:
        """
        Raises:
            ValueError: an unknown split, or a file that has another number of expressions.
        """
        from cloc_mllm.data.drop_log import DropLog
        from cloc_mllm.data.readers.refcoco import read_refcoco
        from cloc_mllm.evaluation.record_index import RecordIndex

        sizes = _photo_sizes(self._checked_rows())
        drop_log = DropLog()
        records = list(read_refcoco(self.questions, self.images, drop_log=drop_log))
        index = RecordIndex(records)
        coverage = Coverage(
            self.split,
            NUM_EXPRESSIONS[self.split],
            drop_log.counts.get("expression", {}),
            unit="expressions",
        )
        asked = index.query_set(rec.TASK, "box", "mllm", rec.rec_pairs(index), coverage=coverage)
        pairs = []
        for query, row in asked.pairs:
            width, height = sizes.get(row.image_id, (row.width, row.height))
            pairs.append((query, replace(row, width=width, height=height)))
        return [replace(asked, pairs=pairs)]

    def _checked_rows(self) -> list[Any]:
        from cloc_mllm.data.texts import read_json

        if self.split not in NUM_EXPRESSIONS:
            raise ValueError(
                f"unknown split {self.split!r}; expected one of {', '.join(NUM_EXPRESSIONS)}"
            )
        rows = read_json(self.questions)
        found, expected = len(rows) if isinstance(rows, list) else 0, NUM_EXPRESSIONS[self.split]
        if found != expected:
            same = [name for name, count in NUM_EXPRESSIONS.items() if count == found]
            hint = f" (that is {same[0]})" if same else ""
            raise ValueError(
                f"{self.split} has {expected:,} expressions, but {self.questions} holds "
                f"{found:,}{hint}; pass the split's own file, whole"
            )
        return rows


def _photo_sizes(rows: Sequence[Any]) -> dict[str, tuple[int, int]]:
    """Image id -> width and height of the annotated photo, which the file found may have lost."""
    from cloc_mllm.data.readers.refcoco import photo_of

    sides = ("width", "height")
    return {
        photo_of(str(row["img_id"])): (row["width"], row["height"])
        for row in rows
        if isinstance(row, dict) and all(isinstance(row.get(side), int) for side in sides)
    }
