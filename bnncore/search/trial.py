"""What one task of a search does: train a network, a configuration or a fold of it, and measure it.

These run in workers of the cluster (`cluster.crew`). Scores are of the validation part: a search
never sees the test part.

Legend: `M` members, `N` images, `C` classes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from bnncore import metrics
from bnncore.data import Dataset, Split
from bnncore.lowering import packing
from bnncore.lowering.packing import Packed
from bnncore.networks.sharing import SHARING
from bnncore.packed import packfile, votes
from bnncore.params import PackParams, Params
from bnncore.search import space
from bnncore.training import loop, memory, plans, schemes
from bnncore.training.devices import Place
from bnncore.training.ensembled import Ensembled

Result = dict[str, Any]
Rung = tuple[float, float | None]


def network(
    place: Place, data: Dataset, params: Params, fp32: Ensembled | None = None
) -> Ensembled:
    """The pretrained FP32 network or, from its weights, the BNN."""
    job = plans.first_job(params, data, fp32.state if fp32 else None)
    (trained,) = loop.train_many([job], data, place=place)
    return Ensembled(job.spec, trained.state, {job.name: trained.history})


def gpu_bytes(params: Params, data: Dataset) -> int:
    """What training it takes of a GPU's memory, about."""
    model = plans.model_spec(params, data.image, len(data.classes), binary=True)
    recipe, members = params.binarize, 1
    if params.ensembles.train:
        (ensemble,) = params.ensembles.train
        recipe, members = params.recipe(ensemble), ensemble.members
    return memory.expected(model, members, recipe.batch_size)


Bases = tuple[Ensembled, ...]  # of `bases`, in that order


def bases(params: Params) -> tuple[str, ...]:
    """What must be trained before what `params` are about, of ``fp32`` and ``bnn``."""
    if not params.ensembles.train:
        return ()
    (ensemble,) = params.ensembles.train
    binary = ensemble.start == "bnn"
    block = SHARING[str(ensemble.sharing)].block and not binary
    taught = params.recipe(ensemble).distill > 0 and ensemble.teacher == "fp32"
    return ("fp32",) * (block or taught) + ("bnn",) * binary


def train(
    place: Place, data: Dataset, params: Params, among: Sequence[PackParams], rungs: list[Rung],
    *given: Ensembled,
) -> Result:  # fmt: skip
    """Train what `params` are about, rung by rung, and assess it.

    Args:
        among: packings to choose from.
        rungs: (fraction of the epochs, validation accuracy in percent below which to stop there).
        given: what `bases` names.

    Returns:
        What `assess` finds, the accuracies at the rungs, whether it stopped before the last, and
        seconds of the processor.
    """
    started, found = time.process_time(), {}
    values: list[float] = []
    for fraction, floor in rungs:
        p = space.at_rung(params, fraction)
        made = _trained(place, data, p, given)
        found = assess(packed(made, p, data, among), data) | {"history": made.histories}
        values.append(found["val_top1"])
        if floor is not None and values[-1] < floor:
            break
    stopped = len(values) < len(rungs)
    return {**found, "rungs": values, "stopped": stopped, "cpu_s": time.process_time() - started}


def fold(place: Place, data: Dataset, params: Params, k: int, folds: int) -> str:
    """Train all of what `params` are about without fold `k` of the images: which of those of the
    fold it gets right, a digit 0 or 1 each, in the order of the data.
    """
    data = folded(data, k, folds)
    known: dict[str, Ensembled] = {}
    if needed := bases(params):
        known["fp32"] = network(place, data, params)
    if "bnn" in needed:
        known["bnn"] = network(place, data, params, known["fp32"])
    made = _trained(place, data, params, tuple(known[name] for name in needed))
    found = packed(made, params, data, [params.pack])
    _, predicted = votes.combine(found.program, found.val)
    return "".join(map(str, (predicted == data.val.labels).astype(int)))


def folded(data: Dataset, k: int, folds: int) -> Dataset:
    """Training and validation images anew: every `folds`-th of each class is for validation.

    Normalisation stays that of `data`.
    """
    parts = data.train, data.val
    whole = Split(*(np.concatenate([getattr(p, name) for p in parts])
                    for name in ("images", "labels")))  # fmt: skip
    of = np.empty(len(whole), int)
    of[np.argsort(whole.labels, kind="stable")] = np.arange(len(whole)) % folds
    return replace(data, train=whole[of != k], val=whole[of == k])


def _trained(place: Place, data: Dataset, params: Params, given: Bases) -> Ensembled:
    if not params.ensembles.train:
        return network(place, data, params)
    states = {name: one.state for name, one in zip(bases(params), given, strict=True)}
    fp32, bnn = states.get("fp32", {}), states.get("bnn", {})
    plan = plans.plan(params, params.ensembles.train[0], data, fp32, bnn, device=place.device)
    return schemes.train(
        plan.over(1), partial(loop.train_many, data=data, place=place, replay=params.ray.replay)
    )


def packed(
    trained: Ensembled, params: Params, data: Dataset, among: Sequence[PackParams]
) -> Packed:
    """As the pipeline packs it."""
    return packing.packed(trained, params, data, *space.model(params), among=among)


def assess(found: Packed, data: Dataset) -> Result:
    """Scores of a packed Program on the validation part, in percent and nats, its real size, and
    how it is packed.
    """
    scores, _ = votes.combine(found.program, found.val)
    return {
        "val_top1": found.top1,
        "val_loss": metrics.nll(votes.probabilities(found.program, scores), data.val.labels),
        "file_bytes": len(packfile.encode(found.program)),
        "affine": found.pack.affine,
        "weights": found.pack.weights,
        "integer": found.pack.integer,
        "drop": found.drop,
    }
