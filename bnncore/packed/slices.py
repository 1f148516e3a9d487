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

from bnncore.packed.tiles import ROWS, _Emit, _epilogue, features

Array = np.ndarray

PIXELS = 32  # of a lane
UNIT = 16  # triples that are added up at a time
KINDS = 10  # vectors of a triple's table: eight carries, the sum, its complement

_I1, _I8, _I32, _I64 = (ir.IntType(bits) for bits in (1, 8, 32, 64))
_F32 = ir.FloatType()
_WIDE = "avx512f" in features()
LANES = 16 if _WIDE else 8
VECTOR = 4 * LANES  # bytes
_VECTOR = ir.VectorType(_I32, LANES)
_BYTES = ir.VectorType(_I8, 64)


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


@intrinsic
def _slice(typing: Any, words: Any, pixels: Any, to: Any) -> tuple[Any, Callable[..., ir.Value]]:
    """Words of 32 pixels at `pixels`, of the type of `words`: a word a channel, a vector apart."""
    bits = words.dtype.bitwidth
    kind = ir.VectorType(ir.IntType(bits), PIXELS)

    def body(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        emit = _Emit(builder)
        value = emit.load(kind, args[1])
        for c in range(bits):
            picked = builder.and_(value, ir.Constant(kind, [1 << c] * PIXELS))
            mask = builder.icmp_unsigned("!=", picked, ir.Constant(kind, None))
            emit.store(builder.bitcast(mask, _I32), emit.at(args[2], c * VECTOR))
        return context.get_dummy_value()

    return types.void(words, types.int64, types.int64), body


@intrinsic
def _join(
    typing: Any, words: Any, planes: Any, flip: Any, to: Any
) -> tuple[Any, Callable[..., ir.Value]]:
    """The inverse of `_slice`, with a word of bits to negate."""
    bits = words.dtype.bitwidth
    kind = ir.VectorType(ir.IntType(bits), PIXELS)

    def body(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        _, planes, flip, to = args
        emit = _Emit(builder)
        total = emit.splat(builder.trunc(flip, ir.IntType(bits)), PIXELS)
        for f in range(bits):
            word = emit.load(_I32, emit.at(planes, f * VECTOR))
            mask = builder.bitcast(word, ir.VectorType(_I1, PIXELS))
            one = ir.Constant(kind, [1 << f] * PIXELS)
            total = builder.xor(total, builder.select(mask, one, ir.Constant(kind, None)))
        emit.store(total, to)
        return context.get_dummy_value()

    return types.void(words, *[types.int64] * 3), body


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
    typing: Any, table: Any, picks: Any, units: Any, start: Any, planes: Any, to: Any
) -> tuple[Any, Callable[..., ir.Value]]:
    """Add up a filter's triples.

    Addresses: ``table``; ``picks`` of pairs of uint32, where in the table a triple's sum and carry
    lie; ``start`` of `planes` planes to begin with; ``to`` of the resulting
    planes. ``units``: of `UNIT` triples; ``planes``: at least 7.
    """

    def body(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        table, picks, units, start, planes, to = args
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
            at = emit.at(picks, index, 8 * UNIT)

            def add(plane: int, a: ir.Value, b: ir.Value) -> ir.Value:
                sums[plane], carry = _add(emit, sums[plane], a, b)
                return carry

            def four(t: int) -> list[ir.Value]:
                """Four triples: three words of the plane of fours."""
                words = []
                for k in range(t, t + 4):
                    for n in range(2):
                        offset = builder.zext(emit.load(_I32, emit.at(at, 8 * k + 4 * n)), _I64)
                        words.append(emit.load(_VECTOR, builder.add(table, offset)))
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


_GALOIS = {"avx512f", "avx512vbmi", "gfni"} <= features()


def _interleave(emit: _Emit, rows: list[ir.Value]) -> list[ir.Value]:
    """Rows of n elements (n of them) transposed, in blocks of n where they are longer."""
    n = len(rows)
    size = rows[0].type.count
    picks = [
        [
            first + n // 2 * half + k // 2 + size * (k % 2)
            for first in range(0, size, n)
            for k in range(n)
        ]
        for half in range(2)
    ]
    for _ in range(n.bit_length() - 1):
        rows = [
            emit.b.shuffle_vector(
                rows[k], rows[k + n // 2], ir.Constant(ir.VectorType(_I32, size), half)
            )
            for k in range(n // 2)
            for half in picks
        ]
    return rows


@intrinsic
def _to_bytes(typing: Any, planes: Any, to: Any) -> tuple[Any, Callable[..., ir.Value]]:
    """Eight planes of a filter as bytes: of every 64 pixels, 1024 bytes apart."""

    def body(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        planes, to = args
        emit = _Emit(builder)
        if _GALOIS:
            # Bytes of a qword are planes of 8 pixels; a product with 1, 2, 4 .. turns its bits.
            quads = ir.VectorType(_I64, 8)
            rows = [emit.load(quads, emit.at(planes, k * VECTOR)) for k in range(8)]
            order = [8 * (7 - m) + j for j in range(8) for m in range(8)]
            order = ir.Constant(ir.VectorType(_I32, 64), order)
            ones = ir.Constant(_BYTES, [1 << k for k in range(8)] * 8)
            results = []
            for row in _interleave(emit, rows):
                row = builder.bitcast(row, _BYTES)
                row = builder.shuffle_vector(row, row, order)
                name = "llvm.x86.vgf2p8affineqb.512"
                results.append(emit.call(name, _BYTES, ones, row, _I8(0)))
        else:
            results = []
            for chunk in range(LANES // 2):
                total = ir.Constant(_BYTES, None)
                for k in range(8):
                    word = emit.load(_I64, emit.at(planes, k * VECTOR + 8 * chunk), 4)
                    mask = builder.bitcast(word, ir.VectorType(_I1, 64))
                    more = builder.add(total, ir.Constant(_BYTES, [1 << k] * 64))
                    total = builder.select(mask, more, total)
                results.append(total)
        for chunk, result in enumerate(results):
            emit.store(result, emit.at(to, 1024 * chunk))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), body


@intrinsic
def _turn(typing: Any, bytes_: Any) -> tuple[Any, Callable[..., ir.Value]]:
    """Bytes of 16 filters for 64 pixels, 64 of a filter together: in place, 16 of a pixel together.

    Pixel p is then in row ``p % 16``, quarter ``p // 16``.
    """

    def body(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        emit = _Emit(builder)
        rows = [emit.load(_BYTES, emit.at(args[0], 64 * f)) for f in range(16)]
        for p, row in enumerate(_interleave(emit, rows)):
            emit.store(row, emit.at(args[0], 64 * p))
        return context.get_dummy_value()

    return types.void(types.int64), body


@intrinsic
def _finish(
    typing: Any, flips: Any, constant: Any, sums: Any, bytes_: Any, parts: Any, params: Any,
    flip: Any, residual: Any, numbers: Any, bits: Any, count: Any, blocks: Any,
) -> tuple[Any, Callable[..., ir.Value]]:  # fmt: skip
    """`tiles._finish` for `count` pixels, one after another.

    Addresses: ``constant`` of the filters', ``sums`` of the first pixel among those that `_turn`
    made, of a byte or two by ``bytes_``. ``blocks`` of filters, of which this is one.
    """
    lanes = flips.dtype.bitwidth
    vector, whole = ir.VectorType(_F32, lanes), ir.VectorType(_I32, lanes)
    quarter = ir.VectorType(_I8, 16)
    area = LANES // 2 * 1024  # bytes of 16 filters

    def body(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        _, constant, sums, bytes_, parts, params, flip, residual, numbers, bits, count, blocks = (
            args
        )
        emit, b = _Emit(builder), builder
        # In registers, as far as there are any: what is stored could be theirs, for all LLVM knows.
        rows = [emit.load(vector, emit.at(params, 4 * lanes * k)) for k in range(ROWS)]
        pixels = _epilogue(emit, lanes, parts, flip, rows.__getitem__)
        start = emit.load(whole, constant)
        two = b.icmp_signed("==", bytes_, _I64(2))

        def read(at: ir.Value) -> ir.Value:
            value = emit.load(quarter, at)
            if lanes == 32:
                both = ir.Constant(ir.VectorType(_I32, 32), list(range(32)))
                value = b.shuffle_vector(value, emit.load(quarter, emit.at(at, area)), both)
            return b.zext(value, whole)

        last = b.sub(count, _I64(1))

        def four(index: ir.Value, none: list[ir.Value]) -> list[ir.Value]:
            where, places = [], []
            for k in range(4):  # beyond the end the last pixel is done again, which changes nothing
                one = b.add(b.mul(index, _I64(4)), _I64(k))
                one = b.select(b.icmp_signed("<", one, last), one, last)
                where.append(emit.at(sums, one, 64))
                places.append(b.mul(one, blocks))

            def widen(totals: list[ir.Value]) -> list[ir.Value]:
                eight = ir.Constant(whole, [8] * lanes)
                high = [read(emit.at(at, area * lanes // 16)) for at in where]
                return [b.or_(t, b.shl(h, eight)) for t, h in zip(totals, high, strict=True)]

            totals = emit.when(two, [read(at) for at in where], widen)
            pixels(
                [b.sitofp(b.sub(start, b.add(total, total)), vector) for total in totals],
                [emit.at(residual, place, 4 * lanes) for place in places],
                [emit.at(numbers, place, 4 * lanes) for place in places],
                [emit.at(bits, place, lanes // 8) for place in places],
            )
            return []

        emit.loop(b.lshr(b.add(count, _I64(3)), _I64(2)), [], four, unroll=False)
        return context.get_dummy_value()

    return types.void(flips, *[types.int64] * 11), body


@intrinsic
def _move(typing: Any, source: Any, to: Any) -> tuple[Any, Callable[..., ir.Value]]:
    """A vector, from one address to another."""

    def body(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        emit = _Emit(builder)
        emit.store(emit.load(_VECTOR, args[0]), args[1])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), body


@intrinsic
def _fill(typing: Any, to: Any, count: Any) -> tuple[Any, Callable[..., ir.Value]]:
    """So many vectors of 0."""

    def body(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        emit = _Emit(builder)

        def one(index: ir.Value, none: list[ir.Value]) -> list[ir.Value]:
            emit.store(ir.Constant(_VECTOR, None), emit.at(args[0], index, VECTOR))
            return []

        emit.loop(args[1], [], one)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), body


@njit(cache=True, nogil=True)
def convolve(
    x: Array, shape: Array, lay: Array, columns: Array, taps: Array, picks: Array, start: Array,
    start_of: Array, planes: int, as_bits: bool, constants: Array, parts: int, params: Array,
    flips: Array, negated: Array, residual: Array, numbers: Array, bits: Array,
) -> None:  # fmt: skip
    """A binary convolution with its epilogue.

    Args:
        x: words (B,H,W,words).
        shape: int64: B, H, W, Ho, Wo, kernel rows, stride, padding.
        lay: int64: images a lane, pixels from one to the next; parts of an image (divides L),
            columns and rows of a part.
        columns: int64 (parts,): the first input column of a part, in strides.
        taps: int64 (triples, 3, 4), see `_tabulate`; planes are (strides, channels + 1, L).
        picks: uint32 (kernel rows, O, units * UNIT, 2), see `_count`; by the place in the ring of
            tables where the last row of windows lies.
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
    triples = len(taps)
    filters = picks.shape[1]
    units = picks.shape[2] // UNIT
    blocks = len(params)
    lanes = flips.itemsize * 8
    size = lanes // 8  # bytes of a word of the result
    per = LANES // pieces  # sides of images of a vector
    tiles = (Wo + wide - 1) // wide
    vectors = stride * (channels + 1) + kernel * triples * KINDS + 1
    vectors += lanes * (max(planes, 16) + 1 + PIXELS // 2)
    room = np.empty(vectors * VECTOR + 64, np.uint8)
    planes_at = (room.ctypes.data + 63) // 64 * 64
    table_at = planes_at + stride * (channels + 1) * VECTOR
    zero_at = table_at + kernel * triples * KINDS * VECTOR
    counts_at = zero_at + VECTOR
    step = max(planes, 16) * VECTOR
    tops_at = counts_at + lanes * step
    sums_at = tops_at + lanes * VECTOR
    bytes_ = 1 if planes <= 8 else 2  # of a sum
    for k in range(stride):
        _fill(planes_at + (k * (channels + 1) + channels) * VECTOR, 1)  # type: ignore[call-arg]
    _fill(zero_at, (sums_at - zero_at) // VECTOR)  # type: ignore[call-arg]
    pixels = np.zeros(PIXELS, x.dtype)
    out = np.zeros(PIXELS, bits.dtype)
    pixels_at, out_at = pixels.ctypes.data, out.ctypes.data
    from_, to_ = x.reshape(-1), bits.reshape(-1)
    x_at, start_at, picks_at, taps_at = (
        x.ctypes.data,
        start.ctypes.data,
        picks.ctypes.data,
        taps.ctypes.data,
    )
    params_at, constants_at = params.ctypes.data, constants.ctypes.data
    residual_at, numbers_at, bits_at = residual.ctypes.data, numbers.ctypes.data, bits.ctypes.data
    span = (high - 1) * stride + kernel
    for block in range(((B + side - 1) // side + per - 1) // per):
        for r in range(span):
            for lane in range(LANES):
                piece = lane % pieces
                first = (block * per + lane // pieces) * side
                y = piece // tiles * high * stride - pad + r
                left = columns[piece]
                many = min(side, B - first) if 0 <= y < H else 0
                for parity in range(stride):
                    begin = max(0, -left)
                    end = min(apart, (W - parity + stride - 1) // stride - left)
                    for w in range(words):
                        at = planes_at + 4 * lane
                        at += (parity * (channels + 1) + w * unit * 8) * VECTOR
                        source = ((first * H + y) * W + left * stride + parity) * words + w
                        if many > 0 and stride * words == 1 and end - begin == PIXELS:
                            _slice(x, x_at + source * unit, at)
                            continue
                        for s in range(side):
                            if s < many:
                                for k in range(begin):
                                    pixels[s * apart + k] = 0
                                for k in range(begin, end):
                                    pixels[s * apart + k] = from_[source + k * stride * words]
                                for k in range(end, apart):
                                    pixels[s * apart + k] = 0
                                source += H * W * words
                            else:
                                for k in range(apart):
                                    pixels[s * apart + k] = 0
                        _slice(x, pixels_at, at)
            slot = r % kernel
            table = table_at + slot * triples * KINDS * VECTOR
            for t in range(triples):
                _tabulate(planes_at, taps_at + t * 96, table + t * KINDS * VECTOR)
            row = r - kernel + 1
            if row < 0 or row % stride:
                continue
            row //= stride
            for group in range(blocks):
                many = min(lanes, filters - group * lanes)
                begin = picks_at + (slot * filters + group * lanes) * units * UNIT * 8
                origin = start_at + (start_of[row] * filters + group * lanes) * planes * VECTOR
                if as_bits:
                    for f in range(many):
                        _count(
                            table_at, begin + f * units * UNIT * 8, units,
                            origin + f * planes * VECTOR, planes, counts_at,
                        )  # fmt: skip
                        _move(counts_at + (planes - 1) * VECTOR, tops_at + f * VECTOR)
                    for f in range(many, lanes):
                        _fill(tops_at + f * VECTOR, 1)
                else:
                    for f in range(many):
                        _count(
                            table_at, begin + f * units * UNIT * 8, units,
                            origin + f * planes * VECTOR, planes, counts_at + f * step,
                        )  # fmt: skip
                    for byte in range(bytes_):
                        for f in range(many):
                            to = sums_at + (byte * lanes // 16 + f // 16) * LANES * 512
                            _to_bytes(counts_at + f * step + byte * 8 * VECTOR, to + f % 16 * 64)
                    for part in range(bytes_ * lanes // 16 * LANES // 2):
                        _turn(sums_at + part * 1024)
                for lane in range(LANES):
                    piece = lane % pieces
                    first = (block * per + lane // pieces) * side
                    y = piece // tiles * high + row
                    left = piece % tiles * wide
                    if y >= Ho or first >= B:
                        continue
                    count = min(wide, Wo - left)
                    place = ((first * Ho + y) * Wo + left) * blocks + group
                    if as_bits and blocks == 1 and count == PIXELS:
                        _join(
                            flips, tops_at + 4 * lane, np.int64(negated[0]), bits_at + place * size
                        )
                        continue
                    if as_bits:
                        _join(flips, tops_at + 4 * lane, np.int64(negated[group]), out_at)
                    for s in range(min(side, B - first)):
                        if as_bits:
                            for k in range(count):
                                to_[place + k * blocks] = out[s * apart + k]
                        else:
                            k = 0
                            while k < count:  # a quarter of 64 pixels at a time
                                number = lane * PIXELS + s * apart + k
                                more = min(16 - number % 16, count - k)
                                at = number // 64 * 1024 + number % 16 * 64 + number // 16 % 4 * 16
                                to = place + k * blocks
                                _finish(
                                    flips, constants_at + group * lanes * 4, sums_at + at, bytes_,
                                    parts, params_at + group * ROWS * lanes * 4,
                                    np.int64(flips[group]), residual_at + to * lanes * 4,
                                    numbers_at + to * lanes * 4, bits_at + to * size, more, blocks,
                                )  # fmt: skip
                                k += more
                        place += Ho * Wo * blocks
    pixels[0] = 0  # numba would free them after their last use, and addresses are none
    out[0] = room[0] = 0
