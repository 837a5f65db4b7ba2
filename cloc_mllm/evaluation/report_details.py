"""The part of the report behind a box task's accuracy: breakdowns, curves and calibration."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from cloc_mllm.evaluation.report_plots import Series, bar_plot, curve_plot
from cloc_mllm.evaluation.table import percent


def details_html(details: Mapping[str, Any]) -> str:
    """Plots of `details.box_details`, and below them the rules by which queries were grouped."""
    bars = "".join(
        bar_plot(f"Acc@0.5 by {name}", groups) for name, groups in details["breakdowns"].items()
    )
    curve = [(point["iou"], point["accuracy"]) for point in details["iou_curve"]]
    plots = [
        curve_plot(
            "Accuracy at each IoU threshold",
            ("IoU threshold, %", "accuracy, %"),
            [Series("accuracy", "first", curve)],
        )
    ]
    note = "No answer has a confidence, so there is no calibration."
    if found := details["calibration"]:
        plots += _calibration_plots(found)
        note = _calibration_note(found)
    rules = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(rule)}</dd>"
        for name, rule in details["rules"].items()
        if name in details["breakdowns"] or (name == "calibration" and found)
    )
    key = "Accuracy in percent (number of queries); lines are 95&nbsp;% intervals."
    if any("noun_only" in entry for entry in details["breakdowns"].get("kind", {}).values()):
        key += ' <span class="key tick"></span> picking any thing of the right kind.'
    return (
        f'<p>{key}</p><div class="plots">{bars}</div><div class="plots">{"".join(plots)}</div>'
        f"<p>{escape(note)}</p>"
        f"<details><summary>How queries are grouped</summary><dl>{rules}</dl></details>"
    )


def _calibration_plots(found: Mapping[str, Any]) -> list[str]:
    plots = []
    if found["bins"]:
        points = [(entry["confidence"], entry["value"]) for entry in found["bins"]]
        plots.append(
            curve_plot(
                "Reliability",
                ("confidence, %", "accuracy, %"),
                [Series("accuracy", "first", points)],
                bins=found["bins"],
                diagonal=True,
            )
        )
    kept = [(point["coverage"], point["accuracy"]) for point in found["selective"]]
    axes = ("most confident answers kept, %", "accuracy, %")
    return [*plots, curve_plot("Selective accuracy", axes, [Series("accuracy", "first", kept)])]


def _calibration_note(found: Mapping[str, Any]) -> str:
    """One sentence of numbers; says what is missing."""
    text = f"Mean confidence {percent(found['mean_confidence'])} %, accuracy "
    text += f"{percent(found['accuracy'])} % of {found['n']} answers with a confidence"
    if found["ece"] is not None:
        text += f"; expected calibration error {percent(found['ece'])} %"
    if found["without_confidence"]:
        text += f"; {found['without_confidence']} answers have none"
    if found["outside_0_1"]:
        text += f"; {found['outside_0_1']} lie outside 0..1, so they are no probabilities"
    return text + "."
