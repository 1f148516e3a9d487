"""Where the pixels of a convolution lie in the lanes of `bnncore.packed.slices`, and its weights.

Legend: `O` filters, `P` planes of a count, `N` products of a sum.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from bnncore.packed import slices
from bnncore.packed.borders import Window, between
from bnncore.packed.layouts import aligned, rounded
from bnncore.packed.tiles import features, processor

Array = np.ndarray


def wins(weight: tuple[int, ...], stride: int, out: tuple[int, ...], as_bits: bool) -> bool:
    """Whether bit slices are faster here than `tiles`, as `benchmarks/packed.py` found.

    Args:
        weight: (O,kh,kw,C).
        out: (Ho,Wo).
        as_bits: whether sums become bits at once.
    """
    have, (filters, kh, kw, channels), pixels = features(), weight, out[0] * out[1]
    if stride > 1 or "avx2" not in have:
        return False
    taps = kh * kw
    # The others compute for whole words of channels and whole tiles of filters.
    ragged = 4 * filters * channels < 3 * rounded(filters) * rounded(channels)
    if {"avx512f", "avx512vpopcntdq"} <= have and not processor().startswith("znver"):
        # Intel's: counts the bits of a vector a cycle, where it adds those of two. Wide windows of
        # many channels would win too, by a quarter at most: not worth what the kernel takes to
        # compile, three seconds, for networks that have nothing else for it.
        if as_bits:
            least = 256 if 16 < channels <= 32 else 64
            return pixels >= least and (channels <= 32 or ragged or taps < 9)
        if channels <= 16:
            return pixels >= (64 if taps >= 9 else 256)
        return ragged and taps >= 9 and pixels >= 256
    # channels up to so many, on maps of at least so many pixels
    found: tuple[tuple[int, int], ...]
    if "avx512f" in have:
        found = ((32, 1024), (16, 64)) if as_bits else ((16, 64),)
    elif ragged:
        found = ((64, 64),) if as_bits else ((32, 256),)
    else:
        # 64 channels would win on maps of 1024 pixels, by a fifth, but ask wide networks for a
        # kernel that they need for nothing else, and that takes three seconds to compile.
        found = ((32, 256),) if as_bits else ((16, 1024),)
        if as_bits and taps < 9 and pixels >= 1024:
            return channels <= 32
    return taps == 9 and any(channels <= most and pixels >= least for most, least in found)


def columns(window: Window, out: tuple[int, ...]) -> int | None:
    """Into how many parts the columns of a map are cut, that lanes have room for those and for what
    their windows see beside them; None where it cannot be."""
    shift = _shifts(window)
    if max(out[1], -(-window.inputs[1] // window.stride)) <= slices.PIXELS:
        return 1 if np.abs(shift).max() < slices.PIXELS else None
    room = slices.PIXELS - int(shift.max() - shift.min())
    parts = 1
    while room > 0 and -(-out[1] // parts) > room:
        parts *= 2
    return parts if room > 0 and parts <= slices.LANES else None


def _shifts(window: Window) -> Array:
    """From a column of the result to those of its window, in strides."""
    return (np.arange(window.kernel[1]) - window.pad) // window.stride


def worth(out: tuple[int, ...], images: int) -> bool:
    """Whether so many images fill at least half of the lanes with strips of two rows and more."""
    side = max(1, slices.PIXELS // out[1])
    return -(-images // side) * (out[0] // 2) * 2 >= slices.LANES


# Triples that are added up for all filters before the next ones: their tables fit a first cache of
# 32 KiB where vectors have 32 bytes.
CHUNK = 96
# What a table can have, as picks are two bytes.
MOST_TRIPLES = ((1 << 16) - 1) * slices.STEP // (slices.KINDS * slices.VECTOR)


class Taps(NamedTuple):
    """The taps of a row of the window: channels times columns, by threes.

    Attributes:
        channel, column: int64 (triples, 3); channel is the number of channels for none.
    """

    channel: Array
    column: Array

    @classmethod
    def of(cls, channels: int, columns: int) -> Taps:
        count = -(-channels * columns // 3) * 3
        tap = np.arange(count)
        channel = np.minimum(tap // columns, channels)
        return cls(channel.reshape(-1, 3), (tap % columns).reshape(-1, 3))


class Lay(NamedTuple):
    """See `slices.convolve`."""

    lay: Array
    lanes: Array
    taps: Array

    @property
    def key(self) -> int:
        """Tells apart those of one convolution."""
        return int(self.lay[2])

    @classmethod
    def of(cls, window: Window, out: tuple[int, ...], channels: int, images: int) -> Lay:
        """For so many images at a time; `columns` has said that it can be."""
        stride, pad = window.stride, window.pad
        words = rounded(channels)
        high, wide = out
        shift = _shifts(window)
        parity = (np.arange(window.kernel[1]) - pad) - shift * stride
        apart = max(wide, -(-window.inputs[1] // stride))
        tiles = columns(window, out)
        assert tiles
        if apart <= slices.PIXELS:
            side, left = slices.PIXELS // apart, 0
        else:
            side, left = 1, int(shift.min())
            wide, apart = -(-wide // tiles), slices.PIXELS
        groups = -(-images // side)
        strips = 1
        while (
            strips * 2 * tiles <= slices.LANES
            and groups * strips * tiles < slices.LANES
            and strips * 2 <= high
        ):
            strips *= 2
        high = -(-high // strips)
        pieces = strips * tiles
        lane = np.arange(slices.LANES)
        piece = lane % pieces
        first = piece % tiles * wide + left
        lasts = -(-(window.inputs[1] - np.arange(stride)) // stride)
        lanes = [
            lane // pieces * side, piece // tiles * high, piece % tiles * wide, first,
            np.maximum(0, -first), *np.minimum(apart, lasts[:, None] - first),
        ]  # fmt: skip
        found = Taps.of(channels, window.kernel[1])
        taps = np.zeros((*found.channel.shape, 4), np.int64)
        real = found.channel < channels
        by = shift[found.column]
        taps[..., 0] = (
            parity[found.column] * (words + 1) + np.where(real, found.channel, words)
        ) * slices.VECTOR
        taps[..., 1] = np.maximum(by - left, 0)
        taps[..., 2] = np.maximum(left - by, 0)
        keep = np.full(len(shift), (1 << slices.PIXELS) - 1, np.int64)
        if tiles == 1 and left == 0:
            at = np.arange(wide)
            for j, (t, b) in enumerate(zip(shift, parity, strict=True)):
                column = (at + t) * stride + b
                inside = at[(column >= 0) & (column < window.inputs[1])]
                keep[j] = sum(1 << int(s * apart + k) for s in range(side) for k in inside)
        taps[..., 3] = keep[found.column]
        lay = np.array([side, apart, pieces, wide, high], np.int64)
        return cls(lay, np.array(lanes, np.int64), taps)


class Weights(NamedTuple):
    """What is prepared of a member's weights; see `slices.convolve`.

    Attributes:
        first: with which counts to begin, (classes,O).
        starts: the same as they lie in lanes (`start`), by `Lay.key`.
    """

    picks: Array
    planes: int
    as_bits: bool
    first: Array
    constants: Array
    negated: Array
    starts: dict[int, tuple[Array, Array]]


class Order(NamedTuple):
    """In which order triples are added up; see `slices.convolve`.

    Attributes:
        place: where a triple of a row of the window comes, int64 (kh, triples).
        rows, spans: as there.
    """

    place: Array
    rows: Array
    spans: Array

    @classmethod
    def of(cls, kernel: tuple[int, ...], channels: int) -> Order:
        """Triples of the same channels together, in halves of one row each."""
        count = len(Taps.of(channels, kernel[1]).channel)
        place = np.zeros((kernel[0], count), np.int64)
        rows: list[int] = []
        spans: list[int] = []
        chunk = max(1, CHUNK // kernel[0] // slices.HALF) * slices.HALF
        for first in range(0, count, chunk):
            many = min(chunk, count - first)
            halves = -(-many // slices.HALF)
            for i in range(kernel[0]):
                place[i, first : first + many] = slices.HALF * len(rows) + np.arange(many)
                rows += [i] * halves
            rows += [0] * (len(rows) % 2)
            spans.append(len(rows) // 2 - sum(spans))
        return cls(place, np.array(rows, np.int64), np.array(spans, np.int64))


def picks(weights: Array, order: Order) -> Array:
    """Weights (O,kh,kw,C), 1 for +1, as `slices.convolve` wants them: uint16."""
    filters, kh, kw, channels = weights.shape
    taps = Taps.of(channels, kw)
    triples = len(taps.channel)
    room = np.zeros((filters, kh, kw, channels + 1), np.uint8)
    room[..., :channels] = weights
    three = room[:, :, taps.column, taps.channel]  # (O,kh,triples,3)
    pattern = three[..., 0] | three[..., 1] << 1 | three[..., 2] << 2
    parity = three[..., 0] ^ three[..., 1] ^ three[..., 2]
    step = slices.VECTOR // slices.STEP
    none = triples * slices.KINDS * step
    found = np.full((filters, len(order.rows) * slices.HALF, 2), none, np.uint16)
    first = (np.arange(triples) * slices.KINDS * step).astype(np.uint16)
    for k, kind in enumerate((8 + parity, pattern)):
        found[:, order.place, k] = first + kind.astype(np.uint16) * np.uint16(step)
    return found


def start(
    window: Window, lay: Lay, out: tuple[int, ...], first: Array, planes: int
) -> tuple[Array, Array]:
    """Where counting starts.

    Args:
        first: counts, (classes,O).

    Returns:
        uint32 (kinds, O, planes, L), and the kind of each row of a part, int64.
    """
    side, apart, pieces, wide, high = (int(n) for n in lay.lay)
    value = first[window.class_of]  # (Ho,Wo,O)
    filters = first.shape[1]
    tiles = -(-out[1] // wide)
    rows = np.zeros((high, filters, planes, slices.LANES), np.uint32)
    for lane in range(slices.LANES):
        piece = lane % pieces
        y0, x0 = piece // tiles * high, piece % tiles * wide
        part = value[y0 : y0 + high, x0 : x0 + wide]  # (h,w,O)
        bits = ((part[..., None] >> np.arange(planes)) & 1).astype(np.uint64)  # (h,w,O,planes)
        places = np.arange(part.shape[1])[:, None] + apart * np.arange(side)
        words = (1 << places).sum(1).astype(np.uint64)
        rows[: len(part), ..., lane] = np.einsum("hwop,w->hop", bits, words)
    first_of: dict[bytes, int] = {}  # np.unique of whole rows takes 100 times as long
    equal = [first_of.setdefault(row.tobytes(), y) for y, row in enumerate(rows)]
    kinds, of = np.unique(equal, return_inverse=True)
    return aligned(rows[kinds]), of


def limits(constants: Array, low: Array, high: Array, planes: int) -> tuple[Array, Array] | None:
    """Bits ``low <= sum <= high`` as counts to begin with: what is above a limit carries into the
    topmost plane.

    Args:
        constants: (classes,O): a sum is its class's less twice the count.

    Returns:
        counts (classes,O), and where the bit is 1 up to the limit instead of above it, (O,); None
        where both ends matter.
    """
    up = np.isposinf(high)
    if not (up | np.isneginf(low)).all():
        return None
    least, most = between(constants, low, high)
    top = 1 << (planes - 1)
    return np.clip(top - 1 - np.where(up, most, least - 1), 0, top), up


def sums(constants: Array) -> tuple[Array, Array]:
    """Counts to begin with, (classes,O), after which a sum is its filter's constant, (O,), less
    twice the count, whatever the class. Channels are even, or there is one class."""
    most = constants.max(0)
    return (most - constants).astype(np.int64) >> 1, most
