"""Is one model better than another on the same queries, or would chance do the same?

Queries on one image are not independent, so the null hypothesis is tested image by image: if the
two models are alike, then swapping all their answers on an image changes nothing, and the
difference has either sign. Letters: Q queries, I images, G groups, S random swaps, M comparisons.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

from cloc_mllm.evaluation.stats.bootstrap import QueryScores, paired_scores, sums_by_image


@dataclass(frozen=True)
class PairedTest:
    """Two-sided tests of mean(a) = mean(b).

    Args:
        p_value: sign-flip permutation test over images; its smallest value is 1 / (samples + 1).
        wins: queries on which a scored higher.
        losses: queries on which b scored higher.
        mcnemar_p: McNemar's exact test on wins and losses, which takes queries as independent;
            None unless all scores are 0 or 1 and the metric is a plain mean.
    """

    p_value: float
    wins: int
    losses: int
    mcnemar_p: float | None


def paired_test(
    a: QueryScores, b: QueryScores, *, samples: int = 10_000, seed: int = 0
) -> PairedTest:
    """Compares two systems that answered the same queries in the same order.

    Raises:
        ValueError: the queries differ.
    """
    difference = paired_scores(a, b)
    sums, counts = sums_by_image(difference)
    # float[I]: what each image adds to the difference of the (macro) means
    contributions = (sums / counts.sum(0)).sum(1) / counts.shape[1]
    p_value = sign_flip_p(contributions[:, None], samples=samples, seed=seed)[0]
    wins, losses = int((difference.values > 0).sum()), int((difference.values < 0).sum())
    binary = a.groups is None and np.isin([a.values, b.values], (0, 1)).all()
    return PairedTest(float(p_value), wins, losses, _mcnemar(wins, losses) if binary else None)


def sign_flip_p(contributions: np.ndarray, *, samples: int = 10_000, seed: int = 0) -> np.ndarray:
    """float[M]: share of random signs that give a sum at least as far from 0 as the observed one.

    The observed signs count as one of the S + 1, so that no p-value is 0 and the test is exact.

    Args:
        contributions: float[I, M], what each image adds to each of M differences.
    """
    contributions = contributions[(contributions != 0).any(1)]  # 0 has no sign to flip
    # sums that are equal but for rounding are ties, and count
    least = np.abs(contributions.sum(0)) - 1e-9 * np.abs(contributions).sum(0)
    rng = np.random.default_rng(seed)
    extreme = np.zeros(contributions.shape[1])
    chunk = max(1, 4_000_000 // max(1, len(contributions)))
    for start in range(0, samples, chunk):
        shape = min(chunk, samples - start), len(contributions)
        signs = 2.0 * rng.integers(2, size=shape, dtype=np.int8) - 1
        extreme += (np.abs(signs @ contributions) >= least).sum(0)
    return (1 + extreme) / (1 + samples)


def _mcnemar(wins: int, losses: int) -> float:
    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
