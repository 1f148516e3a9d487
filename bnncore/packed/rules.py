"""The rules of a `Program`: what each operator takes and gives, and the limits of everything."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable

import numpy as np

from bnncore.packed.borders import multiple
from bnncore.packed.program import (
    COMBINES,
    KINDS,
    ROLES,
    Node,
    PackedFormatError,
    Program,
    Shape,
    Tensor,
    stored_shape,
)

# Far above any network that fits the purpose; they bound what a hostile file can ask for.
MAX_NODES = 4096
MAX_INPUTS = 64  # of one node
MAX_TENSORS = 8192
MAX_MEMBERS = 1024
MAX_CLASSES = 65536
MAX_TEXT = 500  # characters of a name
MAX_WINDOW = 255  # kernel and stride
MAX_INT = 1 << 24  # size of an integer: float32 is exact up to here
MAX_OUTPUT = 1 << 17  # of integers that become outputs: differences take 18 bits
LEAST_FRACTION, MOST_FRACTION = -4, 24  # binary places of outputs
MAX_TAPS = MAX_INT  # products in one sum
MAX_VALUE = 1 << 24  # elements of one value, for one image
MAX_VALUES = 1 << 28  # elements of all values together, for one image
# Categories of characters that names do not hold: control, format (among them those that turn text
# around), surrogates, private use, separators of lines; of spaces only the plain one is allowed.
UNSEEN = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp", "Zs")


def validate(program: Program) -> list[Shape]:
    """Check everything that can be checked without an image, and infer the shape of every value.

    Returns:
        One `Shape` a value: index 0 is the image, ``i + 1`` the output of node ``i``.

    Raises:
        PackedFormatError: names the node or tensor, what was expected and what was found.
    """
    _integer("members", program.members, 1, MAX_MEMBERS)
    require(len(program.image) == 3, "image", "(H, W, C)", program.image)
    for axis, size in zip("HWC", program.image, strict=True):
        _integer(f"image {axis}", size, 1, MAX_VALUE)
    elements = math.prod(program.image)
    require(elements <= MAX_VALUE, "image", f"at most {MAX_VALUE} elements", elements)
    classes = len(program.classes)
    require(1 <= classes <= MAX_CLASSES, "classes", f"1 to {MAX_CLASSES}", classes)
    named: set[str] = set()
    for label in program.classes:
        _text("class name", label)
        require(label != "", "class name", "at least one character", repr(label))
        require(label not in named, "class name", "each once", repr(label))
        named.add(label)
    for key, fact in program.info.items():
        _text("info key", key)
        _scalar(f"info {key!r}", fact)
    count = len(program.tensors)
    require(count <= MAX_TENSORS, "tensors", f"at most {MAX_TENSORS}", count)
    for name, tensor in program.tensors.items():
        _check_tensor(name, tensor, program.members)
    require(1 <= len(program.nodes) <= MAX_NODES, "nodes", f"1 to {MAX_NODES}", len(program.nodes))

    shapes = [Shape("u8", tuple(program.image), False, 255)]
    used: set[str] = set()
    total = 0
    for index, node in enumerate(program.nodes):
        _text(f"node {index} name", node.name)
        shapes.append(infer(index, node, program, shapes))
        total += math.prod(shapes[-1].dims)
        require(total <= MAX_VALUES, "all values", f"at most {MAX_VALUES} elements", total)
        used.update(node.tensors.values())
    last = shapes[-1]
    expected = ("f32", (classes,))
    require(last[:2] == expected, "last node's output", expected, last[:2])
    fixed = [index for index, node in enumerate(program.nodes) if node.op == "fixed"]
    last_alone = fixed in ([], [len(program.nodes) - 1])
    require(last_alone, "fixed", "the last node alone", f"nodes {fixed[:3]}")
    used.update(_check_combine(program, classes))
    unused = sorted(program.tensors.keys() - used)
    require(not unused, "tensors", "every one in use", f"unused {unused[:3]}")
    return shapes


def infer(index: int, node: Node, program: Program, shapes: list[Shape]) -> Shape:
    """The shape of what node `index` gives, from those of earlier values."""
    look = _Look(f"node {index} ({node.op} {node.name!r})", node, program, shapes)
    rule = _RULES.get(node.op)
    require(rule is not None, f"node {index} ({node.name!r})", "a known operator", node.op)
    assert rule is not None
    kind, dims = rule(look)
    elements = math.prod(dims)
    require(elements <= MAX_VALUE, look.where, f"at most {MAX_VALUE} elements", elements)
    bound = look.bound if kind == "i32" else 0
    require(bound <= MAX_INT, look.where, f"integers up to {MAX_INT}", bound)
    return Shape(kind, dims, look.finish(), bound)


def window(size: int, kernel: int, stride: int, pad: int, ceil: int = 0) -> int:
    """Windows along one axis; with `ceil`, by torch's rule (none starts in the padding)."""
    span = size + 2 * pad - kernel
    if span < 0:
        return 0
    count = (span + (stride - 1 if ceil else 0)) // stride + 1
    if ceil and (count - 1) * stride >= size + pad:
        count -= 1
    return count


