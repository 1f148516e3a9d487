"""A step as a C function: a loop over pixels that calls kernels, or calls that make a map whole."""

from __future__ import annotations

import re

import numpy as np

from bnncore.device import sliced
from bnncore.device.arrays import Code, c_float, one_copy, words
from bnncore.device.steps import BITS, Step
from bnncore.packed.program import Node, Tensor

SUM = 1 << 30  # larger than any sum
FLOATS = {  # kind of weights -> kernel's ending, type in C
    "float32": ("f32", "float"),
    "int8": ("i8", "int8_t"),
    "float16": ("f16", "uint16_t"),
}


class Writer:
    """Writes one step's function."""

    def __init__(self, code: Code, step: Step, label: str) -> None:
        self.code, self.step, self.label = code, step, label
        self.program, self.shapes = code.program, code.shapes
        self.head: list[str] = []  # before the pixels
        self.body: list[str] = []  # of one pixel
        self.each: list[str] = []  # of one channel of it
        self.group: list[str] = []  # of 32 pixels, before the first of them
        self.scratch: dict[str, tuple[str, int]] = {}  # name -> type, elements
        self.done = False  # whether the anchor has made the bits
        self.word: tuple[str, str] | None = None  # where bits go, and words to negate them by
        self.number = ""  # which of v (a float) and u (a sum) holds the channel's number
        h, w, _ = self.map(step.last)
        self.size = h, w
        self.loops = h * w > 1

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

    def pixel(self, value: int, index: str = "p") -> str:
        h, w, _ = self.map(value)
        n = self.width(value)
        return f"V{value}" if h * w == 1 else f"V{value} + {index} * {n}"

    def element(self, value: int) -> str:
        """Channel c of the pixel."""
        h, w, n = self.map(value)
        return f"V{value}[c]" if h * w == 1 else f"V{value}[p * {n} + c]"

    def numbers(self, value: int, kind: str) -> str:
        """Where an anchor puts a pixel's numbers: the map itself, or room for them; then
        each channel goes on with its own."""
        if value in self.step.stored:
            place, element = self.pixel(value), self.element(value)
        else:
            name, ctype = {"f32": ("numbers", "bnn_f32"), "i32": ("sums", "bnn_i32")}[kind]
            place = self.room(name, ctype, self.channels(value))
            element = f"{place}[c]"
        self.take(element, kind)
        return place

    def take(self, element: str, kind: str) -> None:
        self.number = "u" if kind == "i32" else "v"
        self.each.append(f"const int32_t u = {element};" if kind == "i32" else
                         f"float v = {element};")  # fmt: skip

    def to_float(self) -> None:
        if self.number == "u":
            self.each.append("float v = (float)u;")
        self.number = "v"

    def say(self, kernel: str, *arguments: object) -> None:
        self.body.append(self.code.call(kernel, *arguments))

    def change(self, kernel: str, *arguments: object) -> None:
        self.each.append(f"v = {self.code.call(kernel, 'v', *arguments)}")

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

    # anchors

    def anchor(self) -> None:
        step = self.step
        if step.anchor is None:
            self.take(self.element(step.start), self.shapes[step.start].kind)
        else:
            getattr(self, f"_{step.anchor.op}")(step.anchor, step.start)

    def window(self, node: Node, kernel: tuple[int, int], source: int) -> str:
        h, w, c = self.map(source)
        stride, pad = node.attrs["stride"], node.attrs["pad"]
        numbers = f"{h}, {w}, {c}, {kernel[0]}, {kernel[1]}, {stride}, {pad}"
        self.head.insert(0, f"static const bnn_window g = {{{numbers}}};")
        return "&g"

    @property
    def where(self) -> tuple[str, str]:
        return ("y", "x") if self.loops else ("0", "0")

    def _bconv(self, node: Node, value: int) -> None:
        filters, kh, kw, channels = self.program.tensors[node.tensors["weight"]].shape
        g = self.window(node, (kh, kw), node.inputs[0])
        if sliced.wins((filters, kh, kw, channels), int(node.attrs["pad"]), self.map(value)):
            self._sliced(node, value, g)
            return
        n = -(-kh * kw * channels // 32)
        array = self.code.array(
            node.tensors["weight"], "rows", "uint32_t",
            lambda t, m: words(one_copy(t, m).reshape(filters, -1)),
        )  # fmt: skip
        row, mask = self.room("row", "bnn_u32", n), self.room("mask", "bnn_u32", n)
        self.say("bconv", g, f"V{node.inputs[0]}", *self.where, array, filters, n, row, mask,
                 self.numbers(value, "i32"))  # fmt: skip

    def _sliced(self, node: Node, value: int, g: str) -> None:
        """32 pixels at a time; where all that follows is to bits, these are made at once."""
        weight = self.program.tensors[node.tensors["weight"]]
        filters, kh, kw, channels = weight.shape
        products = kh * kw * channels
        n, planes = sliced.padded(products), sliced.planes(products)
        _, width, _ = self.map(value)
        pixels = self.size[0] * self.size[1]
        array = self.code.array(
            node.tensors["weight"], "triples", "uint32_t",
            lambda t, m: sliced.triples(one_copy(t, m).reshape(filters, -1)),
        )  # fmt: skip
        room = self.room("room", "bnn_u32", 32)
        inputs = self.room("planes", "bnn_u32", 2 * n)
        table = self.room("table", "bnn_u32", 16 * n // 3)
        source = node.inputs[0]
        stride, pad = int(node.attrs["stride"]), int(node.attrs["pad"])
        if (stride, kh, kw) == (1, 2 * pad + 1, 2 * pad + 1):
            flat = self.room("flat", "bnn_u32", -(-pixels // 32) * channels)
            slice_ = self.code.call("slice", f"V{source}", pixels, channels, room, flat)
            self.head.append(slice_)
            taps = self.code.call("planes_flat", g, flat, "q", n, inputs)
        else:
            taps = self.code.call("planes", g, f"V{source}", width, pixels, "q", n, inputs, room)
        self.group += [taps, self.code.call("triples", inputs, n, table)]
        limits = self._limits(value, products)
        if limits is None:
            sums = self.room("sums", "bnn_i32", 32 * filters)
            self.group.append(self.code.call("bconv_sums", table, array, filters, n // 24, planes,
                                             products, sums))  # fmt: skip
            self.take(f"sums[(p - q) * {filters} + c]", "i32")
            if value in self.step.stored:
                self.each.append(f"{self.element(value)} = u;")
        else:
            self.done = True
            bits = self.step.last
            self.group.append(self.code.call(
                "bconv_bits", table, array, filters, n // 24, planes, limits, room,
                f"{pixels} - q", self.pixel(bits, "q")))  # fmt: skip

    def _limits(self, value: int, products: int) -> str | None:
        """The array of limits, if the step goes from sums to bits by integers alone."""
        links = self.step.links
        if len(links) != 1 or links[0][1].op not in BITS or value in self.step.stored:
            return None
        node = links[0][1]
        tensors = {slot: self.program.tensors[name] for slot, name in node.tensors.items()}
        if any(tensor.data.dtype.kind == "f" for tensor in tensors.values()):
            return None
        return self.code.group(
            list(node.tensors.values()), f"limits {products} {node.op} {self.channels(value)}",
            "int16_t",
            lambda copies: sliced.limits(
                dict(zip(tensors, copies, strict=True)), products, self.channels(value)
            ),
        )  # fmt: skip

    def _conv(self, node: Node, value: int) -> None:
        tensor = self.program.tensors[node.tensors["weight"]]
        filters, kh, kw, channels = tensor.shape
        image = self.step.image
        source = 0 if image is not None else node.inputs[0]
        plain = kh * kw == 1 and node.attrs["stride"] == 1 and not node.attrs["pad"]
        if image is None and plain:
            inputs = self.pixel(source)
        else:
            g = self.window(node, (kh, kw), source)
            inputs = self.room("window", "bnn_f32", kh * kw * channels)
            if image is None:
                self.say("window_f32", g, f"V{source}", *self.where, inputs)
            else:
                norm = [self.floats(image, slot) for slot in ("scale", "shift")]
                self.say("window_image", g, "image", *self.where, *norm, inputs)
        kernel, array = self._weights(node, tensor)
        to = self.numbers(value, "f32")
        self.say(kernel, to, inputs, array, kh * kw * channels, filters)
        self._finish_sums(node, value)

    def _weights(self, node: Node, tensor: Tensor) -> tuple[str, str]:
        """(kernel, array): weights by taps, inputs, filters."""
        name = node.tensors["weight"]

        def by_taps(t: Tensor, m: int) -> np.ndarray:
            return np.ascontiguousarray(one_copy(t, m).transpose(1, 2, 3, 0))

        if tensor.kind == "binary":
            array = self.code.array(name, "taps", "uint32_t", lambda t, m: words(by_taps(t, m)))
            return "products_bits", array
        short, kind = FLOATS[tensor.kind]
        make = by_taps if short != "f16" else lambda t, m: by_taps(t, m).view("<u2")
        return f"products_{short}", self.code.array(name, "taps", kind, make)

    def _finish_sums(self, node: Node, value: int) -> None:
        """Scale and bias of float weights, a channel at a time."""
        if "weight_scale" in node.tensors:
            self.each.append(f"v *= {self.floats(node, 'weight_scale')}[c];")
        if "bias" in node.tensors:
            self.each.append(f"v += {self.floats(node, 'bias')}[c];")
        if len(self.each) > 1 and value in self.step.stored:
            self.each.append(f"{self.element(value)} = v;")

    def _dense(self, node: Node, value: int) -> None:
        tensor = self.program.tensors[node.tensors["weight"]]
        outputs, features = tensor.shape
        short, kind = FLOATS[tensor.kind]
        view = "<u2" if short == "f16" else tensor.data.dtype
        array = self.code.array(
            node.tensors["weight"], "", kind, lambda t, m: one_copy(t, m).view(view)
        )
        to = self.numbers(value, "f32")
        self.say(f"dense_{short}", to, f"V{node.inputs[0]}", array, features, outputs)
        self._finish_sums(node, value)

    def _normalize(self, node: Node, value: int) -> None:
        n = self.channels(value)
        self.take(f"(float)image[{f'p * {n} + c' if self.loops else 'c'}]", "f32")
        scale, shift = (self.floats(node, slot) for slot in ("scale", "shift"))
        self.change("affine", f"{scale}[c]", f"{shift}[c]")
        if value in self.step.stored:
            self.each.append(f"{self.element(value)} = v;")

    def _pool(self, node: Node, value: int, *extra: object) -> None:
        source = node.inputs[0]
        kernel = int(node.attrs["kernel"])
        g = self.window(node, (kernel, kernel), source)
        kind = self.shapes[source].kind
        to = self.numbers(value, self.shapes[value].kind)
        self.say(f"{node.op}_{kind}", g, f"V{source}", *self.where, *extra, to)

    def _maxpool(self, node: Node, value: int) -> None:
        self._pool(node, value)

    def _avgpool(self, node: Node, value: int) -> None:
        self._pool(node, value, int(node.attrs["include_pad"]))

    def _global_avg(self, node: Node, value: int) -> None:
        source = node.inputs[0]
        h, w, c = self.map(source)
        kind = self.shapes[source].kind
        self.say(f"global_avg_{kind}", f"V{source}", h * w, c, self.numbers(value, "f32"))

    def _flatten(self, node: Node, value: int) -> None:
        h, w, c = self.map(node.inputs[0])
        self.say("flatten", self.numbers(value, "f32"), f"V{node.inputs[0]}", h * w, c)

    def _concat(self, node: Node, value: int) -> None:
        kind = self.shapes[value].kind
        if kind == "bits":
            to = self.pixel(value)
            self.body.append(f"memset({to}, 0, {4 * self.width(value)});")
        else:
            to = self.numbers(value, kind)
        at = 0
        for source in node.inputs:
            n, part = self.channels(source), self.shapes[source].kind
            if kind == "bits":
                self.say("concat_bits", to, at, self.pixel(source), n)
            else:
                kernel = {"i32i32": "load_sums", "f32f32": "load"}.get(kind + part, "to_float")
                self.say(kernel, f"{to} + {at}", self.pixel(source), n)
            at += n

    # links: what becomes of a channel's number

    def link(self, before: int, value: int, node: Node) -> None:
        """Go on from the number of value `before`."""
        if node.op in BITS:
            self._to_bits(value, node)
            return
        self.to_float()
        if node.op == "affine":
            scale, shift = (
                f"{self.floats(node, slot)}[c]" if slot in node.tensors else ""
                for slot in ("scale", "shift")
            )
            if scale and shift:
                self.change("affine", scale, shift)
            elif scale or shift:
                self.each.append(f"v *= {scale};" if scale else f"v += {shift};")
        elif node.op == "prelu":
            one = self.program.tensors[node.tensors["slope"]].shape[0] == 1
            self.change("prelu", f"{self.floats(node, 'slope')}[{'0' if one else 'c'}]")
        elif node.op == "relu":
            self.change("relu")
        elif node.op == "clip":
            self.change("clip", *(c_float(node.attrs[key]) for key in ("low", "high")))
        else:
            others = [source for source in node.inputs if source != before]
            other = others[0] if others else before
            cast = "(float)" if self.shapes[other].kind == "i32" else ""
            self.each.append(f"v += {cast}{self.element(other)};")
        if value in self.step.stored:
            self.each.append(f"{self.element(value)} = v;")

    def _to_bits(self, value: int, node: Node) -> None:
        """A bit a channel; where the comparison is the other way round, the word is negated."""
        turn = "direction" if node.op == "threshold" else "inside"
        flip = ""
        if turn in node.tensors:
            flip = self.code.array(
                node.tensors[turn], "flip", "uint32_t", lambda t, m: words(~one_copy(t, m))
            )
        if node.op == "sign":
            test = f"{self.number} >= 0"
        elif node.op == "threshold":
            level = self._level(node, "threshold", "direction")
            test = f"{self.number} >= {level}"
        else:
            low, high = (self._level(node, slot) for slot in ("low", "high"))
            test = f"{low} <= {self.number} && {self.number} <= {high}"
        self.each.append(f"word |= (uint32_t)({test}) << (c & 31);")
        self.word = self.pixel(value), flip

    def _level(self, node: Node, slot: str, direction: str = "") -> str:
        """A level to compare with; those of direction 0, ``x <= level``, become the next larger
        number, for ``not x >= it``."""
        names = [node.tensors[name] for name in (slot, direction) if name in node.tensors]
        tensors = [self.program.tensors[name] for name in names]
        real = tensors[0].data.dtype.kind == "f"
        if real:
            self.to_float()
            if len(names) == 1:
                return f"{self.floats(node, slot)}[c]"
        wide = not real and tensors[0].data.max(initial=0) >= np.iinfo(np.int16).max
        kind = "float" if real else "int32_t" if wide else "int16_t"

        def make(copies: list[np.ndarray]) -> np.ndarray:
            turned = copies[1] == 0 if len(copies) == 2 else np.zeros(len(copies[0]), bool)
            if real:
                level = copies[0].astype("<f4")
                # Above the largest float nothing comes that is a number.
                after = np.nextafter(level, np.finfo(np.float32).max)
                return np.where(turned, after, level)
            level = (copies[0].astype(np.int64) + turned).clip(-SUM, SUM)
            return level.astype("<i4" if wide else "<i2")

        return self.code.group(names, f"levels {kind}", kind, make) + "[c]"

    # the function

    def write(self) -> str:
        step = self.step
        self.anchor()
        if not self.done:
            before = step.start
            for value, node in step.links:
                self.link(before, value, node)
                before = value
        body = [*self.body, *self._over_channels()]
        body = self._over_pixels(body)
        text = "\n".join(body)
        indices = [name for name in "ckxy" if re.search(rf"for \({name} =", text)]
        lines = [f"int {', '.join(indices)};"] if indices else []
        declared = tuple(line for line in self.head if line.startswith("static"))
        lines = [*declared, *lines, *(line for line in self.head if line not in declared), *body]
        inside = "\n".join(_in(lines))
        name = re.sub(r"[^\w .,:+-]", "_", step.name, flags=re.ASCII)  # no end of the comment
        return f"/* {name} */\nstatic void {self.label}({self.parameters})\n{{\n{inside}\n}}\n"

    def _over_channels(self) -> list[str]:
        n = self.channels(self.step.last)
        if len(self.each) < 2:
            return []
        if self.word is None:
            return [f"for (c = 0; c < {n}; c++) {{", *_in(self.each), "}"]
        place, flip = self.word
        if n <= 32:
            first, end, k = "0", f"c < {n}", "0"
        else:
            first, end, k = "32 * k", f"c < {n} && c < 32 * k + 32", "k"
        word = ["uint32_t word = 0;", f"for (c = {first}; {end}; c++) {{", *_in(self.each), "}",
                f"({place})[{k}] = word{f' ^ {flip}[{k}]' if flip else ''};"]  # fmt: skip
        # Braces, for the word is declared here.
        return ["{" if n <= 32 else f"for (k = 0; k < {-(-n // 32)}; k++) {{", *_in(word), "}"]

    def _over_pixels(self, body: list[str]) -> list[str]:
        h, w = self.size
        if self.group:
            if body:
                end = f"p < {h * w} && p < q + 32"
                body = ["int32_t p;", *self.group, f"for (p = q; {end}; p++) {{", *_in(body), "}"]
            else:
                body = self.group
            self.head.insert(0, "int32_t q;")
            return [f"for (q = 0; q < {h * w}; q += 32) {{", *_in(body), "}"]
        if not self.loops:
            return body
        text = "\n".join(body)
        if not re.search(r"\b[xy]\b", text):
            return ["int32_t p;", f"for (p = 0; p < {h * w}; p++) {{", *_in(body), "}"]
        place = [f"const int32_t p = (int32_t)y * {w} + x;"] if re.search(r"\bp\b", text) else []
        return [f"for (y = 0; y < {h}; y++)", f"    for (x = 0; x < {w}; x++) {{",
                *_in(_in([*place, *body])), "    }"]  # fmt: skip

    @property
    def parameters(self) -> str:
        found = []
        if 0 in self.step.inputs:
            found.append("const uint8_t *image")
        text = "\n".join([*self.head, *self.group, *self.body, *self.each])
        if re.search(r"\[m\]", text):
            found.append("int m")
        return ", ".join(found) or "void"

    @property
    def arguments(self) -> str:
        return ", ".join(word.split()[-1].lstrip("*") for word in self.parameters.split(", ")
                         if word != "void")  # fmt: skip


def _in(lines: list[str]) -> list[str]:
    return [f"    {line}" for line in lines]
