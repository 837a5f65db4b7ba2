"""Labels shards with Ray Data: actors hold the models.

If the models run on GPUs, tasks on the CPU cores read and check the images ahead. Without GPUs each
actor reads its own images, since both would compete for the same cores.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, cast

from cloc_mllm.disk import disk_problem
from cloc_mllm.vesl.config import LabelConfig
from cloc_mllm.vesl.shards import Shard
from cloc_mllm.vesl.sources import open_source
from cloc_mllm.vesl.worker import ShardDone, ShardLabeller, read_shard

_Function = Callable[[dict[str, Any]], dict[str, Any]]  # maps a row to a row

_MAX_BLOCKS = 4096  # the list of shards is cut into at most so many; images stream in any case


def label_with_ray(
    config: LabelConfig, directory: Path, shards: Sequence[Shard]
) -> Iterator[ShardDone]:
    """Labels and writes the shards; yields each once it is on disk, in any order.

    Images stream: Ray reads ahead only as much as its object store holds. A worker that dies is
    started again, and so is its shard.

    Raises:
        ConnectionError: there is no Ray cluster at `config.ray_address`.
        ValueError: the cluster has no room for so many workers, or a worker cannot start or label;
            says why.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reports usage by default
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    ray.init(
        address=config.ray_address or "local",
        include_dashboard=False if not config.ray_address else None,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    try:
        context = DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        workers = plan_workers(config.num_workers, ray.cluster_resources(), len(shards))
        rows: Any = ray.data.from_items(
            [asdict(shard) for shard in shards],
            override_num_blocks=min(len(shards), _MAX_BLOCKS),
        )
        read = partial(_read, source=(config.images, config.captions, config.encoding))
        if workers.gpus_each:
            rows = rows.map(read, num_cpus=1)
        done = rows.map(
            cast(Any, _Actor),  # Ray makes one in each worker
            fn_constructor_kwargs={
                "config": config,
                "directory": directory,
                "read": None if workers.gpus_each else read,
            },
            compute=ActorPoolStrategy(size=workers.number),
            num_cpus=0 if workers.gpus_each else 1,
            num_gpus=workers.gpus_each,
        )
        for row in done.iter_rows():
            yield row["done"]
    except ray.exceptions.RayError as error:
        raise ValueError(f"a worker failed: {disk_problem(error) or _last_line(error)}") from error
    finally:
        ray.shutdown()


class Workers(NamedTuple):
    """The actors that label; without GPUs each takes a core."""

    number: int
    gpus_each: int


def plan_workers(wanted: int, resources: dict[str, float], num_shards: int) -> Workers:
    """Plans one actor per GPU, or one per core if there is no GPU.

    Args:
        wanted: number of actors; 0 takes as many as there is room for.

    Raises:
        ValueError: there is no room for so many; Ray would wait for ever.
    """
    num_gpus = int(resources.get("GPU", 0))
    room = num_gpus or int(resources.get("CPU", 1))
    if wanted > room:
        kind = "GPUs" if num_gpus else "cores"
        raise ValueError(f"num_workers is {wanted}, but there are {room} {kind} in the cluster")
    return Workers(min(wanted or room, num_shards), min(num_gpus, 1))


class _Actor:
    """Holds a labeller. With `read`, rows are shards to read; otherwise a task has read them."""

    def __init__(self, config: LabelConfig, directory: Path, read: _Function | None) -> None:
        self.label = ShardLabeller(config, directory)
        self.read = read

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        row = self.read(row) if self.read else row
        return {"done": self.label(row["content"])}


def _read(row: dict[str, Any], source: tuple[str, str, str]) -> dict[str, Any]:
    return {"content": read_shard(Shard(**row), _opened(*source))}


_opened = lru_cache(maxsize=1)(open_source)  # once in each worker process


def _last_line(error: Exception) -> str:
    """The error itself, out of a remote traceback."""
    return str(error).strip().splitlines()[-1].strip()
