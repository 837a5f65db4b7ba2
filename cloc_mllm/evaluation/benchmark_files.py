"""Files of published benchmarks: photos that may be missing, and rows as JSON lines."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cloc_mllm.data.drop_log import DropLog
    from cloc_mllm.data.records import Record


def photo_records(
    names: Iterable[str], images: str | Path, drop_log: DropLog, *, source: str
) -> dict[str, Record]:
    """Makes a record without regions of each distinct photo that is there; file name -> record.

    Args:
        names: file names as the benchmark writes them, with or without a suffix.
        images: folder, tar or zip.
        drop_log: gets each photo that is not there or not readable, with the reason.
    """
    from cloc_mllm.data.readers.files import open_files, read_image
    from cloc_mllm.data.records import Record, validate_record

    records: dict[str, Record] = {}
    with open_files(images) as files:
        for name in dict.fromkeys(names):
            record = Record(name, read_image(files, name), 0, 0, [], [], source)
            valid = validate_record(record, drop_log)
            if valid is not None:
                records[name] = valid
    return records


def photo_faults(drop_log: DropLog) -> dict[str, str]:
    """Why a photo is not among the records: file name -> reason."""
    return {item: reason for kind, item, reason in drop_log.entries if kind == "record"}


def count_left_out(image_ids: Iterable[str], faults: dict[str, str]) -> dict[str, int]:
    """Reasons of the questions whose photo has a fault, most frequent first."""
    reasons = Counter(faults[image_id] for image_id in image_ids if image_id in faults)
    return dict(reasons.most_common())


def read_json_rows(path: str | Path, *keys: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """`(line number, object)` of a file with one JSON object a line that holds all `keys`.

    Raises:
        ValueError: a line is something else; names file, line and key.
    """
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path} line {number}: expected one JSON object a line, got {line[:60]!r}"
                ) from error
            missing = [key for key in keys if not isinstance(row, dict) or key not in row]
            if missing:
                raise ValueError(
                    f"{path} line {number}: expected an object with {', '.join(keys)}; "
                    f"{', '.join(missing)} missing"
                )
            yield number, row
