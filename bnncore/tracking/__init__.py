"""MLflow tracking that cannot stop or lose a training run.

The stages of one pipeline run are separate processes that log into one parent run, with one
child run a model. Nothing here calls MLflow in the process that trains: every entry (a run's
start, metrics, an artifact, an end) is one line appended to ``checkpoints/mlflow-spool.jsonl``,
and one background process (`python -m bnncore.tracking --follow`) carries the lines to the
tracking store in their order and then drops them. A process rather than a thread, because
importing MLflow and its retries draw from Python's global random state at moments that no seed
fixes, and because only a process can be stopped when a call hangs.

So a server that is away or slow costs nothing but the wait in `Tracker.finish`, which is bounded;
what it missed stays in the spool, in order, and goes out with the next entry, the next stage or
``python -m bnncore.tracking --flush``. Entries may be replayed after a kill: MLflow drops metric
rows that are equal in name, step, time and value, and runs are found again by the entry's id.

``checkpoints/mlflow.json`` says which run is whose::

    {key: {"uri", "experiment_id", "run_id", "children": {model: {"run_id", "first", "epoch",
                                                                  "finished", "final"}}}}

where first and epoch are the first and last epoch logged, and key is a hash of the resolved
parameters, DVC's experiment name and the store. A stage that was killed therefore goes on in the
runs it had begun, and a changed parameter begins new ones. A model trained again from its first
epoch after its run had finished (changed code, `dvc repro -f`) gets a fresh child; the child it
replaces goes to MLflow's trash, so that a comparison shows each model once.

Metric names are those of `METRICS`. Needs POSIX (fcntl).
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import IO, Any, Self
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

SPOOL = "mlflow-spool.jsonl"
STATE = "mlflow.json"
NOWHERE = "none"  # MLFLOW_TRACKING_URI=none: log nothing
_VALUE = 6000  # MLflow's limit on a parameter's length
_BATCH = {"metrics": 1000, "params": 100}  # MLflow's limits on one log_batch

_WORKER_ENV = {  # what the user has set wins
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the spool is the retry
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
    "OMP_NUM_THREADS": "1",
}


# ---------------------------------------------------------------- the side that trains


class Tracker:
    """The parent run of a pipeline run (or of a search study), and its stage's way to log.

    root: the project's directory; params: the resolved parameters, nested as they are; uri: the
    tracking store, else MLFLOW_TRACKING_URI, else ``<root>/mlflow.db`` with its artifacts in
    ``<root>/mlruns``; "none" logs nothing. experiment and name: as MLflow shows them. wait:
    the most seconds that `finish` waits for the store.

    As a context manager it finishes the run: FAILED on an exception, KILLED on Ctrl-C.
    Nothing here raises because of MLflow.
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
        self.root = Path(root).resolve()
        self.uri = resolve_uri(self.root, uri)
        self.key = _identity(params, self.uri, experiment)
        self.wait = wait
        self._experiment = experiment
        self._tags = _tags(self.root)
        self._worker: subprocess.Popen[bytes] | None = None
        self._broken = self.uri == NOWHERE
        self._open = True
        label = name or os.environ.get("DVC_EXP_NAME") or "pipeline"
        self._put(None, "start", name=f"{label}-{self.key[:6]}", params=_flat(params))

    def model(self, name: str, params: Mapping[str, Any]) -> ModelRun:
        """The child run of the model `name`: begun, or the one it has in this parent."""
        self._put(name, "start", name=name, params=_flat(params))
        return ModelRun(self, name)

    def metrics(self, values: Mapping[str, float | None]) -> None:
        """Logs figures of the whole run."""
        self._put(None, "metrics", values=_numbers(values), step=None)

    def artifact(self, path: Path | str, folder: str | None = None) -> None:
        """Attaches a file, or a directory's contents, as it is when it is carried over."""
        self._put(None, "artifact", path=str(Path(path).resolve()), folder=folder)

    def finish(self, status: str = "FINISHED") -> bool:
        """Ends the stage's part of the run; True if the store now has everything.

        Waits at most `wait` seconds for what is under way. What is left stays in the spool.
        """
        if not self._open:
            return True
        self._put(None, "end", status=status)
        self._open = False
        worker, self._worker = self._worker, None
        if worker is None:
            return self.uri == NOWHERE
        assert worker.stdin is not None
        with contextlib.suppress(OSError):
            worker.stdin.close()  # the worker's sign to do a last round and leave
        try:
            code = worker.wait(self.wait)
            if code not in (0, 1):
                _say(f"MLflow: logging ended with {code}; what it missed is kept in the spool")
            return code == 0
        except subprocess.TimeoutExpired:
            _say(
                f"MLflow: {self.uri} is slow, not waiting longer than {self.wait:g} s; the rest "
                f"is kept in {self.root / 'checkpoints' / SPOOL} and logged by the next stage"
            )
            worker.terminate()  # it keeps what is not yet logged
            try:
                worker.wait(5)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
            return False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.finish(_status(kind))

    def _put(self, model: str | None, op: str, **entry: Any) -> None:
        if self._broken:
            return
        if not self._open:
            _say(f"MLflow: {op} of {model or 'the run'} after its tracker had finished; dropped")
            return
        entry |= {"op": op, "uri": self.uri, "key": self.key, "model": model}
        entry |= {"id": uuid.uuid4().hex, "time": int(time.time() * 1000)}
        if op == "start":
            entry |= {"experiment": self._experiment, "tags": self._tags}
        try:
            _append(self.root, entry)
            if self._worker is None:
                self._worker = _follow(self.root)
            assert self._worker.stdin is not None
            os.write(self._worker.stdin.fileno(), b"\n")
        except (BlockingIOError, BrokenPipeError):
            pass  # the worker is busy or gone: the entry is in the spool
        except OSError as error:  # a full disk must not stop a training run
            self._broken = True
            _say(f"MLflow: cannot log any more ({error}); going on without")


