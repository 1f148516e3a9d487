"""Schemes: how the members of an ensemble are trained and combined.

A scheme is a function ``scheme(plan, train_many) -> Ensembled``: it makes jobs, has them trained
(`train.train_many` in this process, `Cluster.train_many` on a Ray cluster; the scheme cannot tell),
and says what came out. A new scheme is a function and a row of `SCHEMES`.

Legend: `M` members, `N` training images, `C` classes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from bnncore.data import Dataset
from bnncore.networks.binarize import BinaryConv2d, drawn
from bnncore.networks.ensemble import Ensemble, EnsembleSpec, generator
from bnncore.params import EnsembleParams, Recipe
from bnncore.training import stack
from bnncore.training.ensembled import Ensembled
from bnncore.training.jobs import Job, State, Teacher, Trained, TrainingError
from bnncore.training.watch import require_finite

log = logging.getLogger(__name__)
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
        teacher: `Job.teacher` of every job.
        device: the type of device that jobs are trained on.
    """

    params: EnsembleParams
    spec: EnsembleSpec
    recipe: Recipe
    seed: int
    start: State
    data: Dataset
    teacher: Teacher | None = None
    device: str = "cpu"

    def over(self, actors: int) -> Plan:
        """The same for so many actors, or for one process that has all members; `stack.spread`."""
        model, members = self.spec.model, self.spec.members
        return replace(self, recipe=stack.spread(self.recipe, model, members, actors, self.device))

    def job(self, ids: tuple[int, ...], name: str, **changes: Any) -> Job:
        """A job that trains members `ids` from the plan's start."""
        seed = self.seed if len(ids) == self.spec.members else self.seed + 1 + ids[0]
        values = {"spec": self.spec, "recipe": self.recipe, "start": self.start, **changes}
        return Job(name=name, ids=ids, seed=seed, teacher=self.teacher, **values)

    def member(self, i: int, **changes: Any) -> Job:
        """A job that trains member `i` alone."""
        return self.job((i,), f"{self.params.name}.{i}", **changes)

    def option(self, name: str) -> Any:
        """An option of the scheme, as the section says or by default."""
        value = getattr(self.params, name)
        return SCHEMES[self.params.scheme].options[name] if value is None else value


@dataclass(frozen=True)
class Scheme:
    """A row of `SCHEMES`.

    Attributes:
        run: the function.
        combine: how members' outputs are joined; ``vote`` is soft or hard as the section says.
        joint: whether one training serves all members, so that shared layers may be trained.
        looped: why members cannot be stacked.
        options: fields of `EnsembleParams` that mean something to this scheme, and their defaults.
    """

    run: Callable[[Plan, TrainMany], Ensembled]
    combine: str
    joint: bool
    looped: str = ""
    options: dict[str, Any] = field(default_factory=dict)


def together(plan: Plan, train_many: TrainMany) -> Ensembled:
    """All members at once, on the loss of their combined logits (fusion, TentacleNet)."""
    (trained,) = train_many([plan.job(tuple(range(plan.spec.members)), plan.params.name)])
    return Ensembled(plan.spec, trained.state, {plan.params.name: trained.history})


def independently(plan: Plan, train_many: TrainMany) -> Ensembled:
    """Each member by itself, on its own loss and its own order of the data (voting)."""
    return apart(plan, [plan.member(i) for i in range(plan.spec.members)], train_many)


