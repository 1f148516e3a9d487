"""The side that trains: it appends lines to ``checkpoints/mlflow/KEY.jsonl``.

KEY is a hash of the resolved parameters, DVC's experiment name and the store. A stage that was
killed therefore goes on in the runs it had begun, and a changed parameter begins new ones.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Self

METRICS = {
    "val_top1": "percent of validation images classified correctly",
    "test_top1": "percent of test images classified correctly",
    "file_kib": "file_bytes / 1024 (added by itself)",
    "file_bytes": "bytes of the packed file",
    "counted_kib": "KiB by the paper's own count",
    "val_loss": "mean loss over the validation images",
    "train_loss": "mean loss over the epoch's training images",
    "train_top1": "percent of training images classified correctly",
    "disagreement": "mean share of images on which two members differ, 0 to 1",
    "ece": "expected calibration error, 0 to 1",
    "seconds": "wall time",
}
"""The names under which figures are logged, so that MLflow's compare views line up.

Logged in this order too: the parallel-coordinates view opens on the metric that came first.
"""

NOWHERE = "none"  # MLFLOW_TRACKING_URI=none: log nothing
_VALUE = 6000  # MLflow's limit on a parameter's length


class Run:
    """A run of MLflow's, as a process that trains sees it: a way to append to the log.

    As a context manager it finishes: FAILED on an exception, KILLED on Ctrl-C.
    """

    def __init__(self, tracker: Tracker, name: str | None) -> None:
        self.name = name
        self._tracker = tracker
        self._open = True

    def metrics(self, values: Mapping[str, float | None]) -> None:
        """Logs final figures (names: `METRICS`; None is left out).

        They are at the last epoch's step, or after it where the curve says something else.
        """
        self._tracker._put(self.name, "figures", values=numbers(values))

    def artifact(self, path: Path | str, folder: str | None = None) -> None:
        """Attaches a file as it is now, in a folder of the run's artifacts."""
        self._tracker._put(self.name, "file", path=path, folder=folder)

    def finish(self, status: str = "FINISHED") -> bool:
        """Ends the run: FINISHED, FAILED or KILLED."""
        if self._open:
            self._tracker._put(self.name, "end", status=status)
            self._open = False
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.finish()
        else:
            self.finish("FAILED" if issubclass(kind, Exception) else "KILLED")


class ModelRun(Run):
    """The child run of one model. Get it from `Tracker.model`."""

    def epoch(self, epoch: int, metrics: Mapping[str, float | None]) -> None:
        """Logs an epoch's figures. Returns at once.

        "time" among them is when the epoch was finished (unix seconds), else it is now. It tells
        an epoch that is told again from one of a new training, which gets a run of its own.
        """
        self.history([{"time": time.time(), **metrics, "epoch": epoch}])

    def history(self, epochs: Iterable[Mapping[str, float | None]]) -> None:
        """Logs the curve of a model that an earlier run trained (a cached stage).

        epochs: objects with "epoch", "time" (see `epoch`) and figures. Without times nothing
        happens if the run has a curve.
        """
        rows = [[int(e["epoch"] or 0), e.get("time"), numbers(e)] for e in epochs]
        self._tracker._put(self.name, "epochs", rows=rows)


class Tracker(Run):
    """The parent run of a pipeline run (or of a search study), and its stage's way to log.

    root: the project's directory; params: the resolved parameters, nested as they are; uri: the
    tracking store, else MLFLOW_TRACKING_URI, else ``<root>/mlflow.db`` with its artifacts in
    ``<root>/mlruns``; "none" logs nothing. experiment and name: as MLflow shows them. wait:
    the most seconds that `finish` waits for the store; with 0 nothing is carried to it now.

    A stage that fails before it logged anything leaves no run. Nothing here raises because of
    MLflow or of a full disk.
    """

    def __init__(
        self,
        root: Path | str,
        params: Mapping[str, Any],
        uri: str | None = None,
        *,
        experiment: str = "bnncore",
        name: str | None = None,
        wait: float = 60.0,
    ) -> None:
        super().__init__(self, None)
        self.root = project(root)
        self.uri = resolve_uri(self.root, uri)
        self.wait = wait
        dvc = os.environ.get("DVC_EXP_NAME", "")
        self.key = digest([params, dvc, self.uri, experiment])
        self.log = folder_of(self.root) / f"{self.key}.jsonl"
        self._open = self.uri != NOWHERE
        self._tags = origin(Path(root)) if self._open else {}
        self._begun = False
        self._start = {  # written before the first other entry
            "name": f"{name or dvc or 'pipeline'}-{self.key[:6]}",
            "params": flat(params),
            "tags": self._tags,
            "uri": self.uri,
            "experiment": experiment,
        }
        self._follower: subprocess.Popen[bytes] | None = None
        self._said: set[str] = set()

    def model(self, name: str, params: Mapping[str, Any]) -> ModelRun:
        """The child run of the model `name`: begun, or the one it has in this parent."""
        self._put(name, "start", name=name, params=flat(params), tags=self._tags)
        return ModelRun(self, name)

    def finish(self, status: str = "FINISHED") -> bool:
        """Ends the stage's part of the run; True if the store now has everything.

        Waits at most `wait` seconds for what is under way. What is left stays in the log.
        """
        if not self._open:
            return True
        if self._begun or status == "FINISHED":
            super().finish(status)
        self._open = False
        if self._follower is None:
            return not self._begun and status != "FINISHED"
        try:
            self._follower.communicate(timeout=self.wait)  # its input ends: one last round
        except subprocess.TimeoutExpired:
            say(
                f"MLflow: {self.uri} is slow, not waiting longer than {self.wait:g} s; the rest "
                f"is kept in {self.log} and logged by the next stage"
            )
            self._follower.kill()  # which may happen to it at any moment
            self._follower.wait()
        return self._follower.returncode == 0

    def _put(self, model: str | None, op: str, **entry: Any) -> None:
        if not self._open:
            return
        try:
            if not self._begun or not self.log.exists():
                append(self.log, None, "start", **self._start)
                self._begun = True
            if op == "file":
                entry["path"] = keep(self.log, entry["path"])
            append(self.log, model, op, **entry)
            if self._follower is None and self.wait:
                self._follower = _follow(self.root, self.key)
        except OSError as error:  # a full disk must not stop a training run
            text = f"MLflow: {error.filename}: {error.strerror}; going on without logging it"
            if text not in self._said:
                say(text)
            self._said.add(text)


