"""Which sample is seen when: a pure function of the seed, free of ranks, workers and history."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from cloc_mllm.data.mixture import Part
from cloc_mllm.stopping import ignore_stop_signals
from cloc_mllm.train.interleave import cycle_of

_PREFETCH_BATCHES = 4  # ready for each worker, so that a slow image or a slow step stalls nobody

SampleKey = tuple[int, int]  # (epoch, index into the dataset)


@dataclass(frozen=True)
class DataOrder:
    """One endless stream: a fresh permutation each epoch, cut into global batches.

    A batch may span two epochs; within an epoch each sample comes exactly once. Step k is found
    without walking through the steps before it.

    Each data set of a `mixture` (its samples follow those of the one before) has epochs of its own.
    Of the first n samples of the stream, for any n, less than one more or less than its share come
    from each.
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
        """This rank's contiguous part of the global batch of `step`."""
        local_batch_size = self.global_batch_size // world_size
        start = step * self.global_batch_size + rank * local_batch_size
        return [self._key(position) for position in range(start, start + local_batch_size)]

    def num_seen(self, steps: int) -> list[int]:
        """Samples of each part in the first `steps` steps."""
        cycle = cycle_of(tuple(part.weight for part in self.parts))
        num_cycles, place = divmod(steps * self.global_batch_size, len(cycle.part))
        rest = np.bincount(cycle.part[:place], minlength=len(self.parts))
        return (num_cycles * cycle.counts + rest).tolist()

    def epochs_of_samples(self, steps: int) -> Iterator[int]:
        """For each sample how many epochs begin within so many steps."""
        for part, seen in zip(self.parts, self.num_seen(steps), strict=True):
            yield from itertools.repeat(-(-seen // part.num_samples), part.num_samples)

    def _key(self, position: int) -> SampleKey:
        cycle = cycle_of(tuple(part.weight for part in self.parts))
        num_cycles, place = divmod(position, len(cycle.part))
        number = int(cycle.part[place])
        of_part = num_cycles * int(cycle.counts[number]) + int(cycle.before[place])
        epoch, offset = divmod(of_part, self.parts[number].num_samples)
        start = sum(part.num_samples for part in self.parts[:number])
        permutation = _permutations(self.seed, number, self.parts[number].num_samples)
        return epoch, start + int(permutation(epoch)[offset])


@cache
def _permutations(seed: int, part: int, num_samples: int) -> Callable[[int], np.ndarray]:
    """Of a part by epoch; two of them are kept, as a batch may span two epochs."""

    @lru_cache(maxsize=2)
    def of_epoch(epoch: int) -> np.ndarray:
        return np.random.default_rng([seed, epoch, part]).permutation(num_samples)

    return of_epoch


@dataclass(frozen=True)
class RankBatches:
    """The batch sampler of one rank: the keys of steps `start` to `stop`."""

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
    """What a sample's random choices start from, each time it is seen."""
    return int(np.random.SeedSequence([seed, epoch, index]).generate_state(1)[0])


@dataclass(frozen=True)
class SeededDataset:
    """Looks samples up by key and gives each its own seed, so that what the collator draws
    (regions, flips) depends on (run seed, epoch, sample) only."""

    dataset: Sequence[Any]
    seed: int

    def __getitem__(self, key: SampleKey) -> tuple[int, Any]:
        epoch, index = key
        return sample_seed(self.seed, epoch, index), self.dataset[index]

    def __len__(self) -> int:
        return len(self.dataset)


def load_batches(
    dataset: Sequence[Any],
    keys: RankBatches,
    collate_fn: Callable[[list[tuple[int, Any]]], Any],
    num_workers: int,
) -> Iterator[Any]:
    """The batches of `keys` in their order, the same for any number of worker processes.

    Workers live as long as the iterator. Each has one thread (torch sees to that), opens its own
    files and leaves it to the main process to answer Ctrl-C.
    """
    loader: DataLoader[Any] = DataLoader(
        SeededDataset(dataset, keys.order.seed),  # type: ignore[arg-type]
        batch_sampler=keys,
        collate_fn=collate_fn,
        num_workers=num_workers,
        prefetch_factor=_PREFETCH_BATCHES if num_workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=ignore_stop_signals,
    )
    batches = iter(loader)
    try:
        yield from batches
    finally:
        # an error's traceback keeps `batches`, and Python would wait for its workers at exit
        if num_workers:
            batches._shutdown_workers()  # type: ignore[attr-defined]
