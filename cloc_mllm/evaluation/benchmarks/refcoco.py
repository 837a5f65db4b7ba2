"""RefCOCO, RefCOCO+ and RefCOCOg: one box an expression, on a declared split.

Counts: Kazemzadeh et al. 2014, Yu et al. 2016 (UNC splits), Mao et al. 2016 (UMD splits).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cloc_mllm.data.conversations import PROMPTS
from cloc_mllm.data.drop_log import DropLog
from cloc_mllm.data.readers.refcoco import photo_of, read_refcoco
from cloc_mllm.data.readers.texts import read_json
from cloc_mllm.evaluation.benchmarks.questions import Question, QuestionSet
from cloc_mllm.evaluation.queries import build_benchmark

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


def refcoco_questions(split: str, rows: str | Path, images: str | Path) -> QuestionSet:
    """One `rec` question an expression.

    Args:
        split: a name of `NUM_EXPRESSIONS`.
        rows: the split's JSON file, see `data.readers.refcoco`.
        images: folder, tar or zip of the COCO train2014 photos.

    Raises:
        ValueError: an unknown split, or a file that has another number of expressions.
    """
    if split not in NUM_EXPRESSIONS:
        raise ValueError(f"unknown split {split!r}; expected one of {', '.join(NUM_EXPRESSIONS)}")
    table = read_json(rows)
    found, expected = len(table) if isinstance(table, list) else 0, NUM_EXPRESSIONS[split]
    if found != expected:
        same = [name for name, count in NUM_EXPRESSIONS.items() if count == found]
        hint = f" (that is {same[0]})" if same else ""
        raise ValueError(
            f"{split} has {expected:,} expressions, but {rows} holds {found:,}{hint}; "
            "pass the split's own file, whole"
        )
    drop_log = DropLog()
    records = list(read_refcoco(rows, images, drop_log=drop_log))
    bench = build_benchmark(records, ["rec"])
    size_of = {photo_of(str(row["img_id"])): row for row in table if _has_size(row)}
    references = [
        replace(row, width=size["width"], height=size["height"])
        if (size := size_of.get(row.image_id))
        else row
        for row in bench.references
    ]
    questions = [
        Question(
            query.id,
            query.image_id,
            "rec",
            PROMPTS["ground"].format(phrase=query.text),
            expects="box",
        )
        for query in bench.queries
    ]
    left_out = drop_log.counts.get("expression", {})
    return QuestionSet(
        split, records, questions, references, expected, left_out, unit="expressions"
    )


def _has_size(row: object) -> bool:
    """The annotated photo's own size, which the file that was found may have lost."""
    return isinstance(row, dict) and all(
        isinstance(row.get(key), int) for key in ("width", "height")
    )
