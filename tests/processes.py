"""Processes of this test run, found by descent, so that a test ends those and no others."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TESTS = Path(__file__).parent


def descendants(pid: int | None = None) -> dict[int, str]:
    """Process id -> command line of all living descendants."""
    parents: dict[int, int] = {}
    commands: dict[int, str] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                command = (folder / "cmdline").read_text(errors="replace")  # may be gone by now
                if fields[0] != "Z":
                    parents[int(folder.name)] = int(fields[1])
                    commands[int(folder.name)] = command.replace("\0", " ")
    found: dict[int, str] = {}
    front = {os.getpid() if pid is None else pid}
    while front:
        front = {p for p, parent in parents.items() if parent in front} - found.keys()
        found |= {p: commands[p] for p in front}
    return found


def actors(pid: int | None = None) -> list[int]:
    """Process ids of the Ray actors that descend from a process."""
    return sorted(p for p, line in descendants(pid).items() if line.startswith("ray::Actor"))


def kill(pids, how: int = signal.SIGKILL) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, how)


def gone(pids, seconds: float) -> bool:
    """Whether all these processes end within so many seconds."""
    deadline = time.monotonic() + seconds
    while any(alive(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def alive(pid: int) -> bool:
    return began(pid) is not None


def began(pid: int) -> int | None:
    """When a living process began, which tells it from a later one of the same id."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] == "Z" else int(fields[19])
    return None


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def environment(**extra: str) -> dict[str, str]:
    """That of a process of this project, without a cluster's address."""
    # Nodes of this machine that other ones join are not told to be alone.
    without = ("RAY_ADDRESS", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")
    kept = {k: v for k, v in os.environ.items() if k not in without}
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    return kept | {"PYTHONPATH": path} | extra


@contextmanager
def two_nodes(
    folder: Path, dashboard: bool = False, **extra: str
) -> Iterator[tuple[dict[str, str], list[subprocess.Popen]]]:
    """Two Ray nodes of one CPU each on this machine, with a token: (environment, nodes).

    With a dashboard, which takes jobs, RAY_ADDRESS of the environment is its address.
    """
    env = environment(
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN=secrets.token_hex(32),
        RAY_enable_open_telemetry="false",
        RAY_worker_niceness="0",
        # A node that is gone is missed after some 5 s; Ray's own periods make it half a minute.
        RAY_health_check_period_ms="1000",
        **extra,
    )
    ray_start = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--num-cpus=1"]
    ray_start += ["--disable-usage-stats"]
    nodes: list[subprocess.Popen] = []
    # Folders of their own, as on two machines; a socket's path has 107 characters at most.
    temporary = Path(tempfile.mkdtemp(prefix="ray"))
    logs = [open(folder / f"node{k}.log", "w") for k in range(2)]  # noqa: SIM115
    try:
        for k, log in enumerate(logs):
            for _ in range(3):  # Ray gives a node 30 s, which is short beside other work
                # Anew each time: another process may have taken one in between.
                metrics, agent, grpc, *ports = free_ports(6)
                if k == 0:
                    port, client, http = ports
                    own = [f"--port={port}", "--head", f"--ray-client-server-port={client}"]
                    own += [f"--include-dashboard={str(dashboard).lower()}"]
                    own += ["--dashboard-host=127.0.0.1", f"--dashboard-port={http}"]
                else:
                    own = [f"--address=127.0.0.1:{port}"]
                own += ["--node-ip-address=127.0.0.1", f"--temp-dir={temporary / str(k)}"]
                own += [f"--metrics-export-port={metrics}", f"--dashboard-agent-grpc-port={grpc}"]
                own += [f"--dashboard-agent-listen-port={agent}"]
                nodes[k:] = [subprocess.Popen([*ray_start, *own], env=env, stdout=log, stderr=log)]
                if _wait_for_line(folder / log.name, "Ray runtime started", nodes[k]):
                    break
            else:
                raise AssertionError((folder / log.name).read_text())
        address = f"http://127.0.0.1:{http}" if dashboard else f"127.0.0.1:{port}"
        yield env | {"RAY_ADDRESS": address}, nodes
    finally:
        for node in reversed(nodes):
            offspring = descendants(node.pid)
            node.terminate()
            try:
                node.wait(30)
            except subprocess.TimeoutExpired:
                node.kill()
            if not gone(offspring, 10):
                kill(offspring)
        for log in logs:
            log.close()
        shutil.rmtree(temporary, ignore_errors=True)


def _wait_for_line(path: Path, line: str, process: subprocess.Popen, seconds: float = 120) -> bool:
    """Whether a process writes a line before it ends."""
    deadline = time.monotonic() + seconds
    while line not in path.read_text():
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline, path.read_text()
        time.sleep(0.2)
    return True
