"""Zero padding: which taps of a window lie in the map, and what bits cannot say about the others.

Which taps lie outside depends on the position alone, and few such *border classes* exist: a pattern
of rows with a pattern of columns, near the start of an axis, in its middle, near its end.

A padded tap contributes 0 to a sum of +-1 products, but a bit is +1 or -1. So it enters as a bit of
0, and the constant of its class takes it out again:
``sum of products = constant[class, filter] - 2 * differing bits``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

Array = np.ndarray


def ends(out: int, kernel: int) -> Array:
    """Of so many windows along an axis those near its ends: all others hold all their taps, as the
    last of the first ones does."""
    return np.unique(np.r_[: min(kernel, out), max(0, out - kernel) : out])


def inside(windows: Array, size: int, kernel: int, stride: int, pad: int) -> Array:
    """Booleans (windows, kernel): whether a tap lies in the map, along one axis."""
    where = windows[:, None] * stride - pad + np.arange(kernel)[None, :]
    return (where >= 0) & (where < size)


def taps(windows: Array, size: int, kernel: int, stride: int, pad: int) -> Array:
    """How many taps of these windows lie in the map, along one axis."""
    start = windows * stride - pad
    return np.maximum(np.minimum(start + kernel, size) - np.maximum(start, 0), 0)


def divisors(
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: int,
    pad: int,
    reach: int,
) -> Array:
    """What an average divides by, float32 (Ho,Wo): the taps in the map with `reach` around it."""
    high, wide = (
        taps(np.arange(out), size + 2 * reach, k, stride, pad - reach)
        for size, out, k in zip(inputs, outputs, kernel, strict=True)
    )
    return (high[:, None] * wide[None, :]).astype(np.float32)


def multiple(
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: int,
    pad: int,
    reach: int,
) -> int:
    """The least common multiple of `divisors`, in little memory for maps of any size."""
    found = 1
    for size, out, k in zip(inputs, outputs, kernel, strict=True):
        counts = taps(ends(out, k), size + 2 * reach, k, stride, pad - reach)
        found *= math.lcm(*map(int, np.unique(counts)))
    return found


def factors(divisor: Array) -> Array:
    """By what to multiply sums instead of dividing them, float32 of the same shape.

    The averages times the least common multiple of the divisors.
    """
    multiple = math.lcm(*map(int, np.unique(divisor)))
    return (multiple // divisor.astype(np.int64)).astype(np.float32)


FAR = float(1 << 30)  # beyond all sums


def whole(low: Array, high: Array) -> tuple[Array, Array]:
    """The least and the most of the whole numbers from `low` to `high`, none of them beyond `FAR`;
    float64.

    Args:
        low, high: float32, infinite where there is no such end; NaN for none at all.
    """
    least = np.ceil(np.nan_to_num(low.astype(np.float64), nan=FAR))
    most = np.floor(np.nan_to_num(high.astype(np.float64), nan=-FAR))
    return np.clip(least, -FAR, FAR), np.clip(most, -FAR, FAR)


def between(constants: Array, low: Array, high: Array) -> tuple[Array, Array]:
    """Which counts c have ``low <= constant - 2 * c <= high``: the least and the most of them,
    int64 (classes,O); none where the least is more.

    Args:
        constants: int32 (classes,O), see above.
        low, high: (O,), as for `whole`.
    """
    low, high = whole(low, high)
    least, most = np.ceil((constants - high) / 2), np.floor((constants - low) / 2)
    return least.astype(np.int64), most.astype(np.int64)


class Window(NamedTuple):
    """Size, stride and padding of a convolution, and its border classes."""

    kernel: tuple[int, ...]
    stride: int
    pad: int
    inputs: tuple[int, ...]
    rows: Array  # booleans (patterns, kh)
    row_of: Array  # (Ho,)
    columns: Array  # booleans (patterns, kw)
    column_of: Array  # (Wo,)

    @classmethod
    def of(
        cls,
        kernel: tuple[int, ...],
        stride: int,
        pad: int,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
    ) -> Window:
        found = []
        for size, k, out in zip(inputs, kernel, outputs, strict=True):
            near = ends(out, k)
            patterns, which = np.unique(
                inside(near, size, k, stride, pad), axis=0, return_inverse=True
            )
            which = which.reshape(-1)
            every = np.full(out, which[min(k, out) - 1])
            every[near] = which
            found += [patterns, every]
        return cls(kernel, stride, pad, inputs, *found)

    @property
    def classes(self) -> int:
        return len(self.rows) * len(self.columns)

    @property
    def class_of(self) -> Array:
        """The class of each position, (Ho,Wo)."""
        return self.row_of[:, None] * len(self.columns) + self.column_of[None, :]

    def share(self) -> float:
        """Of all products, those with a tap in the map."""
        return float(self.rows[self.row_of].mean() * self.columns[self.column_of].mean())

    def products(self, channels: int) -> Array:
        """Products with a tap in the map, int32 (classes, 1)."""
        return self._per_class(np.full((1, *self.kernel), channels, np.int32))

    def constants(self, ones: Array, channels: int) -> Array:
        """The constants of the classes, int32 (classes,O), where padded taps are bits of 0.

        A tap in the map contributes C, less 2 for each bit that differs. A padded one differs from
        each weight bit of 1 and has to contribute 0, so twice those is given back.

        Args:
            ones: weight bits of 1 at each tap, int32 (O,kh,kw).
        """
        padded = ones.sum((1, 2), dtype=np.int32) - self._per_class(ones)
        return self.products(channels) + 2 * padded

    def _per_class(self, taps: Array) -> Array:
        """Sums over the taps in the map: (...,kh,kw) -> (classes,...)."""
        rows, columns = self.rows.astype(np.int32), self.columns.astype(np.int32)
        sums = np.moveaxis(rows @ taps @ columns.T, (-2, -1), (0, 1))
        return sums.reshape(self.classes, *taps.shape[:-2])
