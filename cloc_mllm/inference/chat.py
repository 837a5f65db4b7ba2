"""Answers a whole chat of several turns and images token by token, as a server needs it.

`GroundingPredictor` asks single questions in batches; a chat may be sampled, ends at given words
and can be stopped after any token. `ChatBatch` answers several together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cloc_mllm.geometry import Boxes
from cloc_mllm.inference.chat_batch import ChatBatch, Row
from cloc_mllm.inference.grounding_predictor import GroundingPredictor
from cloc_mllm.inference.inputs import ImageInput
from cloc_mllm.inference.results import Answer
from cloc_mllm.inference.sampling import Sampling


class PromptTooLong(ValueError):
    """The prompt leaves no room for an answer in the language model's context."""


@dataclass(frozen=True)
class Chat:
    """A chat to answer.

    Args:
        messages: as `ClocMllmProcessor.render` takes them, with one image item per image.
        images: what `open_image` takes or `GroundingPredictor.encode` returned, in the order of
            their items.
        regions: the regions of each image, in any frame of the upright image. The `<region>` of the
            texts stand for those of the first image, then of the second, and so on.
    """

    messages: Sequence[dict[str, Any]]
    images: Sequence[ImageInput] = ()
    regions: Sequence[Boxes] = ()


def answer_chat(
    predictor: GroundingPredictor, chat: Chat, sampling: Sampling, on_token: Callable[[str], None]
) -> Answer:
    """Answers one chat.

    Args:
        on_token: called after each token with the text that has become certain, which may be "";
            joined, these texts are the answer's. An exception it raises ends the answer and is
            raised here.

    Raises:
        PromptTooLong: the prompt fills the language model's context.
        ValueError: images, regions and placeholders do not match.
    """
    batch = ChatBatch(predictor)
    row = prepare_chat(predictor, chat, sampling, on_token)
    batch.join([row])
    while batch.rows:
        batch.step()
    return row.answer(predictor)


@torch.inference_mode()
def prepare_chat(
    predictor: GroundingPredictor, chat: Chat, sampling: Sampling, on_token: Callable[[str], None]
) -> Row:
    """Makes a row of a `ChatBatch`; see `answer_chat` for what it takes and raises."""
    text = predictor.processor.render(chat.messages, add_generation_prompt=True)
    encoded = [predictor.encode(image) for image in chat.images]
    pictures = [image.image for image in encoded]
    distinct = list({id(image.image): image for image in encoded}.values())
    regions: Any = chat.regions[0] if len(chat.regions) == 1 else chat.regions or None
    inputs = predictor.processor(
        [pictures] if pictures else None,
        [text],
        [regions],
        image_features=torch.cat([image.features.tokens for image in distinct])
        if distinct
        else None,
    )
    sizes = [picture.size for picture in pictures]
    ids = predictor.processor.encode_prompt(chat.messages, sizes)
    inputs |= predictor.processor.pad([ids])
    inputs = inputs.to(predictor.model.device)
    return Row(
        predictor.processor,
        inputs,
        distinct,
        pictures[0].size if len(pictures) == 1 else None,
        sampling,
        min(sampling.max_new_tokens, _room(predictor, inputs["input_ids"].shape[1])),
        on_token,
    )


def _room(predictor: GroundingPredictor, num_prompt_tokens: int) -> int:
    """Counts the tokens that the context still has room for."""
    config = predictor.model.config.text_config
    context = getattr(config, "max_position_embeddings", None)
    if context is None:  # a language model without position embeddings has no limit
        return 2**31
    if num_prompt_tokens >= context:
        raise PromptTooLong(
            f"the messages are {num_prompt_tokens} tokens, images included, but the model's "
            f"context holds {context} with the answer; shorten them"
        )
    return context - num_prompt_tokens
