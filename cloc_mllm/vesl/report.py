"""The labelling report: one self-contained page of counts, distributions and drawn examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from cloc_mllm.data.drawing import draw_record
from cloc_mllm.data.parquet import load_records
from cloc_mllm.data.records import Record
from cloc_mllm.data.storage import write_whole
from cloc_mllm.pages import image_source, render_page
from cloc_mllm.vesl.config import LabelConfig
from cloc_mllm.vesl.shards import Summary

PAPER_BOXES_PER_IMAGE = 11.6
PAPER_WORDS_PER_PHRASE = 2.1
_LAST_BAR = 20  # the last bar of a histogram counts this many and more
_IMAGE_SIDE_PX = 480
_AMOUNTS = {"1 M": 1e6, "300 M": 3e8, "2 B": 2e9}
_MEANING = {
    "kept": "got a box",
    "below_threshold": "no box is sure enough",
    "outscored": "its boxes suit another phrase better",
    "unusable_box": "its box cannot stand in a record",
    "outside": "off the picture",
    "mostly_outside": "more than half off the picture",
    "too_small": "under one pixel",
    "zero_area": "a side of length 0",
    "inverted": "right before left, or bottom before top",
    "not_finite": "a coordinate is no number",
    "duplicate": "the same thing was named before",
    "too_many": "after the first queries of an image",
    "no_noun": "a pronoun or a number alone",
    "stop_words": "says nothing, or only where",
    "web_words": "words of web pages",
    "too_long": "too many words",
    "suppressed": "overlaps a better box of the same phrase",
}


def write_report(
    path: Path,
    directory: Path,
    summaries: Sequence[Summary],
    config: LabelConfig,
    images_per_second: float,
) -> None:
    """Writes the page.

    Args:
        directory: where the shards lie.
        images_per_second: rate of the run that finished the job; 0 if it had nothing to label.
    """
    boxes = _sum(summary.boxes_per_image for summary in summaries)
    queries = _sum(summary.queries_per_image for summary in summaries)
    words = _sum(summary.words for summary in summaries)
    page = render_page(
        "labels.html.j2",
        title="cloc-mllm labels",
        numbers=_headline(summaries, boxes, queries, words),
        charts=[
            _chart("Boxes per image", boxes, "images"),
            _chart("Phrases asked for per image", queries, "images"),
            _chart("Words of a box's phrase", words, "boxes"),
        ],
        fates=_fates(summaries),
        images_per_second=f"{images_per_second:.2f}",
        durations=time_estimates(images_per_second),
        examples=_examples(directory, summaries, config.num_examples),
        settings={name: str(value) or "(default)" for name, value in asdict(config).items()},
    )
    write_whole(path, page)


def time_estimates(images_per_second: float) -> list[tuple[str, str]]:
    """Estimates how long 1 M, 300 M and 2 B images take at this rate; [] for a rate of 0."""
    if images_per_second <= 0:
        return []
    return [(name, _duration(num / images_per_second)) for name, num in _AMOUNTS.items()]


def _duration(seconds: float) -> str:
    for unit, length in (("years", 365 * 86400.0), ("days", 86400.0), ("hours", 3600.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds / 60:,.1f} minutes"


def _sum(counts: Iterable[Mapping[str, int]]) -> Counter[int]:
    total: Counter[int] = Counter()
    for shard_counts in counts:
        total.update({int(key): count for key, count in shard_counts.items()})
    return total


def _mean(histogram: Counter[int]) -> float:
    return sum(key * count for key, count in histogram.items()) / max(1, histogram.total())


def _headline(
    summaries: Sequence[Summary], boxes: Counter[int], queries: Counter[int], words: Counter[int]
) -> list[tuple[str, str]]:
    """Numbers and what they count."""
    return [
        (f"{boxes.total():,}", "images labelled"),
        (f"{sum(s.num_dropped for s in summaries):,}", "images that cannot be used (drops.jsonl)"),
        (f"{words.total():,}", "boxes"),
        (f"{_mean(boxes):.1f}", f"boxes per image; the paper has {PAPER_BOXES_PER_IMAGE}"),
        (f"{_mean(words):.1f}", f"words per phrase; the paper has {PAPER_WORDS_PER_PHRASE}"),
        (f"{_mean(queries):.1f}", "phrases asked for per image"),
        (f"{boxes[0]:,}", "images without a box"),
    ]


def _chart(title: str, histogram: Counter[int], unit: str) -> dict[str, Any]:
    """A histogram: each key with its count and its share of the longest bar."""
    cut: Counter[int] = Counter()
    for key, count in histogram.items():
        cut[min(key, _LAST_BAR)] += count
    most = max(cut.values(), default=1)
    bars = [
        (f"{key}{'+' if key == _LAST_BAR else ''}", f"{cut[key]:,}", f"{100 * cut[key] / most:.1f}")
        for key in range(max(cut, default=0) + 1)
    ]
    return {"title": title, "unit": unit, "bars": bars}


def _fates(summaries: Sequence[Summary]) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """Tables of what became of images, phrases and boxes: name, meaning and count."""
    phrases: Counter[str] = Counter()
    boxes: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    for summary in summaries:
        phrases.update(summary.phrases)
        boxes.update(summary.boxes)
        dropped.update(f"{kind}: {reason}" for kind, _, reason, *_ in summary.dropped)
    tables = [
        ("What became of the phrases", phrases),
        ("What became of the detector's boxes", boxes),
        ("Images and captions that cannot be used", dropped),
    ]
    return [
        (
            title,
            [
                (name.replace("_", " "), _MEANING.get(name, ""), f"{count:,}")
                for name, count in counts.most_common()
            ],
        )
        for title, counts in tables
    ]


def _examples(
    directory: Path, summaries: Sequence[Summary], num_examples: int
) -> list[dict[str, str]]:
    """Draws images that are spread evenly over the shards."""
    shards = [summary for summary in summaries if summary.ids]
    places = [(shard, row) for shard in shards for row in range(len(shard.ids))]
    step = np.linspace(0, len(places) - 1, min(num_examples, len(places)))
    chosen = (places[round(position)] for position in step)
    return [_example(load_records(directory / shard.file["name"])[row]) for shard, row in chosen]


def _example(record: Record) -> dict[str, str]:
    image = draw_record(record)
    image.thumbnail((_IMAGE_SIDE_PX, _IMAGE_SIDE_PX))
    scores = ", ".join(f"{region.phrase} {region.score:.2f}" for region in record.regions)
    return {
        "id": record.id,
        "image": image_source(image),
        "caption": record.captions[0] if record.captions else "no caption",
        "scores": scores or "no box",
    }
