"""Keeps Python's search for garbage from holding up a server."""

from __future__ import annotations

import atexit
import gc


def keep_what_is_loaded() -> None:
    """Takes all objects there are for what stays.

    Torch, Transformers and a web framework make half a million, and a search through all of them,
    which comes now and then, holds all threads for a third of a second, on a busy machine for more
    than one. What is made later is still searched.
    """
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # or triton's nanobind lists all that is left when Python ends
