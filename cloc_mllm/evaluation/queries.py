"""The queries of a task and their right answers, the same for every predictor.

A predictor sees `Query`s alone, a scorer `ReferenceRow`s alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from cloc_mllm.box import Box
from cloc_mllm.evaluation.rows.rows import ReferenceRow

if TYPE_CHECKING:
    from PIL import Image

    from cloc_mllm.data.records import Record

# What an answer is: one box; one box or the word that there is none; boxes, best first; labels
# ranked from a list of candidates; free text.
Answer = Literal["box", "box_or_refusal", "ranked_boxes", "label", "text"]
# How CLOC embeds the regions of a query: its own region encoder, or one of the plainer ways that
# it is compared with.
RegionFeatures = Literal["cloc", "roi_align", "crop", "mask"]
Model = Literal["cloc", "mllm"]

REGION = "<region>"
PRESENT, ABSENT = "present", "absent"  # labels of rows that place a thing, or refuse to
OVER_LIMIT = "over_limit"


@dataclass(frozen=True)
class Query:
    """One question about one image.

    Args:
        text: a phrase, a caption, or a whole question with one `<region>` per box; "" where the
            boxes, or the image itself, are asked about.
        boxes: the regions asked about, xyxy, normalised to the original image.
        region_prompt: what the boxes stand for, if not for themselves: a point, a scribble.
        segmentation: of the one region, as COCO writes it, for predictors that use masks.
        image_hw: height and width in pixels that the segmentation counts in.
    """

    id: str
    image_id: str
    task: str
    text: str = ""
    boxes: tuple[Box, ...] = ()
    region_prompt: str = ""
    segmentation: Any = None
    image_hw: tuple[int, int] = (0, 0)


QueryPair = tuple[Query, ReferenceRow]


def pair(query: Query, **right: Any) -> QueryPair:
    """Joins a query with its reference; `right` are the reference's fields besides ids and task."""
    return query, ReferenceRow(query.id, query.image_id, query.task, **right)


@dataclass(frozen=True)
class RegionItem:
    """A distinct box of an image, with all texts annotated on it."""

    id: str
    image_id: str
    box: Box
    phrases: tuple[str, ...] = ()
    category: str = ""


@dataclass(frozen=True)
class Candidates:
    """The list that labels are ranked from.

    Args:
        kind: `texts` as they stand, `class_names` (put into templates), `regions` or `images`.
        names: the labels: texts, class names, ids of regions or of images.
        regions: the regions of those ids, in the same order, for `regions`.
    """

    kind: Literal["texts", "class_names", "regions", "images"]
    names: Sequence[str]
    regions: Sequence[RegionItem] = ()


@dataclass(frozen=True)
class Coverage:
    """The part of a published benchmark that is asked; every declared query is asked or counted.

    Args:
        name: benchmark and split, as its numbers are to be quoted.
        num_declared: how many queries the benchmark has.
        left_out: reason -> number of queries that are not asked.
        unit: what is counted, for the sentence.
    """

    name: str
    num_declared: int
    left_out: dict[str, int] = field(default_factory=dict)
    unit: str = "questions"

    @property
    def num_asked(self) -> int:
        return self.num_declared - sum(self.left_out.values())

    def __str__(self) -> str:
        """`546 of 10,834 expressions (missing_image 10,288)`."""
        text = f"{self.num_asked:,} of {self.num_declared:,} {self.unit}"
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in self.left_out.items())
        return f"{text} ({reasons})" if reasons else text


@dataclass
class QuerySet:
    """All queries whose rows have one `task`, each with its reference.

    Args:
        task: of the rows; one of the task's `scorers`.
        answer: what an answer is.
        answered_by: which kind of model is asked.
        records: the images, found by id.
        pairs: what is asked, each with what is right.
        candidates: what labels are ranked from, where `answer` is `label`.
        region_features: how CLOC embeds the queries' regions.
        max_new_tokens: longest answer of a language model where `answer` is `text`.
        threshold: for `box_or_refusal`, the confidence below which a predictor refuses that
            cannot say so in words.
        calibration: queries on which such a predictor finds the threshold itself.
        coverage: for a published benchmark, how much of it is asked.
        notes: what to say of the queries in the report, by name.
        image_ids: of the records, in their order; read from them where left out.
    """

    task: str
    answer: Answer
    answered_by: Model
    records: Sequence[Record]
    pairs: list[QueryPair]
    candidates: Candidates | None = None
    region_features: RegionFeatures = "cloc"
    max_new_tokens: int = 24
    threshold: float | None = None
    calibration: QuerySet | None = None
    coverage: Coverage | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    image_ids: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not self.image_ids:
            self.image_ids = [record.id for record in self.records]
        assert all(query.id == reference.id for query, reference in self.pairs)
        assert self.coverage is None or self.coverage.num_asked == len(self.pairs)
        for query in self.queries if self.answer == "text" else ():
            if query.text and query.text.count(REGION) != len(query.boxes):
                raise ValueError(
                    f"query {query.id!r} has {query.text.count(REGION)} {REGION} but "
                    f"{len(query.boxes)} boxes; write one {REGION} per box: {query.text[:80]!r}"
                )

    @cached_property
    def queries(self) -> list[Query]:
        return [query for query, _ in self.pairs]

    @cached_property
    def references(self) -> list[ReferenceRow]:
        return [reference for _, reference in self.pairs]

    @cached_property
    def _places(self) -> dict[str, int]:
        return {image_id: place for place, image_id in enumerate(self.image_ids)}

    def load_image(self, image_id: str) -> Image.Image:
        """The image as RGB, upright."""
        return self.records[self._places[image_id]].load_image()

    def limited(self, limit: int) -> QuerySet:
        """The first `limit` queries of a benchmark, the others counted as left out; 0 is all."""
        num_over = len(self.pairs) - limit
        if self.coverage is None or not limit or num_over <= 0:
            return self
        asked = {query.image_id for query, _ in self.pairs[:limit]}
        left_out = {**self.coverage.left_out, OVER_LIMIT: num_over}
        return replace(
            self,
            records=[record for record in self.records if record.id in asked],
            image_ids=(),
            pairs=self.pairs[:limit],
            coverage=replace(self.coverage, left_out=left_out),
        )

    def check_coverage(self, *, allow_partial: bool) -> None:
        """Refuses a part of a benchmark: its score is not that benchmark's score.

        Raises:
            ValueError: something is left out and that is not allowed, or nothing is asked; says
                how much and why.
        """
        coverage = self.coverage
        if coverage is None:
            return
        if not self.queries:
            raise ValueError(
                f"{coverage.name}: nothing to ask, {coverage}; check that --images has the photos "
                "that the questions name"
            )
        if coverage.left_out and not allow_partial:
            raise ValueError(
                f"{coverage.name}: expected all {coverage.num_declared:,} {coverage.unit}, found "
                f"{coverage}; get the missing files, or pass --allow_partial (or --limit) and "
                "quote the number with its denominator"
            )


def queries_digest(query_sets: Iterable[QuerySet]) -> str:
    """Changes with any id, text or box that is asked, with their order and with the candidates."""
    digest = hashlib.sha256()
    for asked in query_sets:
        names = list(asked.candidates.names) if asked.candidates else []
        rows = [asdict(query) for query in asked.queries]
        settings = [asked.answer, asked.region_features, asked.max_new_tokens, asked.threshold]
        digest.update(json.dumps([asked.task, settings, names, rows]).encode())
    return digest.hexdigest()[:16]
