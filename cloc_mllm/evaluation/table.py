"""The result table, as Markdown that also reads well in a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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


def render_table(metrics: Mapping[str, Any]) -> str:
    """Markdown table of all metrics in percent, columns padded to equal width.

    Columns without any value (no baseline, no box task) are left out.
    """
    entries = [
        (task, metric, entry)
        for task, task_entries in metrics["tasks"].items()
        for metric, entry in task_entries.items()
    ]
    columns = used_columns([entry for _, _, entry in entries])
    rows = [
        [task, metric_title(metric), *(entry_cells(entry)[name] for name in columns)]
        for task, metric, entry in entries
    ]
    lines = aligned(["task", "metric", *columns], rows)
    lines += ["", "In percent, with 95 % intervals (bootstrap over images)."]
    lines += [failure_sentence(task, entry) for task, entry in metrics["failures"].items()]
    precision = metrics.get("average_precision", {})
    lines += [_average_precision_sentence(task, entry) for task, entry in precision.items()]
    return "\n".join(lines)


def metric_title(metric: str) -> str:
    """`acc_at_0_5/size` -> `Acc@0.5, size`."""
    name, _, kind = metric.partition("/")
    title = _METRIC_TITLES.get(name, name)
    if name.startswith("acc_at_"):
        title = "Acc@" + name.removeprefix("acc_at_").replace("_", ".")
    elif name.startswith("r_at_"):
        title = "R@" + name.removeprefix("r_at_")
    return f"{title}, {kind}" if kind else title


def entry_cells(entry: Mapping[str, Any]) -> dict[str, str]:
    """One metric as texts by column; "" where the metric has no such value."""
    baseline, difference = entry.get("baseline"), entry.get("difference")
    return {
        "score": with_interval(entry),
        "baseline model": with_interval(baseline) if baseline else "",
        "difference": with_interval(difference, sign="+") if difference else "",
        "chance": percent(entry["chance"]) if "chance" in entry else "",
        "whole image": percent(entry["whole_image"]) if "whole_image" in entry else "",
        "n": f"{entry['n']}",
        "images": f"{entry['n_images']}",
    }


def used_columns(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Columns of `entry_cells` that hold a text for at least one metric."""
    rows = [entry_cells(entry) for entry in entries]
    return [name for name in rows[0] if any(row[name] for row in rows)] if rows else []


def with_interval(entry: Mapping[str, Any], sign: str = "") -> str:
    low, high = percent(entry["ci_low"], sign), percent(entry["ci_high"], sign)
    return f"{percent(entry['value'], sign)} [{low}, {high}]"


def percent(value: float, sign: str = "") -> str:
    return f"{100 * value:{sign}.1f}"


def failure_sentence(task: str, entry: Mapping[str, Any]) -> str:
    """`rec: 3 of 900 answers could not be read (0.3 %), counted as wrong: no_box 3`."""
    text = f"{task}: {entry['count']} of {entry['n']} answers could not be read"
    text += f" ({percent(entry['rate'])} %), counted as wrong"
    reasons = ", ".join(f"{reason} {count}" for reason, count in entry["reasons"].items())
    return f"{text}: {reasons}." if reasons else f"{text}."


def _average_precision_sentence(task: str, entry: Mapping[str, Any]) -> str:
    if "left_out" in entry:
        return f"{task}: no average precision: {entry['left_out']}"
    return (
        f"{task}: AP {percent(entry['ap'])}, AP@0.5 {percent(entry['ap_50'])}, AP@0.75 "
        f"{percent(entry['ap_75'])}, answers by confidence, {entry['n_boxes']} true boxes."
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
