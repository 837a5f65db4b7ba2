"""Pickles of plain containers: what RefCOCO's `refs(unc).p` is, and nothing else.

A pickle is a program. This reader runs the part that builds lists, dicts, tuples, sets, texts and
numbers; the first request for any class or function ends it, so no code of the file is run.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, NoReturn

# what a damaged or hostile stream of opcodes makes the unpickler raise
_ERRORS = (
    pickle.UnpicklingError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OverflowError,
    RecursionError,
    TypeError,
    ValueError,
)


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise pickle.UnpicklingError("it asks for an object outside the file")


def read_plain_pickle(path: str | Path) -> Any:
    """The containers of a pickle of any protocol; texts of Python 2 are read as UTF-8.

    Raises:
        ValueError: the pickle wants more than plain containers, or is damaged.
    """
    with open(path, "rb") as file:
        try:
            return _PlainUnpickler(file, encoding="utf-8", errors="surrogateescape").load()
        except _ERRORS as error:
            raise ValueError(
                f"{path} is no pickle of plain lists, dicts, texts and numbers: {error}"
            ) from error
