"""Rows in files: JSON lines, a JSON array or CSV in, JSON lines out.

A wrong file is refused with the row that is wrong, before any number is computed. Where rows of one
task are read, what a row leaves out is filled in if only one value is possible: the `task`, and a
prediction's `image_id`, which is that of the reference with its id.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

from cloc_mllm.evaluation.rows.rows import PredictionRow, ReferenceRow

# cells of a CSV file that are texts; all others hold JSON: [[0.1, 0.2, 0.3, 0.4]]
_TEXT_CELLS = {
    "id", "image_id", "task", "prompt", "raw_text", "box_frame", "failure", "model", "kind",
}  # fmt: skip

Row = TypeVar("Row", PredictionRow, ReferenceRow)


def write_rows(
    rows: Iterable[PredictionRow] | Iterable[ReferenceRow],
    path: str | Path,
    *,
    append: bool = False,
) -> int:
    """Writes one JSON object per line, each handed to the system as soon as it is made; returns
    how many.

    Args:
        append: goes on after what is there, instead of writing over it.
    """
    count = 0
    with open(path, "a" if append else "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(asdict(row), ensure_ascii=False, allow_nan=False) + "\n")
            file.flush()
            count += 1
    return count


def read_references(path: str | Path, task: str | None = None) -> list[ReferenceRow]:
    """All references of a file, or those of one task; `.csv` and `.json` by suffix, else lines.

    Raises:
        ValueError: a wrong row, named by file and number.
    """
    return _read(path, ReferenceRow, task, None)


def read_predictions(
    path: str | Path, task: str | None = None, references: Sequence[ReferenceRow] = ()
) -> list[PredictionRow]:
    """The predictions likewise; of one task, the least a row needs is an `id`.

    Raises:
        ValueError: a wrong row, named by file and number.
    """
    return _read(path, PredictionRow, task, {row.id: row.image_id for row in references})


def _read(
    path: str | Path, row_type: type[Row], task: str | None, image_ids: Mapping[str, str] | None
) -> list[Row]:
    rows = []
    for where, values in _row_values(Path(path)):
        # numbers are accepted as ids: 7 in one file and "7" in the other are the same
        for name in {"id", "image_id"} & values.keys():
            values[name] = str(values[name])
        if task is not None:
            values.setdefault("task", task)
            if image_ids is not None:
                values.setdefault("image_id", image_ids.get(values.get("id", ""), ""))
        if task in (None, values.get("task")):
            rows.append(_row_from(values, where, row_type))
    return rows


def _row_from(values: Mapping[str, Any], where: str, row_type: type[Row]) -> Row:
    known = {item.name for item in fields(row_type)}
    if not {"id", "image_id", "task"} <= values.keys() <= known:
        raise ValueError(
            f"{where}: expected an object with id, image_id, task and any of {sorted(known)}, "
            f"got {sorted(values)}"
        )
    try:
        return row_type(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _row_values(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if path.suffix == ".csv":
        yield from _csv_rows(path)
    elif path.suffix == ".json":
        yield from _json_array(path)
    else:
        yield from json_lines(path)


def json_lines(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each line stands, for messages, and its object; empty lines are skipped."""
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{path} line {number}"
                yield where, _object(_json(line, where, "one JSON object per line"), where)


def _json_array(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    expected = "a JSON array of rows (for one object per line, name the file .jsonl)"
    rows = _json(path.read_text(encoding="utf-8"), str(path), expected)
    if not isinstance(rows, list):
        raise ValueError(f"{path}: expected {expected}, got {type(rows).__name__}")
    for number, values in enumerate(rows, start=1):
        yield f"{path} row {number}", _object(values, f"{path} row {number}")


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
    return text if name in _TEXT_CELLS else _json(text, where, f"JSON in the column {name}")


def _json(text: str, where: str, expected: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: expected {expected}, got {text[:60]!r}") from error


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object, got {str(value)[:60]!r}")
    return value
