"""The evaluation job: records -> predictions -> scores -> one report."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jsonargparse import ArgumentParser

from cloc_mllm import __version__
from cloc_mllm.data.compositional import generate_compositional
from cloc_mllm.data.parquet import load_records
from cloc_mllm.data.records import Record
from cloc_mllm.data.scenes import generate_scenes
from cloc_mllm.devices import choose_device
from cloc_mllm.evaluation.answers import answer_format
from cloc_mllm.evaluation.answers.rows import read_rows
from cloc_mllm.evaluation.config import EvalConfig
from cloc_mllm.evaluation.generate_cloc import Settings, predict_cloc
from cloc_mllm.evaluation.generate_hf import HfModel, check_prompt, predict_hf
from cloc_mllm.evaluation.generate_mllm import predict_mllm
from cloc_mllm.evaluation.paper_table import paper_tables
from cloc_mllm.evaluation.predictions import (
    PredictionRow,
    read_predictions,
    read_references,
    write_rows,
)
from cloc_mllm.evaluation.queries import MLLM_TASKS, TASKS, Benchmark, build_benchmark, row_tasks
from cloc_mllm.evaluation.region_benchmarks import (
    account_lines,
    add_region_benchmarks,
    check_declared,
    count_masks,
    declared_benchmark,
    predict_region_benchmarks,
)
from cloc_mllm.evaluation.report import write_report
from cloc_mllm.evaluation.resume import (
    append_rows,
    model_identity,
    queries_digest,
    resume_predictions,
)
from cloc_mllm.evaluation.scoring import compute_metrics, pairs_by_task
from cloc_mllm.evaluation.table import render_table
from cloc_mllm.inference.grounding_predictor import GroundingPredictor
from cloc_mllm.models.build import load_cloc
from cloc_mllm.shipped import shipped_directory

NUM_BUILT_IN_SCENES = 500
NUM_COMPOSITIONAL_SCENES = 300
COMPOSITIONAL = "compositional"
_PACKAGES = ("cloc-mllm", "torch", "transformers", "open_clip_torch", "numpy", "pillow")


def main(argv: Sequence[str] | None = None) -> int:
    """`cloc-mllm eval`: evaluate, print the table, say where the report is."""
    values = _parser().parse_args(argv)
    if values.list:
        print("\n".join(TASKS))
        return 0
    config = EvalConfig(**{item.name: values[item.name] for item in fields(EvalConfig)})
    metrics = evaluate(config)
    print(render_table(metrics))
    if skipped := metrics["about"]["skipped_tasks"]:
        print(f"left out, because the records hold nothing for them: {', '.join(skipped)}")
    for line in account_lines(metrics["about"]):
        print(line)
    print(f"report: {Path(config.output_dir) / 'report.html'}")
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="cloc-mllm eval",
        description="Predict, score and write a report. Tasks: " + ", ".join(TASKS) + ". "
        "`cloc-mllm eval compare A B` sets two finished evaluations side by side; "
        "`cloc-mllm eval benchmark --help`: RefCOCO, POPE and other benchmarks of the MLLM.",
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
    tasks = _tasks(config)
    row_tasks(tasks)  # a wrong name fails before any model is loaded
    declared = declared_benchmark(config.benchmark)
    device = choose_device(config.device)
    records = records_to_score(config.data, config.limit)
    bench = build_benchmark(records, tasks, declared.captions_per_image if declared else 0)
    account = add_region_benchmarks(bench, records, tasks, config)
    if declared:
        check_declared(config.benchmark, declared, records, bench)
    answered = {query.task for query in bench.queries}
    skipped = [task for task in row_tasks(tasks) if task not in answered]
    if not answered:
        raise ValueError(f"{config.data or 'the data'} holds nothing to ask for {', '.join(tasks)}")
    directory = Path(config.output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    job = _Job(config, records, bench, device)
    _make_rows(job, directory / "predictions.jsonl", config.cloc, answered)
    if config.baseline_cloc:
        by_cloc = answered - set(MLLM_TASKS)
        _make_rows(job, directory / "predictions_baseline.jsonl", config.baseline_cloc, by_cloc)
    write_rows(bench.references, directory / "references.jsonl")
    return _score(config, directory, records, {"skipped_tasks": skipped, **account})


def _tasks(config: EvalConfig) -> list[str]:
    """What is asked: `mllm` "none" answers nothing, `mllm_hf` only where things are."""
    if not config.mllm_hf:
        return [t for t in config.tasks if config.mllm != "none" or t not in MLLM_TASKS]
    if config.mllm:
        raise ValueError(f"give --mllm ({config.mllm}) or --mllm_hf ({config.mllm_hf}), not both")
    check_prompt(config.prompt)
    answer_format(config.format)  # a wrong name fails before the model answers anything
    return [task for task in config.tasks if task == "rec" or task not in MLLM_TASKS]


def records_to_score(data: str, limit: int = 0) -> Sequence[Record]:
    """The records of `data`; built-in test scenes for "", compositional ones for "compositional".

    At most `limit` of them if that is not 0.
    """
    if data == COMPOSITIONAL:
        return list(generate_compositional(limit or NUM_COMPOSITIONAL_SCENES))
    if not data:
        return list(generate_scenes(limit or NUM_BUILT_IN_SCENES, split="test"))
    records = load_records(data)
    return records[:limit] if limit else records


class _Job(NamedTuple):
    """What is asked of whom."""

    config: EvalConfig
    records: Sequence[Record]
    bench: Benchmark
    device: torch.device


def _make_rows(job: _Job, path: Path, cloc: str, tasks: set[str]) -> None:
    """Add the rows of the tasks that are not in the file yet."""
    config = job.config
    mllm = config.mllm_hf or config.mllm
    by_cloc, by_mllm = tasks - set(MLLM_TASKS), tasks & set(MLLM_TASKS)
    settings = {
        "version": __version__,
        "cloc": model_identity(cloc or shipped_directory("cloc")) if by_cloc else None,
        "mllm": model_identity(mllm or shipped_directory("mllm")) if by_mllm else None,
        "prompt": config.prompt,
        "data": config.data,
        "queries": queries_digest(job.bench.queries),
        "precision": config.precision,
        "region_prompt": config.region_prompt,
        "templates": config.templates,
        "class_names": job.bench.class_names,
    }
    finished = resume_predictions(path, settings, overwrite=config.overwrite)
    if finished:
        print(f"{len(finished)} answers are in {path} already; going on after them")
    append_rows(_predict_cloc(job, cloc, finished), path)
    if by_mllm:
        append_rows(_predict_mllm(job, finished), path)


def _predict_mllm(job: _Job, finished: set[str]) -> Iterator[PredictionRow]:
    queries = [query for task in MLLM_TASKS for query in job.bench.of_task(task)]
    if all(query.id in finished for query in queries):
        return
    config = job.config
    if config.mllm_hf:
        settings = Settings(config.mllm_hf, progress=True)
        other = HfModel.from_pretrained(config.mllm_hf, job.device)
        yield from predict_hf(other, job.records, job.bench, config.prompt, settings, finished)
        return
    predictor = GroundingPredictor.from_pretrained(config.mllm or None, device=job.device)
    settings = Settings(config.mllm or "shipped mllm", config.batch_size, progress=True)
    yield from predict_mllm(predictor, job.records, job.bench, settings, finished)


def _predict_cloc(job: _Job, directory: str, finished: set[str]) -> Iterator[PredictionRow]:
    """All at once: rankings need every image's features."""
    queries = [query for query in job.bench.queries if query.task not in MLLM_TASKS]
    if all(query.id in finished for query in queries):
        return
    config = job.config
    model, tokenizer, _ = load_cloc(directory or shipped_directory("cloc"), job.device)
    settings = Settings(
        directory or "shipped cloc",
        config.batch_size,
        config.precision,
        progress=True,
        region_prompt=config.region_prompt,
        templates=config.templates,
    )
    rows = predict_region_benchmarks(model, tokenizer, job.records, job.bench, settings)
    if {query.task for query in job.bench.queries} - {row.task for row in rows} - set(MLLM_TASKS):
        rows += predict_cloc(model, tokenizer, job.records, job.bench, settings)
    yield from (row for row in rows if row.id not in finished)


