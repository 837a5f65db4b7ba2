"""What is in this box, in a caption? All texts annotated on the box are references (RefCOCOg and
Visual Genome are the usual data). Texts are lower-cased and punctuation becomes spaces (not the
Java tokeniser of the COCO scripts). cider (Vedantam et al. 2015): mean over regions, with document
frequencies of these references, so a small set is not comparable with another; percent, and over
100 % is possible. meteor (Denkowski and Lavie 2014): mean over regions."""

from __future__ import annotations

import importlib
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cloc_mllm.evaluation.queries import QuerySet
from cloc_mllm.evaluation.rows.rows import ScoredPair
from cloc_mllm.evaluation.stats.bootstrap import QueryScores
from cloc_mllm.evaluation.tasks import EvalData, Scorer, Task

TASK = "region_captioning"


def words(text: str) -> str:
    """`The man's hat, red.` -> `the man s hat red`."""
    return " ".join(re.findall(r"\w+", text.lower()))


def is_failure(pair: ScoredPair) -> bool:
    return pair.prediction.failure is not None or not words(pair.prediction.raw_text)


def score(pairs: Sequence[ScoredPair]) -> dict[str, QueryScores]:
    """cider of each region's caption; a failed answer scores 0."""
    from pycocoevalcap.cider.cider import Cider

    references, answers = _tables(pairs)
    _, values = Cider().compute_score(references, answers)
    return {"cider": QueryScores(np.asarray(values), _image_ids(pairs))}


def meteor(pairs: Sequence[ScoredPair]) -> tuple[QueryScores, float]:
    """METEOR of each region's caption, and of all together (what papers quote).

    Raises:
        ValueError: its Java program fails.
    """
    from pycocoevalcap.meteor.meteor import Meteor

    references, answers = _tables(pairs)
    try:
        all_together, values = Meteor().compute_score(references, answers)
    except (ValueError, OSError) as error:  # its process died: no number comes back
        raise ValueError(
            f"METEOR's Java program gave no score ({error}); try `java -version`"
        ) from error
    return QueryScores(np.asarray(values), _image_ids(pairs)), float(all_together)


def _tables(pairs: Sequence[ScoredPair]) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """Row number -> references, and -> the one answer."""
    references = {i: [words(label) for label in p.reference.labels] for i, p in enumerate(pairs)}
    answers = {
        i: ["" if is_failure(p) else words(p.prediction.raw_text)] for i, p in enumerate(pairs)
    }
    return references, answers


def _image_ids(pairs: Sequence[ScoredPair]) -> list[str]:
    return [pair.reference.image_id for pair in pairs]


SCORERS = {
    TASK: Scorer(
        "Region captioning (MLLM)",
        __doc__,
        "cider",
        score,
        truth=("labels",),
        is_failure=is_failure,
    )
}


@dataclass
class RegionCaptioning(Task):
    """The MLLM captions each region of the records.

    Args:
        meteor: METEOR too; needs Java.
    """

    meteor: bool = False

    def query_sets(self, data: EvalData) -> list[QuerySet]:
        """
        Raises:
            ModuleNotFoundError, ValueError: the scorer, or its Java, is missing. Said here, before
                anything is answered.
        """
        importlib.import_module("pycocoevalcap")
        if self.meteor and shutil.which("java") is None:
            raise ValueError(
                "METEOR is a Java program and there is no `java` on the PATH; install a Java "
                "runtime (Debian, Ubuntu: default-jre-headless) or leave --meteor out"
            )
        pairs = data.index.region_pairs(TASK, lambda region: region.phrases)
        return [data.index.query_set(TASK, "text", "mllm", pairs, max_new_tokens=48)]

    def more_scores(
        self, pairs: Sequence[ScoredPair]
    ) -> tuple[dict[str, QueryScores], dict[str, Any]]:
        if not self.meteor:
            return {}, {}
        scores, all_together = meteor(pairs)
        return {"meteor": scores}, {"meteor_of_all_together": all_together}
