"""From records to queries and references: what is asked, and what counts as right.

Generation sees a `Query`, scoring sees a `ReferenceRow`; neither sees the other's.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from cloc_mllm.data.compositional import compositional_kind
from cloc_mllm.data.expressions import expression_kind
from cloc_mllm.data.records import Record, Region
from cloc_mllm.data.scenes import CONCEPTS, ZERO_SHOT_CONCEPTS
from cloc_mllm.evaluation.predictions import Box, ReferenceRow

if TYPE_CHECKING:
    from cloc_mllm.evaluation.true_boxes import TrueBoxes

# what a user asks for -> the row tasks it becomes
TASKS: dict[str, tuple[str, ...]] = {
    "region_classification": ("region_classification",),
    "region_text_retrieval": ("region_to_text", "text_to_region"),
    "image_text_retrieval": ("image_to_text", "text_to_image"),
    "text_to_box": ("text_to_box",),
    "rec": ("rec",),
    "referring": ("referring",),
    "true_boxes": ("true_box_cloc", "true_box_roi_align", "true_box_crop", "true_box_mask"),
    "true_box_cloc": ("true_box_cloc",),
    "true_box_roi_align": ("true_box_roi_align",),
    "true_box_crop": ("true_box_crop",),
    "true_box_mask": ("true_box_mask",),
    "phrase_grounding": ("phrase_grounding",),
    "zero_shot_classification": ("zero_shot_classification",),
}
MLLM_TASKS = ("rec", "referring")
BUILT_IN_SOURCE = "openmoji-scenes"


@dataclass(frozen=True)
class Query:
    """One question: a text, a box (normalised), or the image itself when neither is given."""

    id: str
    image_id: str
    task: str
    text: str = ""
    box: Box | None = None


@dataclass(frozen=True)
class RegionItem:
    """A distinct box of an image with all texts annotated on it."""

    id: str
    image_id: str
    box: Box
    phrases: tuple[str, ...]
    category: str


@dataclass
class Benchmark:
    """All queries with their references, and the lists that labels are ranked from.

    `image_ids` is in the order of the records; `regions`, `phrases`, `captions`, `class_names` and
    `image_classes` (of whole images) hold each candidate once.
    """

    image_ids: list[str] = field(default_factory=list)
    regions: list[RegionItem] = field(default_factory=list)
    phrases: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    class_names: list[str] = field(default_factory=list)
    image_classes: list[str] = field(default_factory=list)
    true_boxes: TrueBoxes | None = None
    queries: list[Query] = field(default_factory=list)
    references: list[ReferenceRow] = field(default_factory=list)

    def add(self, query: Query, reference: ReferenceRow) -> None:
        self.queries.append(query)
        self.references.append(reference)

    def of_task(self, task: str) -> list[Query]:
        return [query for query in self.queries if query.task == task]


def row_tasks(tasks: Iterable[str]) -> list[str]:
    """Row tasks of what a user asked for.

    Raises:
        ValueError: a name is unknown; the message lists all names.
    """
    names = list(dict.fromkeys(tasks))
    unknown = [name for name in names if name not in TASKS]
    if unknown or not names:
        raise ValueError(f"unknown tasks {unknown}; expected some of: {', '.join(TASKS)}")
    return list(dict.fromkeys(row_task for name in names for row_task in TASKS[name]))


def build_benchmark(
    records: Sequence[Record], tasks: Iterable[str], captions_per_image: int = 0
) -> Benchmark:
    """Queries of the given tasks (names of `TASKS`) over all records.

    A task for which the records hold nothing (no captions, no categories) gets no query. Those of
    `region_benchmarks` need more than the records and are added there.

    Args:
        captions_per_image: take so many of each record, the first ones; 0 takes all.

    Raises:
        ValueError: an unknown task, or two records with one id.
    """
    bench = Benchmark()
    expressions: list[tuple[Query, ReferenceRow]] = []
    captions_of: dict[str, list[str]] = {}
    facts_of: dict[str, _ImageFacts] = {}
    sources = set()
    for record in records:
        if record.id in captions_of:
            raise ValueError(f"two records have the id {record.id!r}; ids must be unique")
        bench.image_ids.append(record.id)
        facts_of[record.id] = _image_facts(record)
        bench.regions += _distinct_regions(record)
        captions_of[record.id] = _distinct(record.captions[: captions_per_image or None])
        expressions += _expressions(record)
        sources.add(record.source)
    bench.phrases = sorted({phrase for region in bench.regions for phrase in region.phrases})
    bench.captions = sorted({text for texts in captions_of.values() for text in texts})
    bench.class_names = _class_names(bench.regions, sources)
    for task in row_tasks(tasks):
        if task == "rec":
            pairs: Iterable[tuple[Query, ReferenceRow]] = expressions
        elif task in ("image_to_text", "text_to_image"):
            pairs = _image_text(bench, captions_of, task)
        else:
            pairs = _BUILDERS[task](bench) if task in _BUILDERS else ()
        for query, reference in pairs:
            bench.add(query, facts_of[query.image_id].added_to(reference))
    return bench


@dataclass(frozen=True)
class _ImageFacts:
    """What the record says of every query about its image; `kind` is "" for ordinary images."""

    width: int
    height: int
    kind: str
    categories: dict[Box, str]

    def added_to(self, row: ReferenceRow) -> ReferenceRow:
        return replace(
            row,
            width=self.width,
            height=self.height,
            kind=row.kind or self.kind,
            num_distractors=self._num_distractors(row.boxes),
        )

    def _num_distractors(self, boxes: Sequence[Box]) -> int | None:
        """Boxes of the same category besides the true ones; None where a category is unknown."""
        asked = {self.categories.get(box, "") for box in boxes}
        if not asked or "" in asked:
            return None
        return sum(
            category in asked and box not in boxes for box, category in self.categories.items()
        )


def _image_facts(record: Record) -> _ImageFacts:
    categories = {region.box: clean_text(region.category) for region in record.regions}
    kind = compositional_kind(record.source)
    return _ImageFacts(record.width, record.height, kind, categories)


def clean_text(text: str) -> str:
    """Lower case, single spaces: texts that agree in this are one text."""
    return " ".join(text.lower().split())


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


def _class_names(regions: Sequence[RegionItem], sources: set[str]) -> list[str]:
    """All categories that occur; for built-in scenes all concepts, also those that do not."""
    names = {region.category for region in regions if region.category}
    if sources == {BUILT_IN_SOURCE}:
        for concepts in (CONCEPTS, ZERO_SHOT_CONCEPTS):
            names |= set(concepts) if names & set(concepts) else set()
    return sorted(names)


def _expressions(record: Record) -> Iterator[tuple[Query, ReferenceRow]]:
    """One query an expression of a region, or of the regions that one phrase names together.

    Those are regions of one group, or of one phrase where there are neither groups nor expressions.
    """
    named_together: dict[str, list[Region]] = {}
    for index, region in enumerate(record.regions):
        alone = f"#{index}" if region.expressions else region.phrase
        named_together.setdefault(region.group or alone, []).append(region)
    texts = [
        (text, kind, [region.box for region in regions])
        for regions in named_together.values()
        for text, kind in _texts_with_kind(record, regions[0])
    ]
    for index, (text, kind, boxes) in enumerate(texts):
        row_id = f"rec/{record.id}/{index}"
        yield (
            Query(row_id, record.id, "rec", text=text),
            ReferenceRow(row_id, record.id, "rec", boxes=boxes, labels=[text], kind=kind),
        )


def _texts_with_kind(record: Record, region: Region) -> list[tuple[str, str]]:
    """Expressions of a region, each with its kind; that is the source's name for outside data.

    Built-in scenes have some 25 expressions an image, four in five of them relations: one of each
    kind a region is asked, picked by a hash of the region.
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


