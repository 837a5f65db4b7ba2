"""Shards over Ray Data: tasks read them, actors that hold the models label and write them."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

from cloc_mllm.config import LabelConfig
from cloc_mllm.vesl.shards import Shard
from cloc_mllm.vesl.worker import ShardLabeller, read_shard

_MAX_BLOCKS = 4096  # of the list of shards; what is read streams through, however many there are


def label_with_ray(
    config: LabelConfig, directory: Path, shards: Sequence[Shard]
) -> Iterator[dict[str, Any]]:
    """Label and write the shards; yields `{index, num_images}` as each is on disk, in any order.

    Images stream: Ray reads ahead only as much as its object store holds. A worker that dies is
    started again and its shard with it.

    Raises:
        ConnectionError: no Ray cluster at `config.ray_address`.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing calls home
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
        num_workers, gpus_each = _workers(config, ray.cluster_resources(), len(shards))
        rows = ray.data.from_items(
            [asdict(shard) for shard in shards],
            override_num_blocks=min(len(shards), _MAX_BLOCKS),
        )
        read = rows.map(partial(read_shard, images=config.images, captions=config.captions))
        done = read.map(
            cast(Any, ShardLabeller),  # Ray makes one in each worker
            fn_constructor_kwargs={"config": config, "directory": str(directory)},
            compute=ActorPoolStrategy(size=num_workers),
            num_gpus=gpus_each,
        )
        yield from done.iter_rows()
    finally:
        ray.shutdown()


def _workers(config: LabelConfig, resources: dict[str, float], num_shards: int) -> tuple[int, int]:
    """How many actors, and GPUs of each. Without GPUs a core is left for reading."""
    num_gpus = int(resources.get("GPU", 0))
    cores = max(1, int(resources.get("CPU", 1)) - 1)
    return min(config.num_workers or num_gpus or cores, num_shards), 1 if num_gpus else 0
