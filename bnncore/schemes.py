"""Schemes: how the members of an ensemble are trained and combined.

A scheme is a function ``scheme(plan, train_many) -> Ensembled``: it makes jobs, has them trained
(`train.train_many` in this process, `actors.train_many` on a Ray cluster; the scheme cannot tell),
and says what came out. A new scheme is a function and a row of `SCHEMES`.

Legend: `M` members, `N` training images, `C` classes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from bnncore.backbones import ConvHead, ModelSpec, build
from bnncore.binarize import ACTIVATIONS, WEIGHTS, named
from bnncore.data import Dataset
from bnncore.ensemble import (
    SHARING,
    Ensemble,
    EnsembleSpec,
    Sharing,
    own_layers,
    single_state,
)
from bnncore.params import CustomSharing, EnsembleParams, Params, ParamsError, Recipe
from bnncore.train import Job, State, Trained

TrainMany = Callable[[list[Job]], list[Trained]]


@dataclass(frozen=True, eq=False)
class Plan:
    """What a scheme is asked to do.

    Attributes:
        params: the ensemble's section.
        spec: its structure.
        recipe: how members are trained.
        seed: of everything random in it.
        start: canonical state from which the members start.
        data: for schemes that resample or reweight it.
    """

    params: EnsembleParams
    spec: EnsembleSpec
    recipe: Recipe
    seed: int
    start: State
    data: Dataset

    def job(self, ids: tuple[int, ...], name: str, **changes: Any) -> Job:
        """A job that trains members `ids` from the plan's start."""
        seed = self.seed if len(ids) == self.spec.members else self.seed + 1 + ids[0]
        values = {"recipe": self.recipe, "seed": seed, "start": self.start, **changes}
        return Job(name=name, spec=self.spec, ids=ids, **values)


