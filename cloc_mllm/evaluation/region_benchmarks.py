"""Benchmarks that CLOC answers alone and that need more than records: an annotation file, class
names, or counts that must be right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloc_mllm.data.readers import image_folder
from cloc_mllm.data.readers.flickr30k_entities import read_mentions
from cloc_mllm.data.records import Record
from cloc_mllm.data.tokenizer import TextTokenizer
from cloc_mllm.evaluation.config import EvalConfig
from cloc_mllm.evaluation.generate_cloc import Settings
from cloc_mllm.evaluation.generate_phrases import predict_phrases
from cloc_mllm.evaluation.generate_true_boxes import TRUE_BOX_TASKS, predict_true_boxes
from cloc_mllm.evaluation.predictions import PredictionRow, ReferenceRow, ScoredPair
from cloc_mllm.evaluation.queries import Benchmark, Query, clean_text, row_tasks
from cloc_mllm.evaluation.true_boxes import (
    BoxRules,
    read_true_boxes,
    true_box_queries,
    true_boxes_of,
)
from cloc_mllm.models.cloc import Cloc


@dataclass(frozen=True)
class Declared:
    """What a benchmark of this name must hold; 0 is not checked.

    Args:
        captions_per_image: each image's first so many are used, and must be there.
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
    """By the name a user gives; None for "".

    Raises:
        ValueError: an unknown name; the message lists all.
    """
    if name and name not in DECLARED:
        raise ValueError(f"unknown benchmark {name!r}; expected one of: {', '.join(DECLARED)}")
    return DECLARED.get(name)


def check_declared(
    name: str, declared: Declared, records: Sequence[Record], bench: Benchmark
) -> None:
    """Raise a ValueError where the data is not the whole benchmark: a score on part of it, under
    its name, would be compared with published ones."""
    counts = {"images": (declared.num_images, len(bench.image_ids))}
    if declared.num_classes:
        names = bench.true_boxes.class_names if bench.true_boxes else bench.image_classes
        counts["class names"] = (declared.num_classes, len(names))
    for what, (expected, actual) in counts.items():
        if expected != actual:
            raise ValueError(
                f"benchmark {name!r} has {expected:,} {what}, this data has {actual:,}; build the "
                "records from the whole split, or leave out --benchmark"
            )
    if declared.captions_per_image:
        for index in range(len(records)):
            if (count := len(records[index].captions)) < declared.captions_per_image:
                raise ValueError(
                    f"benchmark {name!r} has {declared.captions_per_image} captions an image, "
                    f"record {records[index].id!r} has {count}"
                )


def add_region_benchmarks(
    bench: Benchmark, records: Sequence[Record], tasks: Iterable[str], config: EvalConfig
) -> dict[str, Any]:
    """Add the queries of the tasks of this module; returns what was asked and left out, counted.

    Raises:
        ValueError: `phrase_grounding` without `annotations`, or a file that is not what the task
            needs.
    """
    account: dict[str, Any] = {}
    asked = row_tasks(tasks)
    if any(task in TRUE_BOX_TASKS for task in asked):
        account["true_boxes"] = _add_true_boxes(bench, asked, config)
    if "phrase_grounding" in asked:
        if not config.annotations or config.annotations.endswith(".json"):
            raise ValueError(
                "phrase_grounding needs --annotations: the folder or zip of Flickr30k Entities "
                f"that the records were built from, got {config.annotations or 'nothing'!r}"
            )
        notes: Counter[str] = Counter()
        for query, reference in phrase_queries(config.annotations, bench.image_ids, notes):
            bench.add(query, reference)
        account["phrase_grounding"] = {"not_asked": dict(notes)}
    if "zero_shot_classification" in asked:
        account["zero_shot_classification"] = _add_zero_shot(bench, records, config.class_names)
    return account


