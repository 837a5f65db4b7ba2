"""Keeps the tokens of a frozen vision encoder on disk between steps, epochs and runs.

    DIR/<encoder>/<2 digits>/<sha256 of the picture file>.safetensors

A picture is identified by its bytes, an encoder by its weights and everything else that decides its
tokens. So data sets may share a directory, another encoder finds nothing there, and no file is ever
out of date.
Letters: I images, N tokens, D encoder width.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cloc_mllm.box import Box
from cloc_mllm.data.records import Record
from cloc_mllm.mllm.modeling import ClocMllmForConditionalGeneration
from cloc_mllm.mllm.processing import ClocMllmProcessor
from cloc_mllm.mllm.regions import place_regions

_PREPARATION = ("image_size", "resize", "padding_rgb", "pixel_mean", "pixel_std")


class FeatureCache:
    """Stores the tokens float[N, D] of each picture, in the dtype they were computed in.

    A file gets its name only once it is whole, and all who write it write the same. So several
    ranks and workers may write at a time, and any of them may be killed.
    """

    def __init__(self, directory: str | Path, encoder: str) -> None:
        self.root = Path(directory) / encoder

    def __contains__(self, record: Record) -> bool:
        return self._file(record).is_file()

    def load(self, record: Record) -> Tensor:
        """Loads the tokens of a record's picture.

        Raises:
            ValueError: there is no such file, or it is damaged.
        """
        file = self._file(record)
        try:
            return load_file(file)["tokens"]
        except FileNotFoundError as error:
            raise ValueError(
                f"{self.root} has no features of record {record.id}; was the cache removed during "
                "the run, or is data.feature_cache not shared by all machines?"
            ) from error
        except (SafetensorError, KeyError) as error:
            raise ValueError(
                f"{file} (record {record.id}) is damaged ({error}); remove it, the next start "
                "computes it again"
            ) from error

    def save(self, record: Record, tokens: Tensor) -> None:
        file = self._file(record)
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, partial = tempfile.mkstemp(prefix=".partial-", dir=file.parent)
        os.close(descriptor)
        try:
            save_file({"tokens": tokens.contiguous().cpu()}, partial)
            os.replace(partial, file)
        finally:
            Path(partial).unlink(missing_ok=True)

    def _file(self, record: Record) -> Path:
        name = hashlib.sha256(record.image).hexdigest()
        return self.root / name[:2] / f"{name}.safetensors"


def encoder_identity(
    model: ClocMllmForConditionalGeneration, processor: ClocMllmProcessor, *, bf16: bool
) -> str:
    """Hashes all that decides the tokens of a picture: weights, architecture, preparation,
    precision and the kind of device."""
    encoder = model.vision.encoder
    settings = {
        "cloc": model.config.cloc_config,
        "preparation": [processor.fingerprint[name] for name in _PREPARATION],
        "bf16": bf16,
        "device": next(encoder.parameters()).device.type,
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def record_inputs(
    processor: ClocMllmProcessor,
    records: Sequence[Record],
    boxes: Sequence[Sequence[Box]],
    features: FeatureCache | None,
) -> dict[str, Tensor]:
    """Makes the `VisionInputs` of one picture per row with its `boxes`. With a cache, `features`,
    no picture is decoded."""
    if features is None:
        return processor.vision_inputs([record.load_image() for record in records], boxes)
    views = [processor.views((record.width, record.height)) for record in records]
    rows, regions = [[index] for index in range(len(records))], [[row_boxes] for row_boxes in boxes]
    tokens = torch.stack([features.load(record) for record in records])
    return {"pixel_values": tokens, **place_regions(views, rows, regions)}
