"""Peak memory of loading, merging and saving an MLLM, as a ratio to the size of its weights.

python eval/bench/weights.py --shape qwen2.5-0.5b --dtype bfloat16

Pages of files that are mapped count, too: a weight that keeps its dtype stays mapped from its file.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cloc_mllm.config import LoraConfig, MllmConfig
from cloc_mllm.devices import DTYPES
from cloc_mllm.mllm import ClocMllmForConditionalGeneration, build_mllm, merge_and_save
from cloc_mllm.mllm.adapter import load_adapter, save_adapter
from cloc_mllm.mllm.build import hold_frozen
from cloc_mllm.shipped import find_model
from stage2_memory import SHAPES, bytes_of, write_language_model

Model = Any


class Row(NamedTuple):
    """One step: bytes at its peak and bytes that stay, above those before the model."""

    name: str
    peak: int
    stays: int


def measure(language_model: Path, dtype: Any, out: Path) -> tuple[int, list[Row]]:
    """Returns the bytes of the weights and a row per step; each loading has a fresh process."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**16)  # see stage2_memory.py
    size, rows = _in_fresh_process(_train_and_save, language_model, dtype, out)
    for load in (_load_merged, _load_adapter):
        rows.append(_in_fresh_process(load, dtype, out))
    return size, rows


def _in_fresh_process(work: Callable[..., Any], *arguments: Any) -> Any:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as process:
        return process.submit(work, *arguments).result()


def _train_and_save(language_model: Path, dtype: Any, out: Path) -> tuple[int, list[Row]]:
    config = MllmConfig(
        cloc=str(find_model("cloc", "scenes")),
        language_model=str(language_model),
        dtype=dtype,
        lora=LoraConfig(rank=16),
    )
    start = bytes_of("VmRSS")

    def build() -> tuple[Model, Any]:
        model, processor = build_mllm(config)
        hold_frozen(model, DTYPES[dtype])
        return model, processor

    row, (model, processor) = _row("build_mllm, LoRA", build, start)
    size = sum(p.nbytes for p in model.parameters())
    merge, _ = _row("merge_and_save", lambda: merge_and_save(model, processor, out / "all"), start)
    save, _ = _row("save_adapter", lambda: save_adapter(model, processor, out / "lora"), start)
    return size, [row, merge, save]


def _load_merged(dtype: Any, out: Path) -> Row:
    load = ClocMllmForConditionalGeneration.from_pretrained
    start = bytes_of("VmRSS")
    return _row("from_pretrained", lambda: _read(load(out / "all", dtype=DTYPES[dtype])), start)[0]


def _load_adapter(dtype: Any, out: Path) -> Row:
    def load() -> Model:
        return _read(load_adapter(out / "lora", dtype=DTYPES[dtype])[0])

    return _row("load_adapter", load, bytes_of("VmRSS"))[0]


def _read(model: Model) -> Model:
    """Touches every weight, as an answer does, so that mapped files are resident."""
    for parameter in model.parameters():
        parameter.detach().view(-1).view(torch.uint8)[::4096].sum()
    return model


def _row(name: str, work: Callable[[], Any], start: int) -> tuple[Row, Any]:
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    result = work()
    peak = bytes_of("VmHWM") - start
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return Row(name, peak, bytes_of("VmRSS") - start), result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--language_model", type=Path, help="directory to keep the model in")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = args.language_model or Path(temporary) / args.shape
        if not (directory / "config.json").is_file():
            write_language_model(args.shape, directory)
        size, rows = measure(directory, args.dtype, Path(temporary) / "out")
    print(f"{args.shape}, {args.dtype}: {size / 2**20:,.0f} MiB of weights")
    for name, peak, stays in rows:
        print(
            f"  {name:<22} peak {peak / 2**20:6,.0f} MiB = {peak / size:.2f}, "
            f"stays {stays / 2**20:6,.0f} MiB = {stays / size:.2f}"
        )


if __name__ == "__main__":
    main()
