"""POPE (Li et al. 2023): questions files of the three splits -> yes / no questions.

A row is `{"question_id": 1, "image": "COCO_val2014_000000310196.jpg", "text": "Is there a
snowboard in the image?", "label": "yes"}`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cloc_mllm.data.drop_log import DropLog
from cloc_mllm.evaluation.benchmarks.questions import (
    Question,
    QuestionSet,
    count_left_out,
    photo_faults,
    photo_records,
    read_json_rows,
)
from cloc_mllm.evaluation.predictions import ReferenceRow

TASK = "pope"
SPLITS = ("random", "popular", "adversarial")


def pope_questions(
    files: Sequence[str | Path], images: str | Path, *, suffix: str = ""
) -> QuestionSet:
    """The questions of one to three files.

    Args:
        files: the split is told by its name in the file name (`coco_pope_adversarial.json`).
        images: folder, tar or zip of the photos.
        suffix: appended to each question, for instance " Answer yes or no.".

    Raises:
        ValueError: a file name without a split or with another's, a row without the four keys, a
            label that is neither yes nor no, or one id twice.
    """
    rows = []
    for path in files:
        split = _split_of(path)
        for number, row in read_json_rows(path, "question_id", "image", "text", "label"):
            if row["label"] not in ("yes", "no"):
                raise ValueError(
                    f"{path} line {number}: expected the label yes or no, got {row['label']!r}"
                )
            rows.append((f"{TASK}/{split}/{row['question_id']}", split, row))
    if len({row_id for row_id, _, _ in rows}) < len(rows):
        raise ValueError(f"a question_id stands twice in one split of {', '.join(map(str, files))}")
    drop_log = DropLog()
    names = [str(row["image"]) for _, _, row in rows]
    records = photo_records(names, images, drop_log, source=TASK)
    asked = [item for item in rows if str(item[2]["image"]) in records]
    return QuestionSet(
        "POPE " + ", ".join(dict.fromkeys(split for _, split, _ in rows)),
        list(records.values()),
        [
            Question(row_id, str(row["image"]), TASK, f"{row['text']}{suffix}")
            for row_id, _, row in asked
        ],
        [
            ReferenceRow(
                row_id,
                str(row["image"]),
                TASK,
                labels=[row["label"]],
                choices=["yes", "no"],
                kind=split,
            )
            for row_id, split, row in asked
        ],
        len(rows),
        count_left_out(names, photo_faults(drop_log)),
    )


def _split_of(path: str | Path) -> str:
    found = [split for split in SPLITS if split in Path(path).name]
    if len(found) != 1:
        raise ValueError(
            f"{path}: expected the split ({', '.join(SPLITS)}) in the file's name; rename it"
        )
    return found[0]
