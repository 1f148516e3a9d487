"""The pipeline as a job on a cluster of two nodes, as ``make submit`` runs it.

The nodes are two `ray start` on this machine, each with folders and ports of its own and one token
for both; the project they work for is a copy.
"""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import tarfile
import threading
import time
import tomllib
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from bnncore.packed import packfile
from bnncore.tracking import Tracker
from pipeline import submit, swap
from tests import processes
from tests.pipeline import test_pipeline

SHORT = {"epochs": 1, "batch_size": 64, "lr": 0.01}
TINY = {
    "data": {"name": "digits", "subset": 0.1},
    "model": {"backbone": "nin", "width": 8, "dropout": 0.0},
    "pretrain": SHORT,
    "binarize": SHORT,
    "ensembles": {
        "recipe": SHORT,
        "train": [{"name": "fused", "scheme": "fusion", "sharing": "shared_conv", "members": 2}],
    },
    "evaluate": {"ops": "numpy"},
}


def submitted(folder: Path, environment: dict[str, str], *arguments: str):
    """`python -m pipeline.submit` in a copy of the project."""
    return subprocess.run(
        [sys.executable, "-m", "pipeline.submit", *arguments],
        cwd=folder,
        env={k: v for k, v in environment.items() if k != "PYTHONPATH"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


class _Watch:
    """Looks, while work goes on, which processes each node has."""

    def __init__(self, nodes: list[subprocess.Popen]):
        self.nodes, self.ended = nodes, threading.Event()
        self.seen: dict[int, int | None] = {}  # when it began
        self.actors: list[set[int]] = [set() for _ in nodes]

    def _look(self) -> None:
        while not self.ended.wait(0.3):
            for node, those in zip(self.nodes, self.actors, strict=True):
                now = processes.descendants(node.pid)
                self.seen |= {p: processes.began(p) for p in [node.pid, *now] if p not in self.seen}
                those |= {p for p, line in now.items() if line.startswith("ray::Actor")}

    def __enter__(self) -> _Watch:
        self.pool = ThreadPoolExecutor(1)
        self.looking = self.pool.submit(self._look)
        return self

    def __exit__(self, *_) -> None:
        self.ended.set()
        self.pool.shutdown()
        self.looking.result()  # or what went wrong in it


@pytest.mark.slow
@pytest.mark.timeout(1500)  # it starts many processes, slowly on a busy machine
def test_two_nodes_run_the_pipeline_as_a_job(tmp_path):
    folder = test_pipeline.copy(tmp_path / "project", TINY)
    (folder / "packed").mkdir()
    (folder / "packed" / "old.bnn").write_bytes(b"what an earlier run left")
    (folder / "reports").mkdir()
    (folder / "reports" / "mine.txt").write_text("not the pipeline's")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with processes.two_nodes(tmp_path, dashboard=True, PATH=path) as (environment, nodes):
        environment["MLFLOW_TRACKING_URI"] = "none"
        with _Watch(nodes) as watch:
            fails = "dvc repro pretrain && echo now it ends && exit 3"
            failed = submitted(folder, environment, "--", "sh", "-c", fails)
            assert failed.returncode == 1, failed.stdout
            assert test_pipeline.ran(failed.stdout) == ["pretrain"], failed.stdout
            *_, log, end = failed.stdout.splitlines()
            assert log == "now it ends"
            assert "failed, nothing was brought back: " in end
            assert "exit code 3" in end
            assert (folder / "packed" / "old.bnn").exists()
            assert not (folder / "dvc.lock").exists()
            assert not (folder / "models").exists()

            wrong = submitted(folder, environment | {"RAY_AUTH_TOKEN": "0" * 64})
            assert wrong.returncode == 1
            assert "expected the cluster's token" in wrong.stdout
            assert "Invalid authentication token" in wrong.stdout

            done = submitted(folder, environment)
            print(done.stdout)
            assert done.returncode == 0, done.stdout[-4000:]
            rest = list(test_pipeline.STAGES[1:])
            assert test_pipeline.ran(done.stdout) == rest, "it goes on where the other failed"
    # Work was done on both, by what the nodes ran, by the log, and by the curve.
    assert all(watch.actors), [len(those) for those in watch.actors]
    (line,) = [x for x in done.stdout.splitlines() if "fused: 2 actor(s) on " in x]
    assert len(set(line.partition(" on ")[2].split(", "))) == 2
    histories = json.loads((folder / "reports/histories.json").read_text())
    assert [e["actors"] for e in histories["fused"]] == [2]
    # What came back is whole, and is what the log says.
    results = json.loads((folder / "reports/results.json").read_text())
    assert [r["name"] for r in results] == ["fp32", "bnn", "fused"]
    for row in results:
        packed = folder / f"packed/{row['name']}.bnn"
        assert packed.stat().st_size == row["file_bytes"]
        assert packfile.load(packed).members == (2 if row["name"] == "fused" else 1)
    assert not (folder / "packed" / "old.bnn").exists()
    assert (folder / "reports" / "mine.txt").exists()
    assert [p for p in folder.rglob("*.submit-*") if ".dvc" not in p.parts] == []
    # It is the same as if it had been made here: DVC finds nothing to do.
    assert "up to date" in test_pipeline.dvc(folder, "status", *test_pipeline.STAGES)
    # Nothing lives on.
    assert len(watch.seen) > 10
    deadline = time.monotonic() + 120
    while left := [p for p, t in watch.seen.items() if t is not None and processes.began(p) == t]:
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (None, "RAY_ADDRESS: expected the address .* got none"),
        ("127.0.0.1:6379", "such as http://127.0.0.1:8265, got 127.0.0.1:6379"),
        ("http://127.0.0.1:9", "http://127.0.0.1:9: expected a Ray cluster's dashboard"),
    ],
)
def test_no_cluster_there(monkeypatch, address, message):
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    with pytest.raises(submit.SubmitError, match=message):
        submit.connect(address)
    os.environ.pop("RAY_ADDRESS", None)


