"""`predictions.jsonl` that grows row by row, so that a killed run goes on where it was.

Beside it lies `predictions.settings.json`: how the rows are made. Rows made in another way are
never continued, and never overwritten unless asked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cloc_mllm.data.storage import write_whole
from cloc_mllm.evaluation.rows.files import read_predictions

_ADVICE = "choose another --output_dir, or start afresh with --overwrite true"


def resume_predictions(
    path: str | Path, settings: Mapping[str, Any], *, overwrite: bool = False
) -> set[str]:
    """Prepares a file for rows to be appended; returns the ids of the rows that are in it.

    A last line without its end (the run was killed while it wrote) is cut off, to be made again.

    Args:
        settings: all that rows depend on, as JSON values.
        overwrite: begin with an empty file whatever is there.

    Raises:
        ValueError: the rows that are there were made with other settings; names them.
    """
    path = Path(path)
    settings_path = path.with_suffix(".settings.json")
    if overwrite:
        path.unlink(missing_ok=True)
    cut_half_line(path)
    if not path.is_file() or path.stat().st_size == 0:
        write_whole(settings_path, json.dumps(settings, indent=2) + "\n")
        path.touch()
        return set()
    if not settings_path.is_file():
        raise ValueError(
            f"{path} holds rows but {settings_path.name}, which says how they were made, is "
            f"missing; {_ADVICE}"
        )
    _refuse_other_settings(path, json.loads(settings_path.read_text(encoding="utf-8")), settings)
    return {row.id for row in read_predictions(path)}


def cut_half_line(path: str | Path) -> None:
    """A run that was killed while it wrote leaves a last line without its end, to be made again."""
    path = Path(path)
    if not path.is_file():
        return
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    if end < len(content):
        with open(path, "r+b") as file:
            file.truncate(end)


def model_identity(model: str | Path) -> dict[str, Any]:
    """The name of a model and a digest of its files' names, sizes and times: a model that was
    trained again in the same directory is another one. A name on the hub is just its name."""
    files = sorted(path for path in Path(model).glob("*") if path.is_file())
    listing = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    digest = hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:16]
    return {"name": str(model), "files": digest}


def _refuse_other_settings(path: Path, there: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    now = json.loads(json.dumps(now))
    different = [key for key in {**there, **now} if there.get(key) != now.get(key)]
    if different:
        shown = "; ".join(f"{key}: there {there.get(key)}, now {now.get(key)}" for key in different)
        raise ValueError(f"{path} holds rows made with other settings ({shown}); {_ADVICE}")