def apart(plan: Plan, jobs: list[Job], train_many: TrainMany) -> Ensembled:
    """One ensemble of members that are trained by themselves, in stacks where they can be."""
    size = stack.size(plan.recipe, plan.spec.model, plan.device)
    images = {len(plan.data.train) if one.indices is None else len(one.indices) for one in jobs}
    looped = {
        "parts of several sizes": len(images) > 1,
        "batches of several sizes": jobs[0].resample,
        "a learning rate for each (schedule: plateau)": plan.recipe.schedule == "plateau",
        "shards": plan.recipe.shards > 1,
    }
    if size > 1 and any(looped.values()):
        reasons = ", ".join(reason for reason, true in looped.items() if true)
        log.info("%s: members are not stacked, as they have %s", plan.params.name, reasons)
        size = 1
    blocks = [tuple(jobs[k : k + size]) for k in range(0, len(jobs), size)]
    stacked = [
        replace(first, ids=tuple(one.ids[0] for one in block), each=block)
        if len(block) > 1
        else first
        for block in blocks
        for first in block[:1]
    ]
    return gathered(plan, train_many(stacked))


def bagging(plan: Plan, train_many: TrainMany) -> Ensembled:
    """Each member by itself, on images of its own.

    ``bootstrap``: N of N, drawn with replacement (Breiman 1996; Zhu et al. 2019, BENN);
    ``batch``: from each batch, of every epoch anew, as many as it has, drawn with replacement, of
    which each is used once (the library of Kim et al. 2022 in its version of that time);
    ``partition``: one of M disjoint parts (TentacleNet, section 2.3).
    """
    n, m = len(plan.data.train), plan.spec.members
    sampling = plan.option("sampling")
    if sampling == "batch":
        return apart(plan, [plan.member(i, resample=True) for i in range(m)], train_many)
    if sampling == "bootstrap":
        draws = [generator("bootstrap", plan.seed, i) for i in range(m)]
        parts = [torch.randint(n, (n,), generator=rng).numpy() for rng in draws]
    else:
        order = torch.randperm(n, generator=generator("partition", plan.seed)).numpy()
        parts = np.array_split(order, m)
    return apart(plan, [plan.member(i, indices=part) for i, part in enumerate(parts)], train_many)


def boosting(plan: Plan, train_many: TrainMany) -> Ensembled:
    """AdaBoost for several classes: members in sequence, each on the images that were hard so far.

    With image weights w that sum to 1, member i errs by ``eps = sum(w where it is wrong)``, votes
    with ``samme_vote(eps)``, and the weights of the images it gets wrong grow by ``exp(vote)``
    (Zhu et al. 2009, SAMME, algorithm 2). ``boost: reweight`` multiplies each image's loss by
    ``N * w``; ``resample`` draws N images by w for each member (Zhu et al. 2019, BENN).

    A member that is wrong no less often than chance gets vote 0, and the next starts from equal
    weights. If that is the first, there is nothing to boost.

    Raises:
        TrainingError: the first member is no better than chance.
    """
    n, classes = len(plan.data.train), plan.spec.model.classes
    weights = np.full(n, 1 / n)
    results: list[Trained] = []
    votes = np.zeros(plan.spec.members, np.float32)
    for i in range(plan.spec.members):
        changes: dict[str, Any] = {"start": _start(plan, results), "then": "outputs"}
        if plan.option("boost") == "reweight":
            changes["weights"] = (n * weights).astype(np.float32)
        else:
            rng = generator("boost", plan.seed, i)
            draw = torch.multinomial(torch.from_numpy(weights), n, replacement=True, generator=rng)
            changes["indices"] = draw.numpy()
        results += train_many([plan.member(i, **changes)])
        wrong = _training_outputs(results[-1]).argmax(1) != plan.data.train.labels
        error = float(weights[wrong].sum())
        votes[i] = samme_vote(error, classes, n)
        if votes[i] > 0:
            weights = weights * np.exp(votes[i] * wrong)
            weights /= weights.sum()
        elif i == 0:
            raise TrainingError(
                f"{plan.params.name}: expected a first member better than chance, an error below "
                f"{1 - 1 / classes:.3f} on the training images, got {error:.3f}; train it longer"
            )
        else:
            weights = np.full(n, 1 / n)
    return gathered(plan, results, votes)


