"""Rows of others from JSONL, a JSON array or CSV, as predictions and references (contract C8).

What a row leaves out is filled in where only one value is possible: `task` is the one that is
scored, a prediction's `image_id` that of the reference with its id.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cloc_mllm.evaluation.rows.rows import PredictionRow, ReferenceRow, row_from

# cells of a CSV file that are texts; all others hold JSON: [[0.1, 0.2, 0.3, 0.4]]
_TEXT_CELLS = {
    "id", "image_id", "task", "prompt", "raw_text", "box_frame", "failure", "model", "kind",
}  # fmt: skip


def read_reference_file(path: str | Path, task: str) -> list[ReferenceRow]:
    """The references of `task`; `.csv` and `.json` (an array) by suffix, else JSON lines.

    Raises:
        ValueError: a wrong row, named by file and number.
    """
    rows = []
    for where, values in _row_values(Path(path)):
        values = {"task": task, **values}
        if values["task"] == task:
            rows.append(row_from(_with_text_ids(values), where, ReferenceRow))
    return rows


def read_prediction_file(
    path: str | Path, task: str, references: Sequence[ReferenceRow]
) -> list[PredictionRow]:
    """The predictions of `task`, from the same kinds of file; the least a row needs is an `id`.

    Raises:
        ValueError: a wrong row, named by file and number.
    """
    image_ids = {row.id: row.image_id for row in references}
    rows = []
    for where, values in _row_values(Path(path)):
        values = _with_text_ids({"task": task, **values})
        values.setdefault("image_id", image_ids.get(values.get("id", ""), ""))
        if values["task"] == task:
            rows.append(row_from(values, where, PredictionRow))
    return rows


def _with_text_ids(values: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers are accepted as ids: 7 in one file and "7" in the other are the same."""
    return {
        key: str(value) if key in ("id", "image_id") and isinstance(value, int) else value
        for key, value in values.items()
    }


def _row_values(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each row stands, for messages, and its values by name."""
    if path.suffix == ".csv":
        yield from _csv_rows(path)
        return
    for where, values in _json_array(path) if path.suffix == ".json" else _json_lines(path):
        if not isinstance(values, dict):
            raise ValueError(f"{where}: expected an object, got {str(values)[:60]!r}")
        yield where, values


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{path} line {number}"
                yield where, _json(line, where, "one JSON object a line")


def _json_array(path: Path) -> Iterator[tuple[str, Any]]:
    expected = "a JSON array of rows (for one object a line, name the file .jsonl)"
    rows = _json(path.read_text(encoding="utf-8"), str(path), expected)
    if not isinstance(rows, list):
        raise ValueError(f"{path}: expected {expected}, got {type(rows).__name__}")
    for number, values in enumerate(rows, start=1):
        yield f"{path} row {number}", values


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        for cells in reader:
            where = f"{path} line {reader.line_num}"
            if None in cells or None in cells.values():
                names = ", ".join(reader.fieldnames or [])
                raise ValueError(f"{where}: expected one cell for each of {names}")
            yield where, {name: _cell(name, text, where) for name, text in cells.items() if text}


def _cell(name: str, text: str, where: str) -> Any:
    if name in _TEXT_CELLS:
        return text
    return _json(text, where, f"JSON in the column {name}")


def _json(text: str, where: str, expected: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: expected {expected}, got {text[:60]!r}") from error
