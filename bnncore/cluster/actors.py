"""Training on a Ray cluster: jobs side by side, and one job's members split over actors.

`Cluster.train_many` gives what `train.train_many` gives. The loop over epochs and the checkpoints
stay in the driver: a thread a running job runs `train.drive` around a `_Group` of actors, each of
which holds a `train.Trainer` with a block of the job's members. Actors of one group exchange
partial logits (B x C) and the gradients of shared trained parameters through torch.distributed,
gloo between CPUs and NCCL between GPUs, and nothing else.

A group is one generation: when one of its actors dies, all of it is given up and the job goes on
from its last finished epoch with a new group on what the cluster has left.

Only this module needs Ray.

Legend: `B` images of a batch, `C` classes, `M` members, `R` actors of a group (ranks).
"""

from __future__ import annotations

import logging
import math
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.autoscaler.sdk import request_resources
from ray.exceptions import (
    GetTimeoutError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)
from torch import Tensor
from torch import distributed as dist

from bnncore.data import Dataset
from bnncore.networks.combine import tree_sum
from bnncore.params import RayParams
from bnncore.training.train import Checkpoint, Job, State, Trained, Trainer, TrainingError, drive

log = logging.getLogger(__name__)
# What says that a worker is gone; Ray itself ends workers when a node's memory is short.
LOST = (RayActorError, WorkerCrashedError, OutOfMemoryError)
# Give up on a job after so many lost groups without a finished epoch between them: a job that
# kills its actors (for want of memory, say) would otherwise be tried for ever.
ATTEMPTS = 3
Epochs = Callable[[Job, dict[str, Any]], None]


class ClusterError(RuntimeError):
    """The cluster lacks what was asked for, or lost it too often; says what."""


class _GroupLost(RuntimeError):
    """An actor of a group died; the group is of no further use."""


def blocks(ids: tuple[int, ...], actors: int) -> list[tuple[int, ...]]:
    """Members of a job in equal consecutive blocks, one an actor, the last one may be shorter.

    Where the size of a block is a power of two, the sum of all members' logits has the same bits
    as in one process (`ensemble.tree_sum`).
    """
    size = math.ceil(len(ids) / actors)
    return [ids[k : k + size] for k in range(0, len(ids), size)]


# -- inside an actor ---------------------------------------------------------------------------


class Collective:
    """Sums over the ranks of a torch.distributed group; the order of additions is our own.

    Every rank adds up its own part of the tensor, in the order of a binary tree over the ranks, and
    hands it to all: bits depend neither on the backend nor on timing. A rank sends 2 (R-1)/R times
    the tensor.

    Attributes:
        sent: bytes this rank has sent.
        seconds: time spent in sums, waiting for slower ranks included.
    """

    def __init__(self, backend: str, group: dist.ProcessGroup | None = None):
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.backend, self.group = backend, group
        self.sent = 0
        self.seconds = 0.0

    def sum(self, value: Tensor) -> Tensor:
        started = time.perf_counter()
        device = torch.device("cpu") if self.backend == "gloo" else value.device
        flat = value.detach().to(device).flatten()
        chunk = math.ceil(flat.numel() / self.size)
        padded = flat.new_zeros(self.size * chunk)
        padded[: flat.numel()] = flat
        if self.size == 2:  # as many bytes in one round
            parts = torch.empty(2 * len(padded), dtype=flat.dtype, device=device)
            dist.all_gather_into_tensor(parts, padded, self.group)
            total = tree_sum(list(parts.split(len(padded))))
        else:
            parts = torch.empty_like(padded)
            dist.all_to_all_single(parts, padded, group=self.group)
            total = torch.empty_like(padded)
            own = tree_sum(list(parts.split(chunk)))
            dist.all_gather_into_tensor(total, own, self.group)
        self.sent += 2 * (self.size - 1) * chunk * flat.element_size()
        result = total[: flat.numel()].view_as(value).to(value.device)
        self.seconds += time.perf_counter() - started
        return result


@dataclass(frozen=True)
class _Place:
    """What one actor of a group does: its rank, members and shards.

    Ranks count members first: `depth` consecutive ones hold the same members and share out the
    shards of each batch.
    """

    rank: int
    size: int
    depth: int
    hold: tuple[int, ...]
    shards: tuple[int, ...]
    meet: tuple[str, int] | None
    backend: str
    replay: bool | None
    memory_share: float


