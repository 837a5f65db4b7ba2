"""Keeps what a frozen image tower computes on disk between steps, epochs and runs.

    DIR/<tower>/<2 digits>/<sha256 of the picture file>[-mirrored].safetensors

A picture is identified by its bytes, a tower by its weights and everything else that decides what
it computes. So data sets may share a directory, another tower finds nothing there, and no file is
ever out of date.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cloc_mllm.data.chats import ChatImage
from cloc_mllm.data.records import Record

Picture = Record | ChatImage  # a record is one picture


class FeatureCache:
    """Stores named tensors of each picture, in the dtype they were computed in.

    A file gets its name only once it is whole, and all who write it write the same. So several
    ranks and workers may write at a time, and any of them may be killed.
    """

    def __init__(self, directory: str | Path, tower: str) -> None:
        self.root = Path(directory) / tower

    def has(self, picture: Picture, *, mirrored: bool = False) -> bool:
        return self._file(picture, mirrored).is_file()

    def load(self, picture: Picture, *, mirrored: bool = False) -> dict[str, Tensor]:
        """Loads the tensors of a picture.

        Raises:
            ValueError: there is no such file, or it is damaged.
        """
        file = self._file(picture, mirrored)
        try:
            return load_file(file)
        except FileNotFoundError as error:
            raise ValueError(
                f"{self.root} has no features of {picture.id}; was the cache removed during "
                "the run, or is data.feature_cache not shared by all machines?"
            ) from error
        except SafetensorError as error:
            raise ValueError(
                f"{file} ({picture.id}) is damaged ({error}); remove it, the next start "
                "computes it again"
            ) from error

    def save(self, picture: Picture, tensors: dict[str, Tensor], *, mirrored: bool = False) -> None:
        save_whole(self._file(picture, mirrored), tensors)

    def _file(self, picture: Picture, mirrored: bool) -> Path:
        name = hashlib.sha256(picture.image).hexdigest()
        return self.root / name[:2] / f"{name}{'-mirrored' if mirrored else ''}.safetensors"


def identity_of(settings: dict[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Names a tower by its settings and weights: 16 hexadecimal digits."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(
            tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()[:16]


def save_whole(file: Path, tensors: dict[str, Tensor]) -> None:
    """Writes a safetensors file that is there either whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, partial = tempfile.mkstemp(prefix=".partial-", dir=file.parent)
    os.close(descriptor)
    try:
        save_file({name: x.contiguous().cpu() for name, x in tensors.items()}, partial)
        os.replace(partial, file)
    finally:
        Path(partial).unlink(missing_ok=True)
