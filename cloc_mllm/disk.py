"""Says in one line what a disk refused and what to do about it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

_ADVICE = {
    errno.ENOSPC: "make room on it",
    errno.EDQUOT: "make room within your quota",
    errno.EFBIG: "allow larger files (ulimit -f), or make room",
    errno.EROFS: "make it writable, or name a directory elsewhere",
    errno.EIO: "look at the disk, or name a directory elsewhere",
    errno.ESTALE: "mount it again",
}
# libraries in Rust and C++, and workers' tracebacks, tell the number or the text alone
_TEXTS = {
    os.strerror(number): number for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
}


def disk_problem(error: BaseException) -> str:
    """Says what was refused and what to do; "" if the error has nothing to do with a disk."""
    for each in _chain(error):
        number = _number(each)
        if number:
            name = getattr(each, "filename", None)
            where = f" ({name})" if name else ""
            return f"{os.strerror(number)}{where}: {_ADVICE[number]}"
    return ""


def _number(error: BaseException) -> int:
    if isinstance(error, OSError) and error.errno in _ADVICE:
        return error.errno
    text = str(error)
    return next((number for sign, number in _TEXTS.items() if sign in text), 0)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
