"""Records as local rows of lmms-eval's REC task, and the task's file beside them.

python -m tests.evaluation.predictors.lmms_eval_rows --limit 40 --output_dir runs/lmms
lmms-eval eval --model cloc_mllm --tasks cloc_rec_local --include_path runs/lmms --batch_size 32
"""

from __future__ import annotations

import argparse
import importlib.util
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets

from cloc_mllm.data.records import Record
from cloc_mllm.evaluation.queries import QuerySet
from cloc_mllm.evaluation.record_index import records_to_score
from cloc_mllm.evaluation.tasks import EvalData
from cloc_mllm.evaluation.tasks.rec import Rec

TASK = "cloc_rec_local"
_TEMPLATE = "tasks/refcoco/_default_template_bbox_rec_yaml"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="", help="records; built-in test scenes if left out")
    parser.add_argument("--limit", type=int, default=40, help="records; 0 is all")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/lmms"))
    arguments = parser.parse_args(argv)
    harness = importlib.util.find_spec("lmms_eval")
    if harness is None or harness.origin is None:
        raise ValueError("lmms_eval is not installed here; its REC task is what the rows are for")
    written, left_out = write_rec_task(
        records_to_score(arguments.data, arguments.limit),
        arguments.output_dir,
        Path(harness.origin).parent / _TEMPLATE,
    )
    print(
        f"{written} rows in {arguments.output_dir}; {left_out} left out, which have several boxes"
    )
    return 0


def write_rec_task(records: Sequence[Record], out: Path, template: Path) -> tuple[int, int]:
    """Write `rows/test.parquet` and the task's YAML, which includes the harness's own `template`.

    Returns:
        how many expressions were written, and how many left out because they name several boxes.
    """
    by_id = {record.id: record for record in records}
    (asked,) = Rec().query_sets(EvalData(lambda: records))
    columns = datasets.Features(
        {
            "question_id": datasets.Value("string"),
            "image": datasets.Image(),
            "answer": datasets.Sequence(datasets.Value("string")),
            "bbox": datasets.Sequence(datasets.Value("float64")),
        }
    )
    rows = list(_rows(by_id, asked))
    (out / "rows").mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows, columns).to_parquet(out / "rows" / "test.parquet")
    (out / f"{TASK}.yaml").write_text(
        f"task: {TASK}\ninclude: {template}\n"
        f"dataset_path: {(out / 'rows').resolve()}\ntest_split: test\n"
    )
    return len(rows), len(asked.queries) - len(rows)


def _rows(records: dict[str, Record], asked: QuerySet) -> Iterator[dict[str, Any]]:
    for query, reference in zip(asked.queries, asked.references, strict=True):
        if len(reference.boxes) > 1:
            continue
        record = records[query.image_id]
        x1, y1, x2, y2 = reference.boxes[0]
        width, height = record.width, record.height
        yield {
            "question_id": query.id,
            # not the record's JPEG: the harness's task would compress that once more
            "image": {"bytes": _as_png(record), "path": None},
            "answer": [query.text],
            "bbox": [x1 * width, y1 * height, (x2 - x1) * width, (y2 - y1) * height],
        }


def _as_png(record: Record) -> bytes:
    buffer = io.BytesIO()
    record.load_image().save(buffer, "PNG")
    return buffer.getvalue()


if __name__ == "__main__":
    main()
