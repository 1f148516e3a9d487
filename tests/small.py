"""Plans and jobs on the digits that train in about a second."""

from __future__ import annotations

import torch

from bnncore import data, params
from bnncore.data import Dataset
from bnncore.training import schemes
from bnncore.training.schemes import Plan


def plan(
    scheme: str = "fusion",
    sharing="shared_conv",
    members: int = 8,
    epochs: int = 2,
    backbone: str = "resnet8",
    width: int = 8,
    subset: float = 0.25,
    recipe: dict | None = None,
    **ensemble,
) -> tuple[Plan, Dataset]:
    """What `schemes.train` needs, from networks that were not trained at all."""
    section = {"name": "e", "scheme": scheme, "sharing": sharing, "members": members, **ensemble}
    resolved = params.parse(
        {
            "data": {"name": "digits", "subset": subset},
            "model": {"backbone": backbone, "width": width},
            "ensembles": {
                "recipe": {"epochs": epochs, "batch_size": 64, **(recipe or {})},
                "train": [section],
            },
        }
    )
    images = data.load(resolved.data)
    fp32 = schemes.first_job(resolved, images, None).start
    bnn = schemes.first_job(resolved, images, fp32).start
    return schemes.plan(resolved, resolved.ensembles.train[0], images, fp32, bnn), images


def differences(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    """Names of the entries that are not bitwise equal."""
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]
