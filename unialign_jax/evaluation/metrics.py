"""Estimates from samples, with their uncertainty."""

import dataclasses
import math
from collections.abc import Sequence

from scipy import stats

_Z = 1.959964  # two-sided 95 % of a normal distribution


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over samples and its 95 % confidence interval.

    Attributes:
      value, low, high: the mean and the interval's ends.
      samples: how many it is of.
    """

    value: float
    low: float
    high: float
    samples: int


def share(right: Sequence[bool]) -> Estimate:
    """The share that is right, with Wilson's score interval (JASA 22, 1927), which holds near 0 and 1 too.

    Raises:
      ValueError: no samples.
    """
    count = _count(right)
    return _wilson(sum(map(bool, right)) / count, count)


def _wilson(value: float, count: int) -> Estimate:
    spread = _Z**2 / count
    centre = (value + spread / 2) / (1 + spread)
    half = math.sqrt(value * (1 - value) * spread + spread**2 / 4) / (1 + spread)
    return Estimate(value, max(centre - half, 0.0), min(centre + half, 1.0), count)


def mean(values: Sequence[float]) -> Estimate:
    """The mean of scores in [0, 1], with the interval from their own spread (Student's t).

    Of one sample it is [0, 1]. Equal scores have no spread to tell of: as if they were shares, Wilson's interval.

    Raises:
      ValueError: no samples.
    """
    count = _count(values)
    if count == 1:
        return Estimate(values[0], 0.0, 1.0, count)
    if min(values) == max(values):
        return _wilson(values[0], count)
    value = math.fsum(values) / count
    variance = math.fsum((x - value) ** 2 for x in values) / (count - 1)
    half = float(stats.t.ppf(0.975, count - 1)) * math.sqrt(variance / count)
    return Estimate(value, max(value - half, 0.0), min(value + half, 1.0), count)


def _count(values: Sequence) -> int:
    if not len(values):
        raise ValueError("there are no samples to estimate from")
    return len(values)
