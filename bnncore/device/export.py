"""A Program as C99: one header, one source, a self-test; read, add to a firmware project, done.

`export` writes ``NAME.h``, ``NAME.c`` and ``NAME_test.c`` into a folder whose last part is NAME. The
source holds the kernels it uses (`bnncore/device/kernels`, one function a file), the model as
`const` arrays, shared tensors once, a function a step (`steps`), and the votes. It allocates
nothing and keeps no state but one arena, laid out here by `packed.plan`.

Binary sums and thresholds on integers equal the evaluator's; sums of floats agree to rounding.

Legend: `M` members, `H W C` a map.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bnncore.device.steps import BITS, Step, steps
from bnncore.errors import UserError
from bnncore.packed import execute, plan
from bnncore.packed.program import Node, Program, Shape, Tensor, unpack_bits, validate

KERNELS = Path(__file__).with_name("kernels")
ALIGN = 4  # bytes, of every value in the arena
TESTED = 4  # images of the self-test


class ExportError(UserError, ValueError):
    """What cannot be exported; says what and where."""


@dataclass
class Code:
    """C code on its way: arrays, step functions, and the kernels they call."""

    program: Program
    shapes: list[Shape]
    arrays: list[str] = field(default_factory=list)
    known: dict[tuple[str, str], str] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    flash: int = 0

    def call(self, kernel: str, *arguments: object) -> str:
        self.used.add(kernel)
        return f"bnn_{kernel}({', '.join(map(str, arguments))});"

    def array(self, name: str, layout: str, kind: str, make: Callable[[Tensor, int], np.ndarray]):
        """The name of a tensor's array, laid out by `make` for each copy; ``[m]`` where own."""
        tensor = self.program.tensors[name]
        if (name, layout) not in self.known:
            label = f"t{len(self.known)}_{re.sub(r'[^A-Za-z0-9]', '_', name.split('.')[-1])}"
            copies = [make(tensor, m) for m in range(self.program.members if tensor.own else 1)]
            self.arrays.append(_array(label, kind, copies, tensor.own))
            self.flash += sum(copy.nbytes for copy in copies)
            self.known[name, layout] = label
        label = self.known[name, layout]
        return f"{label}[m]" if tensor.own else label


def _copy(tensor: Tensor, m: int) -> np.ndarray:
    data = unpack_bits(tensor) if tensor.kind == "binary" else tensor.data
    return data[m] if tensor.own else data


def _array(name: str, kind: str, copies: list[np.ndarray], own: bool) -> str:
    count = copies[0].size
    if not own:
        return f"static const {kind} {name}[{count}] = {{\n{_values(copies[0], kind)}\n}};"
    rows = ",\n".join(f"{{\n{_values(copy, kind)}\n}}" for copy in copies)
    return f"static const {kind} {name}[{len(copies)}][{count}] = {{\n{rows}\n}};"


def _values(values: np.ndarray, kind: str) -> str:
    flat = values.reshape(-1)
    if kind == "float":
        words = [_float(value) for value in flat]
    elif kind in ("uint32_t", "uint16_t"):
        words = [f"0x{int(value):x}u" for value in flat]
    else:
        words = [str(int(value)) for value in flat]
    lines, line = [], "   "
    for word in words:
        if len(line) + len(word) > 96:
            lines.append(line)
            line = "   "
        line += f" {word},"
    return "\n".join([*lines, line])


def _float(value: float) -> str:
    text = np.format_float_scientific(np.float32(value), unique=True, trim="0")
    return f"{text}f"


