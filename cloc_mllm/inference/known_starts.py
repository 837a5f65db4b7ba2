"""Remembers how chats start, as the language model has read them.

A chat starts with its pictures, which are most of its tokens. The next question about the same
pictures, or the next turn, continues from the keys and values of that start.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import DynamicCache


@dataclass(frozen=True)
class Start:
    """The first P tokens of a chat, read.

    Args:
        layers: keys and values float[1, h, P, d] of each layer; empty for P = 0.
        images: what its key names by identity, held so that no other object gets that identity.
    """

    layers: Sequence[tuple[Tensor, Tensor]] = ()
    images: Sequence[Any] = ()

    @property
    def num_tokens(self) -> int:
        return self.layers[0][0].shape[2] if self.layers else 0

    @property
    def num_bytes(self) -> int:
        return sum(part.nbytes for layer in self.layers for part in layer)

    @classmethod
    def of_row(
        cls, cache: DynamicCache, place: int, columns: slice, images: Sequence[Any]
    ) -> Start:
        """Copies what a cache holds of a row in the given columns."""
        held: list[Any] = list(cache.layers)
        return cls(
            [
                (
                    layer.keys[place : place + 1, :, columns].clone(),
                    layer.values[place : place + 1, :, columns].clone(),
                )
                for layer in held
            ],
            images,
        )


class KnownStarts:
    """The starts that were used last.

    Args:
        num_bytes: the most that they may take together.
    """

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._starts: OrderedDict[Hashable, Start] = OrderedDict()
        self._held = 0

    def get(self, key: Hashable) -> Start | None:
        """Returns a start that is known."""
        if key in self._starts:
            self._starts.move_to_end(key)
        return self._starts.get(key)

    def add(self, key: Hashable, start: Start) -> None:
        """Keeps a start, and lets go of the oldest that there is no room for."""
        self._starts[key] = start
        self._held += start.num_bytes
        while self._held > self.num_bytes:
            self._held -= self._starts.popitem(last=False)[1].num_bytes
