"""`report.html` of two models side by side: differences, curves, and answers that differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cloc_mllm.data.drawing import draw_regions
from cloc_mllm.evaluation.details import CURVE_THRESHOLDS
from cloc_mllm.evaluation.grounding import answer_iou
from cloc_mllm.evaluation.paper_table import comparison_cells
from cloc_mllm.evaluation.predictions import ScoredPair
from cloc_mllm.evaluation.report import (
    ANSWER_COLOR,
    EXAMPLE_METRIC,
    IMAGE_SIDE_PX,
    TRUE_COLOR,
    box_text,
    card,
    jpeg_bytes,
    page,
    swatch,
    task_section,
)
from cloc_mllm.evaluation.report_plots import Series, curve_plot
from cloc_mllm.evaluation.scoring import SCORERS
from cloc_mllm.evaluation.table import metric_title
from cloc_mllm.geometry import Boxes

OTHER_COLOR = (31, 119, 180)
BothPairs = tuple[Sequence[ScoredPair], Sequence[ScoredPair]]
LoadImage = Callable[[str], Image.Image | None]


def write_comparison_report(
    path: str | Path,
    comparison: Mapping[str, Any],
    pairs: Mapping[str, BothPairs],
    load_image: LoadImage,
    *,
    num_examples: int = 6,
) -> None:
    """Write the page.

    Args:
        comparison: of `compare.compare`.
        pairs: answers of A and of B by task, in the same order.
        load_image: image id -> RGB image in the original frame, or None.
        num_examples: shown of the answers that A did better, and as many of B's.
    """
    sections = [_headline(comparison)]
    for task, both in pairs.items():
        groups = comparison["breakdowns"].get(task)
        parts = [_box_parts(groups, both)] if groups is not None else []
        if task in EXAMPLE_METRIC and num_examples:
            parts.append(_gallery(task, both, load_image, num_examples))
        if parts:
            sections.append(task_section(task, "".join(parts)))
    Path(path).write_text(
        page("cloc-mllm evaluation: two models", "".join(sections)), encoding="utf-8"
    )


def _headline(comparison: Mapping[str, Any]) -> str:
    names = "".join(
        f"<dt>{letter}</dt><dd>{escape(directory)} ({escape(', '.join(models))})</dd>"
        for letter, directory, models in zip(
            "AB", comparison["models"], comparison["names"], strict=True
        )
    )
    body = []
    for task, entries in comparison["tasks"].items():
        title = escape(SCORERS[task].title)
        body.append(f'<tr class="task"><th colspan="6" scope="rowgroup">{title}</th></tr>')
        body += [_row(metric_title(metric), entry) for metric, entry in entries.items()]
    only = "".join(
        f"<p>Only {letter} has {escape(', '.join(tasks))}.</p>"
        for letter, tasks in zip("AB", comparison["only_in"], strict=True)
        if tasks
    )
    return (
        f'<section><dl class="models">{names}</dl><p>Percent, with 95&nbsp;% intervals (bootstrap '
        "over images). p: sign-flip test over images, two-sided, not corrected for the number of "
        "rows; the better model is bold if p &lt; 0.05.</p>"
        f"{_table('metric', body)}{only}</section>"
    )


def _table(first: str, body: Sequence[str]) -> str:
    columns = [first, "A", "B", "A - B", "p", "n"]
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _row(name: str, entry: Mapping[str, Any]) -> str:
    texts = [*comparison_cells(entry, bold="<b>{}</b>"), str(entry["a"]["n"])]
    labels = ("A", "B", "A - B", "p", "n")
    cells = "".join(
        f'<td data-label="{label}">{text.replace("< ", "&lt; ")}</td>'
        for label, text in zip(labels, texts, strict=True)
    )
    return f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>'


def _box_parts(groups: Mapping[str, Mapping[str, Any]], both: BothPairs) -> str:
    """Accuracy of both at each IoU threshold, and by group."""
    iou = [answer_iou(pairs) for pairs in both]
    curves = [
        Series(name, style, [(t, float((values >= t).mean())) for t in CURVE_THRESHOLDS])
        for name, style, values in zip("AB", ("first", "second"), iou, strict=True)
    ]
    axes = ("IoU threshold, %", "accuracy, %")
    plot = curve_plot("Accuracy at each IoU threshold", axes, curves)
    body = []
    for name, entries in groups.items():
        body.append(f'<tr class="task"><th colspan="6" scope="rowgroup">{escape(name)}</th></tr>')
        body += [_row(group, entry) for group, entry in entries.items()]
    table = f"<h3>Acc@0.5 by group</h3>{_table('group', body)}" if body else ""
    return f'<div class="plots">{plot}</div>{table}'


def _gallery(task: str, both: BothPairs, load_image: LoadImage, num_examples: int) -> str:
    a, b = (SCORERS[task].score(pairs)[EXAMPLE_METRIC[task]].values for pairs in both)
    order = np.argsort(b - a, kind="stable")  # where A leads most comes first
    groups = {
        "A is better": [i for i in order[:num_examples] if a[i] > b[i]],
        "B is better": [i for i in order[::-1][:num_examples] if b[i] > a[i]],
    }
    equal = int((a == b).sum())
    html = [f"<p>{equal} of {len(a)} answers score the same.</p>", _legend()]
    for title, indices in groups.items():
        cards = "".join(_card(task, both[0][i], both[1][i], load_image) for i in indices)
        html.append(f'<h3>{title}</h3><div class="gallery">{cards}</div>' if cards else "")
    return "".join(html)


def _legend() -> str:
    colors = ((TRUE_COLOR, "true box"), (ANSWER_COLOR, "A"), (OTHER_COLOR, "B"))
    return f'<p class="legend">{"".join(swatch(color) + name for color, name in colors)}</p>'


def _card(task: str, a: ScoredPair, b: ScoredPair, load_image: LoadImage) -> str:
    reference = a.reference
    image = load_image(reference.image_id)
    data = jpeg_bytes(_draw(a, b, image)) if image else None
    facts = [("asked", a.prediction.prompt)]
    if reference.labels:
        facts.append(("true", reference.labels[0]))
    more = [("query", reference.id), ("image", reference.image_id)]
    more += [("true box", box_text(box)) for box in reference.boxes[:4]]
    for letter, pair in (("A", a), ("B", b)):
        facts.append((letter, _answer(pair)))
        more += [(f"{letter}'s box", box_text(box)) for box in pair.prediction.boxes[:4]]
    alt = f"{task} example on image {reference.image_id}"
    return card(reference.id, data, alt, facts, more)


def _answer(pair: ScoredPair) -> str:
    """What was answered, as it was answered, and what that is worth."""
    row = pair.prediction
    parts = [row.raw_text or " · ".join(row.labels[:3])]
    if row.boxes and pair.reference.boxes:
        parts.append(f"IoU {answer_iou([pair])[0]:.2f}")
    if row.confidence is not None:
        parts.append(f"confidence {row.confidence:.2f}")
    if row.failure:
        parts.append(f"failed: {row.failure}")
    return "; ".join(part for part in parts if part) or "nothing"


def _draw(a: ScoredPair, b: ScoredPair, image: Image.Image) -> Image.Image:
    boxes, labels, colors = list(a.reference.boxes), [""] * len(a.reference.boxes), [TRUE_COLOR]
    colors *= len(boxes)
    for letter, pair, color in (("A", a, ANSWER_COLOR), ("B", b, OTHER_COLOR)):
        answered = [] if pair.prediction.failure else pair.prediction.boxes[:1]
        boxes += answered
        labels += [letter] * len(answered)
        colors += [color] * len(answered)
    return draw_regions(
        image, Boxes.normalized(boxes), labels, colors=colors, long_side=IMAGE_SIDE_PX
    )
