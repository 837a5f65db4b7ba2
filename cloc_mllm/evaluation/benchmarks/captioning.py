"""Captions of the regions of any records: RefCOCOg and Visual Genome are the usual ones."""

from __future__ import annotations

from collections.abc import Sequence

from cloc_mllm.data.conversations import PROMPTS
from cloc_mllm.data.records import Record
from cloc_mllm.evaluation.benchmarks.questions import REGION, Question, QuestionSet
from cloc_mllm.evaluation.predictions import ReferenceRow
from cloc_mllm.evaluation.queries import build_benchmark

TASK = "region_captioning"


def captioning_questions(records: Sequence[Record], name: str) -> QuestionSet:
    """What is in each distinct box? All texts annotated on it are references.

    Raises:
        ValueError: no record has a region with a text.
    """
    regions = [r for r in build_benchmark(records, ["referring"]).regions if r.phrases]
    if not regions:
        raise ValueError(f"{name} holds no region with a text; region captioning needs some")
    text = PROMPTS["refer"].format(box="").replace(f" {REGION}", REGION)
    return QuestionSet(
        f"Region captioning of {name}",
        list(records),
        [Question(f"{TASK}/{r.id}", r.image_id, TASK, text, (r.box,)) for r in regions],
        [
            ReferenceRow(f"{TASK}/{r.id}", r.image_id, TASK, [r.box], list(r.phrases))
            for r in regions
        ],
        len(regions),
        max_new_tokens=48,
        unit="regions",
    )