def version(program: Program, shapes: list[Shape]) -> str:
    """The first version of the format that can hold a valid Program with these values."""
    for node in program.nodes:
        kinds = _FIRST.get(node.op)
        if node.op in _SECOND or (kinds and shapes[node.inputs[0]].kind not in kinds):
            return "2"
    return "1"


_SECOND = ("rescale", "sumpool", "global_sum", "fixed")
# What else takes only these in version 1.
_FIRST = {"maxpool": ("f32", "i32"), **dict.fromkeys(("conv", "dense", "flatten"), ("f32",))}


def largest_sum(weight: Tensor) -> int:
    """The largest sum of the sizes of one filter's integer weights (O, ...), at least 1."""
    taps = math.prod(weight.shape[1:])
    if weight.kind == "binary":
        return taps
    if not any(weight.data.strides):  # a drawing's: one value, at which it is looked once
        return max(1, taps * abs(int(weight.data.max(initial=0))))
    rows = np.abs(weight.data.astype(np.int32)).reshape(-1, taps)
    return max(1, int(rows.sum(1).max(initial=0)))


def require(condition: bool, where: str, expected: object, got: object) -> None:
    """Raise a PackedFormatError of one line unless `condition`; it holds nothing unprintable."""
    if not condition:
        parts = (where, str(expected), got if isinstance(got, str) else repr(got))
        where, wanted, found = ("".join(map(_visible, part[:200]))[:200] for part in parts)
        raise PackedFormatError(f"{where}: expected {wanted}, got {found}")


def _unseen(letter: str) -> bool:
    return letter != " " and unicodedata.category(letter) in UNSEEN


def _visible(letter: str) -> str:
    return ascii(letter)[1:-1] if _unseen(letter) else letter


def _integer(where: str, value: object, low: int, high: int) -> int:
    good = isinstance(value, int | np.integer) and low <= int(value) <= high
    require(good, where, f"an integer from {low} to {high}", value)
    return int(value)  # type: ignore[call-overload]


def _text(where: str, value: object) -> None:
    # Tools print names: nothing from a file moves a terminal's cursor or turns its text around.
    good = isinstance(value, str) and len(value) <= MAX_TEXT and not any(map(_unseen, value))
    require(good, where, f"at most {MAX_TEXT} printable characters", repr(value))


def _scalar(where: str, value: object) -> None:
    if isinstance(value, int):
        require(-(1 << 53) <= value <= 1 << 53, where, "an integer of at most 53 bits", value)
    elif isinstance(value, float):
        require(bool(np.isfinite(value)), where, "a finite number", value)
    else:
        _text(where, value)


def _check_tensor(name: str, tensor: Tensor, members: int) -> None:
    where = f"tensor {name!r}"
    _text("tensor name", name)
    require(tensor.kind in KINDS, where, f"a kind of {', '.join(KINDS)}", tensor.kind)
    require(tensor.role in ROLES, where, f"a role of {', '.join(ROLES)}", tensor.role)
    require(1 <= len(tensor.shape) <= 4, where, "1 to 4 axes", tensor.shape)
    for size in tensor.shape:
        _integer(where, size, 1, 1 << 31)
    require(tensor.data.dtype == KINDS[tensor.kind], where, KINDS[tensor.kind], tensor.data.dtype)
    expected = stored_shape(tensor, members)
    require(tensor.data.shape == expected, where, f"data of shape {expected}", tensor.data.shape)
    if tensor.data.dtype.kind == "f":
        # The extremes are finite exactly if all is, and take no memory to find. A drawing's blank
        # tensors repeat one value along axes of step 0: it is looked at once.
        once = tensor.data[tuple(slice(None if step else 1) for step in tensor.data.strides)]
        finite = bool(np.isfinite(once.max()) and np.isfinite(once.min()))
        require(finite, where, "finite numbers", "NaN or infinity")
    spare = -math.prod(tensor.shape) % 8
    if tensor.kind == "binary" and spare:
        clear = not (tensor.data[..., -1] >> (8 - spare)).any()
        require(clear, where, "spare bits of 0", "1")


