"""Looks at the training data before stage 2 starts, for what would stop it hours later.

Only texts are read. A question about a record holds one text of it. If all of them are short and
hold nothing odd, the record is fine whichever questions are drawn, as most records are. Otherwise
each question that holds a long or odd text is rendered as the model would see it. So is a chat
whose words hold something odd, or whose first question with its answer may be too long.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from jinja2 import TemplateError
from tqdm import tqdm

from cloc_mllm.data.chats import Chat, drop_chat, exchanges_of
from cloc_mllm.data.conversations import (
    SEVERAL_BOXES,
    Negative,
    QuestionAnswer,
    build_questions,
    possible_questions,
)
from cloc_mllm.data.drop_log import DropLog
from cloc_mllm.data.mixture import AnyDataset, Mixture, keep_chats
from cloc_mllm.data.records import Record, Region
from cloc_mllm.data.wordings import IMAGE_TOKEN, REGION_TOKEN
from cloc_mllm.mllm.collate import ConversationCollator, TooLongError, as_messages
from cloc_mllm.mllm.coordinates import BOX_TOKEN
from cloc_mllm.mllm.losses import IGNORE_INDEX
from cloc_mllm.train.data_order import sample_seed

MAX_RECORDS = 200_000  # later records are not checked; a bad one stops the run when it comes
_NUM_EXAMPLES = 3
# tokens; a text may split differently inside a question, and some numbers need more tokens
_MARGIN = 32
_AROUND = 200  # tokens that a template may write around a question, its answer and a system turn
_REASONS = {
    "no_question": "gives nothing to learn: no region or caption of it serves a task whose weight "
    "in `conversations` is above 0",
    "too_long": "has draws of which no question fits into conversations.max_length beside the "
    "image; raise it",
    "image_tokens": "has a text that holds the image placeholder, so the image's tokens would be "
    "cut; take it out of the text",
    "region_tokens": f"has a text that holds {REGION_TOKEN}, which stands for a box; take it out",
    "box_tokens": f"has a text that holds {BOX_TOKEN}, which stands for a box; take it out",
    "end_tokens": "has an answer that holds the end-of-sequence token; take it out",
    "template": "has turns that the language model's chat template cannot write",
    "nothing_learnt": "has an answer without a token to learn (an empty or blank text)",
}
_BOX = (0.111, 0.222, 0.888, 0.999)
# what any task can ask about, in texts of a letter
_ONE_OF_ALL = Record(
    "one",
    b"",
    1,
    1,
    ["x"],
    [Region(_BOX, "x", category="x")],
    "preflight",
)


@dataclass
class Preflight:
    """The result of the check.

    Attributes:
        num_records: size of the data set.
        num_checked: number of records that were checked.
        ids: by reason, the ids of the refused records, each with what is wrong there.
    """

    num_records: int
    num_checked: int = 0
    ids: dict[str, list[str]] = field(default_factory=dict)

    def report(self) -> str:
        """Writes one line for the terminal.

        Raises:
            ValueError: records were refused; says which ones and what to do.
        """
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
            "with `cloc-mllm data filter` (--min_regions 1, or --without_ids FILE), chats with "
            "data.skip_chats:\n  " + "\n  ".join(lines)
        )


def check_records(
    records: Iterable[Record | Chat],
    num_records: int,
    collator: ConversationCollator,
    *,
    seed: int,
    num_epochs: Iterable[int],
) -> Preflight:
    """Checks the first `MAX_RECORDS` records.

    Args:
        records: in the order of the data set; their images are not looked at.
        num_records: their number.
        collator: the collator of the run, which asks the questions.
        seed: the seed of the run.
        num_epochs: for each record, the number of epochs that see it. A record with questions that
            are too long is refused only if one of these epochs draws no other.
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
        if isinstance(record, Chat):
            fault = check.fault_of_chat(record)
        else:
            seeds = (sample_seed(seed, epoch, index) for epoch in range(epochs))
            fault = check.fault_of(record, seeds)
        result.num_checked += 1
        if fault is not None:
            reason, what = fault
            result.ids.setdefault(reason, []).append(f"{record.id}{what}")
    return result