def _score(
    config: EvalConfig, directory: Path, records: Sequence[Record], account: dict[str, Any]
) -> dict[str, Any]:
    """Score what lies in the directory; writes `metrics.json`, `table.md` and `report.html`.

    Args:
        account: what was asked and what was left out, for `about`.
    """
    references = read_references(directory / "references.jsonl")
    pairs = pairs_by_task(read_predictions(directory / "predictions.jsonl"), references)
    if config.mllm_hf and "rec" in pairs:
        pairs["rec"] = read_rows(pairs["rec"], answer_format(config.format))
    baseline = None
    if config.baseline_cloc:
        baseline = pairs_by_task(
            read_predictions(directory / "predictions_baseline.jsonl"),
            [row for row in references if row.task not in MLLM_TASKS],
        )
    metrics = compute_metrics(pairs, baseline, samples=config.bootstrap_samples, seed=config.seed)
    if "true_box_mask" in pairs:
        account["true_boxes"]["mask_pooling"] = count_masks(pairs["true_box_mask"])
    metrics["about"] = {"num_records": len(records), **account, **_about(config)}
    (directory / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    (directory / "table.md").write_text(paper_tables(metrics), encoding="utf-8")
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


def _about(config: EvalConfig) -> dict[str, Any]:
    """Everything needed to make the numbers again."""
    return {
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
