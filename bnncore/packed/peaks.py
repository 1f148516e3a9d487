"""What each binary tile could do at best here: its innermost loop, on data in the first cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import numpy as np
from numba import njit

from bnncore.packed import layouts, matrices, slices, tiles
from bnncore.packed.compiled_kernels import TILES

Array = np.ndarray

_TRIES = 15
_REPEATS = 50


def products(tile: str, clock: Callable[[], float] = time.process_time) -> float:
    """Products of two signs a second, counted and added up.

    Args:
        tile: a key of `compiled_kernels.TILES`.
        clock: seconds.
    """
    dtype = TILES[tile]
    if dtype is not None:
        work, count = _counts(dtype)
    else:
        work, count = {"sliced": _slices, "matrix": _matrices}[tile]()
    work()
    best = float("inf")
    for _ in range(_TRIES):
        began = clock()
        work()
        best = min(best, clock() - began)
    return count / best


def _counts(dtype: np.dtype) -> tuple[Callable[[], None], int]:
    """Of `tiles`, whose weights are of this type: one tile of many steps, and its products."""
    steps, count = 60, 256 * tiles.tile_pixels(dtype)
    runs = np.array([[0, 0, steps, 1]] * _REPEATS, np.int64)
    x = np.random.default_rng(0).integers(0, 1 << 32, (1, 1, 1, 64), dtype=np.uint32)
    weights = layouts.aligned(np.zeros(steps * (64 if dtype == np.uint8 else 32), dtype))
    params, flips = np.zeros((1, tiles.ROWS, 32), np.float32), np.zeros(1, np.uint32)
    constants, none = np.zeros((1, 32), np.int32), np.zeros((0, 0, 0, 0), np.float32)
    limits = none.astype(np.uint16 if dtype == np.uint8 else np.uint32)
    starts, spans = np.zeros(count, np.int64), np.array([[0, _REPEATS]], np.int64)
    work = partial(
        tiles.convolve, x, 0, 1, weights, len(weights), layouts.nibble_table(), runs, spans,
        starts, starts, constants, limits, False, tiles.tile_pixels(dtype), 0, params, flips, none,
        none, none.astype(np.uint32),
    )  # fmt: skip
    return work, count * steps * _REPEATS * 32 * (8 if dtype == np.uint8 else 32)


def _slices() -> tuple[Callable[[], None], int]:
    """Of `slices`: triples of one table, added up for one filter."""
    units, repeats = 64, 20 * _REPEATS
    memory = layouts.aligned(np.zeros(32 * slices.VECTOR, np.uint8))
    picks = np.zeros(units * 2 * slices.HALF * 2, np.uint16)
    tables = np.full(2 * units, memory.ctypes.data)
    work = partial(_add_up, tables, picks, units, memory, repeats)
    triples = 2 * slices.HALF * units * repeats
    return work, triples * 3 * slices.PIXELS * slices.LANES


@njit(cache=True, nogil=True)
def _add_up(tables: Array, picks: Array, units: int, memory: Array, repeats: int) -> None:
    planes = memory.ctypes.data + slices.VECTOR * 16
    for _ in range(repeats):
        slices._count(  # type: ignore[call-arg]
            tables.ctypes.data, picks.ctypes.data, units, planes, 8, planes
        )


def _matrices() -> tuple[Callable[[], None], int]:
    """Of `matrices`: sums of as many products as a 3x3 window of 64 channels has."""
    rows, repeats = 9, 4 * _REPEATS
    matrices.here()
    memory = layouts.aligned(np.zeros(32 << 10, np.uint8))
    flips = np.zeros(1, np.uint32)
    work = partial(_multiply, memory, flips, matrices.config(matrices.SIDE), rows, repeats)
    return work, repeats * rows * matrices.HELD * matrices.SIDE**2 * matrices.STEP


@njit(cache=True, nogil=True)
def _multiply(memory: Array, flips: Array, config: Array, rows: int, repeats: int) -> None:
    before = np.zeros(64, np.uint8)
    starts = np.full(2, memory.ctypes.data)
    matrices._configure(before.ctypes.data, config.ctypes.data)  # type: ignore[call-arg]
    for _ in range(repeats):
        matrices._multiply(
            flips, starts.ctypes.data, 64, rows, 0, 1, memory.ctypes.data,
            memory.ctypes.data + (24 << 10),
        )  # fmt: skip
    matrices._restore(before.ctypes.data, np.int64(before[0]))
    starts[0] = before[0]
