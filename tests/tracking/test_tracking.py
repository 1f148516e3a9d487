"""Tracking against real stores: a sqlite file, servers that refuse or hang, `mlflow server`."""

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest

from bnncore import tracking
from bnncore.tracking import SPOOL, Tracker, drain

PARAMS = {"data": {"name": "digits", "seed": 0}, "train": {"epochs": 3, "milestones": [1, 2]}}
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "DVC_EXP_NAME", "DVC_STAGE", "DVC_EXP_BASELINE_REV"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")


def client(uri):
    from mlflow.tracking import MlflowClient

    return MlflowClient(uri)


def runs(uri, experiment="bnncore"):
    """(parent runs, child runs by name) of an experiment, without those in the trash."""
    mlflow = client(uri)
    found = mlflow.search_runs([mlflow.get_experiment_by_name(experiment).experiment_id])
    parents = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    children = {}
    for run in found:
        if "mlflow.parentRunId" in run.data.tags:
            assert run.info.run_name not in children, "two children of one name"
            children[run.info.run_name] = run
    return parents, children


def curve(uri, run, metric):
    return [(m.step, m.value) for m in client(uri).get_metric_history(run.info.run_id, metric)]


def spooled(root):
    path = root / "checkpoints" / SPOOL
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def a_stage(root, model, epochs=3, uri=None, **kwargs):
    """One stage as the pipeline runs it; what `finish` answered."""
    tracker = Tracker(root, PARAMS, uri, **kwargs)
    with tracker.model(model, {"scheme": "single", "width": 16}) as run:
        for epoch in range(1, epochs + 1):
            run.epoch(epoch, {"train_loss": 1 / epoch, "val_top1": 50 + epoch})
    return tracker.finish()


