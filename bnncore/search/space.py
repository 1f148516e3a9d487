"""What a search chooses from: configurations, and what each takes.

A configuration is a dict with a value for each field of `params.SpaceParams`. Nothing here trains.

Legend: `M` members.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise, product
from typing import Any

import numpy as np
import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution

from bnncore import check
from bnncore import params as P
from bnncore.data import Dataset
from bnncore.lowering import blueprint
from bnncore.lowering.packing import facts
from bnncore.networks.backbones import build
from bnncore.networks.ensemble import EnsembleSpec
from bnncore.networks.sharing import SHARING
from bnncore.packed import costs
from bnncore.packed.program import Program
from bnncore.packed.rules import MAX_MEMBERS
from bnncore.params import EnsembleParams, PackParams, Params, ParamsError, SearchParams
from bnncore.storage import untrained
from bnncore.training import plans, schemes

Config = dict[str, Any]
Row = dict[str, Any]  # of a report
TRACED = 64  # networks that are traced before they are asked for


# -- configurations ----------------------------------------------------------------------------


def preset(params: Params, config: Config, **changes: Any) -> Params:
    """`params` with the configuration as its only ensemble, ``best``: what the pipeline can run.

    Args:
        changes: other fields of the ensemble's section.
    """
    model = replace(params.model, backbone=config["backbone"], width=config["width"])
    epochs = params.ensembles.recipe.epochs
    if config["scheme"] == "snapshot" and epochs % config["members"]:
        # A cycle a member, all of the same length.
        changes["recipe"] = {"epochs": -(-epochs // config["members"]) * config["members"]}
    keys = ("scheme", "sharing", "members", "start")
    ensemble = EnsembleParams("best", **{k: config[k] for k in keys}, **changes)
    return replace(
        params,
        model=model,
        pack=PackParams(config["affine"], config["weights"]),
        ensembles=replace(params.ensembles, train=(ensemble,)),
    )


def model(params: Params) -> tuple[str, EnsembleParams | None]:
    """Name and section of what `params` are about: the only ensemble, or else the FP32 network."""
    (section,) = params.ensembles.train or (None,)
    return (section.name, section) if section else ("fp32", None)


def shortened(params: Params) -> Params:
    """`params` with no recipe longer than ``search.epochs``."""
    most = params.search.epochs or math.inf

    def cut(recipe: P.Recipe) -> P.Recipe:
        return replace(recipe, epochs=int(min(recipe.epochs, most)))

    ensembles = replace(params.ensembles, recipe=cut(params.ensembles.recipe))
    return replace(
        params,
        pretrain=cut(params.pretrain),
        binarize=cut(params.binarize),
        ensembles=ensembles,
    )


def at_rung(params: Params, fraction: float) -> Params:
    """`params` with that fraction of the ensembles' epochs."""
    recipe = params.ensembles.recipe
    recipe = replace(recipe, epochs=max(1, round(fraction * recipe.epochs)))
    return replace(params, ensembles=replace(params.ensembles, recipe=recipe))


@dataclass(frozen=True)
class Cost:
    """What a configuration takes, known before it is trained.

    Attributes:
        file_bytes: the most that its packed file can have.
        counted_kib: what the budget counts, in KiB.
        megaops: millions of operations an image: float MACs + binary MACs / 64.
        activation_kib: peak memory of values between layers, bits as bits.
    """

    file_bytes: int
    counted_kib: float
    megaops: float
    activation_kib: float

    def constraints(self, search: SearchParams) -> dict[str, float]:
        """Limit -> how far over it (share of the limit); 0 or less is within."""
        over = {"size": self.counted_kib / search.budget_kib - 1}
        if search.megaops is not None:
            over["operations"] = self.megaops / search.megaops - 1
        if search.activation_kib is not None:
            over["activations"] = self.activation_kib / search.activation_kib - 1
        return over


def cost(spec: EnsembleSpec, params: Params, classes: Sequence[str], count: str = "file") -> Cost:
    """Count `spec`, packed as `params` say: one member is traced, the rest is multiplication."""
    drawing = blueprint.draw(spec)
    info = facts(params, *model(params))
    if count == "file":
        size = blueprint.file_bound(spec, params.pack, classes, info)
        counted = size / 1024
    else:
        counts = untrained.count(spec, params.pack, classes, info)
        size, counted = counts.file, getattr(counts, count) / 8 / 1024
    binary, real = drawing.macs(spec.members)
    return Cost(size, counted, (real + binary / 64) / 1e6, _activations(drawing.most) / 1024)


@lru_cache(maxsize=4096)
def _activations(program: Program) -> int:
    return costs.peak_memory(program)[0]


