"""Random valid Programs, and a naive evaluator in plain loops and float64 to hold kernels against.

`Builder` draws every choice through one function, so that the same code serves hypothesis (which
shrinks) and a seeded generator (which makes many fast).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from hypothesis import strategies as st

from bnncore.packed.program import (
    KINDS,
    Node,
    Program,
    Tensor,
    pack_bits,
    unpack_bits,
)
from bnncore.packed.rules import validate, window

CHANNELS = (1, 2, 3, 5, 7, 8, 9, 12, 16, 17, 24, 31, 32, 33, 40, 48, 63, 64, 65, 72, 96, 128, 130)


class Builder:
    """Grow a random graph: `pick(low, high)` chooses, `rng` fills arrays."""

    def __init__(self, pick: Callable[[int, int], int], rng: np.random.Generator) -> None:
        self.pick, self.rng = pick, rng
        self.nodes: list[Node] = []
        self.tensors: dict[str, Tensor] = {}
        self.members = pick(1, 3)
        self.sort = "mixed"  # or of "integers" or "floats" alone
        # kind and dims of each value so far; here only, `validate` has its own opinion
        self.values: list[tuple[str, tuple[int, ...]]] = []

    def one(self, options: tuple) -> object:
        return options[self.pick(0, len(options) - 1)]

    def maybe(self) -> bool:
        return bool(self.pick(0, 1))

    def tensor(self, kind: str, role: str, shape: tuple[int, ...], spread: float = 1.0) -> str:
        """Add a tensor, shared or own, and return its name."""
        own = self.maybe()
        full = (self.members, *shape) if own else shape
        if kind == "binary":
            data = pack_bits(self.rng.random(full) < 0.5, own)
        elif kind.startswith("float"):
            data = (self.rng.normal(0, spread, full)).astype(KINDS[kind])
        else:
            top = min(spread, np.iinfo(KINDS[kind]).max)
            data = self.rng.integers(-top, top, full, endpoint=True).astype(KINDS[kind])
        name = f"t{len(self.tensors)}"
        self.tensors[name] = Tensor(kind, role, shape, own, data)
        return name

    def floats(self) -> str:
        return str(self.one(("float32", "float32", "float16")))

    def node(self, op: str, inputs, kind: str, dims, tensors=None, attrs=None) -> int:
        self.nodes.append(
            Node(op, f"{op}{len(self.nodes)}", tuple(inputs), tensors or {}, attrs or {})
        )
        self.values.append((kind, tuple(dims)))
        return len(self.nodes)

    # Each grower takes a value number and gives the number of a new value, or None if it cannot.

    def spatial(self, dims, sizes=(1, 1, 2, 3, 3, 5)) -> tuple[int, int, int, int, int, int] | None:
        kh = int(self.one(sizes))  # type: ignore[call-overload]
        kw = kh if self.pick(0, 3) else int(self.one(sizes))  # type: ignore[call-overload]
        stride = self.pick(1, 3)
        pad = self.pick(0, min(kh, kw) - 1)
        height, width = window(dims[0], kh, stride, pad), window(dims[1], kw, stride, pad)
        return (kh, kw, stride, pad, height, width) if min(height, width) > 0 else None

    def grow_bconv(self, x: int) -> int | None:
        _, dims = self.values[x]
        spot = self.spatial(dims)
        if spot is None:
            return None
        kh, kw, stride, pad, height, width = spot
        filters = int(self.one(CHANNELS))  # type: ignore[call-overload]
        weight = self.tensor("binary", "weight", (filters, kh, kw, dims[2]))
        attrs = {"stride": stride, "pad": pad, "biases": self.pick(0, 1) * filters}
        return self.node("bconv", [x], "i32", (height, width, filters), {"weight": weight}, attrs)

    def whole_conv(self) -> int:
        """A convolution of the image's bytes."""
        _, dims = self.values[0]
        spot = self.spatial(dims) or (1, 1, 1, 0, dims[0], dims[1])
        kh, kw, stride, pad, height, width = spot
        filters = int(self.one(CHANNELS[:12]))  # type: ignore[call-overload]
        kind = str(self.one(("int8", "binary")))
        slots = {
            "weight": self.tensor(kind, "weight", (filters, kh, kw, dims[2]), 127),
            "zero": self.tensor("int16", "input", dims[2:], 300),
        }
        attrs = {"stride": stride, "pad": pad}
        return self.node("conv", [0], "i32", (height, width, filters), slots, attrs)

    def grow_whole(self, x: int) -> int | None:
        """From integers to integers: a convolution, a pooling, a rescaling."""
        _, dims = self.values[x]
        other = self.pick(0, 5)
        if other == 0:
            x = self.rescale(x, 90)
            spot = self.spatial(dims)
            if spot is None or dims[2] > 32:
                return x
            kh, kw, stride, pad, height, width = spot
            filters = int(self.one(CHANNELS[:12]))  # type: ignore[call-overload]
            shape = (filters, kh, kw, dims[2])
            slots = {"weight": self.tensor(str(self.one(("int8", "binary"))), "weight", shape, 50)}
            attrs = {"stride": stride, "pad": pad}
            return self.node("conv", [x], "i32", (height, width, filters), slots, attrs)
        if other == 1:
            x = self.rescale(x, 400)
            kernel = self.pick(1, 3)
            attrs = {"kernel": kernel, "stride": self.pick(1, 3), "pad": self.pick(0, kernel // 2),
                     "ceil": self.pick(0, 1)}  # fmt: skip
            size = [window(size, *attrs.values()) for size in dims[:2]]
            if min(size) < 1:
                return x
            attrs["include_pad"] = self.pick(0, 1)
            return self.node("sumpool", [x], "i32", (*size, dims[2]), {}, attrs)
        return self.rescale(x, int(self.one((100, 3000, 32767, 1 << 20))))  # type: ignore

    def grow_links(self, x: int) -> int:
        """Operators on single numbers, each of any value so far; all is added up."""
        whole = self.sort == "integers"
        begin, read = x, len(self.nodes)
        for _ in range(self.pick(2, 7)):
            source = self.pick(begin, len(self.nodes))
            links = [self.spread]
            if self.values[source][0] == "i32" and self.sort != "floats":
                links += [lambda source: self.rescale(source, 3000)] * 6
            if not whole:
                links += [self.grow_affine, self.grow_prelu, self.grow_plain]
                links += [lambda source: self.add(source, self.pick(begin, len(self.nodes)))] * 6
            x = self.one(tuple(links))(source)  # type: ignore[operator]
        used = {source for node in self.nodes[read:] for source in node.inputs}
        for value in range(begin, x):
            if value not in used:
                x = self.rescale(x, 3000, value) if whole else self.add(x, value)
        return x

    def add(self, a: int, b: int) -> int:
        return self.node("add", [a, b], "f32", self.values[a][1])

    def spread(self, x: int) -> int:
        """A pooling that keeps the size, for it reads a map whole and not number by number."""
        attrs = {"kernel": 3, "stride": 1, "pad": 1, "ceil": 0}
        return self.node("maxpool", [x], *self.values[x], {}, attrs)

    def rescale(self, x: int, most: int, second: int | None = None) -> int:
        _, dims = self.values[x]
        largest = validate_to(self, x)
        top = min(32767, (1 << 30) // max(1, largest))
        slots = {"scale": self.tensor("int16", "scale", dims[-1:], top),
                 "shift": self.tensor("int32", "shift", dims[-1:], 1 << 20)}  # fmt: skip
        if self.maybe():
            slots["slope"] = self.tensor("int16", "slope", dims[-1:], top)
        inputs = [x] if second is None else [x, second]
        if second is None and self.maybe():
            same = [n for n, value in enumerate(self.values) if value == ("i32", dims)]
            inputs += [int(self.one(tuple(same)))] if same else []
        right = max(0, int(largest * top).bit_length() - most.bit_length() - self.pick(0, 2))
        low, high = (self.pick(k, most) * (self.pick(0, 9) > 0) for k in (0, 1))  # also nothing
        attrs = {"right": min(31, right), "low": -low, "high": high}
        return self.node("rescale", inputs, "i32", dims, slots, attrs)

    def grow_conv(self, x: int) -> int | None:
        _, dims = self.values[x]
        spot = self.spatial(dims)
        if spot is None:
            return None
        kh, kw, stride, pad, height, width = spot
        filters = int(self.one(CHANNELS))  # type: ignore[call-overload]
        kind = str(self.one(("float32", "float16", "int8", "binary")))
        spread = 100 if kind == "int8" else 1
        slots = {"weight": self.tensor(kind, "weight", (filters, kh, kw, dims[2]), spread)}
        if kind == "int8":
            slots["weight_scale"] = self.tensor(self.floats(), "weight_scale", (filters,), 0.05)
        if self.maybe():
            slots["bias"] = self.tensor(self.floats(), "bias", (filters,))
        attrs = {"stride": stride, "pad": pad}
        return self.node("conv", [x], "f32", (height, width, filters), slots, attrs)

    def grow_affine(self, x: int) -> int:
        _, dims = self.values[x]
        slots = {}
        if self.maybe():
            slots["scale"] = self.tensor(self.floats(), "scale", dims[-1:])
        if self.maybe():
            slots["shift"] = self.tensor(self.floats(), "shift", dims[-1:])
        return self.node("affine", [x], "f32", dims, slots)

    def grow_prelu(self, x: int) -> int:
        _, dims = self.values[x]
        size = dims[-1] if self.maybe() else 1
        slots = {"slope": self.tensor(self.floats(), "slope", (size,))}
        return self.node("prelu", [x], "f32", dims, slots)

    def grow_plain(self, x: int) -> int:
        if self.maybe():
            return self.node("relu", [x], "f32", self.values[x][1])
        attrs = {"low": -self.pick(0, 9) / 4, "high": self.pick(0, 9) / 4}
        return self.node("clip", [x], "f32", self.values[x][1], {}, attrs)

    def levels(self, x: int) -> str:
        kind, dims = self.values[x]
        kinds = ("float32", "float16", "int8", "int16", "int32")
        level = str(self.one(kinds if kind == "i32" else kinds[:2]))
        spread = (
            int(self.one((6, 300, 40000))) if level.startswith("int") else 6 if kind == "i32" else 1
        )  # type: ignore
        return self.tensor(level, "threshold", dims[-1:], spread)

    def grow_bits(self, x: int) -> int:
        _, dims = self.values[x]
        op = str(self.one(("sign", "threshold", "interval")))
        slots = {}
        if op == "threshold":
            slots["threshold"] = self.levels(x)
            if self.maybe():
                slots["direction"] = self.tensor("binary", "direction", dims[-1:])
        elif op == "interval":
            slots["low"], slots["high"] = self.levels(x), self.levels(x)
            if self.maybe():
                slots["inside"] = self.tensor("binary", "direction", dims[-1:])
        return self.node(op, [x], "bits", dims, slots)

    def grow_maxpool(self, x: int) -> int | None:
        return self.grow_pool(x, True)

    def grow_pool(self, x: int, largest: bool = False) -> int | None:
        kind, dims = self.values[x]
        kernel = self.pick(1, 3)
        stride, pad, ceil = self.pick(1, 3), self.pick(0, kernel // 2), self.pick(0, 1)
        height, width = (window(size, kernel, stride, pad, ceil) for size in dims[:2])
        if min(height, width) < 1:
            return None
        attrs = {"kernel": kernel, "stride": stride, "pad": pad, "ceil": ceil}
        if largest or kind == "bits" or self.maybe():
            slots = {}
            if kind == "bits" and self.maybe():
                slots["direction"] = self.tensor("binary", "direction", dims[2:])
            return self.node("maxpool", [x], kind, (height, width, dims[2]), slots, attrs)
        attrs["include_pad"] = self.pick(0, 1)
        return self.node("avgpool", [x], "f32", (height, width, dims[2]), {}, attrs)

    def grow_concat(self, x: int) -> int | None:
        return self.grow_join(x, True)

    def grow_join(self, x: int, side_by_side: bool = False) -> int | None:
        kind, dims = self.values[x]
        numbers = ("f32", "i32")
        if kind != "bits" and not side_by_side and self.maybe():
            others = [
                number
                for number, value in enumerate(self.values)
                if value[0] in numbers and value[1] == dims
            ]
            return self.add(x, int(self.one(tuple(others))))  # type: ignore[call-overload]
        others = [
            number
            for number, value in enumerate(self.values)
            if value[1][:-1] == dims[:-1]
            and ((value[0] in numbers) == (kind in numbers))
            and value[0] != "u8"
        ]
        chosen = [x] + [int(self.one(tuple(others))) for _ in range(self.pick(0, 2))]  # type: ignore
        kinds = {self.values[number][0] for number in chosen}
        channels = sum(self.values[number][1][-1] for number in chosen)
        if channels > 400:
            return None
        kind = "f32" if len(kinds) == 2 else kind
        return self.node("concat", chosen, kind, (*dims[:-1], channels))

    def dense(self, x: int, classes: int) -> int:
        _, dims = self.values[x]
        kind = str(self.one(("float32", "float16", "int8")))
        spread = 100 if kind == "int8" else 1
        slots = {"weight": self.tensor(kind, "weight", (classes, dims[0]), spread)}
        if kind == "int8":
            slots["weight_scale"] = self.tensor(self.floats(), "weight_scale", (classes,), 0.05)
        if self.maybe():
            slots["bias"] = self.tensor(self.floats(), "bias", (classes,))
        return self.node("dense", [x], "f32", (classes,), slots)

    def combine(self, classes: int) -> tuple[str, dict[str, str]]:
        kind = str(self.one(("mean", "sum", "soft_vote", "hard_vote")))
        slots = {}
        if kind != "mean" and self.maybe():
            weight = np.ceil(self.rng.random(self.members) * 3).astype(np.float32)
            slots["weight"] = "combine.weight"
            self.tensors["combine.weight"] = Tensor(
                "float32", "combine", (self.members,), False, weight
            )
        if kind == "sum" and self.maybe():
            bias = self.rng.normal(size=classes).astype(np.float32)
            slots["bias"] = "combine.bias"
            self.tensors["combine.bias"] = Tensor("float32", "combine", (classes,), False, bias)
        return kind, slots

    def program(self, steps: int = 8, side: int = 9, sort: str | None = None) -> Program:
        """A whole random Program of about so many nodes on maps up to side x side.

        Half of them are of integers alone, a quarter of floats alone.
        """
        self.sort = sort or str(self.one(("integers", "integers", "floats", "mixed")))
        whole = self.sort == "integers"
        image = (self.pick(1, side), self.pick(1, side), int(self.one((1, 3, 4))))  # type: ignore
        classes = self.pick(1, 6)
        self.values = [("u8", image)]
        if whole or (self.sort == "mixed" and self.maybe()):
            x = self.whole_conv() if self.pick(0, 3) else self.rescale(0, 20000)
        else:
            slots = {
                "scale": self.tensor("float32", "input", image[2:], 0.02),
                "shift": self.tensor(self.floats(), "input", image[2:]),
            }
            x = self.node("normalize", [0], "f32", image, slots)
        for _ in range(self.pick(1, steps)):
            kind, _ = self.values[x]
            if kind == "i32" and whole:
                growers = [self.grow_bits] * 3 + [self.grow_whole] * 3 + [self.grow_maxpool]
                growers += [self.grow_concat, self.grow_links]
            elif kind == "bits":
                growers = [self.grow_bconv] * 4 + [self.grow_join, self.grow_maxpool]
            else:
                growers = [self.grow_bits] * 5 + [self.grow_affine, self.grow_prelu]
                growers += [self.grow_plain, self.grow_pool, self.grow_join]
                growers += [self.grow_links] * 3
                growers += [self.grow_conv] * 2 if kind == "f32" else []
            grown = self.one(tuple(growers))(x)  # type: ignore[operator]
            x = x if grown is None else grown
        if self.values[x][0] == "bits":
            x = self.grow_bconv(x) or self.grow_back(x)
        if whole:
            x = self.whole_head(x, classes)
        elif self.values[x][0] == "f32" and self.maybe():
            _, (height, width, channels) = self.values[x]
            x = self.node("flatten", [x], "f32", (height * width * channels,))
        else:
            x = self.node("global_avg", [x], "f32", self.values[x][1][2:])
        if not whole:
            self.dense(x, classes)
        combine, combine_tensors = self.combine(classes)
        program = Program(
            nodes=tuple(self.nodes),
            tensors=self.tensors,
            members=self.members,
            combine=combine,
            image=image,
            classes=tuple(f"class {number}" for number in range(classes)),
            combine_tensors=combine_tensors,
            info={"name": "random", "seed": 1, "top1": 12.5},
        )
        validate(program)
        return program

    def whole_head(self, x: int, classes: int) -> int:
        height, width, channels = self.values[x][1]
        if self.maybe():
            x = self.rescale(x, 90)
            x = self.node("flatten", [x], "i32", (height * width * channels,))
        else:
            x = self.node("global_sum", [self.rescale(x, 5000)], "i32", (channels,))
        x = self.rescale(x, 20)
        slots = {"weight": self.tensor("int8", "weight", (classes, self.values[x][1][0]), 100)}
        x = self.node("dense", [x], "i32", (classes,), slots)
        attrs: dict = {"fraction": self.pick(0, 14)}
        return self.node("fixed", [self.rescale(x, 8000)], "f32", (classes,), {}, attrs)

    def grow_back(self, x: int) -> int:
        """From bits back to numbers, where a random kernel did not fit: 1x1 always does."""
        height, width, channels = self.values[x][1]
        weight = self.tensor("binary", "weight", (4, 1, 1, channels))
        attrs = {"stride": 1, "pad": 0, "biases": 0}
        return self.node("bconv", [x], "i32", (height, width, 4), {"weight": weight}, attrs)


def validate_to(builder: Builder, x: int) -> int:
    """The bound of a value, by the rules themselves: the Program so far, made whole."""
    image = builder.values[0][1]
    _, dims = builder.values[x]
    if x == 0:
        return 255
    nodes, tensors = list(builder.nodes[:x]), dict(builder.tensors)
    if len(dims) == 3:
        nodes.append(Node("global_avg", "", (x,)))
    else:
        nodes.append(Node("affine", "", (x,)))
    used = {name for node in nodes for name in node.tensors.values()}
    kept = {name: tensor for name, tensor in tensors.items() if name in used}
    classes = tuple(map(str, range(dims[-1])))
    return validate(Program(tuple(nodes), kept, builder.members, "mean", image, classes))[x].bound


def random_program(seed: int, steps: int = 8, side: int = 9, sort: str | None = None) -> Program:
    """The Program of a seed; of "integers" or "floats" alone, "mixed", or any."""
    rng = np.random.default_rng(seed)
    return Builder(lambda low, high: int(rng.integers(low, high + 1)), rng).program(
        steps, side, sort
    )


@st.composite
def programs(draw: Callable, steps: int = 8, side: int = 9) -> Program:
    """A hypothesis strategy of valid Programs; the choices shrink, the numbers follow a seed."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return Builder(lambda low, high: draw(st.integers(low, high)), rng).program(steps, side)


def random_images(program: Program, count: int, seed: int = 0) -> np.ndarray:
    """uint8 (count, H, W, C)."""
    return np.random.default_rng(seed).integers(0, 256, (count, *program.image), dtype=np.uint8)


def logical(tensor: Tensor, member: int) -> np.ndarray:
    """A member's copy as float64: bits as +-1."""
    if tensor.kind == "binary":
        data = unpack_bits(tensor) * 2.0 - 1
    else:
        data = tensor.data.astype(np.float64)
    return data[member] if tensor.own else data


def naive_values(program: Program, image: np.ndarray, member: int) -> list[np.ndarray]:
    """Every value of the graph for one image (H,W,C) and one member, float64, bits as +-1."""
    values = [image.astype(np.float64)]
    for node in program.nodes:
        slots = {
            slot: logical(program.tensors[name], member) for slot, name in node.tensors.items()
        }
        values.append(naive_node(node, [values[number] for number in node.inputs], slots))
    return values


def naive_node(node: Node, inputs: list[np.ndarray], slots: dict[str, np.ndarray]) -> np.ndarray:
    """One operator, word by word from the table in `bnncore.packed.program`."""
    x = inputs[0]
    attrs = node.attrs
    if node.op in ("normalize", "affine"):
        return x * slots.get("scale", 1.0) + slots.get("shift", 0.0)
    if node.op in ("conv", "bconv"):
        weight = slots["weight"]
        if "weight_scale" in slots:
            weight = weight * slots["weight_scale"][:, None, None, None]
        if "zero" in slots:
            frame = np.ones(((x.shape[0] + 2 * int(attrs["pad"])),
                             (x.shape[1] + 2 * int(attrs["pad"])), 1)) * slots["zero"]  # fmt: skip
            pad = int(attrs["pad"])
            frame[pad : pad + x.shape[0], pad : pad + x.shape[1]] = x
            return naive_conv(frame, weight, int(attrs["stride"]), 0)
        out = naive_conv(x, weight, int(attrs["stride"]), int(attrs["pad"]))
        return out + slots.get("bias", 0.0)
    if node.op == "rescale":
        scale = np.where(x >= 0, slots["scale"], slots.get("slope", slots["scale"]))
        y = np.floor((x * scale + slots["shift"]) / 2.0 ** attrs["right"])
        return np.clip(y + (inputs[1] if len(inputs) > 1 else 0), attrs["low"], attrs["high"])
    if node.op == "fixed":
        return x / 2.0 ** attrs["fraction"]
    if node.op == "prelu":
        return np.where(x >= 0, x, x * slots["slope"])
    if node.op == "relu":
        return np.where(x > 0, x, 0.0)
    if node.op == "clip":
        return np.minimum(np.maximum(x, attrs["low"]), attrs["high"])
    if node.op == "sign":
        return np.where(x >= 0, 1.0, -1.0)
    if node.op == "threshold":
        up = slots.get("direction", np.ones(x.shape[-1])) > 0
        return np.where(np.where(up, x >= slots["threshold"], x <= slots["threshold"]), 1.0, -1.0)
    if node.op == "interval":
        keep = slots.get("inside", np.ones(x.shape[-1]))
        between = (slots["low"] <= x) & (x <= slots["high"])
        return np.where(between, 1.0, -1.0) * keep
    if node.op == "add":
        return x + inputs[1]
    if node.op == "concat":
        return np.concatenate(inputs, axis=-1)
    if node.op == "maxpool" and "direction" in slots:
        return naive_pool(node, x * slots["direction"]) * slots["direction"]
    if node.op in ("maxpool", "avgpool", "sumpool"):
        return naive_pool(node, x)
    if node.op == "global_sum":
        return x.sum(axis=(0, 1))
    if node.op == "global_avg":
        return x.mean(axis=(0, 1))
    if node.op == "flatten":
        return np.array([v for channel in range(x.shape[2]) for v in x[:, :, channel].ravel()])
    if node.op == "dense":
        weight = slots["weight"]
        if "weight_scale" in slots:
            weight = weight * slots["weight_scale"][:, None]
        return weight @ x + slots.get("bias", 0.0)
    raise AssertionError(node.op)


def naive_conv(x: np.ndarray, weight: np.ndarray, stride: int, pad: int) -> np.ndarray:
    filters, kh, kw, _ = weight.shape
    height, width = (
        (x.shape[0] + 2 * pad - kh) // stride + 1,
        (x.shape[1] + 2 * pad - kw) // stride + 1,
    )
    out = np.zeros((height, width, filters))
    for row in range(height):
        for column in range(width):
            for i in range(kh):
                for j in range(kw):
                    y, z = row * stride - pad + i, column * stride - pad + j
                    if 0 <= y < x.shape[0] and 0 <= z < x.shape[1]:
                        out[row, column] += weight[:, i, j] @ x[y, z]
    return out


def naive_pool(node: Node, x: np.ndarray) -> np.ndarray:
    kernel, stride, pad = (int(node.attrs[key]) for key in ("kernel", "stride", "pad"))
    height, width = (
        window(size, kernel, stride, pad, int(node.attrs["ceil"])) for size in x.shape[:2]
    )
    out = np.zeros((height, width, x.shape[2]))
    counts = np.ones((height, width), int)
    for row in range(height):
        for column in range(width):
            taps, padded = [], 0
            for y in range(row * stride - pad, row * stride - pad + kernel):
                for z in range(column * stride - pad, column * stride - pad + kernel):
                    if 0 <= y < x.shape[0] and 0 <= z < x.shape[1]:
                        taps.append(x[y, z])
                    elif -pad <= y < x.shape[0] + pad and -pad <= z < x.shape[1] + pad:
                        padded += 1
            if node.op == "maxpool":
                out[row, column] = np.max(taps, axis=0)
            else:
                count = len(taps) + (padded if node.attrs["include_pad"] else 0)
                out[row, column] = np.sum(taps, axis=0) / count
                counts[row, column] = count
    return np.rint(out * math.lcm(*map(int, counts.flat))) if node.op == "sumpool" else out