def test_stages_log_into_one_parent_with_a_child_a_model(tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_STAGE", "pretrain")
    assert a_stage(tmp_path, "fp32")
    packed = tmp_path / "bnn.safetensors"
    packed.write_bytes(b"bits")
    monkeypatch.setenv("DVC_STAGE", "evaluate")
    with Tracker(tmp_path, PARAMS, None) as tracker:
        with tracker.model("bnn", {"scheme": "single", "sharing": None}) as run:
            run.history([{"epoch": 1, "val_top1": 40.0}, {"epoch": 2, "val_top1": 45.0}])
            run.metrics({"val_top1": 60.0, "file_bytes": 2048, "ece": None, "seconds": math.nan})
            run.artifact(packed)
        with tracker.model("fp32", {"scheme": "single", "width": 16}) as run:
            run.history([{"epoch": 9, "val_top1": 0.0}])  # it has a curve
            run.metrics({"val_top1": 54.0})
        tracker.metrics({"seconds": 3})
        tracker.artifact(packed, "packed")

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    (parent,), children = runs(uri)
    assert parent.info.status == "FINISHED"
    assert parent.data.params == {
        "data.name": "digits",
        "data.seed": "0",
        "train.epochs": "3",
        "train.milestones": "[1, 2]",
    }
    assert parent.data.tags["DVC_STAGE"] == "evaluate"
    assert sorted(children) == ["bnn", "fp32"]
    for child in children.values():
        assert child.info.status == "FINISHED"
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert child.data.params["scheme"] == "single"
    assert children["fp32"].data.tags["DVC_STAGE"] == "pretrain", "the stage that trained it"
    assert curve(uri, children["fp32"], "train_loss") == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert curve(uri, children["fp32"], "val_top1") == [(1, 51), (2, 52), (3, 53), (3, 54)]
    assert curve(uri, children["bnn"], "val_top1") == [(1, 40), (2, 45), (2, 60)]
    bnn = children["bnn"].data.metrics
    assert (bnn["val_top1"], bnn["file_bytes"], bnn["file_kib"]) == (60, 2048, 2)
    assert "ece" not in bnn
    assert math.isnan(bnn["seconds"])

    artifacts = tmp_path / "mlruns"
    place = artifacts / children["bnn"].info.run_id / "artifacts" / packed.name
    assert place.read_bytes() == b"bits"
    assert (artifacts / parent.info.run_id / "artifacts" / "packed" / packed.name).exists()
    assert spooled(tmp_path) == []


@pytest.mark.slow
def test_other_parameters_or_experiment_begin_another_parent(tmp_path, monkeypatch):
    for params, exp in (({"a": 1}, ""), ({"a": 2}, ""), ({"a": 1}, "icy-dog")):
        monkeypatch.setenv("DVC_EXP_NAME", exp)
        assert Tracker(tmp_path, params).finish()
    parents, _ = runs(f"sqlite:///{tmp_path}/mlflow.db")
    assert len(parents) == 3
    assert [p.data.tags.get("DVC_EXP_NAME") for p in parents].count("icy-dog") == 1


@pytest.mark.slow
def test_training_anew_replaces_the_finished_child(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert a_stage(tmp_path, "bnn")
    _, first = runs(uri)
    assert a_stage(tmp_path, "bnn", epochs=2)
    (parent,), second = runs(uri)
    assert curve(uri, second["bnn"], "val_top1") == [(1, 51), (2, 52)]
    assert second["bnn"].data.params == first["bnn"].data.params
    assert second["bnn"].data.tags["mlflow.parentRunId"] == parent.info.run_id
    old = client(uri).get_run(first["bnn"].info.run_id)
    assert old.info.lifecycle_stage == "deleted"
    with Tracker(tmp_path, PARAMS) as tracker:  # but from a checkpoint it goes on
        tracker.model("bnn", {}).epoch(2, {"val_top1": 60})
    _, third = runs(uri)
    assert third["bnn"].info.run_id == second["bnn"].info.run_id


KILLED = """
import os, signal, sys, time
from bnncore.tracking import Tracker
tracker = Tracker(sys.argv[1], {"a": 1})
run = tracker.model("bnn", {"width": 16})
for epoch in (1, 2, 3):
    run.epoch(epoch, {"val_top1": 50.0 + epoch})
time.sleep(float(sys.argv[2]))
os.kill(os.getpid(), signal.SIGKILL)
"""


# Killed before, and after, MLflow has heard of it.
@pytest.mark.parametrize("pause", [0.0, pytest.param(4.0, marks=pytest.mark.slow)])
def test_a_killed_stage_goes_on_in_its_runs(tmp_path, pause):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), str(pause)], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    with Tracker(tmp_path, {"a": 1}) as tracker, tracker.model("bnn", {"width": 16}) as run:
        for epoch in (3, 4):  # from the last checkpoint
            run.epoch(epoch, {"val_top1": 50.0 + epoch})
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    (parent,), children = runs(uri)
    assert sorted(set(curve(uri, children["bnn"], "val_top1"))) == [
        (i, 50 + i) for i in (1, 2, 3, 4)
    ]
    assert parent.info.status == children["bnn"].info.status == "FINISHED"
    assert spooled(tmp_path) == []


