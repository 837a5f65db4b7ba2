"""Chooses the device, the precision and the dtype of weights of a command."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from cloc_mllm.config import FrozenDtype, Precision

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(device: torch.device | str | None = None) -> torch.device:
    """Returns the named device; None, "" and "auto" are the GPU if there is one, else the CPU.

    Raises:
        ValueError: torch knows no such device.
    """
    if not device or device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"unknown device {device!r}; expected auto, cpu, cuda or cuda:N"
        ) from error


def without_waiting(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a small CPU tensor to a device. A plain copy to a GPU waits until that is done with
    everything before; one from pinned memory does not."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def resolve_precision(precision: Precision) -> Literal["fp32", "bf16"]:
    """Turns `auto` into `bf16` where the hardware multiplies bf16 matrices, else into `fp32`."""
    if precision != "auto":
        return precision
    if torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # torch before 2.15 cannot say
        capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        native = bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    return "bf16" if native else "fp32"


def resolve_frozen_dtype(
    dtype: FrozenDtype, precision: Precision = "auto"
) -> Literal["float32", "bfloat16"]:
    """Turns `auto` into `bfloat16` on a GPU that trains in bf16, else into `float32`.

    Raises:
        ValueError: weights held in bfloat16 would be multiplied in float32.
    """
    precision = resolve_precision(precision)
    if dtype == "auto":
        return "bfloat16" if torch.cuda.is_available() and precision == "bf16" else "float32"
    if dtype == "bfloat16" and precision == "fp32":
        raise ValueError(
            "model.dtype is bfloat16, so the frozen weights are multiplied in bf16, but "
            "run.precision is fp32; set run.precision to bf16, or model.dtype to float32"
        )
    return dtype
