"""What a search chooses from: configurations, and what each takes.

A choice is a dict with a value of each list of `params.SpaceParams`. A configuration is what it
comes to: its width is a number, and what makes no difference has one value. Nothing here trains.

Legend: `M` members.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice, pairwise, product
from typing import Any

import numpy as np
import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution

from bnncore import check
from bnncore import params as P
from bnncore.data import Dataset
from bnncore.device.costs import Figures, estimate
from bnncore.lowering import blueprint, packing
from bnncore.networks.backbones import build
from bnncore.networks.ensemble import EnsembleSpec
from bnncore.networks.sharing import SHARING
from bnncore.packed import costs, integers
from bnncore.packed.narrow import narrowed
from bnncore.packed.program import Program
from bnncore.packed.rules import MAX_MEMBERS
from bnncore.params import EnsembleParams, PackParams, Params, ParamsError, SearchParams
from bnncore.storage import untrained
from bnncore.training import plans, schemes

Choice = dict[str, Any]
Config = dict[str, Any]
Row = dict[str, Any]  # of a report
KEYS = ("backbone", "width", "scheme", "sharing", "members", "start")
FP32 = "fp32"  # the scheme of what is no ensemble
# What one network is, whatever its choice says of an ensemble.
ONE_BNN: Config = {"scheme": "fusion", "sharing": "no_shared", "members": 1}
ONE_FP32: Config = {"scheme": FP32, "sharing": "no_shared", "members": 1, "start": "random"}
# In steps of 4, so that trials share trained networks; finer where 4 is much.
WIDTHS = (*range(2, 8), *range(8, 513, 4))


# -- configurations ----------------------------------------------------------------------------


def preset(params: Params, config: Config) -> Params:
    """`params` with the configuration as its only ensemble, ``best``: what the pipeline can run.

    Of the FP32 network that is its model ``fp32``, without ensembles, trained as long as an
    ensemble in all.

    Args:
        config: a trained one's row has its packing as well; else it is what `params` say.
    """
    dropout = params.model.dropout if plans.drops_out(config["backbone"]) else 0.0
    changed = {"backbone": config["backbone"], "width": config["width"], "dropout": dropout}
    model = replace(params.model, **changed)
    params = replace(params, model=model, pack=packing_of(config) or params.pack)
    if config["scheme"] == FP32:
        recipes = (params.pretrain, params.binarize, params.ensembles.recipe)
        longer = replace(params.pretrain, epochs=sum(r.epochs for r in recipes))
        ensembles = replace(params.ensembles, train=())
        return replace(params, pretrain=longer, ensembles=ensembles)
    changes: dict[str, Any] = {}
    if config["members"] == 1:  # nothing to differ from
        changes |= {"jitter": 0.0, "fresh_classifier": False}
    keys = ("scheme", "sharing", "members", "start")
    ensemble = EnsembleParams("best", **{k: config[k] for k in keys}, **changes)
    return _only(params, params.ensembles.recipe, ensemble)


def _only(params: Params, recipe: P.Recipe, ensemble: EnsembleParams) -> Params:
    """`params` with one ensemble, trained by `recipe`."""
    own = recipe.cycles(ensemble.members) if ensemble.scheme == "snapshot" else recipe
    ensemble = replace(ensemble, recipe=own.differs(recipe))
    return replace(params, ensembles=P.EnsemblesParams(recipe, (ensemble,)))


def packing_of(row: Row) -> PackParams | None:
    """How what a row is about was packed; None where it is not trained yet."""
    if row.get("weights") is None:
        return None
    return PackParams(row["affine"], row["weights"], row["integer"])


def model(params: Params) -> tuple[str, EnsembleParams | None]:
    """Name and section of what `params` are about: the only ensemble, or else the FP32 network."""
    (section,) = params.ensembles.train or (None,)
    return (section.name, section) if section else ("fp32", None)


def shortened(params: Params) -> Params:
    """`params` with no recipe longer than ``search.epochs``."""
    most = params.search.epochs or math.inf

    def cut(recipe: P.Recipe) -> P.Recipe:
        return recipe.times(min(1.0, most / recipe.epochs)) if recipe.epochs else recipe

    ensembles = replace(params.ensembles, recipe=cut(params.ensembles.recipe))
    return replace(
        params,
        pretrain=cut(params.pretrain),
        binarize=cut(params.binarize),
        ensembles=ensembles,
    )


def at_rung(params: Params, fraction: float) -> Params:
    """`params` with that fraction of the epochs of what is trained last."""
    if not params.ensembles.train:
        return replace(params, pretrain=params.pretrain.times(fraction))
    (ensemble,) = params.ensembles.train
    return _only(params, params.ensembles.recipe.times(fraction), ensemble)


@dataclass(frozen=True)
class Cost:
    """What a configuration takes, known before it is trained.

    Attributes:
        file_bytes: the most that its packed file can have.
        counted_kib: what the budget counts, in KiB.
        megaops: millions of operations an image: float MACs + binary MACs / 64.
        activation_kib: peak memory of values between layers, bits as bits.
        device: what it takes as C on a microcontroller, where the search limits that.
    """

    file_bytes: int
    counted_kib: float
    megaops: float
    activation_kib: float
    device: Figures | None = None

    def constraints(self, search: SearchParams) -> dict[str, float]:
        """Limit -> how far over it (share of the limit); 0 or less is within."""
        over = {"size": self.counted_kib / search.budget_kib - 1}
        if search.megaops is not None:
            over["operations"] = self.megaops / search.megaops - 1
        if search.activation_kib is not None:
            over["activations"] = self.activation_kib / search.activation_kib - 1
        if self.device is not None:
            found = {
                "ram_kib": self.device.ram / 1024,
                "flash_kib": self.device.flash / 1024,
                "minstructions": self.device.instructions[-1] / 1e6,
            }
            limits = {name: getattr(search, name) for name in found}
            over |= {name: found[name] / limit - 1 for name, limit in limits.items() if limit}
        return over


def cost(
    spec: EnsembleSpec,
    params: Params,
    classes: Sequence[str],
    count: str = "file",
    alike: bool | None = None,
) -> Cost:
    """Count `spec`, packed as `params` say: one member is traced, the rest is multiplication.

    Args:
        alike: see `blueprint.file_range`.
    """
    drawing = blueprint.draw(spec)
    info = packing.facts(params, *model(params))
    if count == "file":
        size = blueprint.file_bound(spec, params.pack, classes, info, alike)
        counted = size / 1024
    else:
        counts = untrained.count(spec, params.pack, classes, info, alike)
        size, counted = counts.file, getattr(counts, count) / 8 / 1024
    binary, real = drawing.macs(spec.members)
    limits = params.search
    limited = limits.ram_kib or limits.flash_kib or limits.minstructions
    device = None
    if limited:
        device = _device(drawing.most, params.pack, spec.members, bool(alike))
    activations = _activations(drawing.most) / 1024
    return Cost(size, counted, (real + binary / 64) / 1e6, activations, device)


@lru_cache(maxsize=8192)
def _device(program: Program, pack: PackParams, members: int, alike: bool) -> Figures:
    return estimate(narrowed(program, pack, alike=alike), members)


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
        self.alike = integers.even(1 / np.array(data.std))
        widths = params.search.space.width
        self.narrowest = WIDTHS[0] if widths == "auto" else min(widths)
        left_out = "width" if widths == "auto" else "fill"
        fields = vars(params.search.space).items()
        self.values: dict[str, tuple] = {k: v for k, v in fields if k != left_out}
        self.distributions = {name: _distribution(v) for name, v in self.values.items()}
        self._problems: dict[tuple, str | None] = {}
        self._specs: dict[tuple, EnsembleSpec] = {}
        self._widths: dict[tuple, int | None] = {}
        if (most := max(self.values["members"])) > MAX_MEMBERS:
            raise ParamsError(
                f"search.space.members: expected at most {MAX_MEMBERS}, which a packed file can "
                f"hold, got {most}"
            )
        for name, known in (("scheme", (*schemes.SCHEMES, FP32)), ("sharing", (*SHARING,))):
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

    def config(self, choice: Choice) -> Config:
        """What a choice comes to."""
        config = {"width": self.narrowest, **choice}
        if config["scheme"] == FP32:
            config |= ONE_FP32
        elif config["members"] == 1:
            config |= ONE_BNN
        elif freezes(config["sharing"]) and "bnn" in self.values["start"]:
            config["start"] = "bnn"
        fill = config.pop("fill", None)
        if fill and not self.problem(config):
            config["width"] = self.widest(config, fill) or self.narrowest
        return config

    def widest(self, config: Config, fill: float = 1.0) -> int | None:
        """The widest network of `WIDTHS` that fits so much of the budget, and the other limits."""
        key = (fill, *(config[k] for k in ("backbone", "scheme", "sharing", "members")))
        if key not in self._widths:
            share = replace(self.search, budget_kib=fill * self.search.budget_kib)

            def fits(width: int) -> bool:
                return bool(self.packings(config | {"width": width}, share, enough=1))

            self._widths[key] = most(fits, WIDTHS)
        return self._widths[key]

    def packings(
        self, config: Config, search: SearchParams | None = None, enough: int = 99
    ) -> tuple[PackParams, ...]:
        """The packings, at most `enough` of them, in which it is within all limits for certain."""
        limits = search or self.search
        fitting = (
            pack for pack in self._candidates(config)
            if max(self._cost(config, pack).constraints(limits).values()) <= 0
        )  # fmt: skip
        return tuple(islice(fitting, enough))

    def _candidates(self, config: Config) -> tuple[PackParams, ...]:
        """From narrow to wide. An FP32 network is narrowed whatever ``pack`` says: its weights in
        four bytes each would be no rival.
        """
        auto = PackParams(choose="auto")
        pack = auto if config["scheme"] == FP32 else self.params.pack
        return packing.packings(pack)[::-1]

    def spec(self, config: Config) -> EnsembleSpec:
        key = tuple(config[k] for k in ("backbone", "width", "scheme", "sharing"))
        if key not in self._specs:  # finding it takes as long as all else
            p = preset(self.params, config)
            count = len(self.classes)
            if p.ensembles.train:
                spec = plans.ensemble_spec(p, p.ensembles.train[0], self.image, count)
            else:
                spec = plans.single_spec(p, self.image, count, binary=False)
            self._specs[key] = spec
        return replace(self._specs[key], members=config["members"])

    def cost(self, config: Config) -> Cost:
        """What the configuration takes, packed as it was, or else in the smallest packing, of those
        within all limits where any is: narrow weights take more instructions.
        """
        taken = packing_of(config)
        packs = [taken] if taken else self._candidates(config)
        costs = [self._cost(config, pack) for pack in packs]

        def key(c: Cost) -> tuple[float, ...]:
            return max(c.constraints(self.search).values()) > 0, c.counted_kib, c.file_bytes

        return min(costs, key=key)

    def _cost(self, config: Config, pack: PackParams) -> Cost:
        p = replace(preset(self.params, config), pack=pack)
        return cost(self.spec(config), p, self.classes, self.search.count, self.alike)

    def problem(self, config: Config) -> str | None:
        """Why the configuration cannot be built, or None."""
        members = config["members"]
        # Widths and more than two members make no difference to that.
        few = members if config["scheme"] == "snapshot" else min(members, 2)
        key = (config["backbone"], config["scheme"], config["sharing"], config["start"], few)
        if key not in self._problems:
            try:
                p = preset(self.params, config | {"width": self.narrowest, "members": few})
                check.check(p, self.image, len(self.classes))
                self._problems[key] = None
            except ValueError as error:
                self._problems[key] = str(error).removeprefix("ensembles.train.best.")
        return self._problems[key]

    def near(self, choice: Choice, tried: set[str], seed: int) -> Choice | None:
        """A choice that comes to an untried configuration and differs from `choice` in as few
        values as are needed; None where all were tried.

        One value is changed at random, after a while two, and so on.
        """
        rng = np.random.default_rng(seed)
        open_ = [name for name, values in self.values.items() if len(values) > 1]
        for k in range(100 * len(open_)):
            changed = dict(choice)
            for name in rng.choice(open_, size=1 + k // 100, replace=False):
                values = self.values[name]
                changed[name] = values[rng.integers(len(values))]
            if identity(self.config(changed)) not in tried:
                return changed
        return next((c for c in self.choices() if identity(self.config(c)) not in tried), None)

    def choices(self) -> Iterator[Choice]:
        """All there are."""
        for values in product(*self.values.values()):
            yield dict(zip(self.values, values, strict=True))

    def _smallest(self) -> tuple[Config, Cost]:
        """Bytes grow with the width and with the members, so the rest is tried at the least."""
        found: list[tuple[float, int, Config, Cost]] = []
        fewest, problems = min(self.values["members"]), set()
        for backbone, scheme, sharing in product(
            *(self.values[k] for k in ("backbone", "scheme", "sharing"))
        ):
            config = self.config({
                "backbone": backbone, "width": self.narrowest, "scheme": scheme,
                "sharing": sharing, "members": fewest, "start": self.values["start"][0],
            })  # fmt: skip
            if problem := self.problem(config):
                problems.add(f"{backbone}: {problem}")
                continue
            taken = self.cost(config)
            found.append((taken.counted_kib, len(found), config, taken))
        if not found:
            why = "; ".join(sorted(problems))
            raise ParamsError(f"search.space: nothing in it can be built: {why}")
        _, _, config, taken = min(found)
        return config, taken


def most(fits: Callable[[int], bool], values: Sequence[int]) -> int | None:
    """The largest of rising `values` that fits; None if none does. What fits also fits smaller."""
    count = bisect_left(values, True, key=lambda value: not fits(value))
    return values[count - 1] if count else None


def _distribution(values: tuple) -> BaseDistribution:
    """Whole numbers in equal steps as such; anything else as choices without an order."""
    if len(values) > 2 and all(isinstance(v, int) for v in values):
        steps = {b - a for a, b in pairwise(values)}
        if len(steps) == 1 and (step := steps.pop()) > 0:
            return IntDistribution(values[0], values[-1], step=step)
    return CategoricalDistribution(values)


def freezes(sharing: str) -> bool:
    """Whether members share what the BNN has learned, so that they have to start from it."""
    return sharing in SHARING and SHARING[sharing].frozen


def identity(config: Config) -> str:
    """The same for configurations that come to the same, however they are packed."""
    return json.dumps({k: config[k] for k in KEYS})


def described(config: Config) -> str:
    """One line for people: ``nin 16, fusion, shared_conv, 4 members, start bnn, int8 weights``."""
    if config["scheme"] == FP32:
        said = ["FP32 network"]
    elif config.items() >= ONE_BNN.items():
        said = ["one BNN", f"start {config['start']}"]
    else:
        members = f"{config['members']} members"
        said = [config["scheme"], config["sharing"], members, f"start {config['start']}"]
    taken = packing_of(config)
    said += [packing.words(taken)] if taken and packing.words(taken) else []
    return ", ".join([f"{config['backbone']} {config['width']}", *said])
