"""Starting a cluster on this machine and joining others: what is said, what listens, who may."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import ray

from bnncore import params
from bnncore.cluster import connect, token
from bnncore.cluster.connect import LOST, ClusterError
from bnncore.params import RayParams
from pipeline import inputs
from tests import processes

# All that Ray has, so that what a new version brings is looked at before it is used.
GONE = {
    "ActorDiedError",
    "ActorPlacementGroupRemoved",
    "ActorUnavailableError",
    "ActorUnschedulableError",
    "LocalRayletDiedError",
    "NodeDiedError",
    "ObjectFetchTimedOutError",
    "ObjectFreedError",
    "ObjectLostError",
    "ObjectReconstructionFailedError",
    "OutOfMemoryError",
    "OwnerDiedError",
    "RayActorError",
    "ReferenceCountingAssertionError",
    "TaskPlacementGroupRemoved",
    "TaskUnschedulableError",
    "WorkerCrashedError",
}
NOT_GONE = {
    "ActorAlreadyExistsError": "named actors, which are not used",
    "ActorHandleNotFoundError": "a handle of another session: a bug",
    "AsyncioActorExit": "asked for",
    "AuthenticationError": "the token",
    "CrossLanguageError": "Java",
    "GetTimeoutError": "late, not gone",
    "ObjectRefStreamEndOfStreamError": "generators, which are not used",
    "ObjectStoreFullError": "another group would fill it too",
    "OufOfBandObjectRefSerializationException": "a bug",
    "OutOfDiskError": "another group would fill it too",
    "PendingCallsLimitExceeded": "a bug",
    "PlasmaObjectNotAvailable": "late, not gone",
    "RayCgraphCapacityExceeded": "compiled graphs, which are not used",
    "RayChannelError": "compiled graphs, which are not used",
    "RayChannelTimeoutError": "compiled graphs, which are not used",
    "RayDirectTransportError": "direct transport, which is not used",
    "RayError": "the base of all",
    "RaySystemError": "what cannot be unpickled, and a raylet whose death ends the driver too",
    "RayTaskError": "an exception of our code; its cause is looked at",
    "RpcError": "the cluster's own server: nothing is left to go on with",
    "RuntimeEnvSetupError": "another group would have it too",
    "StreamingGeneratorReplayInconsistentError": "generators, which are not used",
    "TaskCancelledError": "asked for",
    "UnserializableException": "a bug",
    "UserCodeException": "an exception of our code",
}


def test_every_error_of_rays_is_known():
    found = {
        name: error
        for name, error in inspect.getmembers(ray.exceptions, inspect.isclass)
        if issubclass(error, ray.exceptions.RayError)
    }
    assert found.keys() == GONE | NOT_GONE.keys()
    assert {name for name, error in found.items() if issubclass(error, LOST)} == GONE


@pytest.mark.timeout(60)  # Ray's own attempts take ten minutes
def test_an_unreachable_cluster_is_named(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ClusterError, match=r"127.0.0.1:9"):
        connect.connect(RayParams(address="127.0.0.1:9"))


@pytest.mark.parametrize("place", ["head", "http://127.0.0.1:8265", "head:", ":1", "a b:1"])
def test_what_is_no_clusters_address_is_refused_before_any_work(tmp_path, monkeypatch, place):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(params.ParamsError, match=r"ray.address: expected local, auto, HOST:PORT"):
        params.parse({"ray": {"address": place}})
    monkeypatch.setenv("RAY_ADDRESS", place)
    with pytest.raises(params.ParamsError, match="RAY_ADDRESS: expected local, auto, HOST:PORT"):
        connect.connect(RayParams())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text("{}")
    with pytest.raises(params.ParamsError, match="RAY_ADDRESS"):
        inputs.main()


@pytest.mark.parametrize("place", ["local", "auto", "[::1]:6379", "head.lan:6379", "ray://h:10001"])
def test_addresses_as_ray_takes_them(monkeypatch, place):
    monkeypatch.setenv("RAY_ADDRESS", place)
    assert RayParams().place() == place
    monkeypatch.delenv("RAY_ADDRESS")
    assert RayParams(address=place).place() == place


@pytest.mark.parametrize(
    "said",
    [
        "The current node timed out during startup. This could happen ..",
        "Timed out waiting for file /tmp/ray/session_1/gcs_server_port_1",
    ],
)
def test_a_cluster_that_was_slow_to_start_is_started_again(monkeypatch, caplog, said):
    """What Ray says of a node that took more than its 30 s; too slow a machine cannot be had."""
    asked = []

    def init(address, **options):
        asked.append(address)
        if len(asked) != 2:
            raise RuntimeError(said)

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    connect.connect(RayParams())
    assert asked == ["local", "local"]
    assert "trying once more" in caplog.text
    asked[:] = ["local"] * 2
    with pytest.raises(ClusterError, match="within 30 s, twice: " + said):
        connect.connect(RayParams())


DIES = """
import sys
from bnncore.cluster.connect import ClusterError, connect
from bnncore.params import RayParams
try:
    connect(RayParams(), num_cpus=1)
