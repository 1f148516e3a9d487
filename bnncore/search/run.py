"""Search for the best ensemble under a memory budget: the loop, on a cluster.

The driver asks a `Study` for configurations (backbone, width, scheme, sharing, members ..). Each
one's bytes are counted from its shapes (`search.space`), and what is over the budget is rejected
before anything is trained. The others are trained side by side on a Ray cluster, one task each
(`search.trial`), from networks that they share (`search.bases`). Then come the rivals of what was
found (`search.rivals`), as far as no trial was one, and the best few are told apart by
cross-validation. `search.answer` says what all that amounts to.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bnncore import metrics, modules
from bnncore import params as P
from bnncore.cluster.cluster import Cluster
from bnncore.cluster.crew import Crew, Work, WorkError
from bnncore.data import Dataset
from bnncore.lowering import packing
from bnncore.packed.program import Program
from bnncore.params import Params
from bnncore.search import rivals, space, trial
from bnncore.search.answer import Report
from bnncore.search.bases import Bases
from bnncore.search.space import Config, Row, Space, described, identity, preset
from bnncore.search.study import COUNTED, FAILED, REJECTED, STOPPED, Study, Trial
from bnncore.training import checkpoint, plans, schemes
from bnncore.training.ensembled import Ensembled

if TYPE_CHECKING:
    from bnncore.tracking import Tracker

INTERRUPTED = "interrupted"


def studied(params: Params) -> dict[str, Any]:
    """The parameters that a study is told apart by: those that a trial's result depends on."""
    plain = P.plain(params)
    for section in ("mlflow", "ray", "evaluate", "data"):
        del plain[section]
    del plain["ensembles"]["train"]
    del plain["model"]["backbone"], plain["model"]["width"]
    for key in ("trials", "rivals", "finalists", "folds"):  # what comes after the trials, too
        del plain["search"][key]
    return plain


def study_name(params: Params, data: Dataset) -> str:
    """Changes with everything that a trial's result depends on, the user's code too, but not with
    that of this package."""
    binarizer = params.model.binarizer
    named = [*params.search.space.backbone, binarizer.weight, binarizer.activation]
    # Without code of the user's, what it always was.
    parts = [studied(params), data.digest, *modules.users_code(named)]
    frozen = any(map(space.freezes, params.search.space.sharing))
    if frozen and set(params.search.space.start) != {"bnn"}:
        parts.append("from the BNN")  # once they were not, and such trials cannot be repeated
    return f"{data.name}-{P.digest(*parts)[:8]}"


