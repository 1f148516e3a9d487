"""From a trained ensemble to what is written: its Program, with the facts that its file tells.

Stage pack and the search both pack here, so that what a search counts and measures is the file
that the pipeline writes.

Legend: `M` members, `N` images, `C` classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from bnncore import metrics
from bnncore.data import Dataset
from bnncore.errors import UserError
from bnncore.lowering.lower import lower
from bnncore.packed import execute, narrow, packfile, votes
from bnncore.packed.integers import IntegerError
from bnncore.packed.program import Program
from bnncore.params import EnsembleParams, PackParams, Params
from bnncore.training.ensembled import Ensembled
from bnncore.training.inference import member_outputs

Facts = dict[str, str | int | float]

# What ``choose: auto`` chooses from.
PACKINGS = (
    PackParams(),
    PackParams("float16"),
    PackParams("float16", "float16"),
    PackParams("float16", "mixed"),
    PackParams("float16", "int8"),
)
INTEGERS = PackParams(integer=True)


def packings(pack: PackParams) -> tuple[PackParams, ...]:
    """Those that `pack` leaves to choose from; integers, if wanted, before all others."""
    if pack.choose != "auto":
        return (pack,)
    return (INTEGERS, *PACKINGS) if pack.integer else PACKINGS


def words(pack: PackParams) -> str:
    """A packing in words; empty where nothing is narrowed."""
    if pack.integer:
        return "integers"
    said = {"norms": pack.affine, "weights": pack.weights}
    return ", ".join(f"{kind} {what}" for what, kind in said.items() if kind != "float32")


def facts(params: Params, name: str, section: EnsembleParams | None = None) -> Facts:
    """What the packed file of a model says of itself.

    Its validation accuracy, in percent, has the longest text that it can have until it is measured:
    a bound on the file's size needs no training.

    Args:
        section: the ensemble's; None for the networks ``fp32`` and ``bnn``, whose kind is the name.
    """
    found: Facts = {
        "name": name, "backbone": params.model.backbone, "kind": name, "seed": params.seed,
    }  # fmt: skip
    if params.model.width:
        found["width"] = params.model.width
    if section is not None:
        sharing = section.sharing
        found |= {
            "kind": "ensemble",
            "scheme": section.scheme,
            "sharing": sharing if isinstance(sharing, str) else sharing.name,
        }
    if narrowed := words(params.pack):
        found["pack"] = narrowed
    return found | {"val_top1": 99.99}


@dataclass(frozen=True, eq=False)
class Packed:
    """A trained ensemble as it is written.

    Attributes:
        program: narrowed as `pack` says.
        pack: the packing that was taken.
        val: the Program's own member outputs on the validation part, (M, N, C) float32; torch's
            where nothing is narrowed, which are the same.
        theirs: torch's outputs by part, of the network before it was narrowed.
        top1: validation accuracy of the Program, in percent.
        drop: points of it that narrowing cost.
    """

    program: Program
    pack: PackParams
    val: np.ndarray
    theirs: dict[str, np.ndarray]
    top1: float
    drop: float


def packed(
    trained: Ensembled,
    params: Params,
    data: Dataset,
    name: str,
    section: EnsembleParams | None = None,
    parts: Sequence[str] = ("val",),
    among: Sequence[PackParams] | None = None,
) -> Packed:
    """The Program as the pipeline writes it, packed as `params.pack` says.

    Of several packings it takes the smallest whose validation accuracy is at most
    ``pack.max_drop`` below that of what was trained, but integers, if they are among them, whatever
    their size; where there is none, the most accurate one.

    Args:
        name, section: as in `facts`.
        parts: whose outputs of torch are wanted, of val and test; val is always there.
        among: packings to choose from; None for `packings` of `params.pack`.

    Raises:
        NarrowError, IntegerError: a value fits no packing.
    """
    theirs = torch_outputs(trained, data, ("val", *(p for p in parts if p != "val")))
    whole = lower(trained.ensemble(), data.mean, data.std, data.classes)

    def top1(program: Program, outputs: np.ndarray) -> float:
        return 100 * metrics.accuracy(votes.combine(program, outputs)[1], data.val.labels)

    reference, found = top1(whole, theirs["val"]), []
    for pack, program in _by_size(whole, among or packings(params.pack), data):
        outputs = theirs["val"]
        if words(pack):
            outputs = execute.Model(program).outputs(data.val.images)
        reached = top1(program, outputs)
        program.info.update(facts(replace(params, pack=pack), name, section))
        program.info["val_top1"] = round(reached, 2)
        found.append(Packed(program, pack, outputs, theirs, reached, reference - reached))
        if reached >= reference - params.pack.max_drop:
            return found[-1]
    return max(found, key=lambda one: one.top1)


def _by_size(
    whole: Program, among: Sequence[PackParams], data: Dataset
) -> list[tuple[PackParams, Program]]:
    """The packings that hold all values of `whole`, and it in each: integers, then by size."""
    found: list[tuple[bool, int, int, PackParams, Program]] = []
    errors: list[UserError] = []
    for pack in among:
        try:
            program = narrow.narrowed(replace(whole, info={}), pack, data.val.images)
            size = len(packfile.encode(program))
            found.append((not pack.integer, size, len(found), pack, program))
        except (narrow.NarrowError, IntegerError) as error:
            errors.append(error)
    if not found:
        raise errors[-1]
    return [(pack, program) for *_, pack, program in sorted(found, key=lambda f: f[:3])]


def torch_outputs(trained: Ensembled, data: Dataset, parts: Sequence[str]) -> dict[str, np.ndarray]:
    """Member outputs of torch on parts of the data, (M, N, C) float32 each."""
    ensemble = trained.ensemble()
    return {part: member_outputs(ensemble, getattr(data, part).images, data) for part in parts}
