"""A measured mean with its standard error."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Measure:
    """A value, its standard error (nan where there is none) and the number of things that it is a mean of."""

    value: float
    error: float
    count: int


def ratio(total: np.ndarray, size: np.ndarray) -> Measure:
    """Return sum(total) / sum(size) over independent units, such as documents, of unequal sizes.

    The standard error is that of a ratio estimate, so units of any size may be correlated within, as the tokens of a
    document are; it needs two units. Its count is sum(size).

    Source: Cochran, Sampling Techniques (1977), section 6.3, without the correction for finite populations.

    Args:
        total: float [n], such as the nats of each document.
        size: float or int [n], such as its tokens.
    """
    used = size > 0
    total, size = np.asarray(total, dtype=float)[used], np.asarray(size, dtype=float)[used]
    units, all_of_it = len(size), float(size.sum())
    if not units:
        return Measure(math.nan, math.nan, 0)
    value = float(total.sum()) / all_of_it
    if units < 2:
        return Measure(value, math.nan, int(all_of_it))
    spread = float(((total - value * size) ** 2).sum()) * units / (units - 1)
    return Measure(value, math.sqrt(spread) / all_of_it, int(all_of_it))
