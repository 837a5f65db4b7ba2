"""Makes questions and answers of records; the caller passes in what writes boxes as text."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from cloc_mllm.box import Box
from cloc_mllm.config import ConversationConfig
from cloc_mllm.data.chats import Chat
from cloc_mllm.data.records import Record, Region

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
NOT_THERE = "not in the image"  # the answer if the image shows nothing of the kind
# the hash of the wordings of all models whose fingerprint names none
FIRST_WORDINGS = "62ed81b7a46d5d95"


def wordings_hash() -> str:
    """Hashes the wordings of all questions, and the answer for what is not there."""
    wordings = json.dumps([PROMPTS, NOT_THERE], sort_keys=True)
    return hashlib.sha256(wordings.encode()).hexdigest()[:16]


class BoxText(Protocol):
    """What conversations need of `mllm.coordinates.BoxFormat`."""

    def encode(self, box: Box) -> str: ...

    def answer(self, box: Box) -> str: ...


@dataclass(frozen=True)
class QuestionAnswer:
    """One question with its answer.

    Attributes:
        region: the region that `<region>` in the question stands for (`refer` and `locate`).
        answer_box: the box that is the answer (`ground` and `locate`).
    """

    question: str
    answer: str
    task: Task
    region: Region | None = None
    answer_box: Box | None = None


def build_questions(
    record: Record,
    config: ConversationConfig,
    box_format: BoxText,
    rng: np.random.Generator,
    phrases: Sequence[str] = (),
) -> list[QuestionAnswer]:
    """Draws `config.questions_per_image` questions about an image, their tasks by weight.

    A task takes part if the record has what it needs: an unambiguous text for `ground`, a region
    for `refer` and `locate`, a caption for `caption`, and for `absent` one of `phrases` (of the
    whole data set) that shares no word with its texts. A task asks about no region twice before it
    has asked about all. The same `rng` state gives the same questions.

    Returns:
        the questions; [] if the record serves none of the tasks that have a weight.
    """
    texts = unambiguous_texts(record)
    pools: dict[Task, list[int]] = {
        "ground": [index for index, region_texts in enumerate(texts) if region_texts],
        "refer": list(range(len(record.regions))),
        "caption": list(range(len(record.captions))),
        "locate": list(range(len(record.regions))),
        "absent": _absent(record, phrases) if config.absent else [],
    }
    weights = np.array([getattr(config, task) if pools[task] else 0.0 for task in TASKS])
    if weights.sum() == 0:
        return []
    orders = {task: _in_turn(pool, rng) for task, pool in pools.items()}
    questions: list[QuestionAnswer] = []
    for choice in rng.choice(len(TASKS), config.questions_per_image, p=weights / weights.sum()):
        task = TASKS[choice]
        order = orders[task]
        index = order[sum(pair.task == task for pair in questions) % len(order)]
        if task == "ground":
            text = texts[index][rng.integers(len(texts[index]))]
            questions.append(ground_question(text, record.regions[index].box, box_format))
        elif task == "refer":
            questions.append(refer_question(record.regions[index], box_format))
        elif task == "locate":
            questions.append(locate_question(record.regions[index], box_format))
        elif task == "absent":
            questions.append(absent_question(phrases[index]))
        else:
            questions.append(QuestionAnswer(PROMPTS["caption"], record.captions[index], "caption"))
    return questions


def possible_questions(
    record: Record, config: ConversationConfig, box_format: BoxText, phrases: Sequence[str] = ()
) -> Iterator[QuestionAnswer]:
    """Yields every question that `build_questions` may ask about a record."""
    if config.ground:
        for region, texts in zip(record.regions, unambiguous_texts(record), strict=True):
            yield from (ground_question(text, region.box, box_format) for text in texts)
    if config.refer:
        yield from (refer_question(region, box_format) for region in record.regions)
    if config.locate:
        yield from (locate_question(region, box_format) for region in record.regions)
    if config.caption:
        yield from (QuestionAnswer(PROMPTS["caption"], text, "caption") for text in record.captions)
    if config.absent:
        yield from (absent_question(phrases[index]) for index in _absent(record, phrases))


def absent_question(phrase: str) -> QuestionAnswer:
    return QuestionAnswer(PROMPTS["absent"].format(phrase=phrase), NOT_THERE, "absent")


def ground_question(text: str, box: Box, box_format: BoxText) -> QuestionAnswer:
    question = PROMPTS["ground"].format(phrase=text)
    return QuestionAnswer(question, box_format.answer(box), "ground", answer_box=box)


def refer_question(region: Region, box_format: BoxText) -> QuestionAnswer:
    question = PROMPTS["refer"].format(box=box_format.encode(region.box))
    return QuestionAnswer(question, region.phrase, "refer", region)


def locate_question(region: Region, box_format: BoxText) -> QuestionAnswer:
    """Asks for the box of a region token: the easy half of `ground`, so it is learnt first."""
    return QuestionAnswer(
        PROMPTS["locate"], box_format.answer(region.box), "locate", region, region.box
    )


def unambiguous_texts(record: Record) -> list[list[str]]:
    """Lists for each region its phrase and expressions that name no other box of the image.

    A phrase that several boxes share (two crabs, or the boxes of a group: "two men") does not ask
    for one box, so it is left out; expressions that single out one box remain.
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
    """Lists the distinct phrases of at most `limit` items, evenly spread; chats give none."""
    step = max(1, len(items) // limit)
    chosen = (items[index] for index in range(0, len(items), step))
    records = (item for item in chosen if isinstance(item, Record))
    return sorted({region.phrase for record in records for region in record.regions})


def _absent(record: Record, phrases: Sequence[str]) -> list[int]:
    """Finds the phrases that share no word of three letters or more with the record's texts."""
    texts = [*record.captions]
    for region in record.regions:
        texts += [region.phrase, region.category, *region.expressions]
    said = {word for text in texts for word in _words(text)}
    return [index for index, phrase in enumerate(phrases) if said.isdisjoint(_words(phrase))]


def _words(text: str) -> set[str]:
    """The words of a text without a plural s, so that "crabs" equals "crab"."""
    return {word.rstrip("s") for word in re.findall(r"\w{3,}", text.casefold())} - {"the"}


def _in_turn(pool: list[int], rng: np.random.Generator) -> list[int]:
    return [pool[place] for place in rng.permutation(len(pool))]
