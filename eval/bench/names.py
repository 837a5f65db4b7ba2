"""Names of boxes on photos: what CLOC chooses from its own list of phrases.

    python eval/bench/names.py --data runs/data/photos-val [--train runs/data/photos-train]

Prints word F1 and exact match, as the task `referring` of `cloc-mllm eval` counts them for a
language model, by the cosine alone and with how often each phrase is said. With `--train` also
`region_to_text` among the phrases of `--data`, by the cosine and with how often each is said there.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
import torch

from cloc_mllm.box import Box
from cloc_mllm.cli import run
from cloc_mllm.command_line import ArgumentParser
from cloc_mllm.data.parquet import load_records
from cloc_mllm.data.records import Record
from cloc_mllm.evaluation.record_index import RecordIndex
from cloc_mllm.evaluation.stats.bootstrap import QueryScores, bootstrap_interval
from cloc_mllm.evaluation.tasks.referring import normalise, word_f1
from cloc_mllm.inference.cloc_predictor import ClocPredictor


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog="names", description=__doc__)
    parser.add_argument("--data", required=True, help="records with regions")
    parser.add_argument("--cloc", help="a model with a list of phrases (default: the shipped one)")
    parser.add_argument("--train", help="records whose phrases are counted, also beyond the list")
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
        _print(f"{way}, {metric}", values, image_ids)
    if arguments.train:
        _print_retrieval(predictor, load_records(arguments.data), arguments.train)


def _print(what: str, values: Sequence[float], image_ids: Sequence[str]) -> None:
    interval = bootstrap_interval(QueryScores(np.array(values, float), list(image_ids)))
    numbers = [100 * value for value in (interval.value, interval.ci_low, interval.ci_high)]
    print("{}: {:.1f} [{:.1f}, {:.1f}] of {}".format(what, *numbers, len(values)))


def _print_retrieval(predictor: ClocPredictor, records: Sequence[Record], train: str) -> None:
    index = RecordIndex(records)
    said = Counter(
        text.lower()
        for record in load_records(train).without_images()
        for region in record.regions
        for text in {region.phrase, *region.expressions}
    )
    often = torch.tensor([said[phrase] + 1.0 for phrase in index.phrases]).log()
    texts = torch.cat(
        [
            predictor.embed_text(index.phrases[i : i + 256])
            for i in range(0, len(index.phrases), 256)
        ]
    )
    ranks = defaultdict(list)
    image_ids = []
    for record in records:
        regions = [region for region in index.regions if region.image_id == record.id]
        if not regions:
            continue
        boxes = [region.box for region in regions]
        cosines = predictor.embed_regions(record.load_image(), boxes) @ texts.T
        likely = predictor.model.region_scale * cosines + (1 - predictor.model.phrase_prior) * often
        for way, logits in (("cosine", cosines), ("and how often", likely)):
            for order, region in zip(
                logits.argsort(-1, descending=True).tolist(), regions, strict=True
            ):
                right = set(region.phrases)
                ranks[way].append(next(i for i, t in enumerate(order) if index.phrases[t] in right))
        image_ids += [record.id] * len(regions)
    for way, places in ranks.items():
        for k in (1, 10):
            _print(f"{way}, region_to_text R@{k}", [place < k for place in places], image_ids)


def phrases_by_box(record: Record) -> dict[Box, set[str]]:
    """The normalised phrases of each box."""
    phrases: defaultdict[Box, set[str]] = defaultdict(set)
    for region in record.regions:
        phrases[region.box] |= {normalise(text) for text in (region.phrase, *region.expressions)}
    return phrases


if __name__ == "__main__":
    sys.exit(run(main))
