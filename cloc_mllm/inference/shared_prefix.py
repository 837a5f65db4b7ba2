"""Reads once what many questions about one image start with.

The rows of a batch begin alike: the chat template, the image or images, "Where is". The function
`prefill_shared` runs those P tokens through the language model once for all rows of an image, hands
the key-value cache to the B rows, and leaves only the rest of each row to `generate`. With I tokens
per image and q per question, k questions about an image cost I + kq tokens instead of k(I + q).
`prefill_known` does the same for questions that come one after another.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from cloc_mllm.inference.inputs import EncodedImage
from cloc_mllm.inference.known_starts import KnownStarts, Start
from cloc_mllm.mllm.language_model import CACHE
from cloc_mllm.mllm.modeling import ClocMllmForConditionalGeneration, VisionInputs


def prefill_shared(
    model: ClocMllmForConditionalGeneration, inputs: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Makes arguments of `generate` with the same answers, whose shared start is in a cache.

    Args:
        inputs: what `ClocMllmProcessor` returned for B rows, padded on the left.

    Returns:
        `inputs` itself where nothing would be saved: every row has other images or another number
        of them, the rows differ before their images end, or the language model keeps a state, in
        which there can be no gaps (Mamba).
    """
    found = (inputs["input_ids"] == model.config.image_token_id).sum(1)
    if (found != found[0]).any() or model.language_model._is_stateful:
        return inputs
    images_of_rows = inputs["image_index"].view(len(found), -1)
    if len(images_of_rows.unique(dim=0)) == len(found):
        return inputs
    config = model.config
    input_ids, attention_mask = inputs["input_ids"], inputs["attention_mask"]
    length = shared_length(input_ids, attention_mask, config.region_token_id)
    input_ids, attention_mask = gap_after(length, input_ids, attention_mask)
    if (input_ids[:, length:] == config.image_token_id).any():
        return inputs
    given = {name: inputs[name] for name in VisionInputs._fields if name in inputs}
    vision = VisionInputs(**given)
    cache, region_features = model.prefill(input_ids[0, :length], vision)
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        CACHE: cache,
        "region_features": region_features,
        # the images are in the cache: a region belongs to its row
        "region_image_index": vision.region_image_index // images_of_rows.shape[1],
    }


def prefill_known(
    model: ClocMllmForConditionalGeneration,
    inputs: Mapping[str, Any],
    image: EncodedImage,
    known: KnownStarts,
) -> Mapping[str, Any]:
    """Makes arguments of `generate` with the same answer to one question, whose start up to the
    end of its image is in a cache.

    Args:
        inputs: what `ClocMllmProcessor` returned for one row with one image.
        image: whose row it is.
        known: the starts that were read; one that is new is added.

    Returns:
        `inputs` itself where the start cannot be kept: a region lies in it, or the language model
        keeps a state (Mamba) or a window in place of all keys.
    """
    config, input_ids = model.config, inputs["input_ids"]
    length = int((input_ids[0] == config.image_token_id).nonzero().max()) + 1
    cache = DynamicCache(config=config.get_text_config(decoder=True))
    is_plain = all(type(layer) is DynamicLayer for layer in cache.layers)
    has_region = bool((input_ids[0, :length] == config.region_token_id).any())
    if has_region or model.language_model._is_stateful or not is_plain:
        return inputs
    vision = VisionInputs(**{name: inputs[name] for name in VisionInputs._fields if name in inputs})
    key = id(image), tuple(input_ids[0, :length].tolist())
    start, region_features = known.get(key), None
    if start is None:
        cache, region_features = model.prefill(input_ids[0, :length], vision)
        known.add(key, Start.of_row(cache, 0, slice(length), [image]))
    else:
        for index, layer in enumerate(start.layers):
            cache.update(*layer, index)
        if len(vision.region_boxes):
            region_features = model.encode_regions(vision)
    return {
        "input_ids": input_ids,
        "attention_mask": inputs["attention_mask"],
        CACHE: cache,
        "region_features": region_features,
        "region_image_index": torch.zeros_like(vision.region_image_index),
    }


def shared_length(input_ids: Tensor, attention_mask: Tensor, region_token_id: int) -> int:
    """Counts the first tokens that all rows share.

    The count ends before any `<region>`, whose features differ, and at least one token before the
    end of the shortest row, because `generate` must have something left to read.

    Args:
        input_ids, attention_mask: int64[B, T], padded on the left.
    """
    num_tokens = attention_mask.sum(1)
    longest = int(num_tokens.min()) - 1
    starts = (input_ids.shape[1] - num_tokens)[:, None]
    place = torch.arange(longest, device=input_ids.device)
    aligned = input_ids.gather(1, starts + place)
    same = (aligned == aligned[:1]).all(0) & (aligned[0] != region_token_id)
    return int(same.long().cumprod(0).sum())


def gap_after(length: int, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Moves the padding of each row from its left end to behind its first `length` tokens.

    Then the shared start is in the same columns of every row, and every row still ends in the last
    column, where `generate` continues. Positions count real tokens, so a gap changes none of them.
    """
    gaps = (attention_mask == 0).sum(1, keepdim=True)
    column = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    source = torch.where(column < length, column + gaps, column)
    source = torch.where((column >= length) & (column < length + gaps), column - length, source)
    return input_ids.gather(1, source), attention_mask.gather(1, source)