class _Actor:
    """Holds a trainer for one rank of one group at a time."""

    def __init__(self, threads: int, device: str):
        torch.set_num_threads(threads)
        self.device = device
        self.trainer: Trainer | None = None
        self.store: dist.TCPStore | None = None

    def where(self) -> dict[str, Any]:
        node = ray.get_runtime_context().get_node_id()
        return {"node": f"{ray.util.get_node_ip_address()}/{node[:8]}", "pid": os.getpid()}

    def host(self) -> tuple[str, int]:
        """Open the meeting place of a group; returns its address."""
        address = ray.util.get_node_ip_address()
        self.store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False)
        return address, self.store.port

    def start(self, job: Job, data: Dataset, place: _Place) -> None:
        """Join the group and make ready to train."""
        self.close()
        exchange = within = None
        if place.meet is not None:
            if place.backend == "gloo" and place.meet[0].startswith("127."):
                os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            store = self.store if place.rank == 0 else dist.TCPStore(*place.meet, place.size, False)
            dist.init_process_group(
                place.backend, store=store, rank=place.rank, world_size=place.size
            )
            exchange = Collective(place.backend)
            if place.depth > 1:
                starts = range(0, place.size, place.depth)
                ranks = [list(range(k, k + place.depth)) for k in starts]
                groups = [dist.new_group(r, backend=place.backend) for r in ranks]  # all make all
                within = Collective(place.backend, groups[place.rank // place.depth])
        self.trainer = Trainer(
            job,
            data,
            place.hold,
            exchange,
            self.device,
            replay=place.replay,
            shards=place.shards,
            within=within,
            memory_share=place.memory_share,
        )

    def call(self, name: str, *args):
        """A method of the trainer, by name."""
        return getattr(self.trainer, name)(*args)

    def close(self) -> None:
        self.trainer = None
        if dist.is_initialized():
            dist.destroy_process_group()


# -- in the driver -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """How a group is laid out: `depth` actors share a member's batches."""

    depth: int
    backend: str
    replay: bool | None
    memory_share: float


class _Group:
    """The actors that train one job together, with the interface of a `Trainer`."""

    def __init__(self, job: Job, data: ray.ObjectRef, actors: list, plan: _Layout):
        self.job, self.actors, self.depth = job, actors, plan.depth
        places = self._get([actor.where.remote() for actor in actors])
        log.info(
            "%s: %d actor(s) on %s",
            job.name,
            len(actors),
            ", ".join(sorted({place["node"] for place in places})),
        )
        size, each = len(actors), job.recipe.shards // plan.depth
        held = [hold for hold in blocks(job.ids, size // plan.depth) for _ in range(plan.depth)]
        meet = self._get([actors[0].host.remote()])[0] if size > 1 else None
        # One copy of the start in the object store, however many actors read it.
        sent = ray.put(job)
        starting = []
        for rank, (actor, hold) in enumerate(zip(actors, held, strict=True)):
            first = rank % plan.depth * each
            place = _Place(
                rank=rank,
                size=size,
                depth=plan.depth,
                hold=hold,
                shards=tuple(range(first, first + each)),
                meet=meet,
                backend=plan.backend,
                replay=plan.replay,
                memory_share=plan.memory_share,
            )
            starting.append(actor.start.remote(sent, data, place))
        self._get(starting)

    def _get(self, refs: list) -> list:
        """Results of all, or the first failure: the others of a broken group may wait for ever."""
        waiting = list(refs)
        try:
            while waiting:
                done, waiting = ray.wait(waiting, num_returns=1)
                ray.get(done)
            return ray.get(refs)
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, TrainingError):
                raise TrainingError(str(cause)) from None
            if isinstance(cause, dist.DistError) or (
                len(self.actors) > 1 and isinstance(cause, RuntimeError) and self._peer_died()
            ):
                raise _GroupLost(f"{self.job.name}: {cause}") from error
            raise
        except LOST as error:
            raise _GroupLost(f"{self.job.name}: {error}") from error

    def _peer_died(self) -> bool:
        # gloo reports a dead peer as a plain RuntimeError, often before Ray knows of the death.
        try:
            ray.get([actor.where.remote() for actor in self.actors], timeout=10)
        except (*LOST, GetTimeoutError):
            return True
        return False

    def _call(self, name: str, *args) -> list:
        return self._get([actor.call.remote(name, *args) for actor in self.actors])

    def epoch(self, history: list[dict[str, Any]]) -> tuple[dict[str, float], np.ndarray]:
        results = self._call("epoch", history)
        sums = results[0][0] | {"actors": len(self.actors)}
        return sums, np.concatenate([outputs for _, outputs in results[:: self.depth]])

    def validation_outputs(self) -> np.ndarray:
        return np.concatenate(self._call("validation_outputs")[:: self.depth])

    def bias(self) -> Tensor | None:
        return self._get([self.actors[0].call.remote("bias")])[0]

    def state(self) -> State:
        merged: State = {}
        for state in self._call("state"):
            merged |= state
        return merged

    def load(self, state: State) -> None:
        self._call("load", ray.put(state))

    def close(self) -> None:
        """Leave the actors ready for another job."""
        self._get([actor.close.remote() for actor in self.actors])


class _Memory:
    """A checkpoint that lives as long as the driver."""

    def __init__(self):
        self.saved: tuple[State, list[dict[str, Any]]] | None = None

    def load(self):
        return self.saved and (self.saved[0], list(self.saved[1]))

    def save(self, state: State, history: list[dict[str, Any]]) -> None:
        self.saved = (state, list(history))

    def close(self) -> None:
        pass


class Cluster:
    """A handle on a Ray cluster: ``with Cluster(params) as cluster: cluster.train_many(...)``.

    Starts one on this machine (``address: local``) or joins a running one, whose nodes must have
    this package. Entering compares what is asked with what the cluster has.

    Args:
        params: the ``ray`` section of the parameters.

    Attributes:
        lost: how many groups of actors were lost and replaced.

    Raises:
        ClusterError: what one actor takes is nowhere to be had within ``wait_s``; says what is
            missing.
    """

    def __init__(self, params: RayParams | None = None):
        self.params = params or RayParams()
        self.lost = 0
        self._owner = False
        self._asked = False
        self._idle: list = []
        self._busy = 0
        self._free = threading.Condition()
        self._data: tuple[Dataset, ray.ObjectRef] | None = None

    def __enter__(self) -> Cluster:
        if not ray.is_initialized():
            connect(self.params)
            self._owner = True
        try:
            self._wait_for_resources()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error) -> None:
        for actor in self._idle:
            ray.kill(actor)
        self._idle.clear()
        self._data = None
        if self._asked:  # else the autoscaler would keep those nodes for ever
            request_resources(bundles=[])
            self._asked = False
        if self._owner:
            ray.shutdown()
            self._owner = False

    # -- resources -------------------------------------------------------------------------

    @property
    def gpus_per_actor(self) -> float:
        if self.params.gpus_per_actor is None:
            return 1.0 if ray.cluster_resources().get("GPU") else 0.0
        return self.params.gpus_per_actor

    def slots(self) -> int:
        """How many actors the nodes that are alive can hold, at most ``actors``."""
        cpus, gpus = self.params.cpus_per_actor, self.gpus_per_actor
        total = 0
        for node in ray.nodes():
            if node["Alive"]:
                has = node["Resources"]
                fit = int(has.get("CPU", 0) // cpus)
                if gpus >= 1:
                    fit = min(fit, int(has.get("GPU", 0) // math.ceil(gpus)))
                elif gpus > 0:  # a fraction does not straddle two GPUs
                    fit = min(fit, int(has.get("GPU", 0)) * int(1 / gpus + 1e-9))
                total += fit
        return min(total, self.params.actors or total)

    def _wait_for_resources(self) -> None:
        wanted = self.params.actors or 1
        asks = {"CPU": self.params.cpus_per_actor, "GPU": self.gpus_per_actor}
        deadline = time.monotonic() + self.params.wait_s
        # A cluster that was started here does not grow.
        local = self._owner and _address(self.params) == "local"
        if self.slots() < wanted and not local and self.params.wait_s:
            # An autoscaler adds nodes for what is asked of it, not for what is waited for.
            request_resources(bundles=[{k: v for k, v in asks.items() if v}] * wanted)
            self._asked = True
        while self.slots() < wanted and not local and time.monotonic() < deadline:
            time.sleep(0.5)
        slots = self.slots()
        if slots >= wanted:
            return
        found = ray.cluster_resources()
        have = ", ".join(f"{found.get(k, 0):g} {k}" for k in asks)
        need = " and ".join(f"{v:g} {k}" for k, v in asks.items() if v)
        message = (
            f"ray: {wanted} actor(s) of {need} each were asked for; the cluster has {have} in all "
            f"(after waiting {0 if local else self.params.wait_s:g} s): room for {slots}"
        )
        if not slots:
            raise ClusterError(
                f"{message}; expected room for at least 1: lower ray.cpus_per_actor or "
                "ray.gpus_per_actor, or add nodes"
            )
        log.warning("%s; going on with those", message)

    def _layout(self, job: Job, size: int) -> _Layout:
        gpus = self.gpus_per_actor
        cpus = [n["Resources"].get("CPU", 0) for n in ray.nodes() if n["Alive"]]
        return _Layout(
            depth=max(1, size // len(job.ids)),
            backend="nccl" if gpus >= 1 else "gloo",
            replay=self.params.replay,
            memory_share=min(1, gpus) if gpus else self.params.cpus_per_actor / max(1, *cpus, 0),
        )

    def _size(self, job: Job, slots: int) -> int:
        """How many actors are of use to a job: blocks of members, or members times shards."""
        members, shards = len(job.ids), job.recipe.shards
        if slots >= 2 * members and shards > 1:
            depth = max(d for d in range(1, shards + 1) if shards % d == 0 and d * members <= slots)
            return members * depth
        return len(blocks(job.ids, slots))

    def _take(self, job: Job) -> list:
        """Actors for a job: as many as are of use and the cluster holds."""
        with self._free:
            while True:
                slots = self.slots()
                if slots == 0:
                    raise ClusterError("ray: expected room for at least 1 actor, found none left")
                size = self._size(job, slots)
                if self._busy + size <= slots:
                    break
                self._free.wait(timeout=5)
            self._busy += size
            actors = [self._idle.pop() for _ in range(min(size, len(self._idle)))]
        try:
            actors += [self._new_actor() for _ in range(size - len(actors))]
            alive = [actor.where.remote() for actor in actors]
            self._wait_for(alive)
        except LOST as error:
            self._discard(actors)
            raise _GroupLost(str(error)) from error
        except BaseException:
            self._discard(actors)
            raise
        return actors

    def _wait_for(self, alive: list) -> None:
        deadline = time.monotonic() + self.params.wait_s + 30
        late = alive
        while late:
            ready, late = ray.wait(late, num_returns=len(late), timeout=2)
            ray.get(ready)
            if late and self.slots() < self._busy:
                raise _GroupLost("a node left while actors were starting")
            if late and time.monotonic() > deadline:
                raise ClusterError(
                    f"ray: {len(late)} of {len(alive)} actors did not start within "
                    f"{self.params.wait_s + 30:g} s: is the cluster busy with other work? "
                    f"Free now: {ray.available_resources()}"
                )

    def _new_actor(self):
        gpus = self.gpus_per_actor
        options = {"num_cpus": self.params.cpus_per_actor, "num_gpus": gpus, "max_restarts": 0}
        device = "cuda" if gpus else "cpu"
        return ray.remote(_Actor).options(**options).remote(self.params.cpus_per_actor, device)

    def _give_back(self, actors: list) -> None:
        with self._free:
            self._idle += actors
            self._busy -= len(actors)
            self._free.notify_all()

    def _discard(self, actors: list) -> None:
        for actor in actors:
            ray.kill(actor)
        with self._free:
            self._busy -= len(actors)
            self._free.notify_all()

    def _put(self, data: Dataset) -> ray.ObjectRef:
        """The data set's one copy in the object store."""
        with self._free:
            if self._data is None or self._data[0] is not data:
                self._data = (data, ray.put(data))
            return self._data[1]

    # -- training --------------------------------------------------------------------------

    def train_many(
        self,
        jobs: list[Job],
        data: Dataset,
        checkpoints: Path | None = None,
        on_epoch: Epochs | None = None,
    ) -> list[Trained]:
        """Train jobs, as many at once as there is room for, members of one job over actors.

        Args:
            jobs: what to train; results come in this order.
            data: put into the object store once; actors of a node read one copy.
            checkpoints: folder of the checkpoints; without it a lost actor is survived all the
                same, the driver's end is not.
            on_epoch: called with each finished epoch, from one thread at a time.

        Raises:
            TrainingError: from the first job that fails; the others are stopped and keep their
                checkpoints.
            ClusterError: the cluster has no room left, or a job lost its actors too often.
        """
        if not jobs:
            return []
        run = _Run(self, data, checkpoints, on_epoch)
        threads = min(len(jobs), max(1, self.slots()))
        with ThreadPoolExecutor(threads) as pool:
            futures = [pool.submit(run.train, job) for job in jobs]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                failed = [f for f in done if f.exception()]
            except BaseException:
                run.stop(futures)
                raise
            if failed:
                run.stop(futures)
        if failed:
            raise failed[0].exception()  # type: ignore[misc]
        return [future.result() for future in futures]


class _Run:
    """One call of `Cluster.train_many`: what its threads share."""

    def __init__(self, cluster: Cluster, data: Dataset, checkpoints, on_epoch):
        self.cluster, self.data, self.checkpoints = cluster, data, checkpoints
        self.on_epoch = on_epoch
        self.ref = cluster._put(data)
        self.running: dict[str, list] = {}
        self.lock = threading.RLock()
        self.stopped = False

    def stop(self, futures: list) -> None:
        """Jobs that have not begun never will; those that run lose their actors."""
        with self.lock:
            self.stopped = True
            for future in futures:
                future.cancel()
            for actors in self.running.values():
                for actor in actors:
                    ray.kill(actor)

    def train(self, job: Job) -> Trained:
        checkpoint: Any = _Memory()
        if self.checkpoints:
            checkpoint = Checkpoint(self.checkpoints, f"{job.name}-{job.digest(self.data)}")
        seen, lost = 0, 0

        def finished(job: Job, epoch: dict[str, Any]) -> None:
            nonlocal seen, lost
            if epoch["epoch"] <= seen:  # a new group tells the old epochs again
                return
            seen, lost = epoch["epoch"], 0
            with self.lock:
                if self.on_epoch:
                    self.on_epoch(job, epoch)

        try:
            while True:
                try:
                    return self._attempt(job, checkpoint, finished)
                except _GroupLost as error:
                    lost += 1
                    if self.stopped:
                        raise
                    if lost >= ATTEMPTS:
                        raise ClusterError(
                            f"{job.name}: lost its actors {lost} times without finishing an epoch "
                            f"(last: {error}); is there enough memory?"
                        ) from error
                    self.cluster.lost += 1
                    log.warning(
                        "%s: lost an actor after epoch %d, going on from there (%s)",
                        job.name,
                        seen,
                        str(error).splitlines()[0],
                    )
        finally:
            checkpoint.close()

    def _attempt(self, job: Job, checkpoint, finished: Epochs) -> Trained:
        actors = self.cluster._take(job)
        with self.lock:
            self.running[job.name] = actors
        try:
            if self.stopped:
                raise _GroupLost(f"{job.name}: stopped")
            group = _Group(job, self.ref, actors, self.cluster._layout(job, len(actors)))
            trained = drive(job, self.data, group, checkpoint, finished)
            group.close()
            if trained.history:
                _tell(job, trained.history[-1])
        except BaseException:
            self.cluster._discard(actors)
            raise
        finally:
            with self.lock:
                del self.running[job.name]
        self.cluster._give_back(actors)
        return trained


def _tell(job: Job, epoch: dict[str, Any]) -> None:
    """How fast the actors of a job were, and how much of it went into the exchange."""
    text = "{images_per_s:.0f} images/s"
    if "exchange_share" in epoch:
        text += ", {exchange_share:.0%} of the time exchanging {sent_per_step:.0f} bytes a step"
    log.info("%s: last epoch %s", job.name, text.format(**epoch))


def _address(params: RayParams) -> str:
    return os.environ.get("RAY_ADDRESS") or params.address


def _init(address: str, **options: Any) -> None:
    """`ray.init`, once more where a cluster on this machine was slow to start.

    Raises:
        ConnectionError: nothing listens at the address; Ray itself would try for ten minutes.
    """
    host, _, port = address.rpartition(":")
    if "://" not in address and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError as error:
            raise ConnectionError(str(error)) from error
    try:
        ray.init(address, **options)
    except Exception as error:  # Ray gives a plain one where a node takes more than 30 s
        if address != "local" or "timed out during startup" not in str(error):
            raise
        log.warning("ray: a cluster on this machine did not start in 30 s; trying once more")
        ray.shutdown()
        ray.init(address, **options)


def connect(params: RayParams, **options: Any) -> None:
    """`ray.init` as the parameters and RAY_ADDRESS say; `options` are its own.

    Raises:
        ClusterError: there is no cluster at the address.
    """
    address = _address(params)
    options = {"logging_level": "ERROR", "log_to_driver": False, **options}
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # they are raised here all the same
    if address == "local":
        options.setdefault("include_dashboard", False)
        # Ray starts workers at niceness 15: beside any other work they would hardly run at all.
        os.environ.setdefault("RAY_worker_niceness", "0")
    try:
        _init(address, **options)
    except ConnectionError as error:
        raise ClusterError(
            f"ray.address: expected a running Ray cluster at {address!r}, and its token in "
            f"RAY_AUTH_TOKEN or ~/.ray/auth_token: {error}"
        ) from error
    if address != "local":  # which nodes there are, and later who does what
        log.setLevel(logging.INFO)
        for node in ray.nodes():
            if node["Alive"]:
                log.info(
                    "node %s/%s: %g CPU, %g GPU",
                    node["NodeManagerAddress"],
                    node["NodeID"][:8],
                    node["Resources"].get("CPU", 0),
                    node["Resources"].get("GPU", 0),
                )
