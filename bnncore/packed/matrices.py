"""Binary convolutions by a processor's matrix unit (Intel's AMX): a third kind of tile, of bytes.

Maps stay bits where they are stored. A convolution spreads the bits of a few rows to bytes of +1
and -1, in a copy with bytes of 0 around it that a cache holds, and multiplies them by the weights,
which are prepared as bytes: of 16 pixels, 64 products each, with 16 filters in 16 cycles. Sums come
out as they are: **padding is 0**, so that there are neither border classes nor constants, and a
word's spare channels have weights of 0.

*Rows* of a multiplication are up to 16 pixels of a row of the result. (The same pixel of as many
images instead, where rows are short, was no faster than other tiles: weights and maps of that many
images are read from the second cache.) Its *columns* are what lies one after another in a row of
the window, channels by taps, 64 at a time; the last ones may reach over its end, where weights are
0.

Legend: as in `bnncore.packed.program`.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from bnncore.packed import tiles
from bnncore.packed.borders import FAR, Window, whole
from bnncore.packed.layouts import aligned, lanes_of, rounded
from bnncore.packed.tiles import _F32, _I8, _I32, _I64, _Emit, _finish_pixels, _parameters

Array = np.ndarray

SIDE = 16  # rows of a tile, and its columns of 32 bits
STEP = 64  # products that one multiplication adds to a sum
HELD = 4  # tiles of sums in work at once: half of the unit's registers
_SPARE = 2 * STEP  # bytes behind a map that a window's last columns may read
_FULL = 12  # rows of a tile that are filled well enough
_STRIP = 24 << 10  # bytes of a map that are spread at a time: half of a first cache
_LEAST = 4  # rows of results, however wide, for which that is done at a time


@functools.cache
def here() -> bool:
    """Whether this processor has the unit, and the system lets this process use it."""
    if not {"amx-tile", "amx-int8"} <= tiles.features() or sys.platform != "linux":
        return False
    # Linux gives a process the state that tiles need only when asked: arch_prctl of
    # ARCH_REQ_XCOMP_PERM for XFEATURE_XTILEDATA.
    try:
        return ctypes.CDLL(None).syscall(158, 0x1023, 18) == 0
    except (OSError, AttributeError):
        return False


def wins(weight: tuple[int, ...], window: Window, out: tuple[int, ...]) -> bool:
    """Whether this is the fastest tile here, as `benchmarks/packed.py` found.

    Args:
        weight: (O,kh,kw,C).
        out: (Ho,Wo).
    """
    filters, _, kw, channels = weight
    if not here() or channels <= 32:
        return False
    # Rows and columns left empty take their time all the same, and other tiles do nothing in the
    # padding.
    columns = STEP * -(-kw * rounded(channels) // STEP)
    used = kw * channels / columns * filters / rounded(filters) * window.share()
    rows = _flat(window, out)[1]
    return _evenly(rows) * used >= 9


def _flat(window: Window, out: tuple[int, ...]) -> tuple[int, ...]:
    """The result as a map of rows that fill tiles, where its own do not and it can be."""
    point, pixels = (*window.kernel, window.stride, window.pad) == (1, 1, 1, 0), out[0] * out[1]
    if not point or _evenly(out[1]) >= _FULL:
        return out
    return (1, pixels) if pixels % SIDE else (pixels // SIDE, SIDE)


class Lay(NamedTuple):
    """Where the maps and windows of a convolution lie; see `convolve`."""

    sizes: Array
    starts: Array
    places: Array
    config: Array

    @classmethod
    def of(cls, window: Window, out: tuple[int, ...], channels: int) -> Lay:
        (kh, kw), stride, pad = window.kernel, window.stride, window.pad
        (lines, wide), each = window.inputs, rounded(channels)
        if _flat(window, out) != out:
            lines, wide = out = _flat(window, out)  # as the map is, pixel by pixel
        rows = _evenly(out[1])
        pitch = (wide + 2 * pad) * each
        most = max(_LEAST, (_STRIP // pitch - kh) // stride + 1)
        high = -(-out[0] // -(-out[0] // most))
        first = np.minimum(np.arange(0, out[1], rows), out[1] - rows)
        y, x = (axis.reshape(-1) for axis in np.meshgrid(range(high), first, indexing="ij"))
        sizes = [rows, high, pitch, each, kh, -(-kw * each // STEP), stride, pad, lines, *out]
        starts = (y * pitch + x * each) * stride
        return cls(
            np.array(sizes, np.int64),
            starts.astype(np.int64),
            (y * out[1] + x).astype(np.int64),
            config(rows),
        )


def _evenly(count: int) -> int:
    """Into parts of at most 16, as large as each other: how large."""
    return -(-count // -(-count // SIDE))


def config(rows: int) -> Array:
    """What the unit wants to know of its registers: sums and pixels, then weights."""
    config = np.zeros(64, np.uint8)
    config[0] = 1
    config[16:32].view("<u2")[:] = STEP
    config[48:56] = [rows] * 6 + [SIDE] * 2
    return config


def lay_out(weights: Array) -> Array:
    """Weights (O,kh,kw,C), 1 for +1, as bytes: int8 (blocks, kh, steps, halves, 16, 16, 4), the
    last three being columns by fours, filters, and columns."""
    filters, kh, kw, channels = weights.shape
    each, lanes = rounded(channels), lanes_of(filters)
    room = np.zeros((rounded(filters), kh, kw, each), np.int8)
    room[:filters, ..., :channels] = np.where(weights, np.int8(1), np.int8(-1))
    flat = room.reshape(len(room), kh, -1)
    flat = np.pad(flat, ((0, 0), (0, 0), (0, -flat.shape[2] % STEP)))
    split = flat.reshape(-1, lanes // SIDE, SIDE, kh, flat.shape[2] // STEP, SIDE, 4)
    return aligned(split.transpose(0, 3, 4, 1, 5, 2, 6))


def limits(low: Array, high: Array, lanes: int) -> Array:
    """Which sums become a bit of 1, ``low <= sum <= high``: int32 (blocks, 2, lanes), the least
    one and how many more.

    Args:
        low, high: float32 (O,) of whole blocks, infinite or NaN as for `borders.whole`.
    """
    least, most = whole(low, high)
    never = least > most
    rows = np.stack([np.where(never, FAR, least), np.where(never, 0, most - least)])
    return aligned(rows.astype(np.int64).astype(np.int32).reshape(2, -1, lanes).transpose(1, 0, 2))


# ---- code generation --------------------------------------------------------------------------

_VOID = ir.VoidType()


@intrinsic
def _configure(typing: Any, before: Any, config: Any) -> tuple[Any, Callable[..., ir.Value]]:
    """Set the unit up by the 64 bytes at ``config``, once those it has are stored at ``before``."""

    def body(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        emit = _Emit(builder)
        for name, address in zip(("st", "ld"), args, strict=True):
            at = builder.inttoptr(address, ir.PointerType())
            emit.call(f"llvm.x86.{name}tilecfg", _VOID, at)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), body


@intrinsic
def _restore(typing: Any, before: Any, known: Any) -> tuple[Any, Callable[..., ir.Value]]:
    """Set the unit up by the 64 bytes at ``before``, or where ``known`` is 0 lay it down."""

    def body(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        emit, b = _Emit(builder), builder
        at = b.inttoptr(args[0], ir.PointerType())
        with b.if_else(b.icmp_signed("!=", args[1], _I64(0))) as (then, otherwise):
            with then:
                emit.call("llvm.x86.ldtilecfg", _VOID, at)
            with otherwise:
                emit.call("llvm.x86.tilerelease", _VOID)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), body


@intrinsic
def _spread(
    typing: Any, x: Any, source: Any, to: Any, count: Any
) -> tuple[Any, Callable[..., ir.Value]]:
    """`count` words, of the type of ``x``, from the address ``source`` to bytes of +1 and -1."""
    width = x.dtype.bitwidth
    n = 64 // width

    def body(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        _, source, to, count = args
        emit, b = _Emit(builder), builder

        def some(first: ir.Value, bits: int) -> None:
            word = emit.load(ir.IntType(bits), emit.at(source, first, width // 8), 1)
            kind = ir.VectorType(_I8, bits)
            ones = [ir.Constant(kind, [_I8(sign)] * bits) for sign in (1, -1)]
            signs = b.select(b.bitcast(word, ir.VectorType(ir.IntType(1), bits)), *ones)
            emit.store(signs, emit.at(to, first, width), 1)

        def repeat(times: ir.Value, first: ir.Value, by: int) -> None:
            def step(index: ir.Value, none: list[ir.Value]) -> list[ir.Value]:
                some(b.add(first, b.mul(index, _I64(by))), by * width)
                return []

            emit.each(times, [], step)

        times = b.udiv(count, _I64(n))
        repeat(times, _I64(0), n)
        done = b.mul(times, _I64(n))
        repeat(b.sub(count, done), done, 1)
        return context.get_dummy_value()

    return types.void(x, *[types.int64] * 3), body


@intrinsic
def _multiply(
    typing: Any, flips: Any, at: Any, apart: Any, rows: Any, pitch: Any, steps: Any,
    weights: Any, sums: Any,
) -> tuple[Any, Callable[..., ir.Value]]:  # fmt: skip
    """Sums of products of some tiles of pixels with as many filters as `flips` has bits a word.

    Addresses: ``at`` of the addresses where the windows of the tiles' first pixels start, whose
    others lie ``apart`` bytes from each other; ``weights`` of the block's; ``sums`` of what is
    found, int32 (tiles, 16, lanes). ``rows`` of the window, ``pitch`` bytes apart, have ``steps``.
    """
    lanes = flips.dtype.bitwidth
    halves = lanes // SIDE
    count = HELD // halves

    def body(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        _, at, apart, rows, pitch, steps, weights, sums = args
        emit, b = _Emit(builder), builder

        def tile(name: str, number: int, address: ir.Value, by: ir.Value) -> None:
            pointer = b.inttoptr(address, ir.PointerType())
            emit.call(f"llvm.x86.tile{name}d64", _VOID, _I8(number), pointer, by)

        starts = [emit.load(_I64, emit.at(at, 8 * t), 8) for t in range(count)]
        for number in range(HELD):
            emit.call("llvm.x86.tilezero", _VOID, _I8(number))
        # Registers: sums 0 to 3, pixels 4 and 5, weights 6 and 7.
        pixels, filters = (4, 5), (6, 7)

        def row(index: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
            down = b.mul(index, pitch)
            begin = [b.add(start, down) for start in starts]

            def step(index: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
                (weights,) = carried
                for h in range(halves):
                    tile("load", filters[h], emit.at(weights, h * SIDE * STEP), _I64(STEP))
                for t in range(count):
                    register = pixels[t % len(pixels)]
                    tile("load", register, emit.at(begin[t], index, STEP), apart)
                    for h in range(halves):
                        emit.call("llvm.x86.tdpbssd", _VOID, _I8(halves * t + h), _I8(register),
                                  _I8(filters[h]))  # fmt: skip
                return [emit.at(weights, halves * SIDE * STEP)]

            return emit.loop(steps, carried, step, unroll=False)

        emit.loop(rows, [weights], row, unroll=False)
        for t in range(count):
            for h in range(halves):
                to = emit.at(sums, t * SIDE * lanes * 4 + h * SIDE * 4)
                tile("store", halves * t + h, to, _I64(lanes * 4))
        return context.get_dummy_value()

    return types.void(flips, *[types.int64] * 7), body


@intrinsic
def _finish(
    typing: Any, flips: Any, sums: Any, parts: Any, params: Any, flip: Any, residual: Any,
    numbers: Any, bits: Any, count: Any, apart: Any,
) -> tuple[Any, Callable[..., ir.Value]]:  # fmt: skip
    """The epilogue of `tiles` for `count` sums at the address ``sums``; results lie ``apart`` words
    of filters from each other."""
    lanes = flips.dtype.bitwidth
    vector, sum_ = ir.VectorType(_F32, lanes), ir.VectorType(_I32, lanes)

    def body(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        _, sums, parts, params, flip, residual, numbers, bits, count, apart = args
        emit = _Emit(builder)

        def values(pixels: list[ir.Value]) -> list[ir.Value]:
            found = [emit.load(sum_, emit.at(sums, one, 4 * lanes)) for one in pixels]
            return [builder.sitofp(value, vector) for value in found]

        places = residual, numbers, bits
        row = _parameters(emit, lanes, params)
        _finish_pixels(emit, lanes, parts, flip, row, values, places, count, apart)
        return context.get_dummy_value()

    return types.void(flips, *[types.int64] * 9), body


@intrinsic
def _compare(
    typing: Any, flips: Any, sums: Any, limits: Any, flip: Any, bits: Any, count: Any, apart: Any
) -> tuple[Any, Callable[..., ir.Value]]:
    """`_finish` where bits are all that is wanted; ``limits`` is the address of the block's."""
    lanes = flips.dtype.bitwidth
    word, sum_ = ir.IntType(lanes), ir.VectorType(_I32, lanes)

    def body(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        _, sums, limits, flip, bits, count, apart = args
        emit, b = _Emit(builder), builder
        least, reach = (emit.load(sum_, emit.at(limits, 4 * lanes * k)) for k in range(2))
        flip, by = b.trunc(flip, word), b.mul(apart, _I64(lanes // 8))

        def pixel(index: ir.Value, none: list[ir.Value]) -> list[ir.Value]:
            found = emit.load(sum_, emit.at(sums, index, 4 * lanes))
            within = b.bitcast(b.icmp_unsigned("<=", b.sub(found, least), reach), word)
            emit.store(b.xor(within, flip), b.add(bits, b.mul(index, by)), lanes // 8)
            return []

        emit.loop(count, [], pixel)
        return context.get_dummy_value()

    return types.void(flips, *[types.int64] * 6), body


# ---- kernel -----------------------------------------------------------------------------------


@njit(cache=True, nogil=True)
def convolve(
    x: Array, sizes: Array, starts: Array, places: Array, config: Array, weights: Array,
    limits: Array, parts: int, params: Array, flips: Array, residual: Array, numbers: Array,
    bits: Array,
) -> None:  # fmt: skip
    """A convolution of bits with its epilogue.

    Args:
        x: words (B,H,W,words), uint32 or uint16.
        sizes: int64: rows of a tile; rows of the result that are made at a time; bytes of a spread
            row of the map, and of its pixels; rows of the window, and steps of each; stride and
            padding; rows of x; Ho, Wo.
        starts, places: int64, of the tiles of so many rows: in bytes, and in positions.
        config: see `_configure`.
        weights: see `lay_out`.
        limits: see `limits`; empty where bits are not all that is wanted.
        parts, params, flips, residual, numbers, bits: as for `tiles.convolve`.
    """
    images, blocks, count = len(x), len(params), len(starts)
    rows, strip, pitch, cell, high, steps, stride, pad, lines, out, wide = sizes
    joined = rows == SIDE and wide % SIDE == 0  # tiles lie one behind the other
    depth, strips = (strip - 1) * stride + high, (out + strip - 1) // strip
    words = x.size // (images * lines)
    lanes = flips.itemsize * 8
    together = HELD * SIDE // lanes
    memory = np.zeros(depth * pitch + _SPARE + 64, np.uint8)
    base = (memory.ctypes.data + 63) // 64 * 64
    skip = base - memory.ctypes.data
    held = HELD * SIDE * SIDE * 4
    sums = np.empty(2 * held + 64, np.uint8)
    sums_at = (sums.ctypes.data + 63) // 64 * 64
    at = np.empty(together, np.int64)
    before = np.zeros(64, np.uint8)
    x_at, at_at, weights_at = x.ctypes.data, at.ctypes.data, weights.ctypes.data
    residual_at, numbers_at, bits_at = residual.ctypes.data, numbers.ctypes.data, bits.ctypes.data
    block_bytes = weights.size // blocks
    counted = limits.size > 0
    _configure(before.ctypes.data, config.ctypes.data)  # type: ignore[call-arg]
    for part in range(images * strips):
        # Beyond the end the last rows are done again, which changes nothing.
        image, top = part // strips, min(part % strips * strip, out - strip)
        above, place_of = top * stride - pad, (image * out + top) * wide
        for i in range(depth):
            row = (image * lines + above + i) * words * x.itemsize + x_at
            if not 0 <= above + i < lines:
                memory[skip + i * pitch : skip + (i + 1) * pitch] = 0
            else:
                _spread(x, row, base + i * pitch + pad * cell, words)
        for block in range(blocks):
            params_at = params.ctypes.data + block * tiles.ROWS * lanes * 4
            limits_at = limits.ctypes.data + block * 2 * lanes * 4
            flip = np.int64(flips[block])
            # Sums wait for the next ones to begin: what follows them needs other units.
            for g in range(0, count + together, together):
                these_at = sums_at + g // together % 2 * held
                if g < count:
                    for t in range(together):
                        at[t] = base + starts[min(g + t, count - 1)]
                    _multiply(
                        flips, at_at, stride * cell, high, pitch, steps,
                        weights_at + block * block_bytes, these_at,
                    )  # fmt: skip
                last = g - together
                if last < 0:
                    continue
                for t in range(1 if joined else min(together, count - last)):
                    place = (place_of + places[last + t]) * blocks + block
                    found = sums_at + held - (these_at - sums_at) + t * SIDE * lanes * 4
                    many = rows * min(together, count - last) if joined else rows
                    if counted:
                        _compare(
                            flips, found, limits_at, flip, bits_at + place * (lanes // 8), many,
                            blocks,
                        )  # fmt: skip
                    else:
                        _finish(
                            flips, found, parts, params_at, flip, residual_at + place * lanes * 4,
                            numbers_at + place * lanes * 4, bits_at + place * (lanes // 8), many,
                            blocks,
                        )  # fmt: skip
    _restore(before.ctypes.data, np.int64(before[0]))
    # numba would free these after their last use, and addresses are none
    memory[0], sums[0], at[0], before[0] = 0, 0, 0, 0
