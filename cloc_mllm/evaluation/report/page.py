"""`report.html` of one evaluation: numbers with intervals, and drawn examples of each task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from PIL import Image

from cloc_mllm.data.storage import write_whole
from cloc_mllm.evaluation.metrics import Evaluation
from cloc_mllm.evaluation.report import table
from cloc_mllm.evaluation.report.examples import (
    Example,
    choose_examples,
    confidences,
    legend,
    make_example,
)
from cloc_mllm.evaluation.report.plots import Curve, Plot, bar_plot, curve_plot
from cloc_mllm.evaluation.rows.rows import ScoredPair
from cloc_mllm.evaluation.stats.calibration import COVERAGES
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
    scorers = all_scorers()
    examples = {
        task: _examples(task, pairs[task], load_image, num_examples, seed)
        for task in evaluation.tasks
        if scorers[task].example_metric and num_examples > 0
    }
    tasks = evaluation.tasks.items()
    every_metric = [metric for _, entry in tasks for metric in entry.metrics.values()]
    page = render_page(
        "evaluation.html.j2",
        title="cloc-mllm evaluation",
        tasks=evaluation.tasks,
        columns=table.used_columns(every_metric),
        bars={task: _bars(entry.details) for task, entry in tasks if entry.details},
        curves={task: _curves(entry.details) for task, entry in tasks if entry.details},
        examples=examples,
        legends={task: legend(scorers[task]) for task in examples},
        about={**evaluation.about, "tasks": table.note_texts(evaluation.about)},
        table=table,
    )
    write_whole(path, page)


def _examples(
    task: str,
    pairs: Sequence[ScoredPair],
    load_image: LoadImage,
    num_examples: int,
    seed: int,
) -> dict[str, list[Example]]:
    scorer = all_scorers()[task]
    scores = scorer.score(pairs)[scorer.example_metric].values
    groups = choose_examples(scores, num_examples, seed, confidences(pairs))
    return {
        title: [
            make_example(scorer, pairs[i], load_image(task, pairs[i].reference.image_id))
            for i in indices
        ]
        for title, indices in groups.items()
    }


def _bars(details: BoxDetails) -> list[Plot]:
    return [bar_plot(f"Acc@0.5 by {name}", groups) for name, groups in details.breakdowns.items()]


def _curves(details: BoxDetails) -> list[Plot]:
    """Accuracy at each IoU; where answers have a confidence, reliability and selective accuracy."""
    curve = Curve("accuracy", list(zip(CURVE_THRESHOLDS, details.iou_curve, strict=True)))
    title = "Accuracy at each IoU threshold"
    plots = [curve_plot(title, ("IoU threshold, %", "accuracy, %"), [curve])]
    found = details.calibration
    if found and found.bins:
        curve = Curve("accuracy", [(entry.confidence, entry.value) for entry in found.bins])
        axes = ("confidence, %", "accuracy, %")
        plots.append(curve_plot("Reliability", axes, [curve], bins=found.bins, diagonal=True))
    if found:
        curve = Curve("accuracy", list(zip(COVERAGES, found.selective, strict=True)))
        axes = ("most confident answers kept, %", "accuracy, %")
        plots.append(curve_plot("Selective accuracy", axes, [curve]))
    return plots
