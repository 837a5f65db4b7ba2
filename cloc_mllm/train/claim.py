"""Keeps two runs from writing into one directory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from cloc_mllm.distributed import gather_objects, is_main


@contextmanager
def claimed(output_dir: Path) -> Iterator[None]:
    """Makes a directory and holds it for this run, until the end of the context or a crash.

    Every rank must enter.

    Raises:
        ValueError: another run holds it, or it cannot be written into.
    """
    lock = FileLock(output_dir / ".lock", timeout=0)
    problem = _take(lock, output_dir) if is_main() else ""
    problem = gather_objects(problem)[0]
    if problem:
        raise ValueError(problem)
    try:
        yield
    finally:
        lock.release()


def _take(lock: FileLock, output_dir: Path) -> str:
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        return (
            f"another run is at work in {output_dir}; wait for its end, or name another directory"
        )
    except NotImplementedError:  # some network disks
        print(f"note: {output_dir} cannot be locked; do not start a second run in it", flush=True)
    except OSError as error:
        return (
            f"cannot write into {output_dir} ({error.strerror}); make room or allow it, or name "
            "another directory"
        )
    return ""