class Search:
    """A search that goes on where it was.

    Args:
        params: all parameters; `search` says what to look for.
        folder: where the study lives (journal, shared networks). One process at a time.
        tracker: the parent run of the study; each trial becomes a child.
        say: where progress goes, a line at a time.

    Raises:
        ParamsError: from `Space`.
        jobs.TrainingError: another process holds the folder.
        SearchError: the folder's journal cannot be read or written.
    """

    def __init__(
        self,
        params: Params,
        data: Dataset,
        folder: Path,
        tracker: Tracker | None = None,
        say: Callable[[str], None] = print,
    ):
        self.full, self.params, self.search = params, space.shortened(params), params.search
        self.data, self.tracker, self.say = data, tracker, say
        self.space = Space(self.params, data)
        self.wanted = self.search.trials
        self.ended: str | None = None
        self._stop = threading.Event()
        self._lock = checkpoint.Checkpoint(folder.parent, folder.name)  # for its lock on the folder
        try:
            self.study = Study(self.space, study_name(self.params, data), folder, say)
        except BaseException:
            self.close()
            raise
        self.bases = Bases(data, folder, say)

    def close(self) -> None:
        self._lock.close()

    def __enter__(self) -> Search:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

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
            answered: gets the report before rivals and finalists are trained, and between them.
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
            before = len(self.study.trials(*COUNTED))
            if before:
                self.say(f"{self.study.name}: goes on after {before} trials")
            while len(self.study.trials(*COUNTED)) < wanted and not stopping():
                batch = self.study.ask(wanted, stopping, self._log_rejection)
                self._train(crew, batch, stopping)
                if self.study.ended:
                    break
            for more in (self._train_rivals, self._train_finalists):
                if not stopping():
                    answered(self.report())
                    more(crew, stopping)
        report = self.report()
        report.retried = crew.retried
        report.seconds = time.monotonic() - started
        return report

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(*_: object) -> None:
            if self.ended == INTERRUPTED:
                raise KeyboardInterrupt
            self.ended = INTERRUPTED
            self._stop.set()
            self.say("finishing what runs; Ctrl-C again ends at once")

        before = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _train(self, crew: Crew, batch: list[Trial], stopping: Callable[[], bool]) -> None:
        trials = {t.name: t for t in batch}
        todo: list[Work] = []
        for t in batch:
            todo.append(self._work(crew, todo, t.name, t.config, self.study.floors(t)))

        crew.run(todo, self._done(lambda name, result: self._told(trials[name], result)), stopping)

    def _work(
        self, crew: Crew, todo: list[Work], name: str, config: Config, rungs: list[trial.Rung]
    ) -> Work:
        """The task that trains a configuration; what it needs is added to `todo`."""
        p = preset(self.params, config)
        needs = self.bases.needed(crew, p, todo)
        # About as long: passes of an image through the members, forward and backward.
        recipe = p.ensembles.recipe if p.ensembles.train else p.pretrain
        weight = self.space.cost(config).megaops * recipe.epochs + 1e-3 * config["members"]
        args = (p, self.space.packings(config), rungs)
        return Work(name, trial.train, args, needs, weight, trial.gpu_bytes(p, self.data))

    def _done(self, told: Callable[[str, Any], None]) -> Callable[[Work, Any], None]:
        """What `Crew.run` calls: networks are kept on disk, anything else is `told` by name."""

        def done(work: Work, result: Any) -> None:
            if work.run is not trial.network:
                told(work.name, result)
            elif not isinstance(result, WorkError):
                self.bases.save(work.name, result)

        return done

    def _told(self, t: Trial, result: trial.Result | WorkError) -> None:
        if isinstance(result, WorkError):
            outcome, figures, found = FAILED, {}, str(result)
            self.study.fail(t, found)
        else:
            outcome, figures = self.study.tell(t, result), result
            found = f"{result['val_top1']:6.2f} %, {result['file_bytes'] / 1024:6.2f} KiB"
        taken = self.space.cost({**t.config, **figures})
        self.say(
            f"{len(self.study.trials(*COUNTED)):>4}/{self.wanted} {t.name} {outcome:<8} {found}: "
            f"{described({**t.config, **figures})}"
        )
        if figures and figures["file_bytes"] > taken.file_bytes:
            self.say(
                f"{t.name}: the file has {figures['file_bytes']} bytes; expected at most "
                f"{taken.file_bytes}: please report this"
            )
        self._log(t, outcome, figures)

    # -- after the trials ------------------------------------------------------------------

    def _train_rivals(self, crew: Crew, stopping: Callable[[], bool]) -> None:
        """Train what an answer must be compared with, where no trial was the same."""
        report = self.report()
        if not (self.search.rivals and report.best):
            return
        known = {r["rival"] for r in report.rivals}
        wanted = rivals.rivals(self.params, self.space, report.best)
        missing = {label: config for label, config in wanted.items() if label not in known}
        todo: list[Work] = []
        for label, config in missing.items():
            todo.append(self._work(crew, todo, label, config, [(1.0, None)]))
        if missing:
            self.say(f"     rivals of the answer, to be trained: {', '.join(missing)}")

        told = self._done(lambda name, result: self._told_rival(name, missing[name], result))
        crew.run(todo, told, stopping)

    def _told_rival(self, label: str, config: Config, result: trial.Result | WorkError) -> None:
        if isinstance(result, WorkError):
            self.say(f"     rival: {label} failed: {result}")
            return
        keys = (
            "affine",
            "weights",
            "integer",
            "drop",
            "val_top1",
            "val_loss",
            "file_bytes",
            "cpu_s",
        )
        row = {**config, **{k: result[k] for k in keys}, "feasible": True}
        taken = asdict(self.space.cost(row))
        row |= {k.replace("file_", "bound_"): v for k, v in taken.items() if k != "device"}
        self.say(
            f"     rival {label} {row['val_top1']:6.2f} %, {row['file_bytes'] / 1024:6.2f} "
            f"KiB: {described(row)}"
        )
        self.study.keep_rival(label, row)
        if self.tracker:
            with self.tracker.model(f"rival-{label}", config) as child:
                child.history(metrics.mean_curve(result["history"]))
                child.metrics({k: row[k] for k in ("val_top1", "file_bytes", "drop")})

    def _train_finalists(self, crew: Crew, stopping: Callable[[], bool]) -> None:
        """Train those anew, fold by fold, that the validation part cannot tell from its best."""
        folds, todo, rows = self.search.folds, [], {}
        for place, row in enumerate(self.report().finalists):
            p = preset(self.params, row)
            for k in sorted(set(range(folds)) - self.study.folds(row).keys()):
                name = f"finalist-{place}-fold-{k}"
                rows[name] = row, k
                need = trial.gpu_bytes(p, self.data)
                todo.append(Work(name, trial.fold, (p, k, folds), (), row["megaops"], need))
        if todo:
            self.say(f"     told apart by {folds} folds: {len(todo)} trainings")

        def told(work: Work, right: str | WorkError) -> None:
            row, k = rows[work.name]
            if isinstance(right, WorkError):
                self.say(f"     fold {k} failed: {right}: {described(row)}")
                return
            self.study.keep_fold(row, k, right)
            top1 = 100 * right.count("1") / len(right)
            self.say(f"     fold {k + 1}/{folds} {top1:6.2f} %: {described(row)}")

        crew.run(todo, told, stopping)

    # -- what is said of it ----------------------------------------------------------------

    def report(self) -> Report:
        """What there is so far."""
        rejecting = None
        if self.study.rejecting_s:
            rejecting = float(np.mean(self.study.rejecting_s)), max(self.study.rejecting_s)
        report = Report(
            name=self.study.name,
            params=self.full,
            wanted=self.wanted,
            rows=self.study.rows(),
            rivals=[],
            images=len(self.data.val),
            right=self.study.right,
            smallest=(self.space.smallest, self.space.least),
            importances=self.study.importances(),
            rejecting_s=rejecting,
            ended=self.ended or self.study.ended,
        )
        if self.search.rivals and report.best:
            # Those that the best has now: another best may have had others.
            trials = {identity(r): r for r in report.trained}
            known = self.study.rivals
            for label, config in rivals.rivals(self.params, self.space, report.best).items():
                row = trials.get(identity(config), known.get(label))
                if row and identity(row) == identity(config):
                    report.rivals.append({"rival": label, **row})
        return report

    def _log_rejection(self, t: Trial) -> None:
        self._log(t, REJECTED, {})

    def _log(self, t: Trial, outcome: str, result: trial.Result) -> None:
        """A child run of the study's; the same names in all, so that they compare."""
        if self.tracker is None:
            return
        taken = self.space.cost({**t.config, **result}) if t.cost else None
        about: Row = {**t.config, "outcome": outcome}
        about |= {k: result[k] for k in ("affine", "weights", "integer") if k in result}
        if taken:  # among the parameters too: the compare view opens on the first three that differ
            about["bound_kib"] = round(taken.file_bytes / 1024, 2)
        with self.tracker.model(t.name, about) as child:
            if result:
                child.history(metrics.mean_curve(result["history"]))
            figures = {f"constraint_{k}": v for k, v in t.over.items()}
            if taken:
                figures |= {"file_bytes": taken.file_bytes, "counted_kib": taken.counted_kib}
                figures |= {"megaops": taken.megaops, "activation_kib": taken.activation_kib}
            if result:
                keys = ["val_top1", "val_loss", "file_bytes", "drop", "cpu_s"]
                figures |= {k: result[k] for k in keys if k in result}
                if outcome == STOPPED:  # not a result that compares with the others'
                    figures["stopped_top1"] = figures.pop("val_top1")
            if outcome == REJECTED:  # no result: `make ui` links to a comparison of results
                child.history([{"epoch": 0, **figures}])
            else:
                child.metrics(figures)


def finish(
    params: Params, data: Dataset, cluster: Cluster, checkpoints: Path, on_epoch: Any = None
) -> tuple[Ensembled, Program]:
    """Train what `params` are about by its full recipes, members spread over the cluster."""
    train_many = partial(cluster.train_many, data=data, checkpoints=checkpoints, on_epoch=on_epoch)
    name, section = space.model(params)
    (fp32,) = train_many([plans.first_job(params, data, None)])
    if section is None:
        trained = Ensembled(fp32.job.spec, fp32.state, {fp32.job.name: fp32.history})
    else:
        (bnn,) = train_many([plans.first_job(params, data, fp32.state)])
        plan = plans.plan(params, section, data, fp32.state, bnn.state, device=cluster.device)
        trained = schemes.train(plan.over(cluster.slots()), train_many)
    return trained, packing.packed(trained, params, data, name, section).program