def append(log: Path, model: str | None, op: str, **entry: Any) -> None:
    """Append a line to a log, in one piece beside other processes that do so.

    Raises:
        OSError: it cannot be written; no empty file stays behind.
    """
    entry = {"op": op, "model": model, "time": time.time()} | entry
    line = b"\n" + json.dumps(entry).encode()  # \n first: it ends what a killed writer began
    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(log, "ab") as file:
            file.write(line)
    except OSError as error:
        if log.exists() and not log.stat().st_size:
            log.unlink()
        raise OSError(error.errno, error.strerror, str(log)) from error


def keep(log: Path, path: Path | str) -> str:
    """A copy of a file beside the log, since the file may change before the store has it.

    Returns:
        Its path in the log's folder: a hash of what it holds, and its name.
    """
    content = Path(path).read_bytes()
    name = f"{hashlib.sha256(content).hexdigest()[:16]}/{Path(path).name}"
    place = log.with_suffix("") / name
    place.parent.mkdir(parents=True, exist_ok=True)
    new = place.with_name(f".{os.getpid()}")
    try:
        new.write_bytes(content)
        new.replace(place)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(place)) from error
    return name


def project(root: Path | str) -> Path:
    """The project's directory.

    For the temporary folder in which `dvc exp run --queue` or ``--temp`` runs an experiment, that
    of the project it belongs to: what is in the folder vanishes with it.
    """
    root = Path(root).resolve()
    for parent in root.parents:
        if parent.parts[-3:] == (".dvc", "tmp", "exps"):
            return parent.parents[2]
    return root


def folder_of(root: Path | str) -> Path:
    """Where a project's logs lie."""
    return project(root) / "checkpoints" / "mlflow"


def resolve_uri(root: Path | str, uri: str | None = None) -> str:
    """The tracking store: uri, else MLFLOW_TRACKING_URI, else mlflow.db of the project.

    A relative sqlite path is relative to the `project`.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    if uri.startswith("sqlite:///"):
        return f"sqlite:///{project(root) / uri.removeprefix('sqlite:///')}"
    return uri


def digest(values: list[Any]) -> str:
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def flat(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """{"a": {"b": 1}} as {"a.b": "1"}: MLflow's parameters are a flat table of text."""
    table: dict[str, str] = {}
    for name, value in params.items():
        if isinstance(value, Mapping) and value:
            table |= flat(value, f"{prefix}{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            table[f"{prefix}{name}"] = text[:_VALUE]
    return table


def numbers(values: Mapping[str, float | None]) -> dict[str, float]:
    """The figures among values, those of `METRICS` first; names as MLflow takes them."""
    figures = {k: v for k, v in values.items() if v is not None and k not in ("epoch", "time")}
    found = {re.sub(r"[^\w./: -]", "_", name): float(value) for name, value in figures.items()}
    if "file_bytes" in found:
        found.setdefault("file_kib", found["file_bytes"] / 1024)
    return {name: found[name] for name in METRICS if name in found} | found


def origin(root: Path) -> dict[str, str]:
    """Tags that say where a run comes from: git, DVC, and this package's version."""
    tags = {"mlflow.source.name": Path(sys.argv[0]).name, "mlflow.source.type": "LOCAL"}
    describe = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run([*describe, "--exclude=*"], capture_output=True, text=True,
                              timeout=10, check=True)  # fmt: skip
        commit, _, dirty = done.stdout.strip().partition("-")
        tags |= {"mlflow.source.git.commit": commit, "git.dirty": str(bool(dirty)).lower()}
    names = ("DVC_STAGE", "DVC_EXP_NAME", "DVC_EXP_BASELINE_REV")
    tags |= {name: os.environ[name] for name in names if os.environ.get(name)}
    with contextlib.suppress(metadata.PackageNotFoundError):
        tags["bnncore.version"] = metadata.version("bnncore")
    return tags


def say(text: str) -> None:
    """One line to whoever trains; stderr may be a file on the same full disk."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def _follow(root: Path, key: str) -> subprocess.Popen[bytes]:
    package = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "bnncore.tracking", "--root", str(root)]
    return subprocess.Popen(
        [*command, "--follow", key, str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": path},
        process_group=0,  # Ctrl-C is the stage's
    )
