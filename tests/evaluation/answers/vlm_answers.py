"""Real answers of Qwen2.5-VL (VLM-R1's logs) with what their authors' scorer decided.

`python -m tests.evaluation.answers.vlm_answers` prints the tables of docs/how-to/score.md. The
files hold no image sizes: those of RefCOCO come from its annotations; RefGTA's are unknown, and
since IoU does not depend on the size that boxes are divided by, a large one stands in.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from cloc_mllm.evaluation.answers import FORMATS, Reading, read_lenient, read_strict
from cloc_mllm.evaluation.stats.overlap import paired_iou

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
FILES = sorted((DATA / "vlm-answers").glob("*.json"))
DECLARED = FORMATS["json-pixels"]
IN_THOUSANDTHS = "rec_results_refcocog_val_qwen2_5vl_3b_instruct_baseline"
_SPLITS = {"refcoco": "refcoco", "refcocog": "refcocog", "refcocop": "refcoco+"}
_UNKNOWN_SIZE = (4096.0, 4096.0)


@dataclass(frozen=True)
class Row:
    """One answer: boxes are xyxy in `frame` of the file (pixels, or thousandths in one file)."""

    index: int
    text: str
    truth: list[float]
    extracted: list[float]
    stored: bool
    size: tuple[float, float]
    frame: tuple[float, float]  # width and height of the frame that truth is in

    def iou_of_extracted(self) -> float:
        return float(paired_iou(np.array([self.extracted]), np.array([self.truth]))[0])

    def iou_of(self, reading: Reading) -> float:
        if reading.failure:
            return 0.0
        truth = np.array([self.truth]) / np.tile(self.frame, 2)
        return float(paired_iou(np.array(reading.boxes[:1]), truth)[0])

    def right(self, lenient: bool) -> bool:
        read = read_lenient if lenient else read_strict
        return self.iou_of(read(DECLARED, self.text, self.size)) > 0.5

    def reason(self) -> str:
        """Why our lenient reading may decide otherwise than the stored flag."""
        written = DECLARED.notation.found(self.text)
        thousandths = np.array(written[0]) / np.tile(self.size, 2) * 1000
        if np.abs(thousandths - self.extracted).max() < 1:
            if self.frame == self.size:
                return "theirs holds thousandths against pixels"
            return "theirs rounds to thousandths"
        if self.extracted in written[1:]:
            return "theirs takes the last box"
        if not DECLARED.coordinates.is_inside(written[0], self.size):
            return "cut at the image's edge"
        return "unexplained"


@cache
def load(path: Path) -> tuple[float, list[Row]]:
    """The file's stored accuracy in percent, and its rows."""
    content = json.loads(path.read_text())
    sizes = _sizes(_SPLITS.get(path.stem.split("_")[2], ""))
    rows = []
    for index, item in enumerate(content["results"]):
        expression = item["question"].partition("describes: ")[2].removesuffix(".")
        truth = [float(value) for value in item["ground_truth"]]
        thousandths = path.stem == IN_THOUSANDTHS
        size = _matching_size(sizes.get(expression.strip(), []), truth, thousandths)
        frame = (1000.0, 1000.0) if thousandths else size
        extracted = [float(value) for value in item["extracted_answer"]]
        text, stored = item["model_output"], bool(item["correct"])
        rows.append(Row(index, text, truth, extracted, stored, size, frame))
    return content["accuracy"], rows


@cache
def _sizes(split: str) -> dict[str, list[tuple[list[float], tuple[float, float]]]]:
    """By expression: true box in pixels and image size, from the RefCOCO annotations."""
    found = defaultdict(list)
    if split:
        for item in json.loads((DATA / "refcoco-mini" / f"{split}_val.json").read_text()):
            x, y, width, height = item["bbox"]
            size = (float(item["width"]), float(item["height"]))
            found[item["sents"].strip()].append(([x, y, x + width, y + height], size))
    return found


def _matching_size(
    candidates: list[tuple[list[float], tuple[float, float]]], truth: list[float], thousandths: bool
) -> tuple[float, float]:
    for box, size in candidates:
        scale = np.tile(size, 2) / 1000 if thousandths else np.ones(4)
        if np.abs(np.array(truth) * scale - box).max() < (2 if thousandths else 0.05):
            return size
    return _UNKNOWN_SIZE


def differences() -> Iterator[tuple[str, Row, bool, str]]:
    """Each row that the lenient reading decides otherwise, but those of the file whose stored
    accuracy is 0: file, row, our decision, reason."""
    for path in FILES:
        accuracy, rows = load(path)
        for row in rows if accuracy else []:
            right = row.right(lenient=True)
            if right != row.stored:
                yield path.stem, row, right, row.reason()


def _print_tables() -> None:
    print("| file | stored | strict | lenient | decided otherwise |\n|---|---|---|---|---|")
    for path in FILES:
        accuracy, rows = load(path)
        right = [np.array([row.right(lenient) for row in rows]) for lenient in (False, True)]
        other = int((right[1] != np.array([row.stored for row in rows])).sum())
        cells = " | ".join(f"{100 * values.mean():.1f}" for values in right)
        name = path.stem.removeprefix("rec_results_")
        print(f"| `{name}` | {accuracy:.1f} | {cells} | {other} |")
    print("\n| file | row | stored | ours | why |\n|---|---|---|---|---|")
    words = {True: "right", False: "wrong"}
    for name, row, right, reason in differences():
        name = name.removeprefix("rec_results_")
        print(f"| `{name}` | {row.index} | {words[row.stored]} | {words[right]} | {reason} |")


if __name__ == "__main__":
    _print_tables()
