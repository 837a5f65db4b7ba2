"""Several data sets used as one. Each has a weight: its share of the training samples."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from cloc_mllm.config import DataConfig
from cloc_mllm.data.parquet import RecordDataset, load_records
from cloc_mllm.data.records import Record
from cloc_mllm.data.sequences import LazyRecords


class Part(NamedTuple):
    """One data set of a mixture. Weights need not add up to one."""

    name: str
    num_samples: int
    weight: float


class Mixture(LazyRecords):
    """The records of several data sets, one set after the other.

    The sets are sorted by name, so the order in which a config lists them changes nothing.
    `DataOrder` uses `parts` to give each set its share of the samples.
    """

    def __init__(self, datasets: dict[str, RecordDataset], weights: dict[str, float]) -> None:
        names = sorted(datasets)
        self.datasets = [datasets[name] for name in names]
        self.parts = tuple(Part(name, len(datasets[name]), weights[name]) for name in names)
        self._ends = list(itertools.accumulate(part.num_samples for part in self.parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def _record(self, position: int) -> Record:
        part = bisect.bisect_right(self._ends, position)
        start = self._ends[part] - self.parts[part].num_samples
        return self.datasets[part][position - start]

    def without_images(self) -> Iterator[Record]:
        """All records in order, with empty image bytes; see `RecordDataset.without_images`."""
        for dataset in self.datasets:
            yield from dataset.without_images()


def load_training_data(config: DataConfig) -> RecordDataset | Mixture:
    """Opens the data set `data.train`, or the data sets of `data.mixture`.

    Raises:
        ValueError: neither or both are given, or a data set of the mixture is empty or has no
            positive weight.
        FileNotFoundError, OSError: see `load_records`.
    """
    if bool(config.train) == bool(config.mixture):
        given = "both are given" if config.train else "data.train is empty"
        raise ValueError(
            f"{given}; name a directory of records in data.train (`cloc-mllm data build` makes one "
            "from built-in scenes), or several with weights in data.mixture"
        )
    if config.train:
        return load_records(config.train, cache_dir=config.cache_dir)
    datasets = {}
    for name, weight in config.mixture.items():
        if not 0 < weight < float("inf"):
            raise ValueError(
                f"data.mixture gives {name} the weight {weight}; give a number above 0, or leave "
                "it out"
            )
        datasets[name] = load_records(name, cache_dir=config.cache_dir)
        if not len(datasets[name]):
            raise ValueError(f"{name} of data.mixture has no records; leave it out")
    return Mixture(datasets, config.mixture)


def parts_of(dataset: Sequence[Record]) -> tuple[Part, ...]:
    """The data sets of a mixture; () for a single data set."""
    return dataset.parts if isinstance(dataset, Mixture) else ()
