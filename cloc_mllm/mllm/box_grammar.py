"""Says which token may come next, so that decoding writes no malformed box.

An answer is one box or one given text; or it is free, and only its location tokens are held to
whole boxes (integers are plain text there, a `<box>` token is a box by itself). Integers follow
their grammar character by character, however the tokenizer splits them; location tokens come in
fours. In both, x2 > x1 and y2 > y1, so the result always parses to a box with an area.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from cloc_mllm.mllm.coordinates import BOX_TOKEN, BoxFormat

_SEPARATORS = (", ", ", ", ", ", "]")
_LONGEST_INTEGERS = len(" [998, 998, 999, 999]")


class BoxGrammar:
    """Knows the tokens that an answer of exactly one box may go on with.

    Args:
        tokenizer: the language model's tokenizer, with the tokens that the format needs.
        instead: a text that may stand in the place of a box ("" is none).

    Raises:
        ValueError: the tokenizer cannot write a box.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, box_format: BoxFormat, instead: str = ""
    ) -> None:
        self.last_bin = box_format.num_bins - 1
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
        return max(box or _LONGEST_INTEGERS, len(self.instead)) + 1

    def allowed(self, answer: Sequence[int]) -> list[int]:
        """Lists the ids that may follow an answer begun under this grammar; after the box that is
        the end of sequence alone, again and again."""
        ids = self._box_goes_on(answer)
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
        low, high = self._range([token - first for token in open_box])
        banned = [slice(first, first + low), slice(first + high + 1, past)]
        return [*banned, slice(first), slice(past, None)] if open_box else banned

    def _box_goes_on(self, answer: Sequence[int]) -> list[int]:
        """Lists the ids that continue a box; [] if none has begun, or it is complete."""
        if self.box_token is not None:
            return [] if answer else [self.box_token]
        if self.location_start is None:
            if not all(token in self.pieces for token in answer):
                return []
            return list(self._after_text("".join(self.pieces[token] for token in answer)))
        bins = [token - self.location_start for token in answer]
        if len(bins) >= 4 or not all(0 <= place <= self.last_bin for place in bins):
            return []
        low, high = self._range(bins)
        return list(range(self.location_start + low, self.location_start + high + 1))

    def _range(self, numbers: Sequence[int]) -> tuple[int, int]:
        """The smallest and largest value of the next number."""
        if len(numbers) < 2:
            return 0, self.last_bin - 1
        return numbers[len(numbers) - 2] + 1, self.last_bin

    @functools.lru_cache(maxsize=4096)  # noqa: B019  one grammar lives as long as its model
    def _after_text(self, text: str) -> tuple[int, ...]:
        if text.endswith("]"):
            return ()
        pieces = self.pieces.items()
        return tuple(token for token, piece in pieces if self._can_become_box(text + piece))

    def _can_become_box(self, text: str) -> bool:
        text = text.removeprefix(" ")  # which many tokenizers put before the first word
        if not text.startswith("["):
            return not text
        numbers: list[int] = []
        rest = text[1:]
        for separator in _SEPARATORS:
            digits = rest[: len(rest) - len(rest.lstrip("0123456789"))]
            rest = rest[len(digits) :]
            low, high = self._range(numbers)
            if not rest:
                return not digits or _can_grow_into(digits, low, high)
            if not (_is_number(digits) and low <= int(digits) <= high):
                return False
            if not rest.startswith(separator):
                return separator.startswith(rest)
            numbers.append(int(digits))
            rest = rest[len(separator) :]
        return not rest


class BoxLogitsProcessor(LogitsProcessor):
    """Makes `generate` follow the grammar: `generate(logits_processor=[...])`.

    Args:
        prompt_length: number of tokens of the (padded) prompt, in front of the answers.
        boxes_only: whether an answer must be one box; otherwise it is free.
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
            return mask_logits(self.grammar, answers, scores)
        masked = scores.clone()
        for row, answer in zip(masked, answers, strict=True):
            for banned in self.grammar.banned_in_text(answer):
                row[banned] = -torch.inf
        return masked


def mask_logits(grammar: BoxGrammar, answers: Sequence[Sequence[int]], logits: Tensor) -> Tensor:
    """Sets to minus infinity the logits float[B, V] of tokens that may not follow each answer."""
    masked = torch.full_like(logits, -torch.inf)
    for row, answer in enumerate(answers):
        allowed = torch.tensor(grammar.allowed(answer), device=logits.device)
        masked[row, allowed] = logits[row, allowed]
    return masked


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