def phrase_queries(
    annotations: str | Path, image_ids: Sequence[str], notes: Counter[str]
) -> Iterator[tuple[Query, ReferenceRow]]:
    """One query a mention; the reference's kind is its types, parted by a slash.

    Args:
        notes: see `read_mentions`.
    """
    count: Counter[str] = Counter()
    for mention in read_mentions(annotations, image_ids, notes):
        row_id = f"phrase_grounding/{mention.photo_id}/{mention.sentence}/{count[mention.photo_id]}"
        count[mention.photo_id] += 1
        text = clean_text(mention.text)
        yield (
            Query(row_id, mention.photo_id, "phrase_grounding", text=text),
            ReferenceRow(
                row_id,
                mention.photo_id,
                "phrase_grounding",
                boxes=mention.boxes,
                labels=[text],
                kind="/".join(mention.types),
            ),
        )


def _add_true_boxes(bench: Benchmark, asked: Sequence[str], config: EvalConfig) -> dict[str, Any]:
    if config.annotations:
        rules = BoxRules(config.keep_crowd, config.min_box_side_px)
        bench.true_boxes = read_true_boxes(config.annotations, bench.image_ids, rules)
    else:
        bench.true_boxes = true_boxes_of(bench)
    for task in asked:
        if task in TRUE_BOX_TASKS:
            for query, reference in true_box_queries(bench.true_boxes, task):
                bench.add(query, reference)
    return bench.true_boxes.account()


def _add_zero_shot(bench: Benchmark, records: Sequence[Record], class_names: str) -> dict[str, Any]:
    """One query an image of an image folder; its caption is its class."""
    labels: dict[str, str] = {}
    for index in range(len(records)):
        record = records[index]
        if record.source == image_folder.SOURCE and record.captions:
            labels[record.id] = clean_text(record.captions[0])
    names = set(labels.values())
    if class_names:
        named = image_folder.read_class_names(class_names).values()
        names = {clean_text(name) for name in named}
        if unknown := sorted(set(labels.values()) - names):
            raise ValueError(f"{class_names} lacks the classes {unknown[:5]} of these images")
    bench.image_classes = sorted(names)
    task = "zero_shot_classification"
    for image_id, label in labels.items():
        row_id = f"{task}/{image_id}"
        reference = ReferenceRow(row_id, image_id, task, labels=[label], num_candidates=len(names))
        bench.add(Query(row_id, image_id, task), reference)
    return {"classes": len(names), "classes_that_occur": len(set(labels.values()))}


def count_masks(pairs: Sequence[ScoredPair]) -> dict[str, int]:
    """How many boxes were pooled under their `segmentation`, and how many under the `box`."""
    return dict(Counter(pair.prediction.settings["mask"] for pair in pairs))


def account_lines(about: Mapping[str, Any]) -> list[str]:
    """A line a task: `true_boxes: 183 boxes, dropped: crowd 1, 80 classes, ...`."""
    lines = []
    for task in ("true_boxes", "phrase_grounding", "zero_shot_classification"):
        counts = about.get(task, {}).items()
        parts = [
            f"{name.replace('_', ' ')}: {', '.join(f'{k} {n:,}' for k, n in value.items())}"
            if isinstance(value, Mapping)
            else f"{value:,} {name.replace('_', ' ')}"
            for name, value in counts
            if value
        ]
        lines += [f"{task}: {'; '.join(parts)}"] if parts else []
    return lines


def predict_region_benchmarks(
    model: Cloc,
    tokenizer: TextTokenizer,
    records: Sequence[Record],
    bench: Benchmark,
    settings: Settings,
) -> list[PredictionRow]:
    """One row a query of true boxes and phrases; zero-shot classification is `predict_cloc`'s."""
    rows: list[PredictionRow] = []
    asked = {query.task for query in bench.queries}
    tasks = [task for task in TRUE_BOX_TASKS if task in asked]
    if tasks and bench.true_boxes:
        rows += predict_true_boxes(model, tokenizer, records, bench.true_boxes, tasks, settings)
    if phrases := bench.of_task("phrase_grounding"):
        rows += predict_phrases(model, tokenizer, records, phrases, settings)
    return rows
