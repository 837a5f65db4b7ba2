"""From rows to `metrics.json`: every metric with its interval, baselines and failures.

Reads rows only. Which model made them, and how, is not known here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cloc_mllm.evaluation import (
    average_precision,
    captioning,
    choice,
    grounding,
    judged,
    phrase_grounding,
    rec,
    referring,
    region_classification,
    rejection,
    retrieval,
    yes_no,
)
from cloc_mllm.evaluation.details import asks_for_a_box, box_details
from cloc_mllm.evaluation.paired import paired_test
from cloc_mllm.evaluation.predictions import (
    PredictionRow,
    ReferenceRow,
    ScoredPair,
    merge_by_id,
)
from cloc_mllm.evaluation.statistics import QueryScores, bootstrap_interval, difference_interval

Floors = Callable[[Sequence[ReferenceRow]], dict[str, float]]


@dataclass(frozen=True)
class Scorer:
    """How one row task is scored: `chance` and `whole_image` need no model, only the references."""

    title: str
    rule: str
    score: Callable[[Sequence[ScoredPair]], dict[str, QueryScores]]
    chance: Floors | None = None
    whole_image: Floors | None = None
    is_failure: Callable[[ScoredPair], bool] | None = None


def _retrieval(title: str) -> Scorer:
    return Scorer(title, retrieval.RULE, retrieval.score, retrieval.chance)


def _classification(title: str, rule: str = region_classification.RULE) -> Scorer:
    return Scorer(title, rule, region_classification.score, region_classification.chance)


SCORERS: dict[str, Scorer] = {
    "region_classification": _classification("Region classification"),
    "true_box_cloc": _classification("True boxes: CLOC's region encoder"),
    "true_box_roi_align": _classification("True boxes: RoI-Align of the tower's tokens"),
    "true_box_crop": _classification("True boxes: each crop as an image"),
    "true_box_mask": _classification("True boxes: tokens pooled under the mask"),
    "zero_shot_classification": _classification(
        "Zero-shot image classification", region_classification.ZERO_SHOT_RULE
    ),
    "phrase_grounding": Scorer(
        "Phrase grounding (Flickr30k Entities)",
        phrase_grounding.RULE,
        phrase_grounding.score,
        phrase_grounding.chance,
        phrase_grounding.whole_image,
        grounding.is_failure,
    ),
    "region_to_text": _retrieval("Region → text retrieval"),
    "text_to_region": _retrieval("Text → region retrieval"),
    "image_to_text": _retrieval("Image → text retrieval"),
    "text_to_image": _retrieval("Text → image retrieval"),
    "text_to_box": Scorer(
        "Text → box (CLOC's box head)",
        grounding.RULE,
        grounding.score,
        grounding.chance,
        grounding.whole_image,
        grounding.is_failure,
    ),
    "rec": Scorer(
        "Referring expression comprehension (MLLM)",
        rec.RULE,
        rec.score,
        grounding.chance,
        grounding.whole_image,
        grounding.is_failure,
    ),
    "referring": Scorer(
        "Referring: what is in this box (MLLM)",
        referring.RULE,
        referring.score,
        is_failure=referring.is_failure,
    ),
    "ref_lvis": Scorer(
        "RefLVIS: a A or a B (MLLM)",
        choice.RULE,
        choice.score,
        choice.chance,
        is_failure=choice.is_failure,
    ),
    "ferret_bench": Scorer("Ferret-Bench (MLLM)", judged.RULE, judged.score),
    "pope": Scorer("POPE (MLLM)", yes_no.RULE, yes_no.score, is_failure=yes_no.is_failure),
    "rejection": Scorer(
        "Not in the image", rejection.RULE, rejection.score, is_failure=rejection.is_failure
    ),
    "region_captioning": Scorer(
        "Region captioning (MLLM)",
        captioning.RULE,
        captioning.score,
        is_failure=captioning.is_failure,
    ),
}


def pairs_by_task(
    predictions: Sequence[PredictionRow], references: Sequence[ReferenceRow]
) -> dict[str, list[ScoredPair]]:
    """Merged pairs of each row task, tasks in the order they first occur in the references."""
    pairs: dict[str, list[ScoredPair]] = {}
    for pair in merge_by_id(predictions, references):
        pairs.setdefault(pair.reference.task, []).append(pair)
    unknown = [task for task in pairs if task not in SCORERS]
    if unknown:
        raise ValueError(f"rows of unknown tasks {unknown}; expected some of {list(SCORERS)}")
    return pairs


def compute_metrics(
    pairs: Mapping[str, Sequence[ScoredPair]],
    baseline: Mapping[str, Sequence[ScoredPair]] | None = None,
    *,
    samples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """`tasks` (task -> metric -> value, interval, counts, baselines), `failures`, `rules`; for
    the tasks whose answers are boxes `details` (see `box_details`), and `average_precision` where
    they have a confidence.

    Args:
        pairs: of the model, by task.
        baseline: of another model on the same queries; tasks it lacks are left empty.
    """
    metrics: dict[str, Any] = {
        name: {} for name in ("tasks", "details", "failures", "rules", "average_precision")
    }
    for task, task_pairs in pairs.items():
        scorer = SCORERS[task]
        baseline_pairs = (baseline or {}).get(task)
        entries = _with_intervals(scorer.score(task_pairs), samples, seed)
        if baseline_pairs:
            _add_baseline(entries, scorer, task_pairs, baseline_pairs, samples, seed)
        references = [pair.reference for pair in task_pairs]
        for name, floors in (("chance", scorer.chance), ("whole_image", scorer.whole_image)):
            for metric, value in (floors(references) if floors else {}).items():
                entries[metric][name] = value
        metrics["tasks"][task] = entries
        metrics["rules"][task] = scorer.rule
        if scorer.score in (grounding.score, rec.score) and (ap := _average_precision(task_pairs)):
            metrics["average_precision"][task] = ap
        if asks_for_a_box(list(entries), task_pairs):
            metrics["details"][task] = box_details(task_pairs, samples=samples, seed=seed)
        if scorer.is_failure:
            metrics["failures"][task] = _failures(task_pairs, scorer.is_failure)
    return metrics


def _with_intervals(
    scores: Mapping[str, QueryScores], samples: int, seed: int
) -> dict[str, dict[str, Any]]:
    return {
        metric: asdict(bootstrap_interval(values, samples=samples, seed=seed))
        for metric, values in scores.items()
    }


def _add_baseline(
    entries: dict[str, dict[str, Any]],
    scorer: Scorer,
    pairs: Sequence[ScoredPair],
    baseline_pairs: Sequence[ScoredPair],
    samples: int,
    seed: int,
) -> None:
    ours, theirs = scorer.score(pairs), scorer.score(baseline_pairs)
    for metric, entry in entries.items():
        entry["baseline"] = asdict(bootstrap_interval(theirs[metric], samples=samples, seed=seed))
        interval = difference_interval(ours[metric], theirs[metric], samples=samples, seed=seed)
        test = paired_test(ours[metric], theirs[metric], seed=seed)
        entry["difference"] = {**asdict(interval), **asdict(test)}


def _average_precision(pairs: Sequence[ScoredPair]) -> dict[str, Any] | None:
    """Of answers with a confidence; where it cannot be computed, why."""
    try:
        return average_precision.average_precision(pairs)
    except (ModuleNotFoundError, ValueError) as error:
        return {"left_out": str(error)}


def _failures(
    pairs: Sequence[ScoredPair], is_failure: Callable[[ScoredPair], bool]
) -> dict[str, Any]:
    """Answers that could not be read: how many, of how many, and why."""
    reasons = Counter(_failure_reason(pair) for pair in pairs if is_failure(pair))
    count = sum(reasons.values())
    return {
        "count": count,
        "n": len(pairs),
        "rate": count / len(pairs),
        "reasons": dict(reasons.most_common()),
    }


def _failure_reason(pair: ScoredPair) -> str:
    prediction = pair.prediction
    return prediction.failure or ("unreadable" if prediction.raw_text.strip() else "empty_answer")
