"""What turns queries into rows: CLOC, our MLLM, any Transformers model; and a judge of answers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, Protocol

from cloc_mllm.evaluation.queries import QuerySet
from cloc_mllm.evaluation.rows.rows import PredictionRow


class Predictor(Protocol):
    """A model that answers queries; it is loaded when rows are asked for."""

    def identity(self) -> dict[str, Any]:
        """Everything its rows depend on beside the queries, as JSON values."""
        ...

    def can_answer(self, asked: QuerySet) -> bool:
        """Whether it knows how to answer queries of this form."""
        ...

    def rows(
        self, query_sets: Sequence[QuerySet], finished: Collection[str]
    ) -> Iterator[PredictionRow]:
        """One row per query, but for those whose ids are in `finished`."""
        ...
