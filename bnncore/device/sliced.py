"""The bit-sliced binary convolution: a word holds one input of 32 pixels.

Three inputs and three weights give a sum and a carry of 32 pixels at once, of which there are eight
pairs: they are put into a table once for all filters, and a filter's weights pick from it
(`kernels/triples.c`, `count.c`). So the work of a filter is a few instructions for 96 products.
Counts of differing inputs stay bit planes, which thresholds compare as they are.

Legend: `O` filters, `N` products a pixel, taps times channels.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

UNIT = 48  # inputs that the kernel counts at a time


def padded(products: int) -> int:
    """`products` up to whole units; what is added counts nothing."""
    return -(-products // UNIT) * UNIT


def planes(products: int) -> int:
    """Bits of a count."""
    return max(6, products.bit_length())


def wins(weight: tuple[int, int, int, int], pad: int, out: tuple[int, int, int]) -> bool:
    """Whether it takes fewer instructions than words of channels, by rough counts on Cortex-M4.

    Args:
        weight: (O, kh, kw, C).
        pad: where it is not 0, C has to be even (`kernels/planes.c` says why).
        out: (H, W, O) of the result.
    """
    filters, height, width, channels = weight
    taps, products = height * width, height * width * channels
    if (pad and channels % 2) or products > 1 << 14:
        return False
    pixels = out[0] * out[1]
    n = padded(products)
    group = taps * -(-channels // 32) * 1500 + 17 * n + filters * (5 * n + 250)
    words = -(-products // 32)
    pixel = 20 * taps + filters * (9 * words + 60)
    return -(-pixels // 32) * group < pixels * pixel


def triples(bits: np.ndarray) -> np.ndarray:
    """Weights (O, N), 1 for +1, as uint32 (O, padded(N) / 24): eight triples a word."""
    filters, products = bits.shape
    room = np.zeros((filters, padded(products)), np.uint32)
    # A count is of inputs that differ: an input as it is differs from -1 where it is 1.
    room[:, :products] = bits
    three = room.reshape(filters, -1, 8, 3)
    values = 1 << (4 * np.arange(8)[:, None] + np.arange(3))
    return (three * values.astype(np.uint32)).sum((2, 3), dtype=np.uint32)


def picks(bits: np.ndarray) -> np.ndarray:
    """Weights (O, N) as uint8 (O, ceil(N / 3)): where each triple's sum lies in a table of eight."""
    filters, products = bits.shape
    room = np.zeros((filters, -(-products // 3) * 3), np.int64)
    room[:, :products] = bits
    index = (room.reshape(filters, -1, 3) << np.arange(3)).sum(2)
    return (index + 8 * (np.arange(index.shape[1]) % 8)).astype(np.uint8)


def limits(tensors: Mapping[str, np.ndarray], products: int, filters: int) -> np.ndarray:
    """A threshold, an interval or (without tensors) a sign on sums, as limits on counts.

    A sum is ``products - 2 * count``.

    Returns:
        int16 (O, 3): below, most, negated; the bit is ``below < count <= most``, negated.
    """
    found = np.zeros((filters, 3), np.int64)
    if "low" in tensors:
        low, high = tensors["low"].astype(np.int64), tensors["high"].astype(np.int64)
        found[:, 0] = -((high - products) // 2) - 1
        found[:, 1] = (products - low) // 2
        found[:, 2] = tensors["inside"] == 0 if "inside" in tensors else 0
    else:
        level = tensors["threshold"].astype(np.int64) if "threshold" in tensors else 0
        up = tensors["direction"].astype(bool) if "direction" in tensors else True
        # x <= level is not x >= level + 1, and sums have the parity of `products`.
        found[:, 0] = -1
        found[:, 1] = (products - (level + np.where(up, 0, 1))) // 2
        found[:, 2] = np.logical_not(up)
    top = (1 << planes(products)) - 1
    found[:, :2] = np.clip(found[:, :2], -1, top)
    return found.astype(np.int16)
