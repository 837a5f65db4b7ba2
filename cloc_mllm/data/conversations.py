"""Records to questions and answers. Box text is made by `mllm/coordinates.py` alone, passed in.

| task | asks | answer |
|---|---|---|
| `ground` | where a phrase of one box is | the box |
| `several` | where a phrase of several boxes is ("the two dogs") | all of them |
| `all` | where every thing of a category is | all boxes of the category |
| `count` | how many things of a category there are | their boxes and number: `BOXES: 2` |
| `absent` | any of these about what is not there | `not in the image` |
| `exists` | whether something is there | `yes` or `no` |
| `point` | for a point on a phrase of one box | the centre of the box |
| `refer` | what is in a region | its phrase |
| `region_caption` | for words that mean a region alone | one of its unambiguous texts |
| `caption` | for a description | a caption |
| `grounded_caption` | for a description with boxes | a caption, linked: `<p>a crab</p>BOXES` |
| `locate` | where a `<region>` is | its box |

Several boxes come from left to right (`BoxFormat.in_order`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from cloc_mllm.box import Box
from cloc_mllm.config import ConversationConfig
from cloc_mllm.data.chats import Chat
from cloc_mllm.data.english import counted, plural, with_article
from cloc_mllm.data.records import Record, Region
from cloc_mllm.data.wordings import FIRST_TASKS, NOT_THERE, SINGLE, TASKS, Task, Wordings, asked

YES, NO = "yes", "no"
SEVERAL_BOXES: tuple[Task, ...] = ("several", "all", "count")  # tasks that teach such answers
MAX_BOXES = 32  # an answer of more is not asked for
_NEGATIVE_TEXTS = 4  # expressions of an absent thing beside its name


class BoxText(Protocol):
    """What conversations need of `mllm.coordinates.BoxFormat`."""

    def encode(self, box: Box) -> str: ...

    def encode_point(self, point: tuple[float, float]) -> str: ...

    def answers(self, boxes: Sequence[Box]) -> str: ...

    def in_order(self, boxes: Iterable[Box]) -> list[Box]: ...

    def link(self, phrase: str, boxes: Sequence[Box]) -> str: ...


@dataclass(frozen=True)
class QuestionAnswer:
    """One question with its answer.

    Attributes:
        region: what the question's `<region>` stands for (`refer`, `region_caption`, `locate`).
        answer_boxes: the boxes in the answer, in their order.
    """

    question: str
    answer: str
    task: Task
    region: Region | None = None
    answer_boxes: tuple[Box, ...] = ()


class Negative(NamedTuple):
    """A thing that images may lack.

    Attributes:
        words: an image of which none of them is said lacks the thing.
        texts: its name first, then expressions that are true of it in another image.
    """

    words: frozenset[str]
    texts: tuple[str, ...]


def build_questions(
    record: Record,
    config: ConversationConfig,
    box_format: BoxText,
    rng: np.random.Generator,
    negatives: Sequence[Negative] = (),
    wordings: Wordings = SINGLE,
) -> list[QuestionAnswer]:
    """Draws `config.questions_per_image` questions about an image, their tasks by weight.

    A task takes part if the record has what it needs (see the table above), `absent` and the "no"
    of `exists` if one of `negatives` (things of the whole data set) is nowhere in its texts. What
    can be asked comes in turn, so a task asks about no region twice before it asked about all.
    The same `rng` state gives the same questions.

    Returns:
        the questions; [] if the record serves none of the tasks that have a weight.
    """
    material = _Material(record, config, box_format, negatives)
    choices = material.choices(rng)
    weights = np.array([getattr(config, task) if choices[task] else 0.0 for task in TASKS])
    if weights.sum() == 0:
        return []
    orders = {task: _in_turn(choices[task], rng) for task in TASKS}
    questions: list[QuestionAnswer] = []
    for chosen in rng.choice(len(TASKS), config.questions_per_image, p=weights / weights.sum()):
        task = TASKS[chosen]
        order = orders[task]
        choice = order[sum(pair.task == task for pair in questions) % len(order)]
        variants = material.variants(task, choice)
        variant = variants[rng.integers(len(variants))]
        wording = wordings.draw(variant.asked_as, rng, config.first_wording)
        questions.append(variant.with_wording(task, wording, box_format))
    return questions


def possible_questions(
    record: Record,
    config: ConversationConfig,
    box_format: BoxText,
    negatives: Sequence[Negative] = (),
    wordings: Wordings = SINGLE,
) -> Iterator[QuestionAnswer]:
    """Every question that `build_questions` may ask about a record, each in its longest wording."""
    material = _Material(record, config, box_format, negatives)
    choices = material.choices()
    for task in TASKS:
        for choice in choices[task] if getattr(config, task) else ():
            for variant in material.variants(task, choice):
                yield variant.with_wording(task, wordings.longest(variant.asked_as), box_format)


def tasks_beyond_first(config: ConversationConfig) -> list[Task]:
    """The tasks that have a weight and that earlier models were not taught."""
    return [task for task in TASKS if task not in FIRST_TASKS and getattr(config, task)]


def needs_negatives(config: ConversationConfig) -> bool:
    return config.absent > 0 or config.exists > 0


class _Variant(NamedTuple):
    """A question with its answer, all but the wording."""

    asked_as: Task
    answer: str
    phrase: str = ""
    region: Region | None = None
    boxes: tuple[Box, ...] = ()

    def with_wording(self, task: Task, wording: str, box_format: BoxText) -> QuestionAnswer:
        box = box_format.encode(self.region.box) if self.region else ""
        question = asked(wording, phrase=self.phrase, box=box)
        return QuestionAnswer(question, self.answer, task, self.region, self.boxes)


class _Material:
    """What can be asked about one record.

    A task has choices, which come in turn; each has one or more variants, of which one is drawn.
    """

    def __init__(
        self,
        record: Record,
        config: ConversationConfig,
        box_format: BoxText,
        negatives: Sequence[Negative],
    ) -> None:
        self.record = record
        self.config = config
        self.box_format = box_format
        self.negatives = negatives
        self.texts = unambiguous_texts(record)
        self.kinds = _boxes_by_category(record)

    def choices(self, rng: np.random.Generator | None = None) -> dict[Task, list[Any]]:
        """The choices of each task.

        Args:
            rng: draws as many things to be denied as there are to be affirmed; None takes all.
        """
        config, record = self.config, self.record
        absent = absent_from(record, self.negatives) if needs_negatives(config) else []
        unambiguous = [index for index, texts in enumerate(self.texts) if texts]
        kinds = [kind for kind, boxes in self.kinds.items() if len(boxes) <= MAX_BOXES]
        return {
            "ground": unambiguous,
            "refer": list(range(len(record.regions))),
            "caption": list(range(len(record.captions))),
            "locate": list(range(len(record.regions))),
            "absent": absent if config.absent else [],
            "several": list(shared_texts(record).items()) if config.several else [],
            "all": kinds if config.all else [],
            "count": kinds if config.count else [],
            "exists": self._may_exist(absent, rng) if config.exists else [],
            "grounded_caption": self._linked() if config.grounded_caption else [],
            "region_caption": unambiguous if config.region_caption else [],
            "point": unambiguous if config.point else [],
        }

    def variants(self, task: Task, choice: Any) -> list[_Variant]:
        """The questions about one choice."""
        make: dict[Task, Callable[[Any], list[_Variant]]] = {
            "ground": self._ground,
            "refer": self._refer,
            "caption": self._caption,
            "locate": self._locate,
            "absent": self._not_there,
            "several": self._several,
            "all": self._all,
            "count": self._count,
            "exists": self._exists,
            "grounded_caption": self._grounded_caption,
            "region_caption": self._region_caption,
            "point": self._point,
        }
        return make[task](choice)

    def _ground(self, index: int) -> list[_Variant]:
        return [self._boxed("ground", text, [self._box(index)]) for text in self.texts[index]]

    def _refer(self, index: int) -> list[_Variant]:
        region = self.record.regions[index]
        return [_Variant("refer", region.phrase, region=region)]

    def _caption(self, index: int) -> list[_Variant]:
        return [_Variant("caption", self.record.captions[index])]

    def _locate(self, index: int) -> list[_Variant]:
        """Reads the box out of a region token: the easy half of `ground`, taught first."""
        region = self.record.regions[index]
        return [self._boxed("locate", "", [region.box])._replace(region=region)]

    def _several(self, shared: tuple[str, list[Box]]) -> list[_Variant]:
        return [self._boxed("several", *shared)]

    def _all(self, kind: str) -> list[_Variant]:
        return [self._boxed("all", kind, self.kinds[kind])]

    def _count(self, kind: str) -> list[_Variant]:
        found = self._boxed("count", kind, self.kinds[kind])
        return [found._replace(answer=f"{found.answer}: {len(found.boxes)}")]

    def _exists(self, name: tuple[str, str]) -> list[_Variant]:
        thing, answer = name
        return [_Variant("exists", answer, with_article(thing))]

    def _grounded_caption(self, linked: _Variant) -> list[_Variant]:
        return [linked]

    def _region_caption(self, index: int) -> list[_Variant]:
        region = self.record.regions[index]
        return [_Variant("region_caption", text, region=region) for text in self.texts[index]]

    def _point(self, index: int) -> list[_Variant]:
        x1, y1, x2, y2 = self._box(index)
        answer = self.box_format.encode_point(((x1 + x2) / 2, (y1 + y2) / 2))
        return [_Variant("point", answer, text) for text in self.texts[index]]

    def _not_there(self, negative: Negative) -> list[_Variant]:
        kinds: list[Task] = [task for task in ("all", "count") if getattr(self.config, task)]
        asked_for = [_Variant("absent", NOT_THERE, text) for text in negative.texts]
        return asked_for + [_Variant(task, NOT_THERE, negative.texts[0]) for task in kinds]

    def _boxed(self, task: Task, phrase: str, boxes: Sequence[Box]) -> _Variant:
        ordered = self.box_format.in_order(boxes)
        return _Variant(task, self.box_format.answers(ordered), phrase, boxes=tuple(ordered))

    def _box(self, index: int) -> Box:
        return self.record.regions[index].box

    def _may_exist(
        self, absent: list[Negative], rng: np.random.Generator | None
    ) -> list[tuple[str, str]]:
        regions = self.record.regions
        here = list(dict.fromkeys(region.category or region.phrase for region in regions))
        if rng is not None and absent:
            places = rng.choice(len(absent), min(len(here) or 1, len(absent)), replace=False)
            absent = [absent[place] for place in places]
        return [(name, YES) for name in here] + [(n.texts[0], NO) for n in absent]

    def _linked(self) -> list[_Variant]:
        """Captions with their phrases linked to boxes; those without such a phrase are left out."""
        named = _boxes_by_mention(self.record, self.kinds)
        if not named:
            return []
        longest_first = sorted(named, key=len, reverse=True)
        pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)", re.I)
        linked = []
        for caption in self.record.captions:
            boxes: list[Box] = []
            pieces, end = [], 0
            for match in pattern.finditer(caption):
                found = self.box_format.in_order(named.get(match.group().casefold(), ()))
                if found:
                    link = self.box_format.link(match.group(), found)
                    pieces += [caption[end : match.start()], link]
                    boxes += found
                    end = match.end()
            if 0 < len(boxes) <= MAX_BOXES:
                answer = "".join([*pieces, caption[end:]])
                linked.append(_Variant("grounded_caption", answer, boxes=tuple(boxes)))
        return linked


def unambiguous_texts(record: Record) -> list[list[str]]:
    """Lists for each region its phrase and expressions that name no other box of the image.

    A phrase that several boxes share (two crabs, or the boxes of a group: "two men") is no
    question with one box as its answer: `several` asks it. Expressions that single one box out
    remain.
    """
    boxes_of = {text.casefold(): boxes for text, boxes in _boxes_by_text(record)}
    return [
        [
            text
            for text in dict.fromkeys((region.phrase, *region.expressions))
            if len(boxes_of[text.casefold()]) == 1
        ]
        for region in record.regions
    ]


def shared_texts(record: Record) -> dict[str, list[Box]]:
    """Texts that name several boxes of the image together: a phrase of several regions, and a
    category with its number ("the two crabs"). Texts of more than `MAX_BOXES` are left out."""
    texts = {
        f"the {counted(kind, len(boxes))}": boxes
        for kind, boxes in _boxes_by_category(record).items()
    }
    texts |= dict(_boxes_by_text(record))
    return {text: boxes for text, boxes in texts.items() if 1 < len(boxes) <= MAX_BOXES}


def absent_from(record: Record, negatives: Sequence[Negative]) -> list[Negative]:
    """The things of which no word is said of the image; see `negatives_of`."""
    texts = [*record.captions]
    for region in record.regions:
        texts += [region.phrase, region.category, *region.expressions]
    said = _words(*texts)
    return [negative for negative in negatives if said.isdisjoint(negative.words)]


def negatives_of(items: Sequence[Record | Chat], limit: int = 500) -> list[Negative]:
    """The things of at most `limit` items, evenly spread, to ask other images for; chats give none.

    A thing is known to be absent from an image where the image's own texts name everything it
    shows: built-in scenes, and detection sets for their classes. Of a photo whose texts name a few
    things, one that they do not mention may still be there; there, give `absent` and `exists` small
    weights, or none. An expression ("the smaller crab") is taken where its region has a category,
    which is then what must be absent.
    """
    step = max(1, len(items) // limit)
    texts_of: dict[str, dict[str, None]] = {}
    for index in range(0, len(items), step):
        item = items[index]
        for region in item.regions if isinstance(item, Record) else []:
            texts = texts_of.setdefault(region.category or region.phrase, {})
            if region.category and region.expressions and len(texts) < _NEGATIVE_TEXTS:
                texts[region.expressions[index % len(region.expressions)]] = None
    return [
        Negative(frozenset(words), (thing, *texts_of[thing]))
        for thing in sorted(texts_of)
        if (words := _words(thing))
    ]


def _boxes_by_text(record: Record) -> list[tuple[str, list[Box]]]:
    """Each phrase and expression, as first written, with the distinct boxes that it names."""
    found: dict[str, tuple[str, dict[Box, None]]] = {}
    for region in record.regions:
        for text in (region.phrase, *region.expressions):
            found.setdefault(text.casefold(), (text, {}))[1][region.box] = None
    return [(text, list(boxes)) for text, boxes in found.values()]


def _boxes_by_category(record: Record) -> dict[str, list[Box]]:
    found: dict[str, dict[Box, None]] = {}
    for region in record.regions:
        if region.category:
            found.setdefault(region.category, {})[region.box] = None
    return {category: list(boxes) for category, boxes in found.items()}


def _boxes_by_mention(record: Record, kinds: dict[str, list[Box]]) -> dict[str, list[Box]]:
    """How a caption may name boxes, casefolded: a phrase of one box or of one group, or a category
    with its number ("two crabs")."""
    named: dict[str, list[Box]] = {}
    for kind, boxes in kinds.items():
        names = {kind, with_article(kind), f"the {kind}"} if len(boxes) == 1 else {plural(kind)}
        number = counted(kind, len(boxes))
        named |= {name.casefold(): boxes for name in (*names, number, f"the {number}")}
    groups: dict[str, set[str]] = {}
    for region in record.regions:
        groups.setdefault(region.phrase.casefold(), set()).add(region.group)
    for text, boxes in _boxes_by_text(record):
        group = groups.get(text.casefold(), {""})
        if len(boxes) == 1 or (len(group) == 1 and "" not in group):
            named[text.casefold()] = boxes
    return named


def _words(*texts: str) -> set[str]:
    """Words of three letters or more, without a plural s, so that crabs are crab."""
    found = (word for text in texts for word in re.findall(r"\w{3,}", text.casefold()))
    return {word.rstrip("s") for word in found} - {"the"}


def _in_turn(pool: list[Any], rng: np.random.Generator) -> list[Any]:
    return [pool[place] for place in rng.permutation(len(pool))]
