"""Chooses the attention kernel that a tower trains with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def fast_attention(tower: nn.Module, inputs: Tensor) -> Iterator[None]:
    """Makes attention plain matrix products while `tower` trains in bf16 on a CPU; otherwise torch
    chooses.

    In that case the backward pass of torch's fused kernel is 2-6 times slower than plain products,
    which round as much as the rest of a bf16 step. Gradient checkpointing is left out: its second
    forward pass comes in backward, outside of this context, and must be like the first. So are fake
    tensors, with which an estimate asks what a step needs on a GPU (`train/memory.py`).
    """
    if not (
        inputs.device.type == "cpu"
        and not isinstance(inputs, FakeTensor)
        and torch.is_grad_enabled()
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
        and not any(_is_checkpointed(module) for module in tower.modules())
    ):
        yield
        return
    # The name says CUDA, but the plain path reads it on every device; without it, it computes in
    # float32.
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)


def _is_checkpointed(module: nn.Module) -> bool:
    """Whether a transformer of open_clip or timm, or a layer of Hugging Face, is checkpointed."""
    return any(
        getattr(module, name, False) is True
        for name in ("grad_checkpointing", "gradient_checkpointing")
    )
