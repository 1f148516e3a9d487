"""Compiled kernels (numba): the same results as `bnncore.packed.numpy_kernels`, many times faster.

How values look between steps (all have the image as their first axis):

- numbers: float32 (B,H,W,S), S >= C channels of which those from C on are 0; ``(B,F)`` is held as
  (B,1,1,S). Integers are held as floats too, exactly: no sum is above 2**24. S is a multiple of 32,
  or 16 where that is enough; but for the input of the first convolution, where S = C.
- bits: uint32 (B,H,W,words), channel ``c`` in bit ``c % 32`` of word ``c // 32``, spare bits 0; or
  one uint16 where that is enough.
- a step that gives both the numbers and, through a threshold, the next layer's bits: `_Both`.

What follows a convolution is fused into it as far as the epilogue of `bnncore.packed.tiles` goes.

**Zero padding** is exact and nearly free. Which taps of a window lie outside the map depends on the
position alone, and few such *border classes* exist. A tile holds the same position of several
images and leaves those taps out; where images are few it holds several positions of one image
instead, reads zero bits from a padded copy, and the constant of its class takes them out again:
``sum of products = constant[class, filter] - 2 * popcount``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from sys import getrefcount
from threading import Lock
from typing import Any, NamedTuple, TypeVar

import numpy as np

from bnncore.packed import numpy_kernels, tiles
from bnncore.packed.execute import Step
from bnncore.packed.program import Node, Program, Shape, Tensor, unpack_bits
from bnncore.packed.rules import MAX_TAPS, validate
from bnncore.packed.tiles import LANES

IMAGES_FIRST = True

Array = np.ndarray
T = TypeVar("T")

_MOST_RUNS = 1 << 16  # of a layer, with its padding left out

# ---- layouts ----------------------------------------------------------------------------------


def _aligned(array: Array) -> Array:
    """A C-ordered copy that starts at a cache line."""
    room = np.empty(array.nbytes + 64, np.uint8)
    start = -room.ctypes.data % 64
    copy = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def _lanes(channels: int) -> int:
    """Channels of a word, and filters of a tile, for a value of so many channels."""
    return 16 if channels <= 16 else LANES


def _up(channels: int) -> int:
    """Round up to whole words, or tiles."""
    return -(-channels // _lanes(channels)) * _lanes(channels)


def _table() -> Array:
    """(256,32): popcount(a ^ w) for nibbles w; of the low nibble of byte a, then of the high."""
    byte, nibble = np.arange(256)[:, None], np.arange(16)[None, :]
    counts = [np.bitwise_count((byte & 15) ^ nibble), np.bitwise_count((byte >> 4) ^ nibble)]
    return _aligned(np.concatenate(counts, axis=1).astype(np.uint8))


def _to_words(bits: Array) -> Array:
    """Booleans (..., C) -> unsigned (..., words)."""
    packed = np.packbits(bits, axis=-1, bitorder="little")
    room = np.zeros((*bits.shape[:-1], _up(bits.shape[-1]) // 8), np.uint8)
    room[..., : packed.shape[-1]] = packed
    return room.view(_word(bits.shape[-1]))


def _word(channels: int) -> np.dtype:
    return np.dtype("<u4" if _lanes(channels) == 32 else "<u2")


def _lay_out(rows: Array, dtype: np.dtype) -> Array:
    """Weights for the tiles: words of bits, or floats, (O, n) -> (blocks, numbers of a block)."""
    filters = len(rows)
    whole = np.zeros((_up(filters), rows.shape[1]), rows.dtype)
    whole[:filters] = rows
    lanes = _lanes(filters)
    blocks = len(whole) // lanes
    if dtype != np.uint8:
        steps = whole.reshape(blocks, lanes, -1).transpose(0, 2, 1)
        return _aligned(steps.astype(dtype)).reshape(blocks, -1)
    # Per block and step: vectors of 16 low nibbles and 16 high ones of 16 filters.
    bytes_ = whole.view(np.uint8).reshape(blocks, lanes // 16, 16, -1)
    nibbles = np.stack([bytes_ & 15, bytes_ >> 4], axis=2)
    return _aligned(nibbles.transpose(0, 4, 1, 2, 3)).reshape(blocks, -1)


class _Geometry(NamedTuple):
    """Where the windows of a convolution lie; see `tiles.convolve`."""

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


class _Rooms:
    """Memory for values, taken again as soon as no array refers to it any more.

    Fresh memory costs a page fault every 4 KiB, and what was just let go is still in the cache.
    """

    def __init__(self) -> None:
        self.lock = Lock()
        self.held: list[Array] = []  # smallest first

    def take(self, shape: tuple[int, ...], dtype: np.dtype) -> Array:
        """An array of anything, aligned to a cache line."""
        size = math.prod(shape) * dtype.itemsize
        with self.lock:
            # Referred to by the list, the loop and the call, so by no array that looks into it.
            free = [room for room in self.held if getrefcount(room) <= 3]
            fitting = [room for room in free if room.nbytes >= size + 64]
            if fitting:
                room = fitting[0]
            else:
                room = np.empty(size + 64, np.uint8)
                kept = [old for old in self.held if not free or old is not free[-1]]
                self.held = sorted([*kept, room], key=lambda room: room.nbytes)
            start = -room.ctypes.data % 64
            return room[start : start + size].view(dtype).reshape(shape)


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
    """Steps for `bnncore.packed.execute`, with what follows a convolution fused into it.

    Args:
        binary: the type of weights, and so the tile, of binary convolutions (default: the fastest
            here, see `tiles.binary_tile`).
    """
    return _Planner(program, binary or tiles.binary_tile()).steps()


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
        self.rooms = _Rooms()

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
        chain = _Chain(self.program, self.shapes[index + 1].dims[-1], self.rooms)
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
            tiles.finish(x, zeros, *chain.params(member), residual, out.numbers, out.bits)
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
        if kernel[0] * kernel[1] * stored > tiles.LONGEST:
            dtype = np.dtype("u4") if binary else dtype
        window = _Window.of(
            kernel,
            int(node.attrs.get("stride", 1)),
            int(node.attrs.get("pad", 0)),
            inputs[:2],
            outputs[:2],
        )
        lanes, word = _lanes(filters), _lanes(inputs[2])
        if dtype == np.uint8:
            steps, unit, step, longest = stored // 8, 1, 2 * lanes, tiles.BYTE_STEPS
        elif binary:
            steps, unit, step, longest = stored // word, word // 8, 4 * lanes, 0
        else:
            steps, unit, step, longest = stored, 4, 4 * lanes, 0
        around = _geometry(window, steps, unit, step, longest, False)
        # Not worth it, nor the memory, where nearly every position is a class of its own.
        few = window.classes * len(around.runs) <= _MOST_RUNS
        inner = _geometry(window, steps, unit, step, longest, True) if few and window.pad else None
        share = window.share()
        pixels = tiles.tile_pixels(dtype, lanes)
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
            x = values[0] if binary else _numbers(values[0])
            images = len(x)
            weights, inside, whole = prepared(member)
            # Tiles of images leave out padding, but the last ones may be half empty.
            skip = inner is not None and -(-images // pixels) * pixels * share < images
            if window.pad and not skip:
                x = _pad(x, window.pad)
            out, residual = chain.outputs((images, *outputs[:2]), values)
            lay = inner if skip else around
            assert lay is not None
            strip = x.shape[1] * x.shape[2] * steps * unit
            if dtype == np.uint8:
                x = x.view(np.uint8)  # read by the byte, whatever its words
            tiles.convolve(
                x, strip, images, weights.reshape(-1),
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
        rooms = self.rooms

        def run(values: Sequence[Any], member: int) -> Array:
            x = _numbers(values[0])
            out = rooms.take((len(x), *divisor.shape, x.shape[3]), x.dtype)
            tiles.pool(x, kernel, stride, pad, divisor, maximum, out)
            return out

        return run

    def joins(self, node: Node) -> bool:
        """Whether the parts of a concatenation end where words do."""
        return not any(self.shapes[number].dims[-1] % LANES for number in node.inputs)

    def through_numpy(self, index: int, node: Node) -> Callable[..., Array]:
        """Any operator, by `bnncore.packed.numpy_kernels`."""
        shapes = [self.shapes[number] for number in node.inputs]
        shape = self.shapes[index + 1]
        bound = numpy_kernels._Bound(self.program, node, shapes, shape)
        plain = numpy_kernels._BUILD[node.op](bound)
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
        return room.view(_word(shape.dims[-1]))
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
    """One member's copy of binary weights (O,kh,kw,C), as (O,kh,kw,words)."""
    tensor = _copy(tensor, member)
    if tensor.shape[-1] % _lanes(tensor.shape[-1]) == 0:
        return tensor.data.view(_word(tensor.shape[-1])).reshape(*tensor.shape[:-1], -1)
    return _to_words(unpack_bits(tensor))


