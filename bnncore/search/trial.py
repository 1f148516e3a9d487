"""What one task of a search does: train a network, a trial or a rival, and measure it.

These run in workers of the cluster (`search.Crew`). Scores are of the validation part: a search
never sees the test part.

Legend: `M` members, `N` images, `C` classes, `O` filters.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bnncore import metrics
from bnncore.cluster.actors import Cluster
from bnncore.data import Dataset
from bnncore.lowering import lower
from bnncore.packed import execute, narrow, packfile
from bnncore.packed.program import Program
from bnncore.params import PackParams, Params
from bnncore.search import space
from bnncore.training import inference, loop, plans, schemes
from bnncore.training.ensembled import Ensembled
from bnncore.training.jobs import History


def network(
    threads: int, data: Dataset, params: Params, fp32: Ensembled | None = None
) -> Ensembled:
    """The pretrained FP32 network or, from its weights, the BNN."""
    job = plans.first_job(params, data, fp32.state if fp32 else None)
    (trained,) = loop.train_many([job], data, threads=threads)
    return Ensembled(job.spec, trained.state, {job.name: trained.history})


def ensemble(
    threads: int,
    data: Dataset,
    params: Params,
    rungs: list[tuple[float, float | None]],
    base: Ensembled | None = None,
) -> dict[str, Any]:
    """Train the only ensemble of `params`, rung by rung.

    Args:
        rungs: (fraction of the epochs, validation accuracy in percent below which to stop there).
        base: the BNN or the FP32 network that members start from.
    """
    started, found = time.process_time(), {}
    train_many = partial(loop.train_many, data=data, threads=threads)
    values: list[float] = []
    for fraction, floor in rungs:
        p = space.at_rung(params, fraction)
        state = base.state if base else {}
        plan = plans.plan(p, p.ensembles.train[0], data, state, state)
        found = assess(schemes.train(plan, train_many), p, data)
        values.append(found["val_top1"])
        if floor is not None and values[-1] < floor:
            break
    stopped = len(values) < len(rungs)
    return {**found, "rungs": values, "stopped": stopped, "cpu_s": time.process_time() - started}


def int8(threads: int, data: Dataset, params: Params) -> dict[str, Any]:
    """Train the FP32 network as long as an ensemble in all, and pack its weights in 8 bits."""
    started = time.process_time()
    epochs = [r.epochs for r in (params.pretrain, params.binarize, params.ensembles.recipe)]
    p = replace(
        params,
        pretrain=replace(params.pretrain, epochs=sum(epochs)),
        pack=PackParams(weights="int8"),
        ensembles=replace(params.ensembles, train=()),
    )
    found = assess(network(threads, data, p), p, data)
    return {**found, "cpu_s": time.process_time() - started}


def assess(trained: Ensembled, params: Params, data: Dataset) -> dict[str, Any]:
    """Scores on the validation part, in percent and nats, and the real size of the packed file."""
    program, outputs = packed(trained, params, data)
    scores, predicted = execute.combine(program, outputs)
    labels = data.val.labels
    return {
        "val_top1": 100 * metrics.accuracy(predicted, labels),
        "val_loss": metrics.nll(execute.probabilities(program, scores), labels),
        "file_bytes": len(packfile.encode(program)),
        "history": trained.histories,
    }


def packed(trained: Ensembled, params: Params, data: Dataset) -> tuple[Program, np.ndarray]:
    """The Program as stage pack would write it, and its member outputs on the validation part.

    Outputs (M, N, C) are torch's, which the packed Program gives too; but of a narrowed Program
    they are its own.
    """
    info = space.facts(params)
    ensemble = trained.ensemble()
    program = lower.lower(ensemble, data.mean, data.std, data.classes, info)
    outputs = inference.member_outputs(ensemble, data.val.images, data)
    _, predicted = execute.combine(program, outputs)
    program.info["val_top1"] = round(100 * metrics.accuracy(predicted, data.val.labels), 2)
    if params.pack != PackParams():
        program = narrow.narrowed(program, params.pack)
        outputs = execute.Model(program, params.evaluate.ops).outputs(data.val.images)
    return program, outputs


def merged(histories: dict[str, History]) -> list[dict[str, Any]]:
    """One curve of several members' curves: means by epoch."""
    found: dict[int, list[Any]] = {}
    for history in histories.values():
        for row in history:
            found.setdefault(row["epoch"], []).append(row)
    return [
        {k: sum(r[k] for r in rows) / len(rows) for k in rows[0] if all(k in r for r in rows)}
        for rows in found.values()
    ]


def finish(
    params: Params, data: Dataset, cluster: Cluster, checkpoints: Path, on_epoch=None
) -> tuple[Ensembled, Program]:
    """Train the only ensemble of `params` by its full recipes, members spread over the cluster."""
    train_many = partial(cluster.train_many, data=data, checkpoints=checkpoints, on_epoch=on_epoch)
    (fp32,) = train_many([plans.first_job(params, data, None)])
    (bnn,) = train_many([plans.first_job(params, data, fp32.state)])
    plan = plans.plan(params, params.ensembles.train[0], data, fp32.state, bnn.state)
    trained = schemes.train(plan, train_many)
    return trained, packed(trained, params, data)[0]
