"""Decides the order in which the parts of a mixture take turns, evenly and by their weights.

Random draws would miss the shares by the square root of the number of samples, and a batch might
lack a part. This is Tijdeman's solution of the chairman assignment problem (Discrete Mathematics
32, 1980): after any n turns, each of m parts had its share of them up to 1 - 1/(2m - 2). With
rational shares the order repeats, so one cycle, computed once, gives every turn.
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np

_LONGEST_CYCLE = 100_000


class Cycle(NamedTuple):
    """One cycle of L turns of m parts.

    Attributes:
        part: int[L], the part whose turn it is.
        before: int[L], the number of turns that part had earlier in the cycle.
        counts: int[m], the turns of each part in the whole cycle: its weight in lowest terms.
    """

    part: np.ndarray
    before: np.ndarray
    counts: np.ndarray


@lru_cache(maxsize=16)
def cycle_of(weights: tuple[float, ...]) -> Cycle:
    """Computes the cycle of some weights.

    Args:
        weights: positive; exactly the decimal numbers that they are written as.

    Raises:
        ValueError: they have so many digits that the cycle would be too long.
    """
    counts = _lowest_terms(weights)
    if (length := sum(counts)) > _LONGEST_CYCLE:
        raise ValueError(
            f"the weights {list(weights)} are in the ratio {counts}, whose order repeats after "
            f"{length:,} samples, more than {_LONGEST_CYCLE:,}; write them with fewer digits"
        )
    part, before = [], []
    had = [0] * len(counts)
    for turn in range(1, length + 1):
        chosen = _next(counts, had, turn, length)
        part.append(chosen)
        before.append(had[chosen])
        had[chosen] += 1
    assert had == counts
    return Cycle(np.array(part), np.array(before), np.array(counts))


def _lowest_terms(weights: tuple[float, ...]) -> list[int]:
    exact = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    return [count // math.gcd(*whole) for count in whole]


def _next(counts: list[int], had: list[int], turn: int, length: int) -> int:
    """Chooses the part that gets this turn: the most urgent of those that may have one."""
    if len(counts) == 1:
        return 0
    unit = 2 * len(counts) - 2  # shares are multiples of 1 / (unit * length), kept as integers
    lag = [unit * (count * turn - h * length) for count, h in zip(counts, had, strict=True)]
    may = [number for number, behind in enumerate(lag) if behind >= length]
    return min(
        may, key=lambda number: Fraction(unit * length - length - lag[number], counts[number])
    )
