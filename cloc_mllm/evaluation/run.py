"""The one runner of all tasks: queries -> rows -> metrics -> report."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cloc_mllm import __version__
from cloc_mllm.data.storage import write_whole
from cloc_mllm.devices import choose_device
from cloc_mllm.evaluation.answers import answer_format
from cloc_mllm.evaluation.answers.rows import read_rows
from cloc_mllm.evaluation.config import EvalConfig
from cloc_mllm.evaluation.declared import check_declared, declared_benchmark
from cloc_mllm.evaluation.metrics import Evaluation, compute_metrics
from cloc_mllm.evaluation.predictors import Predictor
from cloc_mllm.evaluation.predictors.cloc import ClocRows, ClocSettings
from cloc_mllm.evaluation.predictors.mllm import MllmRows
from cloc_mllm.evaluation.predictors.transformers import TransformersRows, check_prompt
from cloc_mllm.evaluation.queries import QuerySet, queries_digest
from cloc_mllm.evaluation.record_index import COMPOSITIONAL, records_to_score
from cloc_mllm.evaluation.report.page import write_report
from cloc_mllm.evaluation.report.table import paper_tables
from cloc_mllm.evaluation.rows.files import read_predictions, write_rows
from cloc_mllm.evaluation.rows.resume import resume_predictions
from cloc_mllm.evaluation.rows.rows import PredictionRow, ScoredPair, merge_by_id
from cloc_mllm.evaluation.stats.bootstrap import Bootstrap
from cloc_mllm.evaluation.tasks import EvalData, Task, build_task
from cloc_mllm.shipped import DEFAULT_MODELS, say_what_it_knows

_PACKAGES = ("cloc-mllm", "torch", "transformers", "open_clip_torch", "numpy", "pillow")


class TaskQueries(NamedTuple):
    """A set of queries and the task that asks them."""

    task: Task
    queries: QuerySet


def evaluate(config: EvalConfig) -> Evaluation | None:
    """Runs the tasks; writes into `config.output_dir` and returns what `metrics.json` holds.

    None if every task leaves its answers unscored (Ferret-Bench without a judge).

    Raises:
        ValueError: settings that cannot be, data that holds nothing for any task, or a part of a
            benchmark that is not allowed to be one.
        ModuleNotFoundError: a package of the `eval` extra is missing.
    """
    for name, least in (("limit", 0), ("batch_size", 1)):
        if getattr(config, name) < least:
            raise ValueError(f"{name}: expected {least} or more, got {getattr(config, name)}")
    tasks = [build_task(entry) for entry in config.tasks]
    config = replace(config, cloc=config.cloc or _fitting_cloc(config, tasks))
    device = choose_device(config.device)
    declared = declared_benchmark(config.benchmark)
    data = EvalData(
        lambda: records_to_score(config.data, config.limit),
        declared.captions_per_image if declared else 0,
    )
    predictors = _predictors(config, device)
    asked, skipped = _ask(config, tasks, data, predictors)
    query_sets = [queries for _, queries in asked]
    _check(config, query_sets)
    _say_what_models_know(config, {asked.answered_by for asked in query_sets})
    if declared:
        check_declared(config.benchmark, declared, data.records, query_sets)
    directory = Path(config.output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    rows = _complete(config, query_sets, predictors, directory / "predictions.jsonl")
    baseline = _baseline_pairs(config, query_sets, device, directory)
    write_rows((row for q in query_sets for row in q.references), directory / "references.jsonl")
    pairs = {}
    for task, queries in asked:
        reviewed = task.review(queries, rows[queries.task], directory)
        if reviewed is not None:
            pairs[queries.task] = merge_by_id(reviewed, queries.references)
    if not pairs:
        return None
    asked = [entry for entry in asked if entry.queries.task in pairs]
    about: dict[str, Any] = {"skipped_tasks": skipped}
    if any(task.reads_records for task in tasks):
        about["num_records"] = len(data.records)
    return _score(config, asked, pairs, baseline, about)


def _check(config: EvalConfig, query_sets: Sequence[QuerySet]) -> None:
    """Refuses what would fail only after the models have answered."""
    importlib.import_module("matplotlib")  # draws the report
    if config.mllm_hf and config.mllm:
        raise ValueError(f"give --mllm ({config.mllm}) or --mllm_hf ({config.mllm_hf}), not both")
    if any(_asks_other_mllm_for_boxes(config, asked) for asked in query_sets):
        check_prompt(config.prompt)
        answer_format(config.format)


def _fitting_cloc(config: EvalConfig, tasks: Sequence[Task]) -> str:
    """The shipped CLOC that knows what the tasks ask about: drawings, or photos."""
    built_in = _is_built_in(config) and any(task.reads_records for task in tasks)
    return "scenes" if built_in else "photos"


def _is_built_in(config: EvalConfig) -> bool:
    return config.data in ("", COMPOSITIONAL)


def _say_what_models_know(config: EvalConfig, answering: set[str]) -> None:
    """Says on standard error what the shipped models of a run know, and which nobody named."""
    options: dict[str, str] = {}
    if "cloc" in answering:
        options |= {config.baseline_cloc: "--baseline_cloc", config.cloc: "--cloc"}
    if "mllm" in answering and not config.mllm_hf:
        mllm = config.mllm or DEFAULT_MODELS["mllm"]
        if not config.mllm and not _is_built_in(config):
            print(f"no --mllm was given: {mllm} is the language model", file=sys.stderr)
        options[mllm] = "--mllm"
    for name, option in options.items():
        say_what_it_knows(name, option)


def _predictors(config: EvalConfig, device: torch.device) -> dict[str, Predictor]:
    """Who answers, in this order."""
    predictors: dict[str, Predictor] = {"cloc": _cloc(config, config.cloc, device)}
    if config.mllm_hf:
        predictors["mllm"] = TransformersRows(config.mllm_hf, device, config.prompt)
    elif config.mllm != "none":
        predictors["mllm"] = MllmRows(
            config.mllm, device, config.batch_size, config.wordings, config.dtype
        )
    return predictors


def _cloc(config: EvalConfig, directory: str, device: torch.device) -> ClocRows:
    settings = ClocSettings(
        directory,
        config.batch_size,
        config.precision,
        progress=True,
        region_prompt=config.region_prompt,
        templates=config.templates,
    )
    return ClocRows(directory, device, settings)


def _ask(
    config: EvalConfig,
    tasks: Sequence[Task],
    data: EvalData,
    predictors: Mapping[str, Predictor],
) -> tuple[list[TaskQueries], list[str]]:
    """Collects the queries, and the row tasks without any query or without a model to answer."""
    asked: dict[str, TaskQueries] = {}
    skipped = []
    for task in tasks:
        for queries in task.query_sets(data):
            queries = queries.limited(config.limit)
            queries.check_coverage(allow_partial=config.allow_partial or config.limit > 0)
            predictor = predictors.get(queries.answered_by)
            if not queries.queries or predictor is None or not predictor.can_answer(queries):
                skipped.append(queries.task)
            elif queries.task in asked:
                raise ValueError(
                    f"two tasks of this run both give rows of {queries.task!r}; run them one by one"
                )
            else:
                asked[queries.task] = TaskQueries(task, queries)
    if not asked:
        raise ValueError(
            f"{config.data or 'the data'} holds nothing to ask for {', '.join(skipped)} that a "
            "model of this run answers"
        )
    return list(asked.values()), skipped


def _complete(
    config: EvalConfig,
    query_sets: Sequence[QuerySet],
    predictors: Mapping[str, Predictor],
    path: Path,
) -> dict[str, list[PredictionRow]]:
    """Rows of all queries, by task: those that are in the file, and the others, added to it."""
    settings = {"version": __version__, "data": config.data, "queries": queries_digest(query_sets)}
    by_model = {
        model: [asked for asked in query_sets if asked.answered_by == name]
        for name, model in predictors.items()
    }
    for model, own in by_model.items():
        settings |= model.identity() if own else {}
    finished = resume_predictions(path, settings, overwrite=config.overwrite)
    if finished:
        print(f"{len(finished)} answers are in {path} already; going on after them")
    for model, own in by_model.items():
        if any(query.id not in finished for asked in own for query in asked.queries):
            write_rows(model.rows(own, finished), path, append=True)
    rows: dict[str, list[PredictionRow]] = {asked.task: [] for asked in query_sets}
    references = [reference for asked in query_sets for reference in asked.references]
    for pair in merge_by_id(read_predictions(path), references):
        rows[pair.reference.task].append(pair.prediction)
    return rows


def _baseline_pairs(
    config: EvalConfig, query_sets: Sequence[QuerySet], device: torch.device, directory: Path
) -> dict[str, list[ScoredPair]]:
    """Answers of the other CLOC model to what CLOC is asked."""
    by_cloc = [asked for asked in query_sets if asked.answered_by == "cloc"]
    if not config.baseline_cloc or not by_cloc:
        return {}
    predictor = {"cloc": _cloc(config, config.baseline_cloc, device)}
    rows = _complete(config, by_cloc, predictor, directory / "predictions_baseline.jsonl")
    return {asked.task: merge_by_id(rows[asked.task], asked.references) for asked in by_cloc}


def _score(
    config: EvalConfig,
    asked: Sequence[TaskQueries],
    pairs: dict[str, list[ScoredPair]],
    baseline: Mapping[str, Sequence[ScoredPair]],
    about: dict[str, Any],
) -> Evaluation:
    """Scores the rows; writes `metrics.json`, `table.md` and `report.html`."""
    for _, queries in asked:
        if _asks_other_mllm_for_boxes(config, queries):
            pairs[queries.task] = read_rows(pairs[queries.task], answer_format(config.format))
    more = {queries.task: task.more_scores(pairs[queries.task]) for task, queries in asked}
    evaluation = compute_metrics(
        pairs,
        baseline,
        more_scores={task: scores for task, (scores, _) in more.items()},
        bootstrap=Bootstrap(config.bootstrap_samples, config.seed),
    )
    notes = {q.task: {**_coverage(q), **q.notes, **more[q.task][1]} for _, q in asked}
    evaluation.about = {
        **about,
        "tasks": {task: note for task, note in notes.items() if note},
        "config": asdict(config),
        "versions": {"python": platform.python_version(), **{p: _version(p) for p in _PACKAGES}},
    }
    directory = Path(config.output_dir)
    numbers = json.dumps(evaluation.to_dict(), indent=2, default=str)
    write_whole(directory / "metrics.json", numbers + "\n")
    write_whole(directory / "table.md", paper_tables(evaluation))
    query_sets = {queries.task: queries for _, queries in asked}
    write_report(
        directory / "report.html",
        evaluation,
        pairs,
        lambda task, image_id: query_sets[task].load_image(image_id),
        num_examples=config.num_examples,
        seed=config.seed,
    )
    return evaluation


def _asks_other_mllm_for_boxes(config: EvalConfig, asked: QuerySet) -> bool:
    return bool(config.mllm_hf) and asked.answered_by == "mllm" and asked.answer in ("box", "boxes")


def _coverage(asked: QuerySet) -> dict[str, Any]:
    found = asked.coverage
    return {"benchmark": found.name, "asked": str(found)} if found else {}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
