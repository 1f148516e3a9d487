"""A Program as steps for a device: each makes a map pixel by pixel, in one go.

A step begins with an *anchor* (a convolution, a pooling, a dense layer, or the loading of a map)
that gives the numbers of one pixel, and goes on with *links*, per-channel operators on these few
numbers. So a sum of a binary layer is a threshold's bit before it is ever stored, and memory holds
only what a later step reads.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from bnncore.packed.program import Node, Program, Shape
from bnncore.packed.rules import validate

LINKS = ("affine", "prelu", "relu", "clip", "add", "rescale", "fixed", "sign", "threshold", "interval")
BITS = ("sign", "threshold", "interval")


@dataclass
class Step:
    """One piece of work.

    Attributes:
        anchor: the operator that it begins with; None where it loads value `start`.
        start: the value that the anchor gives, or that is loaded.
        own: whether each member does it.
        links: (value, node) in the order of work.
        stored: values of numbers that later steps read; bits are always stored.
        image: the node that normalises the image, where a convolution reads the image itself.
    """

    anchor: Node | None
    start: int
    own: bool
    links: list[tuple[int, Node]] = field(default_factory=list)
    stored: set[int] = field(default_factory=set)
    image: Node | None = None

    @property
    def last(self) -> int:
        """The value that the step ends with."""
        return self.links[-1][0] if self.links else self.start

    @property
    def made(self) -> list[int]:
        """The values that it makes, in order."""
        first = [] if self.anchor is None else [self.start]
        return first + [value for value, _ in self.links]

    @property
    def inputs(self) -> tuple[int, ...]:
        """Values of earlier steps that it reads; 0 is the image."""
        nodes = [node for node in (self.anchor, *(node for _, node in self.links)) if node]
        if self.image is not None:
            read = {0}
        else:
            read = {self.start} if self.anchor is None else set(self.anchor.inputs)
        read |= {number for node in nodes if node is not self.anchor for number in node.inputs}
        return tuple(sorted(read - set(self.made)))

    @property
    def outputs(self) -> tuple[int, ...]:
        """Values that it stores."""
        bits = {value for value, node in self.links if node.op in BITS}
        return tuple(value for value in self.made if value in self.stored | bits)

    @property
    def name(self) -> str:
        """The layers and operators, for people."""
        nodes = [node for node in (self.image, self.anchor, *(n for _, n in self.links)) if node]
        layers = list(dict.fromkeys(node.name for node in nodes))
        return f"{' '.join(layers)}: {', '.join(node.op for node in nodes)}"


def steps(program: Program) -> list[Step]:
    """The steps of a Program: those for all members first, then a member's own."""
    shapes = validate(program)
    users: dict[int, list[int]] = {}
    for number, node in enumerate(program.nodes, 1):
        for source in node.inputs:
            users.setdefault(source, []).append(number)
    made: list[Step] = []
    open_: dict[int, Step] = {}  # the value that a step ends with -> the step
    for number, node in enumerate(program.nodes, 1):
        if node.op == "normalize" and _only_convolved(program, users.get(number, [])):
            continue
        step = _joined(node, shapes, number, open_, made)
        if step is None:
            step = _begun(program, node, shapes, number)
            made.append(step)
        else:
            open_.pop(step.last)
            step.links.append((number, node))
        if node.op not in BITS:
            open_[number] = step
    last = len(program.nodes)
    for step in made:
        inside = {source for _, node in step.links for source in node.inputs}
        for value in step.made:
            others = [
                user
                for user in users.get(value, [])
                if user not in {link for link, _ in step.links} or value not in inside
            ]
            joined = value == step.start and shapes[value].kind == "bits"
            if joined or (shapes[value].kind != "bits" and (others or value == last)):
                step.stored.add(value)
    return sorted(made, key=lambda step: step.own)


def _only_convolved(program: Program, users: list[int]) -> bool:
    return bool(users) and all(program.nodes[user - 1].op == "conv" for user in users)


def _joined(
    node: Node, shapes: list[Shape], number: int, open_: dict[int, Step], made: list[Step]
) -> Step | None:
    """The step that the node can go on with: of an addition, the later of the two."""
    if node.op not in LINKS:
        return None
    ways = node.inputs[:1] if node.op == "rescale" else node.inputs
    found = [open_[source] for source in ways if source in open_]
    found = [step for step in found if step.own == shapes[number].own]
    if not found or (len(node.inputs) == 2 and node.inputs[0] == node.inputs[1]):
        return None
    step = max(found, key=made.index)
    # What else an addition reads has to be there before the step begins.
    others = [source for source in node.inputs if source != step.last]
    at = made.index(step)
    later = {value for step in made[at:] for value in step.made}
    return None if any(source in later for source in others) else step


def _begun(program: Program, node: Node, shapes: list[Shape], number: int) -> Step:
    own = shapes[number].own
    if node.op in LINKS:
        return Step(None, node.inputs[0], own, [(number, node)])
    source = program.nodes[node.inputs[0] - 1] if node.inputs[0] else None
    image = source if node.op == "conv" and source and source.op == "normalize" else None
    return Step(node, number, own, image=image)
