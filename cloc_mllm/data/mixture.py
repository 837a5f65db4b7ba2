"""Several data sets used as one. Each has a weight: its share of the training samples."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from cloc_mllm.config import DataConfig
from cloc_mllm.data.chats import Chat
from cloc_mllm.data.parquet import ChatDataset, ItemDataset, RecordDataset, load_set
from cloc_mllm.data.sequences import LazySequence


class KeptChats(LazySequence[Chat]):
    """The chats of a data set that are not left out, in their order."""

    kind = "chats"

    def __init__(self, chats: ChatDataset, is_kept: Sequence[bool]) -> None:
        assert len(is_kept) == len(chats)
        self.chats = chats
        self.is_kept = np.array(is_kept, dtype=bool)
        self.positions = np.flatnonzero(self.is_kept)

    def __len__(self) -> int:
        return len(self.positions)

    def _item(self, position: int) -> Chat:
        return self.chats[int(self.positions[position])]

    def without_images(self) -> Iterator[Chat]:
        """See `ItemDataset.without_images`."""
        return itertools.compress(self.chats.without_images(), self.is_kept)


AnyDataset = RecordDataset | ChatDataset | KeptChats


class Part(NamedTuple):
    """One data set of a mixture. Weights need not add up to one."""

    name: str
    num_samples: int
    weight: float


class Mixture(LazySequence[Any]):
    """The records and chats of several data sets, one set after the other.

    The sets are sorted by name, so the order in which a config lists them changes nothing.
    `DataOrder` uses `parts` to give each set its share of the samples.
    """

    def __init__(self, datasets: Mapping[str, AnyDataset], weights: dict[str, float]) -> None:
        names = sorted(datasets)
        self.datasets = [datasets[name] for name in names]
        self.parts = tuple(Part(name, len(datasets[name]), weights[name]) for name in names)
        self._ends = list(itertools.accumulate(part.num_samples for part in self.parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def _item(self, position: int) -> Any:
        part = bisect.bisect_right(self._ends, position)
        start = self._ends[part] - self.parts[part].num_samples
        return self.datasets[part][position - start]

    def without_images(self) -> Iterator[Any]:
        """All items in order, with empty image bytes; see `ItemDataset.without_images`."""
        for dataset in self.datasets:
            yield from dataset.without_images()


def load_training_data(config: DataConfig) -> AnyDataset | Mixture:
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
        return load_set(config.train, cache_dir=config.cache_dir)
    datasets: dict[str, AnyDataset] = {}
    for name, weight in config.mixture.items():
        if not 0 < weight < float("inf"):
            raise ValueError(
                f"data.mixture gives {name} the weight {weight}; give a number above 0, or leave "
                "it out"
            )
        datasets[name] = load_set(name, cache_dir=config.cache_dir)
        if not len(datasets[name]):
            raise ValueError(f"{name} of data.mixture has no records; leave it out")
    return Mixture(datasets, config.mixture)


def missing_sets(config: DataConfig) -> list[str]:
    """Names the local data sets of `data.train` or `data.mixture` that are not there (yet)."""
    return _not_here([config.train] if config.train else list(config.mixture))


def missing_validation(config: DataConfig) -> list[str]:
    """Names the local data set of `data.validation` if it is not there (yet)."""
    return _not_here([config.validation] if config.validation else [])


def _not_here(named: list[str]) -> list[str]:
    return [name for name in named if "://" not in name and not Path(name).exists()]


def load_training_records(config: DataConfig) -> RecordDataset | Mixture:
    """Does the same where chats cannot be learnt from.

    Raises:
        ValueError: also where a data set holds chats.
    """
    dataset = load_training_data(config)
    sets = dataset.datasets if isinstance(dataset, Mixture) else [dataset]
    if any(of.kind == "chats" for of in sets):
        names = ", ".join(config.mixture) or config.train
        raise ValueError(
            f"data ({names}) holds chats, but stage 1 and the alignment of stage 2 learn regions: "
            "build the conversations with --as regions (or set alignment.steps to 0)"
        )
    return cast(RecordDataset | Mixture, dataset)


def keep_chats(dataset: AnyDataset | Mixture, keep: Callable[[Chat], bool]) -> AnyDataset | Mixture:
    """Leaves out the chats for which `keep` is false; it sees them without their images.

    Raises:
        ValueError: a data set has no chat left.
    """

    def kept(name: str, of: AnyDataset) -> AnyDataset:
        if not isinstance(of, ItemDataset) or of.kind != "chats":
            return of
        chats = cast(ChatDataset, of)
        chosen = KeptChats(chats, [keep(chat) for chat in chats.without_images()])
        if not len(chosen):
            raise ValueError(
                f"none of the {len(chats):,} chats{name} can be learnt from (data.skip_chats): "
                "raise conversations.max_length, or leave them out of the data"
            )
        return chosen

    if not isinstance(dataset, Mixture):
        return kept("", dataset)
    names = [part.name for part in dataset.parts]
    sets = zip(names, dataset.datasets, strict=True)
    weights = {part.name: part.weight for part in dataset.parts}
    return Mixture({name: kept(f" of {name}", of) for name, of in sets}, weights)


def parts_of(dataset: Sequence[Any]) -> tuple[Part, ...]:
    """The data sets of a mixture; () for a single data set."""
    return getattr(dataset, "parts", ())
