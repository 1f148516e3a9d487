"""What one task of a search does: train a network, a trial or a rival, and measure it.

These run in workers of the cluster (`cluster.crew`). Scores are of the validation part: a search
never sees the test part.

Legend: `M` members, `N` images, `C` classes.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from bnncore import metrics
from bnncore.data import Dataset
from bnncore.lowering import packing
from bnncore.packed import execute, packfile, votes
from bnncore.params import PackParams, Params
from bnncore.search import space
from bnncore.training import loop, plans, schemes
from bnncore.training.ensembled import Ensembled
from bnncore.training.jobs import History

Result = dict[str, Any]
Rung = tuple[float, float | None]


def network(
    threads: int, data: Dataset, params: Params, fp32: Ensembled | None = None
) -> Ensembled:
    """The pretrained FP32 network or, from its weights, the BNN."""
    job = plans.first_job(params, data, fp32.state if fp32 else None)
    (trained,) = loop.train_many([job], data, threads=threads)
    return Ensembled(job.spec, trained.state, {job.name: trained.history})


def ensemble(
    threads: int, data: Dataset, params: Params, rungs: list[Rung], base: Ensembled | None = None
) -> Result:
    """Train the only ensemble of `params`, rung by rung.

    Args:
        rungs: (fraction of the epochs, validation accuracy in percent below which to stop there).
        base: the BNN or the FP32 network that members start from.

    Returns:
        What `assess` finds, the accuracies at the rungs, whether it stopped before the last, and
        seconds of the processor.
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


def fp32(threads: int, data: Dataset, params: Params) -> Result:
    """Train the FP32 network as its recipe says, and assess it."""
    started = time.process_time()
    found = assess(network(threads, data, params), params, data)
    return {**found, "cpu_s": time.process_time() - started}


def assess(trained: Ensembled, params: Params, data: Dataset) -> Result:
    """Scores on the validation part, in percent and nats, and the real size of the packed file.

    Outputs are torch's, which the packed Program gives too; but of a narrowed Program they are its
    own.
    """
    program, theirs = packing.packed(trained, params, data, *space.model(params))
    outputs = theirs["val"]
    if params.pack != PackParams():
        outputs = execute.Model(program, params.evaluate.ops).outputs(data.val.images)
    scores, predicted = votes.combine(program, outputs)
    labels = data.val.labels
    return {
        "val_top1": 100 * metrics.accuracy(predicted, labels),
        "val_loss": metrics.nll(votes.probabilities(program, scores), labels),
        "file_bytes": len(packfile.encode(program)),
        "history": trained.histories,
    }


def merged(histories: dict[str, History]) -> list[dict[str, float]]:
    """One curve of several members' curves: means by epoch."""
    found: dict[int, list[dict[str, float]]] = {}
    for history in histories.values():
        for row in history:
            found.setdefault(row["epoch"], []).append(dict(row))  # type: ignore[arg-type]
    return [
        {k: sum(r[k] for r in rows) / len(rows) for k in rows[0] if all(k in r for r in rows)}
        for rows in found.values()
    ]
