"""The side that knows MLflow: it brings a tracking store to what the logs say.

A log is folded into what each run shall be; the run is found by its tag ``bnncore.run``, and what
it lacks is sent. So this may be killed at any moment and done again. A line ``{"op": "synced",
"to": bytes}`` in a log says how much of it the store has, which only saves work.

A model that is trained anew gets a fresh run (tag ``bnncore.generation``: when its first epoch was
finished), so that a comparison shows each model once; the run before goes to MLflow's trash.

Needs POSIX (fcntl).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bnncore.tracking.log import append, digest, folder_of, say

Entry = dict[str, Any]

_BATCH = 100  # MLflow's limit on parameters at once; metrics could be 1,000
# What the store has refused with these it would refuse again.
_FINAL = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "INVALID_STATE", "RESOURCE_DOES_NOT_EXIST"}
# MLflow 3 shows it as networks that are trained rather than as an application of language models.
_KIND = ("mlflow.experimentKind", "custom_model_development")
_ENVIRONMENT = {  # what the user has set wins
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the log is the retry
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
    "OMP_NUM_THREADS": "1",
}


def sync(root: Path | str, store: Store | None = None, wait: bool = True) -> int:
    """Bring the tracking stores to what the project's logs say; returns the entries left.

    Args:
        wait: for another process that is at a log; else what it is at counts as left.
    """
    store = store or Store()
    return sum(store.carry(log, wait) for log in sorted(folder_of(root).glob("*.jsonl")))


@dataclass
class Wanted:
    """What a run shall be."""

    about: Entry  # the start of the stage that trained it: name, time, tags
    params: dict[str, str]
    generation: float = 0.0  # when its first epoch was finished; 0: it has no curve
    first: int = 0  # epoch
    last: int = 0
    rows: dict[str, dict[int, tuple[float, float]]] = field(default_factory=dict)
    final: bool = False  # it is a result, not only a curve
    files: list[Entry] = field(default_factory=list)
    status: str = "RUNNING"
    end: float = 0.0


def fold(entries: list[Entry]) -> dict[str | None, Wanted]:
    """What each run shall be, by model; None: the parent run."""
    runs: dict[str | None, Wanted] = {}
    starts: dict[str | None, Entry] = {}
    for entry in entries:
        model, now = entry["model"], entry["time"]
        start = starts.get(model, {"name": model, "tags": {}, "params": {}, "time": now})
        run = runs.setdefault(model, Wanted(start, {}))
        match entry["op"]:
            case "start":
                starts[model] = entry
                run.status = "RUNNING"
                run.params |= entry["params"]
                if not run.generation:
                    run.about = entry
            case "epochs" if entry["rows"]:
                first, moment, _ = entry["rows"][0]
                if run.generation and not moment:
                    continue  # a cached curve of a run that has one
                if run.generation and first <= run.first and moment != run.generation:
                    run = runs[model] = Wanted(start, dict(start["params"]))  # trained anew
                if not run.generation:
                    run.generation, run.first = moment or now, first
                for step, moment, values in entry["rows"]:
                    run.last = max(run.last, step)
                    for name, value in values.items():
                        run.rows.setdefault(name, {}).setdefault(step, (value, moment or now))
            case "figures":
                run.final = True
                for name, value in entry["values"].items():
                    had = run.rows.setdefault(name, {})
                    last = max(had, default=-1)
                    if not had or not _same(had[last][0], value):
                        had[max(last + 1, run.last)] = (value, now)
            case "file":
                run.files.append(entry)
            case "end":
                run.status, run.end = entry["status"], now
    return runs


def read(log: Path) -> list[Entry]:
    """A log's entries, with "to", the bytes up to their end; "fresh": the store may lack them."""
    entries: list[Entry] = []
    position, carried = -1, 0
    for line in log.read_bytes().split(b"\n"):
        position += 1 + len(line)
        try:
            entry = json.loads(line)
        except ValueError:  # torn by a kill or a full disk, or not yet whole
            continue
        if entry["op"] == "synced":
            carried = entry["to"]
        else:
            entries.append({**entry, "to": position})
    for entry in entries:
        entry["fresh"] = entry["to"] > carried
    return entries


