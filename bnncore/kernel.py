"""Compiled kernels (numba): the same results as `bnncore.ops`, many times faster.

How values look between steps (all have the image as their first axis):

- numbers: float32 (B,H,W,S), S >= C channels of which those from C on are 0; ``(B,F)`` is held as
  (B,1,1,S). Integers are held as floats too, exactly, since they stay below 2**24. S is a multiple
  of 32, but for the input of the first convolution, where S = C.
- bits: uint32 (B,H,W,words), channel ``c`` in bit ``c % 32`` of word ``c // 32``, spare bits 0.
- a step that gives both the numbers and, through a threshold, the next layer's bits: `_Both`.

**One tile.** A convolution, binary or float, works on a tile of a few pixels by 32 filters, whose
sums stay in vector registers: *filters are the lanes*, so nothing is ever summed across lanes, and
the activations are what is broadcast. A tile adds up *runs*: stretches of bytes, words or floats
that are contiguous both in the input and in the weights (one row of a kernel window, over all its
channels). Three tiles exist, told apart by the type of the weights:

- ``uint32``, for processors that count bits in vectors (AVX-512 VPOPCNTDQ, NEON): 32 input channels
  a step, ``sum += popcount(broadcast(a) ^ w)``;
- ``uint8``, for those with a byte shuffle instead (AVX2): 8 input channels a step. The byte of
  activations picks one of 256 tables, and the shuffle looks up ``popcount(a ^ w)`` of 32 nibbles of
  weights at once. The sums are bytes too, so they are widened every 60 steps, before they overflow;
- ``float32``, for the first convolution, shortcuts and dense layers: ``sum += broadcast(a) * w``.

**Zero padding** is exact and nearly free. Which taps of a window lie outside the map depends on the
position alone, and few such *border classes* exist. A tile holds the same position of several
images and leaves those taps out; where images are few it holds several positions of one image
instead, reads zero bits from a padded copy, and the constant of its class takes them out again:
``sum of products = constant[class, filter] - 2 * popcount``.

**The epilogue** runs while the sums are at hand: affine, PReLU, affine, residual add, affine,
PReLU, affine, each rounded as in float32 arithmetic one at a time, then a store of the numbers, or
of ``(low <= x <= high) ^ flip`` as a word of 32 bits, or both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from . import ops
from .execute import Step
from .program import MAX_TAPS, Node, Program, Shape, Tensor, unpack_bits, validate

IMAGES_FIRST = True

Array = np.ndarray

LANES = 32  # filters of a tile, channels of a word
_LONGEST = (1 << 16) - 1  # products of which a sum of `_Nibbles` can count the differing ones
_MOST_RUNS = 1 << 16
_BYTE_STEPS = 60  # 4 a step at most: below the 255 that a byte holds, and a multiple of a word

# Parts of the epilogue, in order.
_FIRST, _RESIDUAL, _SECOND, _NUMBERS, _BITS = 1, 2, 4, 8, 16
# Rows of the epilogue's parameters: two times affine, slope, affine; then the bounds of a bit 1.
_SCALE, _SHIFT, _SLOPE, _LOW, _HIGH, _ROWS = 0, 1, 2, 10, 11, 12
_GROUP = 5  # rows of one group: scale, shift, slope, scale, shift


def features() -> set[str]:
    """What numba compiles for, as LLVM names it (``avx2``); NUMBA_CPU_FEATURES overrides it."""
    from numba.core.registry import cpu_target

    flags = cpu_target.target_context.codegen().magic_tuple()[2]
    return {flag[1:] for flag in flags.split(",") if flag.startswith("+")}


def binary_tile() -> np.dtype:
    """The type of weights whose tile is the fastest here, see above."""
    have = features()
    return np.dtype("u1" if "avx2" in have and "avx512vpopcntdq" not in have else "u4")


def tile_pixels(weights: np.dtype) -> int:
    """Pixels of a tile: as many as leave their sums, and what is added, in registers."""
    have = features()
    if weights == np.uint8:
        return 4
    if "avx512f" in have:
        return 8
    return 2


# ---- code generation: what numba's own vectoriser does not find -------------------------------

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_F32 = ir.FloatType()


class _Emit:
    """An IR builder with loads and stores at integer addresses, and loops with carried values."""

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.b = builder

    def at(self, base: ir.Value, index: ir.Value | int = 0, size: int = 1) -> ir.Value:
        """The address ``base + index * size``."""
        if isinstance(index, int):
            return self.b.add(base, _I64(index * size)) if index else base
        return self.b.add(base, self.b.mul(index, _I64(size)))

    def load(self, kind: ir.Type, address: ir.Value, align: int = 4) -> ir.Value:
        value = self.b.load(self.b.inttoptr(address, ir.PointerType()), typ=kind)
        value.align = align
        return value

    def store(self, value: ir.Value, address: ir.Value, align: int = 4) -> None:
        self.b.store(value, self.b.inttoptr(address, ir.PointerType())).align = align

    def call(self, name: str, result: ir.Type, *values: ir.Value) -> ir.Value:
        """Call the LLVM intrinsic `name`."""
        kind = ir.FunctionType(result, [value.type for value in values])
        known = self.b.module.globals.get(name)
        return self.b.call(known or ir.Function(self.b.module, kind, name), values)

    def splat(self, value: ir.Value, lanes: int) -> ir.Value:
        kind = ir.VectorType(value.type, lanes)
        one = self.b.insert_element(ir.Constant(kind, ir.Undefined), value, _I32(0))
        zeros = ir.Constant(ir.VectorType(_I32, lanes), None)
        return self.b.shuffle_vector(one, ir.Constant(kind, ir.Undefined), zeros)

    def half(self, value: ir.Value, first: int, lanes: int) -> ir.Value:
        picks = ir.Constant(ir.VectorType(_I32, lanes), list(range(first, first + lanes)))
        return self.b.shuffle_vector(value, value, picks)

    def loop(
        self,
        count: ir.Value,
        carried: list[ir.Value],
        body: Callable[[ir.Value, list[ir.Value]], list[ir.Value]],
    ) -> list[ir.Value]:
        """``for i in range(count): carried = body(i, carried)``; count >= 1."""
        before = self.b.block
        inside, after = self.b.append_basic_block(), self.b.append_basic_block()
        self.b.branch(inside)
        self.b.position_at_end(inside)
        index = self.b.phi(_I64)
        index.add_incoming(_I64(0), before)
        held = []
        for value in carried:
            held.append(self.b.phi(value.type))
            held[-1].add_incoming(value, before)
        new = body(index, list(held))
        following = self.b.add(index, _I64(1))
        index.add_incoming(following, self.b.block)
        for phi, value in zip(held, new, strict=True):
            phi.add_incoming(value, self.b.block)
        self.b.cbranch(self.b.icmp_signed("<", following, count), inside, after)
        self.b.position_at_end(after)
        return new

    def when(
        self, condition: ir.Value, value: ir.Value, body: Callable[[ir.Value], ir.Value]
    ) -> ir.Value:
        """``body(value) if condition else value``."""
        before = self.b.block
        inside, after = self.b.append_basic_block(), self.b.append_basic_block()
        self.b.cbranch(condition, inside, after)
        self.b.position_at_end(inside)
        new = body(value)
        last = self.b.block
        self.b.branch(after)
        self.b.position_at_end(after)
        joined = self.b.phi(value.type)
        joined.add_incoming(value, before)
        joined.add_incoming(new, last)
        return joined


@intrinsic
def _tile(typing, weights, pixels, table, runs, count, sums):
    """Add up `count` runs for one tile.

    ``weights``: array whose type picks the tile. Addresses: ``pixels`` of P addresses, where the
    windows of the pixels start; ``table`` of the 256 tables; ``runs`` of records of four int64
    (offset from the window's start in bytes, offset in the weights in bytes, steps, whether to
    widen afterwards); ``sums`` of P x 32 results.
    """
    kind = np.dtype(str(weights.dtype))
    P = tile_pixels(kind)

    def body(context, builder, signature, args):
        array, pixels, table, runs, count, sums = args
        emit = _Emit(builder)
        data = context.make_array(weights)(context, builder, array).data
        base = builder.ptrtoint(data, _I64)
        emitter = _TILES[kind.name]

        def one_run(index: ir.Value, totals: list[ir.Value]) -> list[ir.Value]:
            record = emit.at(runs, index, 32)
            offset, where, steps, widen = (
                emit.load(_I64, emit.at(record, 8 * k)) for k in range(4)
            )
            starts = [
                builder.add(emit.load(_I64, emit.at(pixels, 8 * j)), offset) for j in range(P)
            ]
            at = builder.add(base, where)
            return emitter.run(emit, starts, at, table, steps, totals, widen, sums)

        totals = emitter.start(emit, P, sums)
        totals = emit.loop(count, totals, one_run)
        emitter.end(emit, totals, sums)
        return context.get_dummy_value()

    return types.void(weights, *[types.int64] * 5), body


class _Words:
    """Sums are lanes of 32 bits, in registers until the end; 32 channels a step."""

    vector = ir.VectorType(_I32, 16)
    scalar: ir.Type = _I32

    @classmethod
    def start(cls, emit: _Emit, pixels: int, sums: ir.Value) -> list[ir.Value]:
        """The totals to begin with: two vectors of 16 filters a pixel."""
        return [ir.Constant(cls.vector, None)] * (2 * pixels)

    @classmethod
    def run(
        cls,
        emit: _Emit,
        starts: list[ir.Value],
        weights: ir.Value,
        table: ir.Value,
        steps: ir.Value,
        totals: list[ir.Value],
        widen: ir.Value,
        sums: ir.Value,
    ) -> list[ir.Value]:
        """Add up one run: `steps` from the address `starts` of each pixel and from `weights`."""

        def step(index: ir.Value, totals: list[ir.Value]) -> list[ir.Value]:
            at = emit.at(weights, index, 128)
            w = [emit.load(cls.vector, emit.at(at, 64 * v)) for v in range(2)]
            new = []
            for j, start in enumerate(starts):
                a = emit.splat(emit.load(cls.scalar, emit.at(start, index, 4)), 16)
                new += [cls.add(emit, totals[2 * j + v], a, w[v]) for v in range(2)]
            return new

        return emit.loop(steps, totals, step)

    @staticmethod
    def add(emit: _Emit, total: ir.Value, a: ir.Value, w: ir.Value) -> ir.Value:
        counted = emit.call("llvm.ctpop.v16i32", total.type, emit.b.xor(a, w))
        return emit.b.add(total, counted)

    @staticmethod
    def end(emit: _Emit, totals: list[ir.Value], sums: ir.Value) -> None:
        """Store the totals."""
        for k, total in enumerate(totals):
            emit.store(total, emit.at(sums, 64 * k))


class _Floats(_Words):
    """The same with products of floats; one channel a step."""

    vector = ir.VectorType(_F32, 16)
    scalar = _F32

    @staticmethod
    def add(emit: _Emit, total: ir.Value, a: ir.Value, w: ir.Value) -> ir.Value:
        return emit.call("llvm.fmuladd.v16f32", total.type, a, w, total)


class _Nibbles(_Words):
    """Totals are bytes: lanes 0-15 count the low nibbles of 16 filters, lanes 16-31 the high ones.

    They are widened to sums of 16 bits in memory. Eight channels a step.
    """

    vector = ir.VectorType(_I8, 32)
    wide = ir.VectorType(_I16, 16)

    @classmethod
    def start(cls, emit: _Emit, pixels: int, sums: ir.Value) -> list[ir.Value]:
        for k in range(2 * pixels):
            emit.store(ir.Constant(cls.wide, None), emit.at(sums, 32 * k))
        return super().start(emit, pixels, sums)

    @classmethod
    def run(
        cls,
        emit: _Emit,
        starts: list[ir.Value],
        weights: ir.Value,
        table: ir.Value,
        steps: ir.Value,
        totals: list[ir.Value],
        widen: ir.Value,
        sums: ir.Value,
    ) -> list[ir.Value]:
        b = emit.b

        def step(index: ir.Value, totals: list[ir.Value]) -> list[ir.Value]:
            tables = []
            for start in starts:
                byte = b.zext(emit.load(_I8, b.add(start, index), 1), _I64)
                tables.append(emit.load(cls.vector, emit.at(table, byte, 32), 32))
            at = emit.at(weights, index, 64)
            w = [emit.load(cls.vector, emit.at(at, 32 * v), 32) for v in range(2)]
            return [
                b.add(
                    totals[2 * j + v],
                    emit.call("llvm.x86.avx2.pshuf.b", cls.vector, tables[j], w[v]),
                )
                for j in range(len(starts))
                for v in range(2)
            ]

        totals = emit.loop(steps, totals, step)
        before = b.block
        inside, after = b.append_basic_block(), b.append_basic_block()
        b.cbranch(b.icmp_signed("!=", widen, _I64(0)), inside, after)
        b.position_at_end(inside)
        for k, total in enumerate(totals):
            low, high = (b.zext(emit.half(total, first, 16), cls.wide) for first in (0, 16))
            at = emit.at(sums, 32 * k)
            emit.store(b.add(emit.load(cls.wide, at), b.add(low, high)), at)
        b.branch(after)
        b.position_at_end(after)
        joined = []
        for total in totals:
            joined.append(b.phi(cls.vector))
            joined[-1].add_incoming(total, before)
            joined[-1].add_incoming(ir.Constant(cls.vector, None), inside)
        return joined

    @staticmethod
    def end(emit: _Emit, totals: list[ir.Value], sums: ir.Value) -> None:
        """Nothing: the last run has widened."""


_TILES: dict[str, type[_Words]] = {"uint8": _Nibbles, "uint32": _Words, "float32": _Floats}


@intrinsic
def _finish(
    typing, weights, constants, constant, total, parts, params, flip, residual, numbers, bits
):
    """The epilogue for 32 filters of one pixel.

    The types of the arrays ``weights`` and ``constants`` say what the sums are: popcounts (``x =
    constant - 2 * total``), as uint16 from the weights of `_Nibbles`, else as int32; or floats
    (``x = constant + total``). Addresses: ``constant`` and ``total`` of 32 values each; ``params``
    of `_ROWS` x 32 floats; ``residual`` and ``numbers`` of 32 floats; ``bits`` of a word.
    ``parts``: which parts to do; ``flip``: a word of bits to negate.
    """
    counted = constants.dtype == types.int32
    vector = ir.VectorType(_F32, LANES)

    def body(context, builder, signature, args):
        _, _, constant, total, parts, params, flip, residual, numbers, bits = args
        emit, b = _Emit(builder), builder

        def row(index: int) -> ir.Value:
            return emit.load(vector, emit.at(params, 4 * LANES * index))

        def asked(part: int) -> ir.Value:
            return b.icmp_signed("!=", b.and_(parts, _I64(part)), _I64(0))

        def group(first: int) -> Callable[[ir.Value], ir.Value]:
            def apply(x: ir.Value) -> ir.Value:
                x = b.fadd(b.fmul(x, row(first)), row(first + 1))
                up = b.fcmp_ordered(">=", x, ir.Constant(vector, None))
                x = b.select(up, x, b.fmul(x, row(first + 2)))
                return b.fadd(b.fmul(x, row(first + 3)), row(first + 4))

            return apply

        def store_numbers(x: ir.Value) -> ir.Value:
            emit.store(x, numbers)
            return x

        def store_bits(x: ir.Value) -> ir.Value:
            above = b.fcmp_ordered(">=", x, row(_LOW))
            below = b.fcmp_ordered("<=", x, row(_HIGH))
            word = b.bitcast(b.and_(above, below), _I32)
            emit.store(b.xor(word, b.trunc(flip, _I32)), bits)
            return x

        if counted:
            whole = ir.VectorType(_I32, LANES)
            start = emit.load(whole, constant)
            if weights.dtype == types.uint8:
                minus = b.zext(emit.load(ir.VectorType(_I16, LANES), total), whole)
            else:
                minus = emit.load(whole, total)
            x = b.sitofp(b.sub(start, b.add(minus, minus)), vector)
        else:
            x = b.fadd(emit.load(vector, constant), emit.load(vector, total))
        x = emit.when(asked(_FIRST), x, group(0))
        x = emit.when(asked(_RESIDUAL), x, lambda x: b.fadd(x, emit.load(vector, residual)))
        x = emit.when(asked(_SECOND), x, group(_GROUP))
        x = emit.when(asked(_NUMBERS), x, store_numbers)
        emit.when(asked(_BITS), x, store_bits)
        return context.get_dummy_value()

    return types.void(weights, constants, *[types.int64] * 8), body


# ---- kernels ----------------------------------------------------------------------------------


@njit(cache=True, nogil=True)
def _convolve(
    x, strip, images, weights, stretch, table, runs, spans, starts, classes, constants,
    by_image, P, parts, params, flips, residual, numbers, bits,
):  # fmt: skip
    """A convolution, of bits or of floats, with its epilogue.

    Args:
        x: the input, any shape.
        strip: bytes of one image of it.
        images: B.
        weights: flat, see `_tile`; one block of 32 filters after the other, `stretch` numbers each.
        table: the 256 tables of `_Nibbles`.
        runs: int64 (n,4), see `_tile`.
        spans: int64 (classes,2): the runs of a border class, first and number.
        starts: int64 (positions,): where the window of an output starts in an image of x, in bytes.
        classes: int64 (positions,): its border class.
        constants: (classes, filters), see `_finish`.
        by_image: whether a tile is one position of P images, or P positions as they come.
        parts, params, flips: the epilogue's; params (blocks, `_ROWS`, 32), flips (blocks,).
        residual, numbers: float32 (B, positions, 32 * blocks); bits: uint32 (B, positions, blocks).
    """
    positions = len(starts)
    blocks = len(params)
    pixels = np.empty(P, np.int64)
    places = np.empty(P, np.int64)
    kinds = np.empty(P, np.int64)
    sums = np.empty(P * LANES + 16, np.int32)
    sums_at = (sums.ctypes.data + 63) // 64 * 64
    x_at, table_at, runs_at = x.ctypes.data, table.ctypes.data, runs.ctypes.data
    residual_at, numbers_at, bits_at = residual.ctypes.data, numbers.ctypes.data, bits.ctypes.data
    wide = 2 if weights.itemsize == 1 else 4  # bytes of a sum
    total = images * positions
    outer = (images + P - 1) // P if by_image else 1
    inner = positions if by_image else (total + P - 1) // P
    for block in range(blocks):
        part = weights[block * stretch :]
        constants_at = constants.ctypes.data + block * LANES * 4
        params_at = params.ctypes.data + block * _ROWS * LANES * 4
        flip = np.int64(flips[block])
        for i in range(outer):
            for k in range(inner):
                for j in range(P):
                    # Beyond the end the last pixel is done again, which changes nothing.
                    if by_image:
                        position = k
                        image = min(i * P + j, images - 1)
                    else:
                        place = min(k * P + j, total - 1)
                        image = place // positions
                        position = place - image * positions
                    pixels[j] = x_at + image * strip + starts[position]
                    places[j] = (image * positions + position) * blocks + block
                    kinds[j] = classes[position]
                begin = runs_at + spans[kinds[0], 0] * 32
                _tile(part, pixels.ctypes.data, table_at, begin, spans[kinds[0], 1], sums_at)  # type: ignore[call-arg]
                for j in range(P):
                    _finish(
                        weights,
                        constants,
                        constants_at + kinds[j] * blocks * LANES * 4,
                        sums_at + j * LANES * wide,
                        parts,
                        params_at,
                        flip,
                        residual_at + places[j] * LANES * 4,
                        numbers_at + places[j] * LANES * 4,
                        bits_at + places[j] * 4,
                    )


@njit(cache=True, nogil=True)
def _map(x, zeros, parts, params, flips, residual, numbers, bits):
    """The epilogue alone, on stored numbers: x float32 (B, positions, 32 * blocks)."""
    blocks = len(params)
    x_at, zeros_at = x.ctypes.data, zeros.ctypes.data
    residual_at, numbers_at, bits_at = residual.ctypes.data, numbers.ctypes.data, bits.ctypes.data
    for place in range(x.size // LANES):
        block = place % blocks
        _finish(  # type: ignore[call-arg]
            zeros,
            zeros,
            zeros_at,
            x_at + place * LANES * 4,
            parts,
            params.ctypes.data + block * _ROWS * LANES * 4,
            np.int64(flips[block]),
            residual_at + place * LANES * 4,
            numbers_at + place * LANES * 4,
            bits_at + place * 4,
        )


@njit(cache=True, nogil=True)
def _pool(x, kernel, stride, pad, divisor, maximum, out):
    """Max or average pooling of (B,H,W,S); sums are divided by divisor (Ho,Wo)."""
    images, high, wide, channels = out.shape
    for n in range(images):
        for i in range(high):
            for j in range(wide):
                room = out[n, i, j]
                first = True
                for y in range(
                    max(0, i * stride - pad), min(x.shape[1], i * stride - pad + kernel)
                ):
                    for z in range(
                        max(0, j * stride - pad), min(x.shape[2], j * stride - pad + kernel)
                    ):
                        tap = x[n, y, z]
                        if first:
                            for c in range(channels):
                                room[c] = tap[c]
                        elif maximum:
                            for c in range(channels):
                                room[c] = tap[c] if tap[c] > room[c] else room[c]
                        else:
                            for c in range(channels):
                                room[c] += tap[c]
                        first = False
                if not maximum:
                    for c in range(channels):
                        room[c] /= divisor[i, j]


# ---- layouts ----------------------------------------------------------------------------------


def _aligned(array: Array) -> Array:
    """A C-ordered copy that starts at a cache line."""
    room = np.empty(array.nbytes + 64, np.uint8)
    start = -room.ctypes.data % 64
    copy = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def _up(count: int) -> int:
    """Round up to whole words, or tiles, of channels."""
    return -(-count // LANES) * LANES


def _table() -> Array:
    """(256,32): popcount(a ^ w) for nibbles w; of the low nibble of byte a, then of the high."""
    byte, nibble = np.arange(256)[:, None], np.arange(16)[None, :]
    counts = [np.bitwise_count((byte & 15) ^ nibble), np.bitwise_count((byte >> 4) ^ nibble)]
    return _aligned(np.concatenate(counts, axis=1).astype(np.uint8))


def _to_words(bits: Array) -> Array:
    """Booleans (..., C) -> uint32 (..., words)."""
    packed = np.packbits(bits, axis=-1, bitorder="little")
    room = np.zeros((*bits.shape[:-1], _up(bits.shape[-1]) // 8), np.uint8)
    room[..., : packed.shape[-1]] = packed
    return room.view("<u4")


def _lay_out(rows: Array, dtype: np.dtype) -> Array:
    """Weights for `_tile`: words of bits, or floats, (O, n) -> (blocks, numbers of a block)."""
    filters = len(rows)
    whole = np.zeros((_up(filters), rows.shape[1]), rows.dtype)
    whole[:filters] = rows
    blocks = len(whole) // LANES
    if dtype != np.uint8:
        return _aligned(whole.reshape(blocks, LANES, -1).transpose(0, 2, 1)).reshape(blocks, -1)
    # Per block and step: two vectors of 16 low nibbles and 16 high ones of 16 filters.
    bytes_ = whole.view(np.uint8).reshape(blocks, 2, 16, -1)
    nibbles = np.stack([bytes_ & 15, bytes_ >> 4], axis=2)
    return _aligned(nibbles.transpose(0, 4, 1, 2, 3)).reshape(blocks, -1)


class _Geometry(NamedTuple):
    """Where the windows of a convolution lie; see `_convolve`."""

    runs: Array
    spans: Array
    starts: Array
    classes: Array


class _Window(NamedTuple):
    """Size, stride and padding of a convolution, and which of its taps lie in the map.

    A border class is a pattern of rows with a pattern of columns; few different ones exist along an
    axis: near the start, in the middle, near the end.
    """

    kernel: tuple[int, int]
    stride: int
    pad: int
    inputs: tuple[int, int]
    rows: Array  # booleans (patterns, kh)
    row_of: Array  # (Ho,)
    columns: Array  # booleans (patterns, kw)
    column_of: Array  # (Wo,)

    @classmethod
    def of(
        cls,
        kernel: tuple[int, int],
        stride: int,
        pad: int,
        inputs: tuple[int, int],
        outputs: tuple[int, int],
    ) -> _Window:
        found = []
        for size, taps, out in zip(inputs, kernel, outputs, strict=True):
            where = np.arange(out)[:, None] * stride - pad + np.arange(taps)[None, :]
            inside = (where >= 0) & (where < size)
            patterns, which = np.unique(inside, axis=0, return_inverse=True)
            found += [patterns, which.reshape(-1)]
        return cls(kernel, stride, pad, inputs, *found)

    @property
    def classes(self) -> int:
        return len(self.rows) * len(self.columns)

    def per_class(self, taps: Array) -> Array:
        """Sums over the taps in the map: (..., kh, kw) -> (classes, ...)."""
        rows, columns = self.rows.astype(np.int32), self.columns.astype(np.int32)
        sums = np.moveaxis(rows @ taps @ columns.T, (-2, -1), (0, 1))
        return sums.reshape(self.classes, *taps.shape[:-2])

    def share(self) -> float:
        """Of all products, those with a tap in the map."""
        return float(self.rows[self.row_of].mean() * self.columns[self.column_of].mean())


def _geometry(
    window: _Window, steps: int, unit: int, step: int, longest: int, skip: bool
) -> _Geometry:
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
    classes = window.row_of[:, None] * len(window.columns) + window.column_of[None, :]
    edge = window.pad if skip else 0
    down, right = (
        np.arange(len(axis)) * window.stride - edge for axis in (window.row_of, window.column_of)
    )
    starts = (down[:, None] * wide + right[None, :]) * steps * unit
    return _Geometry(
        np.array(runs, np.int64),
        np.array(spans if skip else spans * window.classes, np.int64),
        starts.astype(np.int64).reshape(-1),
        classes.astype(np.int64).reshape(-1),
    )


# ---- the plan ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Both:
    """A value with the bits that a threshold makes of it."""

    numbers: Array
    bits: Array

    def __getitem__(self, images: Any) -> _Both:
        return _Both(self.numbers[images], self.bits[images])


def _numbers(value: Any) -> Array:
    return value.numbers if isinstance(value, _Both) else value


def plan(program: Program, binary: np.dtype | None = None) -> list[Step]:
    """Steps for `bnncore.execute`, with what follows a convolution fused into it.

    Args:
        binary: the type of weights, and so the tile, of binary convolutions (default: the fastest
            here, see `binary_tile`).
    """
    return _Planner(program, binary or binary_tile()).steps()


class _Planner:
    """Decides what is fused and how values are held."""

    def __init__(self, program: Program, binary: np.dtype) -> None:
        self.program, self.binary = program, np.dtype(binary)
        self.shapes = validate(program)
        self.last = len(program.nodes)
        self.users: list[list[int]] = [[] for _ in self.shapes]  # nodes, as often as they use it
        for index, node in enumerate(program.nodes):
            for number in node.inputs:
                self.users[number].append(index)
        self.fused: set[int] = set()  # nodes
        self.table = _table()

    def steps(self) -> list[Step]:
        placed: list[tuple[int, Step]] = []  # by the last node that a step does
        for index, node in enumerate(self.program.nodes):
            if index not in self.fused:
                placed += self.anchor(index, node)
        return [step for _, step in sorted(placed, key=lambda pair: pair[0])]

    def stride(self, number: int) -> int:
        """With how many channels a value is stored."""
        channels = self.shapes[number].dims[-1]
        if number and self.program.nodes[number - 1].op == "normalize":
            after = {self.program.nodes[user].op for user in self.users[number]}
            if after == {"conv"}:
                return channels
        return _up(channels)

    def anchor(self, index: int, node: Node) -> list[tuple[int, Step]]:
        """The steps of a node and of those after it that can be fused into it."""
        if node.op not in _ANCHORS:
            single: Callable[..., Array] = self.through_numpy(index, node)
            if index + 1 != self.last and node.op in _POOLS:
                single = self.pool(index, node)
            elif index + 1 != self.last and node.op == "concat" and self.joins(node):
                single = _join
            return [(index, Step(node.inputs, index + 1, self.shapes[index + 1].own, single))]
        chain = _Chain(self.program, self.shapes[index + 1].dims[-1])
        own = self.shapes[index + 1].own
        if node.op in _SUMS:
            value = index + 1
        else:
            # An epilogue without sums: it begins with this node, on a stored value.
            value = node.inputs[0]
            chain.take(index, node, value)
            if node.op not in _BITS_OF:
                value = index + 1
        while node.op not in _BITS_OF and len(self.users[value]) == 1:
            after = self.users[value][0]
            follower = self.program.nodes[after]
            if after in self.fused or self.shapes[after + 1].own != own or follower.op in _BITS_OF:
                break
            if not chain.take(after, follower, value):
                break
            self.fused.add(after)
            value = after + 1
        if node.op not in _BITS_OF:
            for user in self.users[value]:
                follower = self.program.nodes[user]
                if follower.op in _BITS_OF and self.shapes[user + 1].own == own:
                    chain.take(user, follower, value)
                    self.fused.add(user)
                    break
        bits = chain.bits
        numbers = node.op not in _BITS_OF and len(self.users[value]) > (bits is not None)
        numbers = numbers or bits is None  # a value that nobody uses, or the last one
        chain.finish(numbers)
        inputs = (node.inputs[0], *([] if chain.residual is None else [chain.residual]))
        if node.op in _SUMS:
            run = self.sums(node, index, chain)
        else:
            run = self.elementwise(chain)
        if not numbers:
            assert bits is not None
            return [(bits, Step(inputs, bits + 1, own, lambda v, m: run(v, m).bits))]
        if value == self.last:
            classes = len(self.program.classes)
            return [
                (value - 1, Step(inputs, value, own, lambda v, m: _flat(run(v, m), classes))),
            ]
        if bits is None:
            return [(value - 1, Step(inputs, value, own, lambda v, m: run(v, m).numbers))]
        return [
            (value - 1, Step(inputs, value, own, run)),
            (bits, Step((value,), bits + 1, own, lambda v, m: v[0].bits)),
        ]

    def dims(self, number: int) -> tuple[int, int, int]:
        dims = self.shapes[number].dims
        return dims if len(dims) == 3 else (1, 1, *dims)  # type: ignore[return-value]

    def elementwise(self, chain: _Chain) -> Callable[..., _Both]:
        zeros = np.zeros(LANES, np.float32)

        def run(values: Sequence[Any], member: int) -> _Both:
            x = _numbers(values[0])
            out, residual = chain.outputs(x.shape[:3], values)
            _map(x, zeros, *chain.params(member), residual, out.numbers, out.bits)
            return out

        return run

    def sums(self, node: Node, index: int, chain: _Chain) -> Callable[..., _Both]:
        """A convolution, or a dense layer as a convolution of a map of one pixel."""
        binary = node.op == "bconv"
        slots = {slot: self.program.tensors[name] for slot, name in node.tensors.items()}
        filters = slots["weight"].shape[0]
        shape = slots["weight"].shape
        kernel = (shape[1], shape[2]) if len(shape) == 4 else (1, 1)
        inputs, outputs = self.dims(node.inputs[0]), self.dims(index + 1)
        stored = self.stride(node.inputs[0])
        dtype = self.binary if binary else np.dtype("f4")
        if kernel[0] * kernel[1] * stored > _LONGEST:
            dtype = np.dtype("u4") if binary else dtype
        window = _Window.of(
            kernel,
            int(node.attrs.get("stride", 1)),
            int(node.attrs.get("pad", 0)),
            inputs[:2],
            outputs[:2],
        )
        if dtype == np.uint8:
            steps, unit, step, longest = stored // 8, 1, 64, _BYTE_STEPS
        else:
            steps, unit, step, longest = stored // (32 if binary else 1), 4, 4 * LANES, 0
        around = _geometry(window, steps, unit, step, longest, False)
        # Not worth it, nor the memory, where nearly every position is a class of its own.
        few = window.classes * len(around.runs) <= _MOST_RUNS
        inner = _geometry(window, steps, unit, step, longest, True) if few and window.pad else None
        share = window.share()
        pixels = tile_pixels(dtype)
        table = self.table

        def lay_out(member: int) -> tuple[Array, Array, Array]:
            """Weights, and the constants without taps in the padding and with them."""
            if not binary:
                weights = _float_weights(slots, member).reshape(filters, *kernel, -1)
                room = np.zeros((*weights.shape[:3], stored), np.float32)
                room[..., : weights.shape[3]] = weights
                bias = np.zeros((window.classes, _up(filters)), np.float32)
                if "bias" in slots:
                    bias[:, :filters] = _plain(slots["bias"], member)
                return _lay_out(room.reshape(filters, -1), dtype), bias, bias
            words = _words(slots["weight"], member)
            inside = np.zeros((window.classes, _up(filters)), np.int32)
            inside[:, :filters] = window.per_class(np.full((1, *kernel), inputs[2], np.int32))
            ones = np.bitwise_count(words).sum(3, dtype=np.int32)
            whole = inside.copy()
            whole[:, :filters] += 2 * (ones.sum((1, 2)) - window.per_class(ones))
            return _lay_out(words.reshape(filters, -1), dtype), inside, whole

        prepared = _each_member(lay_out, slots)

        def run(values: Sequence[Any], member: int) -> _Both:
            x = _numbers(values[0])
            images = len(x)
            weights, inside, whole = prepared(member)
            # Tiles of images leave out padding, but the last ones may be half empty.
            skip = inner is not None and -(-images // pixels) * pixels * share < images
            if window.pad and not skip:
                x = _pad(x, window.pad)
            out, residual = chain.outputs((images, *outputs[:2]), values)
            lay = inner if skip else around
            assert lay is not None
            _convolve(
                x, x.shape[1] * x.shape[2] * steps * unit, images, weights.reshape(-1),
                weights.shape[1], table, lay.runs, lay.spans, lay.starts, lay.classes,
                inside if skip else whole, skip, pixels, *chain.params(member), residual,
                out.numbers, out.bits,
            )  # fmt: skip
            return out

        return run

    def pool(self, index: int, node: Node) -> Callable[..., Array]:
        inputs, outputs = self.dims(node.inputs[0]), self.dims(index + 1)
        stride, pad = int(node.attrs.get("stride", 1)), int(node.attrs.get("pad", 0))
        reach = pad if node.attrs.get("include_pad") else 0
        sizes, kernel = inputs[:2], int(node.attrs.get("kernel", 0))
        counts = []
        for size, out in zip(sizes, outputs[:2], strict=True):
            where = np.arange(out)[:, None] * stride - pad + np.arange(kernel or size)[None, :]
            counts.append(((where >= -reach) & (where < size + reach)).sum(1))
        divisor = (counts[0][:, None] * counts[1][None, :]).astype(np.float32)
        kernel = kernel or max(sizes)  # all of the map
        maximum = node.op == "maxpool"

        def run(values: Sequence[Any], member: int) -> Array:
            x = _numbers(values[0])
            out = np.empty((len(x), *divisor.shape, x.shape[3]), np.float32)
            _pool(x, kernel, stride, pad, divisor, maximum, out)
            return out

        return run

    def joins(self, node: Node) -> bool:
        """Whether the parts of a concatenation end where words do."""
        return not any(self.shapes[number].dims[-1] % LANES for number in node.inputs[:-1])

    def through_numpy(self, index: int, node: Node) -> Callable[..., Array]:
        """Any operator, by `bnncore.ops`."""
        shapes = [self.shapes[number] for number in node.inputs]
        shape = self.shapes[index + 1]
        bound = ops._Bound(self.program, node, shapes, shape)
        plain = ops._BUILD[node.op](bound)
        stride = self.stride(index + 1)
        last = index + 1 == self.last

        def run(values: Sequence[Any], member: int) -> Array:
            out = plain([_to_plain(v, s) for v, s in zip(values, shapes, strict=True)], member)
            return np.ascontiguousarray(out) if last else _from_plain(out, shape, stride)

        return run


def _join(values: Sequence[Any], member: int) -> Array:
    return np.concatenate([_numbers(value) for value in values], axis=3)


def _to_plain(value: Any, shape: Shape) -> Array:
    if shape.kind == "u8":
        return value
    value = _numbers(value)
    channels = shape.dims[-1]
    if shape.kind == "bits":
        value = value.view(np.uint8)[..., : -(-channels // 8)]
    else:
        value = value[..., :channels]
    return value if len(shape.dims) == 3 else value[:, 0, 0]


def _from_plain(value: Array, shape: Shape, stride: int) -> Array:
    if value.ndim == 2:
        value = value[:, None, None]
    if shape.kind == "bits":
        room = np.zeros((*value.shape[:3], stride // 8), np.uint8)
        room[..., : value.shape[3]] = value
        return room.view("<u4")
    room = np.zeros((*value.shape[:3], stride), np.float32)
    room[..., : value.shape[3]] = value
    return room


def _flat(value: _Both, classes: int) -> Array:
    return np.ascontiguousarray(value.numbers[:, 0, 0, :classes])


def _pad(x: Array, pad: int) -> Array:
    images, high, wide, channels = x.shape
    room = np.zeros((images, high + 2 * pad, wide + 2 * pad, channels), x.dtype)
    room[:, pad:-pad, pad:-pad] = x
    return room


def _copy(tensor: Tensor, member: int) -> Tensor:
    """One member's copy."""
    return replace(tensor, own=False, data=tensor.data[member]) if tensor.own else tensor


