"""MLflow's pages, opened where the last run's models are compared."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from urllib.parse import quote

from bnncore.tracking.runs import NOWHERE, project, resolve_uri
from bnncore.tracking.sync import Store

# In MLflow's view of model training (else it opens that of traces), the most accurate first.
_RUNS = ("/#/experiments/{}/runs?workflowType=machine_learning&orderByAsc=false"
         "&orderByKey=metrics.%60test_top1%60")  # fmt: skip


def compare_path(root: Path | str, uri: str | None = None) -> str | None:
    """The path, in MLflow's pages, that compares the models of the run that ended last.

    Those with final figures, or all where none has any (their curves can be compared); None
    where nothing was logged.
    """
    found = pages(root, uri)
    return found and found[1]


def pages(root: Path | str, uri: str | None = None) -> tuple[str, str] | None:
    """The path of the runs of the experiment that was logged into last, and `compare_path`."""
    uri = resolve_uri(root, uri)
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        return None
    client = Store().client(uri)
    places = [experiment.experiment_id for experiment in client.search_experiments()]
    last = client.search_runs(
        places, "tags.`bnncore.run` LIKE '%'", max_results=1, order_by=["attributes.end_time DESC"]
    )
    if not last:
        return None
    parent = last[0].data.tags.get("mlflow.parentRunId", last[0].info.run_id)
    place = last[0].info.experiment_id
    models = client.search_runs([place], f"tags.`mlflow.parentRunId` = '{parent}'")
    final = [run for run in models if "bnncore.final" in run.data.tags]
    runs = quote(json.dumps([run.info.run_id for run in final or models]))
    compare = f"/#/compare-runs?runs={runs}&experiments={quote(json.dumps([place]))}"
    return _RUNS.format(place), compare


def ui(root: Path, port: int, uri: str | None = None) -> None:
    """Becomes `mlflow ui` on loopback, with one worker (a third of the memory and time).

    Args:
        uri: the store, as ``mlflow.uri`` of the project's parameters names it.
    """
    uri = resolve_uri(root, uri)
    if uri == NOWHERE:
        print("nothing is logged: mlflow.uri, or MLFLOW_TRACKING_URI, is none")
        return
    if not uri.startswith("sqlite:"):
        print(f"The runs are at {uri}")
        return
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind(("127.0.0.1", port))
        except OSError as error:
            sys.exit(f"--port: expected one that is free, got {port}: {error.strerror}")
    where = f"http://127.0.0.1:{port}"
    runs, compare = pages(root, uri) or ("", "")
    print(f"MLflow: {where}{runs} (Ctrl-C ends it)")
    if compare:
        print(f"The last run's models compared: {where}{compare}")
    sys.stdout.flush()
    mlflow = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri, "--workers", "1"]
    mlflow += ["--host", "127.0.0.1", "--port", str(port)]
    mlflow += ["--default-artifact-root", str(project(root) / "mlruns")]
    cheap = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    os.execve(sys.executable, mlflow, cheap | dict(os.environ))
