"""What every stage does: read parameters, say errors in one line, show progress, log."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bnncore import data
from bnncore import params as parameters
from bnncore.errors import UserError
from bnncore.params import Params
from bnncore.terminal import printable
from bnncore.tracking import ModelRun, Tracker
from pipeline.parent import end_with_dvc

ROOT = Path()  # stages run in the project's root, under DVC and by hand
CHECKPOINTS = ROOT / "checkpoints"
MODELS = ROOT / "models"
PACKED = ROOT / "packed"
REPORTS = ROOT / "reports"


def folder(model: str) -> Path:
    """Where a trained model lies."""
    return MODELS / (model if model in ("fp32", "bnn") else f"ensembles/{model}")


@dataclass
class Stage:
    """A running stage: its parameters, its tracker, its progress bars."""

    params: Params
    tracker: Tracker
    bars: dict[str, tqdm] = field(default_factory=dict)
    runs: dict[str, ModelRun] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    def images(self) -> data.Dataset:
        """The images that the parameters name."""
        images = read(self.params.data)
        source = self.params.data.path or self.params.data.name
        self.tracker.dataset(images.name, images.digest, source)
        return images

    def models(self) -> list[str]:
        """Names of all models, in the order of the table."""
        return ["fp32", "bnn", *(e.name for e in self.params.ensembles.train)]

    def say(self, text: str) -> None:
        """A line above the progress bars."""
        with tqdm.external_write_mode():
            print(text, flush=True)

    def on_epoch(self, job: Any, epoch: Mapping[str, Any]) -> None:
        """Show an epoch of a job and log its curve; jobs of one ensemble are NAME.MEMBER."""
        self._show(job.name, epoch, job.recipe.epochs)
        run = self.runs.get(job.name)
        if run is None:
            run = self.tracker.model(job.name, {"recipe": parameters.plain(job.recipe)})
            self.runs[job.name] = run
        run.epoch(epoch["epoch"], {k: v for k, v in epoch.items() if k != "epoch"})

    def _show(self, name: str, epoch: Mapping[str, Any], epochs: int) -> None:
        state = f"loss {epoch['train_loss']:.3f}, validation {epoch['val_top1']:.1f} %"
        done = epoch["epoch"]
        if not _draws():  # a log wants a few lines, not a bar drawn over and over
            if done == epochs or done % max(1, epochs // 5) == 0:
                after = tqdm.format_interval(time.monotonic() - self.began)
                left = tqdm.format_interval(epoch["seconds"] * (epochs - done))
                when = f"after {after}" + (f", about {left} left" if done < epochs else "")
                line = f"{name:>16}: epoch {done}/{epochs}, {state}, {when}"
                print(line, file=sys.stderr, flush=True)
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


def _draws() -> bool:
    """Whether stderr is a terminal with room for bars."""
    return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0


def read(params: parameters.DataParams) -> data.Dataset:
    """The images, which may take a while: said first."""
    print(f"reading {params.path or params.name}", flush=True)
    return data.load(params, ROOT)


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


# Of the machine, not of the program: no space, no permission, a broken or read-only disk.
_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


def run(main: Callable[[], None], description: str | None = None) -> None:
    """Run a stage's `main`; what a user can mend ends in one line on stderr and exit status 1.

    Everything else is a bug and keeps its traceback.

    Args:
        description: for ``--help``; None where `main` reads the command line itself.
    """
    end_with_dvc()
    name = Path(sys.argv[0]).stem
    if description is not None:
        parser = argparse.ArgumentParser(
            prog=f"python -m pipeline.{name}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument("--traceback", action="store_true", help="of errors")
        parser.parse_args()
    logging.basicConfig(format="%(name)s: %(message)s")
    try:
        main()
    except (UserError, OSError) as error:
        mendable = isinstance(error, UserError) or error.errno in _MACHINE
        if not mendable or "--traceback" in sys.argv:
            raise
        # A full disk is met in a write, which does not know the file.
        where = f"{ROOT.resolve()}: " if getattr(error, "filename", "") is None else ""
        sys.exit("\n".join(map(printable, f"{name}: {where}{error}".split("\n"))))