def _words(bits: np.ndarray) -> np.ndarray:
    """Booleans (..., n) as words (..., ceil(n / 32)), the first in the lowest bit."""
    n = bits.shape[-1]
    room = np.zeros((*bits.shape[:-1], -(-n // 32) * 32), bool)
    room[..., :n] = bits
    packed = np.packbits(room, axis=-1, bitorder="little")
    return np.ascontiguousarray(packed).view("<u4")


# -- a step ------------------------------------------------------------------------------------


class _Writer:
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
            array = self.code.array(name, "", "uint16_t", lambda t, m: _copy(t, m).view("<u2"))
            count = int(np.prod(tensor.shape))
            place = self.room(f"f{len(self.scratch)}", "bnn_f32", count)
            self.head.append(self.code.call("expand", place, array, count))
            return place
        return self.code.array(name, "", "float", lambda t, m: _copy(t, m).astype("<f4"))

    def bits(self, node: Node, slot: str) -> str:
        name = node.tensors.get(slot)
        if name is None:
            return "0"
        return self.code.array(name, "", "uint32_t", lambda t, m: _words(_copy(t, m)))

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
            lambda t, m: _words(_copy(t, m).reshape(filters, -1)),
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
        filters, kh, kw, channels = tensor.shape
        name = node.tensors["weight"]

        def by_taps(t: Tensor, m: int) -> np.ndarray:
            return np.ascontiguousarray(_copy(t, m).transpose(1, 2, 3, 0))

        if tensor.kind == "binary":
            array = self.code.array(name, "taps", "uint32_t", lambda t, m: _words(by_taps(t, m)))
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
            node.tensors["weight"], "", kind, lambda t, m: _copy(t, m).view(view)
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
            low, high = (_float(node.attrs[key]) for key in ("low", "high"))
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
                                lambda t, m: _copy(t, m).astype(dtype))
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
        return f"/* {step.name} */\nstatic void {self.label}({self.parameters})\n{{\n{inside}\n}}\n"

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


# -- the whole -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exported:
    """What was generated.

    Attributes:
        name: of the model, a C identifier.
        header, source, test: C code.
        arena: bytes of RAM for values.
        flash: bytes of the model's arrays.
        classes: how many scores.
        alive: the largest sum of bytes alive at one time; no arena takes less.
    """

    name: str
    header: str
    source: str
    test: str
    arena: int
    flash: int
    classes: int
    alive: int


def generate(program: Program, name: str) -> Exported:
    """C code of `program`.

    Raises:
        ExportError: `name` is no C identifier, or something has no kernel.
    """
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name):
        raise ExportError(f"name: expected a C identifier (letters, digits, _), got {name!r}")
    shapes = validate(program)
    work = steps(program)
    code = Code(program, shapes)
    writers = [_Writer(code, step, f"{name}_step{k + 1}") for k, step in enumerate(work)]
    functions = [writer.write() for writer in writers]
    doubt = program.combine == "hard_vote"
    places, scratch, arena, alive = _places(program, shapes, work, writers, doubt)
    for k, writer in enumerate(writers):
        rooms = "".join(
            f"    {kind} *const {room} = ({kind} *)(arena + {scratch[k, room] // 4});\n"
            for room, (kind, _) in writer.scratch.items()
        )
        functions[k] = functions[k].replace("\n{\n", f"\n{{\n{rooms}", 1)
    votes = _votes(code, name, work, writers, doubt)
    parts = [
        f"/* {name}: made by bnncore from a packed file; {name}.h says how to call it. */",
        f'#include "{name}.h"\n',
        (KERNELS / "base.h").read_text(),
        f"static uint32_t arena[{name.upper()}_ARENA / 4];\n",
        *_kernels(code.used),
        "/* -- the model: shared tensors once, a member's own by member -- */\n",
        *code.arrays,
        "\n/* -- where values lie in the arena -- */\n",
        *(_place(number, offset, shapes) for number, offset in places.items()),
        "\n/* -- the steps -- */\n",
        *functions,
        votes,
    ]
    source = "\n".join(parts)
    header, test = _header(program, name, arena), _test(program, name)
    return Exported(name, header, source, test, arena, code.flash, len(program.classes), alive)


def export(program: Program, folder: Path) -> Exported:
    """Write `generate`'s files into `folder`, whose last part is the model's name."""
    made = generate(program, folder.name)
    folder.mkdir(parents=True, exist_ok=True)
    for ending, text in ((".h", made.header), (".c", made.source), ("_test.c", made.test)):
        (folder / f"{made.name}{ending}").write_text(text)
    return made


def _kernels(used: Iterable[str]) -> list[str]:
    """The sources of kernels and of what they need, each once, needed ones first."""
    found: dict[str, str] = {}

    def take(name: str) -> None:
        if name in found:
            return
        text = (KERNELS / f"{name}.c").read_text()
        first = text.split("\n", 1)[0]
        if first.startswith("/* needs "):
            for other in first.removeprefix("/* needs ").removesuffix(" */").split():
                take(other)
            text = text.split("\n", 1)[1]
        found[name] = text

    for name in sorted(used):
        take(name)
    return list(found.values())


def _bytes(shape: Shape) -> int:
    *positions, channels = shape.dims
    return 4 * int(np.prod(positions)) * (-(-channels // 32) if shape.kind == "bits" else channels)


VOTES = {-1: "SUMS", -2: "SCORES", -3: "DOUBT"}  # room of the votes


def _places(
    program: Program, shapes: list[Shape], work: list[Step], writers: list[_Writer], doubt: bool
) -> tuple[dict[int, int], dict[tuple[int, str], int], int, int]:
    """Offsets of values and votes, and of what steps need for themselves; the arena's bytes."""
    alive = [
        life
        for life in plan.lifetimes(work, len(program.nodes), lambda n: _bytes(shapes[n]))
        if life.value > 0
    ]
    size, end = 4 * len(program.classes), len(work) - 1
    alive += [plan.Lifetime(n, 0, end, size) for n in VOTES if doubt or VOTES[n] != "DOUBT"]
    own: dict[tuple[int, str], int] = {}
    for time, writer in enumerate(writers):
        for room, (_, count) in writer.scratch.items():
            own[time, room] = min(VOTES) - 1 - len(own)
            alive.append(plan.Lifetime(own[time, room], time, time, 4 * count))
    offsets, total = plan.place(alive, ALIGN)
    scratch = {key: offsets[number] for key, number in own.items()}
    values = {n: at for n, at in offsets.items() if n >= min(VOTES)}
    return values, scratch, total, plan.peak(alive, ALIGN)


def _place(number: int, offset: int, shapes: list[Shape]) -> str:
    if number < 0:
        return f"#define {VOTES[number]} ((bnn_f32 *)(arena + {offset // 4}))"
    shape = shapes[number]
    kind = {"bits": "bnn_u32", "i32": "bnn_i32", "f32": "bnn_f32"}[shape.kind]
    size = "x".join(map(str, shape.dims))
    return f"#define V{number} (({kind} *)(arena + {offset // 4})) /* {size} {shape.kind} */"


def _votes(code: Code, name: str, work: list[Step], writers: list[_Writer], doubt: bool) -> str:
    """The functions of the header."""
    program = code.program
    n, last = len(program.classes), len(program.nodes)
    weight, bias, divisor = "1.0f", "0", "1.0f"
    if "bias" in program.combine_tensors:
        bias = code.array(program.combine_tensors["bias"], "", "float", _plain_float)
    if "weight" in program.combine_tensors:
        weights = code.array(program.combine_tensors["weight"], "", "float", _plain_float)
        weight = f"{weights}[m]"
    if program.combine == "mean" or (program.combine == "soft_vote" and weight == "1.0f"):
        divisor = "(float)(m + 1)"
    elif program.combine == "soft_vote":
        totals = np.cumsum(program.tensors[program.combine_tensors["weight"]].data, dtype="<f8")
        code.arrays.append(_array("voted", "float", [totals.astype("<f4")], False))
        divisor = "voted[m]"
    if program.combine in ("mean", "sum"):
        count = [code.call("vote", "SUMS", f"V{last}", weight, n)]
    elif program.combine == "soft_vote":
        count = [code.call("softmax", "SUMS", f"V{last}", weight, n)]
    else:
        code.used.add("best")
        count = [f"SUMS[bnn_best(V{last}, {n})] += {weight};",
                 code.call("softmax", "DOUBT", f"V{last}", "1.0f", n)]  # fmt: skip
    code.used |= {"winner", "margin", "score"}
    calls = {own: [f"{w.label}({w.arguments});" for w, step in zip(writers, work, strict=True)
                   if step.own == own] for own in (False, True)}  # fmt: skip
    clear = [f"memset({room}, 0, {4 * n});" for room in (["SUMS", "DOUBT"] if doubt else ["SUMS"])]
    each = [*calls[True], *count]

    def block(lines: list[str], *names: str) -> str:
        unused = [f"(void){word};" for word in names
                  if not any(re.search(rf"\b{word}\b", line) for line in lines)]  # fmt: skip
        return "\n".join(f"    {line}" for line in [*lines, *unused])

    template = (KERNELS / "votes.template").read_text()
    values = {
        "NAME": name,
        "UPPER": name.upper(),
        "CLASSES": str(n),
        "DOUBT": "DOUBT" if doubt else "0",
        "BEGIN": block([*clear, *calls[False]], "image"),
        "NEXT": block(each, "image", "m"),
        "SCORE": block([code.call("score", "SCORES", "SUMS", divisor, bias, n)], "m"),
    }
    return re.sub(r"@(\w+)@", lambda match: values[match.group(1)], template)


def _plain_float(tensor: Tensor, m: int) -> np.ndarray:
    return tensor.data.astype("<f4")


def _header(program: Program, name: str, arena: int) -> str:
    h, w, c = program.image
    classes = ", ".join(f'"{_c_string(label)}"' for label in program.classes)
    values = {
        "NAME": name, "UPPER": name.upper(), "HEIGHT": h, "WIDTH": w, "CHANNELS": c,
        "CLASSES": len(program.classes), "MEMBERS": program.members, "ARENA": arena,
        "LABELS": classes, "COMBINE": program.combine,
    }  # fmt: skip
    template = (KERNELS / "header.template").read_text()
    return re.sub(r"@(\w+)@", lambda match: str(values[match.group(1)]), template)


def _c_string(text: str) -> str:
    return "".join(
        char if (char.isalnum() and char.isascii()) or char in " _-.,()" else
        "".join(f"\\{byte:03o}" for byte in char.encode())
        for char in text
    )  # fmt: skip


def test_images(program: Program, count: int = TESTED) -> np.ndarray:
    """The images of the self-test, (count, H, W, C) uint8: the high bytes of a congruential
    generator, as the C code makes them."""
    size = int(np.prod(program.image)) * count
    state, values = 1, np.empty(size, np.uint8)
    for k in range(size):
        state = (state * 1664525 + 1013904223) & 0xFFFFFFFF
        values[k] = state >> 24
    return values.reshape(count, *program.image)


def _test(program: Program, name: str) -> str:
    model = execute.Model(program, "numpy")
    images = test_images(program)
    scores = model(images)
    labels = model.predict(images)
    values = {
        "NAME": name, "UPPER": name.upper(), "COUNT": TESTED, "CLASSES": len(program.classes),
        "SCORES": _values(scores.astype("<f4"), "float"), "LABELS": _values(labels, "int"),
    }  # fmt: skip
    template = (KERNELS / "test.template").read_text()
    return re.sub(r"@(\w+)@", lambda match: str(values[match.group(1)]), template)
