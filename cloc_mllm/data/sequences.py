"""Sequences of records that are read or made one at a time, when they are asked for."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import overload

from cloc_mllm.data.records import Record


class LazyRecords(Sequence[Record]):
    """Indexes and slices as a list does. A subclass has `__len__` and `_record`."""

    @abstractmethod
    def _record(self, position: int) -> Record:
        """The record at a position from 0 to `len(self) - 1`."""

    @overload
    def __getitem__(self, index: int) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...

    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self._record(position) for position in range(*index.indices(len(self)))]
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return self._record(position)
