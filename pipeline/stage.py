"""What every stage does: read parameters, say errors in one line, show progress, log."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bnncore import params as parameters
from bnncore.params import Params
from bnncore.tracking import ModelRun, Tracker

ROOT = Path()  # stages run in the project's root, under DVC and by hand
CHECKPOINTS = ROOT / "checkpoints"
MODELS = ROOT / "models"
PACKED = ROOT / "packed"
REPORTS = ROOT / "reports"


@dataclass
class Stage:
    """A running stage: its parameters, its tracker, its progress bars."""

    params: Params
    tracker: Tracker
    bars: dict[str, tqdm] = field(default_factory=dict)
    runs: dict[str, ModelRun] = field(default_factory=dict)

    def on_epoch(self, job: Any, epoch: Mapping[str, Any]) -> None:
        """Show an epoch of a job and log its curve; jobs of one ensemble are NAME.MEMBER."""
        self._show(job.name, epoch, job.recipe.epochs)
        run = self.runs.get(job.name)
        if run is None:
            run = self.tracker.model(job.name, {"recipe": parameters.plain(job.recipe)})
            self.runs[job.name] = run
        run.epoch(epoch["epoch"], {k: v for k, v in epoch.items() if k not in ("epoch", "time")})

    def _show(self, name: str, epoch: Mapping[str, Any], epochs: int) -> None:
        state = f"loss {epoch['train_loss']:.3f}, validation {epoch['val_top1']:.1f} %"
        done = epoch["epoch"]
        if not sys.stderr.isatty():  # a log wants a few lines, not a bar drawn over and over
            if done == epochs or done % max(1, epochs // 5) == 0:
                print(f"{name:>16}: epoch {done}/{epochs}, {state}", file=sys.stderr, flush=True)
            return
        bar = self.bars.get(name)
        if bar is None:
            bar = self.bars[name] = tqdm(total=epochs, desc=f"{name:>16}", unit="epoch")
        bar.set_postfix_str(state)
        bar.update(done - bar.n)
        if done == epochs:
            bar.close()

    def close(self, status: str = "FINISHED") -> None:
        for bar in self.bars.values():
            bar.close()
        for run in self.runs.values():
            run.finish(status)


@contextmanager
def stage() -> Iterator[Stage]:
    """Read ``params.yaml`` and open the tracker; a stage's body runs inside."""
    params = parameters.load(ROOT / "params.yaml")
    plain = parameters.plain(params)
    settings = params.mlflow
    with Tracker(ROOT, plain, settings.uri, experiment=settings.experiment) as tracker:
        running = Stage(params, tracker)
        try:
            yield running
        except BaseException as error:
            running.close("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            raise
        running.close()


def run(main: Callable[[], None]) -> None:
    """Run a stage's `main`; what a user can mend ends in one line on stderr and exit status 1."""
    logging.basicConfig(format="%(name)s: %(message)s")
    try:
        main()
    except (ValueError, RuntimeError, OSError) as error:
        if "--traceback" in sys.argv:
            raise
        sys.exit(f"{Path(sys.argv[0]).stem}: {error}")
