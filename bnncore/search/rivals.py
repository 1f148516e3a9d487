"""What the best of a search is compared with: networks that use the same budget in another way.

Each is a configuration like any other, trained where no trial did.
"""

from __future__ import annotations

from bnncore.params import Params
from bnncore.search.space import ONE_BNN, ONE_FP32, Config, Space, most

# The papers' own rows: label -> scheme, sharing, start.
PAPERS = {
    "TentacleNet (2020)": ("tentaclenet", "tentaclenet", "hadamard"),
    "Kim et al. (2022), fusion": ("fusion", "shared_conv", "bnn"),
    "Kim et al. (2022), bagging": ("bagging", "shared_conv", "bnn"),
}
WIDER, INT8 = "one wider BNN", "FP32 network in int8"
MEMBERS = range(1, 17)  # that a rival may have; the papers have up to 14


def rivals(params: Params, space: Space, best: Config) -> dict[str, Config]:
    """Label -> configuration, of those that fit the budget and the other limits: the papers' on
    ``model``, with the most members that fit; one BNN of the best's backbone, as wide as fits; and
    that backbone's FP32 network in int8, as wide as fits.
    """
    found: dict[str, Config] = {}
    model = {"backbone": params.model.backbone, "width": params.model.width}
    for label, (scheme, sharing, start) in PAPERS.items():
        config = {**model, "scheme": scheme, "sharing": sharing, "start": start}
        if not space.problem(config | {"members": 2}):
            members = most(lambda m: bool(space.packings(config | {"members": m})), MEMBERS)  # noqa: B023
            if members:
                found[label] = config | {"members": members}
    ones: dict[str, Config] = {WIDER: ONE_BNN | {"start": "bnn"}, INT8: ONE_FP32}
    for label, one in ones.items():
        config = one | {"backbone": best["backbone"]}
        if not space.problem(config) and (width := space.widest(config)):
            found[label] = config | {"width": width}
    return found
