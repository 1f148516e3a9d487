"""From parameters to structures, starts and plans: what a stage hands to a scheme.

Legend: `M` members.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import lru_cache

import torch

from bnncore.data import Dataset
from bnncore.networks.backbones import build
from bnncore.networks.ensemble import Ensemble, EnsembleSpec, single_state
from bnncore.networks.parts import ModelSpec
from bnncore.networks.sharing import SHARING, Sharing, weight_layers
from bnncore.params import CustomSharing, EnsembleParams, Params, ParamsError, Recipe
from bnncore.training.ensembled import Ensembled
from bnncore.training.jobs import Job, State, Teacher
from bnncore.training.schemes import SCHEMES, Plan

Image = tuple[int, int, int]  # H, W, C


def model_spec(params: Params, image: Image, classes: int, binary: bool) -> ModelSpec:
    """The network of one member, or its FP32 twin."""
    model = params.model
    return ModelSpec(
        model.backbone,
        image,
        classes,
        model.width,
        model.dropout,
        model.binarizer if binary else None,
    )


def single_spec(params: Params, image: Image, classes: int, binary: bool) -> EnsembleSpec:
    """A network by itself: an ensemble of one."""
    return EnsembleSpec(model_spec(params, image, classes, binary), 1, SHARING["no_shared"])


def ensemble_spec(
    params: Params, ensemble: EnsembleParams, image: Image, classes: int
) -> EnsembleSpec:
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
    for name in sorted({name for row in SCHEMES.values() for name in row.options}):
        if getattr(ensemble, name) is not None and name not in scheme.options:
            owners = [key for key, row in SCHEMES.items() if name in row.options]
            raise ParamsError(
                f"{where}.{name}: expected only with scheme {' or '.join(owners)}, "
                f"got it with {ensemble.scheme!r}"
            )
    if ensemble.classifier != "auto" and ensemble.scheme != "tentaclenet":
        raise ParamsError(
            f"{where}.classifier: expected only with scheme tentaclenet, got "
            f"{ensemble.classifier!r} with {ensemble.scheme!r}"
        )
    _check_recipe(ensemble, params.recipe(ensemble), where)
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
            f"{where}.sharing: {sharing.name!r} shares layers that are trained, so its members "
            f"must be trained together; expected a sharing that freezes what it shares for scheme "
            f"{ensemble.scheme!r}"
        )
    if shares and sharing.frozen and ensemble.start != "bnn":
        raise ParamsError(
            f"{where}.start: expected bnn with sharing {sharing.name!r}, which freezes what the "
            f"BNN has learned, got {ensemble.start!r}"
        )
    if ensemble.scheme == "tentaclenet" and not {"mixing", "*"} & set(sharing.own):
        raise ParamsError(
            f"{where}.sharing: {sharing.name!r} would share the rows of the classifier block; "
            "expected 'mixing' among what members own, as in tentaclenet"
        )
    if ensemble.scheme != "tentaclenet" and "mixing" in sharing.own:
        raise ParamsError(
            f"{where}.sharing: {sharing.name!r} names 'mixing', a tentacle's rows of the "
            f"classifier block, which only scheme tentaclenet has; got scheme {ensemble.scheme!r}"
        )
    model = model_spec(params, image, classes, binary=True)
    classifier = None
    if ensemble.scheme == "tentaclenet":
        classifier, features = ensemble.classifier, has_features(model)
        if classifier == "auto":
            classifier = "features" if features else "logits"
        elif classifier == "features" and not features:
            raise ParamsError(
                f"{where}.classifier: {params.model.backbone} has no dense layer whose features "
                "could be concatenated; expected 'logits' or 'auto'"
            )
    how = scheme.combine
    if how == "vote":
        how = f"{ensemble.vote or scheme.options['vote']}_vote"
    return EnsembleSpec(model, ensemble.members, sharing, how, classifier)


@lru_cache
def drops_out(backbone: str) -> bool:
    """Whether dropout has a place in it: in front of a dense layer, or of the last one of a network
    of the user's own."""
    if ":" in backbone:
        return True
    return has_features(ModelSpec(backbone, (32, 32, 3), 10))


