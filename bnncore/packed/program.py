"""The narrow waist between training and inference: a list of plain nodes and one table of tensors.

`lower` (torch) writes a `Program`; `packfile` stores it; `storage` counts it; `execute` runs it.
Nothing here, nor anything that reads a Program, imports torch.

Legend: `B` images, `H W` map height and width, `C` input channels, `O` output channels, `M`
members, `F` features. Activations are laid out B H W C; a bit of 1 stands for +1, a bit of 0 for
-1.

One template graph serves all members. A tensor is *shared* (one copy) or a member's *own* (a
leading axis of `M` copies), and a value of the graph is computed once for all members exactly when
nothing it depends on is own; so a first block shared by all members runs once, and no second
description of "who owns what" is needed.

Operators (inputs -> output; tensor slots, `?` = optional; attributes in brackets):

=========== ==================== ==============================================================
normalize   image u8 -> f32      scale[C], shift[C]: ``x * scale + shift``
conv        f32 -> f32           weight[O,kh,kw,C], bias?[O]; [stride, pad]; zero padding.
                                 weight is float32, float16, int8 (then weight_scale[O]) or binary
bconv       bits -> i32          weight[O,kh,kw,C] binary; [stride, pad, biases]; the sum of +-1
                                 products; a padded tap counts 0. `biases` is how many bias values
                                 the trained layer had before folding (for the papers' counts)
affine      f32|i32 -> f32       scale?[C], shift?[C]: ``x * scale`` rounded, then ``+ shift``
prelu       f32|i32 -> f32       slope[C] or slope[1]: ``x if x >= 0 else slope * x``
relu        f32|i32 -> f32
clip        f32|i32 -> f32       [low, high]
sign        f32|i32 -> bits      ``x >= 0``
threshold   f32|i32 -> bits      threshold[C], direction?[C] binary: ``x >= threshold`` where
                                 direction is 1 (or absent), ``x <= threshold`` where it is 0
interval    f32|i32 -> bits      low[C], high[C], inside?[C] binary: ``low <= x <= high``, negated
                                 where inside is 0
add         f32|i32, f32|i32 -> f32
concat      n values -> same     along channels (all bits, or all numbers)
maxpool     f32|i32 -> same      [kernel, stride, pad, ceil]; padded taps never win
avgpool     f32|i32 -> f32       [kernel, stride, pad, ceil, include_pad]
global_avg  f32|i32 -> f32 (B,C) mean over H and W
flatten     f32 -> f32 (B,F)     in C, H, W order, torch's
dense       f32 (B,F) -> (B,O)   weight[O,F] (float32, float16, or int8 with weight_scale[O]),
                                 bias?[O]
=========== ==================== ==============================================================

The last node gives each member's outputs z (B,C); `combine` joins those of the first m members:

========= ============================================================================
mean      ``sum_i(z_i) / m``; tensors: none
sum       ``sum_i(weight[i] * z_i) + bias``; weight?[M] and bias?[C] in `combine_tensors`
soft_vote ``sum_i(weight[i] * softmax(z_i)) / sum_i(weight[i])``; weight?[M]
hard_vote ``sum_i(weight[i] * onehot(argmax z_i))``; weight?[M]; ties go to the larger
          summed softmax probability, then to the lower class
========= ============================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

KINDS: dict[str, np.dtype] = {
    "binary": np.dtype("u1"),  # eight weights a byte, see `Tensor.data`
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "int8": np.dtype("i1"),
    "int16": np.dtype("<i2"),
    "int32": np.dtype("<i4"),
}
COMBINES = ("mean", "sum", "soft_vote", "hard_vote")
ROLES = (
    "weight",
    "weight_scale",
    "bias",
    "scale",
    "shift",
    "slope",
    "threshold",
    "direction",
    "input",
    "combine",
)

# Far above any network that fits the purpose; they bound what a hostile file can ask for.
MAX_NODES = 4096
MAX_INPUTS = 64  # of one node
MAX_TENSORS = 8192
MAX_MEMBERS = 1024
MAX_CLASSES = 65536
MAX_TEXT = 500  # characters of a name
MAX_WINDOW = 255  # kernel and stride
MAX_TAPS = 1 << 24  # products in one sum: integers up to here are exact in float32
MAX_VALUE = 1 << 24  # elements of one value, for one image
MAX_VALUES = 1 << 28  # elements of all values together, for one image


class PackedFormatError(ValueError):
    """A Program, or the file that should hold one, is invalid; the message says what and where."""


@dataclass(frozen=True, eq=False)
class Tensor:
    """One entry of a Program's table.

    Attributes:
        kind: a key of `KINDS`.
        role: what it is for, in the words of the storage table: ``weight``, ``weight_scale``,
            ``bias``, ``scale`` (the XNOR alpha or a folded batch norm), ``shift``, ``slope``,
            ``threshold``, ``direction``, ``input``, ``combine``.
        shape: logical shape of one copy, without the member axis.
        own: whether each member has a copy of its own.
        data: ``shape``, or ``(M, *shape)`` where own. Of kind binary: uint8 of
            ``ceil(prod(shape) / 8)`` bytes (after the member axis, if any), the C-order flattened
            bits, first bit in the lowest bit of the first byte; spare bits are 0.
    """

    kind: str
    role: str
    shape: tuple[int, ...]
    own: bool
    data: np.ndarray


@dataclass(frozen=True)
class Node:
    """One operator.

    Attributes:
        op: a name from the table above.
        name: the trained layer it comes from, for people and for error messages.
        inputs: value numbers; 0 is the image, node ``i`` of the list gives value ``i + 1``.
        tensors: slot -> name in the Program's table.
        attrs: scalars only (``[kernel, stride, pad]`` are the same for height and width).
    """

    op: str
    name: str
    inputs: tuple[int, ...]
    tensors: dict[str, str] = field(default_factory=dict)
    attrs: dict[str, int | float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Program:
    """A trained ensemble, ready to be counted, stored and run.

    Attributes:
        nodes: in an order that can be executed; the last gives the members' outputs.
        tensors: name -> Tensor.
        members: M >= 1.
        combine: one of `COMBINES`.
        combine_tensors: slot -> name in the table (never own).
        image: (H, W, C) of the uint8 input.
        classes: class names; their number is that of the outputs.
        info: small facts for people (name, scheme, sharing, recorded accuracies ...); JSON scalars.
    """

    nodes: tuple[Node, ...]
    tensors: dict[str, Tensor]
    members: int
    combine: str
    image: tuple[int, int, int]
    classes: tuple[str, ...]
    combine_tensors: dict[str, str] = field(default_factory=dict)
    info: dict[str, str | int | float] = field(default_factory=dict)


def pack_bits(signs: np.ndarray, own: bool) -> np.ndarray:
    """Pack booleans (True = +1) of shape (...) or (M, ...) into `Tensor.data`'s binary form."""
    flat = signs.reshape(len(signs) if own else 1, -1)
    packed = np.packbits(flat, axis=1, bitorder="little")
    return packed if own else packed[0]


