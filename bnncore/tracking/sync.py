"""The side that knows MLflow: it brings a tracking store to what the files of `runs` say.

A run is found by its tag ``bnncore.run``, and what it lacks is sent. So this may be killed at any
moment and done again. A file that the store has is copied to ``*.synced``, which only saves work.

A model that is trained anew gets a fresh run (tag ``bnncore.generation``: when its first epoch was
finished), so that a comparison shows each model once; the run before goes to MLflow's trash.

Needs POSIX (fcntl).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bnncore.tracking.runs import NOWHERE, PARENT, digest, folder_of, resolve_uri, say, write

_BATCH = 100  # MLflow's limit on parameters at once; metrics could be 1,000
# What the store has refused with these it would refuse again.
_FINAL = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "INVALID_STATE", "RESOURCE_DOES_NOT_EXIST"}
# MLflow 3 shows it as networks that are trained rather than as an application of language models.
_KIND = ("mlflow.experimentKind", "custom_model_development")
_ENVIRONMENT = {  # what the user has set wins
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the files are the retry
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
    "OMP_NUM_THREADS": "1",
}


def sync(root: Path | str, store: Store | None = None, wait: bool = True) -> int:
    """Bring the tracking stores to what the project's files say; returns the runs left.

    Args:
        wait: for another process that is at it; else what it is at counts as left.
    """
    store = store or Store()
    return sum(store.carry(parent.parent, wait) for parent in folder_of(root).glob(f"*/{PARENT}"))


def merge(folder: Path, root: Path, job: str, uri: str | None = None) -> int:
    """Take over the runs that a job logged into a sqlite store of its own; how many came.

    Their files are what is read, so that a store that is away gets them later.

    Args:
        folder: what the job brought, with its ``checkpoints/mlflow``; nothing without it.
        root: the project.
        job: the job's id, which the runs are tagged with.
        uri: as `params.MlflowParams.uri`.
    """
    uri, came = resolve_uri(root, uri), 0
    for parent in folder_of(folder).glob(f"*/{PARENT}"):
        theirs = parent.parent
        if uri == NOWHERE or not json.loads(parent.read_bytes())["uri"].startswith("sqlite:"):
            continue
        ours = folder_of(root) / digest([theirs.name, uri])
        (theirs / "files").mkdir(exist_ok=True)
        shutil.copytree(theirs / "files", ours / "files", dirs_exist_ok=True)
        with _locked(ours):
            for path in theirs.glob("*.json"):
                run = json.loads(path.read_bytes()) | {"uri": uri}
                place, first = ours / path.name, job
                if place.exists():
                    first = json.loads(place.read_bytes())["tags"]["bnncore.job"]
                else:
                    came += 1
                run["tags"]["bnncore.job"] = first
                write(place, json.dumps(run).encode())
        Store().carry(ours)
    return came


class Store:
    """The tracking stores, as far as this process has come to know them."""

    def __init__(self) -> None:
        self._known: dict[Path, int] = {}  # files that the store has, and their times
        self._clients: dict[str, Any] = {}
        self._rows: dict[tuple[str, str], set[tuple[int, float]]] = {}  # of a run's metric
        self._rest: dict[str, float] = {}  # store -> not before this time.monotonic()
        self._said: set[str] = set()

    def carry(self, folder: Path, wait: bool = True) -> int:
        """Bring the store to a folder of runs; returns how many it still misses something of."""
        times = {path: path.stat().st_mtime_ns for path in folder.glob("*.json")}
        if all(self._known.get(path) == found for path, found in times.items()):
            return 0
        with _locked(folder, wait) as mine:
            todo = {path: path.read_bytes() for path in sorted(times)}
            todo = {path: now for path, now in todo.items() if now != _synced(path)}
            if todo:
                parent = json.loads((folder / PARENT).read_bytes())
                uri, begun = parent["uri"], time.monotonic()
                if not mine or begun < self._rest.get(uri, 0):
                    return len(todo)
                try:
                    self._bring(folder, parent, todo)
                except Exception as error:  # whatever the trouble, training must not feel it
                    # A server that hangs is asked again later than one that is not there.
                    hung = time.monotonic() - begun
                    self._rest[uri] = time.monotonic() + min(max(4 * hung, 1.0), 30.0)
                    self._rows.clear()
                    self._say(
                        f"{uri} does not answer",
                        f"({_brief(error)}). Training goes on; what it misses is kept in {folder} "
                        "and logged when it answers: by the next stage, or by "
                        "python -m bnncore.tracking --flush",
                    )
                    return len(todo)
            self._known |= times
            return 0

    def _say(self, what: str, more: str) -> None:
        if what not in self._said:
            self._said.add(what)
            say(f"{what} {more}")

    def _bring(self, folder: Path, parent: dict[str, Any], todo: dict[Path, bytes]) -> None:
        client, parent_id = self.client(parent["uri"]), None
        place = _experiment(client, parent)
        for path in dict.fromkeys([folder / PARENT, *todo]):
            wanted = json.loads(todo[path]) if path in todo else parent
            tags = wanted["tags"] | {
                "bnncore.run": digest([folder.name, wanted["model"]]),
                "bnncore.generation": str(wanted["generation"] or ""),
            }
            if wanted["final"]:
                tags["bnncore.final"] = "true"
            if parent_id:
                tags |= {"mlflow.parentRunId": parent_id, "bnncore.model": wanted["model"]}
            run, made = _run(client, place, wanted, tags)
            parent_id = parent_id or run.info.run_id
            if path in todo or made:
                had = {} if made else json.loads(_synced(path) or "{}").get("files", {})
                self._fill(client, run, wanted, tags)
                if "dataset" in parent and not (run.inputs and run.inputs.dataset_inputs):
                    with self._refusals(f"the data set of {wanted['name']}"):
                        _log_dataset(client, run, parent["dataset"])
                for name, kept in wanted["files"].items():
                    if had.get(name) != kept:
                        self._attach(client, run, folder / "files" / kept, name)
                if wanted["status"] != "RUNNING":
                    client.set_terminated(run.info.run_id, wanted["status"], _ms(wanted["ended"]))
                elif run.info.status != "RUNNING":
                    client.update_run(run.info.run_id, status="RUNNING")
            if path in todo:
                with contextlib.suppress(OSError):  # a full disk: it is looked up again then
                    write(path.with_suffix(".synced"), todo[path])

    def _fill(self, client: Any, run: Any, wanted: dict[str, Any], tags: dict[str, str]) -> None:
        """Log the parameters, tags and rows that a run has not."""
        # MLflow takes 2 s to import, and the process that trains must never have it.
        from mlflow.entities import Metric, Param, RunTag

        run_id, name, had = run.info.run_id, wanted["name"], run.data.params
        for key, text in wanted["params"].items():
            if had.get(key, text) != text:
                self._say(
                    f"parameter {key} of {name}",
                    f"is logged as {had[key]!r} already and cannot become {text!r}",
                )
        metrics = []
        for metric, rows in wanted["rows"].items():
            known = self._rows.setdefault((run_id, metric), set())
            if not known and metric in run.data.metrics:
                known |= {(m.step, m.value) for m in client.get_metric_history(run_id, metric)}
            for step, (value, moment) in rows.items():
                if (int(step), value) not in known:
                    known.add((int(step), value))
                    metrics.append(Metric(metric, value, _ms(moment), int(step)))
        params = [Param(k, v) for k, v in wanted["params"].items() if k not in had]
        new = [RunTag(k, v) for k, v in tags.items() if run.data.tags.get(k) != v]
        for i in range(0, max(len(metrics), len(params), len(new)), _BATCH):
            piece = slice(i, i + _BATCH)
            with self._refusals(name):
                client.log_batch(run_id, metrics[piece], params[piece], new[piece])

    def _attach(self, client: Any, run: Any, path: Path, name: str) -> None:
        with self._refusals(f"{name} of {run.info.run_name}"):
            folder = os.path.dirname(name) or None
            client.log_artifact(run.info.run_id, str(path), folder)

    @contextlib.contextmanager
    def _refusals(self, what: str) -> Iterator[None]:
        """Passes over what the store refuses and would refuse again."""
        try:
            yield
        except Exception as error:
            if getattr(error, "error_code", None) not in _FINAL:
                raise
            self._say(f"{what} is refused by the store,", f"left out: {_brief(error)}")

    def client(self, uri: str) -> Any:
        """MLflow's client of a store. A sqlite file that is not there is made whole or not."""
        if uri in self._clients:
            return self._clients[uri]
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from mlflow.tracking import MlflowClient  # lazily: see _fill

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        path = Path(uri.removeprefix("sqlite:///"))
        if uri.startswith("sqlite:///") and not path.exists():
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=".mlflow-") as folder:
                new = Path(folder) / path.name
                MlflowClient(f"sqlite:///{new}").search_experiments(max_results=1)
                with contextlib.suppress(FileExistsError):  # another process was first
                    os.link(new, path)
        self._clients[uri] = MlflowClient(uri)
        return self._clients[uri]


