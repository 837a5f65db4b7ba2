"""Scores of all queries, then of each kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cloc_mllm.evaluation.rows.rows import ScoredPair
from cloc_mllm.evaluation.stats.bootstrap import QueryScores


def with_kinds(
    pairs: Sequence[ScoredPair],
    scores_of: Callable[[Sequence[ScoredPair]], dict[str, QueryScores]],
) -> dict[str, QueryScores]:
    """`scores_of(pairs)` and, if the references are of several kinds, `METRIC/KIND` of each; a
    metric that is a part of another already (`METRIC/PART`) is not parted again."""
    scores = scores_of(pairs)
    kinds = sorted({pair.reference.kind for pair in pairs})
    for kind in kinds if len(kinds) > 1 else []:
        own = scores_of([pair for pair in pairs if pair.reference.kind == kind])
        scores |= {f"{name}/{kind}": s for name, s in own.items() if "/" not in name}
    return scores
