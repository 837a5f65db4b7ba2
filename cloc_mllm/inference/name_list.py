"""`cloc-mllm phrases`: gives a CLOC the list of phrases that it names regions with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from cloc_mllm.command_line import ArgumentParser
from cloc_mllm.data.parquet import load_records
from cloc_mllm.inference.cloc_predictor import ClocPredictor
from cloc_mllm.models.phrases import PHRASES_FILE, Phrases, frequent_phrases

NUM_PHRASES = 3000


def main(argv: Sequence[str] | None = None) -> int:
    """`cloc-mllm phrases --cloc DIR --data RECORDS`."""
    parser = ArgumentParser(
        prog="cloc-mllm phrases",
        description="Give a CLOC of yours the phrases that its training data say most, with how "
        "often they do. `refer` and the demo then name regions by them, and so does an MLLM whose "
        "stage 2 is started after it.",
        epilog="example: cloc-mllm phrases --cloc runs/mine/model --data runs/data/mine",
    )
    parser.add_argument("--cloc", type=Path, required=True, help="directory that stage 1 wrote")
    parser.add_argument("--data", required=True, help="records with regions")
    parser.add_argument(
        "--num", type=int, default=NUM_PHRASES, help="most phrases (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    if arguments.num < 1:
        raise ValueError(f"--num is {arguments.num}; expected at least 1")
    if not arguments.cloc.is_dir():
        raise FileNotFoundError(
            f"--cloc {arguments.cloc} is no directory; expected what stage 1 writes to "
            "OUTPUT_DIR/model (the shipped models have their lists)"
        )
    predictor = ClocPredictor.from_pretrained(arguments.cloc)
    phrases = list_phrases(predictor, arguments.data, arguments.num)
    phrases.save(arguments.cloc)
    print(f"{arguments.cloc / PHRASES_FILE}: {len(phrases.texts):,} phrases, the most frequent are")
    assert phrases.counts is not None
    for text, count in zip(phrases.texts[:5], phrases.counts.tolist(), strict=False):
        print(f"{count:8,}  {text}")
    return 0


def list_phrases(predictor: ClocPredictor, data: str, count: int = NUM_PHRASES) -> Phrases:
    """Embeds the most frequent phrases of records; see `frequent_phrases`.

    Raises:
        ValueError: there is none.
    """
    found = frequent_phrases(load_records(data).without_images(), count)
    if not found:
        raise ValueError(
            f"{data} has no region whose phrase can be a name (pronouns, bare colours and phrases "
            "of over 40 characters are none)"
        )
    texts = list(found)
    embeddings = torch.cat(
        [predictor.embed_text(texts[start : start + 256]) for start in range(0, len(texts), 256)]
    )
    counts = torch.tensor(list(found.values()))
    model = predictor.model
    return Phrases(texts, embeddings, model.region_scale, counts, model.phrase_prior)
