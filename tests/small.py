"""Plans and jobs on the digits that train in about a second."""

from __future__ import annotations

import torch

from bnncore import data, params
from bnncore.data import Dataset
from bnncore.training import plans
from bnncore.training.schemes import Plan

# (scheme, sharing, what else its section says): everything that is trained jointly, and voting.
CUSTOM = {"own": ["binary_conv"], "frozen": False, "name": "trained"}
GRID = [
    ("tentaclenet", "tentaclenet", {"classifier": "logits"}),
    ("tentaclenet", "tentaclenet", {"classifier": "features"}),
    ("fusion", "no_shared", {}),
    ("fusion", "shared_conv", {}),
    ("fusion", "c1", {}),
    ("fusion", "c2", {}),
    ("fusion", "c3", {}),
    ("fusion", "c3_blocks", {}),
    ("fusion", "all_frozen", {}),
    ("fusion", CUSTOM, {}),
    ("voting", "shared_conv", {}),
]
SHARDED = [
    ("tentaclenet", "tentaclenet", {"classifier": "logits"}),
    ("fusion", "shared_conv", {"recipe": {"batch_size": 50}}),  # ends with a batch of 42 images
    ("voting", "shared_conv", {}),
    ("fusion", "no_shared", {"recipe": {"distill": 0.5}, "teacher": "ensemble"}),
]


def plan(
    scheme: str = "fusion",
    sharing="shared_conv",
    members: int = 8,
    epochs: int = 2,
    backbone: str = "resnet8",
    width: int = 8,
    subset: float = 0.25,
    recipe: dict | None = None,
    dropout: float = 0.0,
    binarizer: dict | None = None,
    **ensemble,
) -> tuple[Plan, Dataset]:
    """What `schemes.train` needs, from networks that were not trained at all."""
    section = {"name": "e", "scheme": scheme, "sharing": sharing, "members": members, **ensemble}
    resolved = params.parse(
        {
            "data": {"name": "digits", "subset": subset},
            "model": {
                "backbone": backbone,
                "width": width,
                "dropout": dropout,
                "binarizer": binarizer or {},
            },
            "ensembles": {
                "recipe": {"epochs": epochs, "batch_size": 64, **(recipe or {})},
                "train": [section],
            },
        }
    )
    images = data.load(resolved.data)
    fp32 = plans.first_job(resolved, images, None).start
    bnn = plans.first_job(resolved, images, fp32).start
    return plans.plan(resolved, resolved.ensembles.train[0], images, fp32, bnn), images


def differences(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    """Names of the entries that are not bitwise equal."""
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]
