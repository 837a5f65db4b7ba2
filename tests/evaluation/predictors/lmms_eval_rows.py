"""Records as local rows of lmms-eval's REC task, and of a task with no, one or two images.

python -m tests.evaluation.predictors.lmms_eval_rows --limit 40 --output_dir runs/lmms
lmms-eval eval --model cloc_mllm --tasks cloc_rec_local,cloc_mixed_local --include_path runs/lmms \
  --batch_size 32
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets

from cloc_mllm.data.english import with_article
from cloc_mllm.data.records import Record
from cloc_mllm.evaluation.queries import QuerySet
from cloc_mllm.evaluation.record_index import records_to_score
from cloc_mllm.evaluation.tasks import EvalData
from cloc_mllm.evaluation.tasks.rec import Rec

TASK = "cloc_rec_local"
_TEMPLATE = "tasks/refcoco/_default_template_bbox_rec_yaml"
MIXED_TASK = "cloc_mixed_local"
_MIXED_YAML = """\
task: {task}
dataset_path: {rows}
test_split: test
output_type: generate_until
doc_to_visual: !function mixed.doc_to_visual
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{max_new_tokens: 16}}
process_results: !function mixed.process_results
metric_list:
  - {{metric: exact, aggregation: mean, higher_is_better: true}}
"""
_MIXED_PY = """\
def doc_to_visual(doc):
    return [image.convert("RGB") for image in doc["images"]]


def process_results(doc, results):
    return {"exact": float(results[0].strip() == doc["answer"])} if doc["answer"] else {}
"""


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
    records = records_to_score(arguments.data, arguments.limit)
    print(f"{write_mixed_task(records, arguments.output_dir)} rows with no, one or two images")
    return 0


def write_mixed_task(records: Sequence[Record], out: Path) -> int:
    """Writes a task that asks about each record whether something is there, then about two records
    and about none. Questions without a right answer have the answer "" and are not scored.

    Returns:
        the number of rows.
    """
    columns = datasets.Features(
        {
            "images": datasets.Sequence(datasets.Image()),
            "question": datasets.Value("string"),
            "answer": datasets.Value("string"),
        }
    )
    rows = []
    for record, other in itertools.pairwise(records):
        images = [{"bytes": _as_png(of), "path": None} for of in (record, other)]
        here = {region.phrase for region in record.regions}
        for thing in sorted({region.phrase for of in (record, other) for region in of.regions})[:4]:
            question = f"Is there {with_article(thing)} in the image?"
            rows.append((images[:1], question, "yes" if thing in here else "no"))
        rows.append((images, "What do <image> and <image> show?", ""))
        rows.append(([], "Describe a beach.", ""))
    (out / "mixed").mkdir(parents=True, exist_ok=True)
    table = [dict(zip(columns, row, strict=True)) for row in rows]
    datasets.Dataset.from_list(table, columns).to_parquet(out / "mixed" / "test.parquet")
    (out / "mixed.py").write_text(_MIXED_PY)
    yaml = _MIXED_YAML.format(task=MIXED_TASK, rows=(out / "mixed").resolve())
    (out / f"{MIXED_TASK}.yaml").write_text(yaml)
    return len(rows)


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