def samme_vote(error: float, classes: int, images: int) -> float:
    """``log((1 - eps) / eps) + log(C - 1)``, or 0 where that is negative: chance or worse.

    An error below half an image's share, ``1 / (2 N)``, counts as that, so that a member without
    errors has a large vote but not an infinite one.

    Source: Zhu et al. 2009, SAMME, algorithm 2 (c).
    """
    error = max(error, 1 / (2 * images))
    if error >= 1 - 1 / classes:
        return 0.0
    return math.log((1 - error) / error) + math.log(classes - 1)


def gradient_boosting(plan: Plan, train_many: TrainMany) -> Ensembled:
    """Members in sequence, each on what the sum of those before it leaves over.

    With ``F_i = shrinkage * (z_1 + .. + z_{i-1})``, member i fits, by ``residual``: ``squared``,
    the negative gradient of the cross entropy, ``onehot(y) - softmax(F_i)``, by squared error, as
    torchensemble's GradientBoostingClassifier does; ``logits``, the cross entropy of
    ``F_i + z_i``.
    The ensemble is F_{M+1}. Outputs of earlier members are taken once, in evaluation mode, on
    images that are not augmented; torchensemble takes them on each augmented batch.
    """
    shrinkage = plan.option("shrinkage")
    labels = plan.data.train.labels
    total = np.zeros((len(labels), plan.spec.model.classes), np.float32)
    results: list[Trained] = []
    for i in range(plan.spec.members):
        changes: dict[str, Any] = {"start": _start(plan, results), "then": "outputs"}
        if plan.option("residual") == "squared":
            onehot = np.eye(total.shape[1], dtype=np.float32)[labels]
            changes["targets"] = onehot - torch.from_numpy(total).softmax(1).numpy()
        else:
            changes["offsets"] = total.copy()
        results += train_many([plan.member(i, **changes)])
        total += np.float32(shrinkage) * _training_outputs(results[-1])
    return gathered(plan, results, np.full(plan.spec.members, shrinkage))


def snapshot(plan: Plan, train_many: TrainMany) -> Ensembled:
    """One run whose learning rate falls from `lr` to 0 along half a cosine and jumps back, M times;
    member i is the network at the end of cycle i.

    A cycle is a job of ``epochs / M`` epochs that goes on from the one before it: its weights and
    its Adam moments. The learning rate changes by the step; a warm-up is the first cycle's alone.
    Source: Huang et al. 2017, Eq. 2.
    """
    epochs = plan.recipe.epochs // plan.spec.members
    results: list[Trained] = []
    for i in range(plan.spec.members):
        warmup = 0 if results else plan.recipe.warmup
        cycle = replace(plan.recipe, epochs=epochs, warmup=warmup, schedule="cosine")
        start = handed_on(results[-1], i) if results else plan.start
        results += train_many([plan.member(i, recipe=cycle, start=start, keep_optimizer=True)])
    return gathered(plan, results)


def stochastic_rounding(plan: Plan, train_many: TrainMany) -> Ensembled:
    """Members drawn from one network of real-valued weights (Vogel et al. 2016).

    One network is trained by the recipe, its signs drawn anew at every step (`binarize.drawn`), so
    that its weights settle where a draw does little harm; with 0 epochs it is the start itself.
    Then each member gets signs of its own, drawn with P(+1) = (clip(w, -1, 1) + 1) / 2, at the
    magnitudes, and so the scales alpha, of the network; and its batch-norm statistics are
    estimated anew: the mean over one pass through the training images of those of each batch.
    """
    spec = plan.spec
    binarizer = spec.model.binarizer
    assert binarizer is not None
    model = replace(spec.model, binarizer=replace(binarizer, stochastic=True))
    (trained,) = train_many([plan.member(0, spec=replace(spec, model=model))])
    jobs = []
    for i in range(spec.members):
        member = Ensemble(spec, (i,))
        member.load(handed_on(trained, i))
        for name in sorted(member.own):
            layer = member.members[0].get_submodule(name)
            if isinstance(layer, BinaryConv2d):
                rounded_(layer.weight, generator("draw", plan.seed, i, name))
        recipe = replace(plan.recipe, epochs=0)
        jobs.append(plan.member(i, start=member.state(), recipe=recipe, then="norms"))
    state = {k: v for one in train_many(jobs) for k, v in one.state.items()}
    return Ensembled(spec, state, {trained.job.name: trained.history})


