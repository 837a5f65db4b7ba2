"""Decides which sample is seen when, as a pure function of the seed.

The number of ranks and workers and the history of the run do not matter.
"""

from __future__ import annotations

import itertools
import shutil
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

from cloc_mllm.data.mixture import Part
from cloc_mllm.distributed import num_cores, num_local_ranks
from cloc_mllm.stopping import become_loader_worker
from cloc_mllm.train.interleave import cycle_of

_MOST_WORKERS = 16
# what torch says of a worker that could not write a batch to /dev/shm
_OUT_OF_SHARED_MEMORY = ("Bus error", "shared memory", "No space left on device")
_WORKERS_END_SECONDS = 1.0
_PREFETCH_BATCHES = 4  # per worker, so that a slow image or step makes no process wait

SampleKey = tuple[int, int]  # (epoch, index into the dataset)


@dataclass(frozen=True)
class DataOrder:
    """One endless stream of samples, cut into global batches.

    Each epoch is a new permutation, in which each sample comes exactly once; a batch may span two
    epochs. The batch of a step is found without walking through the steps before it.

    Each data set of a `mixture` has epochs of its own; their samples are numbered one set after the
    other. For any n, the first n samples of the stream hold each set's share, up to one sample.
    """

    num_samples: int
    global_batch_size: int
    seed: int
    mixture: tuple[Part, ...] = ()

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ValueError("the training data is empty; it needs at least one record")
        assert not self.mixture or self.num_samples == sum(
            part.num_samples for part in self.mixture
        )

    @property
    def parts(self) -> tuple[Part, ...]:
        return self.mixture or (Part("", self.num_samples, 1.0),)

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> list[SampleKey]:
        """This rank's part of the global batch of `step`; the parts lie one after the other."""
        local_batch_size = self.global_batch_size // world_size
        start = step * self.global_batch_size + rank * local_batch_size
        return [self._key(position) for position in range(start, start + local_batch_size)]

    def num_seen(self, steps: int) -> list[int]:
        """Counts the samples of each part that the first `steps` steps see."""
        cycle = cycle_of(tuple(part.weight for part in self.parts))
        num_cycles, place = divmod(steps * self.global_batch_size, len(cycle.part))
        rest = np.bincount(cycle.part[:place], minlength=len(self.parts))
        return (num_cycles * cycle.counts + rest).tolist()

    def epochs_of_samples(self, steps: int) -> Iterator[int]:
        """Yields for each sample the number of epochs that begin within the first `steps` steps."""
        for part, seen in zip(self.parts, self.num_seen(steps), strict=True):
            yield from itertools.repeat(-(-seen // part.num_samples), part.num_samples)

    def _key(self, position: int) -> SampleKey:
        cycle = cycle_of(tuple(part.weight for part in self.parts))
        num_cycles, place = divmod(position, len(cycle.part))
        number = int(cycle.part[place])
        part_position = num_cycles * int(cycle.counts[number]) + int(cycle.before[place])
        epoch, offset = divmod(part_position, self.parts[number].num_samples)
        start = sum(part.num_samples for part in self.parts[:number])
        permutation = _permutations(self.seed, number, self.parts[number].num_samples)
        return epoch, start + int(permutation(epoch)[offset])


@cache
def _permutations(seed: int, part: int, num_samples: int) -> Callable[[int], np.ndarray]:
    """Makes a function from the epoch of a part to its permutation.

    The last two permutations are kept, because a batch may span two epochs.
    """

    @lru_cache(maxsize=2)
    def permutation_at(epoch: int) -> np.ndarray:
        return np.random.default_rng([seed, epoch, part]).permutation(num_samples)

    return permutation_at


@dataclass(frozen=True)
class RankBatches:
    """The batch sampler of one rank: the keys of the steps from `start` to before `stop`."""

    order: DataOrder
    start: int
    stop: int
    rank: int
    world_size: int

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for step in range(self.start, self.stop):
            yield self.order.batch(step, self.rank, self.world_size)

    def __len__(self) -> int:
        return self.stop - self.start


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """Makes the seed of a sample's random choices in one epoch."""
    return int(np.random.SeedSequence([seed, epoch, index]).generate_state(1)[0])


@dataclass(frozen=True)
class SeededDataset:
    """Looks samples up by key and gives each a seed of its own.

    So what the collator draws (regions, flips, questions) depends on the run's seed, the epoch and
    the sample alone.
    """

    dataset: Sequence[Any]
    seed: int

    def __getitem__(self, key: SampleKey) -> tuple[int, Any]:
        epoch, index = key
        return sample_seed(self.seed, epoch, index), self.dataset[index]

    def __len__(self) -> int:
        return len(self.dataset)


def choose_workers(num_workers: int) -> int:
    """Chooses the number of loader processes of a rank, see `data.num_workers`."""
    if num_workers >= 0:
        return num_workers
    if not torch.cuda.is_available():
        return 1
    return max(1, min(_MOST_WORKERS, num_cores() // num_local_ranks() - 1))


def load_batches(
    dataset: Sequence[Any],
    keys: RankBatches,
    collate_fn: Callable[[list[tuple[int, Any]]], Any],
    num_workers: int,
) -> Generator[Any]:
    """Loads the batches of `keys` in their order, which is the same for any number of workers.

    The worker processes live as long as the iterator, so close it. Each has one thread (torch sees
    to that) and opens its own files.
    """
    num_workers = choose_workers(num_workers)
    loader: DataLoader[Any] = DataLoader(
        SeededDataset(dataset, keys.order.seed),  # type: ignore[arg-type]
        batch_sampler=keys,
        collate_fn=collate_fn,
        num_workers=num_workers,
        prefetch_factor=_PREFETCH_BATCHES if num_workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=become_loader_worker,
    )
    try:
        with closing(iterate(loader)) as batches:
            yield from batches
    except RuntimeError as error:
        reasons = f"{error} {error.__cause__}"  # the loader may only say that a worker is gone
        if any(sign in reasons for sign in _OUT_OF_SHARED_MEMORY):
            raise ValueError(_shared_memory_message(num_workers)) from error
        raise


def iterate(loader: DataLoader[Any]) -> Generator[Any]:
    """Yields the batches of a loader. When the iterator is closed, its workers end within a second,
    busy or not: Python would wait for them at exit, and they ignore SIGTERM."""
    batches = iter(loader)
    try:
        yield from batches
    finally:
        if getattr(batches, "_worker_pids_set", False):
            _end_workers(batches)


def _end_workers(batches: Any) -> None:
    # or torch would report the workers that are killed here as failed
    signal_handling._remove_worker_pids(id(batches))
    batches._worker_pids_set = False
    # a killed worker may hold a lock of the queues, so those that can end by themselves do
    last_resort = threading.Timer(
        _WORKERS_END_SECONDS, lambda: [worker.kill() for worker in batches._workers]
    )
    last_resort.start()
    batches._shutdown_workers()
    last_resort.cancel()


def _shared_memory_message(num_workers: int) -> str:
    """Says what of /dev/shm is there and what fills it."""
    disk = shutil.disk_usage("/dev/shm")
    return (
        f"a loader worker died for lack of shared memory: of the {disk.total / 1e9:.1f} GB of "
        f"/dev/shm {disk.free / 1e9:.1f} are free, and each of {num_workers} workers per rank "
        f"keeps up to {_PREFETCH_BATCHES} batches there; enlarge it (docker run --shm-size 32g, or "
        "mount -o remount,size=32g /dev/shm), or lower data.num_workers"
    )


def on_device(batches: Iterator[Any], device: torch.device) -> Iterator[Any]:
    """Yields the batches moved to a device. To a GPU the next one is copied, on a stream of its
    own, while the step of the one before runs.

    A batch must not be used any more when the next one is asked for, and the GPU must be done with
    it: each step ends with a wait for its gradient's norm.
    """
    if device.type == "cpu":
        yield from (batch.to(device) for batch in batches)
        return
    copies = torch.cuda.Stream(device)
    ahead = None
    for batch in batches:
        with torch.cuda.stream(copies):
            following = batch.to(device), copies.record_event()
        if ahead is not None:
            yield _when_copied(*ahead)
        ahead = following
    if ahead is not None:
        yield _when_copied(*ahead)


def _when_copied(batch: Any, copied: torch.cuda.Event) -> Any:
    torch.cuda.current_stream().wait_event(copied)
    return batch
