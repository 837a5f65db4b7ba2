"""Records to questions and answers. Box text is made by `mllm/coordinates.py` alone, passed in."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from cloc_mllm.config import ConversationConfig
from cloc_mllm.data.chats import Chat
from cloc_mllm.data.records import Box, Record, Region

Task = Literal["caption", "ground", "refer", "locate", "absent"]
TASKS: tuple[Task, ...] = ("ground", "refer", "caption", "locate", "absent")

# The only wordings: training, evaluation and demo all ask with these. A model answers well only in
# the words it was taught, so they are part of the processor's fingerprint (`wordings_hash`).
PROMPTS: dict[Task, str] = {
    "ground": "Where is {phrase}?",
    "refer": "What is in {box} <region>?",
    "caption": "Describe the image.",
    "locate": "Where is <region>?",
    "absent": "Where is {phrase}?",
}
NOT_THERE = "not in the image"  # the answer where nothing is what was asked for
# the hash of the wordings that all models were taught whose fingerprint names none
FIRST_WORDINGS = "62ed81b7a46d5d95"


def wordings_hash() -> str:
    """A hash of all the words that questions are asked in, and of the answer that is none."""
    wordings = json.dumps([PROMPTS, NOT_THERE], sort_keys=True)
    return hashlib.sha256(wordings.encode()).hexdigest()[:16]


class BoxText(Protocol):
    """`mllm.coordinates.BoxFormat`, as far as conversations need it."""

    def encode(self, box: Box) -> str: ...

    def answer(self, box: Box) -> str: ...


@dataclass(frozen=True)
class Turn:
    """One question with its answer.

    Attributes:
        region: what the question's `<region>` stands for (`refer` and `locate`).
        answer_box: the box that the answer is (`ground` and `locate`).
    """

    question: str
    answer: str
    task: Task
    region: Region | None = None
    answer_box: Box | None = None


def build_turns(
    record: Record,
    config: ConversationConfig,
    box_format: BoxText,
    rng: np.random.Generator,
    phrases: Sequence[str] = (),
) -> list[Turn]:
    """`config.questions_per_image` questions about an image, their tasks drawn by weight.

    A task takes part if the record has what it needs: an unambiguous text for `ground`, a region
    for `refer` and `locate`, a caption for `caption`, one of `phrases` (of the whole data set) that
    its texts have no word of for `absent`. Regions come in turn, so a task asks about
    none twice before it asked about all. The same `rng` state gives the same questions.

    Returns:
        [] if the record can serve none of the tasks that have a weight.
    """
    texts = unambiguous_texts(record)
    pools: dict[Task, list[int]] = {
        "ground": [index for index, of_region in enumerate(texts) if of_region],
        "refer": list(range(len(record.regions))),
        "caption": list(range(len(record.captions))),
        "locate": list(range(len(record.regions))),
        "absent": _absent(record, phrases) if config.absent else [],
    }
    weights = np.array([getattr(config, task) if pools[task] else 0.0 for task in TASKS])
    if weights.sum() == 0:
        return []
    orders = {task: _in_turn(pool, rng) for task, pool in pools.items()}
    turns: list[Turn] = []
    for choice in rng.choice(len(TASKS), config.questions_per_image, p=weights / weights.sum()):
        task = TASKS[choice]
        order = orders[task]
        index = order[sum(turn.task == task for turn in turns) % len(order)]
        if task == "ground":
            text = texts[index][rng.integers(len(texts[index]))]
            turns.append(ground_turn(text, record.regions[index].box, box_format))
        elif task == "refer":
            turns.append(refer_turn(record.regions[index], box_format))
        elif task == "locate":
            turns.append(locate_turn(record.regions[index], box_format))
        elif task == "absent":
            turns.append(absent_turn(phrases[index]))
        else:
            turns.append(Turn(PROMPTS["caption"], record.captions[index], "caption"))
    return turns


def possible_turns(
    record: Record, config: ConversationConfig, box_format: BoxText, phrases: Sequence[str] = ()
) -> Iterator[Turn]:
    """Every question that `build_turns` may ask about a record."""
    if config.ground:
        for region, texts in zip(record.regions, unambiguous_texts(record), strict=True):
            yield from (ground_turn(text, region.box, box_format) for text in texts)
    if config.refer:
        yield from (refer_turn(region, box_format) for region in record.regions)
    if config.locate:
        yield from (locate_turn(region, box_format) for region in record.regions)
    if config.caption:
        yield from (Turn(PROMPTS["caption"], text, "caption") for text in record.captions)
    if config.absent:
        yield from (absent_turn(phrases[index]) for index in _absent(record, phrases))


def absent_turn(phrase: str) -> Turn:
    return Turn(PROMPTS["absent"].format(phrase=phrase), NOT_THERE, "absent")


def ground_turn(text: str, box: Box, box_format: BoxText) -> Turn:
    question = PROMPTS["ground"].format(phrase=text)
    return Turn(question, box_format.answer(box), "ground", answer_box=box)


def refer_turn(region: Region, box_format: BoxText) -> Turn:
    question = PROMPTS["refer"].format(box=box_format.encode(region.box))
    return Turn(question, region.phrase, "refer", region)


def locate_turn(region: Region, box_format: BoxText) -> Turn:
    """Reads the box out of a region token: the easy half of `ground`, which it teaches first."""
    return Turn(PROMPTS["locate"], box_format.answer(region.box), "locate", region, region.box)


def unambiguous_texts(record: Record) -> list[list[str]]:
    """For each region the phrase and expressions that name no other box of the image.

    A phrase that several boxes share (two crabs, or the boxes of a group: "two men") is no
    question with one answer, so it is left out; expressions that single one box out remain.
    """
    boxes_of: dict[str, set[Box]] = {}
    for region in record.regions:
        for text in (region.phrase, *region.expressions):
            boxes_of.setdefault(text.casefold(), set()).add(region.box)
    return [
        [
            text
            for text in dict.fromkeys((region.phrase, *region.expressions))
            if len(boxes_of[text.casefold()]) == 1
        ]
        for region in record.regions
    ]


def phrases_of(items: Sequence[Record | Chat], limit: int = 500) -> list[str]:
    """Distinct phrases of at most `limit` records and chats, evenly spread; chats give none."""
    step = max(1, len(items) // limit)
    chosen = (items[index] for index in range(0, len(items), step))
    records = (item for item in chosen if isinstance(item, Record))
    return sorted({region.phrase for record in records for region in record.regions})


def _absent(record: Record, phrases: Sequence[str]) -> list[int]:
    """Phrases that share no word of three letters or more with anything said of the image."""
    texts = [*record.captions]
    for region in record.regions:
        texts += [region.phrase, region.category, *region.expressions]
    said = {word for text in texts for word in _words(text)}
    return [index for index, phrase in enumerate(phrases) if said.isdisjoint(_words(phrase))]


def _words(text: str) -> set[str]:
    """Without a plural s, so that crabs are crab."""
    return {word.rstrip("s") for word in re.findall(r"\w{3,}", text.casefold())} - {"the"}


def _in_turn(pool: list[int], rng: np.random.Generator) -> list[int]:
    return [pool[place] for place in rng.permutation(len(pool))]
