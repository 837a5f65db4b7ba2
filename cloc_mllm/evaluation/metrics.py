"""Computes metrics from rows: every number with its interval, baselines and failures.

It reads rows alone and does not know which model made them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from cloc_mllm.evaluation.rows.rows import PredictionRow, ReferenceRow, ScoredPair, merge_by_id
from cloc_mllm.evaluation.stats.average_precision import AveragePrecision, average_precision
from cloc_mllm.evaluation.stats.bootstrap import (
    DEFAULT,
    Bootstrap,
    Interval,
    QueryScores,
    bootstrap_interval,
    difference_interval,
)
from cloc_mllm.evaluation.stats.details import BoxDetails, box_details
from cloc_mllm.evaluation.stats.paired import PairedTest, paired_test
from cloc_mllm.evaluation.tasks import Scorer, all_scorers


@dataclass(frozen=True)
class Difference(Interval, PairedTest):
    """Our value minus the other model's, on the same queries."""


@dataclass(frozen=True)
class Metric(Interval):
    """One number of a task, with what it is to be compared with.

    Args:
        chance, whole_image: what guessing, or the box of the whole image, scores.
        baseline, difference: another model's value, and ours minus that one.
    """

    chance: float | None = None
    whole_image: float | None = None
    baseline: Interval | None = None
    difference: Difference | None = None


@dataclass(frozen=True)
class Failures:
    """Answers that could not be read, `count` of `n`, and why."""

    count: int
    n: int
    reasons: dict[str, int]

    @property
    def rate(self) -> float:
        return self.count / self.n


@dataclass(frozen=True)
class TaskMetrics:
    """Everything that is known of the answers to one task.

    Args:
        title, protocol, main_metric: of its `Scorer`.
        metrics: by name; after a slash, of a part of the queries.
        failures: None where no answer can fail to be read.
        average_precision: where answers are boxes with a confidence; a text says why there is none.
        details: curves, breakdowns and calibration, where answers are boxes.
    """

    title: str
    protocol: str
    main_metric: str
    metrics: dict[str, Metric]
    failures: Failures | None = None
    average_precision: AveragePrecision | str | None = None
    details: BoxDetails | None = None


@dataclass
class Evaluation:
    """The content of `metrics.json`: the metrics of each task, and how they were made."""

    tasks: dict[str, TaskMetrics]
    about: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON values, without what is None."""
        return _without_none(asdict(self))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def pairs_by_task(
    predictions: Sequence[PredictionRow], references: Sequence[ReferenceRow]
) -> dict[str, list[ScoredPair]]:
    """Merged pairs of each task, tasks in the order they first occur in the references."""
    pairs: dict[str, list[ScoredPair]] = {}
    for pair in merge_by_id(predictions, references):
        pairs.setdefault(pair.reference.task, []).append(pair)
    known = all_scorers()
    if unknown := [task for task in pairs if task not in known]:
        raise ValueError(f"rows of unknown tasks {unknown}; expected some of {list(known)}")
    return pairs


def compute_metrics(
    pairs: Mapping[str, Sequence[ScoredPair]],
    baseline: Mapping[str, Sequence[ScoredPair]] | None = None,
    *,
    more_scores: Mapping[str, Mapping[str, QueryScores]] | None = None,
    bootstrap: Bootstrap = DEFAULT,
) -> Evaluation:
    """The metrics of each task.

    Args:
        pairs: answers of the model with their references, by task.
        baseline: answers of another model to the same queries; tasks it lacks are left empty.
        more_scores: further scores of the same queries, by task and metric.
    """
    scorers, tasks = all_scorers(), {}
    for task, own in pairs.items():
        scores = {**scorers[task].score(own), **(more_scores or {}).get(task, {})}
        tasks[task] = _task_metrics(
            scorers[task], scores, own, (baseline or {}).get(task, ()), bootstrap
        )
    return Evaluation(tasks)


def _task_metrics(
    scorer: Scorer,
    scores: Mapping[str, QueryScores],
    pairs: Sequence[ScoredPair],
    baseline: Sequence[ScoredPair],
    bootstrap: Bootstrap,
) -> TaskMetrics:
    references = [pair.reference for pair in pairs]
    chance = scorer.chance(references) if scorer.chance else {}
    whole_image = scorer.whole_image(references) if scorer.whole_image else {}
    theirs = scorer.score(baseline) if baseline else {}
    metrics = {}
    for name, ours in scores.items():
        other = theirs.get(name)
        metrics[name] = Metric(
            **asdict(bootstrap_interval(ours, bootstrap)),
            chance=chance.get(name),
            whole_image=whole_image.get(name),
            baseline=bootstrap_interval(other, bootstrap) if other else None,
            difference=difference(ours, other, bootstrap) if other else None,
        )
    has_details = scorer.one_box and all(reference.boxes for reference in references)
    return TaskMetrics(
        scorer.title,
        scorer.protocol,
        scorer.main_metric,
        metrics,
        failures=_failures(pairs, scorer.is_failure) if scorer.is_failure else None,
        average_precision=_average_precision(pairs) if scorer.one_box else None,
        details=box_details(pairs, bootstrap) if has_details else None,
    )


def difference(a: QueryScores, b: QueryScores, bootstrap: Bootstrap = DEFAULT) -> Difference:
    """The paired difference mean(a) - mean(b) with its interval and tests."""
    interval = difference_interval(a, b, bootstrap)
    return Difference(**asdict(interval), **asdict(paired_test(a, b, seed=bootstrap.seed)))


def _average_precision(pairs: Sequence[ScoredPair]) -> AveragePrecision | str | None:
    try:
        return average_precision(pairs)
    except (ModuleNotFoundError, ValueError) as error:
        return str(error)


def _failures(pairs: Sequence[ScoredPair], is_failure: Callable[[ScoredPair], bool]) -> Failures:
    failed = [pair.prediction for pair in pairs if is_failure(pair)]
    reasons = Counter(
        row.failure or ("unreadable" if row.raw_text.strip() else "empty_answer") for row in failed
    )
    return Failures(len(failed), len(pairs), dict(reasons.most_common()))
