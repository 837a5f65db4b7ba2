"""Indexes the records for the tasks that ask about them: read once, shared by all tasks."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from cloc_mllm.box import Box
from cloc_mllm.data.compositional import compositional_kind, generate_compositional
from cloc_mllm.data.expressions import expression_kind
from cloc_mllm.data.parquet import load_records
from cloc_mllm.data.scenes import CONCEPTS, ZERO_SHOT_CONCEPTS, generate_scenes
from cloc_mllm.evaluation.queries import Answer, Model, Query, QueryPair, QuerySet, RegionItem, pair
from cloc_mllm.evaluation.rows.rows import ReferenceRow
from cloc_mllm.evaluation.words import clean_text

if TYPE_CHECKING:
    from cloc_mllm.data.records import Record, Region

BUILT_IN_SOURCE = "openmoji-scenes"
NUM_BUILT_IN_SCENES = 500
NUM_COMPOSITIONAL_SCENES = 300
COMPOSITIONAL = "compositional"


def records_to_score(data: str, limit: int = 0) -> Sequence[Record]:
    """The records of `data`; built-in test scenes for "", compositional ones for "compositional".

    At most `limit` of them if that is not 0.
    """
    if data == COMPOSITIONAL:
        return list(generate_compositional(limit or NUM_COMPOSITIONAL_SCENES))
    if not data:
        return list(generate_scenes(limit or NUM_BUILT_IN_SCENES, split="test"))
    records = load_records(data)
    return records[:limit] if limit else records


@dataclass(frozen=True)
class Expression:
    """A text that names one or several boxes of an image together, and its kind."""

    image_id: str
    text: str
    kind: str
    boxes: list[Box]


class RecordIndex:
    """Distinct regions, texts and classes of records, in the order of the records.

    Attributes:
        records: the records themselves.
        regions: each box of each image once.
        captions: distinct captions by image id.
        expressions: referring expressions of all images.
        sources: where the records come from.

    Raises:
        ValueError: two records have one id.
    """

    def __init__(self, records: Sequence[Record], captions_per_image: int = 0) -> None:
        """Reads the records. `captions_per_image` takes the first so many of each; 0 takes all."""
        self.records = records
        self.regions: list[RegionItem] = []
        self.captions: dict[str, list[str]] = {}
        self.expressions: list[Expression] = []
        self.sources: dict[str, str] = {}
        self._facts: dict[str, _ImageFacts] = {}
        for record in records:
            if record.id in self.captions:
                raise ValueError(f"two records have the id {record.id!r}; ids must be unique")
            self._facts[record.id] = _ImageFacts.read(record)
            self.regions += _distinct_regions(record)
            self.captions[record.id] = _distinct(record.captions[: captions_per_image or None])
            self.expressions += _expressions(record)
            self.sources[record.id] = record.source

    @property
    def image_ids(self) -> list[str]:
        return list(self.captions)

    @cached_property
    def phrases(self) -> list[str]:
        return sorted({phrase for region in self.regions for phrase in region.phrases})

    @cached_property
    def distinct_captions(self) -> list[str]:
        return sorted({text for texts in self.captions.values() for text in texts})

    @cached_property
    def class_names(self) -> list[str]:
        """All categories that occur; for built-in scenes all concepts, even absent ones."""
        names = {region.category for region in self.regions if region.category}
        if set(self.sources.values()) == {BUILT_IN_SOURCE}:
            for concepts in (CONCEPTS, ZERO_SHOT_CONCEPTS):
                names |= set(concepts) if names & set(concepts) else set()
        return sorted(names)

    @cached_property
    def regions_by_phrase(self) -> dict[tuple[str, str], list[RegionItem]]:
        """Regions of each phrase of each image, keyed by (image id, phrase)."""
        found: dict[tuple[str, str], list[RegionItem]] = {}
        for region in self.regions:
            for phrase in region.phrases:
                found.setdefault((region.image_id, phrase), []).append(region)
        return found

    def region_pairs(
        self, task: str, labels: Callable[[RegionItem], Sequence[str]], **right: Any
    ) -> Iterator[QueryPair]:
        """Makes a query about each region that has labels.

        Args:
            right: further fields of the references.
        """
        for region in self.regions:
            if names := list(labels(region)):
                query = Query(f"{task}/{region.id}", region.image_id, task, boxes=(region.box,))
                yield pair(query, boxes=[region.box], labels=names, **right)

    def query_set(
        self,
        task: str,
        answer: Answer,
        answered_by: Model,
        pairs: Iterable[QueryPair],
        **settings: Any,
    ) -> QuerySet:
        """Makes a set of queries about these records; references get the facts of their image.

        Args:
            settings: further fields of `QuerySet`.
        """
        completed = [(q, self._facts[q.image_id].added_to(reference)) for q, reference in pairs]
        records, image_ids = self.records, self.image_ids
        return QuerySet(
            task, answer, answered_by, records, completed, image_ids=image_ids, **settings
        )


class _ImageFacts(NamedTuple):
    """The facts of an image that all its references get; `kind` is "" for ordinary images."""

    width: int
    height: int
    kind: str
    categories: dict[Box, str]

    @classmethod
    def read(cls, record: Record) -> _ImageFacts:
        categories = {region.box: clean_text(region.category) for region in record.regions}
        return cls(record.width, record.height, compositional_kind(record.source), categories)

    def added_to(self, row: ReferenceRow) -> ReferenceRow:
        """The row with size and kind of its image, and the number of distractors.

        Those are boxes of the same category beside the true ones; None where a box has none.
        """
        asked = {self.categories.get(box, "") for box in row.boxes}
        distractors = [
            box for box, name in self.categories.items() if name in asked and box not in row.boxes
        ]
        return replace(
            row,
            width=self.width,
            height=self.height,
            kind=row.kind or self.kind,
            num_distractors=len(distractors) if asked and "" not in asked else None,
        )


def _distinct(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(cleaned for text in texts if (cleaned := clean_text(text))))


def _distinct_regions(record: Record) -> list[RegionItem]:
    phrases: dict[Box, list[str]] = {}
    categories: dict[Box, str] = {}
    for region in record.regions:
        box = region.box
        names = phrases.setdefault(box, [])
        if not compositional_kind(record.source):  # its questions are the expressions alone
            names.append(region.phrase)
        if record.source != BUILT_IN_SOURCE:  # there, expressions are the same thing's other names
            names += region.expressions
        categories[box] = categories.get(box) or clean_text(region.category)
    return [
        RegionItem(f"{record.id}#{index}", record.id, box, tuple(_distinct(texts)), categories[box])
        for index, (box, texts) in enumerate(phrases.items())
    ]


def _expressions(record: Record) -> Iterator[Expression]:
    """Expressions of each region, or of the regions that one phrase names together.

    Those are regions of one group, or of one phrase where there are neither groups nor expressions.
    """
    named_together: dict[str, list[Region]] = {}
    for index, region in enumerate(record.regions):
        alone = f"#{index}" if region.expressions else region.phrase
        named_together.setdefault(region.group or alone, []).append(region)
    for regions in named_together.values():
        boxes = [region.box for region in regions]
        for text, kind in _texts_with_kind(record, regions[0]):
            yield Expression(record.id, text, kind, boxes)


def _texts_with_kind(record: Record, region: Region) -> list[tuple[str, str]]:
    """Expressions of a region, each with its kind; outside data has the source's name as kind.

    Built-in scenes have some 25 expressions per image, four in five of them relations: one of each
    kind is asked per region, picked by a hash of the region.
    """
    if kind := compositional_kind(record.source):
        return [(clean_text(text), kind) for text in region.expressions]
    if record.source != BUILT_IN_SOURCE:
        first = [] if region.phrase in region.expressions else [region.phrase]
        texts = [clean_text(text) for text in (*first, *region.expressions)]
        return [(text, record.source) for text in texts if text]
    by_kind: dict[str, list[str]] = {}
    for text in _distinct(region.expressions):
        by_kind.setdefault(expression_kind(text), []).append(text)
    pick = zlib.crc32(f"{record.id} {region.box}".encode())
    return [(same[pick % len(same)], kind) for kind, same in by_kind.items()]
