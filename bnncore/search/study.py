"""A study of Optuna: what is asked for next, what came of it, and that neither is lost.

*Same seed, same study.* Configurations are asked for in batches of fixed size, each ask has a seed
of its own, and a batch depends on what earlier batches found and on nothing else: neither the
number of workers nor their speed changes what is tried, and a study that goes on asks for the batch
it was in once more and trains what is missing of it. Trials all train with the run's seed, so a
configuration that was tried is not tried again.

*Durable.* The study is Optuna's journal in ``<folder>/journal.log``. A configuration is written
once its fate is known: rejected when it is counted, trained when its result comes.

*Rungs.* A trial trains a fraction of its epochs first, as a training of its own with the learning
rate going all the way down, so that every scheme, joint or in sequence, gives a value that
compares. It goes on only if not more than `keep` of the trials of earlier batches were better
there; with two objectives only those count that take no more bytes (Optuna prunes one objective
only).
"""

from __future__ import annotations

import hashlib
import itertools
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from bnncore.params import digest
from bnncore.search.journal import BEGIN_STUDY, Journal, mend
from bnncore.search.space import Choice, Config, Cost, Row, Space, identity

# Asks in a row that give nothing to train, after which the space counts as used up.
IDLE = 1000
PROPOSALS = 3  # of a sampler, before something untried near the last one is taken
# A configuration's fate, in the trial's user attribute `outcome`.
TRAINED, STOPPED, FAILED, REJECTED = "trained", "stopped", "failed", "rejected"
COUNTED = (TRAINED, STOPPED, FAILED)
STATES = {
    TRAINED: TrialState.COMPLETE, STOPPED: TrialState.PRUNED, FAILED: TrialState.FAIL,
    REJECTED: TrialState.PRUNED,
}  # fmt: skip


SHOWN = (
    *("outcome", "affine", "weights", "integer", "drop", "val_top1", "stopped_top1", "val_loss"),
    *("file_bytes", "bound_bytes", "counted_kib", "megaops", "activation_kib", "feasible"),
    *("reason", "cpu_s"),
)


def _of(trial: FrozenTrial) -> str:
    return identity(trial.user_attrs["config"])


def _digest(row: Row) -> str:
    """Of a configuration as it is packed."""
    return digest(identity(row), row["affine"], row["weights"], row["integer"])


@dataclass(frozen=True)
class Trial:
    """A configuration that was asked for and counted.

    Attributes:
        number: how many were asked for before it.
        choice: what was proposed.
        config: what it comes to.
        cost: what it takes in the smallest packing; None where it cannot be built.
        over: limit -> how far over it, as a share; 0 or less is within.
        problem: why it cannot be built.
        notes: the sampler's own.
    """

    number: int
    batch: int
    choice: Choice
    config: Config
    cost: Cost | None
    over: dict[str, float]
    problem: str | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"trial-{self.number:03d}"

    @property
    def feasible(self) -> bool:
        return max(self.over.values()) <= 0


def _number(trial: FrozenTrial) -> int:
    # Earlier versions asked again for what was interrupted, as a trial that repeats another.
    attributes = trial.user_attrs
    return attributes.get("asked", attributes.get("repeats", trial.number))


