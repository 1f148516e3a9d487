"""What a step's function is made of: where values lie, what a pixel and a channel of it do."""

from __future__ import annotations

import numpy as np

from bnncore.device.arrays import Code, one_copy
from bnncore.device.steps import Step
from bnncore.packed.program import Node


class Body:
    """One step's function as it grows: its lines, and what they need."""

    def __init__(self, code: Code, step: Step, label: str) -> None:
        self.code, self.step, self.label = code, step, label
        self.program, self.shapes = code.program, code.shapes
        self.head: list[str] = []  # before the pixels
        self.lines: list[str] = []  # of one pixel
        self.each: list[str] = []  # of one channel of it
        self.group: list[str] = []  # of 32 pixels, before the first of them
        self.column: list[str] = []  # of a channel of theirs
        self.row: list[str] = []  # of those pixels of it whose numbers end in the same three bits
        self.sliced = False  # whether it reads its bits whole before it writes anything
        self.columns = False  # whether channels go over 32 pixels, not pixels over channels
        self.count: tuple[str, int] | None = None  # of products -1, and of products: the number
        self.scratch: dict[str, tuple[str, int]] = {}  # name -> type, elements
        self.done = False  # whether the anchor has made the bits
        self.word: tuple[str, str] | None = None  # where bits go, and words to negate them by
        self.number = ""  # which of v (a float) and u (an integer) holds the channel's number
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

    def kind(self, value: int) -> str:
        """How a map's numbers lie in memory: f32, i32, i16, i8."""
        return self.code.kinds[value]

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
        map_ = f"V{value}" if value else "image"
        return f"{map_}[c]" if h * w == 1 else f"{map_}[p * {n} + c]"

    def numbers(self, value: int, kind: str) -> str:
        """Where an anchor puts a pixel's numbers of this kind: the map itself, or room for them;
        then each channel goes on with its own."""
        direct = value in self.step.stored and self.kind(value) == kind
        if direct:
            place, element = self.pixel(value), self.element(value)
        else:
            place = self.room(f"numbers_{kind}", f"bnn_{kind}", self.channels(value))
            element = f"{place}[c]"
        self.take(element, kind)
        if not direct:
            self.store(value)
        return place

    def take(self, element: str, kind: str) -> None:
        self.number = "v" if kind == "f32" else "u"
        self.each.append(f"{'float v' if kind == 'f32' else 'int32_t u'} = {element};")

    def take_column(self, element: str, value: int, count: tuple[str, int] | None = None) -> None:
        """As `take`, of pixel ``b + r`` of 32 pixels of a channel.

        Args:
            count: (how many products are -1, products), where the number is a sum of such.
        """
        self.columns = True
        self.count = None if value in self.step.stored else count
        self.take(element, "i32")
        self.store(value)

    def store(self, value: int) -> None:
        """Keep the channel's number, if a later step reads it."""
        if value in self.step.stored:
            kind = self.kind(value)
            cast = f"(bnn_{kind})" if kind in ("i16", "i8") else ""
            self.each.append(f"{self.element(value)} = {cast}{self.number};")

    def to_float(self) -> None:
        if self.number == "u":
            self.each.append("float v = (float)u;")
        self.number = "v"

    def whole(self, name: str) -> str:
        """A tensor of integers."""
        kind = self.program.tensors[name].kind
        return self.code.array(name, "", f"{kind}_t", one_copy)

    def say(self, kernel: str, *arguments: object) -> None:
        self.lines.append(self.code.call(kernel, *arguments))

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

    def window(self, node: Node, kernel: tuple[int, int], source: int) -> str:
        h, w, c = self.map(source)
        stride, pad = node.attrs["stride"], node.attrs["pad"]
        numbers = f"{h}, {w}, {c}, {kernel[0]}, {kernel[1]}, {stride}, {pad}"
        self.head.insert(0, f"static const bnn_window g = {{{numbers}}};")
        return "&g"

    @property
    def where(self) -> tuple[str, str]:
        return ("y", "x") if self.loops else ("0", "0")
