"""Operators on their way into a `Program`, and the one place where a Program is put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from bnncore.errors import UserError
from bnncore.networks.ensemble import EnsembleSpec
from bnncore.packed import program as P


class LowerError(UserError, ValueError):
    """What cannot be packed: a layer, or a value of it; the message names it."""


Arrays = tuple[str, str, list[np.ndarray]]  # role, kind, one array a member or one in all


@dataclass
class Draft:
    """What becomes a `program.Node`.

    Attributes:
        op, name, inputs, attrs: the node's; inputs are drafts.
        tensors: slot -> its arrays.
        modules: of a function of each channel alone: the modules that compute it, one a member.
        shared: whether the layer is one object in all members.
        uses: how many others take its value.
    """

    op: str
    name: str
    inputs: list[Draft]
    tensors: dict[str, Arrays] = field(default_factory=dict)
    attrs: dict[str, int | float] = field(default_factory=dict)
    modules: list[nn.Module] | None = None
    shared: bool = False
    uses: int = 0


IMAGE = Draft("image", "image", [])

# (role, kind, arrays, shared) -> an entry of the table
MakeTensor = Callable[[str, str, list[np.ndarray], bool], P.Tensor]


def assemble(
    drafts: Sequence[Draft],
    output: Draft,
    tensor: MakeTensor,
    spec: EnsembleSpec,
    members: int,
    combined: Mapping[str, np.ndarray],
    classes: Sequence[str],
    info: Mapping[str, Any],
) -> P.Program:
    """The Program of all drafts that are used.

    Args:
        tensor: makes an entry of the table.
        combined: slot -> values of the combination's tensors.
    """
    tensors: dict[str, P.Tensor] = {}
    nodes: list[P.Node] = []
    numbers = {id(IMAGE): 0}
    for draft in drafts:
        if draft is not output and draft.uses == 0:
            continue
        slots = {slot: f"{len(nodes)}.{slot}" for slot in draft.tensors}
        for slot, (role, kind, arrays) in draft.tensors.items():
            tensors[slots[slot]] = tensor(role, kind, arrays, draft.shared)
        inputs = tuple(numbers[id(source)] for source in draft.inputs)
        nodes.append(P.Node(draft.op, draft.name, inputs, slots, draft.attrs))
        numbers[id(draft)] = len(nodes)
    for slot, values in combined.items():
        tensors[f"c.{slot}"] = P.Tensor("float32", "combine", values.shape, False, values)
    return P.Program(
        nodes=tuple(nodes),
        tensors=tensors,
        members=members,
        combine=spec.combine,
        image=spec.model.image,
        classes=tuple(classes),
        combine_tensors={slot: f"c.{slot}" for slot in combined},
        info=dict(info),
    )
