"""What an ensemble takes to store: one table of tensors, and three counts over it.

`table` lists every tensor of a `Program` with its layer, kind, role and copies. Three sums over it
have a name:

============== ====================================================================================
tentaclenet    the first paper's (TentacleNet, 2020, Tables 1 and 2): weights and biases of
               convolutions and dense layers; 1 bit each in binary layers, 32 bits each in others.
               In a TentacleNet's classifier block every tentacle counts K * C weights and C biases
               where the backbone has a dense layer; where it has none, the last 1x1 convolution
               counts once and the dense layer that mixes the logits not at all. Shown in KiB,
               rounded up.
filter_sharing the second paper's (Kim et al. 2022, Tables 1 and 2): weights only, 1 bit each in
               binary layers, 32 bits each in others. Shown in bits.
file           everything that the packed file holds: also scales, shifts, slopes, thresholds
               and their directions, vote weights, the graph and the header. Shown in bytes.
============== ====================================================================================

Everything here counts Programs with numpy alone; `untrained` (torch) counts ensembles before they
are trained.

Legend: `M` members, `O C kh kw` filters, `K` features of a dense layer, `C` classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from bnncore.packed import costs, packfile
from bnncore.packed.program import KINDS, Program
from bnncore.terminal import columns

FOLDED = "folded"  # the kind of a bias that only a threshold remembers: no bits in the file
COUNTED_ROLES = ("weight", "bias")


@dataclass(frozen=True)
class Entry:
    """One entry of the table of tensors.

    Attributes:
        layer: the trained layer's name; ``combine`` for what joins the members.
        slot: what the operator calls the tensor.
        role: `program.Tensor.role`.
        kind: a key of `program.KINDS`, or `FOLDED`.
        shape: of one copy.
        binary: whether the layer's weights are binary.
        own: whether each member has its own.
        copies: M where own, else 1.
    """

    layer: str
    slot: str
    role: str
    kind: str
    shape: tuple[int, ...]
    binary: bool
    own: bool
    copies: int

    @property
    def elements(self) -> int:
        """Values in one copy."""
        return math.prod(self.shape)

    @property
    def counted_bits(self) -> int:
        """Bits of all copies as both papers count: 1 a value of a binary layer, else 32."""
        return self.elements * self.copies * (1 if self.binary else 32)

    @property
    def copy_bytes(self) -> int:
        """Bytes of one copy in the packed file."""
        if self.kind == FOLDED:
            return 0
        if self.kind == "binary":
            return -(-self.elements // 8)
        return self.elements * KINDS[self.kind].itemsize

    @property
    def file_bytes(self) -> int:
        """Bytes of all copies in the packed file."""
        return self.copy_bytes * self.copies


def table(program: Program, members: int | None = None) -> list[Entry]:
    """Every tensor of `program`, in the order of its nodes, as if it had `members` members."""
    m = program.members if members is None else members
    tensors = program.tensors
    weights = [n for n in program.nodes if n.op in ("conv", "bconv", "dense")]
    binary = {n.name: tensors[n.tensors["weight"]].kind == "binary" for n in weights}
    folded = {n.name for n in weights if "biases" in n.attrs}
    rows = []
    for node in program.nodes:
        for slot, name in node.tensors.items():
            t = tensors[name]
            # Biases of these layers are counted below, from what the layer had when trained.
            role = "shift" if t.role == "bias" and node.name in folded else t.role
            rows.append(
                Entry(node.name, slot, role, t.kind, tuple(t.shape), binary.get(node.name, False),
                    t.own, m if t.own else 1)
            )  # fmt: skip
        biases = int(node.attrs.get("biases", 0))
        if biases:
            own = tensors[node.tensors["weight"]].own
            rows.append(
                Entry(node.name, "bias", "bias", FOLDED, (biases,), True, own, m if own else 1)
            )
    for slot, name in program.combine_tensors.items():
        t = tensors[name]
        shape = (m,) if slot == "weight" else tuple(t.shape)
        rows.append(Entry("combine", slot, t.role, t.kind, shape, False, False, 1))
    return rows


def tentaclenet_bits(rows: Iterable[Entry], members: int) -> int:
    """Bits by the first paper's convention, its quirks included."""
    rows = list(rows)
    mixed = any(_mixing(row) for row in rows)
    total = sum(r.counted_bits for r in rows if r.role in COUNTED_ROLES and not _mixing(r))
    if not mixed:
        # The dense layer over N * K features has C biases; the paper counts N * C.
        total += sum(
            members * row.counted_bits
            for row in rows
            if row.layer == "combine" and row.slot == "bias"
        )
    return total


def filter_sharing_bits(rows: Iterable[Entry]) -> int:
    """Bits by the second paper's convention."""
    return sum(row.counted_bits for row in rows if row.role == "weight")


def _mixing(row: Entry) -> bool:
    return row.layer.split(".")[0] == "mix"


