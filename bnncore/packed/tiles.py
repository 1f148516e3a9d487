"""Tiles: the compiled inner loops (numba and LLVM) behind `bnncore.packed.compiled_kernels`.

A convolution, binary or float, works on a tile of a few pixels by 32 filters (16, where there are
no more), whose sums stay in vector registers: *filters are the lanes*, so nothing is ever summed
across lanes, and the activations are what is broadcast. A tile adds up *runs*: stretches of bytes,
words or floats that are contiguous both in the input and in the weights (one row of a kernel
window, over all its channels). Three tiles exist, told apart by the type of the weights:

- ``uint32``, for processors that count bits in vectors (AVX-512 VPOPCNTDQ, NEON): a word of
  channels a step, ``sum += popcount(broadcast(a) ^ w)``;
- ``uint8``, for those with a byte shuffle instead (AVX2): 8 input channels a step. The byte of
  activations picks one of 256 tables, and the shuffle looks up ``popcount(a ^ w)`` of 32 nibbles of
  weights at once. The sums are bytes too, so they are widened every 60 steps, before they overflow;
- ``float32``, for the first convolution, shortcuts and dense layers: ``sum += broadcast(a) * w``.

**The epilogue** runs while the sums are at hand: affine, PReLU, affine, residual add, affine,
PReLU, affine, each rounded as in float32 arithmetic one at a time, then a store of the numbers, or
of ``(low <= x <= high) ^ flip`` as a word of bits, or both. In Programs of integers one or two
rescalings stand for all of that, in 32 bits; what is stored is floats all the same, which hold
these integers. Where bits are all that is wanted of counts, these are compared as they are.

The loops are written in LLVM's own language, as functions that numba calls (`intrinsic`): its
vectoriser, given plain loops, makes code that is two to three times slower. LLVM lowers them to
what the processor has. Nothing here checks bounds: `compiled_kernels` plans every address
from validated shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

Array = np.ndarray

LANES = 32  # filters of a tile, channels of a word; but 16 in all where 16 hold all channels
LONGEST = (1 << 16) - 1  # products of which the sums of the uint8 tile can count the differing ones
UNROLL = 2  # steps of a tile whose addresses are computed at once
BYTE_STEPS = 60  # 4 a step at most: below the 255 that a byte holds, and a multiple of a word

# Parts of the epilogue. The bit of a row asks for the affine or PReLU whose parameters begin there.
FIRST, SECOND = 0b010101, 0b010101 << 6
# Instead of a group a rescaling of integers, and which of the two adds the residual.
RESCALE, AGAIN, ADDED, ADDED_AGAIN = 1 << 12, 1 << 13, 1 << 14, 1 << 15
RESIDUAL, CLEAR, NUMBERS, BITS = 1 << 16, 1 << 17, 1 << 18, 1 << 19
# Rows of its parameters: two groups of scale, shift, floor, slope, scale, shift (or, as int32:
# scale, slope, shift, right, low, high); the bounds of a bit; and above 0 where a filter is, else
# `CLEAR` writes 0.
GROUP, LOW, HIGH, LIVE, ROWS = 6, 12, 13, 14, 15


def _target() -> tuple[str, str, str]:
    from numba.core.registry import cpu_target

    return cpu_target.target_context.codegen().magic_tuple()


def processor() -> str:
    """The processor that numba compiles for, as LLVM names it; NUMBA_CPU_NAME overrides it."""
    return _target()[1]


def flags() -> list[str]:
    """What it can do (``+avx2``, as LLVM names it) and cannot; NUMBA_CPU_FEATURES overrides it."""
    return _target()[2].split(",")


def features() -> set[str]:
    """What it can do (``avx2``)."""
    return {flag[1:] for flag in flags() if flag.startswith("+")}


def binary_tile() -> np.dtype:
    """The type of weights whose tile is the fastest here, see above."""
    have = features()
    return np.dtype("u1" if "avx2" in have and "avx512vpopcntdq" not in have else "u4")


def tile_pixels(weights: np.dtype, lanes: int = LANES) -> int:
    """Pixels of a tile: as many as leave their sums, and what is added, in registers."""
    have = features()
    if weights == np.uint8:
        pixels = 4
    elif "avx512f" in have:
        pixels = 8
    else:
        pixels = 3 if weights == np.float32 and "avx2" in have else 2
    return pixels * LANES // lanes


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
        unroll: bool = True,
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
        again = self.b.cbranch(self.b.icmp_signed("<", following, count), inside, after)
        if not unroll:
            module = self.b.module
            disable = module.add_metadata([ir.MetaDataString(module, "llvm.loop.unroll.disable")])
            loop = module.add_metadata([disable, ir.Constant(_I32, len(module.metadata))])
            loop.operands = (loop, disable)  # a loop's mark refers to itself, so as to be unique
            again.set_metadata("llvm.loop", loop)
        self.b.position_at_end(after)
        return new

    def each(
        self,
        count: ir.Value,
        carried: list[ir.Value],
        body: Callable[[ir.Value, list[ir.Value]], list[ir.Value]],
        unroll: bool = True,
    ) -> list[ir.Value]:
        """`loop` for any count."""
        asked = self.b.icmp_signed(">", count, _I64(0))
        return self.when(asked, carried, lambda held: self.loop(count, held, body, unroll))

    def unrolled(
        self,
        count: ir.Value,
        carried: list[ir.Value],
        body: Callable[[ir.Value, int, list[ir.Value]], list[ir.Value]],
    ) -> list[ir.Value]:
        """`loop` for any count, `UNROLL` at a time: ``body(first, n, carried)`` for i = first +
        n, so that addresses of the ones behind a first one differ from its own by constants."""
        some = self.b.udiv(count, _I64(UNROLL))
        rest = self.b.urem(count, _I64(UNROLL))

        def many(index: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
            first = self.b.mul(index, _I64(UNROLL))
            for n in range(UNROLL):
                carried = body(first, n, carried)
            return carried

        def last(index: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
            done = self.b.mul(some, _I64(UNROLL))
            return body(self.b.add(done, index), 0, carried)

        return self.each(rest, self.each(some, carried, many, False), last, False)

    def when(
        self,
        condition: ir.Value,
        values: list[ir.Value],
        body: Callable[[list[ir.Value]], list[ir.Value]],
    ) -> list[ir.Value]:
        """``body(values) if condition else values``."""
        before = self.b.block
        inside, after = self.b.append_basic_block(), self.b.append_basic_block()
        self.b.cbranch(condition, inside, after)
        self.b.position_at_end(inside)
        changed = body(values)
        last = self.b.block
        self.b.branch(after)
        self.b.position_at_end(after)
        joined = []
        for value, new in zip(values, changed, strict=True):
            joined.append(self.b.phi(value.type))
            joined[-1].add_incoming(value, before)
            joined[-1].add_incoming(new, last)
        return joined

    def when_each(
        self, condition: ir.Value, values: list[ir.Value], body: Callable[[ir.Value], ir.Value]
    ) -> list[ir.Value]:
        return self.when(condition, values, lambda values: [body(value) for value in values])


@intrinsic
def _tile(
    typing: Any, x: Any, weights: Any, flips: Any, pixels: Any, table: Any, runs: Any, count: Any,
    sums: Any,
) -> tuple[Any, Callable[..., ir.Value]]:  # fmt: skip
    """Add up `count` runs for one tile.

    The types of arrays tell what to make: of ``weights``, the tile; of ``x``, how wide a word of
    input is; of ``flips``, how many filters are done at once. Addresses: ``pixels`` of P addresses,
    where the windows of the pixels start; ``table`` of the 256 tables; ``runs`` of records of four
    int64 (offset from the window's start in bytes, offset in the weights in bytes, steps, whether
    to widen afterwards); ``sums`` of P x lanes results.
    """
    kind = np.dtype(str(weights.dtype))
    lanes = flips.dtype.bitwidth
    P = tile_pixels(kind, lanes)
    unit = ir.IntType(x.dtype.bitwidth)
    emitter = _TILES[kind.name](lanes // 16, unit)

    def body(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        _, array, _, pixels, table, runs, count, sums = args
        emit = _Emit(builder)
        data = context.make_array(weights)(context, builder, array).data
        base = builder.ptrtoint(data, _I64)

        def one_run(index: ir.Value, totals: list[ir.Value]) -> list[ir.Value]:
            record = emit.at(runs, index, 32)
            offset, where, steps, widen = (
                emit.load(_I64, emit.at(record, 8 * k)) for k in range(4)
            )
            starts = [
                builder.add(emit.load(_I64, emit.at(pixels, 8 * j)), offset) for j in range(P)
            ]
            at = builder.add(base, where)
            return emitter.run(emit, _Run(starts, at, table, steps, widen, sums), totals)

        totals = emitter.start(emit, P, sums)
        totals = emit.loop(count, totals, one_run)
        emitter.end(emit, totals, sums)
        return context.get_dummy_value()

    return types.void(x, weights, flips, *[types.int64] * 5), body


class _Run(NamedTuple):
    """What one run of a tile works on: addresses, but for `steps` and `widen`.

    Attributes:
        starts: of the input, for each pixel.
        weights, table, sums: see `_tile`.
        steps: how many.
        widen: whether afterwards.
    """

    starts: list[ir.Value]
    weights: ir.Value
    table: ir.Value
    steps: ir.Value
    widen: ir.Value
    sums: ir.Value


class _Words:
    """Sums are lanes of 32 bits, in registers until the end; a word of channels a step.

    Args:
        vectors: of 16 filters each.
        unit: a word of the input.
    """

    vector = ir.VectorType(_I32, 16)

    def __init__(self, vectors: int, unit: ir.Type) -> None:
        self.vectors, self.unit = vectors, unit

    def start(self, emit: _Emit, pixels: int, sums: ir.Value) -> list[ir.Value]:
        """The totals to begin with, for each pixel its vectors."""
        return [ir.Constant(self.vector, None)] * (self.vectors * pixels)

    def run(self, emit: _Emit, run: _Run, totals: list[ir.Value]) -> list[ir.Value]:
        """The totals with one run added."""
        n = self.vectors

        def step(index: ir.Value, totals: list[ir.Value]) -> list[ir.Value]:
            at = emit.at(run.weights, index, 64 * n)
            w = [emit.load(self.vector, emit.at(at, 64 * v)) for v in range(n)]
            new = []
            for j, start in enumerate(run.starts):
                a = emit.splat(self.read(emit, start, index), 16)
                new += [self.add(emit, totals[n * j + v], a, w[v]) for v in range(n)]
            return new

        return emit.loop(run.steps, totals, step)

    def read(self, emit: _Emit, start: ir.Value, index: ir.Value) -> ir.Value:
        size = self.unit.width // 8
        word = emit.load(self.unit, emit.at(start, index, size), size)
        return emit.b.zext(word, _I32) if size < 4 else word

    def add(self, emit: _Emit, total: ir.Value, a: ir.Value, w: ir.Value) -> ir.Value:
        counted = emit.call("llvm.ctpop.v16i32", total.type, emit.b.xor(a, w))
        return emit.b.add(total, counted)

    def end(self, emit: _Emit, totals: list[ir.Value], sums: ir.Value) -> None:
        """Store the totals."""
        for k, total in enumerate(totals):
            emit.store(total, emit.at(sums, 64 * k))


class _Floats(_Words):
    """The same with products of floats; one channel a step.

    The order, and vectors of 8 where there are no longer ones, let the sums of three pixels, their
    inputs and one vector of weights fill the 16 registers of AVX2 and not one more.
    """

    def __init__(self, vectors: int, unit: ir.Type) -> None:
        self.width = 16 if "avx512f" in features() else 8
        self.vector = ir.VectorType(_F32, self.width)
        super().__init__(vectors * 16 // self.width, unit)

    def run(self, emit: _Emit, run: _Run, totals: list[ir.Value]) -> list[ir.Value]:
        n, size = self.vectors, 4 * self.width

        def step(index: ir.Value, totals: list[ir.Value]) -> list[ir.Value]:
            values = [emit.load(_F32, emit.at(start, index, 4)) for start in run.starts]
            spread = [emit.splat(value, self.width) for value in values]
            at = emit.at(run.weights, index, n * size)
            new = list(totals)
            for v in range(n):
                w = emit.load(self.vector, emit.at(at, size * v))
                for j, a in enumerate(spread):
                    name = f"llvm.fmuladd.v{self.width}f32"
                    new[n * j + v] = emit.call(name, self.vector, a, w, totals[n * j + v])
            return new

        return emit.loop(run.steps, totals, step, unroll=False)

    def end(self, emit: _Emit, totals: list[ir.Value], sums: ir.Value) -> None:
        for k, total in enumerate(totals):
            emit.store(total, emit.at(sums, 4 * self.width * k))


class _Nibbles(_Words):
    """Totals are bytes: lanes 0-15 count the low nibbles of 16 filters, lanes 16-31 the high ones.

    They are widened to sums of 16 bits in memory. Eight channels a step.
    """

    vector = ir.VectorType(_I8, 32)
    wide = ir.VectorType(_I16, 16)

    def start(self, emit: _Emit, pixels: int, sums: ir.Value) -> list[ir.Value]:
        totals = super().start(emit, pixels, sums)
        for k in range(len(totals)):
            emit.store(ir.Constant(self.wide, None), emit.at(sums, 32 * k))
        return totals

    def run(self, emit: _Emit, run: _Run, totals: list[ir.Value]) -> list[ir.Value]:
        b, n = emit.b, self.vectors

        def step(first: ir.Value, more: int, totals: list[ir.Value]) -> list[ir.Value]:
            tables = []
            for start in run.starts:
                byte = b.zext(emit.load(_I8, emit.at(b.add(start, first), more), 1), _I64)
                tables.append(emit.load(self.vector, emit.at(run.table, byte, 32), 32))
            at = emit.at(run.weights, first, 32 * n)
            w = [emit.load(self.vector, emit.at(at, 32 * (n * more + v)), 32) for v in range(n)]
            return [
                b.add(
                    totals[n * j + v],
                    emit.call("llvm.x86.avx2.pshuf.b", self.vector, tables[j], w[v]),
                )
                for j in range(len(run.starts))
                for v in range(n)
            ]

        totals = emit.unrolled(run.steps, totals, step)
        before = b.block
        inside, after = b.append_basic_block(), b.append_basic_block()
        b.cbranch(b.icmp_signed("!=", run.widen, _I64(0)), inside, after)
        b.position_at_end(inside)
        for k, total in enumerate(totals):
            low, high = (b.zext(emit.half(total, first, 16), self.wide) for first in (0, 16))
            at = emit.at(run.sums, 32 * k)
            emit.store(b.add(emit.load(self.wide, at), b.add(low, high)), at)
        b.branch(after)
        b.position_at_end(after)
        joined = []
        for total in totals:
            joined.append(b.phi(self.vector))
            joined[-1].add_incoming(total, before)
            joined[-1].add_incoming(ir.Constant(self.vector, None), inside)
        return joined

    def end(self, emit: _Emit, totals: list[ir.Value], sums: ir.Value) -> None:
        """Nothing: the last run has widened."""


_TILES: dict[str, type[_Words]] = {"uint8": _Nibbles, "uint32": _Words, "float32": _Floats}


def _epilogue(
    emit: _Emit, lanes: int, parts: ir.Value, flip: ir.Value, row: Callable[[int], ir.Value]
) -> Callable[..., None]:
    """Code of the epilogue for 16 or 32 filters, see `_finish`.

    Args:
        row: the parameters of a row.

    Returns:
        what emits it for some pixels at once, from lists: their values, and addresses of residual,
        numbers and bits.
    """
    b = emit.b
    word = ir.IntType(lanes)
    vector, whole = ir.VectorType(_F32, lanes), ir.VectorType(_I32, lanes)
    zero, none = ir.Constant(vector, None), ir.Constant(whole, None)

    def asked(part: int) -> ir.Value:
        return b.icmp_signed("!=", b.and_(parts, _I64(part)), _I64(0))

    def affine(first: int) -> Callable[[ir.Value], ir.Value]:
        return lambda x: b.fadd(b.fmul(x, row(first)), row(first + 1))

    def prelu(first: int) -> Callable[[ir.Value], ir.Value]:
        def apply(x: ir.Value) -> ir.Value:
            # ReLU is a slope of 0, and a finite floor keeps 0 * -inf from being NaN.
            low = b.fcmp_ordered("<", x, row(first))
            down = b.fmul(b.select(low, row(first), x), row(first + 1))
            return b.select(b.fcmp_ordered(">=", x, zero), x, down)

        return apply

    def group(first: int) -> Callable[[list[ir.Value]], list[ir.Value]]:
        def apply(xs: list[ir.Value]) -> list[ir.Value]:
            for place, part in ((0, affine), (2, prelu), (4, affine)):
                xs = emit.when_each(asked(1 << first + place), xs, part(first + place))
            return xs

        return apply

    def rescale(
        first: int, added: int, residual: list[ir.Value]
    ) -> Callable[[list[ir.Value]], list[ir.Value]]:
        def level(index: int) -> ir.Value:
            return b.bitcast(row(first + index), whole)

        def one(x: ir.Value) -> ir.Value:
            x = b.fptosi(x, whole)
            scale = b.select(b.icmp_signed(">=", x, none), level(0), level(1))
            return b.ashr(b.add(b.mul(x, scale), level(2)), level(3))

        def limit(x: ir.Value) -> ir.Value:
            x = b.select(b.icmp_signed("<", x, level(4)), level(4), x)
            return b.sitofp(b.select(b.icmp_signed(">", x, level(5)), level(5), x), vector)

        def more(xs: list[ir.Value]) -> list[ir.Value]:
            return [
                b.add(x, b.fptosi(emit.load(vector, at), whole))
                for x, at in zip(xs, residual, strict=True)
            ]

        return lambda xs: [limit(x) for x in emit.when(asked(added), [one(x) for x in xs], more)]

    def pixels(
        xs: list[ir.Value], residual: list[ir.Value], numbers: list[ir.Value], bits: list[ir.Value]
    ) -> None:
        def add(xs: list[ir.Value]) -> list[ir.Value]:
            return [b.fadd(x, emit.load(vector, at)) for x, at in zip(xs, residual, strict=True)]

        def store_numbers(xs: list[ir.Value]) -> list[ir.Value]:
            for x, at in zip(xs, numbers, strict=True):
                emit.store(x, at)
            return xs

        def store_bits(xs: list[ir.Value]) -> list[ir.Value]:
            for x, at in zip(xs, bits, strict=True):
                above = b.fcmp_ordered(">=", x, row(LOW))
                below = b.fcmp_ordered("<=", x, row(HIGH))
                within = b.bitcast(b.and_(above, below), word)
                emit.store(b.xor(within, b.trunc(flip, word)), at, lanes // 8)
            return xs

        def clear(x: ir.Value) -> ir.Value:
            return b.select(b.fcmp_ordered(">", row(LIVE), zero), x, zero)

        xs = emit.when(asked(FIRST), xs, group(0))
        xs = emit.when(asked(RESCALE), xs, rescale(0, ADDED, residual))
        xs = emit.when(asked(AGAIN), xs, rescale(GROUP, ADDED_AGAIN, residual))
        xs = emit.when(asked(RESIDUAL), xs, add)
        xs = emit.when(asked(SECOND), xs, group(GROUP))
        xs = emit.when_each(asked(CLEAR), xs, clear)
        xs = emit.when(asked(NUMBERS), xs, store_numbers)
        emit.when(asked(BITS), xs, store_bits)

    return pixels


# Values that the epilogue has in registers at once.
_TOGETHER = 4 * LANES if "avx512f" in features() else LANES


def _at_once(lanes: int) -> int:
    """Pixels that the epilogue does together."""
    return _TOGETHER // lanes


def _row(emit: _Emit, lanes: int, params: ir.Value) -> Callable[[int], ir.Value]:
    """Rows of parameters, each loaded where it is used."""
    return lambda k: emit.load(ir.VectorType(_F32, lanes), emit.at(params, 4 * lanes * k))


def _parameters(emit: _Emit, lanes: int, params: ir.Value) -> Callable[[int], ir.Value]:
    """The same, loaded beforehand: in registers, as far as there are any. What is stored could be
    theirs, for all LLVM knows."""
    row = _row(emit, lanes, params)
    return [row(k) for k in range(ROWS)].__getitem__


def _finish_pixels(
    emit: _Emit, lanes: int, parts: ir.Value, flip: ir.Value, row: Callable[[int], ir.Value],
    values: Callable[[list[ir.Value]], list[ir.Value]], places: tuple[ir.Value, ...],
    count: ir.Value, blocks: ir.Value,
) -> None:  # fmt: skip
    """The epilogue of `count` pixels for one of `blocks` of filters.

    Args:
        values: those of some pixels by their numbers.
        places: addresses of the first one's residual, numbers and bits.
        parts, flip: see `_finish`; row: see `_epilogue`.
    """
    b, n = emit.b, _at_once(lanes)
    pixels = _epilogue(emit, lanes, parts, flip, row)
    apart = [b.mul(blocks, _I64(size)) for size in (4 * lanes, 4 * lanes, lanes // 8)]

    def some(first: ir.Value, many: int) -> None:
        at = [
            [b.add(here, b.mul(by, _I64(k))) for k in range(many)]
            for place, by in zip(places, apart, strict=True)
            for here in [b.add(place, b.mul(first, by))]
        ]
        pixels(values([b.add(first, _I64(k)) for k in range(many)]), *at)

    def repeat(times: ir.Value, first: ir.Value, many: int) -> None:
        def step(index: ir.Value, none: list[ir.Value]) -> list[ir.Value]:
            some(b.add(first, b.mul(index, _I64(many))), many)
            return []

        emit.each(times, [], step, unroll=False)

    whole = b.udiv(count, _I64(n))
    done = b.mul(whole, _I64(n))
    repeat(whole, _I64(0), n)
    if n > 1:
        repeat(b.sub(count, done), done, 1)


@intrinsic
def _finish(
    typing: Any, weights: Any, constants: Any, flips: Any, constant: Any, kinds: Any, sums: Any,
    parts: Any, params: Any, flip: Any, places: Any, residual: Any, numbers: Any, bits: Any,
    blocks: Any,
) -> tuple[Any, Callable[..., ir.Value]]:  # fmt: skip
    """The epilogue of a tile, for 32 filters or 16: as many as an element of `flips` has bits.

    The types of the arrays ``weights`` and ``constants`` say what the sums are: popcounts (``x =
    constant - 2 * sum``), as uint16 from the weights of `_Nibbles`, else as int32; or floats
    (``x = constant + sum``). Addresses: ``constant`` of the border classes' constants, ``sums``
    of the tile's, ``params`` of `ROWS` rows; ``kinds`` and ``places`` of an int64 a pixel, its
    class and, in words of filters, where it lies in ``residual``, ``numbers`` and ``bits``.
    ``parts``: which parts to do; ``flip``: a word of bits to negate; ``blocks`` of filters.
    """
    kind = np.dtype(str(weights.dtype))
    lanes = flips.dtype.bitwidth
    vector, whole = ir.VectorType(_F32, lanes), ir.VectorType(_I32, lanes)
    P, n = tile_pixels(kind, lanes), _at_once(lanes)
    wide = 2 if kind == np.uint8 else 4  # bytes of a sum

    def body(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        (_, _, _, constant, kinds, sums, parts, params, flip, places, residual, numbers, bits,
         blocks) = args  # fmt: skip
        emit, b = _Emit(builder), builder
        pixels = _epilogue(emit, lanes, parts, flip, _row(emit, lanes, params))

        def value(j: ir.Value) -> ir.Value:
            mine = b.mul(emit.load(_I64, emit.at(kinds, j, 8)), blocks)
            start, total = emit.at(constant, mine, 4 * lanes), emit.at(sums, j, lanes * wide)
            if constants.dtype != types.int32:
                return b.fadd(emit.load(vector, start), emit.load(vector, total))
            minus = emit.load(ir.VectorType(ir.IntType(8 * wide), lanes), total)
            minus = b.zext(minus, whole) if wide < 4 else minus
            return b.sitofp(b.sub(emit.load(whole, start), b.add(minus, minus)), vector)

        def some(index: ir.Value, none: list[ir.Value]) -> list[ir.Value]:
            these = [b.add(b.mul(index, _I64(n)), _I64(k)) for k in range(n)]
            where = [emit.load(_I64, emit.at(places, j, 8)) for j in these]
            at = [[emit.at(place, one, size) for one in where]
                  for place, size in ((residual, 4 * lanes), (numbers, 4 * lanes),
                                      (bits, lanes // 8))]  # fmt: skip
            pixels([value(j) for j in these], *at)
            return []

        assert P % n == 0
        emit.loop(_I64(P // n), [], some, unroll=False)
        return context.get_dummy_value()

    return types.void(weights, constants, flips, *[types.int64] * 11), body


@intrinsic
def _compare(
    typing: Any, weights: Any, constants: Any, flips: Any, limits: Any, kinds: Any, sums: Any,
    flip: Any, places: Any, bits: Any, blocks: Any,
) -> tuple[Any, Callable[..., ir.Value]]:  # fmt: skip
    """`_finish` where bits are all that is wanted: of the popcounts as they are, which takes half
    of the vectors or less. Addresses: ``limits`` of those of the classes, see
    `convolve`.
    """
    kind = np.dtype(str(weights.dtype))
    lanes = flips.dtype.bitwidth
    word = ir.IntType(lanes)
    size = 2 if kind == np.uint8 else 4
    vector = ir.VectorType(ir.IntType(8 * size), lanes)

    def body(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        _, _, _, limits, kinds, sums, flip, places, bits, blocks = args
        emit, b = _Emit(builder), builder
        if constants.dtype == types.int32:
            for j in range(tile_pixels(kind, lanes)):
                mine = b.mul(emit.load(_I64, emit.at(kinds, j, 8)), b.add(blocks, blocks))
                at = emit.at(limits, mine, lanes * size)
                least, reach = emit.load(vector, at), emit.load(vector, emit.at(at, lanes * size))
                count = emit.load(vector, emit.at(sums, j, lanes * size))
                within = b.bitcast(b.icmp_unsigned("<=", b.sub(count, least), reach), word)
                place = emit.load(_I64, emit.at(places, j, 8))
                at = emit.at(bits, place, lanes // 8)
                emit.store(b.xor(within, b.trunc(flip, word)), at, lanes // 8)
        return context.get_dummy_value()

    return types.void(weights, constants, flips, *[types.int64] * 7), body


@intrinsic
def _finish_alone(
    typing: Any, flips: Any, x: Any, parts: Any, params: Any, flip: Any, residual: Any,
    numbers: Any, bits: Any, count: Any, blocks: Any,
) -> tuple[Any, Callable[..., ir.Value]]:  # fmt: skip
    """The same for `count` pixels of stored numbers, at the address ``x``."""
    lanes = flips.dtype.bitwidth
    vector = ir.VectorType(_F32, lanes)

    def body(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        _, x, parts, params, flip, residual, numbers, bits, count, blocks = args
        emit = _Emit(builder)

        def values(numbers: list[ir.Value]) -> list[ir.Value]:
            # A sum with 0, as behind a convolution: -0 becomes 0.
            zero = ir.Constant(vector, None)
            at = [emit.at(x, builder.mul(one, blocks), 4 * lanes) for one in numbers]
            return [builder.fadd(zero, emit.load(vector, one)) for one in at]

        places = residual, numbers, bits
        row = _row(emit, lanes, params)
        _finish_pixels(emit, lanes, parts, flip, row, values, places, count, blocks)
        return context.get_dummy_value()

    return types.void(flips, *[types.int64] * 9), body


# ---- kernels ----------------------------------------------------------------------------------


@njit(cache=True, nogil=True)
def convolve(
    x: Array, strip: int, images: int, weights: Array, stretch: int, table: Array, runs: Array,
    spans: Array, starts: Array, classes: Array, constants: Array, limits: Array, by_image: bool,
    P: int, parts: int, params: Array, flips: Array, residual: Array, numbers: Array, bits: Array,
) -> None:  # fmt: skip
    """A convolution, of bits or of floats, with its epilogue.

    Args:
        x: the input, any shape.
        strip: bytes of one image of it.
        images: B.
        weights: flat, see `_tile`; one block of filters after the other, `stretch` numbers each.
        table: the 256 tables of `_Nibbles`.
        runs: int64 (n,4), see `_tile`.
        spans: int64 (classes,2): the runs of a border class, first and number.
        starts: int64 (positions,): where the window of an output starts in an image of x, in bytes.
        classes: int64 (positions,): its border class.
        constants: (classes, filters), see `_finish`.
        limits: unsigned (classes, blocks, 2, lanes), of the type of a sum: where bits are all that
            is wanted, which popcounts become a bit of 1: from the first so many more. Else empty.
        by_image: whether a tile is one position of P images, or P positions as they come.
        parts, params, flips: the epilogue's; params (blocks, `ROWS`, lanes), flips (blocks,).
        residual, numbers: float32 (B, positions, lanes * blocks); bits: (B, positions, blocks).
    """
    positions = len(starts)
    blocks = len(params)
    origins = np.empty(P, np.int64)
    firsts = np.empty(P, np.int64)
    pixels = np.empty(P, np.int64)
    places = np.empty(P, np.int64)
    kinds = np.empty(P, np.int64)
    lanes = flips.itemsize * 8
    sums = np.empty(P * lanes + 16, np.int32)
    sums_at = (sums.ctypes.data + 63) // 64 * 64
    x_at, table_at, runs_at = x.ctypes.data, table.ctypes.data, runs.ctypes.data
    residual_at, numbers_at, bits_at = residual.ctypes.data, numbers.ctypes.data, bits.ctypes.data
    counted = limits.size > 0
    total = images * positions
    outer = (images + P - 1) // P if by_image else 1
    inner = positions if by_image else (total + P - 1) // P
    for block in range(blocks):
        part = weights[block * stretch :]
        constants_at = constants.ctypes.data + block * lanes * 4
        params_at = params.ctypes.data + block * ROWS * lanes * 4
        limits_at = limits.ctypes.data + block * 2 * lanes * limits.itemsize
        flip = np.int64(flips[block])
        image, position, place = 0, 0, 0
        for i in range(outer):
            if by_image:
                for j in range(P):
                    # Beyond the end the last pixel is done again, which changes nothing.
                    image = min(i * P + j, images - 1)
                    origins[j] = x_at + image * strip
                    firsts[j] = image * positions * blocks + block
            for k in range(inner):
                if by_image:
                    for j in range(P):
                        pixels[j] = origins[j] + starts[k]
                        places[j] = firsts[j] + k * blocks
                        kinds[j] = classes[k]
                else:
                    for j in range(P):
                        pixels[j] = x_at + image * strip + starts[position]
                        places[j] = place * blocks + block
                        kinds[j] = classes[position]
                        if place + 1 < total:
                            place += 1
                            position += 1
                            if position == positions:
                                position = 0
                                image += 1
                begin = runs_at + spans[kinds[0], 0] * 32
                _tile(
                    x, part, flips, pixels.ctypes.data, table_at, begin, spans[kinds[0], 1], sums_at
                )  # type: ignore[call-arg]
                if counted:
                    _compare(
                        weights, constants, flips, limits_at, kinds.ctypes.data, sums_at, flip,
                        places.ctypes.data, bits_at, blocks,
                    )  # fmt: skip
                else:
                    _finish(
                        weights, constants, flips, constants_at, kinds.ctypes.data, sums_at, parts,
                        params_at, flip, places.ctypes.data, residual_at, numbers_at, bits_at,
                        blocks,
                    )  # fmt: skip
    sums[0] = 0  # numba would free it after its last use, and sums_at is none


@njit(cache=True, nogil=True)
def finish(
    x: Array, parts: int, params: Array, flips: Array, residual: Array,
    numbers: Array, bits: Array,
) -> None:  # fmt: skip
    """The epilogue alone, on stored numbers: x float32 (B, positions, lanes * blocks)."""
    blocks = len(params)
    lanes = flips.itemsize * 8
    places = x.size // (lanes * blocks)
    x_at, params_at = x.ctypes.data, params.ctypes.data
    residual_at, numbers_at, bits_at = residual.ctypes.data, numbers.ctypes.data, bits.ctypes.data
    # Blocks of filters by turns, so that maps are read and written from one end to the other.
    many = places if blocks == 1 else _TOGETHER // lanes
    for first in range(0, places, many):
        for block in range(blocks):
            place = first * blocks + block
            _finish_alone(  # type: ignore[call-arg]
                flips, x_at + place * lanes * 4, parts, params_at + block * ROWS * lanes * 4,
                np.int64(flips[block]), residual_at + place * lanes * 4,
                numbers_at + place * lanes * 4, bits_at + place * lanes // 8,
                min(many, places - first), blocks,
            )  # fmt: skip


@njit(cache=True, nogil=True)
def normalize(x: Array, scale: Array, shift: Array, out: Array) -> None:
    """Bytes (B,H,W,C) times scale (C,), plus shift, into (B,H,W,S)."""
    images, high, wide, channels = x.shape
    for n in range(images):
        for i in range(high):
            for j in range(wide):
                for c in range(channels):
                    out[n, i, j, c] = np.float32(x[n, i, j, c]) * scale[c] + shift[c]
                for c in range(channels, out.shape[3]):
                    out[n, i, j, c] = 0


@njit(cache=True, nogil=True)
def pool(
    x: Array, kernel: int, stride: int, pad: int, divisor: Array, factor: Array, maximum: bool,
    out: Array,
) -> None:  # fmt: skip
    """Max or average pooling of (B,H,W,S); sums are divided by divisor (Ho,Wo), times factor."""
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
                                # NaN wins, as in numpy and torch.
                                up = tap[c] > room[c] or tap[c] != tap[c]
                                room[c] = tap[c] if up else room[c]
                        else:
                            for c in range(channels):
                                room[c] += tap[c]
                        first = False
                if not maximum:
                    by, times = divisor[i, j], factor[i, j]
                    for c in range(channels):
                        room[c] = room[c] / by * times


@njit(cache=True, nogil=True)
def pool_bits(x: Array, kernel: int, stride: int, pad: int, turn: Array, out: Array) -> None:
    """Max pooling of words of bits (B,H,W,words), or where `turn` (words,) is 1 min pooling."""
    images, high, wide, words = out.shape
    for n in range(images):
        for i in range(high):
            for j in range(wide):
                room = out[n, i, j]
                room[:] = 0
                for y in range(
                    max(0, i * stride - pad), min(x.shape[1], i * stride - pad + kernel)
                ):
                    for z in range(
                        max(0, j * stride - pad), min(x.shape[2], j * stride - pad + kernel)
                    ):
                        for w in range(words):
                            room[w] |= x[n, y, z, w] ^ turn[w]
                for w in range(words):
                    room[w] ^= turn[w]
