"""The scorers by name, and the one way to call them on rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from cloc_mllm.evaluation.compat import ferret, internvl, lmms_eval, vlmevalkit
from cloc_mllm.evaluation.compat.common import BoxAnswers, CompatScores
from cloc_mllm.evaluation.rows.rows import ScoredPair

COMPATS: dict[str, Callable[[BoxAnswers], CompatScores]] = {
    "lmms-eval": lmms_eval.score_bbox_rec,
    "lmms-eval-grounding": lmms_eval.score_refcoco_grounding,
    "vlmevalkit": vlmevalkit.score,
    "internvl": internvl.score,
    "ferret": ferret.score,
}
_NEEDS_NO_SIZE = ("lmms-eval",)


def compat_scores(name: str, pairs: Sequence[ScoredPair]) -> CompatScores:
    """What the scorer `name` makes of the rows' `raw_text`.

    Raises:
        ValueError: an unknown name, a row with boxes but no text, no image size, or several true
            boxes, which none of these scorers knows; the message names the rows.
    """
    if name not in COMPATS:
        raise ValueError(f"unknown compat {name!r}; expected some of: {', '.join(COMPATS)}")
    wordless = [p for p in pairs if p.prediction.boxes and not p.prediction.raw_text]
    _refuse(name, wordless, "reads the model's words, but there are boxes without a raw_text")
    _refuse(name, [p for p in pairs if len(p.reference.boxes) != 1], "needs exactly one true box")
    sizes = [(pair.reference.width, pair.reference.height) for pair in pairs]
    if name not in _NEEDS_NO_SIZE:
        unknown = [pair for pair, size in zip(pairs, sizes, strict=True) if min(size) <= 0]
        _refuse(name, unknown, "needs width and height in the references")
    given = BoxAnswers(
        [pair.prediction.raw_text for pair in pairs],
        np.array([pair.reference.boxes[0] for pair in pairs], dtype=np.float64),
        np.array(sizes, dtype=np.float64),
    )
    return COMPATS[name](given)


def _refuse(name: str, pairs: Sequence[ScoredPair], problem: str) -> None:
    if pairs:
        shown = ", ".join(repr(pair.reference.id) for pair in pairs[:5])
        more = f" and {len(pairs) - 5} more" if len(pairs) > 5 else ""
        raise ValueError(f"compat {name} {problem}: {shown}{more}")