def kib(bits: int) -> int:
    """KiB, rounded up, as the first paper prints sizes (it writes kB)."""
    return -(-bits // (8 * 1024))


def block(layer: str) -> str:
    """The block of the papers' tables that a layer belongs to: conv1, layer1 .., linear."""
    part, _, rest = layer.partition(".")
    if part == "body":
        return rest.partition(".")[0]
    return {"stem": "conv1", "head": "linear", "mix": "mixing"}.get(part, part)


@dataclass(frozen=True)
class Count:
    """What one ensemble takes.

    Attributes:
        members: M.
        entries: the table that is counted.
        file_least, file: bytes of the packed file; of one not trained yet, the least and the most.
        binary_macs, float_macs: multiply-accumulates for one image, all members.
    """

    members: int
    entries: tuple[Entry, ...]
    file_least: int
    file: int
    binary_macs: int
    float_macs: int

    @property
    def tentaclenet(self) -> int:
        """Bits by the first paper's convention."""
        return tentaclenet_bits(self.entries, self.members)

    @property
    def filter_sharing(self) -> int:
        """Bits by the second paper's convention."""
        return filter_sharing_bits(self.entries)

    @property
    def kib(self) -> int:
        """KiB by the first paper's convention."""
        return kib(self.tentaclenet)


def counted(program: Program, file_bytes: int | None = None) -> Count:
    """The counts of a trained Program.

    Args:
        file_bytes: the size of its file, where there is one.
    """
    size = len(packfile.encode(program)) if file_bytes is None else file_bytes
    return Count(program.members, tuple(table(program)), size, size, *costs.cost(program))


def by_layer(entries: Iterable[Entry]) -> list[tuple[Entry, int]]:
    """The weights of each layer, in forward order, and all bytes that the file has for the layer.

    Batch norm and activation that were folded into a threshold count to the layer before.
    """
    entries = list(entries)
    weights = {e.layer: e for e in entries if e.role == "weight"}
    taken = dict.fromkeys(weights, 0)
    last = next(iter(weights), None)
    for entry in entries:
        last = entry.layer if entry.layer in weights else last
        if entry.layer != "combine" and last is not None:
            taken[last] += entry.file_bytes
    return [(weights[layer], size) for layer, size in taken.items()]


def by_block(rows: Iterable[Entry]) -> dict[str, int]:
    """Block -> bits by the second paper's convention, as its Tables 1 and 2 list them."""
    total: dict[str, int] = {}
    for row in rows:
        if row.role == "weight":
            name = block(row.layer)
            total[name] = total.get(name, 0) + row.counted_bits
    return total


# Roles in the words of the printed breakdown.
PARTS = {
    "weight": "weights",
    "weight_scale": "scales of narrowed weights",
    "bias": "biases",
    "scale": "batch norm and XNOR scales",
    "shift": "batch norm and ReAct shifts",
    "slope": "PReLU slopes",
    "threshold": "thresholds",
    "direction": "directions of thresholds",
    "input": "normalisation of the input",
    "combine": "votes and biases of the combination",
}


def by_part(entries: Iterable[Entry]) -> dict[str, tuple[int, int]]:
    """Part of `PARTS` -> (bytes that are shared, bytes of one member's own)."""
    total: dict[str, tuple[int, int]] = {}
    for e in entries:
        if e.kind == FOLDED:
            continue
        binary = e.kind == "binary" and e.role == "weight"
        name = ("binary " if binary else "") + PARTS[e.role]
        shared, own = total.get(name, (0, 0))
        total[name] = (shared, own + e.copy_bytes) if e.own else (shared + e.copy_bytes, own)
    return total


def summary(models: Mapping[str, Count]) -> list[str]:
    """Lines: one a model, all its counts."""
    rows: list[tuple[object, ...]]
    rows = [("model", "members", "KiB, rounded up (TentacleNet)", "bits (Kim et al.)",
             "bytes of the file", "binary MMAC", "float MMAC")]  # fmt: skip
    for name, c in models.items():
        size = f"{c.file:,}" if c.file == c.file_least else f"at most {c.file:,}"
        macs = f"{c.binary_macs / 1e6:,.2f}", f"{c.float_macs / 1e6:,.2f}"
        rows.append((name, c.members, f"{c.kib:,}", f"{c.filter_sharing:,}", size, *macs))
    return columns(rows, "<>")


def described(counts: Count) -> list[str]:
    """Lines: bits by layer in the papers' layout, the counted totals, bytes of the file by part."""
    rows: list[tuple[object, ...]]
    rows = [("layer", "weights", "kind", "", "bits a copy", "copies", "bits", "file bytes")]
    for w, size in by_layer(counts.entries):
        shape, owner = "x".join(map(str, w.shape)), "own" if w.own else "shared"
        bits = w.counted_bits
        sizes = (f"{bits // w.copies:,}", w.copies, f"{bits:,}", f"{size:,}")
        rows.append((w.layer, shape, w.kind, owner, *sizes))
    m = counts.members
    members = f"{m} member{'s' if m > 1 else ''}"
    lines = [
        *columns(rows, "<><<>"),
        f"counted as TentacleNet does    {counts.tentaclenet:>13,} bits = {counts.kib:,} KiB",
        f"counted as Kim et al. do       {counts.filter_sharing:>13,} bits",
        f"bytes of the packed file, of {members}:",
    ]
    parts = [
        (f"  {name}", f"{shared:,} shared + {m} x", f"{own:,} own =", f"{shared + m * own:,}")
        for name, (shared, own) in by_part(counts.entries).items()
    ]
    tensors = sum(entry.file_bytes for entry in counts.entries)
    parts.append(("  graph, names, header", "", "", f"{counts.file - tensors:,}"))
    if counts.file == counts.file_least:
        parts.append(("  the file", "", "", f"{counts.file:,}"))
    else:
        parts.append(("  the file, once trained: at most", "", "", f"{counts.file:,}"))
        parts.append(("                        at least", "", "", f"{counts.file_least:,}"))
    return [
        *lines,
        *columns(parts, "<>"),
        f"one image, {members}: {counts.binary_macs / 1e6:,.2f} M binary, "
        f"{counts.float_macs / 1e6:,.2f} M float multiply-accumulates",
    ]
