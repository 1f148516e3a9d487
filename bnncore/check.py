"""Whether what parameters ask for can be trained and packed: built without memory, before any work.

It stands above training and lowering, because it asks both.
"""

from __future__ import annotations

import torch

from bnncore.lowering import blueprint
from bnncore.networks.backbones import build
from bnncore.networks.binarize import ACTIVATIONS, WEIGHTS, BinaryConv2d, named
from bnncore.networks.ensemble import Ensemble
from bnncore.networks.sharing import weight_layers
from bnncore.packed.program import validate
from bnncore.params import Params, ParamsError
from bnncore.training import schemes


def check(params: Params, image, classes: int) -> None:
    """Build the structure of everything that `params` asks for, without memory or training.

    Raises:
        ParamsError: names the section that cannot be built, and why.
    """
    named(WEIGHTS, params.model.binarizer.weight, "model.binarizer.weight")
    named(ACTIVATIONS, params.model.binarizer.activation, "model.binarizer.activation")
    try:
        with torch.device("meta"):
            build(schemes.model_spec(params, image, classes, binary=False))
            member = build(schemes.model_spec(params, image, classes, binary=True))
    except ValueError as error:
        raise ParamsError(f"model.backbone: {error}") from None
    for ensemble in params.ensembles.train:
        where = f"ensembles.train.{ensemble.name}"
        spec = schemes.ensemble_spec(params, ensemble, image, classes)
        recipe = params.recipe(ensemble)
        try:
            with torch.device("meta"):
                own = Ensemble(spec, ids=(0,)).own
            validate(blueprint.draw(spec).most)
        except ValueError as error:
            raise ParamsError(f"{where}: {error}") from None
        if ensemble.scheme == "snapshot":
            if recipe.epochs % spec.members:
                raise ParamsError(
                    f"{where}.recipe.epochs: expected a multiple of members ({spec.members}), a "
                    f"cycle each, got {recipe.epochs}"
                )
            if ensemble.recipe.get("schedule", "cosine") != "cosine":
                raise ParamsError(
                    f"{where}.recipe.schedule: snapshots are taken at the end of cosine cycles; "
                    f"expected cosine or none, got {recipe.schedule!r}"
                )
        if ensemble.scheme == "stochastic_rounding":
            layers = weight_layers(member)
            if not any(isinstance(layers[name], BinaryConv2d) for name in own & layers.keys()):
                raise ParamsError(
                    f"{where}.sharing: {spec.sharing.name!r} shares all binary convolutions, of "
                    "which this scheme draws one version a member; expected a sharing in which "
                    "members own some, such as no_shared or own: [binary_conv]"
                )
