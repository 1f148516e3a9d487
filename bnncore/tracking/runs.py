"""The side that trains: it keeps what each run shall be in ``checkpoints/mlflow/KEY/*.json``.

KEY is a hash of the resolved parameters, DVC's experiment name and the store. A stage that was
killed therefore goes on in the runs it had begun, and a changed parameter begins new ones.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

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
PARENT = "parent.json"
_VALUE = 6000  # MLflow's limit on a parameter's length


class Run:
    """A run of MLflow's, as a process that trains sees it: a file that says what it shall be.

    As a context manager it finishes: FAILED on an exception, KILLED on Ctrl-C.
    """

    def __init__(
        self, tracker: Tracker, model: str | None, name: str, params: Mapping[str, Any]
    ) -> None:
        self._tracker, self._open, self._params = tracker, True, flat(params)
        file = PARENT if model is None else f"model-{quote(model, '')}.json"
        self._file, self._wanted = tracker.folder / file, self._blank(model=model, uri=tracker.uri)
        if self._file.exists():
            self._wanted = json.loads(self._file.read_bytes())
            self._wanted["params"] |= self._params
        if not self._wanted["generation"]:  # else they are of the stage that trained it
            self._wanted |= {"name": name, "tags": tracker.tags, "began": time.time()}
        self._wanted["status"] = "RUNNING"

    def _blank(self, **more: Any) -> dict[str, Any]:
        """Of a training that has not begun; `rows` are metric -> step -> [value, time]."""
        return {"params": dict(self._params), "generation": None, "first": 0, "last": 0,
                "final": False, "rows": {}, "files": {}, **more}  # fmt: skip

    @contextlib.contextmanager
    def _change(self) -> Iterator[dict[str, Any]]:
        """What the run shall be, kept after the body. A full disk must not stop a training run."""
        try:
            yield self._wanted
            self._tracker._keep(self)
        except OSError as error:
            self._tracker._say(f"{error.filename}: {error.strerror}; going on without logging it")

    def metrics(self, values: Mapping[str, float | None]) -> None:
        """Logs final figures (names: `METRICS`; None is left out).

        They are at the last epoch's step, or after it where the curve says something else.
        """
        with self._change() as wanted:
            wanted["final"] = True
            for name, value in numbers(values).items():
                rows = wanted["rows"].setdefault(name, {})
                last = max(map(int, rows), default=-1)
                if not rows or not _same(rows[str(last)][0], value):
                    rows[str(max(last + 1, wanted["last"]))] = value, time.time()

    def artifact(self, path: Path | str, folder: str | None = None) -> None:
        """Attaches a file as it is now, in a folder of the run's artifacts."""
        with self._change() as wanted:  # a copy, for it may change before the store has it
            content = Path(path).read_bytes()
            kept = f"{hashlib.sha256(content).hexdigest()[:16]}/{Path(path).name}"
            if self._tracker._open:
                write(self._file.parent / "files" / kept, content)
            wanted["files"][str(Path(folder or "", Path(path).name))] = kept

    def finish(self, status: str = "FINISHED") -> bool:
        """Ends the run: FINISHED, FAILED or KILLED."""
        if self._open:
            with self._change() as wanted:
                wanted |= {"status": status, "ended": time.time()}
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
        """Logs an epoch's figures. Returns at once; "time" among them is as in `history`."""
        self.history([{**metrics, "epoch": epoch}])

    def history(self, epochs: Iterable[Mapping[str, float | None]]) -> None:
        """Logs a curve, or more of it; a step that the run has is not heard again.

        epochs: objects with "epoch", figures and "time", when the epoch was finished (unix
        seconds). That of the first one tells what is told again from a new training, which gets a
        run of its own.
        """
        told = [(int(e["epoch"] or 0), e.get("time"), numbers(e)) for e in epochs]
        if not told:
            return
        first, moment, _ = told[0]
        with self._change() as wanted:
            known = wanted["generation"]
            if known and moment and moment != known and first <= wanted["first"]:
                known = None  # it was trained anew
                wanted |= self._blank(tags=self._tracker.tags, began=time.time())
            if not known:
                wanted |= {"generation": moment or time.time(), "first": first}
            for step, moment, values in told:
                wanted["last"] = max(wanted["last"], step)
                for name, value in values.items():
                    rows = wanted["rows"].setdefault(name, {})
                    rows.setdefault(str(step), (value, moment or time.time()))


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
        self.root, self.uri, self.wait = project(root), resolve_uri(root, uri), wait
        dvc = os.environ.get("DVC_EXP_NAME", "")
        key = digest([params, dvc, self.uri, experiment])
        self.folder = folder_of(root) / key
        self.tags = {} if self.uri == NOWHERE else origin(Path(root))
        super().__init__(self, None, f"{name or dvc or 'pipeline'}-{key[:6]}", params)
        self._open = self.uri != NOWHERE
        self._wanted["experiment"] = experiment
        self._begun = False
        self._follower: subprocess.Popen[bytes] | None = None
        self._said: set[str] = set()

    def dataset(self, name: str, digest: str, source: str) -> None:
        """The images of all models of this run, for MLflow's column; logged with what comes next.

        name: as people call them; digest: of their content; source: where they are read from.
        """
        self._wanted["dataset"] = {"name": name, "digest": digest, "source": source}

    def model(self, name: str, params: Mapping[str, Any]) -> ModelRun:
        """The child run of the model `name`: begun, or the one it has in this parent."""
        run = ModelRun(self, name, name, params)
        with run._change():
            return run

    def finish(self, status: str = "FINISHED") -> bool:
        """Ends the stage's part of the run; True if the store now has everything.

        Waits at most `wait` seconds for what is under way. What is left stays in its files.
        """
        if not self._open:
            return True
        if not self._begun and status != "FINISHED":
            self._open = False
            return True
        super().finish(status)
        if self._follower is None:
            return False
        try:
            self._follower.communicate(timeout=self.wait)  # its input ends: one last round
        except subprocess.TimeoutExpired:
            self._say(
                f"{self.uri} is slow, not waiting longer than {self.wait:g} s; the rest is kept "
                f"in {self.folder} and logged by the next stage"
            )
            self._follower.kill()  # which may happen to it at any moment
            self._follower.wait()
        return self._follower.returncode == 0

    def _keep(self, run: Run) -> None:
        if not self._open:
            return
        for each in (run,) if self._begun else (self, run):
            write(each._file, json.dumps(each._wanted).encode())
        self._begun = True
        if self._follower is None and self.wait:
            self._follower = _follow(self.root, self.folder)

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            say(text)


