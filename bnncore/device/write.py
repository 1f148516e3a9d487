"""A step as a C function: a loop over pixels that calls kernels, or calls that make a map whole."""

from __future__ import annotations

import re

import numpy as np

from bnncore.device.arrays import Code, c_float, one_copy, words
from bnncore.device.steps import BITS, Step
from bnncore.packed.program import Node, Tensor


class Writer:
    """Writes one step's function."""

    def __init__(self, code: Code, step: Step, label: str) -> None:
        self.code, self.step, self.label = code, step, label
        self.program, self.shapes = code.program, code.shapes
        self.head: list[str] = []  # before the pixels
        self.body: list[str] = []  # of one pixel
        self.whole: list[str] = []  # instead of pixels
        self.scratch: dict[str, tuple[str, int]] = {}  # name -> type, elements
        self.vector = ""  # which of v (floats) and s (sums) holds the numbers of the pixel

    # what a step needs for itself, and where values lie

    def room(self, name: str, kind: str, count: int) -> str:
        old = self.scratch.get(name, (kind, 0))
        self.scratch[name] = (kind, max(count, old[1]))
        return name

    def channels(self, value: int) -> int:
        return self.shapes[value].dims[-1]

    def map(self, value: int) -> tuple[int, int, int]:
        dims = self.shapes[value].dims
        return (dims[0], dims[1], dims[2]) if len(dims) == 3 else (1, 1, dims[0])

    def width(self, value: int) -> int:
        """Elements of one pixel in memory."""
        n = self.channels(value)
        return -(-n // 32) if self.shapes[value].kind == "bits" else n

    def pixel(self, value: int) -> str:
        h, w, _ = self.map(value)
        n = self.width(value)
        return f"V{value}" if h * w == 1 else f"V{value} + p * {n}"

    def v(self, value: int) -> str:
        return self.room("v", "bnn_f32", self.channels(value))

    def s(self, value: int) -> str:
        return self.room("s", "bnn_i32", self.channels(value))

    def say(self, kernel: str, *arguments: object) -> None:
        self.body.append(self.code.call(kernel, *arguments))

    # tensors

    def floats(self, node: Node, slot: str) -> str:
        """A tensor of floats; of half precision it is expanded before the pixels."""
        name = node.tensors[slot]
        tensor = self.program.tensors[name]
        if tensor.kind == "float16":
            array = self.code.array(name, "", "uint16_t", lambda t, m: one_copy(t, m).view("<u2"))
            count = int(np.prod(tensor.shape))
            place = self.room(f"f{len(self.scratch)}", "bnn_f32", count)
            self.head.append(self.code.call("expand", place, array, count))
            return place
        return self.code.array(name, "", "float", lambda t, m: one_copy(t, m).astype("<f4"))

    def bits(self, node: Node, slot: str) -> str:
        name = node.tensors.get(slot)
        if name is None:
            return "0"
        return self.code.array(name, "", "uint32_t", lambda t, m: words(one_copy(t, m)))

    # numbers of a pixel

    def to_floats(self, value: int) -> None:
        if self.vector == "s":
            self.say("to_float", self.v(value), self.s(value), self.channels(value))
        self.vector = "v"

    def anchor(self) -> None:
        step = self.step
        if step.anchor is None:
            kind = self.shapes[step.start].kind
            self.vector = "s" if kind == "i32" else "v"
            kernel, to = ("load_sums", self.s) if kind == "i32" else ("load", self.v)
            self.say(kernel, to(step.start), self.pixel(step.start), self.channels(step.start))
        else:
            getattr(self, f"_{step.anchor.op}")(step.anchor, step.start)

    def window(self, node: Node, kernel: tuple[int, int], source: int) -> str:
        h, w, c = self.map(source)
        stride, pad = node.attrs["stride"], node.attrs["pad"]
        numbers = f"{h}, {w}, {c}, {kernel[0]}, {kernel[1]}, {stride}, {pad}"
        self.head.insert(0, f"static const bnn_window g = {{{numbers}}};")
        return "&g"

    def _bconv(self, node: Node, value: int) -> None:
        filters, kh, kw, channels = self.program.tensors[node.tensors["weight"]].shape
        n = -(-kh * kw * channels // 32)
        array = self.code.array(
            node.tensors["weight"], "rows", "uint32_t",
            lambda t, m: words(one_copy(t, m).reshape(filters, -1)),
        )  # fmt: skip
        g = self.window(node, (kh, kw), node.inputs[0])
        row, mask = self.room("row", "bnn_u32", n), self.room("mask", "bnn_u32", n)
        where = ("y", "x") if self.loops else ("0", "0")
        self.say("bconv", g, f"V{node.inputs[0]}", *where, array, filters, n, row, mask,
                 self.s(value))  # fmt: skip
        self.vector = "s"

    def _conv(self, node: Node, value: int) -> None:
        tensor = self.program.tensors[node.tensors["weight"]]
        filters, kh, kw, channels = tensor.shape
        source = 0 if self.step.image is not None else node.inputs[0]
        height, width, _ = self.map(source)
        stride, pad = int(node.attrs["stride"]), int(node.attrs["pad"])
        kernel, array, taps = self._weights(node, tensor)
        v = self.v(value)
        self.body.append(self.code.call("clear", v, filters))
        y, x = ("y", "x") if self.loops else ("0", "0")
        at = f"((int32_t)a * {width} + b) * {channels}"
        if self.step.image is not None:
            pixel = self.room("in", "bnn_f32", channels)
            scale, shift = (self.floats(self.step.image, slot) for slot in ("scale", "shift"))
            load = [self.code.call("load_image", pixel, f"image + {at}", channels, scale, shift)]
        else:
            pixel, load = f"V{source} + {at}", []
        tap = self.code.call(kernel, v, pixel, f"{array} + (i * {kw} + j) * {taps}", channels,
                             filters)  # fmt: skip
        lines = [*load, tap]
        self.body += [
            f"for (i = 0; i < {kh}; i++)",
            f"    for (j = 0; j < {kw}; j++) {{",
            f"        const int a = {y} * {stride} - {pad} + i, b = {x} * {stride} - {pad} + j;",
            f"        if (a >= 0 && a < {height} && b >= 0 && b < {width}) {{",
            *(f"            {line}" for line in lines),
            "        }",
            "    }",
        ]
        self.indices |= {"i", "j"}
        self._finish_sums(node, filters, v)

    def _weights(self, node: Node, tensor: Tensor) -> tuple[str, str, int]:
        """(kernel, array, elements of a tap): weights by taps, inputs, filters."""
        filters, _, _, channels = tensor.shape
        name = node.tensors["weight"]

        def by_taps(t: Tensor, m: int) -> np.ndarray:
            return np.ascontiguousarray(one_copy(t, m).transpose(1, 2, 3, 0))

        if tensor.kind == "binary":
            array = self.code.array(name, "taps", "uint32_t", lambda t, m: words(by_taps(t, m)))
            return "mac_bits", array, channels * -(-filters // 32)
        kinds = {
            "float32": ("f32", "float"),
            "int8": ("i8", "int8_t"),
            "float16": ("f16", "uint16_t"),
        }
        short, kind = kinds[tensor.kind]
        make = by_taps if short != "f16" else lambda t, m: by_taps(t, m).view("<u2")
        return f"mac_{short}", self.code.array(name, "taps", kind, make), channels * filters

    def _finish_sums(self, node: Node, filters: int, v: str) -> None:
        if "weight_scale" in node.tensors:
            self.say("scale", v, self.floats(node, "weight_scale"), filters)
        if "bias" in node.tensors:
            self.say("add", v, self.floats(node, "bias"), filters)
        self.vector = "v"

    def _dense(self, node: Node, value: int) -> None:
        tensor = self.program.tensors[node.tensors["weight"]]
        outputs, features = tensor.shape
        short, kind = {"float32": ("f32", "float"), "int8": ("i8", "int8_t"),
                       "float16": ("f16", "uint16_t")}[tensor.kind]  # fmt: skip
        view = "<u2" if short == "f16" else tensor.data.dtype
        array = self.code.array(
            node.tensors["weight"], "", kind, lambda t, m: one_copy(t, m).view(view)
        )
        v = self.v(value)
        self.say(f"dense_{short}", v, f"V{node.inputs[0]}", array, features, outputs)
        self._finish_sums(node, outputs, v)

    def _normalize(self, node: Node, value: int) -> None:
        n = self.channels(value)
        at = f"image + p * {n}" if self.loops else "image"
        scale, shift = self.floats(node, "scale"), self.floats(node, "shift")
        self.say("load_image", self.v(value), at, n, scale, shift)
        self.vector = "v"

    def _pool(self, node: Node, value: int, *extra: object) -> None:
        source = node.inputs[0]
        kernel = int(node.attrs["kernel"])
        g = self.window(node, (kernel, kernel), source)
        kind = self.shapes[source].kind
        where = ("y", "x") if self.loops else ("0", "0")
        sums = node.op == "maxpool" and kind == "i32"
        to = self.s(value) if sums else self.v(value)
        self.say(f"{node.op}_{kind}", g, f"V{source}", *where, *extra, to)
        self.vector = "s" if sums else "v"

    def _maxpool(self, node: Node, value: int) -> None:
        self._pool(node, value)

    def _avgpool(self, node: Node, value: int) -> None:
        self._pool(node, value, int(node.attrs["include_pad"]))

    def _global_avg(self, node: Node, value: int) -> None:
        source = node.inputs[0]
        h, w, c = self.map(source)
        kind = self.shapes[source].kind
        self.say(f"global_avg_{kind}", f"V{source}", h * w, c, self.v(value))
        self.vector = "v"

    def _flatten(self, node: Node, value: int) -> None:
        h, w, c = self.map(node.inputs[0])
        self.say("flatten", self.v(value), f"V{node.inputs[0]}", h * w, c)
        self.vector = "v"

    def _concat(self, node: Node, value: int) -> None:
        kind = self.shapes[value].kind
        if kind == "bits":
            to = self.pixel(value)
            self.body.append(f"memset({to}, 0, {4 * self.width(value)});")
        at = 0
        for source in node.inputs:
            n, part = self.channels(source), self.shapes[source].kind
            if kind == "bits":
                self.say("concat_bits", to, at, self.pixel(source), n)
            elif kind == "i32":
                self.say("load_sums", f"{self.s(value)} + {at}", self.pixel(source), n)
            else:
                kernel = "load" if part == "f32" else "to_float"
                self.say(kernel, f"{self.v(value)} + {at}", self.pixel(source), n)
            at += n
        self.vector = {"bits": "", "i32": "s", "f32": "v"}[kind]

    # links

    def link(self, before: int, value: int, node: Node) -> None:
        """Go on from the numbers of value `before`."""
        n = self.channels(value)
        if node.op in BITS:
            self._to_bits(value, node, n)
            return
        self.to_floats(before)
        v = self.v(value)
        if node.op == "affine":
            if "scale" in node.tensors:
                self.say("scale", v, self.floats(node, "scale"), n)
            if "shift" in node.tensors:
                self.say("add", v, self.floats(node, "shift"), n)
        elif node.op == "prelu":
            one = self.program.tensors[node.tensors["slope"]].shape[0] == 1
            self.say("prelu", v, self.floats(node, "slope"), int(not one), n)
        elif node.op == "relu":
            self.say("relu", v, n)
        elif node.op == "clip":
            low, high = (c_float(node.attrs[key]) for key in ("low", "high"))
            self.say("clip", v, low, high, n)
        else:
            others = [source for source in node.inputs if source != before]
            other = others[0] if others else before
            kernel = "add_sums" if self.shapes[other].kind == "i32" else "add"
            self.say(kernel, v, self.pixel(other), n)

    def _to_bits(self, value: int, node: Node, n: int) -> None:
        to = self.pixel(value)
        if node.op == "sign":
            kernel = "sign_i32" if self.vector == "s" else "sign_f32"
            self.say(kernel, to, self.vector, n)
            return
        slots = ("threshold",) if node.op == "threshold" else ("low", "high")
        tensors = [self.program.tensors[node.tensors[slot]] for slot in slots]
        if any(tensor.data.dtype.kind == "f" for tensor in tensors):
            self.to_floats(value)
            levels = [self.floats(node, slot) for slot in slots]
            short = "f32"
        else:
            wide = any(tensor.kind == "int32" for tensor in tensors)
            short, kind = ("i32", "int32_t") if wide else ("i16", "int16_t")
            dtype = "<i4" if wide else "<i2"
            levels = [
                self.code.array(node.tensors[slot], short, kind,
                                lambda t, m: one_copy(t, m).astype(dtype))
                for slot in slots
            ]  # fmt: skip
        bits = self.bits(node, "direction" if node.op == "threshold" else "inside")
        self.say(f"{node.op}_{short}", to, self.vector, n, *levels, bits)

    def store(self, value: int) -> None:
        kernel = "load_sums" if self.vector == "s" else "load"
        self.say(kernel, self.pixel(value), self.vector, self.channels(value))

    # the function

    def write(self) -> str:
        step = self.step
        h, w, _ = self.map(step.last if step.links else step.start)
        self.loops = h * w > 1
        self.indices: set[str] = set()
        self.anchor()
        if step.anchor is not None and step.start in step.stored and self.vector:
            self.store(step.start)
        before = step.start
        for value, node in step.links:
            self.link(before, value, node)
            before = value
            if value in step.stored:
                self.store(value)
        lines = []
        text = "\n".join([*self.head, *self.body])
        if self.loops:
            self.indices |= {"y", "x"}
        if self.indices:
            lines.append(f"int {', '.join(sorted(self.indices))};")
        windows = [line for line in self.head if line.startswith("static")]
        lines = windows + lines + [line for line in self.head if not line.startswith("static")]
        if self.loops:
            lines += [f"for (y = 0; y < {h}; y++)", f"    for (x = 0; x < {w}; x++) {{"]
            if re.search(r"\bp\b", text):
                lines.append(f"        const int32_t p = (int32_t)y * {w} + x;")
            lines += [f"        {line}" for line in self.body] + ["    }"]
        else:
            lines += self.body
        inside = "\n".join(f"    {line}" for line in lines)
        name = re.sub(r"[^\w .,:+-]", "_", step.name, flags=re.ASCII)  # no end of the comment
        return f"/* {name} */\nstatic void {self.label}({self.parameters})\n{{\n{inside}\n}}\n"

    @property
    def parameters(self) -> str:
        found = []
        if 0 in self.step.inputs:
            found.append("const uint8_t *image")
        text = "\n".join([*self.head, *self.body])
        if re.search(r"\[m\]", text):
            found.append("int m")
        return ", ".join(found) or "void"

    @property
    def arguments(self) -> str:
        return ", ".join(word.split()[-1].lstrip("*") for word in self.parameters.split(", ")
                         if word != "void")  # fmt: skip