def _experiment(client: Any, parent: dict[str, Any]) -> str:
    """The id of the experiment, which is made, or taken out of the trash, if need be."""
    name, uri = parent["experiment"], parent["uri"]
    found = client.get_experiment_by_name(name)
    if found is None:
        folder = None  # a server's own business
        if uri.startswith("sqlite:///"):
            folder = str(Path(uri.removeprefix("sqlite:///")).with_name("mlruns"))
        try:
            client.create_experiment(name, folder)
        except Exception:  # another process was first?
            if client.get_experiment_by_name(name) is None:
                raise
        found = client.get_experiment_by_name(name)
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    if _KIND[0] not in found.tags:
        client.set_experiment_tag(found.experiment_id, *_KIND)
    return str(found.experiment_id)


def _run(client: Any, place: str, wanted: dict[str, Any], tags: dict[str, str]) -> tuple[Any, bool]:
    """The run of these tags, and whether it had to be made; others of its name go."""
    run = None
    for other in client.search_runs([place], f"tags.`bnncore.run` = '{tags['bnncore.run']}'"):
        generation = other.data.tags.get("bnncore.generation", "")
        same = not wanted["generation"] or generation in ("", tags["bnncore.generation"])
        if run is None and same:
            run = other
        else:  # of the training before, or made twice by a server that was slow to answer
            client.delete_run(other.info.run_id)
    if run is not None:
        return run, False
    return client.create_run(place, _ms(wanted["began"]), tags, wanted["name"]), True


def _log_dataset(client: Any, run: Any, dataset: dict[str, str]) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag  # lazily: see _fill

    used = DatasetInput(
        Dataset(source_type="local", **dataset), [InputTag("mlflow.data.context", "training")]
    )
    client.log_inputs(run.info.run_id, [used])


def _synced(path: Path) -> bytes:
    """What a run's file was when the store was last brought to it."""
    with contextlib.suppress(FileNotFoundError):
        return path.with_suffix(".synced").read_bytes()
    return b""


@contextlib.contextmanager
def _locked(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Holds a folder's lock; yields False if another process has it and wait is False."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        mine = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            mine = False
        yield mine
    finally:
        os.close(descriptor)


def _ms(seconds: float) -> int:
    return round(1000 * seconds)


def _brief(error: Exception) -> str:
    text = (str(error).splitlines() or [""])[0].strip() or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