def skip_chats(
    dataset: AnyDataset | Mixture, collator: ConversationCollator, drop_log: DropLog
) -> AnyDataset | Mixture:
    """Leaves out every chat that `check_records` would refuse.

    Args:
        drop_log: counts each chat, with its turns and places, as delivered or under its reason.

    Raises:
        ValueError: a data set has no chat left.
    """
    check = _Check(collator)

    def is_fit(chat: Chat) -> bool:
        fault = check.fault_of_chat(chat)
        if fault is not None:
            drop_chat(chat, fault[0], fault[1].removeprefix(", "), drop_log)
            return False
        num_places = sum(1 for _ in chat.places)
        drop_log.deliver(chat.id, "chat", turn=len(chat.turns), place=num_places)
        return True

    return keep_chats(dataset, is_fit)


class _Check:
    """Checks one record at a time."""

    def __init__(self, collator: ConversationCollator) -> None:
        self.collator = collator
        self.config = collator.config
        self.negatives = collator.negatives
        self.wordings = collator.processor.asked_in
        self.processor = collator.processor
        self.coordinates = collator.processor.coordinates
        special = [*self.processor.tokenizer.all_special_tokens, IMAGE_TOKEN, REGION_TOKEN]
        special += [BOX_TOKEN] * self.processor.box_head
        # roles of a first exchange that the chat template writes: with a system turn, and without
        self.written_roles: set[tuple[str, ...]] = set()
        self.special = re.compile("|".join(map(re.escape, special)))
        box = self.processor.tokenize(self.coordinates.link("", [_BOX]))
        self.box_tokens = len(box)
        several = (*SEVERAL_BOXES, "grounded_caption")
        self.answers_several = any(getattr(self.config, task) for task in several)
        self.most_tokens = self.config.max_length - self._most_around() - _MARGIN
        self.odd_negatives = [n for n in self.negatives if any(map(self.is_odd, n.texts))]
        self.odd_texts = [text for n in self.odd_negatives for text in filter(self.is_odd, n.texts)]

    def is_odd(self, text: str, num_more_boxes: int = 0) -> bool:
        """Whether a text is blank, holds a special token, or may make its question too long.

        Args:
            num_more_boxes: how many boxes its answer may have beside the first.
        """
        if not text.strip() or self.special.search(text):
            return True
        room = self.most_tokens - num_more_boxes * self.box_tokens
        if text.isascii() and len(text) <= room:  # at most one token per character
            return False
        return len(self.processor.tokenize(text)) > room

    def fault_of(self, record: Record, seeds: Iterable[int]) -> tuple[str, str] | None:
        """Finds a key of `_REASONS` and details; None if the record can be trained on.

        Args:
            seeds: the record's seed in each epoch of the run.
        """
        if not any(self.possible_questions(record, self.negatives)):
            return "no_question", ""
        may_be_too_long = False
        for pair in self.odd_questions(record):
            reason, _ = self.question_fault(pair, record)
            may_be_too_long |= reason == "too_long"
            if reason not in ("", "too_long"):
                return reason, f", {pair.question!r}"
        for seed in seeds if may_be_too_long else ():
            rng = np.random.default_rng(seed)
            drawn = build_questions(
                record, self.config, self.coordinates, rng, self.negatives, self.wordings
            )
            lengths = [self.question_fault(pair, record)[1] for pair in drawn]
            if min(lengths) > self.config.max_length:
                return "too_long", f", {min(lengths)} tokens of {self.config.max_length}"
        return None

    def fault_of_chat(self, chat: Chat) -> tuple[str, str] | None:
        """The same for a chat: what the model would see of it."""
        pieces = [piece for turn in chat.turns for piece in turn.pieces]
        words = [piece.text if piece.kind == "words" else piece.phrase for piece in pieces]
        roles = tuple(turn.role for turn in exchanges_of(chat)[0])
        is_plain = not any(map(self.special.search, words)) and roles in self.written_roles
        if is_plain and self._surely_fits(chat):
            return None
        try:
            packed = self.collator.pack(chat, 0)
        except TooLongError as error:
            return "too_long", f", {error}"
        except (TemplateError, ValueError) as error:
            return "template", f", {error}"
        processor, ids = self.processor, packed.row.input_ids
        answers = [turn.text for turn in chat.turns if turn.role == "assistant"]
        if any(processor.tokenizer.eos_token in text for text in answers):
            return "end_tokens", ""
        sizes = [(of.width, of.height) for of in packed.pictures]
        num_views = sum(len(processor.views(size)) for size in sizes)
        special = {
            "image_tokens": (processor.image_token, num_views * processor.num_image_tokens),
            "region_tokens": (REGION_TOKEN, len(packed.mentioned)),
        }
        if processor.box_head:
            special["box_tokens"] = (BOX_TOKEN, len(packed.answered))
        for reason, (token, expected) in special.items():
            if ids.count(processor.tokenizer.convert_tokens_to_ids(token)) != expected:
                return reason, ""
        self.written_roles.add(roles)
        return None

    def _surely_fits(self, chat: Chat) -> bool:
        """Whether the first question and answer fit, going by their characters alone."""
        first = exchanges_of(chat)[0]
        pieces = [piece for turn in first for piece in turn.pieces]
        text = "".join(piece.text + piece.phrase for piece in pieces)
        num_boxes = sum(len(piece.boxes) + len(piece.points) for piece in pieces)
        sizes = [(of.width, of.height) for of in chat.images]
        num_views = sum(len(self.processor.views(size)) for size in sizes)
        num_tokens = num_views * self.processor.num_image_tokens + len(text) + 40 * num_boxes
        return text.isascii() and num_tokens + _AROUND <= self.config.max_length

    def possible_questions(
        self, record: Record, negatives: Sequence[Negative]
    ) -> Iterator[QuestionAnswer]:
        """The questions that may be asked about a record, each in its longest wording."""
        return possible_questions(record, self.config, self.coordinates, negatives, self.wordings)

    def odd_questions(self, record: Record) -> Iterator[QuestionAnswer]:
        """Yields the possible questions that hold an odd text."""
        num_more_boxes = max(len(record.regions) - 1, 0) * self.answers_several
        texts = [text for text in _texts_of(record) if self.is_odd(text, num_more_boxes)]
        if self.most_tokens < num_more_boxes * self.box_tokens or (texts and self.answers_several):
            texts.append("")  # then all questions must be checked
        texts += self.odd_texts
        if not texts:
            return
        for pair in self.possible_questions(record, self.odd_negatives):
            if any(text in pair.question or text in pair.answer for text in texts):
                yield pair

    def question_fault(self, pair: QuestionAnswer, record: Record) -> tuple[str, int]:
        """Finds the fault of a question ("" if it has none), and its number of tokens."""
        tokenizer, processor = self.processor.tokenizer, self.processor
        size = record.width, record.height
        ids, labels = processor.encode_conversation(as_messages(pair), [size])
        num_image_tokens = len(processor.views(size)) * processor.num_image_tokens
        learnt = [label for label in labels if label not in (IGNORE_INDEX, tokenizer.eos_token_id)]
        special = {
            "image_tokens": (processor.image_token, num_image_tokens),
            "region_tokens": (REGION_TOKEN, int(pair.region is not None)),
        }
        if processor.box_head:
            special["box_tokens"] = (BOX_TOKEN, len(pair.answer_boxes))
        for reason, (token, expected) in special.items():
            if ids.count(tokenizer.convert_tokens_to_ids(token)) != expected:
                return reason, len(ids)
        if not learnt or not pair.answer.strip():
            return "nothing_learnt", len(ids)
        return "too_long" if len(ids) > self.config.max_length else "", len(ids)

    def _most_around(self) -> int:
        """Counts the tokens of the longest question, with its image but without its texts."""
        questions = self.possible_questions(_ONE_OF_ALL, [Negative(frozenset(["zebra"]), ("x",))])
        chats = (self.processor.encode_conversation(as_messages(t), [(1, 1)])[0] for t in questions)
        tiles = self.processor.max_tiles * self.processor.num_image_tokens
        return max(map(len, chats)) + tiles


def _texts_of(record: Record) -> Iterator[str]:
    yield from record.captions
    for region in record.regions:
        yield region.phrase
        yield from region.expressions


def _some(ids: list[str]) -> str:
    more = f"; and {len(ids) - _NUM_EXAMPLES:,} more" if len(ids) > _NUM_EXAMPLES else ""
    return "; ".join(ids[:_NUM_EXAMPLES]) + more
