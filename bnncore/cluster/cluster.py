"""A handle on a Ray cluster: jobs side by side, and one job's members spread over actors.

`Cluster.train_many` gives what `train.train_many` gives. The loop over epochs and the checkpoints
stay in the driver: a thread a running job runs `train.drive` around a `Group` of actors. A lost
group costs its job the epoch it was in: the job goes on with a new group on what the cluster has
left. `Cluster.side_by_side` is for what makes one job of another's results, several at once.

Where actors are is Ray's to say: a group asks for a placement group, which is had whole or not at
all, waits in Ray's queue, and is what an autoscaler adds nodes for. Actors that a job is done with
are there for the next, however many of them it takes: to start one takes seconds.
"""

from __future__ import annotations

import contextlib
import logging
import math
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from bnncore.cluster.actor import Actor
from bnncore.cluster.connect import LOST, ClusterError, connect
from bnncore.cluster.group import Group, GroupLost, actors_of_use
from bnncore.data import Dataset
from bnncore.params import RayParams
from bnncore.training import memory
from bnncore.training.checkpoint import Checkpoint
from bnncore.training.devices import Place
from bnncore.training.jobs import Epoch, Job, Trained
from bnncore.training.loop import OnEpoch, drive
from bnncore.training.schemes import TrainMany

log = logging.getLogger(__name__)
T = TypeVar("T")
# What has jobs trained by the first argument, and waits by the second for an earlier one's result.
Maker = Callable[[TrainMany, Callable[[str], T]], T]
# Give up on a job after so many lost groups without a finished epoch between them: a job that
# kills its actors (for want of memory, say) would otherwise be tried for ever.
ATTEMPTS = 3
TASKS_A_GPU = 8  # at most, of those that are small
START_S = 30.0  # what a process may take to start, beside `wait_s`


def _device(gpus: float) -> str:
    return "cuda" if gpus else "cpu"


class Room:
    """What Ray sets aside for so many actors: all of it or nothing, until the last has ended."""

    def __init__(self, bundles: list[dict[str, float]]):
        self.size = len(bundles)
        self.place: PlacementGroup = placement_group(bundles, strategy="PACK")
        self.seats = {Seat(self, k) for k in range(self.size)}

    @property
    def whole(self) -> bool:
        """Whether none of its actors has ended. What one had is not given to another: it may be
        of a node that is gone."""
        return len(self.seats) == self.size


class Seat:
    """An actor's part of a room, and the actor once it is started."""

    def __init__(self, room: Room, number: int):
        self.room, self.number = room, number
        self.actor: Any = None

    def start(self, params: RayParams, gpus: float) -> None:
        cpus, device = params.cpus_per_actor, _device(gpus)
        options = ray.remote(Actor).options(
            num_cpus=cpus,
            num_gpus=gpus,
            max_restarts=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(self.room.place, self.number),
        )
        self.actor = options.remote(cpus, device)

    def end(self) -> None:
        if self.actor is not None:
            ray.kill(self.actor)
        self.room.seats.discard(self)
        if not self.room.seats:
            remove_placement_group(self.room.place)


class Gang:
    """The actors of a job: some that had been idle, and the rest in a new room."""

    def __init__(self, seats: list[Seat], room: Room | None):
        self.seats = seats + (sorted(room.seats, key=lambda seat: seat.number) if room else [])
        self.size = len(self.seats)
        self.room = room

    @property
    def actors(self) -> list[Any]:
        return [seat.actor for seat in self.seats]

    def end(self) -> None:
        for seat in self.seats:
            seat.end()


