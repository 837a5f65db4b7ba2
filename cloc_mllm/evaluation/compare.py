"""Two finished evaluations side by side: paired differences, p-values, answers that differ.

Reads the rows that `cloc-mllm eval` wrote, or predictions of any tool; no model is loaded.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cloc_mllm.data.storage import write_whole
from cloc_mllm.evaluation.answers import answer_format
from cloc_mllm.evaluation.answers.rows import read_rows
from cloc_mllm.evaluation.metrics import Difference, difference, pairs_by_task
from cloc_mllm.evaluation.record_index import records_to_score
from cloc_mllm.evaluation.report.comparison import comparison_table, write_comparison_report
from cloc_mllm.evaluation.rows.files import read_predictions, read_references
from cloc_mllm.evaluation.rows.rows import ReferenceRow, ScoredPair
from cloc_mllm.evaluation.rows.sources import read_sources
from cloc_mllm.evaluation.score import (
    ScoreOptions,
    add_row_arguments,
    columns_argument,
    merged,
    options_of,
    unread_answers,
)
from cloc_mllm.evaluation.scores.boxes import answer_iou
from cloc_mllm.evaluation.stats.bootstrap import (
    DEFAULT,
    Bootstrap,
    Interval,
    QueryScores,
    bootstrap_interval,
)
from cloc_mllm.evaluation.stats.breakdown import group_rank, groups_of
from cloc_mllm.evaluation.tasks import (
    EvalData,
    all_scorers,
    build_task,
    row_task,
    scorers_of,
    task_name,
)

TaskPairs = dict[str, list[ScoredPair]]
LoadImage = Callable[[str, str], Image.Image | None]


@dataclass(frozen=True)
class Compared:
    """Both values of a metric, and the paired difference a - b with its tests."""

    a: Interval
    b: Interval
    difference: Difference


@dataclass(frozen=True)
class Comparison:
    """The content of `metrics.json` of a comparison.

    Args:
        models: the two directories; `names` are the models that answered there.
        only_in: tasks that only one of the two has, which are left out.
        tasks: task -> metric -> both values.
        breakdowns: of box tasks: task -> breakdown -> group -> both Acc@0.5.
    """

    models: tuple[str, str]
    names: list[list[str]]
    only_in: list[list[str]]
    tasks: dict[str, dict[str, Compared]]
    breakdowns: dict[str, dict[str, dict[str, Compared]]]
    bootstrap: Bootstrap


@dataclass(frozen=True)
class FilesCompared:
    """The options of A and B if they are files of predictions of any tool.

    Args:
        task: what was asked.
        references: file of the truth; "" if it is in the rows of the predictions.
        options: how the rows are read; `missing` as in `score`.
        columns_b: those of B; empty are those of A.
    """

    task: str = ""
    references: str = ""
    options: ScoreOptions = field(default_factory=ScoreOptions)
    columns_b: Mapping[str, str] = field(default_factory=dict)

    def of_b(self) -> FilesCompared:
        """The options for reading B."""
        reading = self.options.reading
        own = replace(reading, columns=self.columns_b or reading.columns)
        return replace(self, options=replace(self.options, reading=own))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `cloc-mllm eval compare A B`: writes the comparison and prints its table."""
    parser = ArgumentParser(
        prog="cloc-mllm eval compare",
        description="Set two evaluations of the same queries side by side.",
    )
    parser.add_argument("a", help="output directory of an evaluation, or a file of predictions")
    parser.add_argument("b", help="another one, on the same queries")
    parser.add_argument(
        "--output_dir", default="runs/compare", help="gets report, table and metrics"
    )
    parser.add_argument("--num_examples", type=int, default=6, help="of each kind; 0 is none")
    parser.add_argument("--task", default="", help="what was asked, where A or B is a file")
    parser.add_argument("--references", default="", help="the truth, where A or B is a file")
    add_row_arguments(parser)
    parser.add_argument("--format_b", default="", help="of B, where it is not that of A")
    parser.add_argument(
        "--columns_b", type=columns_argument, default={}, help="of B, where not those of A"
    )
    values = parser.parse_args(argv)
    options = options_of(values)
    comparison = compare(
        (values.a, values.b),
        values.output_dir,
        num_examples=values.num_examples,
        bootstrap=Bootstrap(options.bootstrap_samples, options.seed),
        formats=(values.format, values.format_b or values.format),
        files=FilesCompared(values.task, values.references, options, values.columns_b),
    )
    print(comparison_table(comparison), end="")
    for directory, tasks in zip(comparison.models, comparison.only_in, strict=True):
        if tasks:
            print(f"left out, because only {directory} has them: {', '.join(tasks)}")
    print(f"report: {Path(values.output_dir) / 'report.html'}")
    return 0


