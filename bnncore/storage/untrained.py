"""What an ensemble will take, counted before it is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bnncore import storage
from bnncore.lowering import blueprint
from bnncore.networks.ensemble import EnsembleSpec
from bnncore.packed.narrow import narrowed
from bnncore.params import PackParams

# (H, W, C) and number of classes of the data sets that have their own; no image has to be read.
SHAPES = {
    "digits": ((8, 8, 1), 10),
    "cifar10": ((32, 32, 3), 10),
    "cifar100": ((32, 32, 3), 100),
    "fer2013": ((48, 48, 1), 7),
}


def table(
    spec: EnsembleSpec, pack: PackParams | None = None, alike: bool | None = None
) -> list[storage.Entry]:
    """Every tensor of `spec`, of the largest kind that training can give, kept as `pack` says.

    Args:
        alike: see `blueprint.file_range`.
    """
    drawn = blueprint.draw(spec).most
    return storage.table(narrowed(drawn, pack, alike=bool(alike)) if pack else drawn, spec.members)


def count(
    spec: EnsembleSpec,
    pack: PackParams | None = None,
    classes: Sequence[str] | None = None,
    info: dict[str, Any] | None = None,
    alike: bool | None = None,
) -> storage.Count:
    """The counts of an ensemble before it is trained; see `blueprint.file_range` for `file`.

    Args:
        pack: what its file keeps; the defaults where None.
        classes, info: what the file will say of itself; room for usual ones where None.
        alike: see `blueprint.file_range`.
    """
    size = blueprint.file_range(spec, pack, classes, info, alike)
    macs = blueprint.draw(spec).macs(spec.members)
    return storage.Count(spec.members, tuple(table(spec, pack, alike)), *size, *macs)
