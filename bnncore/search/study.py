"""Search for the best ensemble under a memory budget.

The driver asks Optuna for configurations (backbone, width, scheme, sharing, members ..), counts
each one's bytes from its shapes (`bnncore.search.space`), and rejects what is over the budget, its
constraint recorded, before anything is trained. The others are trained side by side on a Ray
cluster, one task each; the pretrained FP32 model and the BNN of a network are made once, kept on
disk, and shared by all trials that start from them. `bnncore.search.answer` writes the answer.

*Rungs.* A trial trains a fraction of its epochs first, as a training of its own with the learning
rate going all the way down, so that every scheme, joint or in sequence, gives a value that
compares. It goes on only if not more than `keep` of the trials of earlier batches were better
there; with two objectives only those count that take no more bytes (Optuna prunes one objective
only).

*Same seed, same study.* Configurations are asked for in batches of fixed size, each ask has a
seed of its own, and decisions at rungs look at earlier batches only: neither the number of workers
nor their speed changes what is tried. Trials all train with the run's seed, so a configuration that
was tried is not tried again.

*Durable.* The study is Optuna's journal in ``<folder>/journal.log``. Results are told as they come.
Trials that a driver left running are told failed and asked for again, in the batch they were in.

Legend: `M` members.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from bnncore import params as P
from bnncore.cluster.actors import Cluster
from bnncore.cluster.crew import Crew, Work, WorkError
from bnncore.data import Dataset
from bnncore.networks.sharing import SHARING
from bnncore.params import Params
from bnncore.search import space
from bnncore.search import trial as tasks
from bnncore.search.space import Config, Cost, Space, described, identity, preset
from bnncore.tracking import Tracker
from bnncore.training import schemes, train
from bnncore.training.schemes import Ensembled

# Asks in a row that give nothing to train, after which the space counts as used up.
IDLE = 1000
PROPOSALS = 3  # of a sampler, before something untried near the last one is taken
# A configuration's fate, in the trial's user attribute of that name.
TRAINED, STOPPED, FAILED, REJECTED = "trained", "stopped", "failed", "rejected"
INTERRUPTED = "interrupted"
COUNTED = (TRAINED, STOPPED, FAILED)


def _origin(trial: FrozenTrial) -> int:
    """The number under which the configuration was first asked for."""
    return trial.user_attrs.get("repeats", trial.number)


def _note(study: optuna.Study, number: int, **notes: Any) -> None:
    trial = study.get_trials(deepcopy=False)[number]
    for name, value in notes.items():
        study._storage.set_trial_user_attr(trial._trial_id, name, value)


def _over(over: dict[str, float]) -> str:
    return ", ".join(f"{k} {100 * v:.0f} % over" for k, v in over.items() if v > 0)


def _mend(path: Path) -> None:
    """Drop what a killed writer left of its last line, which would spoil the lines after it."""
    if path.exists():
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            os.truncate(path, len(whole))
    # Its lock outlives a killed process too; ours is held by now.
    path.with_name(path.name + ".lock").unlink(missing_ok=True)


# -- the study ---------------------------------------------------------------------------------


@dataclass
class Trial:
    """A configuration that is about to be trained."""

    number: int
    config: Config
    cost: Cost
    batch: int

    @property
    def name(self) -> str:
        return f"trial-{self.number:03d}"


@dataclass
class Report:
    """What a study found.

    Attributes:
        rows: one dict a configuration, in the order asked.
        best: the row of the best that fits, or None.
        rivals: rows with ``rival``, a text.
        importances: share of the variance in validation accuracy that each parameter explains.
        rejecting_s: CPU seconds to count and reject a configuration, in this run: (mean, most).
        retried: tasks that crashed and were run once more, in this run.
        ended: why the study ended before its number of trials, or None.
    """

    rows: list[dict[str, Any]]
    best: dict[str, Any] | None
    rivals: list[dict[str, Any]]
    importances: dict[str, float]
    rejecting_s: tuple[float, float] | None
    ended: str | None
    name: str
    retried: int = 0
    seconds: float = 0.0


class Search:
    """A study that goes on where it was.

    Args:
        params: all parameters; `search` says what to look for.
        folder: where the study lives (journal, shared networks). One process at a time.
        tracker: the parent run of the study; each trial becomes a child.
        say: where progress goes, a line at a time.

    Raises:
        ParamsError: from `Space`.
        train.TrainingError: another process holds the folder.
    """

    def __init__(
        self,
        params: Params,
        data: Dataset,
        folder: Path,
        tracker: Tracker | None = None,
        say: Callable[[str], None] = print,
    ):
        self.params, self.search, self.data = space.shortened(params), params.search, data
        self.full = params
        self.folder, self.tracker, self.say = folder, tracker, say
        self.space = Space(self.params, data)
        self.ended: str | None = None
        self.wanted = self.search.trials
        self._keys: dict[str, str] = {}  # network -> the name of what is kept of it
        self._rejecting: list[float] = []
        self._stop = threading.Event()
        self._lock = train.Checkpoint(folder.parent, folder.name)  # for its lock on the folder
        self.study = self._open()

    def close(self) -> None:
        self._lock.close()

    def __enter__(self) -> Search:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # -- storage ---------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """Changes with everything that a trial's result depends on, but the code."""
        plain = P.plain(self.params)
        for section in ("mlflow", "ray", "evaluate", "data"):
            del plain[section]
        del plain["ensembles"]["train"]
        del plain["model"]["backbone"], plain["model"]["width"]
        del plain["search"]["trials"], plain["search"]["rivals"]
        return f"{self.data.name}-{P.digest(plain, self.data.digest)[:8]}"

    def _open(self) -> optuna.Study:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        path = self.folder / "journal.log"
        _mend(path)
        objectives: dict[str, Literal["maximize", "minimize"]]
        objectives = {"val_top1": "maximize", "file_bytes": "minimize"}
        if self.search.objectives == "accuracy":
            del objectives["file_bytes"]
        study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(path))),
            study_name=self.name,
            directions=list(objectives.values()),
            load_if_exists=True,
        )
        with warnings.catch_warnings():  # it says that it is experimental
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names(list(objectives))
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if trial.user_attrs.get("outcome") in COUNTED:  # all was written down but the end
                self._settle(study, trial.number)
            else:
                self._interrupt(study, trial.number)
        return study

    @staticmethod
    def _interrupt(study: optuna.Study, number: int) -> None:
        """Tell a trial that nobody runs any more failed; `ask` will ask for it again."""
        _note(study, number, outcome=INTERRUPTED)
        study.tell(number, state=TrialState.FAIL)

    def _trials(self, *outcomes: str) -> list[FrozenTrial]:
        found = self.study.get_trials(deepcopy=False)
        return [t for t in found if t.user_attrs.get("outcome") in outcomes]

    # -- asking ----------------------------------------------------------------------------

    def _sampler(self, trained: int, seed: int) -> BaseSampler:
        if self.search.sampler == "random" or trained < self.search.warmup:
            return RandomSampler(seed=seed)
        if self.search.sampler == "nsga2":
            return NSGAIISampler(population_size=max(4, 2 * self.search.batch), seed=seed)
        # Trials that run count as bad ones, so that a batch does not ask for one thing twice.
        return TPESampler(n_startup_trials=0, multivariate=True, constant_liar=True, seed=seed)

    def _history(self, batch: int) -> optuna.Study:
        """A copy of the study for the sampler, in memory, in the order in which configurations were
        first asked for: without what was interrupted, a study that goes on looks like one that
        never stopped.

        Of what was rejected it has that of this batch only: enough to find what fits, while those
        of all batches, soon more than the trained ones, made TPE avoid a good backbone altogether
        because most of its widths are over the budget.
        """
        history = optuna.create_study(directions=self.study.directions)
        for t in sorted(self.study.get_trials(deepcopy=False), key=_origin):
            outcome = t.user_attrs.get("outcome")
            if (outcome == REJECTED and t.user_attrs["batch"] < batch) or outcome == INTERRUPTED:
                continue
            history.add_trial(t)
        return history

    def ask(self, wanted: int) -> list[Trial]:
        """The next batch: what was interrupted, then configurations that are within the budget and
        were not tried before.

        Args:
            wanted: how many trials the study shall have in all.
        """
        known = self.study.get_trials(deepcopy=False)
        counted = [t for t in known if t.user_attrs.get("outcome") in COUNTED]
        again = {_origin(t): t for t in known if t.user_attrs.get("outcome") == INTERRUPTED}
        for t in known:
            if t.user_attrs.get("outcome") != INTERRUPTED:
                again.pop(_origin(t), None)
        unfinished = [*counted, *again.values()]
        batch = max((t.user_attrs["batch"] for t in unfinished), default=0)
        here = sum(t.user_attrs["batch"] == batch for t in counted)
        if here >= self.search.batch and not again:
            batch, here = batch + 1, 0
        size = min(self.search.batch - here, wanted - len(counted))
        trained = sum(t.user_attrs["batch"] < batch for t in counted)
        asked = [
            trial
            for origin, t in sorted(again.items())[:size]
            if (trial := self._begin(t.params, t.system_attrs, batch=batch, repeats=origin))
        ]
        history = self._history(batch)
        tried = {identity(t.params) for t in known}
        number = sum("repeats" not in t.user_attrs for t in known)
        idle = 0
        while len(asked) < size and not self._stop.is_set():
            if len(tried) >= self.space.size:
                self.ended = f"all {self.space.size} configurations of the space were tried"
                break
            if idle >= IDLE:
                self.ended = f"{IDLE} configurations in a row did not fit"
                break
            digest = hashlib.sha256(f"{self.search.seed}:{number}".encode()).digest()
            seed = int.from_bytes(digest[:4], "little")
            history.sampler = self._sampler(trained, seed)
            proposed = self._propose(history, tried, seed)
            notes = history._storage.get_trial_system_attrs(proposed._trial_id)
            trial = self._begin(proposed.params, notes, proposed, batch=batch)
            tried.add(identity(proposed.params))
            number += 1
            if trial:
                asked.append(trial)
            else:
                history.tell(proposed, state=TrialState.PRUNED)
            idle = 0 if trial else idle + 1
        return asked

    def _propose(self, history: optuna.Study, tried: set[str], seed: int) -> optuna.Trial:
        """What the sampler proposes; where that was tried, something untried near it."""
        for _ in range(PROPOSALS):
            proposed = history.ask(self.space.distributions)
            if identity(proposed.params) not in tried:
                return proposed
            history.tell(proposed, state=TrialState.FAIL)
        history.enqueue_trial(self.space.near(proposed.params, tried, seed))
        return history.ask(self.space.distributions)

    def _begin(
        self,
        config: Config,
        system: dict[str, Any],
        proposed: optuna.Trial | None = None,
        **notes: int,
    ) -> Trial | None:
        """Count a configuration and put it into the study in one piece: as a trial that is to be
        trained, or rejected, and then the result is None.
        """
        started = time.thread_time()
        problem = self.space.problem(config)
        taken = None if problem else self.space.cost(config)
        over = taken.constraints(self.search) if taken else {"buildable": 1.0}
        seconds = time.thread_time() - started
        feasible = max(over.values()) <= 0
        # Mirrored for optuna-dashboard, which does not show constraints.
        attributes: dict[str, Any] = {f"constraint_{k}": v for k, v in over.items()}
        attributes |= {"feasible": feasible, **notes}
        if taken:
            attributes |= {k.replace("file_", "bound_"): v for k, v in asdict(taken).items()}
        if not feasible:
            attributes |= {"reason": problem or _over(over), "outcome": REJECTED}
            self._rejecting.append(seconds)
        if proposed:
            for name, value in over.items():
                proposed.set_constraint(name, value)
        self.study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.RUNNING if feasible else TrialState.PRUNED,
                params={name: config[name] for name in self.space.values},
                distributions=self.space.distributions,
                user_attrs=attributes,
                system_attrs={k: v for k, v in system.items() if k.endswith("generation")},
                constraints=over,
            )
        )
        number = self.study.get_trials(deepcopy=False)[-1].number
        if feasible and taken:
            return Trial(number, config, taken, notes["batch"])
        if self.tracker:
            self._log(f"trial-{number:03d}", config, taken, REJECTED, {}, over)
        return None

    # -- training --------------------------------------------------------------------------

    def run(
        self,
        cluster: Cluster,
        trials: int | None = None,
        timeout: float | None = None,
        answered: Callable[[Report], object] = lambda report: None,
    ) -> Report:
        """Train until the study has `trials` trials, or `timeout` seconds are over, or Ctrl-C.

        Ctrl-C once: what runs is finished, nothing new is begun. Twice: at once; what ran is
        repeated when the study goes on.

        Args:
            answered: gets the report before rivals are trained, which may take as long again.
        """
        started = time.monotonic()
        deadline = started + timeout if timeout is not None else math.inf
        self.wanted = wanted = trials or self.search.trials
        crew = Crew(cluster, self.data)

        def stopping() -> bool:
            if time.monotonic() >= deadline and not self._stop.is_set():
                self.ended = f"{timeout:g} s were over"
                self._stop.set()
            return self._stop.is_set()

        with self._interruptible():
            before = len(self._trials(*COUNTED))
            if before:
                self.say(f"{self.name}: goes on after {before} trials")
            while len(self._trials(*COUNTED)) < wanted and not stopping():
                batch = self.ask(wanted)
                if batch:
                    self._train(crew, batch, stopping)
                if self.ended:
                    break
            if self.search.rivals and not stopping():
                answered(self.report())
                self._train_rivals(crew, stopping)
        report = self.report()
        report.retried = crew.retried
        report.seconds = time.monotonic() - started
        return report

    def _train(self, crew: Crew, batch: list[Trial], stopping: Callable[[], bool]) -> None:
        trials = {t.name: t for t in batch}
        todo: list[Work] = []
        for trial in batch:
            p = preset(self.params, trial.config)
            needs = self._bases(crew, p, todo)
            args = (p, self._floors(trial))
            # About as long: passes of an image through the members, forward and backward.
            weight = trial.cost.megaops * p.ensembles.recipe.epochs + 1e-3 * trial.config["members"]
            todo.append(Work(trial.name, tasks.ensemble, args, needs, weight))

        def done(work: Work, result: Any) -> None:
            if work.name in trials:
                self._tell(trials[work.name], result)
            elif not isinstance(result, WorkError):
                self._save_base(work, result)

        for work in crew.run(todo, done, stopping):
            if work.name in trials:
                self._interrupt(self.study, trials[work.name].number)

    def _floors(self, trial: Trial) -> list[tuple[float, float | None]]:
        """Rungs with the validation accuracy, in percent, that `trial` must reach at each."""
        two = self.search.objectives == "accuracy_bytes"
        earlier = [t for t in self._trials(TRAINED, STOPPED) if t.user_attrs["batch"] < trial.batch]
        rungs: list[tuple[float, float | None]] = []
        for k, fraction in enumerate(self.search.rungs):
            reached = [t.user_attrs for t in earlier if len(t.user_attrs["rungs"]) > k]
            better = int(self.search.keep * len(reached))  # so many may be
            values = sorted(
                (
                    a["rungs"][k]
                    for a in reached
                    if not two or a["bound_bytes"] <= trial.cost.file_bytes
                ),
                reverse=True,
            )
            rungs.append((fraction, values[better] if len(values) > better else None))
        return [*rungs, (1.0, None)]

    def _bases(self, crew: Crew, p: Params, todo: list[Work]) -> str | None:
        """The name of the network that members start from; what must be trained goes to `todo`."""
        (ensemble,) = p.ensembles.train
        sharing = SHARING[str(ensemble.sharing)]
        if ensemble.start != "bnn" and not sharing.block:
            return None
        key = f"{p.model.backbone}-{p.model.width}"
        if key not in self._keys:
            job = schemes.first_job(p, self.data, None)
            digest = P.digest(job.digest(self.data), p.binarize, p.model.binarizer)
            self._keys[key] = f"{key}-{digest}"
        key = self._keys[key]
        names = {"fp32": f"fp32/{key}", "bnn": f"bnn/{key}"}
        wanted = ("fp32", "bnn") if ensemble.start == "bnn" else ("fp32",)
        planned = {work.name for work in todo}
        for kind in reversed(wanted):
            name = names[kind]
            if name in crew.kept or name in planned:
                break
            folder = self.folder / name
            if (folder / "spec.json").exists():
                crew.keep(name, Ensembled.read(folder))
                break
            needs = names["fp32"] if kind == "bnn" else None
            todo.append(Work(name, tasks.network, (p,), needs, math.inf, keep=True))
        return names[wanted[-1]]

    def _save_base(self, work: Work, trained: Ensembled) -> None:
        folder = self.folder / work.name
        new = folder.with_name(folder.name + ".new")
        shutil.rmtree(new, ignore_errors=True)
        trained.save(new)
        os.replace(new, folder)

    def _tell(self, trial: Trial, result: Any) -> None:
        """Record what came of a trial."""
        if isinstance(result, WorkError):
            _note(self.study, trial.number, reason=str(result), outcome=FAILED)
            self._settle(self.study, trial.number)
            self._progress(trial, FAILED, {}, str(result))
            return
        outcome = STOPPED if result["stopped"] else TRAINED
        notes = {key: result[key] for key in ("val_loss", "file_bytes", "rungs", "cpu_s")}
        notes["stopped_top1" if result["stopped"] else "val_top1"] = result["val_top1"]
        _note(self.study, trial.number, **notes, outcome=outcome)
        self._settle(self.study, trial.number)
        self._progress(trial, outcome, result)
        if result["file_bytes"] > trial.cost.file_bytes:
            self.say(
                f"{trial.name}: the file has {result['file_bytes']} bytes; expected at most "
                f"{trial.cost.file_bytes}: please report this"
            )

    def _settle(self, study: optuna.Study, number: int) -> None:
        """Tell Optuna what a trial's attributes say."""
        trial = study.get_trials(deepcopy=False)[number]
        a = trial.user_attrs
        if a["outcome"] == FAILED:
            study.tell(number, state=TrialState.FAIL)
            return
        two = self.search.objectives == "accuracy_bytes"
        steps = zip((*self.search.rungs, 1.0), a["rungs"], strict=False)
        for fraction, value in () if two else steps:
            step = round(100 * fraction)
            study._storage.set_trial_intermediate_value(trial._trial_id, step, value)
        if a["outcome"] == STOPPED:
            study.tell(number, state=TrialState.PRUNED)
        else:
            study.tell(number, [a["val_top1"], a["file_bytes"]] if two else a["val_top1"])

    def _progress(self, trial: Trial, outcome: str, result: dict, reason: str = "") -> None:
        done = len(self._trials(*COUNTED))
        top1 = f"{result['val_top1']:6.2f} %" if result else reason
        self.say(
            f"{done:>4}/{self.wanted} {trial.name} {outcome:<8} {top1}, at most "
            f"{trial.cost.counted_kib:6.2f} KiB: {described(trial.config)}"
        )
        if self.tracker:
            over = trial.cost.constraints(self.search)
            self._log(trial.name, trial.config, trial.cost, outcome, result, over)

    def _log(self, name: str, config, taken: Cost | None, outcome: str, result, over) -> None:
        """A child run of the study's; the same names in all, so that they compare."""
        assert self.tracker is not None
        about: dict[str, Any] = {**config, "outcome": outcome}
        if taken:  # among the parameters too: the compare view opens on the first three that differ
            about["bound_kib"] = round(taken.file_bytes / 1024, 2)
        with self.tracker.model(name, about) as child:
            if result:
                child.history(tasks.merged(result["history"]))
            figures = {f"constraint_{k}": v for k, v in over.items()}
            if taken:
                figures |= {"file_bytes": taken.file_bytes, "counted_kib": taken.counted_kib}
                figures |= {"megaops": taken.megaops, "activation_kib": taken.activation_kib}
            if result:
                keys = ["val_top1", "val_loss", "file_bytes", "cpu_s"]
                figures |= {k: result[k] for k in keys if k in result}
                if outcome == STOPPED:  # not a result that compares with the others'
                    figures["stopped_top1"] = figures.pop("val_top1")
            if outcome == REJECTED:  # no result: `make ui` links to a comparison of results
                child.history([{"epoch": 0, **figures}])
            else:
                child.metrics(figures)

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(*_: object) -> None:
            if self._stop.is_set():
                raise KeyboardInterrupt
            self.ended = "interrupted"
            self._stop.set()
            self.say("finishing what runs; Ctrl-C again ends at once")

        before = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    # -- rivals ----------------------------------------------------------------------------

    def _train_rivals(self, crew: Crew, stopping: Callable[[], bool]) -> None:
        """Train what an answer must be compared with, within the same budget."""
        best = self.best()
        if best is None:
            return
        todo: list[Work] = []
        rivals = {r.label: r for r in space.rivals(self.params, self.space, best)}
        known = self.study.user_attrs
        for rival in rivals.values():
            if known.get(f"rival {rival.label}", {}).get("about") == rival.about:
                continue
            members = rival.row["members"]  # what trains longest begins first
            if rival.int8:
                todo.append(Work(rival.label, tasks.int8, (rival.params,), weight=members))
            else:
                needs = self._bases(crew, rival.params, todo)
                args = (rival.params, [(1.0, None)])
                todo.append(Work(rival.label, tasks.ensemble, args, needs, members))
        missing = [work.name for work in todo if work.name in rivals]
        if missing:
            self.say(f"     rivals of the answer, to be trained: {', '.join(missing)}")

        def done(work: Work, result: Any) -> None:
            if work.name not in rivals:
                if not isinstance(result, WorkError):
                    self._save_base(work, result)
                return
            rival = rivals[work.name]
            if isinstance(result, WorkError):
                self.say(f"     rival: {rival.label} failed: {result}")
                return
            row = {"about": rival.about, "val_top1": result["val_top1"], **rival.row}
            row["file_bytes"] = result["file_bytes"]
            self.say(
                f"     rival {rival.label} {row['val_top1']:6.2f} %, "
                f"{row['file_bytes'] / 1024:6.2f} KiB: {rival.about}"
            )
            self.study.set_user_attr(f"rival {rival.label}", row)
            if self.tracker:
                with self.tracker.model(f"rival-{rival.label}", rival.row) as child:
                    child.history(tasks.merged(result["history"]))
                    child.metrics({k: row[k] for k in ("val_top1", "file_bytes")})

        crew.run(todo, done, stopping)

    # -- the answer ------------------------------------------------------------------------

    def rows(self) -> list[dict[str, Any]]:
        """One dict a configuration that was asked for, in the order asked."""
        rows = []
        for t in self.study.get_trials(deepcopy=False):
            a = t.user_attrs
            if a.get("outcome") not in (*COUNTED, REJECTED):
                continue
            row = {"number": t.number, **{name: t.params[name] for name in self.space.values}}
            keys = ["outcome", "val_top1", "stopped_top1", "val_loss", "file_bytes", "bound_bytes"]
            keys += ["counted_kib", "megaops", "activation_kib", "feasible", "reason", "cpu_s"]
            row |= {k: a.get(k) for k in keys}
            if row["file_bytes"] is None or row["outcome"] == STOPPED:
                row["file_bytes"] = row["bound_bytes"]
            rows.append(row)
        return rows

    def best(self) -> dict[str, Any] | None:
        """The best row within the budget: by validation accuracy, then loss, then bytes."""
        rows = [r for r in self.rows() if r["outcome"] == TRAINED]
        key = ("val_top1", "val_loss", "file_bytes")
        return min(rows, key=lambda r: (-r[key[0]], r[key[1]], r[key[2]]), default=None)

    def config(self, row: dict[str, Any]) -> Config:
        return {name: row[name] for name in self.space.values}

    def report(self) -> Report:
        """What there is so far."""
        rejecting = None
        if self._rejecting:
            rejecting = float(np.mean(self._rejecting)), max(self._rejecting)
        known = self.study.user_attrs
        return Report(
            self.rows(),
            self.best(),
            [
                {"rival": key.removeprefix("rival "), **value}
                for key, value in known.items()
                if key.startswith("rival ")
            ]
            if self.search.rivals
            else [],
            self._importances(),
            rejecting,
            self.ended,
            self.name,
        )

    def _importances(self) -> dict[str, float]:
        trained = self._trials(TRAINED)
        varied = [n for n in self.space.values if len({str(t.params[n]) for t in trained}) > 1]
        if len(trained) < 4 or not varied:
            return {}
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        two = self.search.objectives == "accuracy_bytes"
        target = (lambda t: t.values[0]) if two else None
        try:
            return optuna.importance.get_param_importances(
                self.study, evaluator=evaluator, params=varied, target=target
            )
        except RuntimeError:  # all were equally good
            return {}
