"""Turns queries into rows with CLOC, our MLLM or any Transformers model; and judges answers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, Protocol

from cloc_mllm.evaluation.queries import QuerySet
from cloc_mllm.evaluation.rows.rows import PredictionRow


class Predictor(Protocol):
    """A model that answers queries; it is loaded once rows are needed."""

    def identity(self) -> dict[str, Any]:
        """Everything that its rows depend on besides the queries, as JSON values."""
        ...

    def can_answer(self, asked: QuerySet) -> bool:
        """Whether it can answer queries of this form."""
        ...

    def rows(
        self, query_sets: Sequence[QuerySet], finished: Collection[str]
    ) -> Iterator[PredictionRow]:
        """Yields one row per query, except for ids in `finished`."""
        ...
