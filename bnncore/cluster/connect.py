"""Start a Ray cluster on this machine or join a running one, and say what is wrong where it fails.

Also by which errors Ray says that something that was there is gone (`LOST`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import ray
from ray import exceptions

from bnncore.cluster import token
from bnncore.errors import UserError
from bnncore.params import RayParams

log = logging.getLogger(__name__)

# With these, and with what inherits from them, Ray says that an actor, a worker, a node, an object
# or a place of theirs is gone; another may be had. Ray itself ends workers when memory is short.
LOST = (
    exceptions.RayActorError,
    exceptions.WorkerCrashedError,
    exceptions.OutOfMemoryError,
    exceptions.NodeDiedError,
    exceptions.LocalRayletDiedError,
    exceptions.ObjectLostError,
    exceptions.ActorPlacementGroupRemoved,
    exceptions.TaskPlacementGroupRemoved,
    exceptions.ActorUnschedulableError,
    exceptions.TaskUnschedulableError,
)
SERVERS = ("raylet", "gcs_server")  # without one of these there is no cluster


class ClusterError(UserError, RuntimeError):
    """The cluster is not there, lacks what was asked for, or lost it too often; says what."""


def connect(params: RayParams, **options: Any) -> None:
    """`ray.init` as the parameters and RAY_ADDRESS say; `options` are its own.

    Raises:
        ClusterError: there is no cluster at the address, or the one of here does not start.
    """
    place = params.place()
    options = {"logging_level": "ERROR", "log_to_driver": False, **options}
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # they are raised here all the same
    token.guard(create=place == "local" and os.environ.get("RAY_AUTH_MODE", "token") == "token")
    if place == "local":
        _start({"include_dashboard": False, **options})
    else:
        _join(place, options)
        _name_nodes()


def session_folder(params: RayParams) -> Path:
    """The folder of the cluster's session on this node; its ``logs`` are what Ray serves."""
    connect(params)
    try:
        context = ray.get_runtime_context()
        return Path(context.get_temp_dir()) / context.get_session_name()
    finally:
        ray.shutdown()


def _join(place: str, options: dict[str, Any]) -> None:
    host, _, port = place.rpartition(":")
    try:
        if "://" not in place and port.isdigit():
            # Ray itself would try for ten minutes.
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        ray.init(place, **options)
    except (OSError, exceptions.AuthenticationError) as error:
        raise ClusterError(
            f"ray.address: expected a running Ray cluster at {place!r}, and its token in "
            f"RAY_AUTH_TOKEN or ~/.ray/auth_token: {_line(error)}"
        ) from error


def _start(options: dict[str, Any]) -> None:
    # Ray starts workers at niceness 15: beside any other work they would hardly run at all.
    os.environ.setdefault("RAY_worker_niceness", "0")
    for last in (False, True):
        try:
            with _watched():
                ray.init("local", **options)
            return
        except ClusterError:
            raise
        except Exception as error:  # Ray gives a plain one where a node takes more than 30 s
            ray.shutdown()
            if not re.search("(?i)timed out (during startup|waiting for file)", str(error)):
                raise
            if last:
                raise ClusterError(
                    f"ray: expected a cluster on this machine within 30 s, twice: {_line(error)}"
                ) from error
            log.warning("ray: a cluster on this machine did not start in 30 s; trying once more")


@contextlib.contextmanager
def _watched() -> Iterator[None]:
    """While a cluster starts, see whether its servers live: Ray waits 30 to 60 s for a dead one."""
    over = threading.Event()
    dead: list[str] = []
    known = set(psutil.Process().children())
    seen: dict[psutil.Process, str] = {}

    def look() -> None:
        with contextlib.suppress(psutil.Error):
            for child in set(psutil.Process().children()) - known - seen.keys():
                if child.name() in SERVERS:
                    seen[child] = child.name()
        dead.extend(name for child, name in seen.items() if not _lives(child))

    def watch() -> None:
        while not dead and not over.wait(0.2):
            look()
        if dead and not over.is_set():
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            # In a call to its own library Ray takes no signal, and ends this process in the end.
            if not over.wait(5):
                print(_ended(dead[0]), file=sys.stderr, flush=True)
                os._exit(1)

    watcher = threading.Thread(target=watch, daemon=True)
    if threading.current_thread() is threading.main_thread():
        watcher.start()
    try:
        yield
    except BaseException as error:
        over.set()
        if not dead:
            look()  # where Ray waits for a server's port, no other thread runs
        if not dead:
            raise
        raise ClusterError(_ended(dead[0])) from error
    finally:
        over.set()


def _lives(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _ended(name: str) -> str:
    return (
        f"ray: expected a cluster on this machine, but its {name} ended while it started; is there "
        "memory and room in /tmp and /dev/shm? Its log is in /tmp/ray/session_latest/logs"
    )


def _name_nodes() -> None:
    # Which nodes there are, and later who does what.
    logging.getLogger("bnncore.cluster").setLevel(logging.INFO)
    for node in ray.nodes():
        if node["Alive"]:
            log.info(
                "node %s/%s: %g CPU, %g GPU",
                node["NodeManagerAddress"],
                node["NodeID"][:8],
                node["Resources"].get("CPU", 0),
                node["Resources"].get("GPU", 0),
            )


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
