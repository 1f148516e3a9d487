"""The bit-sliced tile: binary convolutions of few channels; a word holds one channel of 32 pixels.

`tiles` counts differing bits of a pixel's channels, of which narrow layers have few. Here *pixels
are the bits of a lane*, so that nothing depends on the number of channels and nothing is ever
summed across bits: sums are bit planes, added up by full adders of whole vectors.

- **Lanes.** A lane is a row of up to 32 pixels: several small images side by side, a strip of an
  image where there are few of them, or a part of a wide row. The lanes of a vector are different
  images or strips, so that the row below is the next vector.
- **Triples.** The taps of a row (channels times columns of the window, each a shifted word) are
  taken by threes: three inputs and three weights give a sum and a carry, of which there are two and
  eight kinds. They are put into a table once for all filters and all rows of windows that see them;
  a filter's weights pick from it.
- **Padding** is bits of 0, as in `borders`: its constants correct sums, or where sums become bits,
  the *start* of the counting does, which is also so high that a count above the limit carries into
  the topmost plane: comparing costs nothing.

As in `tiles`, loops are written in LLVM's language, and nothing here checks bounds.

Legend: `L` lanes of a vector, `C` channels, `O` filters, `P` planes of a count.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from bnncore.packed.tiles import ROWS, _Emit, _finish_pixels, _parameters, features

Array = np.ndarray

PIXELS = 32  # of a lane
HALF = 8  # triples of one table that are added up at a time, with as many of another
STEP = 8  # bytes; what an address can be a multiple of for nothing
KINDS = 10  # vectors of a triple's table: eight carries, the sum, its complement

_I1, _I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
_F32 = ir.FloatType()
_WIDE = "avx512f" in features()
LANES = 16 if _WIDE else 8
VECTOR = 4 * LANES  # bytes
_VECTOR = ir.VectorType(_I32, LANES)
_BYTES = ir.VectorType(_I8, VECTOR)


def _ternary(emit: _Emit, table: int, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """A function of three bits: bit ``4a + 2b + c`` of `table`."""
    return emit.call("llvm.x86.avx512.pternlog.d.512", _VECTOR, a, b, c, _I32(table))


def _add(emit: _Emit, a: ir.Value, b: ir.Value, c: ir.Value) -> tuple[ir.Value, ir.Value]:
    """A full adder: sum and carry."""
    if _WIDE:
        return _ternary(emit, 0x96, a, b, c), _ternary(emit, 0xE8, a, b, c)
    build = emit.b
    one = build.xor(a, b)
    return build.xor(one, c), build.or_(build.and_(a, b), build.and_(one, c))


def _picked(emit: _Emit, a: ir.Value, b: ir.Value, picks: list[int]) -> ir.Value:
    """Of each 16 bytes of two vectors those that are picked, of 32."""
    every = [
        block + pick % 16 + pick // 16 * VECTOR for block in range(0, VECTOR, 16) for pick in picks
    ]
    return emit.b.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, VECTOR), every))


def _gathered(emit: _Emit, parts: list[ir.Value]) -> ir.Value:
    """Vectors one behind the other."""
    while len(parts) > 1:
        count = 2 * parts[0].type.count
        both = ir.Constant(ir.VectorType(_I32, count), list(range(count)))
        parts = [
            emit.b.shuffle_vector(a, b, both) for a, b in zip(parts[::2], parts[1::2], strict=True)
        ]
    return parts[0]


def _turn_bits(emit: _Emit, value: ir.Value) -> ir.Value:
    """In each eight bytes bit i of byte k becomes bit k of byte i."""
    build = emit.b
    if {"gfni", "avx"} <= features():
        # A product of two matrices of 8x8 bits, whose rows count downwards.
        value = _picked(emit, value, value, [*range(7, -1, -1), *range(15, 7, -1)])
        ones = ir.Constant(_BYTES, [1 << k % 8 for k in range(VECTOR)])
        return emit.call(f"llvm.x86.vgf2p8affineqb.{8 * VECTOR}", _BYTES, ones, value, _I8(0))
    kind = ir.VectorType(_I64, VECTOR // 8)
    rows = build.bitcast(value, kind)
    for by, mask in ((7, 0x00AA00AA00AA00AA), (14, 0x0000CCCC0000CCCC), (28, 0x00000000F0F0F0F0)):
        far = ir.Constant(kind, [by] * kind.count)
        kept = ir.Constant(kind, [mask] * kind.count)
        change = build.and_(build.xor(rows, build.lshr(rows, far)), kept)
        rows = build.xor(build.xor(rows, change), build.shl(change, far))
    return build.bitcast(rows, _BYTES)


def _turn_bytes(emit: _Emit, rows: list[ir.Value]) -> list[ir.Value]:
    """Of 16 vectors byte i of each 16 of vector k becomes byte k of those of vector i."""
    for _ in range(4):
        rows = [
            _picked(emit, rows[k], rows[k + 8], [first + n // 2 + n % 2 * 16 for n in range(16)])
            for k in range(8)
            for first in (0, 8)
        ]
    return rows


@intrinsic
def _slice(typing: Any, words: Any, sources: Any, to: Any) -> tuple[Any, Callable[..., ir.Value]]:
    """Pixels of all lanes as planes: a word a channel, a vector apart.

    ``sources``: of the address of each lane's `PIXELS` words, of the type of ``words``.
    """
    many = words.dtype.bitwidth // 16
    part = ir.VectorType(_I8, 16)

    def body(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        _, sources, to = args
        emit = _Emit(builder)
        lanes = [emit.load(_I64, emit.at(sources, 8 * lane)) for lane in range(LANES)]
        for half in range(many):
            rows = []
            for p in range(16):  # eights of pixels 16 * block + p
                eights = [
                    _gathered(
                        emit,
                        [
                            emit.load(part, emit.at(lanes[4 * block + p // 4], 16 * k), 2)
                            for block in range(VECTOR // 16)
                        ],
                    )
                    for k in range(p % 4 * many, p % 4 * many + many)
                ]
                picks = [
                    pixel * 2 * many + byte
                    for byte in (2 * half, 2 * half + 1)
                    for pixel in range(8)
                ]
                rows.append(_turn_bits(emit, _picked(emit, eights[0], eights[-1], picks)))
            for c, row in enumerate(_turn_bytes(emit, rows), 16 * half):
                emit.store(row, emit.at(to, c * VECTOR))
        return context.get_dummy_value()

    return types.void(words, types.int64, types.int64), body


@intrinsic
def _tabulate(typing: Any, planes: Any, taps: Any, to: Any) -> tuple[Any, Callable[..., ir.Value]]:
    """The table of a triple: what its three words, each with a weight of either sign, add up to.

    Addresses; ``taps`` of three records of four int64: where a word lies in ``planes``, by how much
    to shift it right, then left, and which bits to keep.
    """

    def body(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        planes, taps, to = args
        emit = _Emit(builder)
        words = []
        for k in range(3):
            where, right, left, keep = (
                emit.load(_I64, emit.at(taps, 32 * k + 8 * n)) for n in range(4)
            )
            right, left, keep = (
                emit.splat(builder.trunc(n, _I32), LANES) for n in (right, left, keep)
            )
            word = emit.load(_VECTOR, builder.add(planes, where))
            words.append(builder.and_(builder.shl(builder.lshr(word, right), left), keep))
        flipped = [builder.not_(word) for word in words]
        results = []
        for weights in range(8):
            three = [(flipped if weights >> k & 1 else words)[k] for k in range(3)]
            results.append(_add(emit, *three)[1])
        total = _add(emit, *words)[0]
        for k, result in enumerate([*results, total, builder.not_(total)]):
            emit.store(result, emit.at(to, k * VECTOR))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), body


@intrinsic
def _count(
    typing: Any, tables: Any, picks: Any, units: Any, start: Any, planes: Any, to: Any
) -> tuple[Any, Callable[..., ir.Value]]:
    """Add up a filter's triples.

    Addresses: ``tables`` of the addresses of tables, one for each `HALF` of the triples; ``picks``
    of pairs of uint16, where in its table a triple's sum and carry lie, in `STEP` bytes; ``start``
    of `planes` planes to begin with; ``to`` of the resulting planes, which may be the same.
    ``units``: of two halves; ``planes``: at least 7.
    """

    def body(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        tables, picks, units, start, planes, to = args
        emit = _Emit(builder)
        above = builder.sub(planes, _I64(6))  # planes that are held in memory

        def begin(k: ir.Value) -> ir.Value:
            return emit.load(_VECTOR, emit.at(start, k, VECTOR))

        def copy(index: ir.Value, none: list[ir.Value]) -> list[ir.Value]:
            k = builder.add(index, _I64(6))
            emit.store(begin(k), emit.at(to, k, VECTOR))
            return []

        def unit(index: ir.Value, held: list[ir.Value]) -> list[ir.Value]:
            sums = list(held)
            at = emit.at(picks, index, 8 * HALF)
            halves = [emit.load(_I64, emit.at(emit.at(tables, index, 16), 8 * n)) for n in range(2)]

            def add(plane: int, a: ir.Value, b: ir.Value) -> ir.Value:
                sums[plane], carry = _add(emit, sums[plane], a, b)
                return carry

            def four(t: int) -> list[ir.Value]:
                """Four triples: three words of the plane of fours."""
                words = []
                for k in range(t, t + 4):
                    for n in range(2):
                        pick = emit.load(_I16, emit.at(at, 4 * k + 2 * n), 2)
                        where = emit.at(halves[k // HALF], builder.zext(pick, _I64), STEP)
                        words.append(emit.load(_VECTOR, where))
                p = add(0, words[0], words[2])
                x = add(1, words[1], words[3])
                q = add(0, words[4], words[6])
                y = add(1, words[5], words[7])
                return [x, y, add(1, p, q)]

            def eight(t: int) -> list[ir.Value]:
                a, b = four(t), None
                first = add(2, a[0], a[1])
                b = four(t + 4)
                return [first, add(2, a[2], b[0]), add(2, b[1], b[2])]

            a = eight(0)
            x = add(3, a[0], a[1])
            b = eight(8)
            y = add(3, a[2], b[0])
            z = add(3, b[1], b[2])
            first = add(4, x, y)
            second = builder.and_(sums[4], z)
            sums[4] = builder.xor(sums[4], z)
            carry = add(5, first, second)

            def ripple(index: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
                where = emit.at(to, builder.add(index, _I64(6)), VECTOR)
                plane = emit.load(_VECTOR, where)
                emit.store(builder.xor(plane, carried[0]), where)
                return [builder.and_(plane, carried[0])]

            emit.loop(above, [carry], ripple, unroll=False)
            return sums

        emit.loop(above, [], copy, unroll=False)
        sums = emit.loop(units, [begin(_I64(k)) for k in range(6)], unit, unroll=False)
        for k, plane in enumerate(sums):
            emit.store(plane, emit.at(to, k * VECTOR))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), body


@intrinsic
def _spread(typing: Any, planes: Any, apart: Any, to: Any) -> tuple[Any, Callable[..., ir.Value]]:
    """Words of 16 filters, `apart` bytes, as bytes of all of them together: 16 vectors, of which
    vector p has in its block b of 16 bytes the filters' bytes ``16 * b + p``."""

    def body(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        planes, apart, to = args
        emit = _Emit(builder)
        for p, row in enumerate(_turn_bytes(emit, _rows(emit, planes, apart))):
            emit.store(row, emit.at(to, p * VECTOR))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), body


