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

from cloc_mllm.data.chats import ChatImage, MentionedBox
from cloc_mllm.data.records import Record
from cloc_mllm.mllm.modeling import ClocMllmForConditionalGeneration
from cloc_mllm.mllm.processing import ClocMllmProcessor
from cloc_mllm.mllm.regions import place_regions

_PREPARATION = ("image_size", "resize", "padding_rgb", "pixel_mean", "pixel_std")
Picture = Record | ChatImage  # a record is one picture


class FeatureCache:
    """Stores the tokens float[N, D] of each picture, in the dtype they were computed in.

    A file gets its name only once it is whole, and all who write it write the same. So several
    ranks and workers may write at a time, and any of them may be killed.
    """

    def __init__(self, directory: str | Path, encoder: str) -> None:
        self.root = Path(directory) / encoder

    def __contains__(self, picture: Picture) -> bool:
        return self._file(picture).is_file()

    def load(self, picture: Picture) -> Tensor:
        """Loads the tokens of a picture.

        Raises:
            ValueError: there is no such file, or it is damaged.
        """
        file = self._file(picture)
        try:
            return load_file(file)["tokens"]
        except FileNotFoundError as error:
            raise ValueError(
                f"{self.root} has no features of {picture.id}; was the cache removed during "
                "the run, or is data.feature_cache not shared by all machines?"
            ) from error
        except (SafetensorError, KeyError) as error:
            raise ValueError(
                f"{file} ({picture.id}) is damaged ({error}); remove it, the next start "
                "computes it again"
            ) from error

    def save(self, picture: Picture, tokens: Tensor) -> None:
        file = self._file(picture)
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, partial = tempfile.mkstemp(prefix=".partial-", dir=file.parent)
        os.close(descriptor)
        try:
            save_file({"tokens": tokens.contiguous().cpu()}, partial)
            os.replace(partial, file)
        finally:
            Path(partial).unlink(missing_ok=True)

    def _file(self, picture: Picture) -> Path:
        name = hashlib.sha256(picture.image).hexdigest()
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


def picture_inputs(
    processor: ClocMllmProcessor,
    rows: Sequence[Sequence[Picture]],
    mentioned: Sequence[Sequence[MentionedBox]],
    features: FeatureCache | None,
) -> dict[str, Tensor]:
    """Makes `VisionInputs` of rows of pictures; {} where no row has one.

    A picture that occurs several times is prepared once.

    Args:
        mentioned: for each row what its `<region>` tokens stand for, in the order of the tokens.
        features: out of them, if they are given, and then no picture is decoded.
    """
    distinct = {picture.image: picture for row in rows for picture in row}
    if not distinct:
        return {}
    views = [processor.views((of.width, of.height)) for of in distinct.values()]
    if features is None:
        pixels = [
            processor.image_processor.prepare(view.crop(image))
            for picture, of_picture in zip(distinct.values(), views, strict=True)
            for image in [picture.load_image()]
            for view in of_picture
        ]
    else:
        pixels = [features.load(picture) for picture in distinct.values()]
    number = {image: index for index, image in enumerate(distinct)}
    regions = [
        [[of.box for of in of_row if of.image == index] for index in range(len(row))]
        for row, of_row in zip(rows, mentioned, strict=True)
    ]
    placed = place_regions(views, [[number[p.image] for p in row] for row in rows], regions)
    order = _order_of_tokens(mentioned)
    for name in ("region_boxes", "region_image_index"):
        placed[name] = placed[name][order]
    return {"pixel_values": torch.stack(pixels), **placed}


def _order_of_tokens(mentioned: Sequence[Sequence[MentionedBox]]) -> list[int]:
    """Where each region lies that `place_regions` has sorted by row and image."""
    order: list[int] = []
    for of_row in mentioned:
        by_image = sorted(range(len(of_row)), key=lambda index: of_row[index].image)
        order += [len(order) + by_image.index(index) for index in range(len(of_row))]
    return order
