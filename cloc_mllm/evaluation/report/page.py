"""`report.html` of one evaluation: numbers with intervals, and drawn examples of each task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from cloc_mllm.evaluation.metrics import Evaluation, Metric, TaskMetrics
from cloc_mllm.evaluation.report.examples import (
    Example,
    choose_examples,
    confidences,
    legend,
    make_example,
)
from cloc_mllm.evaluation.report.plots import Curve, Plot, bar_plot, curve_plot
from cloc_mllm.evaluation.report.table import (
    failure_sentence,
    metric_cells,
    metric_title,
    note_texts,
    percent,
    used_columns,
)
from cloc_mllm.evaluation.rows.rows import ScoredPair
from cloc_mllm.evaluation.stats.calibration import COVERAGES, Calibration
from cloc_mllm.evaluation.stats.details import CURVE_THRESHOLDS, BoxDetails
from cloc_mllm.evaluation.tasks import all_scorers
from cloc_mllm.pages import render_page

LoadImage = Callable[[str, str], Image.Image]  # task and image id -> RGB, original frame


def write_report(
    path: str | Path,
    evaluation: Evaluation,
    pairs: Mapping[str, Sequence[ScoredPair]],
    load_image: LoadImage,
    *,
    num_examples: int = 6,
    seed: int = 0,
) -> None:
    """Writes the page.

    Args:
        pairs: the model's answers by task.
        num_examples: of the best, of the worst, of each kind of surprise and of the rest, for each
            task.
    """
    tasks = [
        _task(name, metrics, pairs[name], load_image, num_examples, seed)
        for name, metrics in evaluation.tasks.items()
    ]
    every_metric = [m for entry in evaluation.tasks.values() for m in entry.metrics.values()]
    page = render_page(
        "evaluation.html.j2",
        title="cloc-mllm evaluation",
        columns=used_columns(every_metric),
        tasks=tasks,
        failures=[
            failure_sentence(entry.title, entry.failures)
            for entry in evaluation.tasks.values()
            if entry.failures is not None
        ],
        about={**evaluation.about, "tasks": note_texts(evaluation.about)},
    )
    Path(path).write_text(page, encoding="utf-8")


def _task(
    name: str,
    metrics: TaskMetrics,
    pairs: Sequence[ScoredPair],
    load_image: LoadImage,
    num_examples: int,
    seed: int,
) -> dict[str, Any]:
    scorer = all_scorers()[name]
    examples: dict[str, list[Example]] = {}
    if scorer.example_metric and num_examples > 0:
        scores = scorer.score(pairs)[scorer.example_metric].values
        groups = choose_examples(scores, num_examples, seed, confidences(pairs))
        examples = {
            title: [
                make_example(scorer, pairs[i], load_image(name, pairs[i].reference.image_id))
                for i in indices
            ]
            for title, indices in groups.items()
        }
    return {
        "name": name,
        "title": metrics.title,
        "protocol": metrics.protocol,
        "rows": [_row(metric, value) for metric, value in metrics.metrics.items()],
        "has_section": bool(examples) or metrics.details is not None,
        "details": metrics.details and details_view(metrics.details),
        "legend": legend(scorer) if examples else [],
        "examples": examples,
    }


def _row(name: str, metric: Metric) -> dict[str, Any]:
    return {
        "title": metric_title(name),
        "cells": metric_cells(metric),
        "value": percent(metric.value),
        "low": percent(metric.ci_low),
        "width": percent(metric.ci_high - metric.ci_low),
        "chance": "" if metric.chance is None else percent(metric.chance),
    }


def details_view(details: BoxDetails) -> dict[str, Any]:
    """Plots behind a box task's accuracy, and the rules by which queries were grouped."""
    found = details.calibration
    rules = [
        (name, rule)
        for name, rule in details.rules.items()
        if name in details.breakdowns or (name == "calibration" and found)
    ]
    curve = Curve("accuracy", list(zip(CURVE_THRESHOLDS, details.iou_curve, strict=True)))
    title = "Accuracy at each IoU threshold"
    curves = [curve_plot(title, ("IoU threshold, %", "accuracy, %"), [curve])]
    note = "No answer has a confidence, so there is no calibration."
    if found:
        curves += _calibration_plots(found)
        note = _calibration_note(found)
    groups = details.breakdowns.get("kind", {}).values()
    return {
        "bars": [bar_plot(f"Acc@0.5 by {name}", g) for name, g in details.breakdowns.items()],
        "curves": curves,
        "note": note,
        "rules": rules,
        "noun_only": any(share.noun_only is not None for share in groups),
    }


def _calibration_plots(found: Calibration) -> list[Plot]:
    plots = []
    if found.bins:
        points = [(entry.confidence, entry.value) for entry in found.bins]
        axes = ("confidence, %", "accuracy, %")
        curve = Curve("accuracy", points)
        plots.append(curve_plot("Reliability", axes, [curve], bins=found.bins, diagonal=True))
    kept = Curve("accuracy", list(zip(COVERAGES, found.selective, strict=True)))
    axes = ("most confident answers kept, %", "accuracy, %")
    return [*plots, curve_plot("Selective accuracy", axes, [kept])]


def _calibration_note(found: Calibration) -> str:
    """One sentence of numbers; says what is missing."""
    text = f"Mean confidence {percent(found.mean_confidence)} %, accuracy "
    text += f"{percent(found.accuracy)} % of {found.n} answers with a confidence"
    if found.ece is not None:
        text += f"; expected calibration error {percent(found.ece)} %"
    if found.without_confidence:
        text += f"; {found.without_confidence} answers have none"
    if found.outside_0_1:
        text += f"; {found.outside_0_1} lie outside 0..1, so they are no probabilities"
    return text + "."
