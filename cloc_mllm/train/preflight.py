"""Before stage 2 trains: records that would stop it, or teach nothing, hours later.

Texts alone are read. Most questions are short enough by the number of their bytes, which is never
below that of their tokens; only the others are tokenised, and rendered as chats if they are long.
"""

from __future__ import annotations

import itertools
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from cloc_mllm.data.conversations import PROMPTS, Turn, absent_turn, build_turns, possible_turns
from cloc_mllm.data.records import Record
from cloc_mllm.mllm.collate import ConversationCollator, as_messages
from cloc_mllm.mllm.coordinates import BOX_TOKEN, IMAGE_TOKEN, REGION_TOKEN
from cloc_mllm.mllm.losses import IGNORE_INDEX
from cloc_mllm.train.data_order import sample_seed

MAX_RECORDS = 200_000  # more are not looked at; a bad one among them stops the run when it comes
_NUM_EXAMPLES = 3
_SLACK = 4  # bytes; some tokenizers put a space before each piece
_JOINED = 8  # tokens; pieces may split otherwise where a template joins them
_REASONS = {
    "no_question": "gives nothing to learn: no region or caption of it serves a task whose weight "
    "in `conversations` is above 0",
    "too_long": "has draws of which no question fits into conversations.max_length beside the "
    "image; raise it",
    "image_tokens": "has a text that holds the image placeholder, so the image's tokens would be "
    "cut; take it out of the text",
    "region_tokens": f"has a text that holds {REGION_TOKEN}, which stands for a box; take it out",
    "box_tokens": f"has a text that holds {BOX_TOKEN}, which stands for a box; take it out",
    "nothing_learnt": "has an answer without a token to learn (an empty or blank text)",
}


@dataclass
class Preflight:
    """What was found.

    Args:
        ids: of refused records by reason, with what is wrong there.
        num_checked: of `num_records`.
    """

    num_records: int
    num_checked: int = 0
    ids: dict[str, list[str]] = field(default_factory=dict)

    def report(self) -> str:
        """One line. Raises `ValueError` that says which records are refused and what to do."""
        checked = f"{self.num_checked:,} of {self.num_records:,} records checked"
        if not self.ids:
            return f"preflight: {checked}, all can be trained on"
        lines = [
            f"{len(ids):,} x {reason}: each {_REASONS[reason]} ({_some(ids)})"
            for reason, ids in sorted(self.ids.items())
        ]
        refused = sum(map(len, self.ids.values()))
        raise ValueError(
            f"{refused:,} records cannot be trained on ({checked}). Repair them, or leave them out "
            "of the data:\n  " + "\n  ".join(lines)
        )


def check_records(
    records: Iterable[Record],
    num_records: int,
    collator: ConversationCollator,
    *,
    seed: int,
    num_epochs: Iterable[int],
) -> Preflight:
    """Look at the first `MAX_RECORDS` records.

    Args:
        records: in the data set's order; their images are not looked at.
        seed: of the run.
        num_epochs: for each record, of the run: one of some long questions is refused if it draws
            none but those in one of its epochs.
    """
    result = Preflight(num_records)
    check = _Check(collator)
    bar = tqdm(
        itertools.islice(records, MAX_RECORDS),
        "preflight",
        min(num_records, MAX_RECORDS),
        unit=" records",
        disable=not sys.stderr.isatty(),
        leave=False,
    )
    for index, (record, epochs) in enumerate(zip(bar, num_epochs, strict=False)):
        seeds = (sample_seed(seed, epoch, index) for epoch in range(epochs))
        fault = check.fault_of(record, seeds)
        result.num_checked += 1
        if fault is not None:
            reason, what = fault
            result.ids.setdefault(reason, []).append(f"{record.id}{what}")
    return result


