"""Starts gloo ranks as processes that meet at a store which this process keeps open.

A port that is looked up, closed and opened again seconds later, when the ranks are up, may be
somebody else's by then.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

_PATIENCE = timedelta(minutes=5)


def run_ranks(function: Callable[..., None], *arguments: Any, num_ranks: int) -> None:
    """Runs `function(*arguments)` in `num_ranks` processes with RANK, WORLD_SIZE and the address in
    the environment, one thread each; raises what the first failing rank raised."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=_PATIENCE)
    mp.spawn(_rank, (store.port, num_ranks, function, arguments), nprocs=num_ranks)


def _rank(
    rank: int, port: int, num_ranks: int, function: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # rank 0 joins the store, opens none
    torch.set_num_threads(1)
    function(*arguments)
