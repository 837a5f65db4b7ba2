"""Captions of regions: CIDEr (Vedantam et al. 2015) and METEOR (Denkowski and Lavie 2014).

Both come from `pycocoevalcap`. CIDEr is plain Python; METEOR is a Java program.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence

import numpy as np

from cloc_mllm.evaluation.predictions import ScoredPair
from cloc_mllm.evaluation.statistics import QueryScores

RULE = (
    "All texts annotated on the box are references. Texts are lower-cased and punctuation becomes "
    "spaces (not the Java tokeniser of the COCO scripts). cider: mean over regions, with document "
    "frequencies of these references, so a small set is not comparable with another; percent, and "
    "over 100 % is possible. meteor: mean over regions."
)


def words_of(text: str) -> str:
    """`The man's hat, red.` -> `the man s hat red`."""
    return " ".join(re.findall(r"\w+", text.lower()))


def score(pairs: Sequence[ScoredPair]) -> dict[str, QueryScores]:
    """cider of each region's caption; a failed answer scores 0."""
    from pycocoevalcap.cider.cider import Cider

    references, answers = _tables(pairs)
    _, values = Cider().compute_score(references, answers)
    return {"cider": QueryScores(np.asarray(values), _image_ids(pairs))}


def meteor(pairs: Sequence[ScoredPair]) -> tuple[QueryScores, float]:
    """METEOR of each region's caption, and of all together (what papers quote).

    Raises:
        ValueError: there is no Java, or its program fails.
    """
    if shutil.which("java") is None:
        raise ValueError(
            "METEOR is a Java program and there is no `java` on the PATH; install a Java runtime "
            "(Debian, Ubuntu: default-jre-headless) or leave --meteor out"
        )
    from pycocoevalcap.meteor.meteor import Meteor

    references, answers = _tables(pairs)
    try:
        of_all, values = Meteor().compute_score(references, answers)
    except (ValueError, OSError) as error:  # its process died: no number comes back
        raise ValueError(
            f"METEOR's Java program gave no score ({error}); try `java -version`"
        ) from error
    return QueryScores(np.asarray(values), _image_ids(pairs)), float(of_all)


def is_failure(pair: ScoredPair) -> bool:
    return pair.prediction.failure is not None or not words_of(pair.prediction.raw_text)


def _tables(pairs: Sequence[ScoredPair]) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """Row number -> references, and -> the one answer."""
    references = {
        index: [words_of(label) for label in pair.reference.labels]
        for index, pair in enumerate(pairs)
    }
    answers = {
        index: ["" if is_failure(pair) else words_of(pair.prediction.raw_text)]
        for index, pair in enumerate(pairs)
    }
    return references, answers


def _image_ids(pairs: Sequence[ScoredPair]) -> list[str]:
    return [pair.reference.image_id for pair in pairs]
