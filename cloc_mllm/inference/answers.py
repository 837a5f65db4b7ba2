"""Reads what `generate` wrote: the text, the boxes in it, and how confident the model was."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cloc_mllm.geometry import Boxes
from cloc_mllm.inference.results import Answer
from cloc_mllm.mllm.coordinates import BOX_TOKEN, linked_phrases
from cloc_mllm.mllm.processing import ClocMllmProcessor


class Generation(NamedTuple):
    """One answer as `generate` wrote it.

    Attributes:
        ids: its new tokens, with the end of sequence if there is one, and any padding behind it.
        log_probs: float[T], the log-probability of each.
        head_boxes: what the box head read off each `<box>` token (xyxy, normalised to the upright
            image); empty without a head.
        head_scores: how confident the head was of each.
        num_prompt_tokens: the length of its prompt.
        limit: the largest number of tokens it could have had.
    """

    ids: list[int]
    log_probs: Tensor
    head_boxes: Sequence[Sequence[float]]
    head_scores: Sequence[float]
    num_prompt_tokens: int
    limit: int


def read_answer(
    processor: ClocMllmProcessor,
    written: Generation,
    image_wh: tuple[float, float] | None,
    cut: int | None = None,
) -> Answer:
    """Reads one answer.

    Args:
        image_wh: width and height of the upright image that the boxes are of; None where there is
            not exactly one image.
        cut: the place in the decoded text where a stop word ends the answer.
    """
    length = processor.answer_length(written.ids)
    ids, log_probs = written.ids[:length], written.log_probs[:length]
    whole = processor.decode_ids(ids)[:cut]
    text = whole.strip()
    found, box_failures = processor.coordinates.find(text, written.head_boxes)
    num_blanks = len(whole) - len(whole.lstrip())
    if written.head_boxes:
        scores = [written.head_scores[text.count(BOX_TOKEN, 0, start)] for start, _, _ in found]
    else:
        placed = [(start + num_blanks, end + num_blanks) for start, end, _ in found]
        scores = [_probability(processor, ids, log_probs.tolist(), place) for place in placed]
    spans = [(start, end) for start, end, _ in found]
    confidence = float(log_probs.mean().exp()) if length else None
    num_new_tokens = min(length + 1, len(written.ids))
    has_ended = cut is not None or length < len(written.ids) or num_new_tokens < written.limit
    return Answer(
        text,
        Boxes.normalized([box for _, _, box in found], image_wh),
        torch.tensor(scores, dtype=torch.float64),
        spans,
        min(written.head_scores, default=confidence),
        processor.coordinates.parse(text, written.head_boxes).failure,
        box_failures,
        "stop" if has_ended else "length",
        written.num_prompt_tokens,
        num_new_tokens,
        linked_phrases(text, spans),
    )


def _probability(
    processor: ClocMllmProcessor,
    ids: list[int],
    log_probs: Sequence[float],
    place: tuple[int, int],
) -> float:
    """The geometric mean of the probabilities of the tokens that wrote `text[start:end]`."""
    start, end = place
    counts = range(1, len(ids) + 1)

    def num_characters(count: int) -> int:
        return len(processor.decode_ids(ids[:count]))

    first = bisect.bisect_right(counts, start, key=num_characters)
    last = bisect.bisect_left(counts, end, key=num_characters)
    wrote = log_probs[first : last + 1]
    return math.exp(sum(wrote) / len(wrote))
