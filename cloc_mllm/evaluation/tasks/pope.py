"""Is there a THING in the image? (POPE, Li et al. 2023) An answer that starts with yes or no is
that; else one with a `yes` and no word of denial is yes, one with a `no`, `not` or `n't` and no
`yes` is no (whole words, any case). Any other answer is unparseable: wrong, counted, and neither a
yes nor a no. precision: of the yes answers; recall: of the true yes; f1 of the two; yes_rate: yes
answers of all questions. After the slash, by split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cloc_mllm.evaluation.benchmark_files import photo_questions, read_json_rows
from cloc_mllm.evaluation.queries import Query, QuerySet, pair
from cloc_mllm.evaluation.rows.rows import ScoredPair
from cloc_mllm.evaluation.scores.binary import binary_scores
from cloc_mllm.evaluation.scores.by_kind import with_kinds
from cloc_mllm.evaluation.stats.bootstrap import QueryScores
from cloc_mllm.evaluation.tasks import EvalData, Scorer, Task
from cloc_mllm.evaluation.words import english_words

TASK = "pope"
SPLITS = ("random", "popular", "adversarial")


def read_yes_no(text: str) -> str | None:
    """`yes`, `no`, or None if the declared rule reads neither."""
    words = english_words(text)
    if words and words[0] in ("yes", "no"):
        return words[0]
    says_yes = "yes" in words
    denies = any(word in ("no", "not") for word in words)
    if says_yes == denies:
        return None
    return "yes" if says_yes else "no"


def score(pairs: Sequence[ScoredPair]) -> dict[str, QueryScores]:
    """Scores of all questions, then by `kind` (the split) if there are several."""
    return with_kinds(pairs, _scores)


def is_failure(pair: ScoredPair) -> bool:
    return _answer(pair) is None


def _answer(pair: ScoredPair) -> str | None:
    return read_yes_no(pair.prediction.raw_text) if pair.prediction.failure is None else None


def _scores(pairs: Sequence[ScoredPair]) -> dict[str, QueryScores]:
    answers = [_answer(pair) for pair in pairs]
    said_yes = np.array([answer == "yes" for answer in answers])
    is_yes = np.array([pair.reference.labels[0] == "yes" for pair in pairs])
    right = np.array([a == p.reference.labels[0] for a, p in zip(answers, pairs, strict=True)])
    image_ids = [pair.reference.image_id for pair in pairs]
    return {
        "accuracy": QueryScores(right.astype(float), image_ids),
        **binary_scores(said_yes, is_yes, image_ids),
        "yes_rate": QueryScores(said_yes.astype(float), image_ids),
    }


SCORERS = {
    TASK: Scorer(
        "POPE (MLLM)", __doc__, "accuracy", score, truth=("labels",), is_failure=is_failure
    )
}


@dataclass
class Pope(Task):
    """POPE: is there a THING in the image, yes or no.

    A row is `{"question_id": 1, "image": "COCO_val2014_000000310196.jpg", "text": "Is there a
    snowboard in the image?", "label": "yes"}`.

    Args:
        questions: files of one to three splits, which are told by their names in the file names
            (`coco_pope_adversarial.json`).
        images: folder, tar or zip of the photos.
        suffix: appended to each question, for instance " Answer yes or no.".
    """

    questions: list[Path]
    images: Path
    suffix: str = ""

    reads_records = False

    def query_sets(self, data: EvalData) -> list[QuerySet]:
        """
        Raises:
            ValueError: a file name without a split or with another's, a row without the four keys,
                a label that is neither yes nor no, or one id twice.
        """
        rows = self._rows()
        pairs = [
            pair(
                Query(row_id, str(row["image"]), TASK, f"{row['text']}{self.suffix}"),
                labels=[row["label"]],
                choices=["yes", "no"],
                kind=split,
            )
            for row_id, split, row in rows
        ]
        name = "POPE " + ", ".join(dict.fromkeys(split for _, split, _ in rows))
        return [photo_questions(TASK, name, pairs, self.images, max_new_tokens=16)]

    def _rows(self) -> list[tuple[str, str, dict[str, Any]]]:
        """Row id, split and row of every question."""
        rows = []
        for path in self.questions:
            split = _split_in_name(path)
            for where, row in read_json_rows(path, "question_id", "image", "text", "label"):
                if row["label"] not in ("yes", "no"):
                    raise ValueError(f"{where}: expected the label yes or no, got {row['label']!r}")
                rows.append((f"{TASK}/{split}/{row['question_id']}", split, row))
        if len({row_id for row_id, _, _ in rows}) < len(rows):
            files = ", ".join(map(str, self.questions))
            raise ValueError(f"a question_id stands twice in one split of {files}")
        return rows


def _split_in_name(path: Path) -> str:
    found = [split for split in SPLITS if split in path.name]
    if len(found) != 1:
        raise ValueError(
            f"{path}: expected the split ({', '.join(SPLITS)}) in the file's name; rename it"
        )
    return found[0]
