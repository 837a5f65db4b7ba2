"""Scores of all queries, then of each kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cloc_mllm.evaluation.rows.rows import ScoredPair
from cloc_mllm.evaluation.stats.bootstrap import QueryScores


def with_kinds(
    pairs: Sequence[ScoredPair],
    scores_of: Callable[[Sequence[ScoredPair]], dict[str, QueryScores]],
) -> dict[str, QueryScores]:
    """Computes `scores_of(pairs)` and, if the references have several kinds, `METRIC/KIND` of each.

    A metric that is a part of another (`METRIC/PART`) is not split again.
    """
    scores = scores_of(pairs)
    kinds = sorted({pair.reference.kind for pair in pairs})
    for kind in kinds if len(kinds) > 1 else []:
        own = scores_of([pair for pair in pairs if pair.reference.kind == kind])
        scores |= {f"{name}/{kind}": s for name, s in own.items() if "/" not in name}
    return scores
