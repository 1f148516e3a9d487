"""What a Program takes on a device, from shapes alone: nothing is compiled, no tool is needed.

RAM is exact: it is the plan's. Flash and instructions are those of Cortex-M4 at -O2, by a model
that is linear in what the generated code does. Its factors were fitted to networks that were
compiled and counted; `tests/device/test_costs.py` holds it to others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from bnncore.device import export, sliced
from bnncore.device.arrays import Code
from bnncore.device.steps import BITS, Step
from bnncore.device.write import Writer
from bnncore.packed.program import Program


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


# What each piece of a step's work takes of instructions; what is not here takes next to none.
# Fitted to some twenty networks, as `CODE` is, which adds up bytes of code for each character of
# the kernels' sources, and each step by what it is.
INSTRUCTIONS = {
    "units": 295, "columns": 429, "planes": 43, "planes, strided": 236,  # sliced
    "differ": 14.8, "filters": 21.6,  # words of channels
    "stem": 0.95, "products": 3.5, "float products": 3.65, "float signs": 5.8, "window": 1.8,
    "rescale of columns": 7.7, "bits": 18.3, "floats": 7.5, "avgpool": 56, "concat": 8.8,
}  # fmt: skip
CODE = {
    "kernels": 0.27,
    "columns": 1600,
    "words": 990,
    "others": 1060,
    "products": 610,
    "floats": 450,
}


def estimate(program: Program, members: int | None = None) -> Figures:
    """The figures of a Program; its tensors' values do not matter.

    Args:
        members: how many, where `program` is a drawing of one (default: as many as it has).
    """
    count = program.members if members is None else members
    shared, own, sources, layout = measured(program)
    once, each = (
        sum(INSTRUCTIONS.get(key, 0) * n for key, n in part.items()) for part in (shared, own)
    )
    size = sum(CODE[key] * n for key, n in sources.items())
    constants = layout.code.shared + count * layout.code.own
    found = tuple(round(once + m * each) for m in range(1, count + 1))
    return Figures(layout.arena, constants, round(size), found)


def measured(
    program: Program,
) -> tuple[dict[str, float], dict[str, float], dict[str, float], export.Layout]:
    """(work for all members, a member's own, what makes code, the layout)."""
    layout = export.lay_out(program, "model", dry=True)
    parts: tuple[dict[str, float], dict[str, float]] = ({}, {})
    for step, writer in zip(layout.work, layout.writers, strict=True):
        for key, amount in _work(layout.code, step, writer).items():
            part = parts[step.own]
            part[key] = part.get(key, 0) + amount
    columns, words = (sum(map(flag, layout.writers)) for flag in (_is_columns, _is_words))
    anchors = [step.anchor.op for step in layout.work if step.anchor is not None]
    code = {
        "kernels": float(sum(map(len, export.kernels(layout.code.used)))),
        "columns": float(columns),
        "words": float(words),
        "others": float(len(layout.work) - columns - words),
        "products": float(sum(op in ("conv", "dense") for op in anchors)),
        "floats": float(sum("float v" in function for function in layout.functions)),
    }
    return *parts, code, layout


def _is_columns(writer: Writer) -> bool:
    return writer.columns


def _is_words(writer: Writer) -> bool:
    return writer.done


def _work(code: Code, step: Step, writer: Writer) -> dict[str, float]:
    """How often a step does what, by the names of `INSTRUCTIONS`."""
    h, w, channels = writer.map(step.last)
    pixels, found = h * w, {"step": 1.0}
    elements = pixels * channels

    def more(key: str, amount: float) -> None:
        found[key] = found.get(key, 0) + amount

    node = step.anchor
    if node is not None:
        source = node.inputs[0]
        taps = filters = 1
        if "weight" in node.tensors:
            filters, *window = code.program.tensors[node.tensors["weight"]].shape
            taps = math.prod(window)
        groups = -(-pixels // 32)
        if writer.group and node.op == "bconv":
            units = sliced.padded(taps)
            more("units", groups * filters * units / sliced.UNIT)
            more("columns" if writer.columns else "words", groups * filters)
            more("planes" if writer.sliced else "planes, strided", groups * units)
        elif writer.group:  # a stem's bits on bytes, a third of it for each filter
            more("stem", pixels * filters * taps)
        elif node.op == "bconv":
            more("differ", pixels * filters * -(-taps // 32))
            more("filters", pixels * filters)
            more("gather", pixels * taps)
        elif node.op in ("conv", "dense"):
            signs = code.program.tensors[node.tensors["weight"]].kind == "binary"
            floats = "float signs" if signs else "float products"
            whole = code.shapes[source].kind in ("u8", "i32") and step.image is None
            more("products" if whole else floats, pixels * filters * taps)
            more("window", pixels * taps)
        elif "pool" in node.op:
            more(node.op, elements * float(node.attrs["kernel"]) ** 2)
        else:
            more(node.op, math.prod(code.shapes[source].dims))
    for value, link in step.links:
        if link.op in BITS and writer.done:
            continue
        kind = "bits" if link.op in BITS else "rescale" if link.op == "rescale" else "floats"
        more(f"{kind} of columns" if writer.columns else kind, math.prod(code.shapes[value].dims))
    return found
