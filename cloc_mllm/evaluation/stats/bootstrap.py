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
class Bootstrap:
    """The settings of intervals: the number of resamples, and the seed that draws them."""

    samples: int = 1000
    seed: int = 0


DEFAULT = Bootstrap()


@dataclass(frozen=True)
class QueryScores:
    """One metric before averaging.

    Args:
        values: float[Q], one score per query.
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
            raise ValueError(f"scores need one value, image and group per query, got {lengths}")

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


def bootstrap_interval(scores: QueryScores, bootstrap: Bootstrap = DEFAULT) -> Interval:
    """Percentile interval of the (macro) mean, images resampled with replacement.

    A group without a query in a resample is left out of that resample's macro average. The same
    seed draws the same images, so systems scored on the same queries see the same resamples.
    """
    sums, counts = sums_by_image(scores)
    resamples = _resamples(sums, counts, bootstrap)
    low, high = np.quantile(np.concatenate([_macro(*drawn) for drawn in resamples]), _TAILS)
    return Interval(scores.mean(), float(low), float(high), len(scores.values), len(sums))


def group_intervals(scores: QueryScores, bootstrap: Bootstrap = DEFAULT) -> dict[str, Interval]:
    """Computes the interval of the mean of each group, groups in alphabetical order.

    All images are resampled, whether they hold a query of the group or not; a resample without a
    query of the group does not count for it.
    """
    assert scores.groups is not None
    sums, counts = sums_by_image(scores)
    parts = [_ratio(*drawn) for drawn in _resamples(sums, counts, bootstrap)]
    low, high = np.nanquantile(np.concatenate(parts), _TAILS, axis=0)
    values, num_queries = _ratio(sums.sum(0), counts.sum(0)), counts.sum(0).astype(int)
    columns = (values, low, high, num_queries, (counts > 0).sum(0))
    names = np.unique(np.asarray(scores.groups)).tolist()
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return {name: Interval(*row) for name, row in zip(names, rows, strict=True)}


def difference_interval(a: QueryScores, b: QueryScores, bootstrap: Bootstrap = DEFAULT) -> Interval:
    """Computes the paired interval of mean(a) - mean(b), for answers to the same queries."""
    return bootstrap_interval(paired_scores(a, b), bootstrap)


def paired_scores(a: QueryScores, b: QueryScores) -> QueryScores:
    """Subtracts b from a, query by query.

    Raises:
        ValueError: the two are not about the same queries in the same order.
    """
    queries_a, queries_b = ([list(x.image_ids), x.groups and list(x.groups)] for x in (a, b))
    if queries_a != queries_b:
        raise ValueError("a paired difference needs the same queries in the same order")
    return QueryScores(a.values - b.values, a.image_ids, a.groups)


def sums_by_image(scores: QueryScores) -> tuple[np.ndarray, np.ndarray]:
    """Sum of values and number of queries by image and group: float[I, G] each."""
    names, image_index = np.unique(np.asarray(scores.image_ids), return_inverse=True)
    return _sums_by_group(scores, image_index, len(names))


def _resamples(
    sums: np.ndarray, counts: np.ndarray, bootstrap: Bootstrap
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields `sums` and `counts` of resampled images: float[s, G] each, S rows in all."""
    num_images = len(sums)
    rng = np.random.default_rng(bootstrap.seed)
    chunk = max(1, 4_000_000 // num_images)  # bounds the [chunk, I] draw to 32 MB
    for start in range(0, bootstrap.samples, chunk):
        size = min(chunk, bootstrap.samples - start)
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