def _rows(emit: _Emit, planes: ir.Value, apart: ir.Value, first: int = 0) -> list[ir.Value]:
    """Words of 16 filters."""
    return [
        emit.load(_BYTES, emit.b.add(planes, emit.b.mul(apart, _I64(f))))
        for f in range(first, first + 16)
    ]


@intrinsic
def _join(
    typing: Any, words: Any, planes: Any, apart: Any, flip: Any, places: Any
) -> tuple[Any, Callable[..., ir.Value]]:
    """The inverse of `_slice`: of as many filters as a word has bits, whose planes are `apart`
    bytes; with a word of bits to negate. ``places``: of the address of each lane's words."""
    bits = words.dtype.bitwidth
    many = bits // 16

    def body(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        _, planes, apart, flip, places = args
        emit = _Emit(builder)
        lanes = [emit.load(_I64, emit.at(places, 8 * lane)) for lane in range(LANES)]
        flips = emit.splat(builder.trunc(flip, ir.IntType(bits)), 8 * VECTOR // bits)
        flips = builder.bitcast(flips, _BYTES)
        halves = [
            [
                _turn_bits(emit, row)
                for row in _turn_bytes(emit, _rows(emit, planes, apart, 16 * half))
            ]
            for half in range(many)
        ]
        for p, eights in enumerate(zip(*halves, strict=True)):
            for k in range(many):
                picks = [
                    n // 2 % many * 16 + n % 2 * 8 + n // (2 * many)
                    for n in range(16 * k, 16 * k + 16)
                ]
                found = builder.xor(_picked(emit, eights[0], eights[-1], picks), flips)
                for block in range(VECTOR // 16):
                    at = emit.at(lanes[4 * block + p // 4], (p % 4 * many + k) * 16)
                    emit.store(emit.half(found, 16 * block, 16), at, 2)
        return context.get_dummy_value()

    return types.void(words, *[types.int64] * 4), body


@intrinsic
def _sum(typing: Any, planes: Any, to: Any) -> tuple[Any, Callable[..., ir.Value]]:
    """Eight planes that `_spread` made as sums: bytes of 16 filters together.

    Of pixel n those are 16 bytes at ``n % 128 * VECTOR + n // 128 * 16``.
    """
    kind = ir.VectorType(_I64, VECTOR // 8)

    def body(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        planes, to = args
        emit = _Emit(builder)

        def one(index: ir.Value, none: list[ir.Value]) -> list[ir.Value]:
            at = emit.at(planes, index, VECTOR)
            rows = [emit.load(kind, emit.at(at, 16 * k * VECTOR)) for k in range(8)]
            # Bit i of byte k of eight becomes bit k of byte i.
            for by, mask in ((1, 0x55), (2, 0x33), (4, 0x0F)):
                far = ir.Constant(kind, [by] * kind.count)
                kept = ir.Constant(kind, [mask * 0x0101010101010101] * kind.count)
                for k in range(8):
                    if not k & by:
                        low, high = rows[k], rows[k + by]
                        change = builder.and_(builder.xor(builder.lshr(low, far), high), kept)
                        rows[k] = builder.xor(low, builder.shl(change, far))
                        rows[k + by] = builder.xor(high, change)
            at = emit.at(to, index, 8 * VECTOR)
            for k, row in enumerate(rows):
                emit.store(row, emit.at(at, k * VECTOR))
            return []

        emit.loop(_I64(16), [], one, unroll=False)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), body


@intrinsic
def _finish(
    typing: Any, flips: Any, constant: Any, sums: Any, bytes_: Any, parts: Any, params: Any,
    flip: Any, residual: Any, numbers: Any, bits: Any, count: Any, blocks: Any,
) -> tuple[Any, Callable[..., ir.Value]]:  # fmt: skip
    """`tiles._finish` for `count` pixels, one after another.

    Addresses: ``constant`` of the filters', ``sums`` of the first pixel among those that `_sum`
    made, of a byte or two by ``bytes_``. ``blocks`` of filters, of which this is one.
    """
    lanes = flips.dtype.bitwidth
    vector, whole = ir.VectorType(_F32, lanes), ir.VectorType(_I32, lanes)
    quarter = ir.VectorType(_I8, 16)
    area = 128 * VECTOR  # bytes of 16 filters

    def body(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        _, constant, sums, bytes_, parts, params, flip, residual, numbers, bits, count, blocks = (
            args
        )
        emit, b = _Emit(builder), builder
        start = b.sitofp(emit.load(whole, constant), vector)
        minus = ir.Constant(vector, [-2.0] * lanes)
        two = b.icmp_signed("==", bytes_, _I64(2))

        def read(at: ir.Value) -> ir.Value:
            value = emit.load(quarter, at)
            if lanes == 32:
                both = ir.Constant(ir.VectorType(_I32, 32), list(range(32)))
                value = b.shuffle_vector(value, emit.load(quarter, emit.at(at, area)), both)
            return b.zext(value, whole)

        def values(numbers: list[ir.Value]) -> list[ir.Value]:
            where = [emit.at(sums, number, VECTOR) for number in numbers]

            def widen(totals: list[ir.Value]) -> list[ir.Value]:
                eight = ir.Constant(whole, [8] * lanes)
                high = [read(emit.at(at, area * lanes // 16)) for at in where]
                return [b.or_(t, b.shl(h, eight)) for t, h in zip(totals, high, strict=True)]

            totals = emit.when(two, [read(at) for at in where], widen)
            # Whole numbers below 2**24, of which nothing is rounded.
            name = f"llvm.fmuladd.v{lanes}f32"
            return [
                emit.call(name, vector, b.sitofp(total, vector), minus, start) for total in totals
            ]

        places = residual, numbers, bits
        row = _parameters(emit, lanes, params)
        _finish_pixels(emit, lanes, parts, flip, row, values, places, count, blocks)
        return context.get_dummy_value()

    return types.void(flips, *[types.int64] * 11), body


@intrinsic
def _fill(typing: Any, to: Any, count: Any) -> tuple[Any, Callable[..., ir.Value]]:
    """So many vectors of 0, at least one."""

    def body(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        emit = _Emit(builder)

        def one(index: ir.Value, none: list[ir.Value]) -> list[ir.Value]:
            emit.store(ir.Constant(_VECTOR, None), emit.at(args[0], index, VECTOR))
            return []

        emit.loop(args[1], [], one, unroll=False)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), body


@intrinsic
def _copy(
    typing: Any, words: Any, source: Any, step: Any, to: Any, apart: Any, count: Any
) -> tuple[Any, Callable[..., ir.Value]]:
    """So many words of the type of `words`, from and to every `step` and `apart` bytes."""
    bits = words.dtype.bitwidth
    word, size = ir.IntType(bits), _I64(bits // 8)

    def body(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        _, source, step, to, apart, count = args
        emit = _Emit(builder)

        def one(index: ir.Value, none: list[ir.Value]) -> list[ir.Value]:
            value = emit.load(word, builder.add(source, builder.mul(index, step)), bits // 8)
            emit.store(value, builder.add(to, builder.mul(index, apart)), bits // 8)
            return []

        def each(none: list[ir.Value]) -> list[ir.Value]:
            return emit.loop(count, [], one, unroll=False)

        def whole(none: list[ir.Value]) -> list[ir.Value]:
            kind = ir.PointerType()
            places = [builder.inttoptr(at, kind) for at in (to, source)]
            move = ir.FunctionType(ir.VoidType(), [kind, kind, _I64, _I1])
            name = "llvm.memcpy.p0.p0.i64"
            known = builder.module.globals.get(name)
            builder.call(
                known or ir.Function(builder.module, move, name),
                [*places, builder.mul(count, size), _I1(0)],
            )
            return []

        together = builder.and_(
            builder.icmp_signed("==", step, size), builder.icmp_signed("==", apart, size)
        )
        some = builder.icmp_signed(">", count, _I64(0))
        emit.when(builder.and_(some, together), [], whole)
        emit.when(builder.and_(some, builder.not_(together)), [], each)
        return context.get_dummy_value()

    return types.void(words, *[types.int64] * 5), body


@njit(cache=True, nogil=True)
def convolve(
    x: Array, shape: Array, lay: Array, lanes: Array, taps: Array, rows: Array, spans: Array,
    picks: Array, start: Array, start_of: Array, planes: int, as_bits: bool, constants: Array,
    parts: int, params: Array, flips: Array, negated: Array, residual: Array, numbers: Array,
    bits: Array,
) -> None:  # fmt: skip
    """A binary convolution with its epilogue.

    Args:
        x: words (B,H,W,words).
        shape: int64: B, H, W, Ho, Wo, kernel rows, stride, padding.
        lay: int64: images a lane, pixels from one to the next; parts of an image (divides L),
            columns and rows of a part.
        lanes: int64 (5 + strides, L): of each lane its first image of those that fit a vector, its
            first row and column of the result, its first column of the input in strides, and which
            of its pixels are in the input: from, and up to, of each column of a stride.
        taps: int64 (triples, 3, 4), see `_tabulate`; planes are (strides, channels + 1, L).
        picks: uint16 (O, halves * HALF, 2), see `_count`.
        rows: int64 (halves,): of which row of the window a half's triples are; spans: int64
            (chunks,): how many units are added up for all filters before the next ones, so that
            what they need of the tables stays in the first cache.
        start: uint32 (kinds, O, planes, L), see `_count`; start_of: int64 (rows of a part,).
        planes: of a count.
        as_bits: whether the topmost plane is the result, else it is sums.
        constants: int32 (filters,): a sum is its filter's less twice the count.
        parts, params, flips, residual, numbers, bits: as in `tiles.convolve`; negated: words
            (blocks,), of bits to negate where `as_bits`.
    """
    B, H, W, Ho, Wo, kernel, stride, pad = shape
    side, apart, pieces, wide, high = lay
    words, unit = x.shape[3], x.itemsize
    channels = words * unit * 8
    triples, halves, filters = len(taps), len(rows), len(picks)
    blocks, size = len(flips), flips.itemsize  # bytes of a word of the result
    each = 8 * size  # filters of a block
    per = LANES // pieces  # sides of images of a vector
    bytes_ = 1 if planes <= 8 else 2  # of a sum
    step = 8 * bytes_ * VECTOR
    table = (triples * KINDS + 1) * VECTOR  # and a vector of 0
    area = 128 * VECTOR  # of 16 filters' sums
    room = np.empty(
        stride * (channels + 1) * VECTOR
        + kernel * table
        + each * step
        + (bytes_ * each // 16 + 1) * area
        + 64,
        np.uint8,
    )
    planes_at = (room.ctypes.data + 63) // 64 * 64
    table_at = planes_at + stride * (channels + 1) * VECTOR
    counts_at = table_at + kernel * table
    spread_at = counts_at + each * step
    sums_at = spread_at + area
    for k in range(stride):
        _fill(planes_at + (k * (channels + 1) + channels) * VECTOR, 1)  # type: ignore[call-arg]
    for k in range(kernel):
        _fill(table_at + (k + 1) * table - VECTOR, 1)  # type: ignore[call-arg]
    _fill(counts_at, (spread_at - counts_at) // VECTOR)  # type: ignore[call-arg]
    # By the place in the ring of tables where the last row of windows lies.
    tables = np.empty((kernel, halves), np.int64)
    for last in range(kernel):
        for half in range(halves):
            tables[last, half] = table_at + (last + 1 + rows[half]) % kernel * table
    # Where lanes are put together that do not lie together, and a last one for those of no pixels:
    # 0, and to be written to.
    pixels = np.zeros((LANES + 1, PIXELS), x.dtype)
    out = np.zeros((LANES + 1, PIXELS), bits.dtype)
    sources, places = np.empty((2, LANES), np.int64)
    pixels_at, out_at = pixels.ctypes.data, out.ctypes.data
    x_at, start_at, picks_at = x.ctypes.data, start.ctypes.data, picks.ctypes.data
    taps_at, tables_at = taps.ctypes.data, tables.ctypes.data
    tops_at = counts_at + (planes - 1) * VECTOR
    params_at, constants_at = params.ctypes.data, constants.ctypes.data
    residual_at, numbers_at, bits_at = residual.ctypes.data, numbers.ctypes.data, bits.ctypes.data
    image_of, row_of, column_of, left_of, begins = lanes[0], lanes[1], lanes[2], lanes[3], lanes[4]
    ends = lanes[5:]
    together = stride * words == 1  # whether all pixels of a lane lie so in the input
    direct = as_bits and blocks == 1  # and in the result, if that is bits
    for lane in range(LANES):
        together &= ends[0, lane] - begins[lane] == PIXELS
        direct &= Wo - column_of[lane] >= PIXELS and wide >= PIXELS
        places[lane] = out_at + lane * PIXELS * size
    # Of a block: how many images a lane has, where its first window begins, and its first pixel.
    many_of, tops, goals = np.empty((3, LANES), np.int64)
    span, line = (high - 1) * stride + kernel, W * words * unit
    for block in range(((B + side - 1) // side + per - 1) // per):
        for lane in range(LANES):
            first = block * per * side + image_of[lane]
            many_of[lane] = max(0, min(side, B - first))
            tops[lane] = x_at + (first * H + row_of[lane] * stride - pad) * line
            tops[lane] += left_of[lane] * stride * words * unit
            goals[lane] = (first * Ho + row_of[lane]) * Wo + column_of[lane]
        for r in range(span):
            for parity in range(stride):
                for w in range(words):
                    for lane in range(LANES):
                        here = tops[lane] + r * line + (parity * words + w) * unit
                        if many_of[lane] == 0 or not 0 <= row_of[lane] * stride - pad + r < H:
                            here = pixels_at + LANES * PIXELS * unit
                        elif not together:
                            at, begin = pixels_at + lane * PIXELS * unit, begins[lane]
                            _fill(at, PIXELS * unit // VECTOR)
                            for s in range(many_of[lane]):
                                _copy(
                                    x, here + (s * H * W + begin * stride) * words * unit,
                                    stride * words * unit, at + (s * apart + begin) * unit, unit,
                                    ends[parity, lane] - begin,
                                )  # fmt: skip
                            here = at
                        sources[lane] = here
                    _slice(
                        x, sources.ctypes.data,
                        planes_at + (parity * (channels + 1) + w * unit * 8) * VECTOR,
                    )  # fmt: skip
            slot = r % kernel
            to = table_at + slot * table
            for t in range(triples):
                _tabulate(planes_at, taps_at + t * 96, to + t * KINDS * VECTOR)
            row = r - kernel + 1
            if row < 0 or row % stride:
                continue
            row //= stride
            for group in range(blocks):
                many = min(each, filters - group * each)
                origin = start_at + (start_of[row] * filters + group * each) * planes * VECTOR
                half = 0
                for units in spans:
                    begin = picks_at + (group * each * halves + half) * HALF * 4
                    for f in range(many):
                        counts = counts_at + f * step
                        first = counts if half else origin + f * planes * VECTOR
                        _count(
                            tables_at + (slot * halves + half) * 8,
                            begin + f * halves * HALF * 4, units, first, planes, counts,
                        )  # fmt: skip
                    half += 2 * units
                if as_bits:
                    for f in range(many, each):
                        _fill(tops_at + f * step, 1)
                    for lane in range(LANES if direct else 0):
                        at = out_at + LANES * PIXELS * size
                        if many_of[lane] > 0 and row_of[lane] + row < Ho:
                            at = bits_at + (goals[lane] + row * Wo) * size
                        places[lane] = at
                    _join(
                        flips, tops_at, step, np.int64(negated[group]), places.ctypes.data
                    )  # fmt: skip
                else:
                    for part in range(each // 16):
                        for byte in range(bytes_):
                            source = counts_at + part * 16 * step + 8 * byte * VECTOR
                            real = min(8, planes - 8 * byte)
                            for k in range(real):
                                _spread(
                                    source + k * VECTOR, step, spread_at + k * 16 * VECTOR
                                )  # fmt: skip
                            if real < 8:
                                _fill(spread_at + real * 16 * VECTOR, (8 - real) * 16)
                            _sum(spread_at, sums_at + (byte * each // 16 + part) * area)
                for lane in range(0 if direct else LANES):
                    count = max(0, min(wide, Wo - column_of[lane]))
                    place = (goals[lane] + row * Wo) * blocks + group
                    for s in range(many_of[lane] if row_of[lane] + row < Ho else 0):
                        number = lane * PIXELS + s * apart
                        if as_bits:
                            _copy(
                                flips, out_at + number * size, size, bits_at + place * size,
                                size * blocks, count,
                            )  # fmt: skip
                        else:
                            sums = sums_at + (number & 127) * VECTOR + (number >> 7) * 16
                            _finish(
                                flips, constants_at + group * each * 4, sums, bytes_,
                                parts, params_at + group * ROWS * each * 4, np.int64(flips[group]),
                                residual_at + place * each * 4, numbers_at + place * each * 4,
                                bits_at + place * size, count, blocks,
                            )  # fmt: skip
                        place += Ho * Wo * blocks
    pixels[0, 0] = 0  # numba would free them after their last use, and addresses are none
    out[0, 0] = room[0] = 0
    sources[0] = places[0] = 0
    tables[0, 0] = 0
