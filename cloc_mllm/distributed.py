"""The only place that calls torch.distributed. Every function also works in a single process."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from cloc_mllm.devices import without_waiting

T = TypeVar("T")


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def is_main() -> bool:
    return rank() == 0


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def launched_rank() -> int:
    """The rank that the launcher gave; it is known before the process group exists."""
    return int(os.environ.get("RANK", "0"))


def num_local_ranks() -> int:
    """The number of ranks on this machine, as torchrun or the DeepSpeed launcher says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def num_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def barrier() -> None:
    if is_distributed():
        dist.barrier()


def gather_counts(counts: Sequence[int], device: torch.device) -> list[list[int]]:
    """Gathers a few numbers of every rank, in rank order; several ranks wait for each other."""
    if world_size() == 1:
        return [list(counts)]
    own = without_waiting(torch.tensor(counts), device)
    gathered = own.new_empty(world_size(), len(counts))
    dist.all_gather(list(gathered.unbind(0)), own)
    return gathered.tolist()


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sums over ranks, without gradient; returns a new tensor."""
    values = values.detach().clone()
    if is_distributed():
        dist.all_reduce(values)
    return values


def all_reduce_logsumexp(values: Tensor) -> Tensor:
    """Computes `log sum exp(values)` over ranks, elementwise, without gradient."""
    if not is_distributed() or world_size() == 1:
        return values
    gathered = values.new_empty(world_size(), *values.shape)
    dist.all_gather(list(gathered.unbind(0)), values.contiguous())
    return gathered.logsumexp(0)


def gather_objects(value: T) -> list[T]:
    """Gathers the value of every rank, in rank order, on every rank."""
    if not is_distributed():
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def is_lost_connection(error: BaseException) -> bool:
    """Whether a collective call raised this because another rank did not answer."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


class NoticeBoard:
    """Short texts by name, where the ranks met, over a connection of its own: a thread may use it
    while the process waits in a collective call.

    Its methods raise ConnectionError if it does not answer.
    """

    _PATIENCE = timedelta(seconds=5)

    def __init__(self, name: str) -> None:
        self.name = name
        self._store = dist.distributed_c10d._get_default_store().clone()
        self._store.set_timeout(self._PATIENCE)

    @staticmethod
    def keeper() -> int | None:
        """The rank whose end takes the board with it; None if the launcher keeps it."""
        return None if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else 0

    def post(self, name: str, text: str) -> None:
        try:
            self._store.set(f"{self.name}/{name}", text)
        except RuntimeError as error:
            raise ConnectionError(str(error)) from error

    def read(self, name: str) -> str | None:
        """Reads a text; None if there is none yet."""
        key = f"{self.name}/{name}"
        try:
            return self._store.get(key).decode() if self._store.check([key]) else None
        except RuntimeError as error:
            raise ConnectionError(str(error)) from error


def all_gather_with_grad(rows: Tensor, counts: Sequence[int] | None = None) -> tuple[Tensor, int]:
    """Concatenates the rows of all ranks, in rank order, and keeps the gradient to every rank.

    Args:
        rows: float[R_local, E]; R_local may differ between ranks and may be 0.
        counts: R_local of every rank; None asks them.

    Returns:
        float[R_global, E], and the index at which this rank's rows start. In the backward pass each
        rank's rows get the sum of the gradients that all ranks have for their copies.
    """
    if not is_distributed() or world_size() == 1:
        return rows, 0
    if counts is None:
        counts = [number for [number] in gather_counts([len(rows)], rows.device)]
    longest = max(1, *counts)
    padded = torch.cat([rows, rows.new_zeros(longest - rows.shape[0], rows.shape[1])])
    gathered: Tensor = _GatherRows.apply(padded)
    kept = [gathered[r, :count] for r, count in enumerate(counts)]
    return torch.cat(kept), sum(counts[: rank()])


class _GatherRows(torch.autograd.Function):
    """Gathers float[L, E] of each of W ranks as float[W, L, E]; backward sums the gradients."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        gathered = rows.new_empty(world_size(), *rows.shape)
        dist.all_gather(list(gathered.unbind(0)), rows.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad[rank()]