@dataclass(frozen=True, eq=False)
class Ensembled:
    """A trained ensemble.

    Attributes:
        spec: its structure.
        state: canonical state of all members.
        histories: job name -> a dict an epoch.
    """

    spec: EnsembleSpec
    state: State
    histories: dict[str, list[dict[str, Any]]]

    def ensemble(self) -> Ensemble:
        """The torch module, loaded."""
        ensemble = Ensemble(self.spec)
        ensemble.load(self.state)
        return ensemble

    def save(self, folder: Path) -> None:
        """Write weights, structure and curves into `folder`; shared tensors once."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.state, folder / "weights.safetensors")
        (folder / "spec.json").write_text(json.dumps(asdict(self.spec), indent=1))
        (folder / "histories.json").write_text(json.dumps(self.histories))

    @classmethod
    def read(cls, folder: Path) -> Ensembled:
        """The inverse of `save`.

        Raises:
            ValueError: a file is missing or broken; names it.
        """
        try:
            spec = TypeAdapter(EnsembleSpec).validate_json((folder / "spec.json").read_text())
            histories = json.loads((folder / "histories.json").read_text())
            return cls(spec, load_file(folder / "weights.safetensors"), histories)
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(f"{folder}: expected a trained model, got: {error}") from error


@dataclass(frozen=True)
class Scheme:
    """A row of `SCHEMES`.

    Attributes:
        run: the function.
        combine: how members' outputs are joined; ``vote`` is soft or hard as the section says.
        joint: whether members are trained together, so that shared layers may be trained.
    """

    run: Callable[[Plan, TrainMany], Ensembled]
    combine: str
    joint: bool


def together(plan: Plan, train_many: TrainMany) -> Ensembled:
    """All members at once, on the loss of their combined logits (fusion, TentacleNet)."""
    (trained,) = train_many([plan.job(tuple(range(plan.spec.members)), plan.params.name)])
    return Ensembled(plan.spec, trained.state, {plan.params.name: trained.history})


def independently(plan: Plan, train_many: TrainMany) -> Ensembled:
    """Each member by itself, on its own loss and its own order of the data (voting)."""
    return gathered(
        plan, train_many([plan.job((i,), _name(plan, i)) for i in range(plan.spec.members)])
    )


def _name(plan: Plan, member: int) -> str:
    return f"{plan.params.name}.{member}"


def gathered(plan: Plan, results: list[Trained], weights: np.ndarray | None = None) -> Ensembled:
    """One ensemble of members that were trained apart; what they share is equal in all."""
    state: State = {}
    for trained in results:
        state |= trained.state
    if weights is not None:
        state["shared.weights"] = torch.from_numpy(np.asarray(weights, np.float32))
    return Ensembled(plan.spec, state, {t.job.name: t.history for t in results})


SCHEMES: dict[str, Scheme] = {
    "tentaclenet": Scheme(together, "sum", joint=True),
    "fusion": Scheme(together, "mean", joint=True),
    "voting": Scheme(independently, "vote", joint=False),
}


# -- from parameters to structures and starts --------------------------------------------------


def model_spec(params: Params, image, classes: int, binary: bool) -> ModelSpec:
    """The network of one member, or its FP32 twin."""
    model = params.model
    return ModelSpec(
        model.backbone,
        tuple(image),
        classes,
        model.width,
        model.dropout,
        model.binarizer if binary else None,
    )


def single_spec(params: Params, image, classes: int, binary: bool) -> EnsembleSpec:
    """A network by itself: an ensemble of one."""
    return EnsembleSpec(model_spec(params, image, classes, binary), 1, SHARING["no_shared"])


def ensemble_spec(params: Params, ensemble: EnsembleParams, image, classes: int) -> EnsembleSpec:
    """The structure that a section of ``ensembles.train`` asks for.

    Raises:
        ParamsError: unknown scheme or sharing (lists those there are); a sharing that makes no
            sense for the scheme.
    """
    where = f"ensembles.train.{ensemble.name}"
    if ensemble.scheme not in SCHEMES:
        raise ParamsError(
            f"{where}.scheme: expected one of {', '.join(SCHEMES)}, got {ensemble.scheme!r}"
        )
    scheme = SCHEMES[ensemble.scheme]
    if isinstance(ensemble.sharing, CustomSharing):
        sharing = Sharing(**asdict(ensemble.sharing))
    elif ensemble.sharing in SHARING:
        sharing = SHARING[ensemble.sharing]
    else:
        raise ParamsError(
            f"{where}.sharing: expected one of {', '.join(SHARING)} or a section with 'own', "
            f"got {ensemble.sharing!r}"
        )
    shares = sharing.block or "*" not in sharing.own
    if not scheme.joint and shares and not sharing.frozen and ensemble.members > 1:
        raise ParamsError(
            f"{where}.sharing: {sharing.name!r} shares layers that are trained, so its members must "
            f"be trained together; expected a sharing that freezes what it shares for scheme "
            f"{ensemble.scheme!r}"
        )
    model = model_spec(params, image, classes, binary=True)
    classifier = None
    if scheme.combine == "sum" and ensemble.scheme == "tentaclenet":
        classifier = ensemble.classifier
        with torch.device("meta"):
            no_dense = isinstance(build(model).head, ConvHead)
        if classifier == "auto":
            classifier = "logits" if no_dense else "features"
        elif classifier == "features" and no_dense:
            raise ParamsError(
                f"{where}.classifier: {params.model.backbone} has no dense layer whose features "
                "could be concatenated; expected 'logits' or 'auto'"
            )
    combine = f"{ensemble.vote}_vote" if scheme.combine == "vote" else scheme.combine
    return EnsembleSpec(model, ensemble.members, sharing, combine, classifier)


def check(params: Params, image, classes: int) -> None:
    """Build the structure of everything that `params` asks for, without memory or training.

    Raises:
        ParamsError: names the section that cannot be built, and why.
    """
    named(WEIGHTS, params.model.binarizer.weight, "model.binarizer.weight")
    named(ACTIVATIONS, params.model.binarizer.activation, "model.binarizer.activation")
    with torch.device("meta"):
        build(model_spec(params, image, classes, binary=False))
        member = build(model_spec(params, image, classes, binary=True))
    for ensemble in params.ensembles.train:
        spec = ensemble_spec(params, ensemble, image, classes)
        params.recipe(ensemble)
        if spec.classifier is None:
            own_layers(member, spec.sharing)


def first_job(params: Params, data: Dataset, fp32: State | None) -> Job:
    """The job of the FP32 network, or of the BNN that starts from its weights."""
    binary = fp32 is not None
    spec = single_spec(params, data.image, len(data.classes), binary)
    network = Ensemble(spec, seed=params.seed)
    if fp32 is not None:
        network.start_from(single_state(fp32))
    name, recipe = ("bnn", params.binarize) if binary else ("fp32", params.pretrain)
    return Job(name, spec, (0,), recipe, params.seed + (1000 if binary else 0), network.state())


def plan(params: Params, ensemble: EnsembleParams, data: Dataset, fp32: State, bnn: State) -> Plan:
    """Everything a scheme needs, with the members' start put together.

    A TentacleNet's shared first block starts from the pretrained FP32 one. Members that start from
    the trained BNN are made to differ (`Ensemble.diversify`).
    """
    spec = ensemble_spec(params, ensemble, data.image, len(data.classes))
    index = [e.name for e in params.ensembles.train].index(ensemble.name)
    seed = params.seed + 10_000 * (index + 1)
    members = Ensemble(spec, seed=seed)
    if ensemble.start == "bnn":
        members.start_from(single_state(bnn))
        members.diversify(seed, ensemble.jitter, ensemble.fresh_classifier)
    elif ensemble.start == "hadamard":
        members.hadamard(seed)
    if spec.sharing.block and ensemble.start != "bnn":
        members.start_from(single_state(fp32), ("stem.",))
    return Plan(ensemble, spec, params.recipe(ensemble), seed, members.state(), data)


def train(plan: Plan, train_many: TrainMany) -> Ensembled:
    """Train one ensemble by its scheme."""
    return SCHEMES[plan.params.scheme].run(plan, train_many)