def unpack_bits(tensor: Tensor) -> np.ndarray:
    """The inverse of `pack_bits`: booleans of shape ``shape`` or ``(M, *shape)``."""
    count = int(np.prod(tensor.shape))
    bits = np.unpackbits(tensor.data, axis=-1, count=count, bitorder="little")
    return bits.astype(bool).reshape(tensor.data.shape[:-1] + tensor.shape)


class Shape(NamedTuple):
    """What `validate` knows of one value of the graph.

    Attributes:
        kind: ``u8`` (the image), ``f32``, ``i32`` or ``bits``.
        dims: (H, W, C) or (F,), without the batch.
        own: whether each member computes its own.
    """

    kind: str
    dims: tuple[int, ...]
    own: bool


def validate(program: Program) -> list[Shape]:
    """Check everything that can be checked without an image, and infer the shape of every value.

    Returns:
        One `Shape` a value: index 0 is the image, ``i + 1`` the output of node ``i``.

    Raises:
        PackedFormatError: names the node or tensor, what was expected and what was found.
    """
    _integer("members", program.members, 1, MAX_MEMBERS)
    _require(len(program.image) == 3, "image", "(H, W, C)", program.image)
    for axis, size in zip("HWC", program.image, strict=True):
        _integer(f"image {axis}", size, 1, MAX_VALUE)
    classes = len(program.classes)
    _require(1 <= classes <= MAX_CLASSES, "classes", f"1 to {MAX_CLASSES}", classes)
    for label in program.classes:
        _text("class name", label)
    for key, fact in program.info.items():
        _text("info key", key)
        _scalar(f"info {key!r}", fact)
    count = len(program.tensors)
    _require(count <= MAX_TENSORS, "tensors", f"at most {MAX_TENSORS}", count)
    for name, tensor in program.tensors.items():
        _check_tensor(name, tensor, program.members)
    _require(1 <= len(program.nodes) <= MAX_NODES, "nodes", f"1 to {MAX_NODES}", len(program.nodes))

    shapes = [Shape("u8", tuple(program.image), False)]
    used: set[str] = set()
    total = 0
    for index, node in enumerate(program.nodes):
        _text(f"node {index} name", node.name)
        look = _Look(f"node {index} ({node.op} {node.name!r})", node, program, shapes)
        rule = _RULES.get(node.op)
        _require(rule is not None, f"node {index} ({node.name!r})", "a known operator", node.op)
        assert rule is not None
        kind, dims = rule(look)
        elements = _product(dims)
        _require(elements <= MAX_VALUE, look.where, f"at most {MAX_VALUE} elements", elements)
        total += elements
        shapes.append(Shape(kind, dims, look.finish()))
        used.update(node.tensors.values())
    _require(total <= MAX_VALUES, "all values", f"at most {MAX_VALUES} elements", total)
    last = shapes[-1]
    expected = ("f32", (classes,))
    _require(last[:2] == expected, "last node's output", expected, last[:2])
    used.update(_check_combine(program, classes))
    unused = sorted(program.tensors.keys() - used)
    _require(not unused, "tensors", "every one in use", f"unused {unused[:3]}")
    return shapes


