"""Processes of this test run, found by descent, so that a test ends those and no others."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from pathlib import Path


def descendants(pid: int | None = None) -> dict[int, str]:
    """Process id -> command line of all living descendants."""
    parents: dict[int, int] = {}
    commands: dict[int, str] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                if fields[0] != "Z":
                    parents[int(folder.name)] = int(fields[1])
                    command = (folder / "cmdline").read_bytes()
                    commands[int(folder.name)] = command.replace(b"\0", b" ").decode()
    found: dict[int, str] = {}
    front = {os.getpid() if pid is None else pid}
    while front:
        front = {p for p, parent in parents.items() if parent in front} - found.keys()
        found |= {p: commands[p] for p in front}
    return found


def actors(pid: int | None = None) -> list[int]:
    """Process ids of the Ray actors that descend from a process."""
    return sorted(p for p, line in descendants(pid).items() if line.startswith("ray::_Actor"))


def kill(pids, how: int = signal.SIGKILL) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, how)


def gone(pids, seconds: float) -> bool:
    """Whether all these processes end within so many seconds."""
    deadline = time.monotonic() + seconds
    while any(_alive(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        stat = Path(f"/proc/{pid}/stat").read_text()
        return stat.rpartition(")")[2].split()[0] != "Z"
    return False


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports
