"""Names a frozen encoder's tokens in the feature cache, and makes a model's inputs of them.

Letters: I images, N tokens, D encoder width.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from cloc_mllm.data.chats import MentionedBox
from cloc_mllm.data.feature_cache import FeatureCache, Picture, identity_of
from cloc_mllm.mllm.modeling import ClocMllmForConditionalGeneration
from cloc_mllm.mllm.processing import ClocMllmProcessor
from cloc_mllm.mllm.regions import place_regions

_PREPARATION = ("image_size", "resize", "padding_rgb", "pixel_mean", "pixel_std")


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
    return identity_of(settings, encoder.state_dict())


def picture_inputs(
    processor: ClocMllmProcessor,
    rows: Sequence[Sequence[Picture]],
    mentioned: Sequence[Sequence[MentionedBox]],
    features: FeatureCache | None,
    answered: Sequence[Sequence[MentionedBox]] = (),
) -> dict[str, Tensor]:
    """Makes `VisionInputs` of rows of pictures; {} where no row has one.

    A picture that occurs several times is prepared once.

    Args:
        mentioned: for each row what its `<region>` tokens stand for, in the order of the tokens.
        features: out of them, if they are given, and then no picture is decoded.
        answered: the boxes of each row's answers, in their order, for `answer_image_index`.
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
        pixels = [features.load(picture)["tokens"] for picture in distinct.values()]
    number = {image: index for index, image in enumerate(distinct)}
    regions = [
        [[of.box for of in of_row if of.image == index] for index in range(len(row))]
        for row, of_row in zip(rows, mentioned, strict=True)
    ]
    placed = place_regions(views, [[number[p.image] for p in row] for row in rows], regions)
    order = _order_of_tokens(mentioned)
    for name in ("region_boxes", "region_image_index"):
        placed[name] = placed[name][order]
    if answered:
        whole_view = list(itertools.accumulate(map(len, views), initial=0))
        pointed_into = [
            whole_view[number[row[of.image].image]]
            for row, of_row in zip(rows, answered, strict=True)
            for of in of_row
        ]
        placed["answer_image_index"] = torch.tensor(pointed_into, dtype=torch.long)
    return {"pixel_values": torch.stack(pixels), **placed}


def _order_of_tokens(mentioned: Sequence[Sequence[MentionedBox]]) -> list[int]:
    """Where each region lies that `place_regions` has sorted by row and image."""
    order: list[int] = []
    for of_row in mentioned:
        by_image = sorted(range(len(of_row)), key=lambda index: of_row[index].image)
        order += [len(order) + by_image.index(index) for index in range(len(of_row))]
    return order
