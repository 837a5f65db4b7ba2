"""What a benchmark asks: photos, questions, what counts as right, and what had to be left out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from cloc_mllm.data.drop_log import DropLog
from cloc_mllm.data.readers.files import open_files, read_image
from cloc_mllm.data.records import Record, validate_record
from cloc_mllm.evaluation.predictions import Box, ReferenceRow

REGION = "<region>"
OVER_LIMIT = "over_limit"


@dataclass(frozen=True)
class Question:
    """One question to an MLLM about one photo.

    Args:
        text: with one `<region>` a box; the model's own box text is written in front of it.
        boxes: xyxy, normalised to the original image, in the order of the `<region>`s.
        expects: whether the answer is a box or words.
        region_prompt: what the boxes stand for, if not for themselves: `point`, `free_form`.
    """

    id: str
    image_id: str
    task: str
    text: str
    boxes: tuple[Box, ...] = ()
    expects: Literal["box", "text"] = "text"
    region_prompt: str = ""

    def __post_init__(self) -> None:
        if self.text.count(REGION) != len(self.boxes):
            raise ValueError(
                f"question {self.id!r} has {self.text.count(REGION)} {REGION} but "
                f"{len(self.boxes)} boxes; write one {REGION} a box: {self.text[:80]!r}"
            )


@dataclass
class QuestionSet:
    """A benchmark, or what is there of it; every declared question is asked or counted.

    Args:
        name: benchmark and split, as the numbers are to be quoted.
        records: the photos, one each.
        references: one a question, with the same id, in the same order.
        num_declared: how many questions the benchmark has.
        left_out: reason -> number of questions that are not asked.
        max_new_tokens: longest answer in words' tokens; a box gets what a box needs.
        unit: what is counted, for the sentence.
        notes: what the files hold that is no question by the protocol, by reason.
    """

    name: str
    records: list[Record]
    questions: list[Question]
    references: list[ReferenceRow]
    num_declared: int
    left_out: dict[str, int] = field(default_factory=dict)
    max_new_tokens: int = 16
    unit: str = "questions"
    notes: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        asked, left_out = len(self.questions), sum(self.left_out.values())
        assert asked == len(self.references)
        assert asked + left_out == self.num_declared, (asked, self.left_out, self.num_declared)

    @property
    def coverage(self) -> str:
        """`546 of 10,834 expressions (missing_image 10,288)`."""
        text = f"{len(self.questions):,} of {self.num_declared:,} {self.unit}"
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in self.left_out.items())
        return f"{text} ({reasons})" if reasons else text

    def limited(self, limit: int) -> QuestionSet:
        """The first `limit` questions, the others counted as left out; 0 is all."""
        over = len(self.questions) - limit
        if not limit or over <= 0:
            return self
        asked = {question.image_id for question in self.questions[:limit]}
        return replace(
            self,
            records=[record for record in self.records if record.id in asked],
            questions=self.questions[:limit],
            references=self.references[:limit],
            left_out={**self.left_out, OVER_LIMIT: over},
        )

    def require_complete(self) -> None:
        """A score over a part of a benchmark is not that benchmark's score.

        Raises:
            ValueError: something is left out, or nothing is asked; says how much and why.
        """
        if not self.questions:
            raise ValueError(
                f"{self.name}: nothing to ask, {self.coverage}; check that --images has the photos "
                "that the questions name"
            )
        if self.left_out:
            raise ValueError(
                f"{self.name}: expected all {self.num_declared:,} {self.unit}, found "
                f"{self.coverage}; get the missing files, or pass --allow_partial (or --limit) "
                "and quote the number with its denominator"
            )


def photo_records(
    names: Iterable[str], images: str | Path, drop_log: DropLog, *, source: str
) -> dict[str, Record]:
    """A record without regions for each distinct photo that is there; file name -> record.

    Args:
        names: file names as the benchmark writes them, with or without a suffix.
        images: folder, tar or zip.
        drop_log: gets each photo that is not there or not readable, with the reason.
    """
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