class Study:
    """A study that goes on where it was.

    Args:
        name: of the study in the journal, which may hold others.
        folder: holds the journal. One process at a time.
        say: where a word about a damaged journal goes.

    Attributes:
        rejecting_s: CPU seconds to count each configuration that was rejected, in this process.
        ended: why there is nothing more to ask for, or None.

    Raises:
        SearchError: the journal cannot be read or written.
    """

    def __init__(self, space: Space, name: str, folder: Path, say: Callable[[str], None]):
        self.space, self.search, self.name = space, space.search, name
        self.two = self.search.objectives == "accuracy_bytes"
        self.rejecting_s: list[float] = []
        self.ended: str | None = None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        directions = [StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE][: 1 + self.two]
        path = folder / "journal.log"
        begin = {"op_code": BEGIN_STUDY, "worker_id": "", "study_name": name}
        mend(path, begin | {"directions": directions}, say)
        self._study = optuna.create_study(
            storage=JournalStorage(Journal(path)), study_name=name, directions=directions,
            load_if_exists=True,
        )  # fmt: skip
        with warnings.catch_warnings():  # it says that it is experimental
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._study.set_metric_names(["val_top1", "file_bytes"][: 1 + self.two])

    # -- what there is -----------------------------------------------------------------------

    def trials(self, *outcomes: str) -> list[FrozenTrial]:
        """Those with one of these fates, in the order asked."""
        found = self._study.get_trials(deepcopy=False)
        wanted = outcomes or (*COUNTED, REJECTED)
        return sorted((t for t in found if t.user_attrs.get("outcome") in wanted), key=_number)

    def rows(self) -> list[Row]:
        """One dict a configuration that was asked for, in that order."""
        rows = []
        for t in self.trials():
            row = {"number": _number(t), **t.user_attrs["config"]}
            row |= {k: t.user_attrs.get(k) for k in SHOWN}
            if row["file_bytes"] is None or row["outcome"] == STOPPED:
                row["file_bytes"] = row["bound_bytes"]
            rows.append(row)
        return rows

    @property
    def rivals(self) -> dict[str, Row]:
        """Label -> row of the rivals that were trained."""
        return {
            label.removeprefix("rival "): {k: v for k, v in row.items() if k != "study"}
            for label, row in self._study.user_attrs.items()
            if label.startswith("rival ")
        }

    def keep_rival(self, label: str, row: Row) -> None:
        self._study.set_user_attr(f"rival {label}", {"study": self.name, **row})

    def folds(self, row: Row) -> dict[int, str]:
        """Fold -> which images of it were right (`trial.fold`), of those that were trained."""
        known = self._study.user_attrs
        names = {k: f"fold {k} of {self.search.folds}, {_digest(row)}"
                 for k in range(self.search.folds)}  # fmt: skip
        return {k: known[name]["right"] for k, name in names.items() if name in known}

    def right(self, row: Row) -> np.ndarray | None:
        """Which images cross-validation got right, fold by fold; None until all are trained."""
        folds = self.folds(row)
        if len(folds) < self.search.folds:
            return None
        return np.array([digit == "1" for k in sorted(folds) for digit in folds[k]])

    def keep_fold(self, row: Row, k: int, right: str) -> None:
        name = f"fold {k} of {self.search.folds}, {_digest(row)}"
        self._study.set_user_attr(name, {"study": self.name, "right": right})

    def importances(self) -> dict[str, float]:
        """Share of the variance in accuracy that each parameter explains (fANOVA)."""
        trained = self.trials(TRAINED)
        varied = [n for n in self.space.values if len({str(t.params[n]) for t in trained}) > 1]
        if len(trained) < 4 or not varied:
            return {}
        try:
            return optuna.importance.get_param_importances(
                self._study, params=varied, target=lambda t: t.values[0],
                evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0),
            )  # fmt: skip
        except RuntimeError:  # all were equally good
            return {}

    # -- asking ------------------------------------------------------------------------------

    def ask(
        self,
        wanted: int,
        stopped: Callable[[], bool] = lambda: False,
        rejected: Callable[[Trial], object] = lambda trial: None,
    ) -> list[Trial]:
        """The trials that the first batch that is not whole still needs: within the limits, and not
        tried before. Asked again, it is the same ones.

        Args:
            wanted: how many trials the study shall have in all.
            stopped: asked between two proposals.
            rejected: gets each configuration that is over a limit, once it is written down.
        """
        known = self.trials()
        batches = [t.user_attrs["batch"] for t in known if t.user_attrs["outcome"] in COUNTED]
        batch = next(b for b in itertools.count() if batches.count(b) < self.search.batch)
        earlier = [t for t in known if t.user_attrs["batch"] < batch]
        here = {_of(t): t for t in known if t.user_attrs["batch"] == batch}
        before = sum(b < batch for b in batches)
        history = self._history(earlier)
        tried = {_of(t) for t in earlier}
        number = 1 + max(map(_number, earlier), default=-1)
        asked: list[Trial] = []
        found = idle = 0
        while found < min(self.search.batch, wanted - before) and not stopped():
            if idle >= IDLE:
                self.ended = f"{IDLE} configurations in a row did not fit"
                break
            seeded = hashlib.sha256(f"{self.search.seed}:{number}".encode()).digest()
            seed = int.from_bytes(seeded[:4], "little")
            history.sampler = self._sampler(before, seed)
            proposed = self._propose(history, tried, seed)
            if proposed is None:
                self.ended = f"all {len(tried)} configurations of the space were tried"
                break
            notes = history.get_trials(deepcopy=False)[proposed.number].system_attrs
            trial = self.count(proposed.params, number, batch, notes)
            done = here.get(identity(trial.config))
            # What was written down stands, also where the code has changed since.
            over = done.constraints if done else trial.over
            for name, value in over.items():
                proposed.set_constraint(name, value)
            tried.add(identity(trial.config))
            number += 1
            if max(over.values()) <= 0:
                asked += [] if done else [trial]
                found, idle = found + 1, 0
                continue
            history.tell(proposed, state=TrialState.PRUNED)
            idle += 1
            if not done:
                self.reject(trial)
                rejected(trial)
        return asked

    def _sampler(self, trained: int, seed: int) -> BaseSampler:
        if self.search.sampler == "random" or trained < self.search.warmup:
            return RandomSampler(seed=seed)
        if self.search.sampler == "nsga2":
            return NSGAIISampler(population_size=max(4, 2 * self.search.batch), seed=seed)
        # Trials that run count as bad ones, so that a batch does not ask for one thing twice.
        return TPESampler(n_startup_trials=0, multivariate=True, constant_liar=True, seed=seed)

    def _history(self, earlier: Iterable[FrozenTrial]) -> optuna.Study:
        """What the sampler sees of earlier batches, in memory: what was trained.

        Of what was rejected it sees that of its own batch only: enough to find what fits, while
        those of all batches, soon more than the trained ones, made TPE avoid a good backbone
        altogether because most of its widths are over the budget.
        """
        history = optuna.create_study(directions=self._study.directions)
        history.add_trials(t for t in earlier if t.user_attrs["outcome"] != REJECTED)
        return history

    def _propose(self, history: optuna.Study, tried: set[str], seed: int) -> optuna.Trial | None:
        """What the sampler proposes; where that was tried, something untried near it."""
        for _ in range(PROPOSALS):
            proposed = history.ask(self.space.distributions)
            if identity(self.space.config(proposed.params)) not in tried:
                return proposed
            history.tell(proposed, state=TrialState.FAIL)
        near = self.space.near(proposed.params, tried, seed)
        if near is None:
            return None
        history.enqueue_trial(near)
        return history.ask(self.space.distributions)

    def count(
        self, choice: Choice, number: int, batch: int, notes: dict[str, Any] | None = None
    ) -> Trial:
        """The choice with what it takes, before anything trains."""
        started = time.thread_time()
        config = self.space.config(choice)
        problem = self.space.problem(config)
        taken = None if problem else self.space.cost(config)
        over = taken.constraints(self.search) if taken else {"buildable": 1.0}
        # NSGA-II's; what else a sampler notes has no meaning in another study.
        kept = {k: v for k, v in (notes or {}).items() if k.endswith("generation")}
        trial = Trial(number, batch, choice, config, taken, over, problem, kept)
        if not trial.feasible:
            self.rejecting_s.append(time.thread_time() - started)
        return trial

    def floors(self, trial: Trial) -> list[tuple[float, float | None]]:
        """Rungs with the validation accuracy, in percent, that `trial` must reach at each."""
        assert trial.cost is not None
        earlier = [t.user_attrs for t in self.trials(TRAINED, STOPPED)]
        earlier = [a for a in earlier if a["batch"] < trial.batch]
        rungs: list[tuple[float, float | None]] = []
        for k, fraction in enumerate(self.search.rungs):
            reached = [a for a in earlier if len(a["rungs"]) > k]
            better = int(self.search.keep * len(reached))  # so many may be
            if self.two:
                reached = [a for a in reached if a["bound_bytes"] <= trial.cost.file_bytes]
            values = sorted((a["rungs"][k] for a in reached), reverse=True)
            rungs.append((fraction, values[better] if len(values) > better else None))
        return [*rungs, (1.0, None)]

    # -- telling -----------------------------------------------------------------------------

    def reject(self, trial: Trial) -> None:
        over = ", ".join(f"{k} {100 * v:.0f} % over" for k, v in trial.over.items() if v > 0)
        self._write(trial, REJECTED, {"reason": trial.problem or over})

    def fail(self, trial: Trial, reason: str) -> None:
        self._write(trial, FAILED, {"reason": reason})

    def tell(self, trial: Trial, result: dict[str, Any]) -> str:
        """Write down what `search.trial.train` found; returns the outcome."""
        outcome = STOPPED if result["stopped"] else TRAINED
        keys = ("affine", "weights", "integer", "drop", "val_loss", "file_bytes", "rungs", "cpu_s")
        notes = {key: result[key] for key in keys}
        notes["stopped_top1" if result["stopped"] else "val_top1"] = result["val_top1"]
        self._write(trial, outcome, notes)
        return outcome

    def _write(self, trial: Trial, outcome: str, notes: dict[str, Any]) -> None:
        """One line of the journal."""
        attributes: dict[str, Any] = {
            "study": self.name, "asked": trial.number, "batch": trial.batch, "outcome": outcome,
            "feasible": trial.feasible, "config": trial.config, **notes,
        }  # fmt: skip
        # Mirrored for optuna-dashboard, which does not show constraints.
        attributes |= {f"constraint_{k}": v for k, v in trial.over.items()}
        if trial.cost:
            taken = self.space.cost({**trial.config, **notes})
            attributes |= {k.replace("file_", "bound_"): v for k, v in asdict(taken).items()}
        values, rungs = None, {}
        if outcome == TRAINED:
            values = [float(notes["val_top1"]), float(notes["file_bytes"])][: 1 + self.two]
        if not self.two:
            steps = zip((*self.search.rungs, 1.0), notes.get("rungs", ()), strict=False)
            rungs = {round(100 * fraction): value for fraction, value in steps}
        self._study.add_trial(
            optuna.trial.create_trial(
                state=STATES[outcome],
                values=values,
                params=trial.choice,
                distributions=self.space.distributions,
                user_attrs=attributes,
                system_attrs=trial.notes,
                intermediate_values=rungs,
                constraints=trial.over,
            )
        )
