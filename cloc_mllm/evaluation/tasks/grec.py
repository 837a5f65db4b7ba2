"""Any number of boxes (GREC): a phrase names one thing, several together, or nothing that is there.
Of each record up to two phrases of one box, two of several and two of things of other records that
its texts do not mention. pr_at_f1_1: share of queries whose boxes are all right and no more, the
number that gRefCOCO's paper quotes (Precision@(F1=1, IoU>=0.5)); its script pairs boxes by GIoU,
which is pr_at_f1_1_giou. f1_at_0_5: mean F1. n_acc: share of absent things that are refused, with
no box and `not in the image`, other words of denial or an empty list; an answer that cannot be read
refuses nothing. t_acc: share of present things that get a box; false_refusals: that are refused.
After the slash, by kind: one, several, none."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from cloc_mllm.evaluation.queries import (
    ABSENT,
    PRESENT,
    Coverage,
    Query,
    QueryPair,
    QuerySet,
    pair,
)
from cloc_mllm.evaluation.rows.rows import Box, ScoredPair
from cloc_mllm.evaluation.scores.box_sets import f1
from cloc_mllm.evaluation.scores.by_kind import with_kinds
from cloc_mllm.evaluation.stats.bootstrap import QueryScores
from cloc_mllm.evaluation.tasks import EvalData, Scorer, Task
from cloc_mllm.evaluation.tasks.rejection import refuses

if TYPE_CHECKING:
    from cloc_mllm.data.conversations import Negative
    from cloc_mllm.data.records import Record

T = TypeVar("T")
TASK = "grec"
_PER_KIND = 2  # queries of each kind per record, at most


def score(pairs: Sequence[ScoredPair]) -> dict[str, QueryScores]:
    return with_kinds(pairs, _scores)


def is_failure(pair: ScoredPair) -> bool:
    """Neither boxes nor a refusal."""
    return not _boxes(pair) and not _is_refusal(pair)


def _boxes(pair: ScoredPair) -> list[Box]:
    return [] if pair.prediction.failure is not None else pair.prediction.boxes


def _is_refusal(pair: ScoredPair) -> bool:
    prediction = pair.prediction
    if _boxes(pair):
        return False
    return prediction.failure in ("not_there", "no_box") or refuses(prediction.raw_text)


def _scores(pairs: Sequence[ScoredPair]) -> dict[str, QueryScores]:
    image_ids = np.array([pair.reference.image_id for pair in pairs])
    absent = np.array([not pair.reference.boxes for pair in pairs])
    refused = np.array([_is_refusal(pair) for pair in pairs])
    boxed = np.array([bool(_boxes(pair)) for pair in pairs])
    f1_by_iou, f1_by_giou = (
        np.array(
            [0.0 if is_failure(p) else f1(_boxes(p), p.reference.boxes, giou=g) for p in pairs]
        )
        for g in (False, True)
    )
    everywhere = np.ones(len(pairs), dtype=bool)
    chosen = {
        "pr_at_f1_1": (f1_by_iou == 1, everywhere),
        "pr_at_f1_1_giou": (f1_by_giou == 1, everywhere),
        "f1_at_0_5": (f1_by_iou, everywhere),
        "n_acc": (refused, absent),
        "t_acc": (boxed, ~absent),
        "false_refusals": (refused, ~absent),
    }
    return {
        name: QueryScores(value[where].astype(float), list(image_ids[where]))
        for name, (value, where) in chosen.items()
        if where.any()
    }


SCORERS = {
    TASK: Scorer(
        "Any number of boxes (MLLM)",
        __doc__,
        "pr_at_f1_1",
        score,
        is_failure=is_failure,
        any_boxes=True,
        example_metric="f1_at_0_5",
    )
}


@dataclass
class Grec(Task):
    """The MLLM finds one, several or no boxes for phrases of the records.

    Args:
        refs: gRefCOCO's `grefs(unc).json`, whose sentences are asked in the place of phrases of the
            records; `--data` are then the records that `cloc-mllm data build refer` made of it.
        split: of `refs`: val, testA, testB or train.
    """

    refs: Path | None = None
    split: str = "val"

    def query_sets(self, data: EvalData) -> list[QuerySet]:
        """
        Raises:
            ValueError: `refs` holds no list of refs, or none of the split.
        """
        from cloc_mllm.data.conversations import negatives_of

        if self.refs is not None:
            pairs, coverage = grefcoco_pairs(self.refs, self.split, data.records)
            return [data.index.query_set(TASK, "boxes", "mllm", pairs, coverage=coverage)]
        negatives = negatives_of(data.records)
        asked = (found for record in data.records for found in grec_pairs(record, negatives))
        return [data.index.query_set(TASK, "boxes", "mllm", asked)]


def grec_pairs(record: Record, negatives: Sequence[Negative]) -> Iterator[QueryPair]:
    """Queries about a record, drawn by its id."""
    from cloc_mllm.data.conversations import absent_from, shared_texts, unambiguous_texts

    rng = np.random.default_rng(zlib.crc32(record.id.encode()))
    texts = unambiguous_texts(record)
    one = [(text, [r.box]) for r, of in zip(record.regions, texts, strict=True) for text in of]
    absent = absent_from(record, negatives)
    none: list[tuple[str, list[Box]]] = [
        (negative.texts[rng.integers(len(negative.texts))], []) for negative in _some(absent, rng)
    ]
    several = _some(list(shared_texts(record).items()), rng)
    for kind, phrases in (("one", _some(one, rng)), ("several", several), ("none", none)):
        for number, (text, boxes) in enumerate(phrases):
            query = Query(f"{TASK}/{record.id}/{kind}/{number}", record.id, TASK, text)
            label = PRESENT if boxes else ABSENT
            yield pair(query, boxes=boxes, labels=[label], kind=kind)


def grefcoco_pairs(
    path: Path, split: str, records: Sequence[Record]
) -> tuple[list[QueryPair], Coverage]:
    """A query per sentence of a split, and how many of the split that is.

    A sentence is left out where its photo is missing, or where not all of its boxes are in the
    record.
    """
    from cloc_mllm.data.readers.refer import has_no_target, read_refs, sentences
    from cloc_mllm.data.values import id_key

    refs = [ref for ref in read_refs(path) if isinstance(ref, dict) and ref.get("split") == split]
    if not refs:
        raise ValueError(f"{path} has no refs of the split {split!r}")
    by_id = {record.id: record for record in records}
    pairs: list[QueryPair] = []
    left_out: Counter[str] = Counter()
    for ref in refs:
        record = by_id.get(id_key(ref.get("image_id")) or "")
        texts = sentences(ref)
        num_true = 0 if has_no_target(ref) else len(ref["ann_id"])
        group = f"ref {ref.get('ref_id')}" if num_true > 1 else ""
        for number, text in enumerate(texts):
            regions = [r for r in record.regions if r.group == group] if record else []
            boxes = [r.box for r in regions if num_true and text in r.expressions]
            if record is None or len(boxes) != num_true:
                left_out["missing_image" if record is None else "missing_box"] += 1
                continue
            query = Query(f"{TASK}/{ref.get('ref_id')}/{number}", record.id, TASK, text)
            kind = "several" if num_true > 1 else "one" if num_true else "none"
            labels = [PRESENT if boxes else ABSENT]
            pairs.append(pair(query, boxes=boxes, labels=labels, kind=kind))
    num_declared = sum(len(sentences(ref)) for ref in refs)
    return pairs, Coverage(f"gRefCOCO {split}", num_declared, dict(left_out), unit="sentences")


def _some(found: list[T], rng: np.random.Generator) -> list[T]:
    places = rng.permutation(len(found))[:_PER_KIND]
    return [found[place] for place in places]