class Store:
    """The tracking stores, as far as this process has come to know them."""

    def __init__(self) -> None:
        self._sizes: dict[Path, int] = {}  # of logs that have nothing to carry
        self._clients: dict[str, Any] = {}
        self._rows: dict[tuple[str, str], set[tuple[int, float]]] = {}  # of a run's metric
        self._rest: dict[str, float] = {}  # store -> not before this time.monotonic()
        self._said: set[str] = set()

    def carry(self, log: Path, wait: bool = True) -> int:
        """Bring a log's runs up to it; returns the entries that the store still misses."""
        if not log.exists() or log.stat().st_size == self._sizes.get(log):
            return 0
        with locked(log, wait) as mine:
            entries = read(log)
            fresh = [entry for entry in entries if entry["fresh"]]
            if not fresh:
                self._sizes[log] = log.stat().st_size
                return 0
            uri, begun = entries[0]["uri"], time.monotonic()
            if not mine or begun < self._rest.get(uri, 0):
                return len(fresh)
            try:
                self._bring(log, entries, {entry["model"] for entry in fresh})
            except Exception as error:  # whatever the store's trouble, training must not feel it
                # A server that hangs is asked again later than one that is not there.
                hung = time.monotonic() - begun
                self._rest[uri] = time.monotonic() + min(max(4 * hung, 1.0), 30.0)
                self._rows.clear()
                self._say(
                    f"{uri} does not answer",
                    f"({_brief(error)}). Training goes on; what it misses is kept in {log} and "
                    "logged when it answers: by the next stage, or by "
                    "python -m bnncore.tracking --flush",
                )
                return len(fresh)
            with contextlib.suppress(OSError):  # a full disk: it is looked up again then
                append(log, None, "synced", to=entries[-1]["to"])
            return 0

    def _say(self, what: str, more: str) -> None:
        if what not in self._said:
            self._said.add(what)
            say(f"MLflow: {what} {more}")

    def _bring(self, log: Path, entries: list[Entry], touched: set[str | None]) -> None:
        client = self.client(entries[0]["uri"])
        place = _experiment(client, entries[0])
        parent = ""
        for model, wanted in fold(entries).items():  # the parent run is the first
            tags = wanted.about["tags"] | {
                "bnncore.run": digest([log.stem, model]),
                "bnncore.generation": str(wanted.generation or ""),
            }
            if wanted.final:
                tags["bnncore.final"] = "true"
            if model is not None:
                tags |= {"mlflow.parentRunId": parent, "bnncore.model": model}
            if model is None or model in touched:
                run, made = self._run(client, place, wanted, tags)
                self._fill(client, run, wanted, tags)
                self._attach(client, run, wanted, log.with_suffix(""), made)
                _end(client, run, wanted)
                parent = parent or run.info.run_id

    def _run(self, client: Any, place: str, wanted: Wanted, tags: dict[str, str]) -> Any:
        """The run of these tags, and whether it had to be made; others of its name go."""
        run = None
        for other in client.search_runs([place], f"tags.`bnncore.run` = '{tags['bnncore.run']}'"):
            generation = other.data.tags.get("bnncore.generation", "")
            same = not wanted.generation or generation in ("", tags["bnncore.generation"])
            if run is None and same:
                run = other
            else:  # of the training before, or made twice by a server that was slow to answer
                client.delete_run(other.info.run_id)
        if run is not None:
            return run, False
        about = wanted.about
        return client.create_run(place, _ms(about["time"]), tags, about["name"]), True

    def _fill(self, client: Any, run: Any, wanted: Wanted, tags: dict[str, str]) -> None:
        """Log the parameters, tags and rows that a run has not."""
        # MLflow takes 2 s to import, and the process that trains must never have it.
        from mlflow.entities import Metric, Param, RunTag

        run_id, name, had = run.info.run_id, wanted.about["name"], run.data.params
        for key, text in wanted.params.items():
            if had.get(key, text) != text:
                self._say(
                    f"parameter {key} of {name}",
                    f"is logged as {had[key]!r} already and cannot become {text!r}",
                )
        metrics = []
        for metric, rows in wanted.rows.items():
            known = self._rows.setdefault((run_id, metric), set())
            if not known and metric in run.data.metrics:
                known |= {(m.step, m.value) for m in client.get_metric_history(run_id, metric)}
            for step, (value, moment) in rows.items():
                if (step, value) not in known:
                    known.add((step, value))
                    metrics.append(Metric(metric, value, _ms(moment), step))
        params = [Param(k, v) for k, v in wanted.params.items() if k not in had]
        new = [RunTag(k, v) for k, v in tags.items() if run.data.tags.get(k) != v]
        for i in range(0, max(len(metrics), len(params), len(new)), _BATCH):
            piece = slice(i, i + _BATCH)
            with self._refusals(name):
                client.log_batch(run_id, metrics[piece], params[piece], new[piece])

    def _attach(self, client: Any, run: Any, wanted: Wanted, files: Path, made: bool) -> None:
        for entry in wanted.files:
            if made or entry["fresh"]:
                with self._refusals(f"{entry['path']} of {wanted.about['name']}"):
                    client.log_artifact(
                        run.info.run_id, str(files / entry["path"]), entry["folder"]
                    )

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
        from mlflow.tracking import MlflowClient  # lazily: see _run

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


def _experiment(client: Any, start: Entry) -> str:
    """The id of the experiment, which is made, or taken out of the trash, if need be."""
    name, uri = start["experiment"], start["uri"]
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


def _end(client: Any, run: Any, wanted: Wanted) -> None:
    if wanted.status != "RUNNING":
        client.set_terminated(run.info.run_id, wanted.status, _ms(wanted.end))
    elif run.info.status != "RUNNING":
        client.update_run(run.info.run_id, status="RUNNING")


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Holds a file's lock; yields False if another process has it and wait is False."""
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def _ms(seconds: float) -> int:
    return round(1000 * seconds)


def _same(a: float, b: float) -> bool:
    """Whether two figures are one, rounded by different sums."""
    return math.isclose(a, b, rel_tol=1e-6) or (math.isnan(a) and math.isnan(b))


def _brief(error: Exception) -> str:
    text = (str(error).splitlines() or [""])[0].strip() or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
