"""What the best of a search is compared with: networks that use the same budget in another way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

from bnncore.networks.ensemble import EnsembleSpec
from bnncore.params import PackParams, Params
from bnncore.search.space import Config, Cost, Row, Space, cost, described, preset
from bnncore.training import plans

# The papers' own rows: label -> scheme, sharing, start.
PAPERS = {
    "TentacleNet (2020)": ("tentaclenet", "tentaclenet", "hadamard"),
    "Kim et al. (2022), fusion": ("fusion", "shared_conv", "bnn"),
    "Kim et al. (2022), bagging": ("bagging", "shared_conv", "bnn"),
}
WIDER, INT8 = "one wider BNN", "int8 of the same bytes"
MEMBERS = 64  # the most that a rival is given
WIDTHS = 4, 1024  # between which a rival's width is looked for


@dataclass(frozen=True)
class Rival:
    """A rival and what it takes.

    Attributes:
        label, about: for people; `about` is the configuration in words.
        config: of an `INT8` backbone and width count alone.
        params: what to train.
    """

    label: str
    about: str
    config: Config
    params: Params
    cost: Cost
    feasible: bool

    @property
    def row(self) -> Row:
        """What is known of it before it is trained, for the report."""
        taken = {k.replace("file_", "bound_"): v for k, v in asdict(self.cost).items()}
        return {"about": self.about, **self.config, **taken, "feasible": self.feasible}


def rival_preset(params: Params, label: str, config: Config) -> Params:
    """What the pipeline runs to train a rival.

    Of an `INT8` that is the FP32 network alone, the model ``fp32`` of the pipeline, trained as long
    as an ensemble in all.
    """
    if label == WIDER:
        return preset(params, config, jitter=0.0, fresh_classifier=False)
    if label != INT8:
        return preset(params, config)
    recipes = (params.pretrain, params.binarize, params.ensembles.recipe)
    return replace(
        params,
        model=replace(params.model, backbone=config["backbone"], width=config["width"]),
        pretrain=replace(params.pretrain, epochs=sum(r.epochs for r in recipes)),
        pack=PackParams(weights="int8"),
        ensembles=replace(params.ensembles, train=()),
    )


def rivals(params: Params, space: Space, best: Row) -> Iterator[Rival]:
    """The papers' configurations of ``model`` with the most members that fit the budget; one BNN of
    the best's backbone, as wide as fits; and that backbone's FP32 network in 8-bit weights, as wide
    as fits. The budget is in bytes of the file; where it counts otherwise, the best's bytes are it.
    A rival may be over the other limits: then it is not `feasible`.
    """
    search = params.search
    limit = int(1024 * search.budget_kib) if search.count == "file" else best["bound_bytes"]

    def spec(label: str, config: Config, p: Params) -> EnsembleSpec:
        if label == INT8:
            return plans.single_spec(p, space.image, len(space.classes), binary=False)
        return space.spec(config)

    def size(label: str, config: Config) -> int:
        p = rival_preset(params, label, config)
        return cost(spec(label, config, p), p, space.classes).file_bytes

    def rival(label: str, config: Config, about: str) -> Rival:
        p = rival_preset(params, label, config)
        taken = cost(spec(label, config, p), p, space.classes, search.count)
        return Rival(label, about, config, p, taken, max(taken.constraints(search).values()) <= 0)

    plain = {"affine": best["affine"], "weights": "float32"}
    own = {"backbone": params.model.backbone, "width": params.model.width, **plain}
    for label, (scheme, sharing, start) in PAPERS.items():
        config = {**own, "scheme": scheme, "sharing": sharing, "start": start}
        sizes = {m: size(label, config | {"members": m}) for m in range(1, MEMBERS + 1)}
        members = max((m for m, taken in sizes.items() if taken <= limit), default=None)
        if members and not space.problem(config | {"members": members}):
            config["members"] = members
            yield rival(label, config, described(config))

    single = {"scheme": "fusion", "sharing": "no_shared", "members": 1, "start": "bnn"}
    eight = {"affine": "float32", "weights": "int8", "members": 1}
    for label, config, words in (
        (WIDER, {**plain, **single}, "one BNN"),
        (INT8, eight, "FP32 network with 8-bit weights"),
    ):
        config = {"backbone": best["backbone"], **config}
        width = _most(lambda w: size(label, config | {"width": w}) <= limit, *WIDTHS)  # noqa: B023
        if width:
            yield rival(label, config | {"width": width}, f"{best['backbone']} {width}, {words}")


def _most(fits: Callable[[int], bool], low: int, high: int) -> int | None:
    """The largest of low..high that fits; None if none does. What fits also fits smaller."""
    if not fits(low):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
