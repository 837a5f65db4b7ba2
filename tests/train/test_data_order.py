from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import closing
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cloc_mllm.data.mixture import Part
from cloc_mllm.train.data_order import DataOrder, RankBatches, SeededDataset, load_batches
from cloc_mllm.train.interleave import cycle_of


@settings(max_examples=50)
@given(num_samples=st.integers(1, 30), batch=st.integers(1, 12), seed=st.integers(0, 5))
def test_each_epoch_shows_every_sample_exactly_once(
    num_samples: int, batch: int, seed: int
) -> None:
    order = DataOrder(num_samples, batch, seed)
    num_steps = -(-3 * num_samples // batch)  # three epochs or a little more
    keys = [key for step in range(num_steps) for key in order.batch(step)]
    for epoch in range(3):
        assert sorted(i for e, i in keys if e == epoch) == list(range(num_samples))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_global_batch_does_not_depend_on_the_number_of_ranks(world_size: int) -> None:
    order = DataOrder(num_samples=10, global_batch_size=8, seed=3)
    for step in range(5):
        parts = [order.batch(step, rank, world_size) for rank in range(world_size)]
        assert [key for part in parts for key in part] == order.batch(step)


def test_resuming_at_any_step_continues_the_same_stream() -> None:
    order = DataOrder(num_samples=7, global_batch_size=4, seed=0)
    unbroken = list(RankBatches(order, 0, 9, rank=1, world_size=2))
    for start in range(9):
        assert list(RankBatches(order, start, 9, rank=1, world_size=2)) == unbroken[start:]


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    order = DataOrder(num_samples=50, global_batch_size=50, seed=0)
    first, second = ([i for _, i in order.batch(step)] for step in (0, 1))
    other_seed = [i for _, i in DataOrder(50, 50, seed=1).batch(0)]
    assert first != second
    assert first != other_seed
    assert first != sorted(first)


WEIGHTS = st.lists(st.sampled_from([1, 2.0, 3, 0.5, 0.7, 7]), min_size=1, max_size=5)


@settings(max_examples=100)
@given(weights=WEIGHTS)
def test_any_number_of_turns_is_shared_out_to_within_one(weights: list[float]) -> None:
    cycle = cycle_of(tuple(weights))
    shares = [Fraction(str(weight)) / sum(Fraction(str(w)) for w in weights) for weight in weights]
    most = Fraction(2 * len(weights) - 3, 2 * len(weights) - 2) if len(weights) > 1 else 0
    had = [0] * len(weights)
    for turn, part in enumerate(cycle.part.tolist() * 2, 1):
        if turn <= len(cycle.part):
            assert cycle.before[turn - 1] == had[part]
        had[part] += 1
        for share, part_turns in zip(shares, had, strict=True):
            assert abs(part_turns - share * turn) <= most
    assert had == (2 * cycle.counts).tolist()


@settings(max_examples=50)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    weights=st.permutations([1, 2, 0.5, 0.3]),
    batch=st.sampled_from([1, 4, 6]),
    start=st.integers(0, 40),
)
def test_a_mixture_equals_each_part_walked_through_from_the_start(
    sizes: list[int], weights: list[float], batch: int, start: int
) -> None:
    parts = tuple(Part(str(n), *pair) for n, pair in enumerate(zip(sizes, weights, strict=False)))
    order = DataOrder(sum(sizes), batch, 3, parts)
    streams = [iter(walked(3, number, size)) for number, size in enumerate(sizes)]
    turns = itertools.cycle(cycle_of(tuple(part.weight for part in parts)).part.tolist())
    stream = [next(streams[part]) for part in itertools.islice(turns, batch * (start + 3))]
    expected = [(epoch, sum(sizes[:part]) + index) for part, epoch, index in stream]

    actual = [key for step in range(start, start + 3) for key in order.batch(step)]
    assert actual == expected[batch * start :]
    seen = [sum(part == number for part, _, _ in stream) for number in range(len(sizes))]
    assert order.num_seen(start + 3) == seen
    epochs = list(order.epochs_of_samples(start + 3))
    for epoch, index in expected:
        assert epoch < epochs[index]