class ModelRun:
    """The child run of one model. Get it from `Tracker.model`."""

    def __init__(self, tracker: Tracker, name: str) -> None:
        self.name = name
        self._tracker = tracker
        self._open = True

    def epoch(self, epoch: int, metrics: Mapping[str, float | None]) -> None:
        """Logs an epoch's figures (names: `METRICS`; None is left out). Returns at once."""
        self._tracker._put(self.name, "metrics", values=_numbers(metrics), step=int(epoch))

    def history(self, epochs: Iterable[Mapping[str, float | None]]) -> None:
        """Logs the curve of a model that an earlier run trained (a cached stage).

        epochs: objects with "epoch" and figures. Nothing happens if the run has a curve.
        """
        rows = [[int(row["epoch"] or 0), _numbers(row)] for row in epochs]
        self._tracker._put(self.name, "history", rows=rows)

    def metrics(self, values: Mapping[str, float | None]) -> None:
        """Logs final figures: at the last epoch's step, so that MLflow shows these."""
        self._tracker._put(self.name, "metrics", values=_numbers(values), step=None)

    def artifact(self, path: Path | str, folder: str | None = None) -> None:
        """Attaches a file, or a directory's contents, as it is when it is carried over."""
        path = str(Path(path).resolve())
        self._tracker._put(self.name, "artifact", path=path, folder=folder)

    def finish(self, status: str = "FINISHED") -> None:
        """Ends the run: FINISHED, FAILED or KILLED."""
        if self._open:
            self._open = False
            self._tracker._put(self.name, "end", status=status)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.finish(_status(kind))


def resolve_uri(root: Path, uri: str | None = None) -> str:
    """The tracking store: uri, else MLFLOW_TRACKING_URI, else mlflow.db of the project.

    A relative sqlite path is relative to the project. The temporary folder in which `dvc exp run
    --queue` runs an experiment counts as the project it belongs to, or its store would vanish.
    """
    root = Path(root).resolve()
    for parent in root.parents:
        if parent.parts[-3:] == (".dvc", "tmp", "exps"):
            root = parent.parents[2]
            break
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    if uri.startswith("sqlite:///"):
        return f"sqlite:///{root / uri.removeprefix('sqlite:///')}"
    return uri


