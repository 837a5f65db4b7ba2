"""Answers a whole chat of several turns and images token by token, as a server needs it.

`GroundingPredictor` asks single questions in batches; a chat is one row, may be sampled, ends at
given words and can be stopped after any token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

from cloc_mllm.data.images import ImageSource, open_image
from cloc_mllm.geometry import Boxes
from cloc_mllm.inference.answers import Generation, read_answer
from cloc_mllm.inference.grounding_predictor import GroundingPredictor
from cloc_mllm.inference.results import Answer
from cloc_mllm.mllm.box_grammar import BoxLogitsProcessor
from cloc_mllm.mllm.processing import ClocMllmProcessor

MIN_TEMPERATURE = 1e-5  # logits divided by less are no numbers any more; vLLM's bound, too
_BROKEN_CHARACTER = "\ufffd"  # how the first tokens of a character of several bytes decode


class PromptTooLong(ValueError):
    """The prompt leaves no room for an answer in the language model's context."""


@dataclass(frozen=True)
class Chat:
    """A chat to answer.

    Args:
        messages: as `ClocMllmProcessor.render` takes them, with one image item per image.
        images: what `open_image` takes, in the order of their items.
        regions: the regions of each image, in any frame of the upright image. The `<region>` of the
            texts stand for those of the first image, then of the second, and so on.
    """

    messages: Sequence[dict[str, Any]]
    images: Sequence[ImageSource] = ()
    regions: Sequence[Boxes] = ()


@dataclass(frozen=True)
class Sampling:
    """The settings of an answer.

    Args:
        temperature: 0 is greedy, as is everything below `MIN_TEMPERATURE`.
        seed: None draws another answer each time.
        stop: words that end the answer and are not part of it.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    @property
    def is_greedy(self) -> bool:
        return self.temperature < MIN_TEMPERATURE

    def generate_options(self) -> dict[str, Any]:
        """Makes the arguments of `generate` that choose the next token."""
        if self.is_greedy:
            return {"do_sample": False}
        options = {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return {"do_sample": True, **options}


@torch.inference_mode()
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
    images = [open_image(image) for image in chat.images]
    inputs = _prepare(predictor, chat, images)
    num_prompt_tokens = inputs["input_ids"].shape[1]
    limit = min(sampling.max_new_tokens, _room(predictor, num_prompt_tokens))
    scores = _LogProbs()
    held = BoxLogitsProcessor(predictor.grammar, num_prompt_tokens, boxes_only=False)
    written = _Written(predictor.processor, num_prompt_tokens, sampling.stop, scores, on_token)
    if not sampling.is_greedy and sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    with predictor.model.hidden_states_of_answers() as states:
        predictor.model.generate(
            **inputs,
            **sampling.generate_options(),
            max_new_tokens=limit,
            logits_processor=[scores, held],
            stopping_criteria=[written],
        )
    written.finish()
    hidden = torch.cat(states) if states else None
    head = predictor.read_boxes(torch.tensor(written.ids), hidden)
    log_probs = torch.tensor(written.log_probs)
    generation = Generation(written.ids, log_probs, *head, num_prompt_tokens, limit)
    image_wh = images[0].size if len(images) == 1 else None
    return read_answer(predictor.processor, generation, image_wh, written.cut)


def _prepare(predictor: GroundingPredictor, chat: Chat, images: Sequence[Image.Image]) -> Any:
    processor = predictor.processor
    text = processor.render(chat.messages, add_generation_prompt=True)
    regions: Any = chat.regions[0] if len(chat.regions) == 1 else chat.regions or None
    rows = [list(images)] if images else None
    inputs = processor(rows, [text], [regions])
    ids = processor.encode_prompt(chat.messages, [image.size for image in images])
    inputs |= processor.pad([ids])
    return inputs.to(predictor.model.device)


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


class _LogProbs(LogitsProcessor):
    """Keeps the log-probabilities of the next token, before temperature and top_p."""

    last: Tensor

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.last = scores.float().log_softmax(-1)
        return scores


@dataclass
class _Written(StoppingCriteria):
    """The answer so far; `generate` calls it after each token.

    Attributes:
        ids: the new tokens, with the end of sequence.
        log_probs: their log-probabilities.
        text: the decoded `ids`, with outer blanks and what follows a stop word.
        cut: the position in `text` of the first stop word, None without one.
    """

    processor: ClocMllmProcessor
    prompt_length: int
    stop: tuple[str, ...]
    scores: _LogProbs
    on_token: Callable[[str], None]
    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    text: str = ""
    cut: int | None = None
    num_shown: int = 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.ids = input_ids[0, self.prompt_length :].tolist()
        self.log_probs.append(float(self.scores.last[0, self.ids[-1]]))
        self.text = self.processor.decode_ids(self.ids[: self.processor.answer_length(self.ids)])
        places = [place for word in self.stop if (place := self.text.find(word)) >= 0]
        self.cut = min(places, default=None)
        self._show(self._certain())
        return torch.full((1,), self.cut is not None, device=input_ids.device)

    def finish(self) -> None:
        self._show(self.visible)

    @property
    def visible(self) -> str:
        return self.text[: self.cut].strip()

    def _certain(self) -> str:
        """The visible text without an end that the next token may still change into a stop word."""
        text = self.text.lstrip()
        if self.cut is not None:
            return self.visible
        held = max((_overlap(text, word) for word in self.stop), default=0)
        return text[: len(text) - held].rstrip().rstrip(_BROKEN_CHARACTER).rstrip()

    def _show(self, text: str) -> None:
        self.on_token(text[self.num_shown :])
        self.num_shown = max(self.num_shown, len(text))


def _overlap(text: str, word: str) -> int:
    """The length of the longest end of `text` with which `word` begins."""
    lengths = range(min(len(text), len(word) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(word[:length])), 0)
