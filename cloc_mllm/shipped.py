"""Finds the weights that ship with the package, the default of demo, ground, refer and eval."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

ModelKind = Literal["cloc", "mllm"]

ASSETS = Path(__file__).resolve().parent / "assets"


def shipped_directory(kind: ModelKind) -> Path:
    """Finds the directory of the shipped `cloc` or `mllm` model.

    Raises:
        FileNotFoundError: this installation carries no such weights; says what to do.
    """
    directory = ASSETS / kind
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(
            f"no shipped {kind} model in {directory}; run `make quickstart` to train one, "
            f"or pass --{kind} DIR with a model you have"
        )
    return directory