# -- what goes and what comes ------------------------------------------------------------------


def test_results_are_the_stages_outputs(tmp_path):
    (tmp_path / "dvc.yaml").write_text(
        yaml.safe_dump(
            {
                "stages": {
                    "a": {"cmd": "x", "outs": ["models/a", {"models/b": {"cache": False}}]},
                    "b": {"cmd": "x", "metrics": ["reports/m.json"], "plots": ["reports/p.png"]},
                }
            }
        )
    )
    expected = ["dvc.lock", "models/a", "models/b", "reports/m.json", "reports/p.png"]
    assert submit.results(tmp_path, []) == expected
    assert submit.results(tmp_path, ["reports", "models/a/x"]) == [*expected[:3], "reports"]


class _Cluster(http.server.BaseHTTPRequestHandler):
    """A job server that hands out one archive to those who show the token."""

    archive, log = Path(), ""

    def do_GET(self):
        address = urllib.parse.urlsplit(self.path)
        asked = urllib.parse.parse_qs(address.query)
        assert address.path == "/api/v0/logs/file"
        assert asked == {"node_id": ["f" * 8], "filename": ["x.tar"], "lines": ["-1"]}
        known = self.headers["Authorization"] == "Bearer " + "0" * 64
        self.send_response(200 if known else 403)
        self.end_headers()
        self.wfile.write(self.archive.read_bytes() if known else b"Invalid authentication token")

    def log_message(self, *_):
        pass


