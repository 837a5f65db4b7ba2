"""CLOC in a multimodal LLM. Importing this registers it with Transformers' Auto classes."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
)

from cloc_mllm.mllm.build import build_mllm
from cloc_mllm.mllm.configuration import ClocMllmConfig
from cloc_mllm.mllm.image_processing import ClocMllmImageProcessor
from cloc_mllm.mllm.merging import merge_and_save
from cloc_mllm.mllm.modeling import ClocMllmForConditionalGeneration
from cloc_mllm.mllm.processing import ClocMllmProcessor

AutoConfig.register(ClocMllmConfig.model_type, ClocMllmConfig, exist_ok=True)
AutoModelForImageTextToText.register(
    ClocMllmConfig, ClocMllmForConditionalGeneration, exist_ok=True
)
AutoProcessor.register(ClocMllmConfig, ClocMllmProcessor, exist_ok=True)
AutoImageProcessor.register(
    ClocMllmConfig, slow_image_processor_class=ClocMllmImageProcessor, exist_ok=True
)

__all__ = [
    "ClocMllmConfig",
    "ClocMllmForConditionalGeneration",
    "ClocMllmImageProcessor",
    "ClocMllmProcessor",
    "build_mllm",
    "merge_and_save",
]