def _identity(params: Mapping[str, Any], uri: str, experiment: str) -> str:
    name = os.environ.get("DVC_EXP_NAME", "")
    text = json.dumps([params, name, uri, experiment], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _flat(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """{"a": {"b": 1}} as {"a.b": "1"}: MLflow's parameters are a flat table of text."""
    flat: dict[str, str] = {}
    for name, value in params.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            flat[f"{prefix}{name}"] = text[:_VALUE]
    return flat


def _numbers(values: Mapping[str, float | None]) -> dict[str, float]:
    numbers = {k: float(v) for k, v in values.items() if v is not None and k != "epoch"}
    if "file_bytes" in numbers:
        numbers.setdefault("file_kib", numbers["file_bytes"] / 1024)
    first = {name: numbers.pop(name) for name in METRICS if name in numbers}
    return first | numbers


def _tags(root: Path) -> dict[str, str]:
    """Where the run comes from: git, DVC, and this package's version."""

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *args], capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    tags = {"mlflow.source.name": Path(sys.argv[0]).name, "mlflow.source.type": "LOCAL"}
    if commit := git("rev-parse", "HEAD"):
        tags["mlflow.source.git.commit"] = commit
        tags["git.dirty"] = str(bool(git("status", "--porcelain", "--untracked-files=no"))).lower()
    for name in ("DVC_STAGE", "DVC_EXP_NAME", "DVC_EXP_BASELINE_REV"):
        if value := os.environ.get(name):
            tags[name] = value
    try:
        tags["bnncore.version"] = metadata.version("bnncore")
    except metadata.PackageNotFoundError:
        tags["bnncore.version"] = "unknown"
    return tags


def _status(kind: type[BaseException] | None) -> str:
    if kind is None:
        return "FINISHED"
    return "FAILED" if issubclass(kind, Exception) else "KILLED"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _follow(root: Path) -> subprocess.Popen[bytes]:
    package = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    worker = subprocess.Popen(
        [sys.executable, "-m", "bnncore.tracking", "--follow", "--root", str(root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env=_WORKER_ENV | os.environ | {"PYTHONPATH": path},
    )
    assert worker.stdin is not None
    os.set_blocking(worker.stdin.fileno(), False)
    return worker


# ---------------------------------------------------------------- the spool


@contextlib.contextmanager
def _lock(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Holds a file lock; yields False if another process has it and wait is False."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def _append(root: Path, entry: Mapping[str, Any]) -> None:
    folder = root / "checkpoints"
    with _lock(folder / "mlflow-spool.lock"), open(folder / SPOOL, "ab+") as file:
        line = json.dumps(entry).encode() + b"\n"
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # a writer died in the middle of its line
                line = b"\n" + line
        file.write(line)


def drain(root: Path | str, store: _Store | None = None) -> int:
    """Carries the spool to the tracking stores it names; returns the entries left in it.

    Entries of one store go in order and stop at the first that fails; other stores go on. Only
    one process drains at a time: with another at it, returns how many entries there are now.
    """
    root = Path(root).resolve()
    folder = root / "checkpoints"
    spool = folder / SPOOL
    if not spool.exists():
        return 0
    with _lock(folder / "mlflow-drain.lock", wait=False) as mine:
        with _lock(folder / "mlflow-spool.lock"):
            read = spool.read_bytes()
        lines = [line for line in read.split(b"\n") if line]
        if not mine:
            return len(lines)
        store = store or _Store(root)
        store.load()
        kept: list[bytes] = []
        todo = _merged(lines)
        try:
            while todo:
                entry, source = todo[0]
                if not store.apply(entry):
                    kept += source
                todo.pop(0)
        finally:  # also when told to stop in the middle of a call
            kept += [line for _, source in todo for line in source]
            with _lock(folder / "mlflow-spool.lock"):
                rest = b"".join(line + b"\n" for line in kept)
                rest += spool.read_bytes()[len(read) :]
                new = spool.with_suffix(".new")
                new.write_bytes(rest)
                os.replace(new, spool)
        return len(rest.splitlines())


def _merged(lines: list[bytes]) -> list[tuple[dict[str, Any], list[bytes]]]:
    """The entries in order; metrics of one run between two other entries become one batch."""
    merged: list[tuple[dict[str, Any], list[bytes]]] = []
    batches: dict[tuple[str, str | None], int] = {}
    for line in lines:
        try:
            entry = json.loads(line)
            run = (entry["key"], entry["model"])
        except (ValueError, KeyError, TypeError):
            _say(f"MLflow: a broken line of {len(line)} bytes in the spool is left out")
            continue
        if entry["op"] != "metrics":
            batches.clear()
            merged.append((entry, [line]))
            continue
        entry["rows"] = [[entry.pop("step"), entry.pop("values"), entry["time"]]]
        if run in batches:
            batch, source = merged[batches[run]]
            batch["rows"] += entry["rows"]
            source.append(line)
        else:
            batches[run] = len(merged)
            merged.append((entry, [line]))
    return merged


# ---------------------------------------------------------------- the side that knows MLflow


class _Store:
    """Applies entries to tracking stores, and keeps `STATE`, which run is whose."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.path = root / "checkpoints" / STATE
        self.state: dict[str, dict[str, Any]] = {}
        self.rest: dict[str, float] = {}  # store -> not before this time.monotonic()
        self._clients: dict[str, Any] = {}
        self._experiments: dict[tuple[str, str], str] = {}
        self._said: set[str] = set()

    def load(self) -> None:
        try:
            self.state = json.loads(self.path.read_text())
        except FileNotFoundError:
            self.state = {}
        except ValueError:
            self.say(f"MLflow: {self.path} is not JSON; going on in new runs")
            self.state = {}

    def save(self) -> None:
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.state, indent=1))
        os.replace(new, self.path)

    def say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            _say(text)

    def apply(self, entry: dict[str, Any]) -> bool:
        """True if the entry is done with; False if its store is away."""
        uri = entry["uri"]
        begun = time.monotonic()
        if begun < self.rest.get(uri, 0):
            return False
        try:
            getattr(self, f"_{entry['op']}")(self._client(uri), entry)
        except Exception as error:  # whatever the store's trouble, training must not feel it
            if _refused(error):
                what = f"{entry['op']} of {entry['model'] or 'the run'}"
                self.say(f"MLflow: {uri} refuses {what}, left out: {_brief(error)}")
                return True
            # A server that hangs is asked again later than one that is not there.
            now = time.monotonic()
            self.rest[uri] = now + min(max(4 * (now - begun), 1.0), 30.0)
            if uri not in self._said:
                self._said.add(uri)
                _say(
                    f"MLflow: {uri} does not answer ({_brief(error)}). Training goes on; what it "
                    f"misses is kept in {self.path.with_name(SPOOL)} and logged when it answers: "
                    f"by the next stage, or by python -m bnncore.tracking --flush"
                )
            return False
        self.rest.pop(uri, None)
        return True

    def _client(self, uri: str) -> Any:
        if uri not in self._clients:
            for name, value in _WORKER_ENV.items():
                os.environ.setdefault(name, value)
            import logging

            from mlflow.tracking import MlflowClient

            for name in ("mlflow", "alembic"):
                logging.getLogger(name).setLevel(logging.ERROR)
            if not uri.startswith("sqlite:///"):
                self._clients[uri] = MlflowClient(uri)
            else:
                # A fresh database is built by whoever opens it first: one at a time.
                path = Path(uri.removeprefix("sqlite:///"))
                with _lock(path.with_name(path.name + ".lock")):
                    client = MlflowClient(uri)
                    client.search_experiments(max_results=1)
                self._clients[uri] = client
        return self._clients[uri]

    def _experiment(self, client: Any, uri: str, name: str) -> str:
        if (uri, name) not in self._experiments:
            found = client.get_experiment_by_name(name)
            if found is None:
                place = None  # a server's own business
                if uri.startswith("sqlite:///"):
                    place = str(Path(uri.removeprefix("sqlite:///")).with_name("mlruns"))
                try:
                    identity = client.create_experiment(name, artifact_location=place)
                except Exception:  # another process was first
                    found = client.get_experiment_by_name(name)
                    if found is None:
                        raise
            if found is not None:
                identity = found.experiment_id
                if found.lifecycle_stage == "deleted":
                    client.restore_experiment(identity)
            self._experiments[uri, name] = identity
        return self._experiments[uri, name]

    def _run(self, entry: dict[str, Any]) -> dict[str, Any]:
        parent = self.state.setdefault(entry["key"], {"uri": entry["uri"], "children": {}})
        if entry["model"] is None:
            return parent
        return parent["children"].setdefault(entry["model"], {})

    def _start(self, client: Any, entry: dict[str, Any]) -> None:
        run = self._run(entry)
        tags = dict(entry["tags"])
        old = _alive(client, run.get("run_id"))
        if old is None:
            experiment = self._experiment(client, entry["uri"], entry["experiment"])
            tags["bnncore.entry"] = entry["id"]
            if entry["model"] is None:
                run["experiment_id"] = experiment
                run["children"] = {}  # of a run that is no more
            else:
                run.clear()
                tags["mlflow.parentRunId"] = self.state[entry["key"]]["run_id"]
                tags["bnncore.model"] = entry["model"]
            # Begun by a process that was killed before it could write down the run's id?
            found = client.search_runs(
                [experiment], f"tags.`bnncore.entry` = '{entry['id']}'", max_results=1
            )
            old = found[0] if found else None
            if old is None:
                new = client.create_run(experiment, entry["time"], tags, entry["name"])
                run["run_id"] = new.info.run_id
            else:
                run["run_id"] = old.info.run_id
        else:
            client.update_run(run["run_id"], status="RUNNING")
            if entry["model"] is None:  # a child keeps the tags of the stage that trained it
                self.state[entry["key"]] = self.state.pop(entry["key"])  # the last one logged
                _log(client, run["run_id"], tags=tags)
        self.save()
        known = old.data.params if old is not None else {}
        params = entry["params"]
        if changed := sorted(k for k in params.keys() & known.keys() if params[k] != known[k]):
            k = changed[0]
            self.say(
                f"MLflow: parameter {k} of {entry['name']} is logged as {known[k]!r} already and "
                f"cannot become {params[k]!r} ({len(changed)} such)"
            )
        _log(client, run["run_id"], params={k: v for k, v in params.items() if k not in known})

    def _metrics(self, client: Any, entry: dict[str, Any]) -> None:
        run = self._run(entry)
        steps = [step for step, *_ in entry["rows"] if step is not None]
        # From its first epoch again, not going on from a checkpoint?
        if steps and run.get("finished") and min(steps) <= run.get("first", -1):
            self._replace(client, entry, run)
        last = run.get("epoch")
        rows: list[tuple[str, float, int, int]] = []
        for step, values, moment in entry["rows"]:
            if step is not None:
                last = step if last is None else max(last, step)
            rows += [
                (k, v, moment, (last or 0) if step is None else step) for k, v in values.items()
            ]
        _log(client, run["run_id"], metrics=rows)
        if steps:
            run["epoch"] = last
            run.setdefault("first", min(steps))
        if len(steps) < len(entry["rows"]):
            run["final"] = True  # it is a result, not only a curve
        self.save()

    def _history(self, client: Any, entry: dict[str, Any]) -> None:
        if self._run(entry).get("epoch") is None and entry["rows"]:
            rows = [[step, values, entry["time"]] for step, values in entry["rows"]]
            self._metrics(client, entry | {"rows": rows})

    def _replace(self, client: Any, entry: dict[str, Any], run: dict[str, Any]) -> None:
        """Gives a model that is trained anew a fresh run in place of its finished one."""
        old = client.get_run(run["run_id"])
        tags = {k: v for k, v in old.data.tags.items() if k != "mlflow.log-model.history"}
        name = old.info.run_name
        new = client.create_run(old.info.experiment_id, entry["time"], tags, name)
        _log(client, new.info.run_id, params=old.data.params)
        client.delete_run(run["run_id"])  # to the trash: `mlflow gc` empties it
        run.clear()
        run["run_id"] = new.info.run_id
        self.save()

    def _artifact(self, client: Any, entry: dict[str, Any]) -> None:
        path = Path(entry["path"])
        if not path.exists():
            raise FileNotFoundError(f"{path} is not there any more")
        log = client.log_artifacts if path.is_dir() else client.log_artifact
        log(self._run(entry)["run_id"], str(path), entry["folder"])

    def _end(self, client: Any, entry: dict[str, Any]) -> None:
        run = self._run(entry)
        client.set_terminated(run["run_id"], entry["status"], entry["time"])
        run["finished"] = entry["status"] == "FINISHED"
        self.save()


def _alive(client: Any, run_id: str | None) -> Any | None:
    """The run, unless the store has none of that id or has it in the trash."""
    if run_id is None:
        return None
    try:
        run = client.get_run(run_id)
    except Exception as error:
        if getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    return run if run.info.lifecycle_stage == "active" else None


def _log(
    client: Any,
    run_id: str,
    metrics: Iterable[tuple[str, float, int, int]] = (),
    params: Mapping[str, str] | None = None,
    tags: Mapping[str, str] | None = None,
) -> None:
    """log_batch in pieces that MLflow accepts; metrics: (name, value, time in ms, step)."""
    from mlflow.entities import Metric, Param, RunTag

    rows = [Metric(*row) for row in metrics]
    for i in range(0, len(rows), _BATCH["metrics"]):
        client.log_batch(run_id, metrics=rows[i : i + _BATCH["metrics"]])
    table = [Param(k, v) for k, v in (params or {}).items()]
    for i in range(0, len(table), _BATCH["params"]):
        client.log_batch(run_id, params=table[i : i + _BATCH["params"]])
    if tags:
        client.log_batch(run_id, tags=[RunTag(k, v) for k, v in tags.items()])


def merge(folder: Path, root: Path, job: str, uri: str | None = None) -> int:
    """Copy the runs of a job's MLflow store into the store of here; returns how many came.

    Artifacts come along. Runs that an earlier call has brought are left as they are.

    Args:
        folder: what a job brought, with its ``mlflow.db`` and ``mlruns``; nothing without these.
        root: the project.
        job: the job's id, which the runs are tagged with.
        uri: as `params.MlflowParams.uri`.
    """
    uri = resolve_uri(root, uri)
    if not (folder / "mlflow.db").exists() or uri == NOWHERE:
        return 0
    store = _Store(root)
    theirs = store._client(f"sqlite:///{(folder / 'mlflow.db').resolve()}")
    ours = store._client(uri)
    new: dict[str, str] = {}
    count = 0
    for experiment in theirs.search_experiments():
        runs = theirs.search_runs([experiment.experiment_id], max_results=10_000)
        if not runs:
            continue
        place = store._experiment(ours, uri, experiment.name)
        # A parent's id must be known before its children are made.
        for run in sorted(runs, key=lambda r: "mlflow.parentRunId" in r.data.tags):
            info, identity, tags = run.info, run.info.run_id, dict(run.data.tags)
            tags |= {"bnncore.job": job, "bnncore.job_run": identity}
            if parent := tags.get("mlflow.parentRunId"):
                tags["mlflow.parentRunId"] = new.get(parent, parent)
            known = ours.search_runs([place], f"tags.`bnncore.job_run` = '{identity}'")
            if known:
                new[identity] = known[0].info.run_id
                continue
            made = ours.create_run(place, info.start_time, tags, info.run_name).info.run_id
            new[identity] = made
            rows = [
                (m.key, m.value, m.timestamp, m.step)
                for name in run.data.metrics
                for m in theirs.get_metric_history(identity, name)
            ]
            _log(ours, made, rows, run.data.params)
            if (files := folder / "mlruns" / identity / "artifacts").is_dir():
                ours.log_artifacts(made, str(files))
            ours.set_terminated(made, info.status, info.end_time)
            count += 1
    return count


def _refused(error: Exception) -> bool:
    """Whether the store answered and will not change its mind, so that asking again is vain."""
    final = {
        "INVALID_PARAMETER_VALUE",
        "BAD_REQUEST",
        "INVALID_STATE",
        "RESOURCE_ALREADY_EXISTS",
        "RESOURCE_DOES_NOT_EXIST",
    }
    gone = isinstance(error, FileNotFoundError | KeyError)  # KeyError: an entry of no run
    return gone or getattr(error, "error_code", None) in final


def _brief(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


# ---------------------------------------------------------------- the background process


def _serve(root: Path, wake: IO[bytes]) -> int:
    """Drains the spool whenever a byte arrives on `wake`, until its end; the entries left."""
    store = _Store(root)
    descriptor = wake.fileno()
    left, ended = 0, False
    parent = os.getppid()
    while not ended:
        # With entries left, look again when their store may have come back.
        ready, _, _ = select.select([descriptor], [], [], 1.0 if left else 10.0)
        if ready:
            ended = os.read(descriptor, 65536) == b""
        # A child that the stage forked may hold the pipe open after the stage is gone.
        ended = ended or os.getppid() != parent
        left = drain(root, store)
        if not ended and ready:
            time.sleep(0.5)  # entries come in bursts: take them together
    # A store that refused at once gets a last try; one that hangs had its time.
    pause = max(store.rest.values(), default=0.0) - time.monotonic()
    if left and pause <= 1.0:
        time.sleep(max(pause, 0.0))
        left = drain(root, store)
    while left and not store.rest:  # another process is draining: it may leave some to us
        time.sleep(0.5)
        left = drain(root, store)
    return left


def compare_path(root: Path | str) -> str | None:
    """The path, in MLflow's pages, that compares the models of the run logged last.

    Those with final figures, or all where none has any (their curves can be compared).
    """
    try:
        state = json.loads((Path(root) / "checkpoints" / STATE).read_text())
        parent = list(state.values())[-1]
        children = list(parent["children"].values())
        final = [child for child in children if child.get("final")]
        runs = [child["run_id"] for child in final or children]
        experiment = parent["experiment_id"]
    except (OSError, ValueError, LookupError):
        return None

    def ids(values: list[str]) -> str:
        return quote(json.dumps(values))

    return f"/#/compare-runs?runs={ids(runs)}&experiments={ids([experiment])}"


def _ui(root: Path, port: int) -> None:
    """Becomes `mlflow ui` on loopback, with one worker (a third of the memory and time)."""
    uri = resolve_uri(root)
    path = compare_path(root)
    where = f"http://127.0.0.1:{port}"
    if not uri.startswith("sqlite:"):
        print(f"The runs are at {uri}")
        return
    print(f"MLflow: {where} (Ctrl-C ends it)")
    if path:
        print(f"The last run's models compared: {where}{path}")
    sys.stdout.flush()
    mlflow = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri, "--workers", "1"]
    mlflow += ["--host", "127.0.0.1", "--port", str(port)]
    mlflow += ["--default-artifact-root", str(root / "mlruns")]
    cheap = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    os.execve(sys.executable, mlflow, cheap | dict(os.environ))


def _stop(*_: object) -> None:
    raise SystemExit(2)  # through drain's finally, which keeps what is not logged


def main(argv: list[str] | None = None) -> int:
    """Command line: --flush carries over what is spooled, --ui shows the runs."""
    parser = argparse.ArgumentParser(prog="python -m bnncore.tracking", description=main.__doc__)
    do = parser.add_mutually_exclusive_group(required=True)
    do.add_argument("--flush", action="store_true", help="log what tracking servers have missed")
    do.add_argument("--ui", action="store_true", help="MLflow's pages on 127.0.0.1")
    do.add_argument("--follow", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, default=Path(), help="the project's directory")
    parser.add_argument("--port", type=int, default=5000, help="for --ui")
    args = parser.parse_args(argv)
    root = args.root.resolve()
    if args.ui:
        _ui(root, args.port)
        return 0
    signal.signal(signal.SIGTERM, _stop)
    if args.follow:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the stage's; it then ends us
        return 1 if _serve(root, sys.stdin.buffer) else 0
    left = drain(root)
    print(f"{left} entries left in {root / 'checkpoints' / SPOOL}" if left else "all is logged")
    return 1 if left else 0
