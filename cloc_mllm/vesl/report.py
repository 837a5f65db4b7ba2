"""The labelling report: one self-contained page of counts, distributions and drawn examples."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path

import numpy as np

from cloc_mllm.data.drawing import draw_record
from cloc_mllm.data.parquet import load_records
from cloc_mllm.data.records import Record
from cloc_mllm.vesl.config import LabelConfig
from cloc_mllm.vesl.shards import Summary

PAPER_BOXES_PER_IMAGE = 11.6
PAPER_WORDS_PER_PHRASE = 2.1
_LAST_BAR = 20  # of a histogram; it stands for all from there on
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
_CSS = """
:root { color-scheme: light; --line: #d9dde3; --soft: #5a6472; }
* { box-sizing: border-box; }
body { font: 15px/1.45 system-ui, sans-serif; color: #1c2330; background: #f6f7f9;
  margin: 0 auto; padding: 1rem; max-width: 1200px; }
h1 { font-size: 1.5rem; margin: .3rem 0 1rem; }
h2 { font-size: 1.1rem; margin: 0 0 .6rem; }
section { background: #fff; border: 1px solid var(--line); border-radius: 8px;
  padding: 1rem; margin-bottom: 1rem; }
.numbers { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); }
.numbers b { display: block; font-size: 1.5rem; font-variant-numeric: tabular-nums; }
small, dt { color: var(--soft); }
.charts { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); }
.charts { margin-bottom: 1rem; }
.charts section { margin: 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; font-weight: 400; padding: .1rem .5rem .1rem 0; vertical-align: top; }
td:nth-child(2) { text-align: right; white-space: nowrap; }
.bar { width: 70%; padding: 0; vertical-align: middle; }
.bar i { display: block; height: .8rem; background: #9cc3e6; border-radius: 2px; }
.gallery { display: grid; gap: .8rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); }
figure { margin: 0; border: 1px solid var(--line); border-radius: 6px; overflow: hidden; }
figure img { display: block; width: 100%; }
figcaption { padding: .4rem .5rem; font-size: .85rem; overflow-wrap: anywhere; }
dl { margin: 0; display: grid; grid-template-columns: max-content 1fr; gap: .1rem .8rem; }
dd { margin: 0; overflow-wrap: anywhere; }
"""


def write_report(
    path: Path,
    directory: Path,
    summaries: Sequence[Summary],
    config: LabelConfig,
    images_per_second: float,
) -> None:
    """Write the page.

    Args:
        directory: where the shards lie.
        images_per_second: of the run that finished the job; 0 if it had nothing left to label.
    """
    boxes = _sum(summary.boxes_per_image for summary in summaries)
    queries = _sum(summary.queries_per_image for summary in summaries)
    words = _sum(summary.words for summary in summaries)
    sections = [
        _headline(summaries, boxes, queries, words),
        '<div class="charts">'
        + _chart("Boxes of an image", boxes, "images")
        + _chart("Phrases asked for in an image", queries, "images")
        + _chart("Words of a box's phrase", words, "boxes")
        + "</div>",
        _fates(summaries),
        _speed(images_per_second),
        _gallery(directory, summaries, config.num_examples),
        _settings(config),
    ]
    path.write_text(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>cloc-mllm labels</title><style>{_CSS}</style></head>"
        f"<body><h1>cloc-mllm labels</h1>{''.join(sections)}</body></html>\n",
        encoding="utf-8",
    )


def time_estimates(images_per_second: float) -> list[tuple[str, str]]:
    """How long 1 M, 300 M and 2 B images take at this rate; nothing for a rate of 0."""
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
    for of_shard in counts:
        total.update({int(key): count for key, count in of_shard.items()})
    return total


def _mean(histogram: Counter[int]) -> float:
    return sum(key * count for key, count in histogram.items()) / max(1, histogram.total())


def _headline(
    summaries: Sequence[Summary], boxes: Counter[int], queries: Counter[int], words: Counter[int]
) -> str:
    numbers = [
        (f"{boxes.total():,}", "images labelled"),
        (f"{sum(s.num_dropped for s in summaries):,}", "images that cannot be used (drops.jsonl)"),
        (f"{words.total():,}", "boxes"),
        (f"{_mean(boxes):.1f}", f"boxes an image; the paper's have {PAPER_BOXES_PER_IMAGE}"),
        (f"{_mean(words):.1f}", f"words a phrase; the paper's have {PAPER_WORDS_PER_PHRASE}"),
        (f"{_mean(queries):.1f}", "phrases asked for in an image"),
        (f"{boxes[0]:,}", "images without a box"),
    ]
    cells = "".join(f"<div><b>{number}</b><small>{text}</small></div>" for number, text in numbers)
    return f'<section class="numbers">{cells}</section>'


def _chart(title: str, histogram: Counter[int], unit: str) -> str:
    cut: Counter[int] = Counter()
    for key, count in histogram.items():
        cut[min(key, _LAST_BAR)] += count
    most = max(cut.values(), default=1)
    rows = "".join(
        f"<tr><th>{key}{'+' if key == _LAST_BAR else ''}</th><td>{cut[key]:,}</td>"
        f'<td class="bar"><i style="width:{100 * cut[key] / most:.1f}%"></i></td></tr>'
        for key in range(max(cut, default=0) + 1)
    )
    return f"<section><h2>{title} <small>({unit})</small></h2><table>{rows}</table></section>"


def _fates(summaries: Sequence[Summary]) -> str:
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
    return '<div class="charts">' + "".join(map(_fate_table, *zip(*tables, strict=True))) + "</div>"


def _fate_table(title: str, counts: Counter[str]) -> str:
    rows = "".join(
        f"<tr><th>{escape(name.replace('_', ' '))}"
        f"<br><small>{escape(_MEANING.get(name, ''))}</small></th><td>{count:,}</td></tr>"
        for name, count in counts.most_common()
    )
    return f"<section><h2>{title}</h2><table>{rows or '<tr><td>none</td></tr>'}</table></section>"


def _speed(images_per_second: float) -> str:
    if images_per_second <= 0:
        return ""
    rows = "".join(
        f"<dt>{name} images</dt><dd>{duration}</dd>"
        for name, duration in time_estimates(images_per_second)
    )
    return (
        f"<section><h2>{images_per_second:.2f} images a second <small>by all workers of the last "
        f"run, once the models are loaded; at this rate</small></h2><dl>{rows}</dl></section>"
    )


def _gallery(directory: Path, summaries: Sequence[Summary], num_examples: int) -> str:
    """Images spread evenly over the shards."""
    shards = [summary for summary in summaries if summary.ids]
    places = [(shard, row) for shard in shards for row in range(len(shard.ids))]
    step = np.linspace(0, len(places) - 1, min(num_examples, len(places)))
    cards = []
    for shard, row in (places[round(position)] for position in step):
        cards.append(_card(load_records(directory / shard.file["name"])[row]))
    if not cards:
        return ""
    return f'<section><h2>Examples</h2><div class="gallery">{"".join(cards)}</div></section>'


def _card(record: Record) -> str:
    picture = draw_record(record)
    picture.thumbnail((_IMAGE_SIDE_PX, _IMAGE_SIDE_PX))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    source = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    scores = ", ".join(f"{region.phrase} {region.score:.2f}" for region in record.regions)
    caption = record.captions[0] if record.captions else "no caption"
    return (
        f'<figure><img alt="{escape(record.id, quote=True)} with its boxes" src="{source}">'
        f"<figcaption>{escape(caption)}<br><small>{escape(scores or 'no box')}</small>"
        "</figcaption></figure>"
    )


def _settings(config: LabelConfig) -> str:
    rows = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(str(value)) or '(default)'}</dd>"
        for name, value in asdict(config).items()
    )
    return f"<section><h2>Settings</h2><dl>{rows}</dl></section>"