def walked(seed: int, part: int, size: int) -> Iterator[tuple[int, int, int]]:
    """(part, epoch, index) of a part alone, without end."""
    for epoch in itertools.count():
        for index in np.random.default_rng([seed, epoch, part]).permutation(size):
            yield part, epoch, int(index)


def test_a_mixture_of_one_is_the_set_itself() -> None:
    alone, mixed = DataOrder(7, 4, 5), DataOrder(7, 4, 5, (Part("a", 7, 0.3),))
    assert [alone.batch(step) for step in range(9)] == [mixed.batch(step) for step in range(9)]


def test_the_order_of_one_set_is_that_of_earlier_versions() -> None:
    expected = np.random.default_rng([5, 1]).permutation(7).tolist()
    assert DataOrder(7, 7, 5).batch(1) == [(1, index) for index in expected]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_mixture_does_not_depend_on_ranks_or_where_it_resumes(world_size: int) -> None:
    order = DataOrder(10, 8, 3, (Part("a", 3, 2), Part("b", 7, 1)))
    parts = [RankBatches(order, 4, 9, rank, world_size) for rank in range(world_size)]
    actual = [[key for part in step for key in part] for step in zip(*parts, strict=True)]
    assert actual == [order.batch(step) for step in range(4, 9)]


def test_weights_of_too_many_digits_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[1, 0.333333\] .* repeats after 1,333,333 samples"):
        cycle_of((1, 0.333333))


def test_sample_seeds_follow_run_seed_epoch_and_sample_only() -> None:
    samples = SeededDataset(["a", "b"], seed=0)
    again = SeededDataset(["a", "b"], seed=0)
    seeds = {samples[(epoch, index)][0] for epoch in range(3) for index in range(2)}
    assert len(seeds) == 6
    assert samples[(2, 1)] == again[(2, 1)]
    assert samples[(2, 1)][1] == "b"
    assert SeededDataset(["a", "b"], seed=1)[(2, 1)] != samples[(2, 1)]


def test_empty_data_is_refused() -> None:
    with pytest.raises(ValueError, match="training data is empty"):
        DataOrder(num_samples=0, global_batch_size=4, seed=0)


def with_num_threads(items: list[tuple[int, int]]) -> tuple[list[tuple[int, int]], int]:
    return items, torch.get_num_threads()


@pytest.mark.parametrize("num_workers", [0, 1, 2, 3])
def test_workers_keep_the_order_and_have_one_thread_each(num_workers: int) -> None:
    keys = RankBatches(DataOrder(50, 4, seed=0), 3, 40, rank=1, world_size=2)
    samples = SeededDataset(range(100, 150), seed=0)
    batches = list(load_batches(range(100, 150), keys, with_num_threads, num_workers))
    assert [items for items, _ in batches] == [[samples[key] for key in batch] for batch in keys]
    assert num_workers == 0 or {num_threads for _, num_threads in batches} == {1}


def test_a_worker_without_shared_memory_says_what_to_do() -> None:
    """Linux kills a process that touches a page of a full /dev/shm."""

    def dies(_: object) -> None:
        os.kill(os.getpid(), signal.SIGBUS)

    order = DataOrder(8, 4, seed=0)
    batches = load_batches(range(8), RankBatches(order, 0, 2, 0, 1), dies, num_workers=1)
    with pytest.raises(ValueError, match=r"/dev/shm .* are free.*lower data\.num_workers"):
        list(batches)


def busy_collate(items: list[tuple[int, int]]) -> torch.Tensor:
    """Takes the first batch at once and is busy with the next for ever."""
    if items[0][1] != 0:
        time.sleep(600)
    return torch.zeros(1)


def test_closing_ends_the_workers_also_busy_ones() -> None:
    """Python would wait at its exit for a worker, and it ignores SIGTERM."""
    order = DataOrder(2, 1, seed=0)
    keys = RankBatches(order, 0, 8, rank=0, world_size=1)
    first = order.batch(0)[0][1]
    batches = load_batches([0, 1] if first == 0 else [1, 0], keys, busy_collate, num_workers=2)
    with pytest.raises(OSError, match="full"), closing(batches):
        next(batches)
        raise OSError("the disk is full")
    assert multiprocessing.active_children() == []