class _Check:
    """One record at a time."""

    def __init__(self, collator: ConversationCollator) -> None:
        self.collator = collator
        self.config = collator.config
        self.processor = processor = collator.processor
        self.coordinates = processor.coordinates
        empty = Turn("", "", "caption")
        around = _num_bytes(processor.render(as_messages(empty)))
        most_views = 1 + processor.max_tiles
        self.base = most_views * processor.num_image_tokens + around + _SLACK
        one_view = len(processor.encode_conversation(as_messages(empty), [(1, 1)])[0])
        self.exact_base = one_view + processor.max_tiles * processor.num_image_tokens
        special = [*processor.tokenizer.all_special_tokens, IMAGE_TOKEN, REGION_TOKEN]
        special += [BOX_TOKEN] * processor.box_head
        self.special = re.compile("|".join(map(re.escape, special)))
        box = 4 * len(f"<loc_{self.coordinates.num_bins}>")  # longer than integers are
        self.most_around = self.base + max(map(len, PROMPTS.values())) + box
        phrases = collator.phrases
        self.odd_phrases = [text for text in phrases if not self._is_fine(absent_turn(text))]

    def fault_of(self, record: Record, seeds: Iterable[int]) -> tuple[str, str] | None:
        """A key of `_REASONS` and details, or None."""
        if self._is_plain(record):
            return None
        config, phrases = self.config, self.collator.phrases
        turns = list(self.possible(record))
        # which phrases an image lacks takes long to find, and is not needed where all are fine
        if not turns and not any(possible_turns(record, config, self.coordinates, phrases)):
            return "no_question", ""
        too_long: dict[tuple[str, str], int] = {}
        for turn in turns:
            fault, num_tokens = (None, 0) if self._is_fine(turn) else self._fault(turn, record)
            if fault == "too_long":
                too_long[turn.question, turn.answer] = num_tokens
            elif fault:
                return fault, f", {turn.question!r}"
        for seed in seeds if too_long else ():
            rng = np.random.default_rng(seed)
            drawn = build_turns(record, config, self.coordinates, rng, phrases)
            lengths = [too_long.get((turn.question, turn.answer)) for turn in drawn]
            if None not in lengths:
                return "too_long", f", {min(lengths)} tokens of {config.max_length}"  # type: ignore[type-var]
        return None

    def _is_plain(self, record: Record) -> bool:
        """Whether all its questions are fine whatever they are, as most records' are: a question
        and its answer hold one text of it and one box."""
        config = self.config
        asked = (config.refer or config.locate) and record.regions
        if self.odd_phrases or not (asked or (config.caption and record.captions)):
            return False
        texts = [*record.captions]
        for region in record.regions:
            texts += [region.phrase, *region.expressions]
        longest = max(map(_num_bytes, texts))
        blank = not all(map(str.strip, texts))
        special = self.special.search("\n".join(texts))
        return not (blank or special) and self.most_around + longest <= config.max_length

    def possible(self, record: Record) -> Iterator[Turn]:
        """Questions that it may be asked, without those about absent phrases that are fine."""
        return possible_turns(record, self.config, self.coordinates, self.odd_phrases)

    def most_tokens(self, turn: Turn) -> int:
        """Bound of the tokens of a question alone."""
        return self.base + _num_bytes(turn.question) + _num_bytes(turn.answer)

    def _is_fine(self, turn: Turn) -> bool:
        """Whether that is certain without rendering it."""
        question = turn.question.replace(REGION_TOKEN, "", int(turn.region is not None))
        regressed = self.processor.box_head and turn.answer_box is not None
        answer = turn.answer.replace(BOX_TOKEN, "", 1) if regressed else turn.answer
        if not turn.answer.strip() or any(map(self.special.search, (question, answer))):
            return False
        if self.most_tokens(turn) <= self.config.max_length:
            return True
        # a chat template takes ten times as long as the texts it puts together
        texts = self.processor.tokenizer([turn.question, turn.answer], add_special_tokens=False)
        num_tokens = self.exact_base + sum(map(len, texts["input_ids"]))
        return num_tokens + _JOINED <= self.config.max_length

    def _fault(self, turn: Turn, record: Record) -> tuple[str | None, int]:
        """What is wrong with a question alone, and its number of tokens."""
        tokenizer, processor = self.processor.tokenizer, self.processor
        size = record.width, record.height
        ids, labels = processor.encode_conversation(as_messages(turn), [size])
        num_image_tokens = len(processor.views(size)) * processor.num_image_tokens
        learnt = [label for label in labels if label not in (IGNORE_INDEX, tokenizer.eos_token_id)]
        special = {
            "image_tokens": (processor.image_token, num_image_tokens),
            "region_tokens": (REGION_TOKEN, int(turn.region is not None)),
        }
        if processor.box_head:
            special["box_tokens"] = (BOX_TOKEN, int(turn.answer_box is not None))
        for reason, (token, expected) in special.items():
            if ids.count(tokenizer.convert_tokens_to_ids(token)) != expected:
                return reason, len(ids)
        if not learnt or not turn.answer.strip():
            return "nothing_learnt", len(ids)
        return "too_long" if len(ids) > self.config.max_length else None, len(ids)


def _num_bytes(text: str) -> int:
    """Of the longest form that a tokenizer may make of it first."""
    if text.isascii():
        return len(text)
    return max(len(form.encode()) for form in (text, unicodedata.normalize("NFKC", text)))


def _some(ids: list[str]) -> str:
    more = f"; and {len(ids) - _NUM_EXAMPLES:,} more" if len(ids) > _NUM_EXAMPLES else ""
    return "; ".join(ids[:_NUM_EXAMPLES]) + more