def _float_weights(slots: dict[str, Tensor], member: int) -> Array:
    weight = _plain(slots["weight"], member)
    if weight.dtype == bool:
        return np.where(weight, np.float32(1), np.float32(-1))
    if "weight_scale" in slots:
        scale = _plain(slots["weight_scale"], member)
        weight = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
    return weight


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
        ("affine", 0), ("prelu", 2), ("affine", 4), ("add", -1),
        ("affine", tiles.GROUP), ("prelu", tiles.GROUP + 2), ("affine", tiles.GROUP + 4),
    )  # fmt: skip

    def __init__(self, program: Program, channels: int, rooms: _Rooms) -> None:
        self.program, self.channels, self.rooms = program, channels, rooms
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
        self.parts = tiles.NUMBERS * numbers | tiles.BITS * (self.level is not None)
        self.parts |= tiles.RESIDUAL * (self.residual is not None)
        for row in self.rows:
            self.parts |= tiles.FIRST if row < tiles.GROUP else tiles.SECOND
        if numbers and self.channels % _lanes(self.channels):
            self.parts |= tiles.CLEAR  # infinity times the weights of no filter is not 0
        nodes = [*self.rows.values(), *([self.level] if self.level else [])]
        names = [name for node in nodes for name in node.tensors.values()]
        self.params = _each_member(
            self.prepare, {name: self.program.tensors[name] for name in names}
        )

    def prepare(self, member: int) -> tuple[int, Array, Array]:
        count = self.channels
        rows = np.zeros((tiles.ROWS, _up(count)), np.float32)
        for first in (0, tiles.GROUP):
            rows[[first, first + 3, first + 4], :count] = 1  # as good as nothing
            rows[first + 2] = -np.inf

        def get(node: Node, slot: str) -> Array | None:
            name = node.tensors.get(slot)
            return None if name is None else _plain(self.program.tensors[name], member)

        for row, node in self.rows.items():
            if node.op == "affine":
                scale, shift = get(node, "scale"), get(node, "shift")
                rows[row, :count] = 1 if scale is None else scale
                rows[row + 1, :count] = 0 if shift is None else shift
            elif node.op == "prelu":
                rows[row + 1, :count] = get(node, "slope")
            else:
                rows[row, :count], rows[row + 1, :count] = np.finfo(np.float32).min, 0
        flips = np.zeros(_up(count), bool)
        rows[tiles.LIVE, :count] = 1
        rows[tiles.LOW] = np.inf  # no bit beyond the last channel
        rows[tiles.HIGH, :count] = np.inf
        if self.level is not None:
            node = self.level
            if node.op == "sign":
                rows[tiles.LOW, :count] = 0
            elif node.op == "threshold":
                level, up = get(node, "threshold"), get(node, "direction")
                assert level is not None
                up = np.ones(count, bool) if up is None else up
                rows[tiles.LOW, :count] = np.where(up, level, -np.inf)
                rows[tiles.HIGH, :count] = np.where(up, np.inf, level)
            else:
                rows[tiles.LOW, :count], rows[tiles.HIGH, :count] = (
                    get(node, "low"),
                    get(node, "high"),
                )
                keep = get(node, "inside")
                flips[:count] = False if keep is None else ~keep
        params = np.ascontiguousarray(
            rows.reshape(tiles.ROWS, -1, _lanes(count)).transpose(1, 0, 2)
        )
        return self.parts, _aligned(params), _to_words(flips)

    def outputs(self, shape: tuple[int, ...], values: Sequence[Any]) -> tuple[_Both, Array]:
        """Room for the results, and the residual."""
        lanes = _lanes(self.channels)
        blocks = _up(self.channels) // lanes
        none = (0, 0, 0, 0)
        numbers = (*shape, blocks * lanes) if self.parts & tiles.NUMBERS else none
        bits = (*shape, blocks) if self.parts & tiles.BITS else none
        residual = (
            _numbers(values[-1]) if self.parts & tiles.RESIDUAL else np.empty(none, np.float32)
        )
        both = _Both(
            self.rooms.take(numbers, np.dtype("f4")), self.rooms.take(bits, _word(self.channels))
        )
        return both, residual


_BITS_OF = ("sign", "threshold", "interval")
_SUMS = ("bconv", "conv", "dense")
_POOLS = ("maxpool", "avgpool", "global_avg")
_ANCHORS = (*_SUMS, *_BITS_OF, "affine", "prelu", "relu", "add")
