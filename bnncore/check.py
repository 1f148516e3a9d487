"""Whether what parameters ask for can be trained and packed: built without memory, before any work.

It stands above training and lowering, because it asks both. It changes nothing of what is trained.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch

from bnncore.errors import UserError
from bnncore.lowering import blueprint
from bnncore.networks.backbones import build
from bnncore.networks.binarize import ACTIVATIONS, WEIGHTS, BinaryConv2d, named
from bnncore.networks.ensemble import Ensemble, EnsembleSpec
from bnncore.networks.sharing import weight_layers
from bnncore.packed.packfile import MAX_GRAPH
from bnncore.packed.program import Program
from bnncore.packed.rules import MAX_MEMBERS, validate
from bnncore.params import EnsembleParams, Params, ParamsError
from bnncore.training import plans


def check(params: Params, image: tuple[int, int, int], classes: int | Sequence[str]) -> None:
    """Build the structure of everything that `params` asks for, without memory or training.

    Args:
        image: (H, W, C).
        classes: their names, or how many there are.

    Raises:
        ParamsError: names the key that cannot be used, and why.
    """
    names = None if isinstance(classes, int) else tuple(classes)
    count = classes if isinstance(classes, int) else len(classes)
    if names and len(json.dumps(names, ensure_ascii=False).encode()) > MAX_GRAPH // 2:
        raise ParamsError(f"data: expected class names of {MAX_GRAPH // 2:,} bytes in all at most")
    _check_binarizer(params)
    for key in ("pretrain", "binarize"):
        if getattr(params, key).epochs < 1:
            raise ParamsError(f"{key}.epochs: expected at least 1, got 0")
    for ensemble in params.ensembles.train:
        if ensemble.members > MAX_MEMBERS:
            raise ParamsError(
                f"ensembles.train.{ensemble.name}.members: expected at most {MAX_MEMBERS}, which "
                f"a packed file can hold, got {ensemble.members}"
            )
    for binary in (False, True):
        spec = plans.single_spec(params, image, count, binary)
        _check_packed(spec, names, "model.backbone", ":" in params.model.backbone)
    backbone, dropout = params.model.backbone, params.model.dropout
    if dropout and not plans.drops_out(backbone):
        raise ParamsError(
            f"model.dropout: expected 0 with {backbone}, which has no dense layer to put it in "
            f"front of, got {dropout:g}"
        )
    for ensemble in params.ensembles.train:
        _check_ensemble(params, ensemble, image, count, names)


def _check_binarizer(params: Params) -> None:
    for key, table in (("weight", WEIGHTS), ("activation", ACTIVATIONS)):
        where = f"model.binarizer.{key}"
        try:
            named(table, getattr(params.model.binarizer, key), where)
        except ValueError as error:
            raise ParamsError(_once(where, error)) from None


def _check_packed(
    spec: EnsembleSpec, names: tuple[str, ...] | None, where: str, own: bool = False
) -> None:
    """Draw the packed file of `spec`; ParamsError, beginning with `where`, if there can be none.

    Args:
        names: of the classes; None where they are not known.
        own: whether it is the user's own code that builds it, whose errors are theirs.
    """
    try:
        _validate(blueprint.draw(spec).most, names)
    except (UserError, ValueError) as error:
        raise ParamsError(_once(where, error)) from None
    except Exception as error:
        if own:
            raise ParamsError(f"{where}: {type(error).__name__}: {error}") from error
        raise


@lru_cache(maxsize=256)
def _validate(drawn: Program, names: tuple[str, ...] | None) -> None:
    """Once for ensembles that differ in their members only: they have the same drawing."""
    validate(replace(drawn, classes=names or drawn.classes))


def _once(where: str, error: Exception) -> str:
    """An error's text behind its key, which it may begin with already, or with one of the model."""
    return str(error) if str(error).startswith((where, "model.")) else f"{where}: {error}"


def _check_ensemble(
    params: Params,
    ensemble: EnsembleParams,
    image: tuple[int, int, int],
    classes: int,
    names: tuple[str, ...] | None,
) -> None:
    where = f"ensembles.train.{ensemble.name}"
    spec = plans.ensemble_spec(params, ensemble, image, classes)
    recipe = params.recipe(ensemble)
    _check_packed(spec, names, where)
    if recipe.epochs < 1 and ensemble.scheme != "stochastic_rounding":
        raise ParamsError(f"{where}.recipe.epochs: expected at least 1, got 0")
    if ensemble.scheme == "snapshot":
        if recipe.epochs % spec.members:
            raise ParamsError(
                f"{where}.recipe.epochs: expected a multiple of members ({spec.members}), a "
                f"cycle each, got {recipe.epochs}"
            )
        if recipe.warmup and recipe.warmup >= (cycle := recipe.epochs // spec.members):
            raise ParamsError(
                f"{where}.recipe.warmup: expected less than a cycle's epochs ({cycle}), got "
                f"{recipe.warmup}"
            )
        if ensemble.recipe.get("schedule", "cosine") != "cosine":
            raise ParamsError(
                f"{where}.recipe.schedule: snapshots are taken at the end of cosine cycles; "
                f"expected cosine or none, got {recipe.schedule!r}"
            )
    if ensemble.scheme == "stochastic_rounding":
        with torch.device("meta"):
            member = build(spec.model)
            own = Ensemble(replace(spec, members=1)).own
        layers = weight_layers(member)
        if not any(isinstance(layers[name], BinaryConv2d) for name in own & layers.keys()):
            raise ParamsError(
                f"{where}.sharing: {spec.sharing.name!r} shares all binary convolutions, of "
                "which this scheme draws one version a member; expected a sharing in which "
                "members own some, such as no_shared or own: [binary_conv]"
            )
