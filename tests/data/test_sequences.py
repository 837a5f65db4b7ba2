"""All sequences of records index and slice as lists do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloc_mllm.data.mixture import Mixture
from cloc_mllm.data.noise import NoisyLabels
from cloc_mllm.data.parquet import load_records, write_records
from cloc_mllm.data.records import Record
from cloc_mllm.train.tiny_llm import Layouts

NUM_RECORDS = 7
bounds = st.none() | st.integers(-10, 10)
steps = st.sampled_from([None, -2, -1, 3])
indices = st.integers(-10, 10) | st.builds(slice, bounds, bounds, steps)


@pytest.fixture(scope="module", params=["dataset", "mixture", "noisy labels", "layouts"])
def records(request, tiny_scenes: list[Record], tmp_path_factory) -> Sequence[Record]:
    if request.param == "noisy labels":
        return NoisyLabels(tiny_scenes[:NUM_RECORDS], 0.2, seed=0)
    if request.param == "layouts":
        return Layouts(NUM_RECORDS, seed=0)
    directory = tmp_path_factory.mktemp("records")
    cuts = {"a": (0, 3), "b": (3, 4), "c": (4, NUM_RECORDS)}
    if request.param == "dataset":
        cuts = {"all": (0, NUM_RECORDS)}
    parts = {}
    for name, (start, stop) in cuts.items():
        write_records(tiny_scenes[start:stop], directory / name)
        parts[name] = load_records(directory / name)
    return parts["all"] if "all" in parts else Mixture(parts, dict.fromkeys(parts, 1.0))


def outcome(sequence: Sequence[Record], index: Any) -> Any:
    try:
        return sequence[index]
    except IndexError:
        return IndexError


@given(index=indices)
def test_an_index_gives_what_it_gives_of_a_list(records: Sequence[Record], index: Any) -> None:
    as_list = [records[position] for position in range(NUM_RECORDS)]
    assert outcome(records, index) == outcome(as_list, index)


def test_iterating_ends(records: Sequence[Record]) -> None:
    iterator = iter(records)
    as_list = [records[position] for position in range(NUM_RECORDS)]
    assert [next(iterator) for _ in range(NUM_RECORDS)] == as_list
    assert next(iterator, None) is None
    assert list(reversed(records)) == as_list[::-1]


def test_an_index_outside_is_named(records: Sequence[Record]) -> None:
    with pytest.raises(IndexError, match=f"record -8 of {NUM_RECORDS}"):
        records[-8]