def window(size: int, kernel: int, stride: int, pad: int, ceil: int = 0) -> int:
    """Windows along one axis; with `ceil`, by torch's rule (none starts in the padding)."""
    span = size + 2 * pad - kernel
    if span < 0:
        return 0
    count = (span + (stride - 1 if ceil else 0)) // stride + 1
    if ceil and (count - 1) * stride >= size + pad:
        count -= 1
    return count


def _require(condition: bool, where: str, expected: object, got: object) -> None:
    if not condition:
        shown = got if isinstance(got, str) else repr(got)
        raise PackedFormatError(f"{where[:200]}: expected {str(expected)[:200]}, got {shown[:200]}")


def _integer(where: str, value: object, low: int, high: int) -> int:
    good = isinstance(value, int | np.integer) and low <= int(value) <= high
    _require(good, where, f"an integer from {low} to {high}", value)
    return int(value)  # type: ignore[call-overload]


def _text(where: str, value: object) -> None:
    # Printable, because tools print them: no control characters reach a terminal from a file.
    good = isinstance(value, str) and len(value) <= MAX_TEXT and value.isprintable()
    _require(good, where, f"at most {MAX_TEXT} printable characters", repr(value))


def _scalar(where: str, value: object) -> None:
    if isinstance(value, int):
        _require(-(1 << 53) <= value <= 1 << 53, where, "an integer of at most 53 bits", value)
    elif isinstance(value, float):
        _require(bool(np.isfinite(value)), where, "a finite number", value)
    else:
        _text(where, value)


def _product(dims: tuple[int, ...]) -> int:
    count = 1
    for size in dims:
        count *= size
    return count


