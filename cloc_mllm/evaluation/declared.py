"""Benchmarks that a user declares by name (`--benchmark`); a part of one is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cloc_mllm.evaluation.queries import QuerySet

if TYPE_CHECKING:
    from cloc_mllm.data.records import Record


@dataclass(frozen=True)
class Declared:
    """The size that a benchmark must have; 0 is not checked.

    Args:
        captions_per_image: captions that each image must have; the first so many are used.
        num_classes: names to choose from.
    """

    num_images: int
    captions_per_image: int = 0
    num_classes: int = 0


DECLARED = {
    "coco_5k": Declared(5000, captions_per_image=5),
    "flickr30k_1k": Declared(1000, captions_per_image=5),
    "coco_val2017_boxes": Declared(5000, num_classes=80),
    "lvis_v1_val_boxes": Declared(19809, num_classes=1203),
    "flickr30k_entities": Declared(1000),
    "grit_2k": Declared(2000),
    "imagenet_val": Declared(50000),
}


def declared_benchmark(name: str) -> Declared | None:
    """The benchmark that a user names; None for "".

    Raises:
        ValueError: an unknown name; the message lists all.
    """
    if name and name not in DECLARED:
        raise ValueError(f"unknown benchmark {name!r}; expected one of: {', '.join(DECLARED)}")
    return DECLARED.get(name)


def check_declared(
    name: str, declared: Declared, records: Sequence[Record], query_sets: Sequence[QuerySet]
) -> None:
    """Refuses data that is not the whole benchmark, whose score would be set beside published ones.

    Raises:
        ValueError: another number of images, class names or captions; says which.
    """
    counts = {"images": (declared.num_images, len(records))}
    if declared.num_classes:
        names = [
            len(asked.candidates.names)
            for asked in query_sets
            if asked.candidates is not None and asked.candidates.kind == "class_names"
        ]
        counts["class names"] = (declared.num_classes, max(names, default=0))
    for what, (expected, actual) in counts.items():
        if expected != actual:
            raise ValueError(
                f"benchmark {name!r} has {expected:,} {what}, this data has {actual:,}; build the "
                "records from the whole split, or leave out --benchmark"
            )
    for index in range(len(records) if declared.captions_per_image else 0):
        if (count := len(records[index].captions)) < declared.captions_per_image:
            raise ValueError(
                f"benchmark {name!r} has {declared.captions_per_image} captions per image, record "
                f"{records[index].id!r} has {count}"
            )
