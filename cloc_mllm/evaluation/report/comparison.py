"""Two models side by side: a Markdown table, and a page of differences, curves and answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from cloc_mllm.data.drawing import Rgb
from cloc_mllm.data.storage import write_whole
from cloc_mllm.evaluation.report.examples import (
    ANSWER_COLOR,
    TRUE_COLOR,
    Example,
    box_facts,
    draw_answers,
)
from cloc_mllm.evaluation.report.plots import Curve, Plot, curve_plot
from cloc_mllm.evaluation.report.table import ROUNDING, aligned, metric_title, with_interval
from cloc_mllm.evaluation.rows.rows import ScoredPair
from cloc_mllm.evaluation.scores.boxes import answer_iou
from cloc_mllm.evaluation.stats.details import CURVE_THRESHOLDS
from cloc_mllm.evaluation.tasks import Scorer, all_scorers
from cloc_mllm.pages import render_page

if TYPE_CHECKING:
    from cloc_mllm.evaluation.compare import Compared, Comparison

SIGNIFICANT = 0.05
OTHER_COLOR: Rgb = (31, 119, 180)
BothPairs = tuple[Sequence[ScoredPair], Sequence[ScoredPair]]
LoadImage = Callable[[str, str], Image.Image | None]


def comparison_table(comparison: Comparison) -> str:
    """Tables both models' metrics with their paired difference; bold is the better if p < 0.05."""
    rows = [
        [task, metric_title(name), *_markdown_cells(entry)]
        for task, entries in comparison.tasks.items()
        for name, entry in entries.items()
    ]
    notes = [
        f"A is {comparison.models[0]}, B is {comparison.models[1]}.",
        "In percent, with 95 % intervals (bootstrap over images); p of a sign-flip test over "
        f"images, not corrected for the number of rows; bold is better with p < {SIGNIFICANT}.",
        ROUNDING,
    ]
    columns = ["task", "metric", "A", "B", "A - B", "p", "n"]
    return "\n".join([*aligned(columns, rows), "", *notes]) + "\n"


def _markdown_cells(entry: Compared) -> list[str]:
    bold = better(entry)
    return [f"**{text}**" if name == bold else text for name, text in compared_cells(entry).items()]


def compared_cells(entry: Compared) -> dict[str, str]:
    """Formats one metric of both models, by column."""
    difference = entry.difference
    return {
        "A": with_interval(entry.a),
        "B": with_interval(entry.b),
        "A - B": with_interval(difference, sign="+"),
        "p": "< 0.001" if difference.p_value < 0.001 else f"{difference.p_value:.3f}",
        "n": str(entry.a.n),
    }


def better(entry: Compared) -> str:
    """The column of the better model; "" where the difference may be chance."""
    if entry.difference.p_value >= SIGNIFICANT:
        return ""
    return "A" if entry.difference.value > 0 else "B"


def write_comparison_report(
    path: str | Path,
    comparison: Comparison,
    pairs: Mapping[str, BothPairs],
    load_image: LoadImage,
    *,
    num_examples: int = 6,
) -> None:
    """Writes the page.

    Args:
        pairs: answers of A and of B by task, in the same order.
        load_image: task and image id -> RGB image in the original frame, or None.
        num_examples: shown of the answers that A did better, and as many of B's.
    """
    scorers = {task: all_scorers()[task] for task in pairs}
    page = render_page(
        "comparison.html.j2",
        title="cloc-mllm evaluation: two models",
        comparison=comparison,
        scorers=scorers,
        significant=SIGNIFICANT,
        curves={task: _curve(pairs[task]) for task in comparison.breakdowns},
        examples={
            task: _examples(task, scorer, pairs[task], load_image, num_examples)
            for task, scorer in scorers.items()
            if scorer.example_metric and num_examples
        },
        legend=[(TRUE_COLOR, "true box"), (ANSWER_COLOR, "A"), (OTHER_COLOR, "B")],
        cells=compared_cells,
        better=better,
        metric_title=metric_title,
    )
    write_whole(path, page)


def _curve(both: BothPairs) -> Plot:
    """Accuracy of both at each IoU threshold, in the colours of their boxes."""
    curves = []
    for name, pairs, rgb in zip("AB", both, (ANSWER_COLOR, OTHER_COLOR), strict=True):
        iou = answer_iou(pairs)
        points = [(t, float((iou >= t).mean())) for t in CURVE_THRESHOLDS]
        curves.append(Curve(name, points, "#{:02x}{:02x}{:02x}".format(*rgb)))
    return curve_plot("Accuracy at each IoU threshold", ("IoU threshold, %", "accuracy, %"), curves)


def _examples(
    task: str, scorer: Scorer, both: BothPairs, load_image: LoadImage, num_examples: int
) -> dict[str, Any]:
    a, b = (scorer.score(pairs)[scorer.example_metric].values for pairs in both)
    order = np.argsort(b - a, kind="stable")  # where A leads most comes first
    groups = {
        "A is better": [i for i in order[:num_examples] if a[i] > b[i]],
        "B is better": [i for i in order[::-1][:num_examples] if b[i] > a[i]],
    }
    return {
        "num_equal": int((a == b).sum()),
        "n": len(a),
        "groups": {
            title: [_example(task, both[0][i], both[1][i], load_image) for i in indices]
            for title, indices in groups.items()
        },
    }


def _example(task: str, a: ScoredPair, b: ScoredPair, load_image: LoadImage) -> Example:
    reference = a.reference
    image = load_image(task, reference.image_id)
    facts = [("asked", a.prediction.prompt)]
    if reference.labels:
        facts.append(("true", reference.labels[0]))
    more = [("query", reference.id), ("image", reference.image_id)]
    more += box_facts("true box", reference.boxes)
    for name, pair in (("A", a), ("B", b)):
        facts.append((name, _answer(pair)))
        more += box_facts(f"{name}'s box", pair.prediction.boxes)
    answers = [("A", a.prediction, ANSWER_COLOR), ("B", b.prediction, OTHER_COLOR)]
    return Example(
        reference.id,
        draw_answers(image, reference.boxes, answers) if image else "",
        f"{task} example on image {reference.image_id}",
        facts,
        more,
    )


def _answer(pair: ScoredPair) -> str:
    """The answer in its own words, with its IoU, confidence and failure."""
    row = pair.prediction
    parts = [row.raw_text or " · ".join(row.labels[:3])]
    if row.boxes and pair.reference.boxes:
        parts.append(f"IoU {answer_iou([pair])[0]:.2f}")
    if row.confidence is not None:
        parts.append(f"confidence {row.confidence:.2f}")
    if row.failure:
        parts.append(f"failed: {row.failure}")
    return "; ".join(part for part in parts if part) or "nothing"
