"""cloc-mllm: grounding in multimodal LLMs, built on CLOC (arXiv 2410.02746).

Everything in `__all__` is loaded on first use, so importing the package itself loads nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cloc_mllm.data.images import open_image
    from cloc_mllm.data.parquet import load_chats, load_records
    from cloc_mllm.data.records import Record, Region
    from cloc_mllm.geometry import Boxes
    from cloc_mllm.inference.cloc_predictor import ClocPredictor
    from cloc_mllm.inference.grounding_predictor import GroundingPredictor, Question
    from cloc_mllm.inference.inputs import EncodedImage
    from cloc_mllm.inference.results import Answer, GroundingResult
    from cloc_mllm.mllm import ClocMllmForConditionalGeneration, ClocMllmProcessor
    from cloc_mllm.models.build import load_cloc

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "Boxes",
    "ClocMllmForConditionalGeneration",
    "ClocMllmProcessor",
    "ClocPredictor",
    "EncodedImage",
    "GroundingPredictor",
    "GroundingResult",
    "Question",
    "Record",
    "Region",
    "load_chats",
    "load_cloc",
    "load_records",
    "open_image",
]

# `cloc_mllm.mllm` also registers the model with the Auto classes of Transformers
_MODULE_OF = {
    "Answer": "inference.results",
    "Boxes": "geometry",
    "ClocMllmForConditionalGeneration": "mllm",
    "ClocMllmProcessor": "mllm",
    "ClocPredictor": "inference.cloc_predictor",
    "EncodedImage": "inference.inputs",
    "GroundingPredictor": "inference.grounding_predictor",
    "GroundingResult": "inference.results",
    "Question": "inference.grounding_predictor",
    "Record": "data.records",
    "Region": "data.records",
    "load_chats": "data.parquet",
    "load_cloc": "models.build",
    "load_records": "data.parquet",
    "open_image": "data.images",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value  # found without this function from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