def _check_tensor(name: str, tensor: Tensor, members: int) -> None:
    where = f"tensor {name!r}"
    _text("tensor name", name)
    _require(tensor.kind in KINDS, where, f"a kind of {', '.join(KINDS)}", tensor.kind)
    _require(tensor.role in ROLES, where, f"a role of {', '.join(ROLES)}", tensor.role)
    _require(1 <= len(tensor.shape) <= 4, where, "1 to 4 axes", tensor.shape)
    for size in tensor.shape:
        _integer(where, size, 1, 1 << 31)
    _require(tensor.data.dtype == KINDS[tensor.kind], where, KINDS[tensor.kind], tensor.data.dtype)
    expected = stored_shape(tensor, members)
    _require(tensor.data.shape == expected, where, f"data of shape {expected}", tensor.data.shape)
    if tensor.data.dtype.kind == "f":
        # The extremes are finite exactly if all is, and take no memory to find; an axis along
        # which an array only repeats itself holds one value.
        values = tensor.data[tuple(slice(None if s else 1) for s in tensor.data.strides)]
        finite = bool(np.isfinite(values.max()) and np.isfinite(values.min()))
        _require(finite, where, "finite numbers", "NaN or infinity")
    spare = -_product(tensor.shape) % 8
    if tensor.kind == "binary" and spare:
        clear = not (tensor.data[..., -1] >> (8 - spare)).any()
        _require(clear, where, "spare bits of 0", "1")


