"""Stores large embedding tables in a quarter of their size.

In a file, the table `NAME`, float[V, D], is `NAME.int8`, int8[V, D], and `NAME.scale`, float16[V]:
row i is `int8[i] * scale[i]`. The largest value of a row is 127 steps, so a value is off by at most
half a step, 0.4 % of the largest of its row, plus what half precision takes from the scale.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

_INT8, _SCALE = ".int8", ".scale"
_MIN_VALUES = 1_000_000  # below that, half precision costs at most a megabyte more
_STEPS = 127


def large_tables(model: nn.Module) -> list[str]:
    """Names the weights of all embeddings that are worth storing so."""
    return [
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and module.weight.numel() >= _MIN_VALUES
    ]


def pack(state: Mapping[str, Tensor], tables: list[str]) -> dict[str, Tensor]:
    """Replaces each of `tables` by its two tensors; the others stay as they are."""
    packed = {name: tensor for name, tensor in state.items() if name not in tables}
    for name in tables:
        table = state[name].float()
        largest = table.abs().amax(1)
        scale = (largest / _STEPS).half()
        # rounding to half precision may lower the scale, and then the largest value has 128 steps
        rows = (table / scale.float().clamp_min(1e-12)[:, None]).round().clamp(-_STEPS, _STEPS)
        packed[name + _INT8], packed[name + _SCALE] = rows.to(torch.int8), scale
    return packed


def unpack(state: Mapping[str, Tensor], source: object) -> dict[str, Tensor]:
    """Undoes `pack`: tables are float32 again.

    Args:
        source: what the tensors come from, for errors.

    Raises:
        ValueError: a table has not one scale per row.
    """
    unpacked = dict(state)
    for stored in [name for name in state if name.endswith(_INT8)]:
        name = stored.removesuffix(_INT8)
        rows, scale = unpacked.pop(stored), unpacked.pop(name + _SCALE, None)
        if scale is None or scale.shape != rows.shape[:1]:
            found = "is missing" if scale is None else f"has the shape {list(scale.shape)}"
            raise ValueError(
                f"{source}: {stored} has {len(rows)} rows, but {name}{_SCALE} {found}; expected "
                "one scale per row"
            )
        unpacked[name] = rows.float().mul_(scale.float()[:, None])
    return unpacked
