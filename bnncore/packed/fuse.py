"""Which nodes one compiled step does: a convolution with what follows it, as far as it goes.

The epilogue of `bnncore.packed.tiles` runs while sums are in registers: affine, PReLU, affine,
residual add, affine, PReLU, affine, each of them optional, or two rescalings of integers, one of
them with the residual; then it stores the numbers, or the bits that a threshold makes of them, or
both. A `Group` is what one such step does.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from bnncore.packed import tiles
from bnncore.packed.program import Node, Program
from bnncore.packed.rules import validate

SUMS = ("bconv", "conv", "dense")
LEVELS = ("sign", "threshold", "interval")
# These begin an epilogue without sums, on a stored value.
_ALONE = ("affine", "prelu", "relu", "add", "rescale", "fixed")
# The parts of the epilogue in order, and the row of parameters where each begins.
_ORDER = (
    ("affine", 0), ("prelu", 2), ("affine", 4), ("add", -1),
    ("affine", tiles.GROUP), ("prelu", tiles.GROUP + 2), ("affine", tiles.GROUP + 4),
)  # fmt: skip


@dataclass
class Group:
    """Nodes that one step does.

    Attributes:
        node: the first, an operator of any kind.
        value: the value before a threshold: sums, or what the epilogue made of them.
        inputs: value numbers; the residual, if there is one, last.
        own: whether each member does it.
        fits: whether the epilogue can do it, all of it or what follows the sums.
        rows: row of the epilogue's parameters -> node.
        level: the node whose bits are stored.
        bits: the value they are.
        numbers: whether the value itself is stored.
    """

    node: Node
    value: int
    inputs: tuple[int, ...]
    own: bool
    fits: bool
    rows: dict[int, Node] = field(default_factory=dict)
    level: Node | None = None
    bits: int | None = None
    residual: bool = False
    numbers: bool = True
    place: int = 0  # in _ORDER

    @property
    def outputs(self) -> tuple[int, ...]:
        """The values it gives: numbers, then bits."""
        numbers = (self.value,) if self.numbers else ()
        return numbers if self.bits is None else (*numbers, self.bits)

    def take(self, node: Node, number: int) -> bool:
        """Append the node that gives the value `number`, if it fits."""
        op = {"relu": "prelu", "fixed": "affine"}.get(node.op, node.op)
        if op == "rescale":
            return self._take_rescale(node, number)
        for place in range(self.place, len(_ORDER)):
            part, row = _ORDER[place]
            if part == op:
                if op == "add":
                    a, b = node.inputs
                    self.inputs = (self.inputs[0], b if a == self.value else a)
                    self.residual = True
                else:
                    self.rows[row] = node
                self.place, self.value = place + 1, number
                return True
        return False

    def _take_rescale(self, node: Node, number: int) -> bool:
        second = _ORDER.index(("affine", tiles.GROUP))  # what adds, adds to integers
        if self.place > second:
            return False
        row, after = (tiles.GROUP, len(_ORDER)) if self.place else (0, second)
        if len(node.inputs) == 2:
            if self.residual or node.inputs[0] != self.value:
                return False
            self.inputs, self.residual = (self.inputs[0], node.inputs[1]), True
        self.rows[row] = node
        self.place, self.value = after, number
        return True

    def take_level(self, node: Node, number: int) -> None:
        """Append the threshold that gives the bits `number`."""
        self.level, self.bits = node, number


def groups(program: Program) -> list[Group]:
    """All nodes of a Program in groups, in an order that can be executed."""
    shapes = validate(program)
    users: list[list[int]] = [[] for _ in shapes]  # values, as often as they use one
    for number, node in enumerate(program.nodes, 1):
        for source in node.inputs:
            users[source].append(number)
    made: list[Group] = []
    done: set[int] = set()
    for number, node in enumerate(program.nodes, 1):
        if number in done:
            continue
        own = shapes[number].own
        fits = node.op in (*SUMS, *LEVELS, *_ALONE)
        fits = fits and (0 not in node.inputs or node.op == "conv")  # the image is bytes
        group = Group(node, number, node.inputs, own, fits)
        made.append(group)
        if not fits:
            continue
        if node.op not in SUMS:
            group.value, group.inputs = node.inputs[0], node.inputs[:1]
        if node.op in LEVELS:
            group.take_level(node, number)
            group.numbers = False
            continue
        if node.op in _ALONE:
            group.take(node, number)
        while len(users[group.value]) == 1:
            after = users[group.value][0]
            follower = program.nodes[after - 1]
            if after in done or shapes[after].own != own or not group.take(follower, after):
                break
            done.add(after)
        for after in users[group.value]:
            follower = program.nodes[after - 1]
            if follower.op in LEVELS and shapes[after].own == own:
                group.take_level(follower, after)
                group.numbers = len(users[group.value]) > 1
                done.add(after)
                break
    # Each at the last node that it does, before anything that uses it.
    return sorted(made, key=lambda group: group.outputs[0])