@pytest.fixture
def client(monkeypatch):
    """As Ray's own: its log and the node that it ran on."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Cluster) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield SimpleNamespace(
            get_address=lambda: f"http://127.0.0.1:{server.server_port}",
            get_job_logs=lambda job: _Cluster.log,
            get_job_info=lambda job: SimpleNamespace(driver_node_id="f" * 8),
        )
        server.shutdown()
        thread.join()


def handed_out(archive: Path, size: int, digest: str) -> None:
    _Cluster.archive, _Cluster.log = archive, f"results: x.tar, {size} bytes, sha256 {digest}\n"


@pytest.fixture
def there_and_here(tmp_path) -> tuple[Path, Path]:
    for place, text in (("there", "new"), ("here", "old")):
        (tmp_path / place / "packed").mkdir(parents=True)
        (tmp_path / place / "packed" / "a.bnn").write_text(text)
        (tmp_path / place / "Makefile").write_text(text)
        (tmp_path / place / "params.yaml").write_text("{}")
        (tmp_path / place / "dvc.yaml").write_text("stages: {a: {cmd: x, outs: [packed]}}")
    return tmp_path / "there", tmp_path / "here"


@pytest.mark.slow  # a store of MLflow's is made
def test_only_results_and_runs_are_taken_from_an_archive(
    tmp_path, there_and_here, client, capsys, monkeypatch
):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    there, here = there_and_here
    Tracker(there, {"seed": 1}, wait=0).model("fused", {})
    paths = ["packed", "Makefile", *submit.STORE]
    handed_out(tmp_path / "x.tar", *submit.pack(paths, there, tmp_path / "x.tar"))
    submit.fetch(client, "job", [], here)
    assert capsys.readouterr().out == "brought back: packed; 2 MLflow runs\n"
    assert len([*here.glob("checkpoints/mlflow/*/*.synced")]) == 2, "the store of here has them"
    assert (here / "packed" / "a.bnn").read_text() == "new"
    assert (here / "Makefile").read_text() == "old"
    names = [".dvc", "Makefile", "checkpoints", "dvc.yaml", "mlflow.db", "packed", "params.yaml"]
    assert sorted(p.name for p in here.iterdir()) == names
    assert sorted(p.name for p in (here / swap.WORK).iterdir()) == ["job.brought", "lock"]


def test_of_two_that_watch_a_job_one_brings_its_results(tmp_path, there_and_here, client, capsys):
    there, here = there_and_here
    handed_out(tmp_path / "x.tar", *submit.pack(["packed"], there, tmp_path / "x.tar"))
    began = time.time()
    with ThreadPoolExecutor(2) as pool:
        watching = [pool.submit(submit.fetch, client, "job", [], here, began) for _ in range(2)]
    assert [w.result() for w in watching] == [None, None]
    said = capsys.readouterr().out
    assert said.count("brought back: packed") == 1
    assert said.count("job: another process has brought its results") == 1
    (here / "packed" / "a.bnn").write_text("changed here")
    submit.fetch(client, "job", [], here, time.time())  # asked for again
    assert (here / "packed" / "a.bnn").read_text() == "new"


@pytest.mark.parametrize("harm", ["cut", "outside", "no line", "token"])
def test_what_goes_wrong_changes_nothing(tmp_path, there_and_here, client, monkeypatch, harm):
    there, here = there_and_here
    archive = tmp_path / "x.tar"
    handed_out(archive, *submit.pack(["packed"], there, archive))
    if harm == "cut":
        archive.write_bytes(archive.read_bytes()[:700])
    if harm == "outside":
        with tarfile.open(archive, "w") as tar:
            tar.add(there / "Makefile", "../Makefile")
        handed_out(archive, *submit.digest(archive))
    if harm == "no line":
        _Cluster.log = ""
    if harm == "token":
        monkeypatch.setenv("RAY_AUTH_TOKEN", "1" * 64)
    with pytest.raises(submit.SubmitError) as caught:
        submit.fetch(client, "job", [], here)
    if harm == "token":
        assert "cannot fetch x.tar" in str(caught.value)
        assert "Invalid authentication token" in str(caught.value)
    assert (here / "packed" / "a.bnn").read_text() == "old"
    assert (here / "Makefile").read_text() == "old"
    assert [p.name for p in (here / swap.WORK).glob("*")] in ([], ["lock"])


# -- cluster/ ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["local", "aws"])
def test_the_cluster_files_are_valid_and_ask_for_the_token(name):
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((test_pipeline.ROOT / f"cluster/{name}.yaml").read_text())
    full = prepare_config(config)
    validate_config(full)
    starts = [c for key in ("head", "worker") for c in full[f"{key}_start_ray_commands"]]
    starts = [command for command in starts if "ray start" in command]
    assert len(starts) == 2
    for command in starts:
        assert "RAY_AUTH_MODE=token ray start" in command
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert full["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    nodes = full["available_node_types"]
    if name == "local":
        assert sum(node["max_workers"] for node in nodes.values()) == 1
    else:
        assert nodes["gpu"]["max_workers"] == full["max_workers"]


def test_an_invalid_cluster_file_is_refused():
    from jsonschema import ValidationError
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((test_pipeline.ROOT / "cluster/local.yaml").read_text())
    with pytest.raises(ValidationError, match="worker_start"):
        validate_config(prepare_config(config | {"worker_start": []}))


def test_the_container_has_a_python_that_fits_and_copies_what_exists():
    lines = (test_pipeline.ROOT / "cluster/Containerfile").read_text().splitlines()
    (base,) = [line for line in lines if line.startswith("FROM ")]
    version = base.partition("python:")[2].partition("-")[0]
    project = tomllib.loads((test_pipeline.ROOT / "pyproject.toml").read_text())["project"]
    assert Version(version) in SpecifierSet(project["requires-python"])
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert "pyproject.toml" in copied
    assert all((test_pipeline.ROOT / path).exists() for path in copied)
    assert "ENV RAY_AUTH_MODE=token" in lines
