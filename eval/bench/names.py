"""Names of boxes on photos: what CLOC chooses from its own list of phrases.

    python eval/bench/names.py --data runs/data/photos-val

Prints word F1 and exact match, as the task `referring` of `cloc-mllm eval` counts them for a
language model, by the cosine alone and with how often each phrase is said.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import defaultdict

import numpy as np

from cloc_mllm.box import Box
from cloc_mllm.cli import run
from cloc_mllm.command_line import ArgumentParser
from cloc_mllm.data.parquet import load_records
from cloc_mllm.data.records import Record
from cloc_mllm.evaluation.stats.bootstrap import QueryScores, bootstrap_interval
from cloc_mllm.evaluation.tasks.referring import normalise, word_f1
from cloc_mllm.inference.cloc_predictor import ClocPredictor


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog="names", description=__doc__)
    parser.add_argument("--data", required=True, help="records with regions")
    parser.add_argument("--cloc", help="a model with a list of phrases (default: the shipped one)")
    arguments = parser.parse_args(argv)
    predictor = ClocPredictor.from_pretrained(arguments.cloc)
    if predictor.phrases is None:
        raise ValueError(f"{arguments.cloc} has no list of phrases; `photos` has one")
    ways = {
        "cosine": dataclasses.replace(predictor.phrases, counts=None),
        "and how often": predictor.phrases,
    }
    scores: dict[tuple[str, str], list[float]] = defaultdict(list)
    image_ids: list[str] = []
    for record in load_records(arguments.data):
        phrases = phrases_by_box(record)
        if not phrases:
            continue
        image = predictor.encode(record.load_image())
        for way, predictor.phrases in ways.items():
            found = predictor.closest(image, [*phrases], count=1).labels
            for name, wanted in zip(map(normalise, found), phrases.values(), strict=True):
                scores[way, "exact match"].append(name in wanted)
                scores[way, "word F1"].append(max(word_f1(name, phrase) for phrase in wanted))
        image_ids += [record.id] * len(phrases)
    for (way, metric), values in scores.items():
        interval = bootstrap_interval(QueryScores(np.array(values, float), image_ids))
        numbers = [100 * value for value in (interval.value, interval.ci_low, interval.ci_high)]
        print("{}, {}: {:.1f} [{:.1f}, {:.1f}] of {}".format(way, metric, *numbers, len(values)))


def phrases_by_box(record: Record) -> dict[Box, set[str]]:
    """The normalised phrases of each box."""
    phrases: defaultdict[Box, set[str]] = defaultdict(set)
    for region in record.regions:
        phrases[region.box] |= {normalise(text) for text in (region.phrase, *region.expressions)}
    return phrases


if __name__ == "__main__":
    sys.exit(run(main))
