"""How compiled kernels hold values and weights, and the addresses by which their tiles walk.

Values (all have the image as their first axis):

- numbers: float32 (B,H,W,S), S >= C channels of which those from C on are 0; ``(B,F)`` is held as
  (B,1,1,S). Integers are held as floats too, exactly: no sum is above 2**24. S is a multiple of 32,
  or 16 where that is enough; but for the input of the first convolution, where S = C.
- bits: uint32 (B,H,W,words), channel ``c`` in bit ``c % 32`` of word ``c // 32``, spare bits 0; or
  one uint16 where that is enough.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from bnncore.packed.arena import empty
from bnncore.packed.borders import Window
from bnncore.packed.program import Shape
from bnncore.packed.tiles import LANES

Array = np.ndarray


class Room(NamedTuple):
    """What an array of one image needs of memory."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def array(self, memory: Array, images: int) -> Array:
        """The array of so many images in memory of theirs."""
        return memory.view(self.dtype).reshape(images, *self.shape)


def aligned(array: Array) -> Array:
    """A C-ordered copy that starts at a cache line."""
    copy = empty(array.nbytes).view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def lanes_of(channels: int) -> int:
    """Channels of a word, and filters of a tile, for a value of so many channels."""
    return 16 if channels <= 16 else LANES


def rounded(channels: int) -> int:
    """Channels rounded up to whole words, or filters to whole tiles."""
    return -(-channels // lanes_of(channels)) * lanes_of(channels)


def word_of(channels: int) -> np.dtype:
    return np.dtype("<u4" if lanes_of(channels) == 32 else "<u2")


def to_words(bits: Array) -> Array:
    """Booleans (..., C) -> unsigned (..., words)."""
    packed = np.packbits(bits, axis=-1, bitorder="little")
    room = np.zeros((*bits.shape[:-1], rounded(bits.shape[-1]) // 8), np.uint8)
    room[..., : packed.shape[-1]] = packed
    return room.view(word_of(bits.shape[-1]))


def room_of(shape: Shape, stride: int) -> Room:
    """Of a value, stored with so many channels."""
    place = shape.dims[:-1] or (1, 1)
    if shape.kind == "bits":
        return Room((*place, stride // lanes_of(shape.dims[-1])), word_of(shape.dims[-1]))
    return Room((*place, stride), np.dtype("f4"))


def to_plain(value: Array, shape: Shape) -> Array:
    """A value as `numpy_kernels` holds it."""
    if shape.kind == "u8":
        return value
    channels = shape.dims[-1]
    if shape.kind == "bits":
        value = value.view(np.uint8)[..., : -(-channels // 8)]
    else:
        value = value[..., :channels]
    return value if len(shape.dims) == 3 else value[:, 0, 0]


def from_plain(value: Array, room: Array) -> None:
    """Store a value of `numpy_kernels` in its room."""
    if value.ndim == 2:
        value = value[:, None, None]
    whole = room.view(np.uint8) if value.dtype == np.uint8 else room
    whole[...] = 0
    whole[..., : value.shape[3]] = value


def pad(x: Array, width: int, room: Array, fill: Array | int = 0) -> Array:
    """Copy maps into the middle of larger ones of 0, or of a number a channel."""
    room[...] = fill
    room[:, width : room.shape[1] - width, width : room.shape[2] - width] = x
    return room


def nibble_table() -> Array:
    """(256,32): popcount(a ^ w) for nibbles w; of the low nibble of byte a, then of the high."""
    byte, nibble = np.arange(256)[:, None], np.arange(16)[None, :]
    counts = [np.bitwise_count((byte & 15) ^ nibble), np.bitwise_count((byte >> 4) ^ nibble)]
    return aligned(np.concatenate(counts, axis=1).astype(np.uint8))


def lay_out(rows: Array, dtype: np.dtype) -> Array:
    """Weights for the tiles: words of bits, or floats, (O, n) -> (blocks, numbers of a block)."""
    filters = len(rows)
    whole = np.zeros((rounded(filters), rows.shape[1]), rows.dtype)
    whole[:filters] = rows
    lanes = lanes_of(filters)
    blocks = len(whole) // lanes
    if dtype != np.uint8:
        steps = whole.reshape(blocks, lanes, -1).transpose(0, 2, 1)
        return aligned(steps.astype(dtype)).reshape(blocks, -1)
    # Per block and step: vectors of 16 low nibbles and 16 high ones of 16 filters.
    bytes_ = whole.view(np.uint8).reshape(blocks, lanes // 16, 16, -1)
    nibbles = np.stack([bytes_ & 15, bytes_ >> 4], axis=2)
    return aligned(nibbles.transpose(0, 4, 1, 2, 3)).reshape(blocks, -1)


class Geometry(NamedTuple):
    """Where the windows of a convolution lie; see `tiles.convolve`."""

    runs: Array
    spans: Array
    starts: Array
    classes: Array


def geometry(
    window: Window, steps: int, unit: int, step: int, longest: int, skip: bool
) -> Geometry:
    """Plan the runs of a convolution.

    Args:
        steps: steps of a tile for one input pixel.
        unit: bytes of the input a step.
        step: bytes of weights a step.
        longest: steps until the sums have to be widened (0: never).
        skip: leave out taps in the padding; else the input comes with its padding around it.
    """
    kh, kw = window.kernel
    wide = window.inputs[1] + (0 if skip else 2 * window.pad)
    runs: list[tuple[int, int, int, int]] = []
    spans = []
    every = [(r, c) for r in window.rows for c in window.columns]
    for r, c in every if skip else [(np.ones(kh, bool), np.ones(kw, bool))]:
        begin, since = len(runs), 0
        taps = np.flatnonzero(c)
        for i in np.flatnonzero(r):
            done, count = 0, len(taps) * steps
            while done < count:
                more = min(count - done, longest or count)
                if longest and since + more > longest:
                    runs[-1] = (*runs[-1][:3], 1)
                    since = 0
                here = ((i * wide + taps[0]) * steps + done) * unit
                runs.append((here, ((i * kw + taps[0]) * steps + done) * step, more, 0))
                done, since = done + more, since + more
        runs[-1] = (*runs[-1][:3], 1)
        spans.append((begin, len(runs) - begin))
    edge = window.pad if skip else 0
    down, right = (
        np.arange(len(axis)) * window.stride - edge for axis in (window.row_of, window.column_of)
    )
    starts = (down[:, None] * wide + right[None, :]) * steps * unit
    return Geometry(
        np.array(runs, np.int64),
        np.array(spans if skip else spans * window.classes, np.int64),
        starts.astype(np.int64).reshape(-1),
        window.class_of.astype(np.int64).reshape(-1),
    )
