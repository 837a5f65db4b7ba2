"""Numbers that cannot be are refused before anything is read."""

from __future__ import annotations

import pytest

from cloc_mllm.evaluation.config import EvalConfig
from cloc_mllm.evaluation.run import evaluate


@pytest.mark.parametrize(("name", "value", "least"), [("limit", -1, 0), ("batch_size", 0, 1)])
def test_numbers_that_are_too_small(name: str, value: int, least: int) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected {least} or more, got {value}"):
        evaluate(EvalConfig(**{name: value}))  # type: ignore[arg-type]
