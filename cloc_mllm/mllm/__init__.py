"""CLOC in a multimodal LLM. Importing this registers it with Transformers' Auto classes."""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from cloc_mllm.mllm.build import build_mllm, merge_and_save
from cloc_mllm.mllm.configuration import ClocMllmConfig
from cloc_mllm.mllm.modeling import ClocMllmForConditionalGeneration
from cloc_mllm.mllm.processing import ClocMllmProcessor

AutoConfig.register(ClocMllmConfig.model_type, ClocMllmConfig, exist_ok=True)
AutoModelForImageTextToText.register(
    ClocMllmConfig, ClocMllmForConditionalGeneration, exist_ok=True
)
AutoProcessor.register(ClocMllmConfig, ClocMllmProcessor, exist_ok=True)

__all__ = [
    "ClocMllmConfig",
    "ClocMllmForConditionalGeneration",
    "ClocMllmProcessor",
    "build_mllm",
    "merge_and_save",
]