def _check_combine(program: Program, classes: int) -> set[str]:
    require(program.combine in COMBINES, "combine", ", ".join(COMBINES), program.combine)
    allowed = {
        "mean": {},
        "sum": {"weight": program.members, "bias": classes},
        "soft_vote": {"weight": program.members},
        "hard_vote": {"weight": program.members},
    }[program.combine]
    for slot, name in program.combine_tensors.items():
        where = f"combine {program.combine} {slot}"
        require(slot in allowed, where, f"a slot of {sorted(allowed)}", slot)
        require(name in program.tensors, where, "a tensor of the table", name)
        tensor = program.tensors[name]
        require(tensor.kind in _FLOATS, where, " or ".join(_FLOATS), tensor.kind)
        require(not tensor.own, where, "a shared tensor", "an own one")
        expected = (allowed[slot],)
        require(tuple(tensor.shape) == expected, where, f"shape {expected}", tensor.shape)
        if slot == "weight" and program.combine != "sum":
            # The first member alone must be an ensemble: soft votes divide by the sum of weights.
            fair = bool((tensor.data >= 0).all() and tensor.data[0] > 0)
            require(fair, where, "weights of at least 0, the first above 0", tensor.data.tolist())
    return set(program.combine_tensors.values())


_FLOATS = ("float32", "float16")
_LEVELS = ("float32", "float16", "int8", "int16", "int32")
_NUMBERS = ("f32", "i32")
_WEIGHTS = ("float32", "float16", "int8", "binary")


