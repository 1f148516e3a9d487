"""What a Program takes on a device, from shapes alone: nothing is compiled, no tool is needed.

RAM is exact: it is the plan's. Flash and instructions are those of Cortex-M4 at -O2, by a model
that is linear in what the generated code does. Its factors are what the loops were seen to take in
networks that were compiled and counted; it is within 10 % of any of these, and
`tests/device/test_costs.py` holds it to that.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass

from bnncore.device import export, sliced
from bnncore.device.steps import BITS, Step
from bnncore.device.write import Writer
from bnncore.packed.program import Node, Program


@dataclass(frozen=True)
class Figures:
    """What a model takes.

    Attributes:
        ram: bytes of static memory, beside the stack.
        constants: bytes of weights and tables in flash.
        code: bytes of machine code, by the model.
        instructions: an image, with the first 1 to M members, by the model.
    """

    ram: int
    constants: int
    code: int
    instructions: tuple[int, ...]

    @property
    def flash(self) -> int:
        return self.constants + self.code


# Instructions of Cortex-M4 for each of these. A column is what a filter gives for 32 pixels; a turn
# makes rows of bits of columns, or the reverse.
INSTRUCTIONS = {
    # columns
    "units": 257,  # of 48 inputs: 16 picks from tables and 31 carry-save adders
    "tables": 19,  # what an input's 32 pixels add to sums of three
    "shifts": 21,  # that input's words, where a map keeps its size
    "gathers": 1450,  # 32 inputs' words, where it does not: pixel by pixel, and a turn
    "turns": 650,
    "bytes of counts": 65,  # eight planes of a count made numbers
    "limits": 70,  # or all of them compared
    "picks": 3.7,  # a stem's bits on bytes: three inputs of two pixels
    "tables of picks": 45,
    # rows: pixel by pixel
    "pixels": 70,  # the loop, the call, a window's place
    "differ": 13,  # a word of channels, masked and counted
    "filters": 38,  # the call, the rest of a count
    "taps": 50,  # a word of channels put into a row
    "products": 2.8,  # a load, a product, an eighth of the other load and of the loop
    "float products": 3.7,
    "signed": 6.2,  # a number or its negative
    "halves": 5,  # and where a weight is to become a float: of half precision
    "bytes": 2,  # of eight bits
    "sums": 8,  # a sum's start and end
    "windows": 7,
    "image": 22,  # made floats on the way
    "maxpool": 8,
    "avgpool": 6.3,
    "sumpool": 3.5,
    "global": 8,
    "copies": 1,
    # a number on its way: in columns what belongs to its channel stays in registers
    "numbers of columns": 7,  # load, store, loop
    "numbers": 6,
    "bounds": 3.5,  # where the last column is not full
    "floats of columns": 3,  # an operation
    "floats": 5,
    "rescale": 4,  # the first: a product, a shift, a limit
    "rescales": 12,  # more of them: not everything stays in registers
    "bits of columns": 3,
    "bits": 9,
}
# Bytes of code: votes and calls; a character of the kernels' sources; loops over rows, those with
# floats; an operation in columns, which is written out for four pixels.
CODE = {"model": 2340, "kernels": 0.2, "rows": 168, "floats": 116, "links of columns": 187}


def estimate(program: Program, members: int | None = None) -> Figures:
    """The figures of a Program; its tensors' values do not matter.

    Args:
        members: how many, where `program` is a drawing of one (default: as many as it has).
    """
    count = program.members if members is None else members
    shared, own, sources, layout = measured(program)
    once, each = (sum(INSTRUCTIONS[key] * n for key, n in part.items()) for part in (shared, own))
    size = sum(CODE[key] * n for key, n in sources.items())
    constants = layout.code.shared + count * layout.code.own
    found = tuple(round(once + m * each) for m in range(1, count + 1))
    return Figures(layout.arena, constants, round(size), found)


def measured(
    program: Program,
) -> tuple[Counter[str], Counter[str], dict[str, float], export.Layout]:
    """(work for all members, a member's own, what makes code, the layout)."""
    layout = export.lay_out(program, "model", dry=True)
    pairs = list(zip(layout.work, layout.writers, strict=True))
    parts = (Counter[str](), Counter[str]())
    for step, writer in pairs:
        parts[step.own].update(work(step, writer))
    code = {
        "model": 1.0,
        "kernels": float(sum(map(_length, export.kernels(layout.code.used)))),
        "rows": float(sum(not writer.group for _, writer in pairs)),
        "floats": float(sum("float v" in function for function in layout.functions)),
        "links of columns": float(sum(len(step.links) for step, w in pairs if w.columns)),
    }
    return *parts, code, layout


def _length(source: str) -> int:
    """Characters of C, without comments and with single spaces."""
    return len(re.sub(r"\s+", " ", re.sub(r"/\*.*?\*/", "", source, flags=re.DOTALL)))


def work(step: Step, writer: Writer) -> Counter[str]:
    """How often a step does what, by the names of `INSTRUCTIONS`."""
    found = Counter[str]()
    h, w, channels = writer.map(step.last)
    pixels = h * w
    if not writer.group:
        found["pixels"] = pixels
    if step.anchor is not None and "weight" in step.anchor.tensors:
        _weighed(step, step.anchor, writer, pixels, found)
    elif step.anchor is not None:
        op, elements = step.anchor.op, pixels * writer.channels(step.start)
        if writer.shapes[step.start].kind == "bits":
            elements = pixels * writer.width(step.start)  # words
        if "kernel" in step.anchor.attrs:
            taps = int(step.anchor.attrs["kernel"]) ** 2
            found[op] = elements * (taps + 6 * (op == "avgpool"))  # a division takes so many
        elif "global" in op:
            found["global"] = math.prod(writer.map(step.anchor.inputs[0]))
        else:
            found["copies"] = elements
    if writer.done or not step.links:  # then numbers are where they belong
        return found
    ending = ""
    if writer.columns:
        ending, pixels = " of columns", 32 * -(-pixels // 32)
        found["bounds"] = channels * pixels * (h * w % 32 > 0)
    elements = pixels * channels
    found[f"numbers{ending}"] = elements
    for at, (_, link) in enumerate(step.links):
        if link.op in BITS:
            found[f"bits{ending}"] += elements
            found["turns"] += writer.columns * (pixels // 32) * -(-channels // 32)
        elif link.op == "rescale":
            found["rescales" if at else "rescale"] += elements
        else:
            found[f"floats{ending}"] += elements
    return found


def _weighed(step: Step, node: Node, writer: Writer, pixels: int, found: Counter[str]) -> None:
    """Add what a convolution or a dense layer does."""
    weight = writer.program.tensors[node.tensors["weight"]]
    filters, *window = weight.shape
    inputs, channels, columns = math.prod(window), window[-1], -(-pixels // 32)
    words = -(-channels // 32)
    if writer.group and node.op == "bconv":
        all_ = sliced.padded(inputs)
        found["units"] = columns * filters * all_ // sliced.UNIT
        found["tables"] = columns * all_
        if writer.sliced:
            found["shifts"] = columns * all_
            found["turns"] = columns * words
        else:
            found["gathers"] = columns * inputs // channels * words
        if writer.done:
            found["limits"] = columns * filters
            found["turns"] += columns * -(-filters // 32)
        else:
            found["bytes of counts"] = columns * filters * (1 + (sliced.planes(inputs) > 8))
    elif writer.group:
        threes = -(-inputs // 3) * -(-pixels // 2)
        found["picks"], found["tables of picks"] = threes * filters, threes
    elif node.op == "bconv":
        found["differ"] = pixels * filters * -(-inputs // 32)
        found["filters"] = pixels * filters
        found["taps"] = pixels * inputs // channels * words
    else:
        image = step.image is not None
        real = image or writer.shapes[node.inputs[0]].kind == "f32"
        # Eight filters share a load of an input; the rest, two, which costs half as much again.
        products = pixels * inputs * (filters + (filters % 8) // 2)
        if weight.kind == "binary":
            found["signed"] = pixels * inputs * 8 * -(-filters // 8)
        else:
            found["float products" if real else "products"] = products
        if real and weight.kind in ("float16", "int8"):
            found["halves" if weight.kind == "float16" else "bytes"] = pixels * inputs * filters
        found["sums"] = pixels * filters
        if node.op == "conv" and (inputs > channels or node.attrs["stride"] > 1):
            found["image" if image else "windows"] = pixels * inputs
