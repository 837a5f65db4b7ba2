"""`table.md`: the tables of a report as Markdown, for papers and issues."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cloc_mllm.evaluation.table import (
    aligned,
    metric_title,
    percent,
    render_table,
    with_interval,
)

SIGNIFICANT = 0.05
_ROUNDING = "Rounded to one decimal of a percent."


def paper_tables(metrics: Mapping[str, Any]) -> str:
    """All metrics of one evaluation, then a table a breakdown of each box task."""
    parts = [f"{render_table(metrics)}\n{_ROUNDING}"]
    for task, details in metrics["details"].items():
        for name, groups in details["breakdowns"].items():
            parts.append(_breakdown(task, name, groups))
    return "\n\n".join(parts) + "\n"


def _breakdown(task: str, name: str, groups: Mapping[str, Mapping[str, Any]]) -> str:
    noun_only = any("noun_only" in entry for entry in groups.values())
    columns = [name, "Acc@0.5", *["noun only"] * noun_only, "n", "images"]
    rows = []
    for group, entry in groups.items():
        floor = percent(entry["noun_only"]) if "noun_only" in entry else ""
        cells = [group, with_interval(entry), *[floor] * noun_only]
        rows.append([*cells, str(entry["n"]), str(entry["n_images"])])
    return "\n".join([f"**{task}, by {name}**", "", *aligned(columns, rows)])


def comparison_table(comparison: Mapping[str, Any]) -> str:
    """Both models' metrics with their paired difference; the better one bold if p < 0.05."""
    rows = [
        [task, metric_title(metric), *comparison_cells(entry, bold="**{}**"), str(entry["a"]["n"])]
        for task, entries in comparison["tasks"].items()
        for metric, entry in entries.items()
    ]
    columns = ["task", "metric", "A", "B", "A - B", "p", "n"]
    notes = [
        f"A is {comparison['models'][0]}, B is {comparison['models'][1]}.",
        "In percent, with 95 % intervals (bootstrap over images); p of a sign-flip test over "
        f"images, not corrected for the number of rows; bold is better with p < {SIGNIFICANT}.",
        _ROUNDING,
    ]
    return "\n".join([*aligned(columns, rows), "", *notes]) + "\n"


def comparison_cells(entry: Mapping[str, Any], bold: str = "{}") -> Sequence[str]:
    """Texts of A, B, their difference and its p-value."""
    difference = entry["difference"]
    better = "a" if difference["value"] > 0 else "b"
    significant = difference["p_value"] < SIGNIFICANT
    models = [
        bold.format(with_interval(entry[name]))
        if significant and name == better
        else with_interval(entry[name])
        for name in ("a", "b")
    ]
    return [*models, with_interval(difference, sign="+"), p_text(difference["p_value"])]


def p_text(p_value: float) -> str:
    return "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"
