"""Tracking against real stores: sqlite files, servers that refuse or hang, `mlflow server`.

Most tests log without a follower (``wait=0``) and sync in this process, which has MLflow anyway;
processes to kill or to starve are forked from it.
"""

import contextlib
import json
import math
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow.tracking import MlflowClient

from bnncore import tracking
from bnncore.tracking import Tracker, sync
from bnncore.tracking.__main__ import main
from bnncore.tracking.runs import METRICS, folder_of
from bnncore.tracking.sync import Store
from tests.processes import alive

PARAMS = {"data": {"name": "digits", "seed": 0}, "train": {"epochs": 3, "milestones": [1, 2]}}
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def migrated(tmp_path_factory):
    """An empty store: MLflow takes seconds to make one."""
    folder = tmp_path_factory.mktemp("store")
    Store().client(f"sqlite:///{folder}/mlflow.db")
    return folder / "mlflow.db"


@pytest.fixture
def root(tmp_path, migrated):
    shutil.copy(migrated, tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "DVC_EXP_NAME", "DVC_STAGE", "DVC_EXP_BASELINE_REV"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")


def client(where):
    return MlflowClient(where if isinstance(where, str) else f"sqlite:///{where}/mlflow.db")


def runs(where, trash=False):
    """(parent runs, child runs by name), in the trash or not."""
    mlflow = client(where)
    place = mlflow.get_experiment_by_name("bnncore").experiment_id
    found = mlflow.search_runs([place], run_view_type=2 if trash else 1)
    children = {r.info.run_name: r for r in found if "mlflow.parentRunId" in r.data.tags}
    parents = [r for r in found if "mlflow.parentRunId" not in r.data.tags]
    assert len(parents) + len(children) == len(found), "two children of one name"
    return parents, children


def curve(where, run, metric="val_top1"):
    return [(m.step, m.value) for m in client(where).get_metric_history(run.info.run_id, metric)]


def rows(where):
    """How often the living runs have each (run, metric, step)."""
    parents, children = runs(where)
    mlflow = client(where)
    return Counter(
        (run.info.run_name, name, m.step)
        for run in (*parents, *children.values())
        for name in run.data.metrics
        for m in mlflow.get_metric_history(run.info.run_id, name)
    )


def a_stage(root, model="bnn", epochs=(1, 2, 3), uri=None, wait=0, **more):
    """One stage as the pipeline runs it; what `finish` answered."""
    tracker = Tracker(root, PARAMS, uri, wait=wait, **more)
    with tracker.model(model, {"scheme": "single", "width": 16}) as run:
        for epoch in epochs:
            run.epoch(epoch, {"train_loss": 1 / epoch, "val_top1": 50 + epoch})
    return tracker.finish()


def kept(root, model):
    """What the file of a model's only run says."""
    (file,) = folder_of(root).glob(f"*/model-{model}.json")
    return json.loads(file.read_text())


def missed(root):
    """Names of the runs of which a store has not everything."""
    files = folder_of(root).glob("*/*.json")
    return {f.stem for f in files if not (s := f.with_suffix(".synced")).exists()
            or s.read_bytes() != f.read_bytes()}  # fmt: skip


def forked(work, limit=None):
    """Run `work` in a fork of this process, with files of at most `limit` bytes: (pid, stderr)."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.dup2(theirs, 2)
            sys.stderr = os.fdopen(2, "w", buffering=1)
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            work()
            code = 0
        except BaseException as error:
            os.write(2, f"Traceback: {error!r}".encode())
        finally:
            os._exit(code)
    os.close(theirs)
    return pid, os.fdopen(ours)


def joined(pid, stderr):
    """Exit status and stderr of a fork."""
    with stderr:
        text = stderr.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text


# ---------------------------------------------------------------- what arrives


def test_stages_log_into_one_parent_with_a_child_a_model(root, monkeypatch):
    monkeypatch.setenv("DVC_STAGE", "pretrain")
    a_stage(root, "fp32")
    assert sync(root) == 0
    packed = root / "bnn.safetensors"
    packed.write_bytes(b"bits")
    monkeypatch.setenv("DVC_STAGE", "evaluate")
    with Tracker(root, PARAMS, wait=0) as tracker:
        with tracker.model("bnn", {"scheme": "single", "sharing": None}) as run:
            run.history([{"epoch": 1, "val_top1": 40.0}, {"epoch": 2, "val_top1": 45.0}])
            run.metrics({"ece": None, "seconds": math.nan, "val_top1": 60.0, "file_bytes": 2048})
            run.artifact(packed)
        with tracker.model("fp32", {"scheme": "single", "width": 16}) as run:
            run.metrics({"val_top1": 53.0, "test_top1": 52.0})
            run.artifact(packed)
        tracker.dataset("folder", "0123abcd", "mydata")
        tracker.metrics({"seconds": 3})
        tracker.artifact(packed, "packed")
    packed.write_bytes(b"of a later run")
    assert sync(root) == 0

    (parent,), children = runs(root)
    assert parent.info.status == "FINISHED"
    assert parent.data.params == {
        "data.name": "digits",
        "data.seed": "0",
        "train.epochs": "3",
        "train.milestones": "[1, 2]",
    }
    assert parent.data.tags["DVC_STAGE"] == "evaluate"
    assert parent.data.metrics == {"seconds": 3}
    assert sorted(children) == ["bnn", "fp32"]
    for child in children.values():
        assert child.info.status == "FINISHED"
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert child.data.params["scheme"] == "single"
    assert children["fp32"].data.tags["DVC_STAGE"] == "pretrain", "the stage that trained it"
    assert curve(root, children["fp32"], "train_loss") == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert curve(root, children["fp32"]) == [(1, 51), (2, 52), (3, 53)], "53 is there already"
    assert curve(root, children["fp32"], "test_top1") == [(3, 52)]
    assert curve(root, children["bnn"]) == [(1, 40), (2, 45), (3, 60)]
    bnn = children["bnn"].data.metrics
    assert (bnn["val_top1"], bnn["file_bytes"], bnn["file_kib"]) == (60, 2048, 2)
    assert "ece" not in bnn
    assert math.isnan(bnn["seconds"])
    figures = kept(root, "bnn")["rows"]
    assert list(figures) == [name for name in METRICS if name in figures]

    artifacts = root / "mlruns"
    for child in children.values():
        place = artifacts / child.info.run_id / "artifacts" / packed.name
        assert place.read_bytes() == b"bits", "as it was when it was logged"
    assert (artifacts / parent.info.run_id / "artifacts" / "packed" / packed.name).exists()

    for run in (parent, children["bnn"], children["fp32"]):
        (used,) = client(root).get_run(run.info.run_id).inputs.dataset_inputs
        assert (used.dataset.name, used.dataset.digest) == ("folder", "0123abcd")

    kind = client(root).get_experiment_by_name("bnncore").tags["mlflow.experimentKind"]
    assert kind == "custom_model_development"
    path = tracking.compare_path(root)
    assert [path.count(run.info.run_id) for run in (parent, *children.values())] == [0, 1, 1]
    before = rows(root), parent.info.end_time
    assert sync(root, Store()) == 0
    for synced in folder_of(root).glob("*/*.synced"):  # as if killed before it wrote how far it is
        synced.unlink()
    assert sync(root, Store()) == 0
    assert (rows(root), runs(root)[0][0].info.end_time) == before


def timed(*epochs, began=1e9, value=0):
    return [{"epoch": e, "time": began + e, "val_top1": 50.0 + e + value} for e in epochs]


def untimed(*epochs):
    return [{"epoch": e, "val_top1": 50.0 + e} for e in epochs]


FULL = [(e, 50.0 + e) for e in (1, 2, 3)]
# What a stage logs, whether it ends, what the next one logs; the curve, runs in the trash.
TOLD = {
    "killed, its history replayed": ("epoch", timed(1, 2), False, timed(1, 2, 3), FULL, 0),
    "finished, its history replayed": ("epoch", timed(1, 2, 3), True, timed(1, 2, 3), FULL, 0),
    "killed, on from a checkpoint": ("epoch", untimed(1, 2), False, untimed(2, 3), FULL, 0),
    "what is told last of a step is not heard": (
        "epoch", untimed(1, 2), False, [{"epoch": 2, "val_top1": 99.0}, *untimed(3)], FULL, 0,
    ),
    "killed, replayed without times": ("epoch", untimed(1, 2), False, untimed(1, 2, 3), FULL, 0),
    "trained anew": (
        "epoch", timed(1, 2, 3), True, timed(1, 2, began=2e9, value=7), [(1, 58), (2, 59)], 1,
    ),
    "killed, then trained anew with other code": (
        "epoch", timed(1, 2), False, timed(1, 2, 3, began=2e9, value=7),
        [(1, 58), (2, 59), (3, 60)], 1,
    ),
    "cached": ("history", timed(1, 2, 3), True, timed(1, 2, 3), FULL, 0),
    "cached without times": ("history", untimed(1, 2, 3), True, untimed(1, 2, 3), FULL, 0),
    "cached, of another training": ("history", timed(1), True, timed(1, 2, 3, began=2e9), FULL, 1),
    "an epoch was lost": ("history", timed(1, 3), True, timed(1, 2, 3), FULL, 0),
}  # fmt: skip


@pytest.mark.parametrize("told", TOLD)
def test_a_step_is_logged_once_and_a_training_has_a_run(root, told):
    call, first, ends, second, expected, trash = TOLD[told]
    for part in (first, second):
        tracker = Tracker(root, PARAMS, wait=0)
        run = tracker.model("bnn", {"width": 16})
        if call == "history":
            run.history(part)
        else:
            for epoch in part:
                run.epoch(epoch["epoch"], epoch)
        if ends or part is second:
            run.finish()
            tracker.finish()
        assert sync(root) == 0
    (parent,), children = runs(root)
    assert sorted(curve(root, children["bnn"])) == expected
    assert children["bnn"].data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert children["bnn"].data.params == {"width": "16"}
    assert children["bnn"].info.status == parent.info.status == "FINISHED"
    assert len(runs(root, trash=True)[1]) == trash


def test_without_its_log_a_curve_is_found_again(root):
    """The log's folder may be cleaned; epochs that know their times do not arrive twice."""
    ids = set()
    for _ in range(2):
        with Tracker(root, PARAMS, wait=0) as tracker, tracker.model("bnn", {}) as run:
            run.history(timed(1, 2, 3))
            run.metrics({"test_top1": 50.0, "file_bytes": 2048})
        assert sync(root) == 0
        ids.add(runs(root)[1]["bnn"].info.run_id)
        shutil.rmtree(root / "checkpoints")
    assert len(ids) == 1
    assert set(rows(root).values()) == {1}


def test_final_figures_that_change_are_shown(root):
    for size in (100, 100, 200):
        with Tracker(root, PARAMS, wait=0) as tracker, tracker.model("bnn", {}) as run:
            run.history(timed(1, 2))
            run.metrics({"file_bytes": size, "seconds": math.inf, "not/allowed?": 1.0})
        assert sync(root) == 0
    bnn = runs(root)[1]["bnn"]
    assert curve(root, bnn, "file_bytes") == [(2, 100), (3, 200)]
    assert bnn.data.metrics["file_bytes"] == 200
    assert bnn.data.metrics["not/allowed_"] == 1
    assert len(curve(root, bnn, "seconds")) == 1


def test_other_parameters_or_experiment_begin_another_parent(root, monkeypatch):
    for params, exp in (({"a": 1}, ""), ({"a": 2}, ""), ({"a": 1}, "icy-dog"), ({"a": 1}, "")):
        monkeypatch.setenv("DVC_EXP_NAME", exp)
        Tracker(root, params, wait=0).finish()
    assert sync(root) == 0
    parents, _ = runs(root)
    assert len(parents) == 3
    assert [p.data.tags.get("DVC_EXP_NAME") for p in parents].count("icy-dog") == 1


@pytest.mark.parametrize(
    ("exception", "status"), [(ZeroDivisionError, "FAILED"), (KeyboardInterrupt, "KILLED")]
)
def test_failure_and_interrupt_are_shown(root, exception, status):
    with pytest.raises(exception), Tracker(root, {"refused": True}, wait=0):
        raise exception
    assert not folder_of(root).exists(), "nothing was logged, so there is no run"
    tracker = Tracker(root, PARAMS, wait=0)
    tracker.model("fp32", {}).finish()
    with pytest.raises(exception), tracker, tracker.model("bnn", {}):
        raise exception
    assert sync(root) == 0
    (parent,), children = runs(root)
    assert parent.info.status == children["bnn"].info.status == status
    assert children["fp32"].info.status == "FINISHED"


def test_what_cannot_be_logged_does_not_block_the_rest(root, capfd):
    tracker = Tracker(root, PARAMS, wait=0)
    with tracker.model("bnn", {"width": 16, "x" * 300: 1}) as run:  # too long a name
        run.artifact(root / "vanished")
    with tracker.model("fp32", {"width": 16}) as run:
        run.metrics({"val_top1": 1.0})
    tracker.finish()
    assert sync(root) == 0, "refused is done with"
    with Tracker(root, PARAMS, wait=0) as tracker:
        tracker.model("fp32", {"width": 17, "height": 3})
    assert sync(root) == 0
    error = capfd.readouterr().err
    assert "bnn is refused by the store" in error
    assert f"{root / 'vanished'}: No such file" in error
    assert "width of fp32 is logged as '16' already and cannot become '17'" in error
    _, children = runs(root)
    assert children["fp32"].data.params == {"width": "16", "height": "3"}
    assert children["fp32"].data.metrics == {"val_top1": 1.0}
    assert children["bnn"].info.status == "FINISHED"


def test_runs_and_experiments_in_the_trash(root):
    for _ in range(2):
        a_stage(root)
        assert sync(root) == 0
        (parent,), children = runs(root)
        assert children["bnn"].data.tags["mlflow.parentRunId"] == parent.info.run_id
        for run in (parent, children["bnn"]):
            client(root).delete_run(run.info.run_id)
    client(root).delete_experiment(parent.info.experiment_id)
    Tracker(root, {"a": 1}, wait=0).finish()
    assert sync(root) == 0
    assert client(root).get_experiment_by_name("bnncore").lifecycle_stage == "active"


def test_a_run_that_a_slow_server_made_twice_is_one(root):
    """The client gave up on the answer, asked again, and the server did both."""
    a_stage(root)
    assert sync(root) == 0
    _, children = runs(root)
    bnn = children["bnn"]
    client(root).create_run(bnn.info.experiment_id, 1, dict(bnn.data.tags), "bnn")
    a_stage(root, epochs=(4,))
    assert sync(root) == 0
    assert curve(root, runs(root)[1]["bnn"]) == [(e, 50 + e) for e in (1, 2, 3, 4)]


# ---------------------------------------------------------------- kills, full disks, two at once


def test_kills_at_any_moment_lose_and_double_nothing(root):
    """A stage that logs and the process that carries it, killed over and over."""
    random.seed(0)
    last = 30

    def train():
        """Goes on from its checkpoint, telling again what it had told, as `drive` does."""
        place = root / "history.json"
        history = json.loads(place.read_text()) if place.exists() else []
        with Tracker(root, PARAMS, wait=0) as tracker, tracker.model("bnn", {"a": 1}) as run:
            for epoch in range(1, last + 1):
                if epoch > len(history):
                    history.append({"epoch": epoch, "time": time.time(), "val_top1": 50.0 + epoch})
                    place.with_suffix(".new").write_text(json.dumps(history))
                    place.with_suffix(".new").rename(place)
                    time.sleep(0.03)
                run.epoch(epoch, history[epoch - 1])
            run.metrics({"test_top1": 60.0})

    def carry():
        while True:  # until it is struck
            sync(root)
            time.sleep(0.001)

    kills = [0, 0]
    for _ in range(12):
        both = [forked(train), forked(carry)]
        time.sleep(random.uniform(0.01, 0.4))
        for pid, _ in both:
            os.kill(pid, signal.SIGKILL)
        for i, one in enumerate(both):
            kills[i] += joined(*one)[0] == -signal.SIGKILL
    train()
    assert sync(root) == 0
    assert min(kills) > 2, "of either, at work"
    assert set(rows(root).values()) == {1}
    (parent,), children = runs(root)
    assert curve(root, children["bnn"]) == [(e, 50.0 + e) for e in range(1, last + 1)]
    assert curve(root, children["bnn"], "test_top1") == [(last, 60.0)]
    assert parent.info.status == children["bnn"].info.status == "FINISHED"


@pytest.mark.parametrize("limit", [0, 900, 20_000])
@pytest.mark.parametrize("store", [True, False], ids=["a store", "no store"])
def test_a_full_disk_is_named_in_a_line_and_leaves_nothing_empty(root, migrated, limit, store):
    if not store:
        (root / "mlflow.db").unlink()
    packed = root / "a.bnn"
    packed.write_bytes(bytes(30_000))

    def train():
        with Tracker(root, PARAMS, wait=0) as tracker, tracker.model("bnn", {}) as run:
            for epoch in range(1, 10):
                run.epoch(epoch, {"val_top1": float(epoch)})
                run.artifact(packed)
        store = Store()
        for _ in range(3):
            sync(root, store)

    code, error = joined(*forked(train, limit))
    assert code == 0, error
    assert "Traceback" not in error
    assert 1 <= len(error.splitlines()) <= 3, error
    assert all(str(root) in line for line in error.splitlines()), error
    assert len(set(error.splitlines())) == len(error.splitlines())
    empty = [p for p in root.rglob("*") if p.is_file() and not p.stat().st_size]
    assert empty == []
    assert list(root.glob(".mlflow-*")) == []
    shutil.copy(migrated, root)
    train()  # with room again
    assert sync(root) == 0
    _, children = runs(root)
    assert curve(root, children["bnn"]) == [(e, float(e)) for e in range(1, 10)]


@pytest.mark.slow
def test_two_processes_at_once_lose_nothing(tmp_path):
    """Two stages beside each other, a search say, on a store that is not there yet."""

    def work(who):
        with Tracker(tmp_path, {"who": who}, wait=0) as t, t.model("bnn", {}) as run:
            for i in range(20):
                run.epoch(i, {"val_loss": float(i)})
        assert sync(tmp_path) == 0

    both = [forked(lambda who=who: work(who)) for who in "ab"]
    assert [joined(*one) for one in both] == [(0, ""), (0, "")]
    mlflow = client(tmp_path)
    found = mlflow.search_runs([mlflow.get_experiment_by_name("bnncore").experiment_id])
    assert len(found) == 4
    children = [run for run in found if run.info.run_name == "bnn"]
    assert [len(curve(tmp_path, run, "val_loss")) for run in children] == [20, 20]


def test_a_job_is_merged_once_by_two_clients(root, migrated):
    there, here = root / "there", root / "here"
    for place in (there, here):
        place.mkdir()
        shutil.copy(migrated, place)
        packed = place / "fused.bnn"
        packed.write_text(f"packed {place.name}")
        with Tracker(place, {"seed": 1}, wait=0) as tracker, tracker.model("fused", {}) as run:
            run.history(timed(1, 2))
            run.metrics({"test_top1": 45.0})
            run.artifact(packed, "files")
        assert sync(place) == 0
    both = [forked(lambda: tracking.merge(there, here, "job-1")) for _ in range(2)]
    assert [joined(*one) for one in both] == [(0, ""), (0, "")]
    assert tracking.merge(there, here, "job-1") == 0, "once is enough"
    with Tracker(there, {"seed": 1}, wait=0) as tracker, tracker.model("voted", {}) as run:
        run.history(timed(1))
    assert tracking.merge(there, here, "job-2") == 1, "the same job went on"
    assert tracking.merge(there, here, "job-2", "none") == 0
    assert tracking.merge(root / "nothing", here, "job-3") == 0
    shutil.rmtree(there)
    mlflow = client(here)
    found = mlflow.search_runs([mlflow.get_experiment_by_name("bnncore").experiment_id])
    assert Counter(r.info.run_name for r in found)["fused"] == 2
    (fused,) = [r for r in found if r.data.tags.get("bnncore.job") and r.info.run_name == "fused"]
    assert fused.data.tags["bnncore.job"] == "job-1"
    assert curve(here, fused) == [(1, 51), (2, 52)]
    assert fused.info.status == "FINISHED"
    place = here / "mlruns" / fused.info.run_id / "artifacts" / "files" / "fused.bnn"
    assert place.read_text() == "packed there"
    voted = next(r for r in found if r.info.run_name == "voted")
    assert voted.data.tags["mlflow.parentRunId"] == fused.data.tags["mlflow.parentRunId"]


# ---------------------------------------------------------------- stores in trouble


@contextlib.contextmanager
def hanging_server():
    """Accepts connections and never answers; yields its address and the connections."""
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


def until(condition, seconds=500):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_hanging_server_does_not_hold_up_training(root, capfd, monkeypatch):
    """Not while it trains, and not longer than it is told to at its end."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "600")
    with hanging_server() as (uri, held):
        tracker = Tracker(root, PARAMS, uri, wait=0.1)
        run = tracker.model("bnn", {})
        until(lambda: held)
        for epoch in range(1, 51):  # all while a call hangs
            run.epoch(epoch, {"val_top1": epoch})
        follower = tracker._follower
        assert not tracker.finish()
    assert follower.poll() is not None, "no process is left behind"
    assert capfd.readouterr().err.count("not waiting longer than 0.1 s") == 1
    assert list(kept(root, "bnn")["rows"]["val_top1"]) == [str(e) for e in range(1, 51)]
    assert missed(root) == {"parent", "model-bnn"}


def test_a_store_in_trouble_is_asked_again_later(root, capfd, monkeypatch):
    """One hangs, one refuses, one is away (a file where its folder should be), one is there."""
    away = root / "away"
    away.touch()
    refusing = socket.create_server(("127.0.0.1", 0))
    port = refusing.getsockname()[1]
    refusing.close()
    back = f"sqlite:///{away}/mlflow.db"
    asked, now, bring = [], 0.0, Store._bring

    def counted(store, folder, parent, todo):
        asked.append(parent["uri"])
        bring(store, folder, parent, todo)

    with hanging_server() as (hanging, _), monkeypatch.context() as patch:
        patch.setattr(Store, "_bring", counted)
        clock = SimpleNamespace(monotonic=lambda: now)  # a busy machine takes long for anything
        patch.setattr(sys.modules[Store.__module__], "time", clock)
        uris = [back, hanging, f"http://127.0.0.1:{port}", None]
        for i, uri in enumerate(uris):
            a_stage(root, f"model{i}", uri=uri)
        store = Store()
        left = sync(root, store)
        assert len(asked) == len(set(asked)) == 4
        assert sync(root, store) == left
        assert len(asked) == 4, "not at once"
        now = 60.0
        assert sync(root, store) == left
        assert sorted(asked[4:]) == sorted(uris[:3])
    assert list(runs(root)[1]) == ["model3"]
    assert missed(root) == {"parent", "model-model0", "model-model1", "model-model2"}
    error = capfd.readouterr().err
    assert error.count("does not answer") == 3
    assert all(error.count(uri) >= 1 for uri in uris[:3])
    away.unlink()
    away.mkdir()
    shutil.copy(root / "mlflow.db", away)
    a_stage(root, "next", uri=back)  # brings the last stage's along
    assert main(["--flush", "--root", str(root)]) == 1
    assert f"runs left in {folder_of(root)}" in capfd.readouterr().out
    assert {"model0", "next"} <= set(runs(back)[1])
    for parent in folder_of(root).glob("*/parent.json"):
        if "http" in parent.read_text():
            shutil.rmtree(parent.parent)
    assert main(["--flush", "--root", str(root)]) == 0


@pytest.mark.slow
def test_the_follower_of_a_killed_stage_ends_and_loses_nothing(root):
    """Neither a process that the stage forked nor its death keeps the follower."""
    script = (
        "import os, signal, subprocess, sys; from bnncore.tracking import Tracker\n"
        "import random; random.seed(0); state = random.getstate()\n"
        "tracker = Tracker(sys.argv[1], {'a': 1})\n"
        "run = tracker.model('bnn', {'width': 16})\n"
        "for epoch in (1, 2, 3): run.epoch(epoch, {'val_top1': 50.0 + epoch})\n"
        "assert random.getstate() == state\n"
        "assert not {'mlflow', 'torch', 'sqlalchemy'} & set(sys.modules)\n"
        "print(tracker._follower.pid, flush=True)\n"
        "if os.fork() == 0: sys.stdout.close(); os.close(1); sys.stdin.read(); os._exit(0)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    stage = subprocess.Popen(
        [sys.executable, "-c", script, str(root)],
        cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        follower = int(stage.stdout.readline())
        assert stage.wait() == -signal.SIGKILL
        until(lambda: not alive(follower))
    finally:
        stage.kill()
        stage.stdin.close()  # which its child waits for
        stage.stdout.close()
    (parent,), children = runs(root)
    assert curve(root, children["bnn"]) == FULL
    assert parent.info.status == "RUNNING"


@pytest.mark.slow
def test_a_real_server_that_comes_late(root):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    packed = root / "bnn.safetensors"
    packed.write_bytes(b"bits")
    a_stage(root, "fp32", uri=uri)
    assert sync(root) > 0

    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{root}/mlflow.db"]
    command += ["--artifacts-destination", str(root / "artifacts")]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (root / "server.log").open("w") as log:
        server = subprocess.Popen(
            command, env=dict(os.environ) | quiet, stdout=log, stderr=log, start_new_session=True
        )

    def answers():
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{uri}/health", timeout=5).close()
            return True

    try:
        until(answers)
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "30"  # the machine may be busy elsewhere
        with Tracker(root, PARAMS, uri) as tracker:
            tracker.model("fp32", {}).artifact(packed)
        assert not missed(root), "the follower has carried it"
        (parent,), children = runs(uri)
        assert parent.info.status == "FINISHED"
        assert curve(uri, children["fp32"]) == FULL
        names = [a.path for a in client(uri).list_artifacts(children["fp32"].info.run_id)]
        assert names == [packed.name]
        assert tracking.compare_path(root, uri).count(children["fp32"].info.run_id) == 1
    finally:
        os.killpg(server.pid, signal.SIGTERM)  # the group that this test began
        server.wait(30)


# ---------------------------------------------------------------- where


def test_nowhere(root):
    before = list(root.iterdir())
    assert a_stage(root, uri="none", wait=60)
    assert list(root.iterdir()) == before
    (root / "checkpoints").touch()  # no folder can be made here
    assert not a_stage(root, wait=60)


def test_where_the_store_and_the_log_are(tmp_path, monkeypatch):
    queued = tmp_path / ".dvc" / "tmp" / "exps" / "tmpab12"
    assert tracking.resolve_uri(queued) == f"sqlite:///{tmp_path}/mlflow.db"
    assert tracking.resolve_uri(queued, "sqlite:////a/b.db") == "sqlite:////a/b.db"
    assert tracking.resolve_uri(tmp_path, "sqlite:///x.db") == f"sqlite:///{tmp_path}/x.db"
    assert Tracker(queued, {}, wait=0).folder.parent == tmp_path / "checkpoints" / "mlflow"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://example.org")
    assert tracking.resolve_uri(tmp_path) == "http://example.org"
    assert tracking.compare_path(tmp_path, "sqlite:///none.db") is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("none", "nothing is logged: mlflow.uri, or MLFLOW_TRACKING_URI, is none"),
        ("http://x:1", "The runs are at http://x:1"),
    ],
)
def test_the_pages_are_those_of_the_store_that_the_parameters_name(uri, said, tmp_path, capsys):
    (tmp_path / "params.yaml").write_text(f"mlflow: {{uri: '{uri}'}}\n")
    assert main(["--ui", "--root", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == said