def _plain(tensor: Tensor, member: int) -> Array:
    """One member's copy as booleans, or float32."""
    tensor = _copy(tensor, member)
    if tensor.kind == "binary":
        return unpack_bits(tensor)
    plain = tensor.data.astype(np.float32)
    if tensor.kind == "int32":
        # A level that no sum reaches becomes infinite, so that rounding it does not matter.
        plain[tensor.data > MAX_TAPS] = np.inf
        plain[tensor.data < -MAX_TAPS] = -np.inf
    return plain


def _words(tensor: Tensor, member: int) -> Array:
    """One member's copy of binary weights (O,kh,kw,C), as uint32 (O,kh,kw,words)."""
    tensor = _copy(tensor, member)
    if tensor.shape[-1] % LANES == 0:
        return tensor.data.view("<u4").reshape(*tensor.shape[:-1], -1)
    return _to_words(unpack_bits(tensor))


def _float_weights(slots: dict[str, Tensor], member: int) -> Array:
    weight = _plain(slots["weight"], member)
    if weight.dtype == bool:
        return np.where(weight, np.float32(1), np.float32(-1))
    if "weight_scale" in slots:
        scale = _plain(slots["weight_scale"], member)
        weight = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
    return weight


T = TypeVar("T")


def _each_member(make: Callable[[int], T], tensors: dict[str, Tensor]) -> Callable[[int], T]:
    """`make`, called once a member, or once if all tensors are shared; when first needed."""
    own = any(tensor.own for tensor in tensors.values())
    made: dict[int, T] = {}

    def get(member: int) -> T:
        member = member if own else 0
        if member not in made:
            made[member] = make(member)
        return made[member]

    return get


