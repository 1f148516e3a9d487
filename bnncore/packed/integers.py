"""A Program of floats as one of integers alone, from the image's bytes to the members' outputs.

Sums of binary layers are integers already. What floats did to them (scales, norms, PReLUs) becomes
one `rescale` as soon as somebody needs the numbers, and moves into thresholds where only their sign
matters. Numbers are held in *units*: an integer x stands for ``x / units``, and what is added has
the same ones. Ranges, and so units, come from validation images (`ranges`), with room for twice as
much, but for what sums read that leave their terms few bits (`_Converter.within`); beyond, numbers
saturate.

Lossy: numbers are rounded to 16 bits, weights of floats to 8. What comes out computes the same
integers everywhere (`docs/format.md`).

Legend: as in `packed.program`. Arrays of parameters have a leading axis of M, or of 1 where shared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from bnncore.packed import borders, execute, numpy_kernels
from bnncore.packed.program import (
    KINDS,
    Node,
    PackedFormatError,
    Program,
    Tensor,
    pack_bits,
    unpack_bits,
)
from bnncore.packed.rules import (
    LEAST_FRACTION,
    MAX_INT,
    MOST_FRACTION,
    infer,
    largest_sum,
    validate,
)

Array = np.ndarray

TOP = 32767  # of 16 bits; the smallest is one further from 0, which processors saturate to
OUTPUT = 8191  # of members' outputs: 1,024 of them add up within 2**24
ROOM = 2.0  # how much larger than on validation images numbers may become
SHARED_VOTES, ALL_VOTES = 1 << 10, 1 << 23  # into how many parts votes are weighed
EVEN = 0.15  # by which scales of channels may differ, see `even`
IMAGES = 256  # enough to see ranges
SUMS = MAX_INT >> 3  # of products: leaves their factors ten bits of the 31 that a product has


class IntegerError(PackedFormatError):
    """What integers cannot do; names the layer."""


@dataclass(frozen=True)
class _Real:
    """What a value of floats has become: ``clip(value * scale + shift + second, low, high)``.

    Attributes:
        value: of integers, or the image (0).
        scale, shift: (M or 1, C).
        own: whether they are a member's own.
        slope: instead of scale where the value is below 0.
        units: where the value alone says it all: ``value / units``.
        second: a value that is added, in the units of the result.
        low, high: limits.
    """

    value: int
    scale: Array
    shift: Array
    own: bool
    slope: Array | None = None
    units: float | None = None
    second: int | None = None
    low: float = -math.inf
    high: float = math.inf

    @property
    def linear(self) -> bool:
        return self.slope is None and self.second is None and not self.limited

    @property
    def limited(self) -> bool:
        return self.low > -math.inf or self.high < math.inf


def ranges(program: Program, images: Array) -> list[float]:
    """The largest size of every value on some of these images (B,H,W,C) uint8."""
    shapes = validate(program)
    found = [0.0] * len(shapes)
    steps = numpy_kernels.plan(program)
    step = max(1, len(images) // IMAGES)
    for batch in np.array_split(images[::step][:IMAGES], 8):
        for member in range(program.members if len(batch) else 0):
            for number, value in execute.every_value(steps, batch, member).items():
                if shapes[number].kind in ("f32", "i32"):
                    found[number] = max(found[number], float(np.abs(value).max(initial=0)))
    return found


def converted(program: Program, sizes: Sequence[float] | None, alike: bool = False) -> Program:
    """`program` with integers alone.

    Args:
        program: of floats, not narrowed.
        sizes: from `ranges`; None for a drawing, whose tensors take no memory, nor do these.
        alike: of a drawing, whether the image's channels will be (`even`), which takes least.

    Raises:
        IntegerError: a layer needs larger integers than there are.
    """
    return _Converter(program, sizes, alike).run()


def even(scale: Array) -> bool:
    """Whether channels' scales differ so little that binary weights of bytes stay binary."""
    return bool(np.ptp(scale) <= EVEN * np.abs(scale).max())


