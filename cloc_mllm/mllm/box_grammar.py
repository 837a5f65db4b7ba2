"""Says which token may come next, so that decoding writes no malformed box.

An answer is boxes, one or more by what the model was taught, or one given text instead; or it is
free, and its location tokens come in whole boxes (integers are plain text there, a `<box>` token is
a box by itself). Integers are held to their grammar character by character, whatever the tokenizer
makes of them; location tokens come four to a box. In both the right and lower ends lie beyond the
left and upper ones, so what comes out always parses to boxes with an area; and each box comes
behind the one before it in the order of `BoxFormat.in_order`, so none comes twice.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from cloc_mllm.devices import without_waiting
from cloc_mllm.mllm.coordinates import BOX_TOKEN, BoxFormat

_SEPARATORS = (", ", ", ", ", ", "]")
_BETWEEN = " "  # boxes of integers
_LONGEST_INTEGERS = len(" [998, 998, 999, 999]")


class BoxGrammar:
    """What an answer of boxes may go on with.

    Args:
        tokenizer: the language model's, with the tokens that the format needs.
        instead: a text that may be written in the place of boxes ("" is none).
        max_boxes: the largest number of boxes of an answer.
        points: a free answer may also write a point, which is two location tokens.

    Raises:
        ValueError: the tokenizer cannot write a box.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        box_format: BoxFormat,
        instead: str = "",
        *,
        max_boxes: int = 1,
        points: bool = False,
    ) -> None:
        self.last_bin = box_format.num_bins - 1
        self.max_boxes = max_boxes
        self.points = points
        self.end: int = tokenizer.eos_token_id
        self.box_token: int | None = None
        self.location_start: int | None = None
        self.pieces: dict[int, str] = {}
        self.instead: list[int] = tokenizer(instead, add_special_tokens=False)["input_ids"]
        tokens = [BOX_TOKEN] if box_format.head else box_format.tokens()
        vocabulary = tokenizer.get_vocab()
        if missing := [token for token in tokens if token not in vocabulary]:
            raise ValueError(
                f"the tokenizer has no {missing[0]} ({len(missing)} of the tokens that boxes are "
                "written with are missing); add them with mllm.processing.add_special_tokens"
            )
        if box_format.head:
            self.box_token = vocabulary[BOX_TOKEN]
        elif tokens:
            self.location_start = vocabulary[tokens[0]]
        else:
            self.pieces = _number_pieces(tokenizer)
            missing = sorted(set("[0123456789, ]") - set(self.pieces.values()))
            if missing:
                raise ValueError(
                    f"the tokenizer has no single token for {missing}, so not every box can be "
                    "written; use location tokens"
                )

    @property
    def max_tokens(self) -> int:
        """The length of the longest answer, with its end of sequence."""
        box = 1 if self.box_token is not None else 4 if self.location_start is not None else None
        return max((box or _LONGEST_INTEGERS) * self.max_boxes, len(self.instead)) + 1

    def allowed(self, answer: Sequence[int]) -> list[int]:
        """Ids that may follow the ids of an answer begun under this grammar.

        The end of sequence is among them where boxes are complete; after it comes nothing else.
        """
        if self.end in answer:
            return [self.end]
        ids = self._boxes_go_on(answer)
        if self.instead[: len(answer)] == list(answer) and len(answer) < len(self.instead):
            ids = [*ids, self.instead[len(answer)]]
        return ids or [self.end]

    def banned_in_text(self, answer: Sequence[int]) -> list[slice]:
        """Lists the ids that may not follow a free answer; for boxes of location tokens."""
        assert self.location_start is not None
        first, past = self.location_start, self.location_start + self.last_bin + 1
        begun = 0
        while begun < len(answer) and first <= answer[-1 - begun] < past:
            begun += 1
        open_box = answer[len(answer) - begun % 4 :]
        bins = [token - first for token in open_box]
        low, high = self._range(bins)
        if self.points and begun < 2:
            high = self.last_bin  # of a point
        elif self.points and begun == 2 and self.last_bin in bins:
            low = high + 1  # no box starts there
        banned = [slice(first, first + low), slice(first + high + 1, past)]
        if not open_box or (self.points and begun == 2):
            return banned
        return [*banned, slice(first), slice(past, None)]

    def weigh_next_box(self, answers: Sequence[Sequence[int]], scores: Tensor) -> Tensor:
        """Lets another location token follow one where all together are likelier than any other.

        The probability of a next box is spread over the bins where it may start, so the end of the
        answer could be the likeliest single token although the model is surer of a box.

        Args:
            scores: logits float[B, V], of tokens that may not come minus infinity.
        """
        if self.location_start is None:
            return scores
        places = slice(self.location_start, self.location_start + self.last_bin + 1)
        behind = [bool(of) and places.start <= of[-1] < places.stop for of in answers]
        others = scores.clone()
        others[:, places] = -torch.inf
        is_box = scores[:, places].logsumexp(1) > others.amax(1)
        is_box &= without_waiting(torch.tensor(behind), scores.device)
        return scores.masked_fill(is_box[:, None] & others.isfinite(), -torch.inf)

    def _boxes_go_on(self, answer: Sequence[int]) -> list[int]:
        """[] where no box has begun, or none may follow the last one."""
        if self.box_token is not None:
            if any(token != self.box_token for token in answer):
                return []
            more = [self.box_token] * (len(answer) < self.max_boxes)
            return more + [self.end] * bool(answer)
        if self.location_start is None:
            if not all(token in self.pieces for token in answer):
                return []
            return self._text_goes_on("".join(self.pieces[token] for token in answer))
        bins = [token - self.location_start for token in answer]
        if not all(0 <= place <= self.last_bin for place in bins):
            return []
        whole = len(bins) // 4 * 4
        low, high = self._range(bins[whole:], bins[whole - 4 : whole])
        may_end = [self.end] * (len(bins) == whole > 0)
        if whole == 4 * self.max_boxes:
            return may_end
        return list(range(self.location_start + low, self.location_start + high + 1)) + may_end

    def _range(self, numbers: Sequence[int], before: Sequence[int] = ()) -> tuple[int, int]:
        """Smallest and largest value of the next number of a box; none fits if they are inverted.

        Args:
            numbers: those of the box so far.
            before: the box that it must come behind, by its first number that differs.
        """
        place = len(numbers)
        high = self.last_bin - (place < 2)
        low = 0 if place < 2 else numbers[place - 2] + 1
        if before and list(before[:place]) == list(numbers):
            # equal so far: go on equal only if a later number can still be larger
            last = (self.last_bin - 1, self.last_bin - 1, self.last_bin, self.last_bin)
            later = any(before[i] < last[i] for i in range(place + 1, 4))
            low = max(low, before[place] + (not later))
        return low, high

    def _text_goes_on(self, text: str) -> list[int]:
        start = max(text.rfind("["), 0)  # of the last box
        numbers = re.findall("[0-9]+", text[:start])
        before = tuple(map(int, numbers[-4:]))
        return list(self._after_text(text[start:], before, self.max_boxes - len(numbers) // 4))

    @functools.lru_cache(maxsize=4096)  # noqa: B019  one grammar lives as long as its model
    def _after_text(self, text: str, before: tuple[int, ...], max_boxes: int) -> tuple[int, ...]:
        ids = tuple(
            token
            for token, piece in self.pieces.items()
            if self._can_become_boxes(text + piece, before, max_boxes)
        )
        return (*ids, self.end) if text.endswith("]") else ids

    def _can_become_boxes(self, text: str, before: Sequence[int], max_boxes: int) -> bool:
        """Whether a text is the beginning of at most so many boxes behind the box `before`."""
        if not before:
            text = text.removeprefix(" ")  # which many tokenizers put before the first word
        for more in reversed(range(max_boxes)):
            numbers, rest = self._leading_box(text, before)
            if not rest:
                return rest is not None
            if not (more and rest.startswith(_BETWEEN)):
                return False
            text, before = rest[len(_BETWEEN) :], numbers
        return False

    def _leading_box(self, text: str, before: Sequence[int]) -> tuple[list[int], str | None]:
        """The numbers of the box that a text starts with, and what follows a complete one.

        An unfinished one comes with "" if it may become a box, with None if it cannot.
        """
        if not text.startswith("["):
            low, high = self._range([], before)
            return [], "" if not text and low <= high else None
        numbers: list[int] = []
        rest = text[1:]
        for separator in _SEPARATORS:
            digits = rest[: len(rest) - len(rest.lstrip("0123456789"))]
            rest = rest[len(digits) :]
            low, high = self._range(numbers, before)
            if not rest:
                fits = low <= high if not digits else _can_grow_into(digits, low, high)
                return numbers, "" if fits else None
            if not (_is_number(digits) and low <= int(digits) <= high):
                return numbers, None
            if not rest.startswith(separator):
                return numbers, "" if separator.startswith(rest) else None
            numbers.append(int(digits))
            rest = rest[len(separator) :]
        return numbers, rest


class BoxLogitsProcessor(LogitsProcessor):
    """Makes `generate` follow the grammar: `generate(logits_processor=[...])`.

    Args:
        prompt_length: tokens of the (padded) prompt, in front of the answers.
        boxes_only: an answer is boxes, or is free.
    """

    def __init__(self, grammar: BoxGrammar, prompt_length: int, *, boxes_only: bool) -> None:
        self.grammar = grammar
        self.prompt_length = prompt_length
        self.boxes_only = boxes_only

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Sets the scores float[B, V] of tokens that may not come to minus infinity."""
        if not self.boxes_only and self.grammar.location_start is None:
            return scores
        answers = input_ids[:, self.prompt_length :].tolist()
        if self.boxes_only:
            scores = mask_logits(self.grammar, answers, scores)
        else:
            banned = [self.grammar.banned_in_text(answer) for answer in answers]
            scores = scores.masked_fill(_inside(banned, scores), -torch.inf)
        return self.grammar.weigh_next_box(answers, scores)


def mask_logits(grammar: BoxGrammar, answers: Sequence[Sequence[int]], logits: Tensor) -> Tensor:
    """Sets to minus infinity the logits float[B, V] of tokens that may not follow each answer."""
    allowed = [
        (row, token) for row, answer in enumerate(answers) for token in grammar.allowed(answer)
    ]
    rows, tokens = without_waiting(torch.tensor(allowed).reshape(-1, 2), logits.device).unbind(1)
    masked = torch.full_like(logits, -torch.inf)
    masked[rows, tokens] = logits[rows, tokens]
    return masked


def _inside(ranges: Sequence[Sequence[slice]], logits: Tensor) -> Tensor:
    """Marks the tokens that lie in one of their row's ranges: bool[B, V]."""
    num_tokens, most = logits.shape[1], max(map(len, ranges))
    bounds = [
        [part.indices(num_tokens)[:2] for part in row] + [(0, 0)] * (most - len(row))
        for row in ranges
    ]
    start, stop = without_waiting(torch.tensor(bounds), logits.device).split(1, -1)
    tokens = torch.arange(num_tokens, device=logits.device)
    return ((tokens >= start) & (tokens < stop)).any(1)


def _number_pieces(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Maps the ids of tokens made of digits, brackets, commas and spaces to the text of each."""
    opening = tokenizer("[", add_special_tokens=False)["input_ids"]
    before = len(tokenizer.decode(opening))
    special = set(tokenizer.all_special_ids)
    pieces = {
        # decoded alone, some tokens lose a leading space
        token: str(tokenizer.decode([*opening, token]))[before:]
        for token in range(len(tokenizer))
        if token not in special
    }
    return {token: piece for token, piece in pieces.items() if re.fullmatch(r"[\[\]0-9, ]+", piece)}


def _is_number(digits: str) -> bool:
    return bool(digits) and (digits == "0" or digits[0] != "0")


def _can_grow_into(digits: str, low: int, high: int) -> bool:
    """Whether digits begin a number in low..high that is written without leading zeros."""
    if not _is_number(digits):
        return False
    if digits == "0":
        return low == 0
    ranges = (
        (int(digits) * 10**more, 10**more) for more in range(len(str(high)) - len(digits) + 1)
    )
    return any(start <= high and start + size > low for start, size in ranges)
