"""From a trained ensemble to what is written: its Program, with the facts that its file tells.

Stage pack and the search both pack here, so that what a search counts and measures is the file
that the pipeline writes.

Legend: `M` members, `N` images, `C` classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bnncore import metrics
from bnncore.data import Dataset
from bnncore.lowering.lower import lower
from bnncore.packed import votes
from bnncore.packed.narrow import narrowed
from bnncore.packed.program import Program
from bnncore.params import EnsembleParams, Params
from bnncore.training.ensembled import Ensembled
from bnncore.training.inference import member_outputs

Facts = dict[str, str | int | float]


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
    return found | {"val_top1": 99.99}


def packed(
    trained: Ensembled,
    params: Params,
    data: Dataset,
    name: str,
    section: EnsembleParams | None = None,
    parts: Sequence[str] = ("val",),
) -> tuple[Program, dict[str, np.ndarray]]:
    """The Program as the pipeline writes it, narrowed as `params.pack` says, and torch's outputs.

    Args:
        name, section: as in `facts`.
        parts: whose outputs are wanted, of val and test; val is always there.

    Returns:
        The Program, and a part's member outputs: (M, N, C) float32. They are those of the Program
        before it was narrowed.
    """
    outputs = torch_outputs(trained, data, ("val", *(p for p in parts if p != "val")))
    info = facts(params, name, section)
    program = lower(trained.ensemble(), data.mean, data.std, data.classes, info)
    _, predicted = votes.combine(program, outputs["val"])
    program.info["val_top1"] = round(100 * metrics.accuracy(predicted, data.val.labels), 2)
    return narrowed(program, params.pack, data.val.images), outputs


def torch_outputs(trained: Ensembled, data: Dataset, parts: Sequence[str]) -> dict[str, np.ndarray]:
    """Member outputs of torch on parts of the data, (M, N, C) float32 each."""
    ensemble = trained.ensemble()
    return {part: member_outputs(ensemble, getattr(data, part).images, data) for part in parts}