def _region_classification(bench: Benchmark) -> Iterator[tuple[Query, ReferenceRow]]:
    for region in bench.regions:
        if region.category:
            yield _box_query(region, "region_classification", [region.category], bench.class_names)


def _region_to_text(bench: Benchmark) -> Iterator[tuple[Query, ReferenceRow]]:
    for region in bench.regions:
        if region.phrases:
            yield _box_query(region, "region_to_text", list(region.phrases), bench.phrases)


def _referring(bench: Benchmark) -> Iterator[tuple[Query, ReferenceRow]]:
    for region in bench.regions:
        if region.phrases:
            yield _box_query(region, "referring", list(region.phrases), [])


def _box_query(
    region: RegionItem, task: str, labels: list[str], candidates: Sequence[str]
) -> tuple[Query, ReferenceRow]:
    row_id = f"{task}/{region.id}"
    return (
        Query(row_id, region.image_id, task, box=region.box),
        ReferenceRow(
            row_id,
            region.image_id,
            task,
            boxes=[region.box],
            labels=labels,
            num_candidates=len(candidates),
        ),
    )


def _regions_by_phrase(bench: Benchmark) -> dict[tuple[str, str], list[RegionItem]]:
    """Regions of each phrase of each image, keyed by (image id, phrase)."""
    found: dict[tuple[str, str], list[RegionItem]] = {}
    for region in bench.regions:
        for phrase in region.phrases:
            found.setdefault((region.image_id, phrase), []).append(region)
    return found


