"""The evaluation job: records -> predictions -> scores -> one report."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser

from cloc_mllm.config import EvalConfig
from cloc_mllm.data.parquet import load_records
from cloc_mllm.data.records import Record
from cloc_mllm.data.scenes import generate_scenes
from cloc_mllm.evaluation.generate_cloc import Settings, predict_cloc
from cloc_mllm.evaluation.generate_mllm import predict_mllm
from cloc_mllm.evaluation.predictions import (
    PredictionRow,
    read_predictions,
    read_references,
    write_rows,
)
from cloc_mllm.evaluation.queries import MLLM_TASKS, TASKS, Benchmark, build_benchmark, row_tasks
from cloc_mllm.evaluation.report import write_report
from cloc_mllm.evaluation.scoring import compute_metrics, pairs_by_task
from cloc_mllm.evaluation.table import render_table
from cloc_mllm.inference.grounding_predictor import GroundingPredictor
from cloc_mllm.models.build import load_cloc
from cloc_mllm.shipped import shipped_directory

NUM_BUILT_IN_SCENES = 500
_PACKAGES = ("cloc-mllm", "torch", "transformers", "open_clip_torch", "numpy", "pillow")


def main(argv: Sequence[str] | None = None) -> int:
    """`cloc-mllm eval`: evaluate, print the table, say where the report is."""
    parser = _parser()
    values = parser.parse_args(argv)
    if values.list:
        print("\n".join(TASKS))
        return 0
    config = EvalConfig(**{item.name: values[item.name] for item in fields(EvalConfig)})
    metrics = evaluate(config)
    print(render_table(metrics))
    if skipped := metrics["about"]["skipped_tasks"]:
        print(f"left out, because the records hold nothing for them: {', '.join(skipped)}")
    print(f"report: {Path(config.output_dir) / 'report.html'}")
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="cloc-mllm eval",
        description="Predict, score and write a report. Tasks: " + ", ".join(TASKS) + ".",
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these settings")
    parser.add_argument("--list", action="store_true", help="print the tasks, one a line, and stop")
    parser.add_class_arguments(EvalConfig)
    return parser


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Run the job; writes into `config.output_dir` and returns what `metrics.json` holds.

    Raises:
        ValueError: an unknown task or device, or records that hold nothing for any task.
    """
    tasks = [task for task in config.tasks if config.mllm != "none" or task not in MLLM_TASKS]
    row_tasks(tasks)  # a wrong name fails before any model is loaded
    device = choose_device(config.device)
    records = records_to_score(config.data, config.limit)
    bench = build_benchmark(records, tasks)
    answered = {query.task for query in bench.queries}
    skipped = [task for task in row_tasks(tasks) if task not in answered]
    if not answered:
        raise ValueError(f"{config.data or 'the data'} holds nothing to ask for {', '.join(tasks)}")
    directory = Path(config.output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    write_rows(bench.references, directory / "references.jsonl")
    write_rows(_predict(config, records, bench, device), directory / "predictions.jsonl")
    if config.baseline_cloc:
        rows = _predict_cloc(config, config.baseline_cloc, records, bench, device)
        write_rows(rows, directory / "predictions_baseline.jsonl")
    return _score(config, directory, records, skipped)


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU; anything else is torch's name for it."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"unknown device {name!r}; expected auto, cpu, cuda or cuda:N") from error


def records_to_score(data: str, limit: int = 0) -> Sequence[Record]:
    """The records of `data`, or built-in test scenes for ""; at most `limit` if that is not 0."""
    if not data:
        return list(generate_scenes(limit or NUM_BUILT_IN_SCENES, split="test"))
    records = load_records(data)
    return records[:limit] if limit else records


def _predict(
    config: EvalConfig, records: Sequence[Record], bench: Benchmark, device: torch.device
) -> list[PredictionRow]:
    asked = {query.task for query in bench.queries}
    rows: list[PredictionRow] = []
    if asked - set(MLLM_TASKS):
        rows += _predict_cloc(config, config.cloc, records, bench, device)
    if asked & set(MLLM_TASKS):
        predictor = GroundingPredictor.from_pretrained(config.mllm or None, device=device)
        settings = Settings(config.mllm or "shipped mllm", config.batch_size, progress=True)
        rows += predict_mllm(predictor, records, bench, settings)
    return rows


def _predict_cloc(
    config: EvalConfig,
    directory: str,
    records: Sequence[Record],
    bench: Benchmark,
    device: torch.device,
) -> list[PredictionRow]:
    model, tokenizer, _ = load_cloc(directory or shipped_directory("cloc"), device)
    settings = Settings(
        directory or "shipped cloc",
        config.batch_size,
        config.precision,
        progress=True,
        region_prompt=config.region_prompt,
    )
    return predict_cloc(model, tokenizer, records, bench, settings)


def _score(
    config: EvalConfig, directory: Path, records: Sequence[Record], skipped: Sequence[str]
) -> dict[str, Any]:
    """Score what lies in the directory; writes `metrics.json` and `report.html`."""
    references = read_references(directory / "references.jsonl")
    pairs = pairs_by_task(read_predictions(directory / "predictions.jsonl"), references)
    baseline = None
    if config.baseline_cloc:
        baseline = pairs_by_task(
            read_predictions(directory / "predictions_baseline.jsonl"),
            [row for row in references if row.task not in MLLM_TASKS],
        )
    metrics = compute_metrics(pairs, baseline, samples=config.bootstrap_samples, seed=config.seed)
    metrics["about"] = _about(config, records, skipped)
    (directory / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    position = {records[index].id: index for index in range(len(records))}
    write_report(
        directory / "report.html",
        metrics,
        pairs,
        lambda image_id: records[position[image_id]].load_image(),
        num_examples=config.num_examples,
        seed=config.seed,
    )
    return metrics


def _about(config: EvalConfig, records: Sequence[Record], skipped: Sequence[str]) -> dict[str, Any]:
    """Everything needed to make the numbers again."""
    return {
        "num_records": len(records),
        "skipped_tasks": list(skipped),
        "config": asdict(config),
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in _PACKAGES},
        },
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
