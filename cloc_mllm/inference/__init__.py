"""Predictors: `ClocPredictor` (regions and words), `GroundingPredictor` (the language model).

Loaded on first use, so that the command line can show its help without loading torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cloc_mllm.inference.cloc_predictor import ClocPredictor
    from cloc_mllm.inference.grounding_predictor import (
        ChatRequest,
        GroundedAnswer,
        GroundingPredictor,
    )

__all__ = ["ChatRequest", "ClocPredictor", "GroundedAnswer", "GroundingPredictor"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "cloc_predictor" if name == "ClocPredictor" else "grounding_predictor"
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)
