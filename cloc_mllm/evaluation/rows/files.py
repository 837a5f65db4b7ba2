"""Rows in files: JSON lines, a JSON array, CSV or TSV in, JSON lines out.

A wrong file is refused with the row that is wrong, before any number is computed. Rows that other
tools wrote name their columns as they like (`columns`). Where rows of one task are read, what a row
leaves out is filled in if only one value is possible: the `task`, and a prediction's `image_id`,
which is that of the reference with its id.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

from cloc_mllm.data.drop_log import shown
from cloc_mllm.data.texts import lines_of, read_text
from cloc_mllm.data.texts import read_rows as read_csv_rows
from cloc_mllm.evaluation.answers.frames import Coordinates
from cloc_mllm.evaluation.rows.fields import column, field_value
from cloc_mllm.evaluation.rows.rows import PredictionRow, ReferenceRow

Row = TypeVar("Row", PredictionRow, ReferenceRow)
Table = list[tuple[str, dict[str, Any]]]  # where each row stands, for messages, and its values

_EDGE = 0.01  # of a side: by so much, by rounding, boxes of data sets pass the edge of their image
_ANSWERS = ["boxes", "failure", "labels", "raw_text"]


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
    """All references of a file, or those of one task; see `read_table`.

    Raises:
        ValueError: a wrong row, named by file and number.
    """
    return references_of(read_table(path), task)


def read_predictions(
    path: str | Path, task: str | None = None, references: Sequence[ReferenceRow] = ()
) -> list[PredictionRow]:
    """The predictions likewise; of one task, the least a row needs is an `id` and an answer.

    Raises:
        ValueError: a wrong row, named by file and number.
    """
    return predictions_of(read_table(path), task, references)


def references_of(
    table: Table,
    task: str | None = None,
    columns: Mapping[str, str] | None = None,
    coordinates: Coordinates | None = None,
) -> list[ReferenceRow]:
    """The references of a table, or those of one task.

    Args:
        columns: where a field is called otherwise than here: field -> column.
        coordinates: what the numbers of the boxes mean; None is fractions of the original image.

    Raises:
        ValueError: a wrong row, named by file and number.
    """
    columns = columns or {}
    rows = []
    for where, row in _of_task(table, task, columns):
        values = _values(row, where, ReferenceRow, columns, is_own=task is None)
        if coordinates is not None and "boxes" in values:
            values["boxes"] = [
                _fractions(coordinates, box, values, where) for box in values["boxes"]
            ]
        rows.append(_row(ReferenceRow, values, where, task))
    return rows


def predictions_of(
    table: Table,
    task: str | None = None,
    references: Sequence[ReferenceRow] = (),
    columns: Mapping[str, str] | None = None,
) -> list[PredictionRow]:
    """The predictions of a table likewise."""
    columns = columns or {}
    image_ids = {row.id: row.image_id for row in references}
    rows = []
    for where, row in _of_task(table, task, columns):
        values = _values(row, where, PredictionRow, columns, is_own=task is None)
        if task is not None:
            values.setdefault("image_id", image_ids.get(values.get("id", ""), ""))
            if not values.keys() & set(_ANSWERS):
                raise ValueError(
                    f"{where}: expected an object with id and any of {_ANSWERS}, got "
                    f"{_names(row)}; name the column of the answer: --columns raw_text=COLUMN"
                )
        rows.append(_row(PredictionRow, values, where, task))
    return rows


def _of_task(
    table: Table, task: str | None, columns: Mapping[str, str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows that say this task or none; None is all."""
    for where, row in table:
        stated = row.get(columns.get("task", "task"))
        if task is None or stated in (None, "", task):
            yield where, row


def _values(
    row: Mapping[str, Any],
    where: str,
    row_type: type[Row],
    columns: Mapping[str, str],
    *,
    is_own: bool,
) -> dict[str, Any]:
    """The fields that a row states, as `row_type` takes them.

    Args:
        is_own: written by `write_rows`; other columns are refused, and ids stay as they are.
    """
    names = [item.name for item in fields(row_type)]
    if is_own and not row.keys() <= set(names):
        raise ValueError(_expected(row, where, row_type))
    values = {}
    taken = {columns[name] for name in names if name in columns}
    others = {name: value for name, value in row.items() if name not in taken}
    for name in names:
        try:
            value = column(row, columns[name]) if name in columns else others.get(name)
            is_id = is_own and name in ("id", "image_id") and isinstance(value, str)
            found = value if is_id else field_value(name, value)
        except KeyError:
            raise ValueError(
                f"{where}: no column {columns[name]!r} for {name}; there are {_names(row)}"
            ) from None
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if found is not None:
            values[name] = found
        elif name == "raw_text" and (name in columns or name in others):
            values[name] = ""  # null is an empty answer
    return values