class _Look:
    """One node under inspection. What a rule did not ask for, the node may not have."""

    def __init__(self, where: str, node: Node, program: Program, shapes: list[Shape]) -> None:
        self.where, self.node, self.program, self.shapes = where, node, program, shapes
        self.slots: set[str] = set()
        self.attributes: set[str] = set()
        self.bound = 0  # of the integers that it gives

    def inputs(
        self, count: int | None, kinds: tuple[str, ...], axes: int | None = 3
    ) -> list[Shape]:
        """The input values, `count` of them (None: any), of these kinds, with this many axes."""
        given = self.node.inputs
        good = len(given) == count if count is not None else 1 <= len(given) <= MAX_INPUTS
        require(good, self.where, f"{count or 'some'} inputs", len(given))
        found = []
        where = f"{self.where} input"
        for number in given:
            _integer(where, number, 0, len(self.shapes) - 1)
            shape = self.shapes[number]
            require(shape.kind in kinds, where, kinds, shape.kind)
            require(axes in (None, len(shape.dims)), where, f"{axes} axes", shape.dims)
            found.append(shape)
        self.bound = max(shape.bound for shape in found)
        return found

    def tensor(self, slot: str, kinds: tuple[str, ...], *shape: int | None) -> Tensor:
        """The tensor of a slot, of one of these kinds and this shape (None: any size)."""
        self.slots.add(slot)
        where = f"{self.where} {slot}"
        require(slot in self.node.tensors, where, "a tensor", "none")
        name = self.node.tensors[slot]
        require(name in self.program.tensors, where, "a tensor of the table", name)
        tensor = self.program.tensors[name]
        require(tensor.kind in kinds, where, " or ".join(kinds), tensor.kind)
        same = len(tensor.shape) == len(shape) and all(
            want is None or want == size for want, size in zip(shape, tensor.shape, strict=True)
        )
        wanted = "(" + ", ".join("any" if size is None else str(size) for size in shape) + ")"
        require(same, where, f"shape {wanted}", tensor.shape)
        return tensor

    def maybe(self, slot: str, kinds: tuple[str, ...], *shape: int | None) -> None:
        """As `tensor`, for a slot that may be absent."""
        if slot in self.node.tensors:
            self.tensor(slot, kinds, *shape)

    def scale_of(self, weight: Tensor) -> None:
        """The scales that weights of int8 have, and others have not; no product is infinite."""
        if weight.kind == "int8":
            scale = self.tensor("weight_scale", _FLOATS, weight.shape[0])
            largest = float(np.abs(scale.data).max(initial=0))
            good = 128 * largest <= float(np.finfo(np.float32).max)
            require(good, f"{self.where} weight_scale", "finite weights", largest)

    def products(self, weight: Tensor) -> None:
        """The bound of sums of products of integers."""
        self.bound *= largest_sum(weight)

    def attr(self, name: str, low: int, high: int) -> int:
        """An integer attribute within bounds."""
        self.attributes.add(name)
        return _integer(f"{self.where} {name}", self.node.attrs.get(name), low, high)

    def finish(self) -> bool:
        """Nothing is left over; returns whether the node's value is a member's own."""
        extra = sorted(self.node.tensors.keys() - self.slots)
        require(not extra, self.where, f"tensors {sorted(self.slots)}", f"also {extra}")
        extra = sorted(self.node.attrs.keys() - self.attributes)
        require(not extra, self.where, f"attributes {sorted(self.attributes)}", f"also {extra}")
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
    (x,) = look.inputs(1, ("bits",) if binary else ("f32", "u8", "i32"))
    kinds = ("binary",) if binary else _WEIGHTS if x.kind == "f32" else ("int8", "binary")
    height, width, channels = x.dims
    weight = look.tensor("weight", kinds, None, None, None, channels)
    filters, kh, kw, _ = weight.shape
    require(max(kh, kw) <= MAX_WINDOW, look.where, f"a kernel up to {MAX_WINDOW}", (kh, kw))
    taps = kh * kw * channels
    require(taps <= MAX_TAPS, look.where, f"at most {MAX_TAPS} products in a sum", taps)
    if binary:
        look.attr("biases", 0, MAX_TAPS)
        look.bound = taps
    elif x.kind == "f32":
        look.maybe("bias", _FLOATS, filters)
        look.scale_of(weight)
    else:
        if x.kind == "u8":
            look.bound = max(255, _size(look.tensor("zero", ("int16",), channels)))
        look.products(weight)
    stride = look.attr("stride", 1, MAX_WINDOW)
    # Less than the kernel, so that every window holds at least one real tap.
    pad = look.attr("pad", 0, min(kh, kw) - 1)
    dims = (window(height, kh, stride, pad), window(width, kw, stride, pad), filters)
    require(min(dims) > 0, look.where, f"a map of at least {kh}x{kw}", f"{height}x{width}")
    return ("f32" if x.kind == "f32" else "i32"), dims


def _size(tensor: Tensor) -> int:
    """Of the largest integer."""
    return int(max(tensor.data.max(initial=0), -int(tensor.data.min(initial=0))))


def _rescale(look: _Look) -> tuple[str, tuple[int, ...]]:
    count = len(look.node.inputs)
    x, *more = look.inputs(2 if count == 2 else 1, ("u8", "i32"), None)
    for other in more:
        good = other[:2] == ("i32", x.dims)
        require(good, f"{look.where} second", ("i32", x.dims), other[:2])
    channels = x.dims[-1]
    factors = [_size(look.tensor("scale", ("int16",), channels))]
    if "slope" in look.node.tensors:
        factors.append(_size(look.tensor("slope", ("int16",), channels)))
    largest = x.bound * max(factors) + _size(look.tensor("shift", ("int32",), channels))
    largest += sum(other.bound for other in more)
    require(largest < 1 << 31, look.where, "products below 2**31", largest)
    look.attr("right", 0, 31)
    low, high = (look.attr(name, -MAX_INT, MAX_INT) for name in ("low", "high"))
    require(low <= high, look.where, "low <= high", (low, high))
    look.bound = max(abs(low), abs(high))
    return "i32", x.dims