def test_replaying_a_spool_changes_nothing(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tracker = Tracker(tmp_path, PARAMS)
    run = tracker.model("bnn", {})
    run.epoch(1, {"val_loss": 0.5})
    run.epoch(2, {"val_loss": 0.25})
    lines = (tmp_path / "checkpoints" / SPOOL).read_bytes()
    assert tracker.finish()
    (tmp_path / "checkpoints" / SPOOL).write_bytes(lines)
    (tmp_path / "checkpoints" / tracking.STATE).unlink()  # as if killed before it was written
    assert drain(tmp_path) == 0
    _, children = runs(uri)
    assert curve(uri, children["bnn"], "val_loss") == [(1, 0.5), (2, 0.25)]


@pytest.mark.slow
def test_failure_and_interrupt_are_shown(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"

    def diverge(exception):
        with Tracker(tmp_path, {"a": str(exception)}) as tracker:
            tracker.model("fp32", {}).finish()
            with tracker.model("bnn", {}):
                raise exception

    with pytest.raises(ZeroDivisionError):
        diverge(ZeroDivisionError())
    (parent,), children = runs(uri)
    assert parent.info.status == "FAILED"
    assert {name: run.info.status for name, run in children.items()} == {
        "fp32": "FINISHED",
        "bnn": "FAILED",
    }
    for run in (parent, *children.values()):
        client(uri).delete_run(run.info.run_id)
    with pytest.raises(KeyboardInterrupt):
        diverge(KeyboardInterrupt("by hand"))
    (parent,), children = runs(uri)
    assert (parent.info.status, children["bnn"].info.status) == ("KILLED", "KILLED")


@pytest.mark.slow
def test_what_a_store_refuses_does_not_block_the_rest(tmp_path, capfd):
    tracker = Tracker(tmp_path, PARAMS)
    run = tracker.model("bnn", {"width": 16})
    run.metrics({"not/allowed?": 1.0})
    run.artifact(tmp_path / "vanished")
    run.finish()
    assert tracker.finish(), "refused is done with"
    with Tracker(tmp_path, PARAMS) as tracker:
        tracker.model("bnn", {"width": 17, "height": 3}).metrics({"val_top1": 1.0})
    error = capfd.readouterr().err
    assert "refuses metrics of bnn" in error
    assert "vanished is not there any more" in error
    assert "width of bnn is logged as '16' already and cannot become '17'" in error
    _, children = runs(f"sqlite:///{tmp_path}/mlflow.db")
    assert children["bnn"].data.params == {"width": "16", "height": "3"}
    assert children["bnn"].data.metrics == {"val_top1": 1.0}


@pytest.mark.slow
def test_runs_and_experiments_in_the_trash(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert a_stage(tmp_path, "bnn")
    (parent,), children = runs(uri)
    for run in (parent, children["bnn"]):
        client(uri).delete_run(run.info.run_id)
    assert a_stage(tmp_path, "bnn")
    (again,), children = runs(uri)
    assert again.info.run_id != parent.info.run_id
    assert children["bnn"].data.tags["mlflow.parentRunId"] == again.info.run_id
    client(uri).delete_experiment(parent.info.experiment_id)
    assert Tracker(tmp_path, {"a": 1}).finish()
    assert client(uri).get_experiment_by_name("bnncore").lifecycle_stage == "active"


@contextlib.contextmanager
def hanging_server():
    """Accepts connections and never answers; yields its address and the connections' count."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        held = []

        def accept():
            with contextlib.suppress(OSError):
                while True:
                    held.append(server.accept()[0])

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", held
        server.shutdown(socket.SHUT_RDWR)
        for connection in held:
            connection.close()


def test_a_hanging_server_does_not_hold_up_training(tmp_path, capfd):
    with hanging_server() as (uri, held):
        tracker = Tracker(tmp_path, PARAMS, uri)
        run = tracker.model("bnn", {})
        deadline = time.monotonic() + 60
        while not held and time.monotonic() < deadline:
            time.sleep(0.05)
        assert held, "the server was asked"
        before = time.process_time()
        for epoch in range(1, 51):  # all while a call hangs
            run.epoch(epoch, {"val_top1": epoch})
        assert time.process_time() - before < 5
        assert not tracker.finish()
    assert capfd.readouterr().err.count("does not answer") == 1
    entries = spooled(tmp_path)
    assert [e["op"] for e in entries] == ["start", "start"] + ["metrics"] * 50 + ["end"]
    assert [e["step"] for e in entries if e["op"] == "metrics"] == list(range(1, 51))


def test_a_server_slower_than_the_wait_is_left(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "600")
    with hanging_server() as (uri, held):
        tracker = Tracker(tmp_path, PARAMS, uri, wait=0.1)
        while not held:
            time.sleep(0.05)
        worker = tracker._worker
        assert not tracker.finish()
    assert worker.poll() is not None, "no process is left behind"
    assert "not waiting longer than 0.1 s" in capfd.readouterr().err
    assert [e["op"] for e in spooled(tmp_path)] == ["start", "end"]


@pytest.mark.slow
def test_the_spool_is_replayed_when_the_store_is_back(tmp_path, capfd):
    """One store away (a file where its folder should be), another there: each on its own."""
    away = tmp_path / "away"
    away.touch()
    uri = f"sqlite:///{away}/mlflow.db"
    assert not a_stage(tmp_path, "fp32", uri=uri)
    assert a_stage(tmp_path, "other", uri=f"sqlite:///{tmp_path}/here.db") is False
    assert list(runs(f"sqlite:///{tmp_path}/here.db")[1]) == ["other"]
    assert {e["uri"] for e in spooled(tmp_path)} == {uri}
    assert tracking.main(["--flush", "--root", str(tmp_path)]) == 1
    assert "entries left" in capfd.readouterr().out
    away.unlink()
    assert a_stage(tmp_path, "bnn", uri=uri)  # the next stage brings the last one's along
    _, children = runs(uri)
    assert sorted(children) == ["bnn", "fp32"]
    for child in children.values():
        assert curve(uri, child, "val_top1") == [(1, 51), (2, 52), (3, 53)]
    assert tracking.main(["--flush", "--root", str(tmp_path)]) == 0


@pytest.mark.slow
def test_a_torn_line_costs_only_itself(tmp_path, capfd):
    assert Tracker(tmp_path, PARAMS).finish()
    (tmp_path / "checkpoints" / SPOOL).write_bytes(b'{"op": "metr')
    assert a_stage(tmp_path, "bnn")
    assert "a broken line of 12 bytes" in capfd.readouterr().err
    assert list(runs(f"sqlite:///{tmp_path}/mlflow.db")[1]) == ["bnn"]


@pytest.mark.slow
def test_two_processes_at_once_lose_nothing(tmp_path):
    """Two stages beside each other (a search, say) on one fresh store."""
    script = (
        "import sys; from bnncore.tracking import Tracker\n"
        "with Tracker(sys.argv[1], {'who': sys.argv[2]}) as t, t.model('bnn', {}) as run:\n"
        "    for i in range(20): run.epoch(i, {'val_loss': float(i)})\n"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path), who], cwd=ROOT)
        for who in "ab"
    ]
    assert [process.wait(120) for process in both] == [0, 0]
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    mlflow = client(uri)
    found = mlflow.search_runs([mlflow.get_experiment_by_name("bnncore").experiment_id])
    children = [run for run in found if run.info.run_name == "bnn"]
    assert len(found) == 4
    assert [len(curve(uri, run, "val_loss")) for run in children] == [20, 20]


def test_nowhere_and_a_full_disk_do_not_stop_training(tmp_path, capfd):
    assert a_stage(tmp_path, "bnn", uri="none")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "checkpoints").touch()  # no folder can be made here
    assert not a_stage(tmp_path, "bnn")
    assert capfd.readouterr().err.count("cannot log any more") == 1


def test_the_store_of_a_queued_experiment_is_the_projects(tmp_path, monkeypatch):
    queued = tmp_path / ".dvc" / "tmp" / "exps" / "tmpab12"
    assert tracking.resolve_uri(queued) == f"sqlite:///{tmp_path}/mlflow.db"
    assert tracking.resolve_uri(tmp_path, "sqlite:///x.db") == f"sqlite:///{tmp_path}/x.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://example.org")
    assert tracking.resolve_uri(tmp_path) == "http://example.org"


def test_logging_leaves_the_training_process_alone(tmp_path):
    """No MLflow in it, and no draw from the random state that a seed fixes."""
    script = (
        "import random, sys; from bnncore.tracking import Tracker\n"
        "random.seed(0); state = random.getstate()\n"
        "with Tracker(sys.argv[1], {}) as t: t.model('bnn', {}).epoch(1, {'ece': 0.1})\n"
        "assert random.getstate() == state\n"
        "assert not {'mlflow', 'torch', 'sqlalchemy'} & set(sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT).returncode == 0


@pytest.mark.slow
def test_a_real_server_that_comes_late(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    packed = tmp_path / "bnn.safetensors"
    packed.write_bytes(b"bits")
    assert not a_stage(tmp_path, "fp32", uri=uri)

    store = tmp_path / "server"
    store.mkdir()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{store}/mlflow.db"]
    command += ["--artifacts-destination", str(store / "artifacts")]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen(
            command, env=dict(os.environ) | quiet, stdout=log, stderr=log, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{uri}/health", timeout=5).close()
                break
            assert time.monotonic() < deadline, (tmp_path / "server.log").read_text()
            time.sleep(0.2)
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "30"  # two cores may be busy elsewhere
        with Tracker(tmp_path, PARAMS, uri) as tracker:
            tracker.model("fp32", {}).artifact(packed)
        assert spooled(tmp_path) == []
        (parent,), children = runs(uri)
        assert parent.info.status == "FINISHED"
        assert curve(uri, children["fp32"], "val_top1") == [(1, 51), (2, 52), (3, 53)]
        names = [a.path for a in client(uri).list_artifacts(children["fp32"].info.run_id)]
        assert names == [packed.name]
        assert tracking.compare_path(tmp_path).count(children["fp32"].info.run_id) == 1
    finally:
        os.killpg(server.pid, signal.SIGTERM)  # the group that this test began
        server.wait(30)