@torch.no_grad()
def rounded_(weight: torch.Tensor, rng: torch.Generator) -> None:
    """Give each weight, in place, the sign that is `drawn` for it; its magnitude stays."""
    signs = drawn(weight.cpu(), rng).to(weight.device)
    # A weight of exactly 0 cannot carry a minus sign: it gets the smallest magnitude that can.
    weight.copy_(weight.abs().clamp_(min=torch.finfo(weight.dtype).tiny) * signs)


def _training_outputs(trained: Trained) -> np.ndarray:
    """Those of the only member, (N, C)."""
    assert trained.training is not None
    return trained.training[0]


def _start(plan: Plan, results: list[Trained]) -> State:
    """Where the next member of a sequence starts."""
    return handed_on(results[-1], len(results)) if results and plan.option("chain") else plan.start


def handed_on(trained: Trained, i: int) -> State:
    """A trained member's state, and its optimizer's if it was kept, under the names of member i."""
    before = f"{trained.job.ids[0]}."
    state = {}
    for name, value in (trained.state | trained.optimizer).items():
        kind, colon, entry = name.rpartition(":")
        if entry.startswith(before):
            entry = f"{i}.{entry.removeprefix(before)}"
        state[kind + colon + entry] = value
    return state


def gathered(plan: Plan, results: list[Trained], weights: np.ndarray | None = None) -> Ensembled:
    """One ensemble of members that were trained apart; what they share is equal in all."""
    state: State = {}
    for trained in results:
        state |= trained.state
    if weights is not None:
        state["shared.weights"] = torch.from_numpy(np.asarray(weights, np.float32))
    return Ensembled(plan.spec, state, {t.job.name: t.history for t in results})


_VOTE = {"vote": "soft"}
_BEFORE = "each member learns from those before it"
_ONE = "one network is trained"
SCHEMES: dict[str, Scheme] = {
    "tentaclenet": Scheme(together, "sum", joint=True),
    "fusion": Scheme(together, "mean", joint=True),
    "voting": Scheme(independently, "vote", joint=False, options=_VOTE),
    "bagging": Scheme(bagging, "vote", joint=False, options=_VOTE | {"sampling": "bootstrap"}),
    "boosting": Scheme(
        boosting,
        "vote",
        joint=False,
        looped=_BEFORE,
        options=_VOTE | {"boost": "reweight", "chain": True},
    ),
    "gradient_boosting": Scheme(
        gradient_boosting,
        "sum",
        joint=False,
        looped=_BEFORE,
        options={"residual": "squared", "shrinkage": 1.0, "chain": False},
    ),
    "snapshot": Scheme(snapshot, "vote", joint=False, looped=_ONE, options=_VOTE),
    "stochastic_rounding": Scheme(
        stochastic_rounding, "vote", joint=True, looped=_ONE, options=_VOTE
    ),
}


def train(plan: Plan, train_many: TrainMany) -> Ensembled:
    """Train one ensemble by its scheme.

    A scheme that trains its members one after another cannot stack them, and says so where it was
    asked to.

    Raises:
        TrainingError: training failed, or a member, a norm or a vote came out not finite.
    """
    scheme = SCHEMES[plan.params.scheme]
    if scheme.looped and plan.recipe.stack not in ("auto", 1):
        log.warning("%s: members are not stacked: %s", plan.params.name, scheme.looped)
    trained = scheme.run(plan, train_many)
    require_finite(trained.state, f"{plan.params.name}: the trained ensemble")
    return trained