def _fixed(look: _Look) -> tuple[str, tuple[int, ...]]:
    (x,) = look.inputs(1, ("i32",), 1)
    require(x.bound <= MAX_OUTPUT, look.where, f"integers up to {MAX_OUTPUT}", x.bound)
    look.attr("fraction", LEAST_FRACTION, MOST_FRACTION)
    return "f32", x.dims


def _affine(look: _Look) -> tuple[str, tuple[int, ...]]:
    (x,) = look.inputs(1, _NUMBERS, None)
    look.maybe("scale", _FLOATS, x.dims[-1])
    look.maybe("shift", _FLOATS, x.dims[-1])
    return "f32", x.dims


def _prelu(look: _Look) -> tuple[str, tuple[int, ...]]:
    (x,) = look.inputs(1, _NUMBERS, None)
    slope = look.tensor("slope", _FLOATS, None)
    require(slope.shape[0] in (1, x.dims[-1]), look.where, f"1 or {x.dims[-1]} slopes", slope.shape)
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
        require(good, f"{look.where} {name}", "a finite float32", bound)
    low, high = look.node.attrs["low"], look.node.attrs["high"]
    require(low <= high, look.where, "low <= high", (low, high))
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
    require(a.dims == b.dims, look.where, f"two values of {a.dims}", b.dims)
    return "f32", a.dims


def _concat(look: _Look) -> tuple[str, tuple[int, ...]]:
    parts = look.inputs(None, ("bits", "f32", "i32"), None)
    first = parts[0]
    for part in parts[1:]:
        require(part.dims[:-1] == first.dims[:-1], look.where, f"maps of {first.dims}", part.dims)
    kinds = {part.kind for part in parts}
    require(kinds <= set(_NUMBERS) or kinds == {"bits"}, look.where, "one kind", sorted(kinds))
    kind = "f32" if len(kinds) == 2 else first.kind
    return kind, (*first.dims[:-1], sum(part.dims[-1] for part in parts))


def _pool(look: _Look) -> tuple[str, tuple[int, ...]]:
    kinds = {"sumpool": ("i32",), "maxpool": ("bits", *_NUMBERS)}.get(look.node.op, _NUMBERS)
    (x,) = look.inputs(1, kinds)
    kernel = look.attr("kernel", 1, MAX_WINDOW)
    stride = look.attr("stride", 1, MAX_WINDOW)
    pad = look.attr("pad", 0, kernel // 2)
    ceil = look.attr("ceil", 0, 1)
    reach = 0 if look.node.op == "maxpool" else pad * look.attr("include_pad", 0, 1)
    height, width = (window(size, kernel, stride, pad, ceil) for size in x.dims[:2])
    if x.kind == "bits":
        look.maybe("direction", ("binary",), x.dims[2])
    require(min(height, width) > 0, look.where, f"a map of at least {kernel}x{kernel}", x.dims)
    if look.node.op == "sumpool":
        size = x.dims[:2], (height, width), (kernel, kernel)
        look.bound *= multiple(*size, stride, pad, reach)
    return ("f32" if look.node.op == "avgpool" else x.kind), (height, width, x.dims[2])


def _global_avg(look: _Look) -> tuple[str, tuple[int, ...]]:
    (x,) = look.inputs(1, ("i32",) if look.node.op == "global_sum" else _NUMBERS)
    look.bound *= x.dims[0] * x.dims[1]
    return ("i32" if look.node.op == "global_sum" else "f32"), x.dims[2:]


def _flatten(look: _Look) -> tuple[str, tuple[int, ...]]:
    (x,) = look.inputs(1, _NUMBERS)
    return x.kind, (math.prod(x.dims),)


def _dense(look: _Look) -> tuple[str, tuple[int, ...]]:
    (x,) = look.inputs(1, _NUMBERS, 1)
    whole = x.kind == "i32"
    kinds = ("int8",) if whole else ("float32", "float16", "int8")
    weight = look.tensor("weight", kinds, None, x.dims[0])
    if whole:
        look.products(weight)
    else:
        look.scale_of(weight)
        look.maybe("bias", _FLOATS, weight.shape[0])
    return x.kind, weight.shape[:1]


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
    "sumpool": _pool,
    "global_avg": _global_avg,
    "global_sum": _global_avg,
    "flatten": _flatten,
    "dense": _dense,
    "rescale": _rescale,
    "fixed": _fixed,
}