except ClusterError as error:
    sys.exit(str(error))
"""


@pytest.mark.slow
@pytest.mark.parametrize("server", connect.SERVERS)
def test_a_cluster_that_dies_while_it_starts_is_told(server):
    """By us, not by Ray, whose own attempts take 30 s for one of them and, for the other, 60."""
    process = subprocess.Popen(
        [sys.executable, "-c", DIES],
        env=processes.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        # From here, for Ray may let no other thread of its process run; and once both are there:
        # before, it waits for the first one's port, 30 s of a dead one.
        there: dict[str, psutil.Process] = {}
        while there.keys() < set(connect.SERVERS):
            assert process.poll() is None, process.stderr.read()
            for child in psutil.Process(process.pid).children():
                with contextlib.suppress(psutil.Error):
                    if (name := child.name()) in connect.SERVERS:
                        there[name] = child
            time.sleep(0.01)
        there[server].kill()
        _, said = process.communicate(timeout=120)
    finally:
        offspring = processes.descendants(process.pid)
        process.kill()
        process.wait()
        processes.kill(offspring)
    assert process.returncode == 1
    assert f"its {server} ended while it started" in said
    assert "Traceback" not in said


def test_a_server_that_no_other_thread_could_see_die_is_told(tmp_path):
    """Ray holds the interpreter while it waits for a server's port, so the watch may never run."""
    server = tmp_path / connect.SERVERS[0]
    server.symlink_to(shutil.which("sleep"))

    def start():
        with connect._watched():
            process = subprocess.Popen([server, "60"])
            process.kill()
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            started.append(process)
            raise RuntimeError("Timed out waiting for file")

    started = []
    with pytest.raises(ClusterError, match=f"its {server.name} ended while it started"):
        start()
    started[0].wait()


LISTENS = """
from bnncore.cluster import collective
from bnncore.cluster.connect import connect
from bnncore.params import RayParams
import json, psutil, ray
connect(RayParams(), num_cpus=1)
store = collective.open_store(ray.util.get_node_ip_address())
@ray.remote
class Waits:
    def begun(self): return True
actor = Waits.remote()
ray.get(actor.begun.remote())
here = psutil.Process()
found = {}
for process in [here, *here.children(recursive=True)]:
    for connection in process.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN:
            found.setdefault(process.name(), []).append(connection.laddr.ip)
print(json.dumps(found))
"""


@pytest.mark.slow
def test_a_cluster_of_this_machine_listens_on_loopback_alone():
    """Its servers, its actors, and where a group of actors meets."""
    done = subprocess.run(
        [sys.executable, "-c", LISTENS], env=processes.environment(),
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {"gcs_server", "raylet", "python"} <= found.keys()
    assert any(name.startswith("ray::Waits") for name in found)
    assert {ip.removeprefix("::ffff:") for those in found.values() for ip in those} == {"127.0.0.1"}


@pytest.mark.parametrize("mode", ["none", "readable", "guarded", "elsewhere", "variable"])
def test_nobody_else_reads_the_token(tmp_path, monkeypatch, mode):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / ".ray" / "auth_token"
    if mode == "elsewhere":
        file = tmp_path / "token"
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    if mode == "variable":
        monkeypatch.setenv("RAY_AUTH_TOKEN", "t" * 64)
    elif mode != "none":
        file.parent.mkdir(exist_ok=True)
        file.write_text("t" * 64 + "\n")
        file.chmod(0o600 if mode == "guarded" else 0o644)
    before = os.umask(0o022)
    try:
        token.guard()
        assert file.exists() == (mode not in ("none", "variable"))
        token.guard(create=True)
    finally:
        os.umask(before)
    if mode == "variable":
        assert not file.exists()
    else:
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert sorted(Path(file.parent).iterdir())[-1] == file, "and nothing beside it"
    known = token.read()
    assert known == ("t" * 64 if mode != "none" else file.read_text())
    assert len(known) == 64
