"""Draws the ablation as one picture: one panel per metric, one line per arm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cloc_mllm.ablation.cells import METRICS
from cloc_mllm.ablation.summary import Row, title


def draw_figure(rows: Sequence[Row], path: Path) -> None:
    """Writes a PNG with each arm's mean and 95 % interval; the dotted line is the reference arm."""
    from matplotlib.figure import Figure

    tasks = [task for task in METRICS if any(task in row.scores for row in rows)]
    figure = Figure(figsize=(2.4 * len(tasks) + 2, 0.3 * len(rows) + 1.2), layout="constrained")
    panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    places = range(len(rows), 0, -1)
    for panel, task in zip(panels, tasks, strict=True):
        for place, row in zip(places, rows, strict=True):
            score = row.scores[task]
            is_reference = not row.arm.against
            colour = "#c0392b" if is_reference else "#1f5f99"
            panel.plot([100 * score.low, 100 * score.high], [place] * 2, color=colour)
            panel.plot(100 * score.value, place, "o", color=colour, markersize=4)
            if is_reference:
                panel.axvline(100 * score.value, color=colour, linestyle=":", linewidth=1)
        panel.set_title(title(task), fontsize=9)
        panel.grid(axis="x", alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(list(places), [row.arm.name for row in rows], fontsize=8)
    figure.supxlabel("percent", fontsize=9)
    figure.savefig(path, dpi=150)
