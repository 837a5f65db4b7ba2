"""Chats about photos of Flickr30k Entities, in the layouts of LLaVA and Ferret.

    python eval/bench/flickr8k_chats.py --annotations FLICKR/annotations.zip \\
      --records runs/data/flickr8k-train --output_dir runs/chats

Writes `llava.jsonl` (boxes in 0..1; every fifth chat is about two photos) and `ferret.jsonl`
(pixels), which `cloc-mllm data build llava | ferret` reads. The answers are the photos' captions,
phrases and boxes: what is there, where it is, all people with their boxes, captions with a box
behind each phrase, and, now and then, that a thing is not there.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from cloc_mllm.box import Box
from cloc_mllm.cli import run
from cloc_mllm.command_line import ArgumentParser
from cloc_mllm.data.parquet import load_records
from cloc_mllm.data.readers.flickr30k_entities import Mention, read_mentions
from cloc_mllm.data.records import Record

DESCRIBE = (
    "What do you see?",
    "Describe the photo.",
    "What is going on here?",
    "Caption this photo, please.",
)
DESCRIBE_WITH_BOXES = (
    "Describe the photo and give the box of each thing.",
    "What is where in this photo?",
    "Tell me what you see, with boxes.",
    "Write a caption and locate what it names.",
)
WHERE = (
    "Where is {name}?",
    "Can you find {name}?",
    "Show me {name}.",
    "Please locate {name}.",
    "In which part of the photo is {name}?",
)
HERE = ("{}", "{}", "Here: {}", "At {}.")
ALL_PEOPLE = (
    "Where are all the people?",
    "Mark every person.",
    "Find all people in this photo.",
    "How many people are there, and where?",
)
WHAT = ("What is at {}?", "Who or what is in {}?", "Describe {} in a few words.")
ABSENT = ("There is no {name} in this photo.", "I see no {name} here.", "not in the image")
WHICH = ("Which photo shows {name}?", "In which of the two photos is {name}?")
THINGS = [
    "horse",
    "boat",
    "bicycle",
    "airplane",
    "guitar",
    "umbrella",
    "laptop",
    "elephant",
    "pizza",
    "piano",
    "truck",
    "train",
    "cow",
    "sheep",
    "violin",
    "camel",
    "bus",
    "kite",
    "cake",
    "motorcycle",
    "giraffe",
    "surfboard",
    "tent",
]
_OTHER_NAMES = {
    "boat": "kayak canoe ship raft",
    "bicycle": "bike bikes biker cyclist",
    "motorcycle": "motorbike dirt",
}


@dataclass
class Photo:
    """A record, and the phrases of its captions with their boxes, caption by caption."""

    record: Record
    mentions: list[Mention]

    def caption(self, rng: random.Random) -> tuple[str, list[Mention]]:
        number = rng.randrange(len(self.record.captions))
        return self.record.captions[number], [m for m in self.mentions if m.sentence == number]

    def lacks(self, thing: str) -> bool:
        words = set(re.findall(r"[a-z]+", " ".join(self.record.captions).lower()))
        named = {thing, *_OTHER_NAMES.get(thing, "").split()}
        return not any(name in words or f"{name}s" in words for name in named)


@dataclass
class Row:
    """A chat that is being written, a question and an answer in turn.

    Attributes:
        marks: boxes stand beside the texts, as in Ferret's layout, or in them, as in LLaVA's.
        boxes: of each turn, for Ferret's layout.
    """

    marks: bool
    texts: list[str] = field(default_factory=list)
    boxes: list[list[Box]] = field(default_factory=list)

    def say(self, text: str, boxes: Sequence[Sequence[Box]] = ()) -> None:
        """Adds a turn; each `{}` of the text is the next group of boxes."""
        listed: list[Box] = []
        for group in boxes:
            shown = [self._shown(box, listed) for box in sorted(group)]
            text = text.replace("{}", " ".join(shown), 1)
        self.texts.append(text)
        self.boxes.append(listed)

    def _shown(self, box: Box, listed: list[Box]) -> str:
        if not self.marks:
            return "[" + ", ".join(f"{value:.3f}" for value in box) + "]"
        if box not in listed:
            listed.append(box)
        return f"<bbox_location{listed.index(box)}>"


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(prog="flickr8k_chats", description=__doc__)
    parser.add_argument("--annotations", type=Path, required=True, help="Flickr30k Entities")
    parser.add_argument("--records", type=Path, required=True, help="what `data build` made of it")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--num", type=int, default=800, help="chats of each layout")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    rng = random.Random(options.seed)
    records = load_records(options.records)
    places = rng.sample(range(len(records)), 2 * options.num + options.num // 5)
    chosen = [records[place] for place in sorted(places)]
    rng.shuffle(chosen)
    photos = iter(photos_of(options.annotations, chosen))
    options.output_dir.mkdir(parents=True, exist_ok=True)
    for layout in ("llava", "ferret"):
        path = options.output_dir / f"{layout}.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for number in range(options.num):
                of = [next(photos)]
                if layout == "llava" and number % 5 == 0:
                    of.append(next(photos))
                row = Row(marks=layout == "ferret")
                for which, photo in enumerate(of):
                    talk(row, photo, rng, num_questions=4 - len(of), which=which)
                if len(of) == 2:
                    compare(row, of, rng)
                file.write(json.dumps(as_json(row, of, f"{layout}-{number}")) + "\n")
        print(f"{path}: {options.num} chats")
    return 0


def photos_of(annotations: Path, records: Sequence[Record]) -> Iterator[Photo]:
    mentions = read_mentions(annotations, [record.id for record in records], Counter())
    by_id = {photo_id: list(of) for photo_id, of in groupby(mentions, lambda m: m.photo_id)}
    return (Photo(record, by_id.get(record.id, [])) for record in records)


def talk(row: Row, photo: Photo, rng: random.Random, num_questions: int, which: int) -> None:
    """Asks different things about a photo, the first of them with the photo.

    Args:
        which: which of the chat's photos it is.
    """
    kinds = [describe, describe_with_boxes, where, where, what, all_people, absent]
    rng.shuffle(kinds)
    said = 0
    for kind in kinds:
        before = len(row.texts)
        if said < num_questions:
            kind(row, photo, rng)
        if len(row.texts) > before:
            if not said:
                row.texts[before] = (
                    "<image>\n" + ("And this one? " if which else "") + row.texts[before]
                )
            said += 1


def describe(row: Row, photo: Photo, rng: random.Random) -> None:
    row.say(rng.choice(DESCRIBE))
    row.say(tidy(photo.caption(rng)[0]))


def describe_with_boxes(row: Row, photo: Photo, rng: random.Random) -> None:
    caption, mentions = photo.caption(rng)
    text, boxes, rest = "", [], caption
    for mention in mentions:
        before, found, after = rest.partition(mention.text)
        if found:
            text += f"{before}{mention.text} {{}}"
            boxes.append(mention.boxes)
            rest = after
    if boxes:
        row.say(rng.choice(DESCRIBE_WITH_BOXES))
        row.say(tidy(text + rest), boxes)


def where(row: Row, photo: Photo, rng: random.Random) -> None:
    """Where is a thing? One that is named several times is asked for in any of its names."""
    if photo.mentions:
        mention = rng.choice(photo.mentions)
        row.say(rng.choice(WHERE).format(name=lower(mention.text)))
        row.say(rng.choice(HERE), [mention.boxes])


def what(row: Row, photo: Photo, rng: random.Random) -> None:
    single = [mention for mention in photo.mentions if len(mention.boxes) == 1]
    if single:
        mention = rng.choice(single)
        row.say(rng.choice(WHAT), [mention.boxes])
        row.say(lower(mention.text))


def all_people(row: Row, photo: Photo, rng: random.Random) -> None:
    boxes = {box for m in photo.mentions if "people" in m.types for box in m.boxes}
    if 1 < len(boxes) <= 8:
        row.say(rng.choice(ALL_PEOPLE))
        row.say(f"{len(boxes)} people: {{}}", [list(boxes)])


def absent(row: Row, photo: Photo, rng: random.Random) -> None:
    thing = rng.choice(THINGS)
    if photo.lacks(thing):
        row.say(rng.choice(WHERE).format(name=f"the {thing}"))
        row.say(rng.choice(ABSENT).format(name=thing))


def compare(row: Row, photos: Sequence[Photo], rng: random.Random) -> None:
    """Asks which of two photos a phrase is about, one that only one of them has."""
    number = rng.randrange(2)
    others = {m.text.lower() for m in photos[1 - number].mentions}
    names = [m.text for m in photos[number].mentions if m.text.lower() not in others]
    if names:
        row.say(rng.choice(WHICH).format(name=lower(rng.choice(names))))
        row.say(f"The {('first', 'second')[number]} one.")


def tidy(caption: str) -> str:
    """`A dog runs .` -> `A dog runs.`"""
    return re.sub(r" ([.,!?])", r"\1", caption.strip())


def lower(phrase: str) -> str:
    """A phrase in the middle of a sentence: `A dog` -> `a dog`."""
    return phrase[:1].lower() + phrase[1:]


def in_sides(box: Box, sides: Sequence[int]) -> list[float]:
    return [round(value * side, 1) for value, side in zip(box, sides, strict=True)]


def as_json(row: Row, photos: Sequence[Photo], row_id: str) -> dict[str, object]:
    names = [f"{photo.record.id}.jpg" for photo in photos]
    speakers = ("human", "gpt")
    turns = [{"from": speakers[i % 2], "value": text} for i, text in enumerate(row.texts)]
    of: dict[str, object] = {"id": row_id, "image": names[0] if len(names) == 1 else names}
    if row.marks:
        width, height = photos[0].record.width, photos[0].record.height
        sides = (width, height, width, height)
        in_pixels = [[in_sides(box, sides) for box in boxes] for boxes in row.boxes]
        of |= {"image_w": width, "image_h": height, "box_x1y1x2y2": in_pixels}
    return {**of, "conversations": turns}


if __name__ == "__main__":
    sys.exit(run(main))