class Space:
    """The configurations that a search may ask for, what each takes, and which cannot be built.

    Raises:
        ParamsError: a name that does not exist; a space in which nothing can be built, or of which
            even the smallest configuration is over a limit. Nothing is trained before.
    """

    def __init__(self, params: Params, data: Dataset):
        self.params, self.search = params, params.search
        self.image, self.classes = data.image, data.classes
        self.values: dict[str, tuple] = dict(vars(params.search.space))
        self.size = math.prod(map(len, self.values.values()))
        self.distributions = {name: _distribution(v) for name, v in self.values.items()}
        self._problems: dict[tuple, str | None] = {}
        self._specs: dict[tuple, EnsembleSpec] = {}
        if (most := max(self.values["members"])) > MAX_MEMBERS:
            raise ParamsError(
                f"search.space.members: expected at most {MAX_MEMBERS}, which a packed file can "
                f"hold, got {most}"
            )
        for name, known in (("scheme", schemes.SCHEMES), ("sharing", SHARING)):
            for value in self.values[name]:
                if value not in known:
                    raise ParamsError(
                        f"search.space.{name}: expected some of {', '.join(known)}, got {value!r}"
                    )
        for backbone in self.values["backbone"]:
            spec = plans.model_spec(params, self.image, len(self.classes), binary=True)
            try:
                with torch.device("meta"):
                    build(replace(spec, backbone=backbone, width=None))
            except ValueError as error:
                raise ParamsError(f"search.space.backbone: {error}") from None
        self.smallest, self.least = self._smallest()
        over = {k: v for k, v in self.least.constraints(self.search).items() if v > 0}
        if "size" in over:
            raise ParamsError(
                f"search.budget_kib: nothing in the space fits {self.search.budget_kib:g} KiB; the "
                f"smallest configuration, {described(self.smallest)}, takes "
                f"{self.least.counted_kib:.2f} KiB"
            )
        self._trace_networks()

    def _trace_networks(self) -> None:
        """Trace every network once, now, so that no rejection waits for it; of a very large space
        each when it is first seen.
        """
        if len(self.values["backbone"]) * len(self.values["width"]) > TRACED:
            return
        for backbone, width, scheme, sharing in product(
            *(self.values[k] for k in ("backbone", "width", "scheme", "sharing"))
        ):
            changed = {"backbone": backbone, "scheme": scheme, "sharing": sharing}
            config = self.smallest | changed | {"members": min(self.values["members"])}
            if not self.problem(config):
                blueprint.draw(self.spec(config | {"width": width}))

    def spec(self, config: Config) -> EnsembleSpec:
        key = tuple(config[k] for k in ("backbone", "width", "scheme", "sharing"))
        if key not in self._specs:  # finding it takes as long as all else
            p = preset(self.params, config)
            spec = plans.ensemble_spec(p, p.ensembles.train[0], self.image, len(self.classes))
            self._specs[key] = spec
        return replace(self._specs[key], members=config["members"])

    def cost(self, config: Config) -> Cost:
        p = preset(self.params, config)
        return cost(self.spec(config), p, self.classes, self.search.count)

    def problem(self, config: Config) -> str | None:
        """Why the configuration cannot be built, or None."""
        members = config["members"]
        # Widths and more than two members make no difference to that.
        few = members if config["scheme"] == "snapshot" else min(members, 2)
        key = (config["backbone"], config["scheme"], config["sharing"], few)
        if key not in self._problems:
            try:
                narrow = {"width": min(self.values["width"]), "members": few}
                p = preset(self.params, config | narrow)
                check.check(p, self.image, len(self.classes))
                self._problems[key] = None
            except ValueError as error:
                self._problems[key] = str(error).removeprefix("ensembles.train.best.")
        return self._problems[key]

    def near(self, config: Config, tried: set[str], seed: int) -> Config:
        """An untried configuration that differs from `config` in as few values as are needed.

        One value is changed at random, after a while two, and so on; there must be one.
        """
        rng = np.random.default_rng(seed)
        open_ = [name for name, values in self.values.items() if len(values) > 1]
        for k in range(100 * len(open_)):
            changed = dict(config)
            for name in rng.choice(open_, size=1 + k // 100, replace=False):
                values = self.values[name]
                changed[name] = values[rng.integers(len(values))]
            if identity(changed) not in tried:
                return changed
        for choice in np.ndindex(*map(len, self.values.values())):
            config = {k: v[i] for (k, v), i in zip(self.values.items(), choice, strict=True)}
            if identity(config) not in tried:
                return config
        raise ValueError(f"expected an untried configuration, but all {self.size} were tried")

    def _smallest(self) -> tuple[Config, Cost]:
        """Bytes grow with the width and with the members, so the rest is tried at the least."""
        found: list[tuple[float, int, Config, Cost]] = []
        least = {"width": (min(self.values["width"]),), "members": (min(self.values["members"]),)}
        values = self.values | least | {"start": self.values["start"][:1]}
        problems = set()
        for choice in np.ndindex(*map(len, values.values())):
            config = {k: v[i] for (k, v), i in zip(values.items(), choice, strict=True)}
            problem = self.problem(config)
            if problem:
                problems.add(f"{config['backbone']}: {problem}")
                continue
            taken = self.cost(config)
            found.append((taken.counted_kib, len(found), config, taken))
        if not found:
            why = "; ".join(sorted(problems))
            raise ParamsError(f"search.space: nothing in it can be built: {why}")
        _, _, config, taken = min(found)
        return config, taken


def _distribution(values: tuple) -> BaseDistribution:
    """Whole numbers in equal steps as such; anything else as choices without an order."""
    if len(values) > 2 and all(isinstance(v, int) for v in values):
        steps = {b - a for a, b in pairwise(values)}
        if len(steps) == 1 and (step := steps.pop()) > 0:
            return IntDistribution(values[0], values[-1], step=step)
    return CategoricalDistribution(values)


def identity(config: Config) -> str:
    return json.dumps(config, sort_keys=True)


def described(config: Config) -> str:
    """One line for people: ``nin 16, fusion, shared_conv, 4 members, start bnn``."""
    members = f"{config['members']} member{'s' if config['members'] > 1 else ''}"
    extra = [config[k] for k in ("affine", "weights") if config[k] != "float32"]
    return ", ".join(
        [f"{config['backbone']} {config['width']}", config["scheme"], config["sharing"], members,
         f"start {config['start']}", *extra]
    )  # fmt: skip