def _row(row_type: type[Row], values: dict[str, Any], where: str, task: str | None) -> Row:
    if task is not None:
        values.setdefault("task", task)
    if not {"id", "image_id", "task"} <= values.keys():
        raise ValueError(_expected(values, where, row_type))
    try:
        return row_type(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _expected(row: Mapping[str, Any], where: str, row_type: type) -> str:
    missing = [name for name in ("id", "image_id", "task") if name not in row]
    option = "--columns" if row_type is PredictionRow else "--reference_columns"
    advice = f"; name the column: {option} {missing[0]}=COLUMN" if missing else ""
    return (
        f"{where}: expected an object with id, image_id, task and any of "
        f"{sorted(item.name for item in fields(row_type))}, got {_names(row)}{advice}"
    )


def _names(row: Mapping[str, Any]) -> str:
    return shown(sorted(map(str, row)))


def _fractions(
    coordinates: Coordinates, box: Sequence[float], values: Mapping[str, Any], where: str
) -> list[float]:
    """A reference's box in fractions, cut where it passes the edge by rounding."""
    size = (float(values.get("width", 0)), float(values.get("height", 0)))
    if coordinates.needs_size and not min(size) > 0:
        raise ValueError(f"{where}: boxes in {coordinates.kind} need a width and a height")
    found = coordinates.fractions(box, size)
    if not all(-_EDGE <= value <= 1 + _EDGE for value in found):
        raise ValueError(f"{where}: expected a box within its image, got {list(box)}")
    return [min(max(value, 0.0), 1.0) for value in found]


def read_table(path: str | Path, encoding: str = "") -> Table:
    """The rows of a file: `.csv` and `.tsv` with a header, a JSON array, or JSON lines.

    The array may stand in an object, such as the log of a harness, that has no other one of rows.

    Args:
        encoding: of a file without a byte order mark; "" is UTF-8.

    Raises:
        ValueError: no such rows, or another encoding; names file and line.
    """
    if Path(path).suffix.lower() in (".csv", ".tsv"):
        return list(_csv_rows(path, encoding))
    text = read_text(path, encoding)
    array = _json_array(path, text)
    return list(_json_lines(path, text)) if array is None else array


def json_lines(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the place of each line, for messages, and its object; skips empty lines."""
    yield from _json_lines(path, read_text(path))


def _json_lines(path: str | Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(lines_of(text), start=1):
        if line.strip():
            where = f"{path} line {number}"
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{where}: expected one JSON object per line, got {line[:60]!r}"
                ) from error
            yield where, _object(value, where)


def _json_array(path: str | Path, text: str) -> Table | None:
    """The rows of a JSON array; None for JSON lines, whatever the file is called."""
    is_json = Path(path).suffix.lower() == ".json"
    if not is_json and not text.lstrip().startswith("[{"):
        return None
    expected = "a JSON array of rows (or one object per line)"
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        if not is_json or "Extra data" in str(error):
            return None
        raise ValueError(f"{path}: expected {expected}: {error}") from error
    if isinstance(rows, dict):
        found = [value for value in rows.values() if _is_table(value)]
        if len(found) != 1:
            raise ValueError(
                f"{path}: expected {expected}, or one in an object, got {_names(rows)}"
            )
        (rows,) = found
    if not isinstance(rows, list):
        raise ValueError(f"{path}: expected {expected}, got {type(rows).__name__}")
    places = (f"{path} row {number}" for number in range(1, len(rows) + 1))
    return [(where, _object(row, where)) for where, row in zip(places, rows, strict=True)]


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _csv_rows(path: str | Path, encoding: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for place, cells in read_csv_rows(path, encoding):
        if None in cells or None in cells.values():
            names = ", ".join(name for name in cells if name is not None)
            raise ValueError(f"{path} {place}: expected one cell for each of {shown(names)}")
        yield f"{path} {place}", cells


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object, got {shown(value)!r}")
    return value