def _text_to_region(bench: Benchmark) -> Iterator[tuple[Query, ReferenceRow]]:
    everywhere: dict[str, list[str]] = {}
    for region in bench.regions:
        for phrase in region.phrases:
            everywhere.setdefault(phrase, []).append(region.id)
    for index, ((image_id, phrase), regions) in enumerate(_regions_by_phrase(bench).items()):
        row_id = f"text_to_region/{image_id}/{index}"
        yield (
            Query(row_id, image_id, "text_to_region", text=phrase),
            ReferenceRow(
                row_id,
                image_id,
                "text_to_region",
                boxes=[region.box for region in regions],
                labels=everywhere[phrase],
                num_candidates=len(bench.regions),
            ),
        )


def _text_to_box(bench: Benchmark) -> Iterator[tuple[Query, ReferenceRow]]:
    for index, ((image_id, phrase), regions) in enumerate(_regions_by_phrase(bench).items()):
        row_id = f"text_to_box/{image_id}/{index}"
        yield (
            Query(row_id, image_id, "text_to_box", text=phrase),
            ReferenceRow(
                row_id,
                image_id,
                "text_to_box",
                boxes=[region.box for region in regions],
                labels=[phrase],
            ),
        )


def _image_text(
    bench: Benchmark, captions_of: dict[str, list[str]], task: str
) -> Iterator[tuple[Query, ReferenceRow]]:
    images_of: dict[str, list[str]] = {}
    for image_id, captions in captions_of.items():
        for caption in captions:
            images_of.setdefault(caption, []).append(image_id)
    for image_id, captions in captions_of.items():
        if task == "image_to_text":
            asked = [("", captions)] if captions else []
            num_candidates = len(bench.captions)
        else:
            asked = [(caption, images_of[caption]) for caption in captions]
            num_candidates = len(bench.image_ids)
        for index, (text, labels) in enumerate(asked):
            row_id = f"{task}/{image_id}/{index}"
            reference = ReferenceRow(
                row_id, image_id, task, labels=labels, num_candidates=num_candidates
            )
            yield Query(row_id, image_id, task, text=text), reference


_BUILDERS = {
    "region_classification": _region_classification,
    "region_to_text": _region_to_text,
    "text_to_region": _text_to_region,
    "text_to_box": _text_to_box,
    "referring": _referring,
}
