"""How good are an MLLM's captions with boxes?

    python eval/bench/grounded_captions.py --data runs/data/flickr8k-val \\
      --mllm runs/stage2_chats/model

The model is asked to describe each photo with boxes. CIDEr is of the words alone, against the
captions. A thing of the caption is the words before its boxes. It is named right if their last
word ends a text of a true region of the photo, and right if one of its boxes has IoU >= 0.5 with
a box of that region, too. F1_all: of right things, against the photo's regions. F1_loc: the share
of things named right whose box is right. Both follow Zhou et al. 2019 (Grounded Video
Description), who take object classes in the place of last words. Regions of one group are one
thing.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cloc_mllm.box import Box
from cloc_mllm.cli import run
from cloc_mllm.command_line import ArgumentParser
from cloc_mllm.data.parquet import load_records
from cloc_mllm.data.records import Record
from cloc_mllm.evaluation.stats.bootstrap import QueryScores, bootstrap_interval
from cloc_mllm.evaluation.stats.overlap import paired_iou
from cloc_mllm.evaluation.tasks.region_captioning import words
from cloc_mllm.inference.grounding_predictor import GroundingPredictor, Question

MIN_IOU = 0.5


class Thing(NamedTuple):
    """A thing that a caption or a record names: the last words of its names, and its boxes."""

    heads: set[str]
    boxes: list[Box]


class Score(NamedTuple):
    """Counts of one photo."""

    num_said: int
    num_named_right: int
    num_right: int
    num_true: int

    @property
    def f1(self) -> float:
        return 2 * self.num_right / max(1, self.num_said + self.num_true)


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(prog="grounded_captions", description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--mllm", required=True)
    parser.add_argument("--question", default="Describe the image with boxes.")
    parser.add_argument("--limit", type=int, default=0, help="the first so many photos; 0 is all")
    parser.add_argument("--max_new_tokens", type=int, default=80)
    parser.add_argument("--num_shown", type=int, default=5, help="captions to print")
    options = parser.parse_args(argv)
    records = load_records(options.data)
    chosen = records[: options.limit] if options.limit else records[:]
    predictor = GroundingPredictor.from_pretrained(options.mllm)
    answers = predictor.answer(
        [Question(record.load_image(), options.question) for record in chosen],
        max_new_tokens=options.max_new_tokens,
        batch_size=16,
    )
    captions, scores = [], []
    for record, answer in zip(chosen, answers, strict=True):
        caption, said = things_of(answer.text, answer.spans, answer.boxes.xyxy.tolist())
        captions.append(caption)
        scores.append(score(said, true_things(record)))
    for record, answer in list(zip(chosen, answers, strict=True))[: options.num_shown]:
        print(f"{record.id}: {answer.text}")
    ids = [record.id for record in chosen]
    print(
        f"{len(ids)} photos, {np.mean([s.num_said for s in scores]):.2f} things with boxes in each"
    )
    print(_shown("CIDEr", QueryScores(cider(captions, chosen), ids)))
    print(_shown("F1_all", QueryScores(np.array([s.f1 for s in scores]), ids)))
    said_right = [(s.num_right, s.num_named_right, i) for s, i in zip(scores, ids, strict=True)]
    hits = [(float(place < right), i) for right, named, i in said_right for place in range(named)]
    if hits:
        print(_shown("F1_loc", QueryScores(np.array([h for h, _ in hits]), [i for _, i in hits])))
    return 0


def things_of(
    text: str, spans: Sequence[tuple[int, int]], boxes: Sequence[Box]
) -> tuple[str, list[Thing]]:
    """Parts an answer into its words and its things; boxes in a row are of one thing."""
    caption, things, end = "", [], 0
    for (start, stop), box in zip(spans, boxes, strict=True):
        between = re.sub(r"</?p>", "", text[end:start])
        if head := _head(between):
            things.append(Thing({head}, [box]))
        elif things:
            things[-1].boxes.append(box)
        caption, end = caption + between, stop
    return words(caption + re.sub(r"</?p>", "", text[end:])), things


def true_things(record: Record) -> list[Thing]:
    things: dict[str, Thing] = {}
    for number, region in enumerate(record.regions):
        thing = things.setdefault(region.group or f"region {number}", Thing(set(), []))
        thing.boxes.append(region.box)
        thing.heads.update(map(_head, (region.phrase, *region.expressions)))
    return list(things.values())


def score(said: Sequence[Thing], true: Sequence[Thing]) -> Score:
    """Counts what is right; each true thing counts once."""
    num_named = 0
    found: set[int] = set()
    for thing in said:
        named = [i for i, other in enumerate(true) if thing.heads & other.heads]
        num_named += bool(named)
        hit = (i for i in named if i not in found and _overlap(thing.boxes, true[i].boxes))
        found.update(list(hit)[:1])
    return Score(len(said), num_named, len(found), len(true))


def cider(captions: Sequence[str], records: Sequence[Record]) -> np.ndarray:
    from pycocoevalcap.cider.cider import Cider

    references = {i: [words(text) for text in record.captions] for i, record in enumerate(records)}
    _, values = Cider().compute_score(references, {i: [text] for i, text in enumerate(captions)})
    return np.asarray(values)


def _head(text: str) -> str:
    """The last word, without a plural s."""
    found = words(text).split()
    return found[-1].removesuffix("s") if found else ""


def _overlap(said: Sequence[Box], true: Sequence[Box]) -> bool:
    pairs = [(a, b) for a in said for b in true]
    first, second = (np.array(column) for column in zip(*pairs, strict=True))
    return bool((paired_iou(first, second) >= MIN_IOU).any())


def _shown(name: str, scores: QueryScores) -> str:
    interval = bootstrap_interval(scores)
    value, low, high = (100 * x for x in (interval.value, interval.ci_low, interval.ci_high))
    return f"{name}: {value:.1f} [{low:.1f}, {high:.1f}] (n {interval.n})"


if __name__ == "__main__":
    sys.exit(run(main))