@dataclass(eq=False)
class Ticket:
    """A job that waits for actors.

    Attributes:
        rank: the lower, the earlier it is served; those of one rank in the order of their coming.
        gang: its actors, once it is served.
    """

    job: Job
    rank: int
    gang: Gang | None = None


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
        self._gpu: int | None = None
        self._idle: list[Seat] = []
        self._busy: list[Gang] = []
        self._queue: list[Ticket] = []
        self._free = threading.Condition(threading.RLock())
        self._data: tuple[Dataset, ray.ObjectRef] | None = None

    def __enter__(self) -> Cluster:
        if not ray.is_initialized():
            connect(self.params)
            self._owner = True
        try:
            self._wait_for_nodes()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._end_idle()
        self._data = None
        if self._owner:
            ray.shutdown()
            self._owner = False

    # -- what there is ---------------------------------------------------------------------

    @property
    def gpus_per_actor(self) -> float:
        if self.params.gpus_per_actor is None:
            return 1.0 if ray.cluster_resources().get("GPU") else 0.0
        return self.params.gpus_per_actor

    @property
    def device(self) -> str:
        """The type of device that actors train on."""
        return _device(self.gpus_per_actor)

    def place(self, need: int) -> tuple[float, Place]:
        """What a task of its own has, whose training takes `need` bytes: GPUs to reserve, and what
        it is told. Where the parameters leave it open, tasks share a GPU as far as they fit.
        """
        gpus = self.gpus_per_actor
        if gpus and self.params.gpus_per_actor is None:
            gpus = 1 / min(TASKS_A_GPU, max(1, self._gpu_bytes() // max(1, need)))
        return gpus, Place(self.params.cpus_per_actor, _device(gpus), min(1.0, gpus) or 1.0)

    def _gpu_bytes(self) -> int:
        """Memory of one of the cluster's GPUs; they are taken to be alike."""
        if self._gpu is None:
            ask = ray.remote(memory.of_gpu).options(num_cpus=0, num_gpus=1 / TASKS_A_GPU)
            self._gpu = ray.get(ask.remote())
        return self._gpu

    def slots(self, gpus: float | None = None) -> int:
        """How many actors the nodes that are alive can hold, at most ``actors``.

        Args:
            gpus: what one takes; `gpus_per_actor` if None.
        """
        cpus = self.params.cpus_per_actor
        gpus = self.gpus_per_actor if gpus is None else gpus
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

    def _bundles(self, count: int) -> list[dict[str, float]]:
        asks = {"CPU": float(self.params.cpus_per_actor), "GPU": self.gpus_per_actor}
        return [{name: ask for name, ask in asks.items() if ask}] * count

    def _shortage(self, wanted: int, waited: float) -> str:
        """What was asked for and what there is, in words."""
        found = ray.cluster_resources()
        have = ", ".join(f"{found.get(name, 0):g} {name}" for name in ("CPU", "GPU"))
        need = " and ".join(f"{ask:g} {name}" for name, ask in self._bundles(1)[0].items())
        return (
            f"ray: {wanted} actor(s) of {need} each were asked for; the cluster has {have} in all "
            f"(after waiting {waited:g} s): room for {self.slots()}"
        )

    def _wait_for_nodes(self) -> None:
        wanted, waited = self.params.actors or 1, 0.0
        # A cluster that was started here does not grow.
        local = self._owner and self.params.place() == "local"
        if self.slots() < wanted and not local and self.params.wait_s:
            waited = self.params.wait_s
            place = placement_group(self._bundles(wanted))  # an autoscaler adds nodes for it
            try:
                place.wait(waited)
            finally:
                remove_placement_group(place)
        if self.slots() >= wanted:
            return
        message = self._shortage(wanted, waited)
        if not self.slots():
            raise ClusterError(
                f"{message}; expected room for at least 1: lower ray.cpus_per_actor or "
                "ray.gpus_per_actor, or add nodes"
            )
        log.warning("%s; going on with those", message)

    # -- gangs -----------------------------------------------------------------------------

    @contextlib.contextmanager
    def _gang(self, job: Job, rank: int, go_on: Callable[[], None]) -> Iterator[Gang]:
        """Actors for a job; kept for other ones if all goes well in the body, else ended.

        Args:
            rank: `Ticket.rank`.
            go_on: asked again and again while it waits; raises if it is not to.
        """
        gang = self._take(Ticket(job, rank), go_on)
        try:
            if gang.room:
                self._wait_for([gang.room.place.ready()], gang, go_on)
                for seat in gang.seats:
                    if seat.actor is None:
                        seat.start(self.params, self.gpus_per_actor)
            self._wait_for([actor.where.remote() for actor in gang.actors], gang, go_on)
            yield gang
        except BaseException as error:
            gang.end()
            if isinstance(error, LOST):
                raise GroupLost(str(error)) from error
            raise
        else:
            with self._free:
                self._idle += gang.seats
        finally:
            with self._free:
                self._busy.remove(gang)
                self._end([seat for seat in self._idle if not seat.room.whole])
                self._free.notify_all()

    def _take(self, ticket: Ticket, go_on: Callable[[], None]) -> Gang:
        """As many actors as are of use to a job and the cluster holds beside our others."""
        with self._free:
            self._queue.append(ticket)
            self._queue.sort(key=lambda waiting: waiting.rank)
            try:
                self._serve()
                while ticket.gang is None:
                    self._free.wait(timeout=5)
                    if ticket.gang is None:  # what was given is ended by who has it
                        go_on()
                        if self._queue[0] is ticket:  # one is enough to ask Ray
                            self._serve()
            finally:
                if ticket in self._queue:
                    self._queue.remove(ticket)
                self._free.notify_all()
            return ticket.gang

    def _serve(self) -> None:
        """Give actors to those that wait. One that needs more than are free lets others pass."""
        slots, device = self.slots(), self.device
        if slots == 0:
            raise ClusterError("ray: expected room for at least 1 actor, found none left")
        for ticket in list(self._queue):
            size = actors_of_use(ticket.job, slots, device)
            if size > len(self._idle) and not self._busy:
                self._end_idle()  # they may hold the room
            new = max(0, size - len(self._idle))
            busy = [seat for gang in self._busy for seat in gang.seats]
            held = sum(room.size for room in {seat.room for seat in [*self._idle, *busy]})
            if len(busy) + size <= slots and (not new or held + new <= slots):
                seats, self._idle = self._idle[:size], self._idle[size:]
                ticket.gang = Gang(seats, Room(self._bundles(new)) if new else None)
                self._busy.append(ticket.gang)
                self._queue.remove(ticket)
        self._free.notify_all()

    def _wait_for(self, refs: list[ray.ObjectRef], gang: Gang, go_on: Callable[[], None]) -> None:
        patience = self.params.wait_s + START_S
        deadline = time.monotonic() + patience
        while refs:
            ready, refs = ray.wait(refs, num_returns=len(refs), timeout=2)
            ray.get(ready)
            go_on()
            if refs and self.slots() < gang.size:
                raise GroupLost("a node left while actors were starting")
            if refs and time.monotonic() > deadline:
                raise ClusterError(
                    f"{self._shortage(gang.size, patience)}, but they did not start: is the "
                    f"cluster busy with other work? Free now: {ray.available_resources()}"
                )

    def _end_idle(self) -> None:
        self._end(self._idle)

    def _end(self, seats: list[Seat]) -> None:
        for seat in list(seats):
            self._idle.remove(seat)
            seat.end()

    def _options(self) -> dict[str, Any]:
        """Of a `Group`, whatever its job."""
        gpus = self.gpus_per_actor
        cpus = [n["Resources"].get("CPU", 0) for n in ray.nodes() if n["Alive"]]
        return {
            "backend": "nccl" if gpus >= 1 else "gloo",
            "device": self.device,
            "replay": self.params.replay,
            "memory_share": min(1, gpus) if gpus else self.params.cpus_per_actor / max(1, *cpus, 0),
        }

    def put(self, data: Dataset) -> ray.ObjectRef:
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
        on_epoch: OnEpoch | None = None,
    ) -> list[Trained]:
        """Train jobs, as many at once as there is room for, members of one job over actors.

        Args:
            jobs: what to train; results come in this order.
            data: put into the object store once; actors of a node read one copy.
            checkpoints: folder of the checkpoints; None for one that ends with this call, so that
                a lost actor is survived, and the driver's end is not.
            on_epoch: called with each finished epoch, from one thread at a time.

        Raises:
            TrainingError: from the first job that fails; the others are stopped and keep their
                checkpoints.
            ClusterError: the cluster has no room left, or a job lost its actors too often.
        """
        if not jobs:
            return []
        with self._run(data, checkpoints, on_epoch) as run:
            return run.train_many(jobs)

    def side_by_side(
        self,
        makers: Mapping[str, Maker[T]],
        data: Dataset,
        checkpoints: Path | None = None,
        on_epoch: OnEpoch | None = None,
    ) -> dict[str, T]:
        """Results of functions that have jobs trained; the jobs of all of them share the cluster.

        A scheme that trains one job after another, or one with fewer members than there are actors,
        leaves actors idle, which those after it use. How many actors a job has does not depend on
        what else is trained.

        Args:
            makers: by name, functions of ``(train_many, result_of)``, where ``result_of(name)``
                waits for an earlier one's result. They run by turns, one at a time but for these
                two calls: what builds networks sets torch's global random state.
            data, checkpoints, on_epoch: as of `train_many`.

        Raises:
            Exception: the first of a maker; the others' jobs are stopped and keep their
                checkpoints.
        """
        with self._run(data, checkpoints, on_epoch) as run:
            return run.side_by_side(makers)

    @contextlib.contextmanager
    def _run(
        self, data: Dataset, checkpoints: Path | None, on_epoch: OnEpoch | None
    ) -> Iterator[_Run]:
        kept = contextlib.nullcontext(checkpoints) if checkpoints else tempfile.TemporaryDirectory()
        with kept as folder:
            yield _Run(self, data, Path(folder), on_epoch)


class _Run:
    """One call of `Cluster.train_many` or `side_by_side`: what its threads share."""

    def __init__(
        self, cluster: Cluster, data: Dataset, checkpoints: Path, on_epoch: OnEpoch | None
    ):
        self.cluster, self.data, self.checkpoints = cluster, data, checkpoints
        self.on_epoch = on_epoch
        self.ref = cluster.put(data)
        self.running: dict[str, Gang] = {}
        self.lock = threading.RLock()
        self.error: BaseException | None = None  # why it was stopped

    def train_many(self, jobs: list[Job], rank: int = 0) -> list[Trained]:
        """As `Cluster.train_many`.

        Args:
            rank: `Ticket.rank`.
        """
        calls = [partial(self.train, job, rank) for job in jobs]
        return self._at_once(calls, self.cluster.slots())

    def side_by_side(self, makers: Mapping[str, Maker[T]]) -> dict[str, T]:
        """As `Cluster.side_by_side`."""
        # Each that has begun keeps a start in memory; one of them may wait for many actors.
        begun = threading.Semaphore(self.cluster.slots() + 1)
        turn, names = threading.Lock(), list(makers)
        futures: list[Future[T]] = []

        def make(rank: int, maker: Maker[T]) -> T:
            def train_many(jobs: list[Job]) -> list[Trained]:
                with _released(turn):
                    return self.train_many(jobs, rank)

            def result_of(name: str) -> T:
                with _released(turn), _released(begun):  # the turn is taken again last
                    return futures[names[:rank].index(name)].result()

            with begun, turn:
                self._go_on(names[rank])
                return maker(train_many, result_of)

        calls = [partial(make, rank, maker) for rank, maker in enumerate(makers.values())]
        return dict(zip(names, self._at_once(calls, len(calls), futures), strict=True))

    def _at_once(
        self,
        calls: Sequence[Callable[[], T]],
        threads: int,
        futures: list[Future[T]] | None = None,
    ) -> list[T]:
        """What `calls` return, in their order; the first that fails stops the whole run.

        Args:
            futures: an empty list, to be filled with the calls' futures.
        """
        futures = [] if futures is None else futures
        with ThreadPoolExecutor(max(1, min(threads, len(calls)))) as pool:
            try:
                for call in calls:  # one by one: a call may wait for an earlier one's future
                    futures.append(pool.submit(call))
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in futures:
                    if future in done:
                        future.result()
            except BaseException as error:
                if self._stop(error, futures) is error:
                    raise
        if self.error:
            raise self.error
        return [future.result() for future in futures]

    def _stop(self, error: BaseException, futures: list[Future[T]]) -> BaseException:
        """Jobs that have not begun never will; those that run lose their actors.

        Returns:
            Why the run was stopped, which may be an earlier error than this one.
        """
        self.error = self.error or error
        with self.lock:
            for future in futures:
                future.cancel()
            for gang in self.running.values():
                with contextlib.suppress(*LOST):  # the others' are ended all the same
                    gang.end()
        with self.cluster._free:
            self.cluster._free.notify_all()
        return self.error

    def train(self, job: Job, rank: int) -> Trained:
        checkpoint = Checkpoint(self.checkpoints, f"{job.name}-{job.digest(self.data)}")
        seen, lost = 0, 0

        def finished(job: Job, epoch: Epoch) -> None:
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
                    return self._attempt(job, rank, checkpoint, finished)
                except GroupLost as error:
                    lost += 1
                    if self.error:
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

    def _attempt(self, job: Job, rank: int, checkpoint: Checkpoint, finished: OnEpoch) -> Trained:
        go_on = partial(self._go_on, job.name)
        go_on()
        with self.cluster._gang(job, rank, go_on) as gang:
            with self.lock:
                go_on()
                self.running[job.name] = gang
            try:
                group = Group(job, self.ref, gang.actors, **self.cluster._options())
                trained = drive(job, self.data, group, checkpoint, finished)
                group.close()
            finally:
                with self.lock:
                    del self.running[job.name]
        if trained.history:
            _tell(job, trained.history[-1])
        return trained

    def _go_on(self, name: str) -> None:
        if self.error:
            raise GroupLost(f"{name}: stopped")


@contextlib.contextmanager
def _released(lock: threading.Lock | threading.Semaphore) -> Iterator[None]:
    """Without a lock that is held."""
    lock.release()
    try:
        yield
    finally:
        lock.acquire()


def _tell(job: Job, epoch: Epoch) -> None:
    """How fast the actors of a job were, and how much of it went into the exchange."""
    text = "{images_per_s:.0f} images/s"
    if "exchange_share" in epoch:
        text += ", {exchange_share:.0%} of the time exchanging {sent_per_step:.0f} bytes a step"
    log.info("%s: last epoch %s", job.name, text.format(**epoch))