class _Chain:
    """What an epilogue does."""

    # The order of the parts, and the row of parameters where each begins.
    ORDER = (
        ("affine", 0), ("prelu", 2), ("affine", 3), ("add", -1),
        ("affine", _GROUP), ("prelu", _GROUP + 2), ("affine", _GROUP + 3),
    )  # fmt: skip

    def __init__(self, program: Program, channels: int) -> None:
        self.program, self.channels = program, channels
        self.place = 0  # in ORDER
        self.rows: dict[int, Node] = {}
        self.residual: int | None = None
        self.bits: int | None = None
        self.level: Node | None = None
        self.parts = 0

    def take(self, index: int, node: Node, value: int) -> bool:
        """Append a node that uses `value`, if it fits."""
        if node.op in _BITS_OF:
            self.bits, self.level = index, node
            return True
        op = "prelu" if node.op == "relu" else node.op
        for place in range(self.place, len(self.ORDER)):
            if self.ORDER[place][0] == op:
                self.place = place + 1
                if op == "add":
                    a, b = node.inputs
                    self.residual = b if a == value else a
                else:
                    self.rows[self.ORDER[place][1]] = node
                return True
        return False

    def finish(self, numbers: bool) -> None:
        """Nothing more comes."""
        self.parts = _NUMBERS * numbers | _BITS * (self.level is not None)
        self.parts |= _RESIDUAL * (self.residual is not None)
        for row in self.rows:
            self.parts |= _FIRST if row < _GROUP else _SECOND
        if numbers and self.channels % LANES:
            self.parts |= _FIRST  # makes the channels beyond the last 0
        nodes = [*self.rows.values(), *([self.level] if self.level else [])]
        names = [name for node in nodes for name in node.tensors.values()]
        self.params = _each_member(
            self.prepare, {name: self.program.tensors[name] for name in names}
        )

    def prepare(self, member: int) -> tuple[int, Array, Array]:
        count = self.channels
        rows = np.zeros((_ROWS, _up(count)), np.float32)
        for first in (0, _GROUP):
            rows[[first, first + 2, first + 3], :count] = 1  # as good as nothing

        def get(node: Node, slot: str) -> Array | None:
            name = node.tensors.get(slot)
            return None if name is None else _plain(self.program.tensors[name], member)

        for row, node in self.rows.items():
            if node.op == "affine":
                scale, shift = get(node, "scale"), get(node, "shift")
                rows[row, :count] = 1 if scale is None else scale
                rows[row + 1, :count] = 0 if shift is None else shift
            else:
                rows[row, :count] = 0 if node.op == "relu" else get(node, "slope")
        flips = np.zeros(_up(count), bool)
        rows[_LOW] = np.inf  # no bit beyond the last channel
        rows[_HIGH, :count] = np.inf
        if self.level is not None:
            node = self.level
            if node.op == "sign":
                rows[_LOW, :count] = 0
            elif node.op == "threshold":
                level, up = get(node, "threshold"), get(node, "direction")
                assert level is not None
                up = np.ones(count, bool) if up is None else up
                rows[_LOW, :count] = np.where(up, level, -np.inf)
                rows[_HIGH, :count] = np.where(up, np.inf, level)
            else:
                rows[_LOW, :count], rows[_HIGH, :count] = get(node, "low"), get(node, "high")
                keep = get(node, "inside")
                flips[:count] = False if keep is None else ~keep
        params = np.ascontiguousarray(rows.reshape(_ROWS, -1, LANES).transpose(1, 0, 2))
        return self.parts, _aligned(params), _to_words(flips)

    def outputs(self, shape: tuple[int, ...], values: Sequence[Any]) -> tuple[_Both, Array]:
        """Room for the results, and the residual."""
        blocks = _up(self.channels) // LANES
        none = (0, 0, 0, 0)
        numbers = (*shape, blocks * LANES) if self.parts & _NUMBERS else none
        bits = (*shape, blocks) if self.parts & _BITS else none
        residual = _numbers(values[-1]) if self.parts & _RESIDUAL else np.empty(none, np.float32)
        return _Both(np.empty(numbers, np.float32), np.empty(bits, np.uint32)), residual


_BITS_OF = ("sign", "threshold", "interval")
_SUMS = ("bconv", "conv", "dense")
_POOLS = ("maxpool", "avgpool", "global_avg")
_ANCHORS = (*_SUMS, *_BITS_OF, "affine", "prelu", "relu", "add")
