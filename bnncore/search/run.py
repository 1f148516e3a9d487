"""Search for the best ensemble under a memory budget: the loop, on a cluster.

The driver asks a `Study` for configurations (backbone, width, scheme, sharing, members ..). Each
one's bytes are counted from its shapes (`search.space`), and what is over the budget is rejected
before anything is trained. The others are trained side by side on a Ray cluster, one task each
(`search.trial`), from networks that they share (`search.bases`). Then come the rivals of what was
found (`search.rivals`). `search.answer` says what all that amounts to.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bnncore import modules
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
from bnncore.search.space import Cost, Row, Space, described, preset
from bnncore.search.study import COUNTED, FAILED, REJECTED, STOPPED, Study, Trial
from bnncore.training import checkpoint, plans, schemes
from bnncore.training.ensembled import Ensembled

if TYPE_CHECKING:
    from bnncore.tracking import Tracker

INTERRUPTED = "interrupted"


def study_name(params: Params, data: Dataset) -> str:
    """Changes with everything that a trial's result depends on, the user's code too, but not with
    that of this package."""
    plain = P.plain(params)
    for section in ("mlflow", "ray", "evaluate", "data"):
        del plain[section]
    del plain["ensembles"]["train"]
    del plain["model"]["backbone"], plain["model"]["width"]
    del plain["search"]["trials"], plain["search"]["rivals"]
    binarizer = params.model.binarizer
    named = [*params.search.space.backbone, binarizer.weight, binarizer.activation]
    code = [path.read_text() for _, path in sorted(modules.users_files(named).items())]
    parts = [plain, data.digest, *code]  # without code of the user's, what it always was
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
            before = len(self.study.trials(*COUNTED))
            if before:
                self.say(f"{self.study.name}: goes on after {before} trials")
            while len(self.study.trials(*COUNTED)) < wanted and not stopping():
                batch = self.study.ask(wanted, stopping, self._log_rejection)
                self._train(crew, batch, stopping)
                if self.study.ended:
                    break
            if self.search.rivals and not stopping():
                answered(self.report())
                self._train_rivals(crew, stopping)
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
            p = preset(self.params, t.config)
            needs = self.bases.needed(crew, p, todo)
            args = (p, self.study.floors(t))
            # About as long: passes of an image through the members, forward and backward.
            weight = t.cost.megaops * p.ensembles.recipe.epochs if t.cost else 0.0
            weight += 1e-3 * t.config["members"]
            todo.append(Work(t.name, trial.ensemble, args, needs, weight))

        crew.run(todo, self._done(lambda name, result: self._told(trials[name], result)), stopping)

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
            found = f"{result['val_top1']:6.2f} %"
        assert t.cost is not None
        self.say(
            f"{len(self.study.trials(*COUNTED)):>4}/{self.wanted} {t.name} {outcome:<8} {found}, "
            f"at most {t.cost.counted_kib:6.2f} KiB: {described(t.config)}"
        )
        if figures and figures["file_bytes"] > t.cost.file_bytes:
            self.say(
                f"{t.name}: the file has {figures['file_bytes']} bytes; expected at most "
                f"{t.cost.file_bytes}: please report this"
            )
        self._log(t, outcome, figures)

    # -- rivals ----------------------------------------------------------------------------

    def _train_rivals(self, crew: Crew, stopping: Callable[[], bool]) -> None:
        """Train what an answer must be compared with, within the same budget."""
        best = self.report().best
        if best is None:
            return
        known = self.study.rivals
        missing = {
            r.label: r
            for r in rivals.rivals(self.params, self.space, best)
            if not r.row.items() <= known.get(r.label, {}).items()
        }
        todo: list[Work] = []
        for rival in missing.values():
            members = rival.config["members"]  # what trains longest begins first
            if rival.label == rivals.INT8:
                todo.append(Work(rival.label, trial.fp32, (rival.params,), weight=members))
            else:
                needs = self.bases.needed(crew, rival.params, todo)
                args = (rival.params, [(1.0, None)])
                todo.append(Work(rival.label, trial.ensemble, args, needs, members))
        if missing:
            self.say(f"     rivals of the answer, to be trained: {', '.join(missing)}")

        told = self._done(lambda name, result: self._told_rival(missing[name], result))
        crew.run(todo, told, stopping)

    def _told_rival(self, rival: rivals.Rival, result: trial.Result | WorkError) -> None:
        if isinstance(result, WorkError):
            self.say(f"     rival: {rival.label} failed: {result}")
            return
        row = {**rival.row, **{k: result[k] for k in ("val_top1", "val_loss", "file_bytes")}}
        self.say(
            f"     rival {rival.label} {row['val_top1']:6.2f} %, {row['file_bytes'] / 1024:6.2f} "
            f"KiB: {rival.about}"
        )
        self.study.keep_rival(rival.label, row)
        if self.tracker:
            with self.tracker.model(f"rival-{rival.label}", rival.config) as child:
                child.history(trial.merged(result["history"]))
                child.metrics({k: row[k] for k in ("val_top1", "file_bytes")})

    # -- what is said of it ----------------------------------------------------------------

    def report(self) -> Report:
        """What there is so far."""
        rejecting = None
        if self.study.rejecting_s:
            rejecting = float(np.mean(self.study.rejecting_s)), max(self.study.rejecting_s)
        shown = self.study.rivals if self.search.rivals else {}
        return Report(
            name=self.study.name,
            params=self.full,
            wanted=self.wanted,
            rows=self.study.rows(),
            rivals=[{"rival": label, **row} for label, row in shown.items()],
            smallest=(self.space.smallest, self.space.least),
            importances=self.study.importances(),
            rejecting_s=rejecting,
            ended=self.ended or self.study.ended,
        )

    def _log_rejection(self, t: Trial) -> None:
        self._log(t, REJECTED, {})

    def _log(self, t: Trial, outcome: str, result: trial.Result) -> None:
        """A child run of the study's; the same names in all, so that they compare."""
        if self.tracker is None:
            return
        taken: Cost | None = t.cost
        about: Row = {**t.config, "outcome": outcome}
        if taken:  # among the parameters too: the compare view opens on the first three that differ
            about["bound_kib"] = round(taken.file_bytes / 1024, 2)
        with self.tracker.model(t.name, about) as child:
            if result:
                child.history(trial.merged(result["history"]))
            figures = {f"constraint_{k}": v for k, v in t.over.items()}
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
        plan = plans.plan(params, section, data, fp32.state, bnn.state)
        trained = schemes.train(plan, train_many)
    program, _ = packing.packed(trained, params, data, name, section)
    return trained, program