def compare(
    directories: tuple[str, str],
    out: str,
    *,
    num_examples: int = 6,
    bootstrap: Bootstrap = DEFAULT,
    formats: tuple[str, str] = ("", ""),
    files: FilesCompared | None = None,
) -> Comparison:
    """Writes `metrics.json`, `table.md` and `report.html` into `out`; returns what the first holds.

    Args:
        directories: of `cloc-mllm eval`, or files of predictions.
        formats: how A and B write boxes in `raw_text`, as in `score`; "" is the format that an
            evaluation was declared with.

    Raises:
        FileNotFoundError: a directory holds no predictions or references.
        ValueError: the two answered different queries, or have no task in common.
    """
    files = files or FilesCompared()
    configs = [_config(directory) for directory in directories]
    for name in {name for config in configs for name in map(task_name, config.get("tasks", []))}:
        scorers_of(name)  # those in files of their own are known from now on
    a = _read(directories[0], formats[0] or configs[0].get("format", ""), files)
    b = _read(directories[1], formats[1] or configs[1].get("format", ""), files.of_b())
    tasks = [task for task in a if task in b]
    if not tasks:
        raise ValueError(
            f"{directories[0]} has the tasks {list(a)}, {directories[1]} has {list(b)}: none in "
            "common; evaluate both with the same --tasks"
        )
    only_in = [[task for task in x if task not in y] for x, y in ((a, b), (b, a))]
    b = {task: _in_order_of(a[task], b[task], task, directories) for task in tasks}
    pairs = {task: (a[task], b[task]) for task in tasks}
    compared, breakdowns = _compared_tasks(pairs, bootstrap)
    names = [sorted({p.prediction.model for t in tasks for p in x[t]}) for x in (a, b)]
    comparison = Comparison(directories, names, only_in, compared, breakdowns, bootstrap)
    directory = Path(out)
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(directory / "metrics.json", json.dumps(asdict(comparison), indent=2) + "\n")
    write_whole(directory / "table.md", comparison_table(comparison))
    write_comparison_report(
        directory / "report.html",
        comparison,
        pairs,
        _image_loader(configs[0] if num_examples else {}),
        num_examples=num_examples,
    )
    return comparison


def _read(source: str, format_name: str, files: FilesCompared) -> TaskPairs:
    """The pairs of each task, with boxes; answers are read strictly."""
    found = _pairs_of_file(source, files) if Path(source).is_file() else _pairs_of_run(source)
    declared = answer_format(format_name) if format_name else None
    try:
        return {
            task: read_rows(pairs, declared, files.options.resized_size)
            if unread_answers(task, pairs, declared) and declared
            else pairs
            for task, pairs in found.items()
        }
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _pairs_of_file(path: str, files: FilesCompared) -> TaskPairs:
    if not files.task:
        raise ValueError(
            f"{path} is a file of predictions: say what was asked (--task rec) and where the truth "
            "is (--references; left out if it is in the same rows)"
        )
    task = row_task(files.task)
    rows = read_sources(task, path, files.references, files.options.reading)
    try:
        return {task: merged(rows, files.options.missing)[0]}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _pairs_of_run(directory: str) -> TaskPairs:
    rows = Path(directory)
    for name in ("predictions.jsonl", "references.jsonl"):
        if not (rows / name).is_file():
            raise FileNotFoundError(
                f"{rows / name} is missing; expected the output directory of `cloc-mllm eval`, or "
                "a file of predictions"
            )
    return pairs_by_task(
        read_predictions(rows / "predictions.jsonl"), read_references(rows / "references.jsonl")
    )


