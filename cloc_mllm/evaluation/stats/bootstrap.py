"""Means with 95 % intervals by bootstrap over images.

Queries on one image are not independent, so whole images are drawn with replacement (a cluster
bootstrap). Letters: Q queries, I images, G groups (classes), S bootstrap samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
_TAILS = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)


@dataclass(frozen=True)
class QueryScores:
    """One metric before averaging.

    Args:
        values: float[Q], one score a query.
        image_ids: the image of each query.
        groups: if given, the metric is the mean over groups of the mean in each (macro average).
    """

    values: np.ndarray
    image_ids: Sequence[str]
    groups: Sequence[str] | None = None

    def __post_init__(self) -> None:
        lengths = {len(self.values), len(self.image_ids)}
        if self.groups is not None:
            lengths.add(len(self.groups))
        if len(lengths) > 1 or 0 in lengths:
            raise ValueError(f"scores need one value, image and group a query, got {lengths}")

    def mean(self) -> float:
        """The metric's value."""
        sums, counts = _sums_by_group(self, np.zeros(len(self.values), dtype=int), 1)
        return float(_macro(sums, counts)[0])


@dataclass(frozen=True)
class Interval:
    """A metric's value with its interval, from `n` queries on `n_images` images."""

    value: float
    ci_low: float
    ci_high: float
    n: int
    n_images: int


def bootstrap_interval(scores: QueryScores, *, samples: int = 1000, seed: int = 0) -> Interval:
    """Percentile interval of the (macro) mean, images resampled with replacement.

    A group without a query in a resample is left out of that resample's macro average. The same
    seed draws the same images, so systems scored on the same queries see the same resamples.
    """
    sums, counts = sums_by_image(scores)
    resamples = _resamples(sums, counts, samples, seed)
    means = np.concatenate([_macro(drawn, num) for drawn, num in resamples])
    low, high = np.quantile(means, _TAILS)
    return Interval(scores.mean(), float(low), float(high), len(scores.values), len(sums))


def group_intervals(
    scores: QueryScores, *, samples: int = 1000, seed: int = 0
) -> dict[str, Interval]:
    """Interval of the mean of each group, groups in alphabetical order.

    All images are resampled, whether they hold a query of the group or not; a resample without a
    query of the group says nothing of it.
    """
    assert scores.groups is not None
    sums, counts = sums_by_image(scores)
    parts = [_ratio(drawn, num) for drawn, num in _resamples(sums, counts, samples, seed)]
    low, high = np.nanquantile(np.concatenate(parts), _TAILS, axis=0)
    values = _ratio(sums.sum(0), counts.sum(0))
    num_queries, num_images = counts.sum(0).astype(int), (counts > 0).sum(0)
    columns = zip(
        np.unique(np.asarray(scores.groups)).tolist(),
        values.tolist(),
        low.tolist(),
        high.tolist(),
        num_queries.tolist(),
        num_images.tolist(),
        strict=True,
    )
    return {name: Interval(*numbers) for name, *numbers in columns}


def difference_interval(
    a: QueryScores, b: QueryScores, *, samples: int = 1000, seed: int = 0
) -> Interval:
    """Interval of mean(a) - mean(b) for two systems that answered the same queries (paired)."""
    return bootstrap_interval(paired_scores(a, b), samples=samples, seed=seed)


def paired_scores(a: QueryScores, b: QueryScores) -> QueryScores:
    """a - b, query by query.

    Raises:
        ValueError: the two are not about the same queries in the same order.
    """
    same_groups = (a.groups is None) == (b.groups is None) and (
        a.groups is None or b.groups is None or list(a.groups) == list(b.groups)
    )
    if list(a.image_ids) != list(b.image_ids) or not same_groups:
        raise ValueError("a paired difference needs the same queries in the same order")
    return QueryScores(a.values - b.values, a.image_ids, a.groups)


def sums_by_image(scores: QueryScores) -> tuple[np.ndarray, np.ndarray]:
    """Sum of values and number of queries by image and group: float[I, G] each."""
    names, image_index = np.unique(np.asarray(scores.image_ids), return_inverse=True)
    return _sums_by_group(scores, image_index, len(names))


def _resamples(
    sums: np.ndarray, counts: np.ndarray, samples: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`sums` and `counts` of resampled images: float[s, G] each, S rows in all."""
    num_images = len(sums)
    rng = np.random.default_rng(seed)
    chunk = max(1, 4_000_000 // num_images)  # bounds the [chunk, I] draw to 32 MB
    for start in range(0, samples, chunk):
        size = min(chunk, samples - start)
        draws = rng.multinomial(num_images, np.full(num_images, 1 / num_images), size)
        yield draws @ sums, draws @ counts


def _sums_by_group(
    scores: QueryScores, image_index: np.ndarray, num_images: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sum of values and number of queries by image and group: float[I, G] each."""
    if scores.groups is None:
        group_index, num_groups = np.zeros(len(scores.values), dtype=int), 1
    else:
        names, group_index = np.unique(np.asarray(scores.groups), return_inverse=True)
        num_groups = len(names)
    cell = image_index * num_groups + group_index
    cells = num_images * num_groups
    sums = np.bincount(cell, weights=scores.values, minlength=cells)
    counts = np.bincount(cell, minlength=cells).astype(float)
    return sums.reshape(num_images, num_groups), counts.reshape(num_images, num_groups)


def _macro(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """float[S, G] sums and counts -> float[S] mean over the groups that have a query."""
    return np.nansum(_ratio(sums, counts), 1) / (counts > 0).sum(1)


def _ratio(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean of each group, NaN where it has no query."""
    return np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