def in_order(program: Program) -> Program:
    """The same Program, what a rescaling adds made before what it rescales: sums need not wait."""
    order: list[int] = []  # values, of nodes
    todo = [len(program.nodes)]
    while todo:
        number = todo[-1]
        inputs = program.nodes[number - 1].inputs
        missing = [source for source in inputs if source and source not in order]
        if missing:
            todo.append(missing[-1])
        else:
            todo.pop()
            if number not in order:
                order.append(number)
    place = {0: 0, **{number: at for at, number in enumerate(order, 1)}}
    nodes = [program.nodes[number - 1] for number in order]
    moved = [replace(n, inputs=tuple(place[source] for source in n.inputs)) for n in nodes]
    used = {name for node in moved for name in node.tensors.values()}
    used |= set(program.combine_tensors.values())
    tensors = {name: tensor for name, tensor in program.tensors.items() if name in used}
    return replace(program, nodes=tuple(moved), tensors=tensors)


class _Converter:
    def __init__(
        self, program: Program, sizes: Sequence[float] | None, alike: bool = False
    ) -> None:
        self.program, self.drawn = program, sizes is None
        self.alike = alike or program.image[2] == 1
        self.old = validate(program)
        self.sizes = [1.0] * len(self.old) if sizes is None else sizes
        self.users = [0] * len(self.old)
        for node in program.nodes:
            for source in node.inputs:
                self.users[source] += 1
        self.made = replace(program, nodes=(), tensors={}, combine_tensors={})
        self.nodes: list[Node] = []
        self.shapes = self.old[:1]
        self.kept: dict[str, str] = {}  # tensors taken over
        self.reals: dict[int, _Real] = {}
        self.bits: dict[int, int] = {}
        self.groups = self.same_units()

    def run(self) -> Program:
        last = len(self.program.nodes)
        for number, node in enumerate(self.program.nodes, 1):
            if self.old[number].kind == "bits":
                self.bits[number] = self.to_bits(node, number)
                continue
            self.reals[number] = real = _NUMBERS[node.op](self, node, number)
            if self.users[number] > 1 and real.units is None and real.value:
                self.stored(number)
        self.output(last)
        return in_order(replace(self.made, nodes=tuple(self.nodes)))

    # units

    def same_units(self) -> list[int]:
        """For each value another that has the same units: what is added or joined."""
        group = list(range(len(self.old)))

        def root(number: int) -> int:
            while group[number] != number:
                number = group[number]
            return number

        for number, node in enumerate(self.program.nodes, 1):
            joins = node.op in ("add", "concat", "relu", "clip")
            if joins or (node.op == "affine" and "scale" not in node.tensors):
                for source in node.inputs:
                    group[root(source)] = root(number)
        return [root(number) for number in group]

    def units(self, number: int) -> float:
        mine = self.groups[number]
        size = max(s for s, other in zip(self.sizes, self.groups, strict=True) if other == mine)
        return TOP / (ROOM * size) if size else 1.0

    # the new Program

    def emit(
        self,
        op: str,
        node: Node,
        inputs: Sequence[int],
        slots: dict[str, Tensor | str] | None = None,
        attrs: dict[str, int | float] | None = None,
    ) -> int:
        names = {}
        for slot, tensor in (slots or {}).items():
            name = f"{len(self.nodes)}.{slot}"
            if isinstance(tensor, str):  # of the old table
                name = self.kept.setdefault(tensor, name)
                tensor = self.program.tensors[tensor]
            names[slot] = name
            self.made.tensors[name] = tensor
        made = Node(op, node.name, tuple(inputs), names, attrs or {})
        try:
            self.shapes.append(infer(len(self.nodes), made, self.made, self.shapes))
        except ValueError as error:
            raise IntegerError(f"layer {node.name!r}, as integers: {error}") from None
        self.nodes.append(made)
        return len(self.nodes)

    def floats(self, node: Node, slot: str) -> tuple[Array, bool]:
        """(M or 1, ...) float64, and whether they are own."""
        tensor = self.program.tensors[node.tensors[slot]]
        if self.drawn:
            many = tensor.shape if len(tensor.shape) > 1 else (1,)
            return np.broadcast_to(0.0, (1, *many)), tensor.own
        data = 2.0 * unpack_bits(tensor) - 1 if tensor.kind == "binary" else tensor.data
        return (data if tensor.own else data[None]).astype(np.float64), tensor.own

    def tensor(
        self, kind: str, role: str, array: Array, own: bool, size: int | None = None
    ) -> Tensor:
        """Of values (M or 1, ...), or of `size` channels (M or 1, C or 1)."""
        shape = array.shape[1:] if size is None else (size,)
        array = array if kind == "binary" else array.astype(KINDS[kind], copy=False)
        array = np.broadcast_to(array, (self.program.members if own else 1, *shape))
        data = array if own else array[0]
        if kind == "binary":
            return Tensor(kind, role, shape, own, pack_bits(data, own))
        return Tensor(kind, role, shape, own, data if self.drawn else np.ascontiguousarray(data))

    def plain(self, value: int, units: float) -> _Real:
        one = np.full((1, 1), 1 / units)
        return _Real(value, one, 0 * one, False, units=units)

    def stored(self, number: int) -> _Real:
        """The value as integers in its group's units."""
        real, units = self.reals[number], self.units(number)
        if real.units != units or self.shapes[real.value].bound > TOP + 1:
            self.reals[number] = self.rescaled(self.node(number), real, units, TOP)
        return self.reals[number]

    def alone(self, number: int) -> _Real:
        """The value as integers in any units."""
        return self.reals[number] if self.reals[number].units else self.stored(number)

    def within(self, number: int, bound: int) -> _Real:
        """The value as integers up to `bound`, and without `ROOM`: a bit is worth more there."""
        real = self.reals[number]
        if bound > TOP or real.second is not None:
            real = self.alone(number)
        if real.units and self.shapes[real.value].bound <= bound:
            return real
        top = min(bound, TOP)
        if top < 1:
            name = self.node(number).name
            raise IntegerError(
                f"layer {name!r}: expected sums that 2**24 can hold, got larger ones"
            )
        return self.rescaled(self.node(number), real, top / (self.sizes[number] or 1), top)

    def node(self, number: int) -> Node:
        return self.program.nodes[number - 1]

    def rescaled(self, node: Node, real: _Real, units: float, top: int) -> _Real:
        bound = self.shapes[real.value].bound
        added = 0 if real.second is None else self.shapes[real.second].bound
        scale, shift = real.scale * units, real.shift * units
        slope = None if real.slope is None else real.slope * units
        steep = max(float(np.abs(a).max()) for a in (scale, slope) if a is not None)
        far = bound * steep + 2 * top + added + 1  # beyond, all is saturated anyway
        shift = np.clip(shift, -far, far)
        largest = bound * steep + float(np.abs(shift).max()) + 0.5
        most = min(32767 / (steep or 1), (2**31 - 2 - bound - added) / largest)
        right = int(np.clip(math.floor(math.log2(most)), 0, 30))
        half = (1 << right) >> 1
        channels = self.shapes[real.value].dims[-1]

        def whole(array: Array, kind: str, more: int = 0) -> Tensor:
            limit = np.iinfo(KINDS[kind]).max
            role = {"int16": "scale", "int32": "shift"}[kind]
            data = np.clip(np.rint(array * 2.0**right) + more, -limit, limit)
            return self.tensor(kind, role, data, real.own, channels)

        slots: dict[str, Tensor | str] = {
            "scale": whole(scale, "int16"), "shift": whole(shift, "int32", half),
        }  # fmt: skip
        if slope is not None:
            slots["slope"] = replace(whole(slope, "int16"), role="slope")
        least = -top - 1 if top == TOP else -top
        low, high = (round(np.clip(x * units, least, top)) for x in (real.low, real.high))
        inputs = [real.value] if real.second is None else [real.value, real.second]
        attrs = {"right": right, "low": low, "high": high}
        return self.plain(self.emit("rescale", node, inputs, slots, attrs), units)

    # numbers

    def normalize(self, node: Node, number: int) -> _Real:
        (scale, own), (shift, owned) = (self.floats(node, slot) for slot in ("scale", "shift"))
        return _Real(0, scale, shift, own or owned)

    def affine(self, node: Node, number: int) -> _Real:
        source = node.inputs[0]
        real = self.reals[source]
        if real.limited or (real.second is not None and "scale" in node.tensors):
            real = self.stored(source)
        factor, own = self.floats(node, "scale") if "scale" in node.tensors else (1.0, False)
        shift, owned = self.floats(node, "shift") if "shift" in node.tensors else (0.0, False)
        return replace(
            real, scale=real.scale * factor, shift=real.shift * factor + shift, units=None,
            slope=None if real.slope is None else real.slope * factor,
            own=real.own or own or owned,
        )  # fmt: skip

    def prelu(self, node: Node, number: int) -> _Real:
        real = self.alone(node.inputs[0])
        slope, own = self.floats(node, "slope")
        return replace(real, slope=real.scale * slope, own=own, units=None)

    def limit(self, node: Node, number: int) -> _Real:
        real = self.reals[node.inputs[0]]
        if real.slope is not None or real.limited:
            real = self.stored(node.inputs[0])
        low, high = (node.attrs.get(name, end) for name, end in (("low", 0), ("high", math.inf)))
        return replace(real, low=float(low), high=float(high), units=None)

    def add(self, node: Node, number: int) -> _Real:
        a, b = node.inputs
        if self.reals[a].units == self.units(number):  # there already
            a, b = b, a
        second = self.stored(b)
        real = self.reals[a]
        if real.second is not None or real.limited:
            real = self.stored(a)
        return replace(real, second=second.value, units=None)

    def concat(self, node: Node, number: int) -> _Real:
        parts = [self.reals[source] for source in node.inputs]
        wide = any(self.shapes[part.value].bound > TOP + 1 for part in parts)
        if wide or parts[0].units is None or len({part.units for part in parts}) > 1:
            parts = [self.stored(source) for source in node.inputs]
        value = self.emit("concat", node, [part.value for part in parts])
        return self.plain(value, parts[0].units or 1)

    def same(self, node: Node, number: int) -> _Real:
        """Pooling of the largest, flattening: in the same units."""
        real = self.alone(node.inputs[0])
        return self.plain(self.emit(node.op, node, [real.value], {}, dict(node.attrs)),
                          real.units or 1)  # fmt: skip

    def average(self, node: Node, number: int) -> _Real:
        source = node.inputs[0]
        size, out = self.old[source].dims, self.old[number].dims
        if node.op == "avgpool":
            kernel, stride, pad, reach = (
                int(node.attrs[name]) for name in ("kernel", "stride", "pad", "include_pad")
            )
            factor = borders.multiple(size[:2], out[:2], (kernel, kernel), stride, pad, reach * pad)
        else:
            factor = size[0] * size[1]
        real = self.within(source, MAX_INT // factor)
        op = {"avgpool": "sumpool", "global_avg": "global_sum"}[node.op]
        value = self.emit(op, node, [real.value], {}, dict(node.attrs))
        return self.plain(value, (real.units or 1) * factor)

    # products

    def bconv(self, node: Node, number: int) -> _Real:
        inputs = [self.bits[node.inputs[0]]]
        return self.plain(self.emit("bconv", node, inputs, dict(node.tensors), dict(node.attrs)), 1)

    def products(self, node: Node, number: int) -> _Real:
        """A convolution or a dense layer of floats."""
        source = node.inputs[0]
        name = node.tensors["weight"]
        weight, own = self.floats(node, "weight")
        lead = (slice(None), slice(None), *(None,) * (weight.ndim - 2))
        if "weight_scale" in node.tensors:
            scale, owned = self.floats(node, "weight_scale")
            weight, own = weight * scale[lead], own or owned
        real = self.reals[source]
        image = real.value == 0 and real.linear and not real.own and node.op == "conv"
        binary = self.program.tensors[name].kind == "binary"
        slots: dict[str, Tensor | str] = {}
        taps = math.prod(weight.shape[2:])
        if image:
            if not (binary and (self.alike if self.drawn else even(real.scale))):
                binary = False
                weight = weight if self.drawn else weight * real.scale[:, None, None, None]
            zero = -real.shift / np.where(real.scale == 0, 1, real.scale)
            limits = np.clip(np.rint(zero[0]), -(2**15), 2**15 - 1)
            channels = self.old[source].dims[-1]
            slots["zero"] = self.tensor("int16", "input", limits[None], False, channels)
        if binary:
            step = np.ones((1, 1))
            slots["weight"] = name
        else:
            most = min(127, MAX_INT // (255 * taps)) if image else 127
            q, step = _quantized(weight, most, self.drawn)
            slots["weight"] = self.tensor("int8", "weight", q, own)
        if image:
            factor = real.scale.mean(1, keepdims=True) if binary else np.ones((1, 1))
            shift = np.zeros((1, 1))
            if not self.drawn:
                steps = (weight if binary else q) * (step * factor)[lead]
                shift = -(steps * zero[0]).reshape(*weight.shape[:2], -1).sum(2)
            real, unit = replace(real, units=1.0), factor
        else:
            tensor = slots["weight"]
            tensor = self.program.tensors[tensor] if isinstance(tensor, str) else tensor
            real = self.within(source, SUMS // largest_sum(tensor))
            shift, unit = np.zeros((1, 1)), np.full((1, 1), 1 / (real.units or 1))
        if "bias" in node.tensors:
            bias, owned = self.floats(node, "bias")
            shift, own = shift + bias, own or owned
        attrs = {key: value for key, value in node.attrs.items() if key in ("stride", "pad")}
        value = self.emit(node.op, node, [real.value], slots, attrs)
        return _Real(value, step * unit, shift, own)

    # bits

    def to_bits(self, node: Node, number: int) -> int:
        source = node.inputs[0]
        if node.op == "concat":
            return self.emit("concat", node, [self.bits[n] for n in node.inputs])
        if node.op == "maxpool":
            kept: dict[str, Tensor | str] = {**node.tensors}
            return self.emit("maxpool", node, [self.bits[source]], kept, dict(node.attrs))
        real = self.reals[source]
        if not real.linear or real.value == 0:
            real = self.stored(source)
        bound = self.shapes[real.value].bound
        falls = real.scale < 0
        turned = real.units is None  # a scale may be negative

        def reached(array: Array) -> Array:
            """The integers, not rounded, at which the value is so large."""
            return (array - real.shift) / np.where(real.scale == 0, 1, real.scale)

        def clipped(array: Array, constant: Array) -> Array:
            return np.clip(np.where(real.scale == 0, constant, array), -bound - 1, bound + 1)

        slots: dict[str, Tensor | str] = {}
        channels = self.old[source].dims[-1]
        if node.op == "interval":
            (low, own), (high, owned) = (self.floats(node, slot) for slot in ("low", "high"))
            own = real.own or own or owned
            begin, end = reached(low), reached(high)
            begin, end = np.where(falls, end, begin), np.where(falls, begin, end)
            always = (low <= real.shift) & (real.shift <= high)
            first = clipped(np.ceil(begin), np.where(always, -np.inf, np.inf))
            last = clipped(np.floor(end), np.where(always, np.inf, -np.inf))
            slots = {
                "low": self.levels(first, bound, own, channels),
                "high": self.levels(last, bound, own, channels),
            }
            if "inside" in node.tensors:
                slots["inside"] = node.tensors["inside"]
            return self.emit("interval", node, [real.value], slots)
        if node.op == "sign" and not turned:
            return self.emit("sign", node, [real.value])
        array, own, up = np.zeros((1, 1)), real.own, np.ones((1, 1), bool)
        if node.op == "threshold":
            array, owned = self.floats(node, "threshold")
            own = own or owned
            if "direction" in node.tensors:
                signs, owned = self.floats(node, "direction")
                up, own, turned = signs > 0, own or owned, True
        rises = up ^ falls
        exact = np.where(rises, np.ceil(reached(array)), np.floor(reached(array)))
        holds = np.where(up, real.shift >= array, real.shift <= array)
        exact = clipped(exact, np.where(holds == rises, -np.inf, np.inf))
        slots["threshold"] = self.levels(exact, bound, own, channels)
        if turned:
            slots["direction"] = self.tensor("binary", "direction", rises, own, channels)
        return self.emit("threshold", node, [real.value], slots)

    def levels(self, array: Array, bound: int, own: bool, channels: int) -> Tensor:
        """Of 16 bits where numbers have as many: one beyond is reached when they saturate."""
        if bound > 2**15:
            return self.tensor("int32", "threshold", array, own, channels)
        array = np.clip(array, -(2**15), 2**15 - 1)
        return self.tensor("int16", "threshold", array, own, channels)

    # votes

    def output(self, number: int) -> None:
        """The last value, and the votes, such that all sums of them are exact."""
        program, real = self.program, self.reals[number]
        vectors = {slot: program.tensors[name].data.astype(np.float64)
                   for slot, name in program.combine_tensors.items()}  # fmt: skip
        size = self.sizes[number] or 1.0
        if not real.linear:
            real = self.stored(number)
        if program.combine == "sum" and "weight" in vectors:
            weight = vectors.pop("weight")[:, None]
            real = replace(real, scale=real.scale * weight, shift=real.shift * weight, own=True,
                           units=None)  # fmt: skip
            size *= float(np.abs(weight).max()) or 1.0
        fraction = min(MOST_FRACTION, math.floor(math.log2(OUTPUT / (ROOM * size))))
        if fraction < LEAST_FRACTION:
            raise IntegerError(f"expected outputs of ordinary size, got up to {size:g}")
        node = self.node(number)
        real = self.rescaled(node, real, 2.0**fraction, OUTPUT)
        self.emit("fixed", node, [real.value], {}, {"fraction": fraction})
        for slot, values in vectors.items():
            if slot == "bias":
                values = np.clip(np.rint(values * 2.0**fraction), -(2**22), 2**22) / 2.0**fraction
            else:
                values = _votes(
                    values, SHARED_VOTES if program.combine == "soft_vote" else ALL_VOTES
                )
            name = f"c.{slot}"
            self.made.combine_tensors[slot] = name
            self.made.tensors[name] = Tensor(
                "float32", "combine", values.shape, False, values.astype(KINDS["float32"])
            )


def _votes(weight: Array, parts: int) -> Array:
    """Weights as whole multiples of a power of two, all together of at most so many."""
    unit = 2.0 ** math.ceil(math.log2(weight.sum() / parts))
    whole = np.floor(weight / unit)
    if whole[0] == 0:
        whole[whole.argmax()] -= 1
        whole[0] = 1
    return whole * unit


def _quantized(weight: Array, most: int, drawn: bool) -> tuple[Array, Array]:
    """(M or 1, O, ...) as int8 and its step, (M or 1, O)."""
    axes = tuple(range(2, weight.ndim))
    if drawn:
        return np.broadcast_to(np.int8(most), weight.shape), np.ones((1, 1))
    step = np.abs(weight).max(axes) / most
    step = np.where(step == 0, 1, step)
    whole = np.rint(weight / step.reshape(*step.shape, *(1,) * len(axes)))
    return whole.astype(KINDS["int8"]), step


_NUMBERS: dict[str, Callable[[_Converter, Node, int], _Real]] = {
    "normalize": _Converter.normalize,
    "conv": _Converter.products,
    "dense": _Converter.products,
    "bconv": _Converter.bconv,
    "affine": _Converter.affine,
    "prelu": _Converter.prelu,
    "relu": _Converter.limit,
    "clip": _Converter.limit,
    "add": _Converter.add,
    "concat": _Converter.concat,
    "maxpool": _Converter.same,
    "flatten": _Converter.same,
    "avgpool": _Converter.average,
    "global_avg": _Converter.average,
}
