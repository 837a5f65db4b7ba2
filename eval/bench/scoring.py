"""Our scoring against lmms-eval's aggregation of the same RefCOCO answers.

    python eval/bench/scoring.py --output runs/bench/scoring.json

Needs `pip install --no-deps lmms-eval`.
"""

from __future__ import annotations

import importlib.util
import io
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from cloc_mllm.cli import run
from cloc_mllm.command_line import ArgumentParser
from cloc_mllm.evaluation.compat.lmms_eval import aggregate
from ratio import interleaved_ratio, machine_state, report, save_samples

PEER_FILE = "tasks/refcoco/utils_rec.py"
# our name of the number -> lmms-eval's function of it
_AGGREGATIONS = {
    "IoU": "refcoco_bbox_rec_iou",
    "ACC@0.1": "refcoco_bbox_rec_acc01",
    "ACC@0.3": "refcoco_bbox_rec_acc03",
    "ACC@0.5": "refcoco_bbox_rec_acc05",
    "ACC@0.7": "refcoco_bbox_rec_acc07",
    "ACC@0.9": "refcoco_bbox_rec_acc09",
    "Center_ACC": "refcoco_bbox_rec_center_acc",
}


def lmms_eval_module(file: str = PEER_FILE) -> ModuleType | None:
    """One file of an installed lmms-eval, loaded alone: its package imports dozens of others.

    None if lmms-eval is not installed.
    """
    package = importlib.util.find_spec("lmms_eval")
    if package is None or package.origin is None:
        return None
    spec = importlib.util.spec_from_file_location(
        "lmms_eval_peer", Path(package.origin).parent / file
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def random_results(num_rows: int, seed: int = 0) -> list[dict[str, list[float]]]:
    """Rows as lmms-eval aggregates them: `bbox` and `pred`, 0..1; a tenth of answers failed."""
    rng = np.random.default_rng(seed)
    truths = np.sort(rng.random((num_rows, 2, 2)), axis=1).reshape(-1, 4)
    answers = np.clip(truths + rng.normal(0, 0.05, truths.shape), 0, 1)
    answers[rng.random(num_rows) < 0.1] = 0
    rows = zip(truths.tolist(), answers.tolist(), strict=True)
    return [{"bbox": truth, "pred": answer} for truth, answer in rows]


def our_side(results: Sequence[dict[str, Any]]) -> Callable[[], dict[str, float]]:
    """All seven numbers, from the same rows."""

    def aggregate_rows() -> dict[str, float]:
        boxes = np.array([row["pred"] for row in results])
        truths = np.array([row["bbox"] for row in results])
        return aggregate(boxes, truths).metrics

    return aggregate_rows


def lmms_eval_side(
    results: Sequence[dict[str, Any]], peer: ModuleType
) -> Callable[[], dict[str, float]]:
    """All seven numbers of lmms-eval; what it prints is dropped."""
    functions = {name: getattr(peer, function) for name, function in _AGGREGATIONS.items()}

    def aggregate_rows() -> dict[str, float]:
        with redirect_stdout(io.StringIO()):
            return {name: function(results) for name, function in functions.items()}

    return aggregate_rows


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog="scoring", description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10834])
    parser.add_argument("--pairs", type=int, default=21)
    parser.add_argument("--output", default="runs/bench/scoring.json")
    args = parser.parse_args(argv)
    peer = lmms_eval_module()
    if peer is None:
        raise SystemExit("lmms-eval is not installed; run: pip install --no-deps lmms-eval")
    machine = machine_state()
    print("noisy machine:" if machine["noisy"] else "machine:", machine)
    samples = {}
    for num_rows in args.rows:
        results = random_results(num_rows)
        ours, theirs = our_side(results), lmms_eval_side(results, peer)
        assert ours() == theirs(), f"different numbers: {ours()} and {theirs()}"
        title = f"{num_rows} rows, seven numbers"
        samples[title] = interleaved_ratio(ours, theirs, pairs=args.pairs)
        print(report(title, samples[title]), f"-> {1 / samples[title].cpu.median:.1f}x faster")
        print("  the same on both sides:", ours())
        save_samples(args.output, machine, samples)


if __name__ == "__main__":
    sys.exit(run(main))