def _in_order_of(
    a: Sequence[ScoredPair], b: Sequence[ScoredPair], task: str, directories: tuple[str, str]
) -> list[ScoredPair]:
    """The pairs of B in the order of A's; both must be the same queries with the same truth."""
    by_id = {pair.reference.id: pair for pair in b}
    ids = [pair.reference.id for pair in a]
    if set(ids) != set(by_id):
        only = sorted(set(ids) ^ set(by_id))
        raise ValueError(
            f"{task}: {len(only)} queries are in only one of {directories[0]} and "
            f"{directories[1]}, e.g. {only[0]!r}; evaluate both on the same data and --limit"
        )
    for pair in a:
        if _truth(pair.reference) != _truth(by_id[pair.reference.id].reference):
            raise ValueError(
                f"{task}: query {pair.reference.id!r} has another image, box or label in "
                f"{directories[1]} than in {directories[0]}; evaluate both on the same data"
            )
    return [by_id[query_id] for query_id in ids]


def _truth(row: ReferenceRow) -> tuple[Any, ...]:
    return row.image_id, row.boxes, row.labels


def _compared_tasks(
    pairs: Mapping[str, tuple[Sequence[ScoredPair], Sequence[ScoredPair]]], bootstrap: Bootstrap
) -> tuple[dict[str, dict[str, Compared]], dict[str, dict[str, dict[str, Compared]]]]:
    """Compares each task: its metrics, and its breakdowns if its answers are boxes."""
    compared, breakdowns = {}, {}
    for task, (a, b) in pairs.items():
        scorer = all_scorers()[task]
        ours, theirs = scorer.score(a), scorer.score(b)
        compared[task] = {
            metric: _compared(ours[metric], theirs[metric], bootstrap)
            for metric in ours
            if metric in theirs
        }
        if scorer.one_box and all(pair.reference.boxes for pair in a):
            breakdowns[task] = _by_group(a, b, bootstrap)
    return compared, breakdowns


def _compared(a: QueryScores, b: QueryScores, bootstrap: Bootstrap) -> Compared:
    return Compared(
        bootstrap_interval(a, bootstrap),
        bootstrap_interval(b, bootstrap),
        difference(a, b, bootstrap),
    )


def _by_group(
    a: Sequence[ScoredPair], b: Sequence[ScoredPair], bootstrap: Bootstrap
) -> dict[str, dict[str, Compared]]:
    """Breakdown -> group -> the compared Acc@0.5 of its queries."""
    right = [(answer_iou(pairs) >= 0.5).astype(float) for pairs in (a, b)]
    image_ids = np.array([pair.reference.image_id for pair in a])
    found: dict[str, dict[str, Compared]] = {}
    for name, groups in groups_of([pair.reference for pair in a]).items():
        labels = np.array(groups)
        for group in sorted(set(groups), key=group_rank) if len(set(groups)) > 1 else ():
            chosen = labels == group
            ours, theirs = (QueryScores(r[chosen], image_ids[chosen].tolist()) for r in right)
            found.setdefault(name, {})[group] = _compared(ours, theirs, bootstrap)
    return found


def _config(directory: str) -> dict[str, Any]:
    """The settings of an evaluation; {} for rows that were made in another way."""
    path = Path(directory) / "metrics.json"
    metrics = json.loads(path.read_text()) if path.is_file() else {}
    return metrics.get("about", {}).get("config", {})


def _image_loader(config: Mapping[str, Any]) -> LoadImage:
    """Images that the evaluation asked about, by task and id; None for one that is not there."""
    data = EvalData(lambda: records_to_score(config["data"], config["limit"]))
    try:
        tasks = [build_task(entry) for entry in config["tasks"]]
        asked = {queries.task: queries for task in tasks for queries in task.query_sets(data)}
    except (OSError, KeyError):
        return lambda task, image_id: None  # the files that were asked about have gone

    def load_image(task: str, image_id: str) -> Image.Image | None:
        known = task in asked and image_id in asked[task].image_ids
        return asked[task].load_image(image_id) if known else None

    return load_image