def stored_shape(tensor: Tensor, members: int) -> tuple[int, ...]:
    """The shape that `Tensor.data` has to have."""
    one = tuple(tensor.shape)
    if tensor.kind == "binary":
        one = (-(-_product(one) // 8),)
    return (members, *one) if tensor.own else one


def _check_combine(program: Program, classes: int) -> set[str]:
    _require(program.combine in COMBINES, "combine", ", ".join(COMBINES), program.combine)
    allowed = {
        "mean": {},
        "sum": {"weight": program.members, "bias": classes},
        "soft_vote": {"weight": program.members},
        "hard_vote": {"weight": program.members},
    }[program.combine]
    for slot, name in program.combine_tensors.items():
        where = f"combine {program.combine} {slot}"
        _require(slot in allowed, where, f"a slot of {sorted(allowed)}", slot)
        _require(name in program.tensors, where, "a tensor of the table", name)
        tensor = program.tensors[name]
        _require(tensor.kind in _FLOATS, where, " or ".join(_FLOATS), tensor.kind)
        _require(not tensor.own, where, "a shared tensor", "an own one")
        expected = (allowed[slot],)
        _require(tuple(tensor.shape) == expected, where, f"shape {expected}", tensor.shape)
        if slot == "weight" and program.combine != "sum":
            # The first member alone must be an ensemble: soft votes divide by the sum of weights.
            fair = bool((tensor.data >= 0).all() and tensor.data[0] > 0)
            _require(fair, where, "weights of at least 0, the first above 0", tensor.data.tolist())
    return set(program.combine_tensors.values())


_FLOATS = ("float32", "float16")
_LEVELS = ("float32", "float16", "int8", "int16", "int32")
_NUMBERS = ("f32", "i32")


class _Look:
    """One node under inspection. What a rule did not ask for, the node may not have."""

    def __init__(self, where: str, node: Node, program: Program, shapes: list[Shape]) -> None:
        self.where, self.node, self.program, self.shapes = where, node, program, shapes
        self.slots: set[str] = set()
        self.attributes: set[str] = set()

    def inputs(
        self, count: int | None, kinds: tuple[str, ...], axes: int | None = 3
    ) -> list[Shape]:
        """The input values, `count` of them (None: any), of these kinds, with this many axes."""
        given = self.node.inputs
        good = len(given) == count if count is not None else 1 <= len(given) <= MAX_INPUTS
        _require(good, self.where, f"{count or 'some'} inputs", len(given))
        found = []
        where = f"{self.where} input"
        for number in given:
            _integer(where, number, 0, len(self.shapes) - 1)
            shape = self.shapes[number]
            _require(shape.kind in kinds, where, kinds, shape.kind)
            _require(axes in (None, len(shape.dims)), where, f"{axes} axes", shape.dims)
            found.append(shape)
        return found

    def tensor(self, slot: str, kinds: tuple[str, ...], *shape: int | None) -> Tensor:
        """The tensor of a slot, of one of these kinds and this shape (None: any size)."""
        self.slots.add(slot)
        where = f"{self.where} {slot}"
        _require(slot in self.node.tensors, where, "a tensor", "none")
        name = self.node.tensors[slot]
        _require(name in self.program.tensors, where, "a tensor of the table", name)
        tensor = self.program.tensors[name]
        _require(tensor.kind in kinds, where, " or ".join(kinds), tensor.kind)
        same = len(tensor.shape) == len(shape) and all(
            want is None or want == size for want, size in zip(shape, tensor.shape, strict=True)
        )
        wanted = "(" + ", ".join("any" if size is None else str(size) for size in shape) + ")"
        _require(same, where, f"shape {wanted}", tensor.shape)
        return tensor

    def maybe(self, slot: str, kinds: tuple[str, ...], *shape: int | None) -> None:
        """As `tensor`, for a slot that may be absent."""
        if slot in self.node.tensors:
            self.tensor(slot, kinds, *shape)

    def attr(self, name: str, low: int, high: int) -> int:
        """An integer attribute within bounds."""
        self.attributes.add(name)
        return _integer(f"{self.where} {name}", self.node.attrs.get(name), low, high)

    def finish(self) -> bool:
        """Nothing is left over; returns whether the node's value is a member's own."""
        extra = sorted(self.node.tensors.keys() - self.slots)
        _require(not extra, self.where, f"tensors {sorted(self.slots)}", f"also {extra}")
        extra = sorted(self.node.attrs.keys() - self.attributes)
        _require(not extra, self.where, f"attributes {sorted(self.attributes)}", f"also {extra}")
        return any(self.shapes[number].own for number in self.node.inputs) or any(
            self.program.tensors[name].own for name in self.node.tensors.values()
        )


def _normalize(look: _Look) -> tuple[str, tuple[int, ...]]:
    (x,) = look.inputs(1, ("u8",))
    look.tensor("scale", _FLOATS, x.dims[-1])
    look.tensor("shift", _FLOATS, x.dims[-1])
    return "f32", x.dims


def _convolution(look: _Look) -> tuple[str, tuple[int, ...]]:
    binary = look.node.op == "bconv"
    (x,) = look.inputs(1, ("bits",) if binary else ("f32",))
    kinds = ("binary",) if binary else ("float32", "float16", "int8", "binary")
    height, width, channels = x.dims
    weight = look.tensor("weight", kinds, None, None, None, channels)
    filters, kh, kw, _ = weight.shape
    _require(max(kh, kw) <= MAX_WINDOW, look.where, f"a kernel up to {MAX_WINDOW}", (kh, kw))
    taps = kh * kw * channels
    _require(taps <= MAX_TAPS, look.where, f"at most {MAX_TAPS} products in a sum", taps)
    if binary:
        look.attr("biases", 0, MAX_TAPS)
    else:
        look.maybe("bias", _FLOATS, filters)
        if weight.kind == "int8":
            look.tensor("weight_scale", _FLOATS, filters)
    stride = look.attr("stride", 1, MAX_WINDOW)
    # Less than the kernel, so that every window holds at least one real tap.
    pad = look.attr("pad", 0, min(kh, kw) - 1)
    dims = (window(height, kh, stride, pad), window(width, kw, stride, pad), filters)
    _require(min(dims) > 0, look.where, f"a map of at least {kh}x{kw}", f"{height}x{width}")
    return ("i32" if binary else "f32"), dims


def _affine(look: _Look) -> tuple[str, tuple[int, ...]]:
    (x,) = look.inputs(1, _NUMBERS, None)
    look.maybe("scale", _FLOATS, x.dims[-1])
    look.maybe("shift", _FLOATS, x.dims[-1])
    return "f32", x.dims


def _prelu(look: _Look) -> tuple[str, tuple[int, ...]]:
    (x,) = look.inputs(1, _NUMBERS, None)
    slope = look.tensor("slope", _FLOATS, None)
    _require(
        slope.shape[0] in (1, x.dims[-1]), look.where, f"1 or {x.dims[-1]} slopes", slope.shape
    )
    return "f32", x.dims


def _relu(look: _Look) -> tuple[str, tuple[int, ...]]:
    (x,) = look.inputs(1, _NUMBERS, None)
    return "f32", x.dims


def _clip(look: _Look) -> tuple[str, tuple[int, ...]]:
    (x,) = look.inputs(1, _NUMBERS, None)
    for name in ("low", "high"):
        look.attributes.add(name)
        bound = look.node.attrs.get(name)
        good = isinstance(bound, int | float) and abs(bound) <= float(np.finfo(np.float32).max)
        _require(good, f"{look.where} {name}", "a finite float32", bound)
    low, high = look.node.attrs["low"], look.node.attrs["high"]
    _require(low <= high, look.where, "low <= high", (low, high))
    return "f32", x.dims


def _sign(look: _Look) -> tuple[str, tuple[int, ...]]:
    (x,) = look.inputs(1, _NUMBERS, None)
    return "bits", x.dims


def _threshold(look: _Look) -> tuple[str, tuple[int, ...]]:
    (x,) = look.inputs(1, _NUMBERS, None)
    # Integer levels only where integers are compared, so that no comparison ever rounds.
    kinds = _LEVELS if x.kind == "i32" else _FLOATS
    slots = ("threshold",) if look.node.op == "threshold" else ("low", "high")
    for slot in slots:
        look.tensor(slot, kinds, x.dims[-1])
    look.maybe("direction" if len(slots) == 1 else "inside", ("binary",), x.dims[-1])
    return "bits", x.dims


def _add(look: _Look) -> tuple[str, tuple[int, ...]]:
    a, b = look.inputs(2, _NUMBERS, None)
    _require(a.dims == b.dims, look.where, f"two values of {a.dims}", b.dims)
    return "f32", a.dims


def _concat(look: _Look) -> tuple[str, tuple[int, ...]]:
    parts = look.inputs(None, ("bits", "f32", "i32"), None)
    first = parts[0]
    for part in parts[1:]:
        _require(part.dims[:-1] == first.dims[:-1], look.where, f"maps of {first.dims}", part.dims)
    kinds = {part.kind for part in parts}
    _require(kinds <= set(_NUMBERS) or kinds == {"bits"}, look.where, "one kind", sorted(kinds))
    kind = "f32" if len(kinds) == 2 else first.kind
    return kind, (*first.dims[:-1], sum(part.dims[-1] for part in parts))


def _pool(look: _Look) -> tuple[str, tuple[int, ...]]:
    (x,) = look.inputs(1, _NUMBERS)
    kernel = look.attr("kernel", 1, MAX_WINDOW)
    stride = look.attr("stride", 1, MAX_WINDOW)
    pad = look.attr("pad", 0, kernel // 2)
    ceil = look.attr("ceil", 0, 1)
    maximum = look.node.op == "maxpool"
    if not maximum:
        look.attr("include_pad", 0, 1)
    height, width = (window(size, kernel, stride, pad, ceil) for size in x.dims[:2])
    _require(min(height, width) > 0, look.where, f"a map of at least {kernel}x{kernel}", x.dims)
    return (x.kind if maximum else "f32"), (height, width, x.dims[2])


def _global_avg(look: _Look) -> tuple[str, tuple[int, ...]]:
    (x,) = look.inputs(1, _NUMBERS)
    return "f32", x.dims[2:]


def _flatten(look: _Look) -> tuple[str, tuple[int, ...]]:
    (x,) = look.inputs(1, ("f32",))
    return "f32", (_product(x.dims),)


def _dense(look: _Look) -> tuple[str, tuple[int, ...]]:
    (x,) = look.inputs(1, ("f32",), 1)
    weight = look.tensor("weight", ("float32", "float16", "int8"), None, x.dims[0])
    if weight.kind == "int8":
        look.tensor("weight_scale", _FLOATS, weight.shape[0])
    look.maybe("bias", _FLOATS, weight.shape[0])
    return "f32", weight.shape[:1]


_RULES: dict[str, Callable[[_Look], tuple[str, tuple[int, ...]]]] = {
    "normalize": _normalize,
    "conv": _convolution,
    "bconv": _convolution,
    "affine": _affine,
    "prelu": _prelu,
    "relu": _relu,
    "clip": _clip,
    "sign": _sign,
    "threshold": _threshold,
    "interval": _threshold,
    "add": _add,
    "concat": _concat,
    "maxpool": _pool,
    "avgpool": _pool,
    "global_avg": _global_avg,
    "flatten": _flatten,
    "dense": _dense,
}
