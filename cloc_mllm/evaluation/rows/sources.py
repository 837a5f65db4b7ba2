"""Predictions and references of any tool, in one file or in two."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from cloc_mllm.evaluation.answers.formats import answer_format
from cloc_mllm.evaluation.answers.frames import Coordinates
from cloc_mllm.evaluation.rows.fields import column
from cloc_mllm.evaluation.rows.files import Table, predictions_of, read_table, references_of
from cloc_mllm.evaluation.rows.rows import PredictionRow, ReferenceRow

_OF_PREDICTIONS = [item.name for item in fields(PredictionRow)]
_OF_REFERENCES = [item.name for item in fields(ReferenceRow)]
_TRUTH = ("boxes", "labels")  # fields that both kinds of rows have, with another meaning


@dataclass(frozen=True)
class RowReading:
    """How files of rows are read.

    Args:
        columns: where fields of `PredictionRow` and `ReferenceRow` are called otherwise: field ->
            column, which may lie inside another (`doc.bbox`). References have such a column, too,
            or call the field by its own name; their `boxes` and `labels` are theirs alone. In one
            file `boxes` and `labels` are the truth, unless `reference_columns` says where it is.
        reference_columns: likewise, of references alone.
        reference_format: what the numbers of the references' boxes mean: a name of `FORMATS` or a
            definition of one's own, of which only `coordinates` counts; "" is fractions.
        encoding: of files without a byte order mark; "" is UTF-8.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    reference_columns: Mapping[str, str] = field(default_factory=dict)
    reference_format: str = ""
    encoding: str = ""

    def __post_init__(self) -> None:
        known = {
            "columns": {*_OF_PREDICTIONS, *_OF_REFERENCES},
            "reference_columns": _OF_REFERENCES,
        }
        for option, names in known.items():
            if unknown := sorted(getattr(self, option).keys() - set(names)):
                raise ValueError(f"{option}: expected some of {sorted(names)}, got {unknown}")

    @property
    def coordinates(self) -> Coordinates | None:
        """What the numbers of the references' boxes mean; None is fractions."""
        return answer_format(self.reference_format).coordinates if self.reference_format else None


@dataclass(frozen=True)
class Rows:
    """What is scored.

    Args:
        unused_columns: of the files, by path: what no field was taken from.
    """

    predictions: Sequence[PredictionRow]
    references: Sequence[ReferenceRow]
    unused_columns: dict[str, list[str]] = field(default_factory=dict)


def read_sources(
    task: str,
    predictions: str | Path,
    references: str | Path = "",
    reading: RowReading | None = None,
) -> Rows:
    """The rows of one task.

    Args:
        references: "" if they are in the rows of the predictions. Such rows are numbered if they
            have no id.

    Raises:
        ValueError: a wrong row or file; names it.
    """
    reading = reading or RowReading()
    answers = read_table(predictions, reading.encoding)
    own = reading.columns
    shared = {name: path for name, path in own.items() if name in _OF_REFERENCES}
    in_one_file = not references or Path(references) == Path(predictions)
    if in_one_file:
        answers = truth = _numbered(answers, reading)
        hidden = [name for name in _TRUTH if name not in reading.reference_columns]
        answers = [(at, _without(row, hidden)) for at, row in answers]
        own = _without(own, hidden)
    else:
        truth = read_table(references, reading.encoding)
        there = {name for name, path in shared.items() if truth and _has(truth[0][1], path)}
        shared = {name: shared[name] for name in there.difference(_TRUTH)}
    truth_columns = {**shared, **reading.reference_columns}
    known = references_of(truth, task, truth_columns, reading.coordinates)
    found = predictions_of(answers, task, known, own)
    if in_one_file:
        names = [*_OF_PREDICTIONS, *_OF_REFERENCES]
        unused = {str(predictions): _unused(truth, [*own.values(), *truth_columns.values()], names)}
    else:
        unused = {
            str(predictions): _unused(answers, own.values(), _OF_PREDICTIONS),
            str(references): _unused(truth, truth_columns.values(), _OF_REFERENCES),
        }
    return Rows(found, known, {path: names for path, names in unused.items() if names})


def parse_columns(text: str) -> dict[str, str]:
    """The mapping in `id=question_id,raw_text=pred`, or the same as JSON.

    Raises:
        ValueError: it is neither.
    """
    if text.lstrip().startswith("{"):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"columns {text}: no valid JSON ({error})") from error
        pairs = list(found.items())
    else:
        pairs = [part.split("=", 1) for part in text.split(",") if part.strip()]
    if not all(len(pair) == 2 and isinstance(pair[1], str) and pair[1].strip() for pair in pairs):
        raise ValueError(
            f"expected columns as FIELD=COLUMN,... or as JSON {{FIELD: COLUMN}}, got {text!r}"
        )
    return {name.strip(): path.strip() for name, path in pairs}


def _numbered(table: Table, reading: RowReading) -> Table:
    if "id" in reading.columns or any("id" in row for _, row in table):
        return table
    return [(at, {**row, "id": number}) for number, (at, row) in enumerate(table, start=1)]


def _has(row: Mapping[str, object], path: str) -> bool:
    try:
        column(row, path)
    except KeyError:
        return False
    return True


def _without(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def _unused(table: Table, columns: Iterable[str], names: Iterable[str]) -> list[str]:
    known = set(names) | {name for path in columns for name in (path, path.partition(".")[0])}
    return list(dict.fromkeys(name for _, row in table for name in row if name not in known))
