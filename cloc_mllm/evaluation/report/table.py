"""Result tables as Markdown that also reads well in a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cloc_mllm.evaluation.metrics import Evaluation, Failures, Metric
from cloc_mllm.evaluation.stats.average_precision import AveragePrecision
from cloc_mllm.evaluation.stats.bootstrap import Interval
from cloc_mllm.evaluation.stats.breakdown import GroupShare

_METRIC_TITLES = {
    "macro_acc": "macro accuracy",
    "micro_acc": "micro accuracy",
    "top5_acc": "top-5 accuracy",
    "merged_r_at_1": "R@1 of the merged box",
    "merged_r_at_5": "R@5 of the merged box",
    "merged_r_at_10": "R@10 of the merged box",
    "mean_iou": "mean IoU",
    "exact_match": "exact match",
    "word_f1": "word F1",
}
ROUNDING = "Rounded to one decimal of a percent."


def render_table(evaluation: Evaluation) -> str:
    """Markdown table of all metrics in percent, columns padded to equal width.

    Columns without any value (no baseline, no box task) are left out.
    """
    metrics = [
        (task, name, metric)
        for task, entry in evaluation.tasks.items()
        for name, metric in entry.metrics.items()
    ]
    columns = used_columns([metric for _, _, metric in metrics])
    rows = [
        [task, metric_title(name), *(metric_cells(metric)[column] for column in columns)]
        for task, name, metric in metrics
    ]
    lines = aligned(["task", "metric", *columns], rows)
    lines += ["", "In percent, with 95 % intervals (bootstrap over images)."]
    for task, entry in evaluation.tasks.items():
        if entry.failures is not None:
            lines.append(failure_sentence(task, entry.failures))
    for task, entry in evaluation.tasks.items():
        if entry.average_precision is not None:
            lines.append(_average_precision_sentence(task, entry.average_precision))
    return "\n".join(lines)


def paper_tables(evaluation: Evaluation) -> str:
    """Writes all metrics of one evaluation, then a table per breakdown of each box task."""
    parts = [f"{render_table(evaluation)}\n{ROUNDING}"]
    for task, entry in evaluation.tasks.items():
        if entry.details is not None:
            for name, groups in entry.details.breakdowns.items():
                parts.append(_breakdown(task, name, groups))
    return "\n\n".join(parts) + "\n"


def _breakdown(task: str, name: str, groups: Mapping[str, GroupShare]) -> str:
    noun_only = any(share.noun_only is not None for share in groups.values())
    columns = [name, "Acc@0.5", *["noun only"] * noun_only, "n", "images"]
    rows = []
    for group, share in groups.items():
        floor = "" if share.noun_only is None else percent(share.noun_only)
        cells = [group, with_interval(share), *[floor] * noun_only]
        rows.append([*cells, str(share.n), str(share.n_images)])
    return "\n".join([f"**{task}, by {name}**", "", *aligned(columns, rows)])


def metric_title(metric: str) -> str:
    """Names a metric for readers: `acc_at_0_5/size` is `Acc@0.5, size`."""
    name, _, kind = metric.partition("/")
    title = _METRIC_TITLES.get(name, name)
    if name.startswith("acc_at_"):
        title = "Acc@" + name.removeprefix("acc_at_").replace("_", ".")
    elif name.startswith("r_at_"):
        title = "R@" + name.removeprefix("r_at_")
    return f"{title}, {kind}" if kind else title


def metric_cells(metric: Metric) -> dict[str, str]:
    """Formats one metric by column; "" if it has no such value."""
    return {
        "score": with_interval(metric),
        "baseline model": with_interval(metric.baseline) if metric.baseline else "",
        "difference": with_interval(metric.difference, sign="+") if metric.difference else "",
        "chance": "" if metric.chance is None else percent(metric.chance),
        "whole image": "" if metric.whole_image is None else percent(metric.whole_image),
        "n": f"{metric.n}",
        "images": f"{metric.n_images}",
    }


def used_columns(metrics: Sequence[Metric]) -> list[str]:
    """Columns of `metric_cells` that hold a text for at least one metric."""
    rows = [metric_cells(metric) for metric in metrics]
    return [name for name in rows[0] if any(row[name] for row in rows)] if rows else []


def with_interval(interval: Interval, sign: str = "") -> str:
    low, high = percent(interval.ci_low, sign), percent(interval.ci_high, sign)
    return f"{percent(interval.value, sign)} [{low}, {high}]"


def percent(value: float, sign: str = "") -> str:
    return f"{100 * value:{sign}.1f}"


def failure_sentence(task: str, failures: Failures) -> str:
    """Writes `rec: 3 of 900 answers could not be read (0.3 %), counted as wrong: no_box 3`."""
    text = f"{task}: {failures.count} of {failures.n} answers could not be read"
    text += f" ({percent(failures.rate)} %), counted as wrong"
    reasons = ", ".join(f"{reason} {count}" for reason, count in failures.reasons.items())
    return f"{text}: {reasons}." if reasons else f"{text}."


def _average_precision_sentence(task: str, found: AveragePrecision | str) -> str:
    if isinstance(found, str):
        return f"{task}: no average precision: {found}"
    return (
        f"{task}: AP {percent(found.ap)}, AP@0.5 {percent(found.ap_50)}, AP@0.75 "
        f"{percent(found.ap_75)}, answers by confidence, {found.n_boxes} true boxes."
    )


def aligned(columns: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table whose columns have equal width; `|` in a text is escaped."""
    columns, *rows = ([text.replace("|", "\\|") for text in row] for row in [columns, *rows])
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    cells = [columns, ["-" * width for width in widths], *rows]
    return [
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]


def note_texts(about: Mapping[str, Any]) -> dict[str, str]:
    """Writes the notes of each task: `183 boxes; dropped: crowd 1; 80 classes`."""
    return {
        task: "; ".join(_note(name.replace("_", " "), notes[name]) for name in notes if notes[name])
        for task, notes in about.get("tasks", {}).items()
    }


def _note(name: str, value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{name}: {', '.join(f'{key} {count:,}' for key, count in value.items())}"
    return f"{value:,} {name}" if isinstance(value, int) else f"{name}: {value}"
