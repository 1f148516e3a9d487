"""Small searches for the tests: parameters, configurations, and results that nobody trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from bnncore import params as P
from bnncore.search import space
from bnncore.search.answer import Report
from bnncore.search.run import Search, study_name
from bnncore.search.space import Space
from bnncore.search.study import Study, Trial
from tests import tiny

DATA = tiny.dataset(train=64)
SHORT = {"epochs": 2, "batch_size": 32, "lr": 0.01}
SPACE = {
    "backbone": ["nin", "resnet8"],
    "width": [8, 12],
    "scheme": ["tentaclenet", "fusion", "voting"],
    "sharing": ["tentaclenet", "shared_conv"],
    "members": [1, 2, 3, 4],
    "start": ["bnn", "hadamard"],
}


SPACES: dict[str, Space] = {}  # by study; making one takes a second


def parse(**search) -> P.Params:
    values = {"trials": 6, "budget_kib": 12, "warmup": 2, "batch": 2, "rungs": [0.5]}
    values |= {"space": SPACE | search.pop("space", {}), "rivals": False, "finalists": 0, **search}
    return tiny.parse(pretrain=SHORT, binarize=SHORT, ensembles={"recipe": SHORT}, search=values)


def configuration(**changes) -> space.Config:
    return {
        "backbone": "nin", "width": 8, "scheme": "fusion", "sharing": "shared_conv", "members": 2,
        "start": "bnn", **changes,
    }  # fmt: skip


def silent(_: str) -> None:
    pass


def study(folder: Path, p: P.Params | None = None, say: Callable[[str], None] = silent) -> Study:
    """A study without a cluster."""
    p = p or parse()
    folder.mkdir(parents=True, exist_ok=True)
    name = study_name(p, DATA)
    if name not in SPACES:
        SPACES[name] = Space(p, DATA)
    return Study(SPACES[name], name, folder, say)


def search(folder: Path, p: P.Params | None = None, **more) -> Search:
    return Search(p or parse(), DATA, folder, **{"say": silent, **more})


def result(trial: Trial, **changes) -> dict:
    """A made-up one, by the configuration."""
    config = trial.config
    top1 = 50 + config["width"] + 2 * config["members"] + 5 * (config["scheme"] == "fusion")
    return {"val_top1": top1, "val_loss": 1.0, "file_bytes": trial.cost.file_bytes, "cpu_s": 1.0,
            "affine": "float32", "weights": "float32", "integer": False, "drop": 0.0,
            "rungs": [top1 - 1, top1], "stopped": False, "history": {}, **changes}  # fmt: skip


def told(of: Study, batch: Sequence[Trial]) -> list[Trial]:
    for trial in batch:
        of.tell(trial, result(trial))
    return list(batch)


def asked(folder: Path, p: P.Params, batches: int, wanted: int = 99) -> list[list[space.Config]]:
    """Batches that a study asks for, each told made-up results."""
    of = study(folder, p)
    return [[t.config for t in told(of, of.ask(wanted))] for _ in range(batches)]


def report(of: Study, p: P.Params, rivals: Sequence[space.Row] = ()) -> Report:
    smallest = (of.space.smallest, of.space.least)
    return Report(of.name, p, p.search.trials, of.rows(), list(rivals), smallest,
                  of.importances(), None, of.ended, len(DATA.val), of.right)  # fmt: skip


def comparable(rows: Sequence[space.Row]) -> list[space.Row]:
    """Without what depends on when and where they were trained."""
    return sorted(({k: v for k, v in row.items() if k != "cpu_s"} for row in rows), key=str)
