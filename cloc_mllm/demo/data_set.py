"""A set of records or chats to look at, and what its build left out."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from cloc_mllm.box import Box
from cloc_mllm.data.chats import Chat
from cloc_mllm.data.parquet import DROPS_NAME, load_set, read_manifest
from cloc_mllm.data.reasons import REASONS
from cloc_mllm.data.records import Record
from cloc_mllm.data.statistics import describe_build

_MAX_SEARCHED = 50_000  # items whose texts are held in memory, and lines of drops.jsonl
_MAX_DROPS_SHOWN = 50


class Named(NamedTuple):
    """What the boxes of an image are called."""

    text: str
    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class Item:
    """A record or a chat, ready to be shown.

    Args:
        record: what the demo can ask about: a chat has no phrases of its own.
        image: its image, or the first one of a chat; None for a chat without any.
        named: the boxes in that image.
        texts: captions, or turns with their roles.
        num_images: of a chat; only the first is shown.
    """

    id: str
    record: Record | None
    image: Image.Image | None
    named: tuple[Named, ...]
    texts: tuple[str, ...]
    num_images: int = 1


class Dropped(NamedTuple):
    """What a build left out, and why."""

    kind: str
    id: str
    reason: str
    found: str

    @property
    def expected(self) -> str:
        return REASONS.get(self.reason, "")


class DataSet:
    """The set in a directory that `cloc-mllm data build` made. Its files are only read.

    Raises:
        ValueError, FileNotFoundError: there is none.
    """

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.items = load_set(directory)
        self.built = describe_build(read_manifest(directory))

    def __len__(self) -> int:
        return len(self.items)

    def find(self, words: str) -> list[int]:
        """Lists the items whose texts hold all the words; all items for none.

        Only the first 50,000 items are searched.
        """
        wanted = words.lower().split()
        if not wanted:
            return list(range(len(self)))
        return [
            index for index, text in enumerate(self._texts) if all(word in text for word in wanted)
        ]

    def read(self, index: int) -> Item:
        """Reads one item with its image."""
        item = self.items[index]
        return _of_chat(item) if isinstance(item, Chat) else _of_record(item)

    def drops(self, words: str) -> tuple[Counter[str], list[Dropped]]:
        """Counts the drops that hold all the words by reason, and gives the first fifty."""
        wanted = words.lower().split()
        found = [
            drop for drop in self._drops if all(word in " ".join(drop).lower() for word in wanted)
        ]
        return Counter(drop.reason for drop in found), found[:_MAX_DROPS_SHOWN]

    @cached_property
    def _texts(self) -> list[str]:
        items: Iterator[Record | Chat] = itertools.chain(self.items.without_images())
        searched = itertools.islice(items, _MAX_SEARCHED)
        return [" ".join(_all_texts(item)).lower() for item in searched]

    @cached_property
    def _drops(self) -> Sequence[Dropped]:
        path = Path(self.directory) / DROPS_NAME
        if not path.is_file():  # a set behind a URL, or a single shard
            return []
        with path.open(encoding="utf-8") as file:
            rows = map(json.loads, itertools.islice(file, _MAX_SEARCHED))
            return [Dropped(*(str(row[name]) for name in Dropped._fields)) for row in rows]


def _all_texts(item: Record | Chat) -> list[str]:
    if isinstance(item, Chat):
        return [item.id, *(turn.text for turn in item.turns)]
    regions = item.regions
    expressions = [text for region in regions for text in region.expressions]
    return [item.id, *item.captions, *(region.phrase for region in regions), *expressions]


def _of_record(record: Record) -> Item:
    named = tuple(
        Named("; ".join(dict.fromkeys([region.phrase, *region.expressions])), (region.box,))
        for region in record.regions
    )
    return Item(record.id, record, record.load_image(), named, tuple(record.captions))


def _of_chat(chat: Chat) -> Item:
    named = tuple(
        Named(piece.phrase or piece.text, piece.boxes)
        for piece in chat.places
        if piece.boxes and piece.image == 0
    )
    texts = tuple(f"{turn.role}: {turn.text}" for turn in chat.turns)
    image = chat.images[0].load_image() if chat.images else None
    return Item(chat.id, None, image, named, texts, len(chat.images))