def has_features(model: ModelSpec) -> bool:
    """Whether a network ends in a dense layer, whose inputs a TentacleNet can concatenate."""
    with torch.device("meta"):
        return hasattr(build(model).head, "dense")


def _check_recipe(ensemble: EnsembleParams, recipe: Recipe, where: str) -> None:
    """That it means something to the scheme. What stands in the recipe of all ensembles may mean
    nothing to one."""
    scheme = SCHEMES[ensemble.scheme]
    if ensemble.scheme == "gradient_boosting":
        rest = "with scheme gradient_boosting, whose members fit what others leave over"
        if recipe.distill:
            raise ParamsError(f"{where}.recipe.distill: expected 0 {rest}, got {recipe.distill:g}")
        if recipe.schedule == "plateau":  # of a member's own loss, which says nothing here
            raise ParamsError(
                f"{where}.recipe.schedule: expected another one {rest}, got 'plateau'"
            )
        squared = (ensemble.residual or scheme.options["residual"]) == "squared"
        if squared and ensemble.recipe.get("label_smoothing"):
            raise ParamsError(
                f"{where}.recipe.label_smoothing: expected 0 with residual squared, which fits no "
                f"labels, got {recipe.label_smoothing:g}"
            )
    if ensemble.recipe.get("prefixes") and (not scheme.joint or scheme.looped):
        raise ParamsError(
            f"{where}.recipe.prefixes: expected only with a scheme that trains members together, "
            f"got it with {ensemble.scheme!r}"
        )
    together = scheme.joint and scheme.combine == "mean" and ensemble.members > 1
    if ensemble.teacher == "ensemble" and not together:
        raise ParamsError(
            f"{where}.teacher: expected ensemble only with scheme fusion and several members, got "
            f"it with {ensemble.scheme!r} and {ensemble.members}"
        )


def first_job(params: Params, data: Dataset, fp32: State | None) -> Job:
    """The job of the FP32 network, or of the BNN that starts from its weights, and may learn from
    it."""
    binary = fp32 is not None
    spec = single_spec(params, data.image, len(data.classes), binary)
    network = Ensemble(spec, seed=params.seed)
    if fp32 is not None:
        # Not the norms of the body: in the two twins they stand at different places.
        kept = ("stem.", *(f"{name}." for name in weight_layers(network.members[0])))
        network.start_from(single_state(fp32), kept)
    if fp32 is None:
        return Job("fp32", spec, (0,), params.pretrain, params.seed, network.state())
    teacher = _fp32(params, data, fp32) if params.binarize.distill else None
    seed = params.seed + 1000
    return Job("bnn", spec, (0,), params.binarize, seed, network.state(), teacher=teacher)


def _fp32(params: Params, data: Dataset, fp32: State) -> Teacher:
    return Teacher(single_spec(params, data.image, len(data.classes), binary=False), fp32)


def plan(
    params: Params,
    ensemble: EnsembleParams,
    data: Dataset,
    fp32: State,
    bnn: State,
    earlier: Mapping[str, Ensembled] | None = None,
    device: str = "cpu",
) -> Plan:
    """Everything a scheme needs, with the members' start put together.

    A TentacleNet's shared first block starts from the pretrained FP32 one. Members that start from
    the trained BNN are made to differ (`Ensemble.diversify`).

    Args:
        earlier: by name, the trained ensembles that the list has before this one; one of them may
            be its teacher.
        device: the type of device that it will be trained on.
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
    recipe = params.recipe(ensemble)
    teacher: Teacher | None = None
    if recipe.distill and ensemble.teacher == "fp32":
        teacher = _fp32(params, data, fp32)
    elif recipe.distill and ensemble.teacher != "ensemble":
        trained = (earlier or {})[ensemble.teacher]
        teacher = Teacher(trained.spec, trained.state)
    return Plan(ensemble, spec, recipe, seed, members.state(), data, teacher, device)