def write(path: Path, content: bytes) -> None:
    """A file's new content, wholly or not at all.

    Raises:
        OSError: with the file's name.
    """
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new.write_bytes(content)
        new.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            new.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error


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
    """Where a project's runs are kept."""
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


def _same(a: float, b: float) -> bool:
    """Whether two figures are one, rounded by different sums."""
    return math.isclose(a, b, rel_tol=1e-6) or (math.isnan(a) and math.isnan(b))


def commit(root: Path, files: Sequence[str] = (".", ":!dvc.lock"), digits: int = 40) -> str | None:
    """The commit that is checked out in `root`, ``-dirty`` behind it where a file differs from it.

    None where there is no repository.

    Args:
        files: git's patterns of those that count; not dvc.lock, which DVC writes as stages end.
        digits: of the commit's hash.
    """
    git = ["git", "-C", str(root)]

    def asked(*words: str) -> str:
        done = subprocess.run(
            [*git, *words], capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        changed = asked("status", "--porcelain", "--untracked-files=no", "--", *files)
        return asked("rev-parse", "HEAD")[:digits] + "-dirty" * bool(changed)
    except (OSError, subprocess.SubprocessError):
        return None


def origin(root: Path) -> dict[str, str]:
    """Tags that say where a run comes from: git, DVC, and this package's version."""
    tags = {"mlflow.source.name": Path(sys.argv[0]).name, "mlflow.source.type": "LOCAL"}
    if found := commit(root):
        head, _, dirty = found.partition("-")
        tags |= {"mlflow.source.git.commit": head, "git.dirty": str(bool(dirty)).lower()}
    names = ("DVC_STAGE", "DVC_EXP_NAME", "DVC_EXP_BASELINE_REV")
    tags |= {name: os.environ[name] for name in names if os.environ.get(name)}
    with contextlib.suppress(metadata.PackageNotFoundError):
        tags["bnncore.version"] = metadata.version("bnncore")
    return tags


def say(text: str) -> None:
    """One line to whoever trains; stderr may be a file on the same full disk."""
    with contextlib.suppress(OSError):
        print(f"MLflow: {text}", file=sys.stderr, flush=True)


def _follow(root: Path, folder: Path) -> subprocess.Popen[bytes]:
    package = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "bnncore.tracking", "--root", str(root)]
    return subprocess.Popen(
        [*command, "--follow", str(folder), str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": path},
        process_group=0,  # Ctrl-C is the stage's
    )
