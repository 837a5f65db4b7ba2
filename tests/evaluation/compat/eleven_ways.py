"""One right box, written in eleven ways, and what each scorer makes of it."""

from __future__ import annotations

import numpy as np

from cloc_mllm.evaluation.answers import Reading, answer_format, read_lenient, read_strict
from cloc_mllm.evaluation.compat import COMPATS, BoxAnswers
from cloc_mllm.evaluation.stats.overlap import paired_iou

SIZE = (640.0, 480.0)
TRUTH = (0.2, 0.2, 0.5, 0.75)
GUESSES = ", ".join(f"[{i}0, {i}0, {i}9, {i}9]" for i in range(1, 6)) + ", [200, 200, 500, 750]"

# what is written, its text, the declared format, and IoU by our strict and lenient reading, then
# by each of COMPATS
ELEVEN_WAYS = [
    ("fractions", "[0.2, 0.2, 0.5, 0.75]", "0-1", [1, 1, 1, 0, 1, 1, 0]),
    ("thousandths", "[200, 200, 500, 750]", "0-1000", [1, 1, 0, 1, 1, 1, 1]),
    (
        "Qwen2-VL",
        "<|box_start|>(200,200),(500,750)<|box_end|>",
        "qwen2-vl",
        [1, 1, 0, 0, 1, 0, 0],
    ),
    ("InternVL", "<box>[[200, 200, 500, 750]]</box>", "internvl", [1, 1, 0, 1, 1, 1, 0]),
    ("pixels", "[128, 96, 320, 360]", "pixels", [1, 1, 0, 1, 0.10, 0.10, 0.10]),
    (
        "Qwen2.5-VL",
        '[{"bbox_2d": [128, 96, 320, 360], "label": "the crab"}]',
        "qwen2.5-vl",
        [1, 1, 0, 1, 0.10, 0, 0],
    ),
    (
        "Qwen3-VL",
        '[{"bbox_2d": [200, 200, 500, 750], "label": "the crab"}]',
        "qwen3-vl",
        [1, 1, 0, 1, 1, 0, 0],
    ),
    (
        "PaliGemma",
        "<loc0205><loc0205><loc0768><loc0512> the crab",
        "paligemma",
        [1, 1, 0, 0, 0.37, 0, 0],
    ),
    (
        "Florence-2",
        "the crab<loc_200><loc_200><loc_500><loc_750>",
        "florence-2",
        [0.99, 0.99, 0, 0, 1, 0, 0],
    ),
    ("corners swapped", "[500, 750, 200, 200]", "0-1000", [0, 1, 0, 0, 1, 0, 0]),
    ("six guesses, last right", GUESSES, "0-1000", [0, 0, 0, 1, 0, 0, 0]),
]
COLUMNS = ["strict", "lenient", *COMPATS]


def ious(text: str, format_name: str) -> list[float]:
    """IoU of one answer, by column."""
    declared = answer_format(format_name)
    ours = [_iou(read(declared, text, SIZE)) for read in (read_strict, read_lenient)]
    given = BoxAnswers([text], np.array([TRUTH]), np.array([SIZE]))
    return ours + [float(score(given).iou[0]) for score in COMPATS.values()]


def _iou(reading: Reading) -> float:
    if reading.failure:
        return 0.0
    return float(paired_iou(np.array(reading.boxes[:1]), np.array([TRUTH]))[0])


def table() -> str:
    """The table of docs/how-to/score.md."""
    lines = ["| written as | declared | " + " | ".join(COLUMNS) + " |"]
    lines.append("|---" * (len(COLUMNS) + 2) + "|")
    for name, text, format_name, _ in ELEVEN_WAYS:
        cells = [f"{value:.2f}" for value in ious(text, format_name)]
        lines.append(f"| {name} | `{format_name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
