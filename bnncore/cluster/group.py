"""A group of actors that trains one job together.

Each actor holds a `Trainer` with a block of the job's members. They exchange partial logits (B x C)
and the gradients of shared trained parameters, and nothing else. A group is one generation: when
one of its actors dies, all of it is given up.

Legend: `B` images of a batch, `C` classes, `N` validation images.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayTaskError
from torch import Tensor
from torch import distributed as dist

from bnncore.cluster.collective import Meeting
from bnncore.cluster.connect import LOST
from bnncore.training import stack
from bnncore.training.jobs import History, Job, State, TrainingError, received, sent

log = logging.getLogger(__name__)


class GroupLost(RuntimeError):
    """Something of a group of actors is gone; the group is of no further use."""


def blocks(ids: tuple[int, ...], actors: int, whole: int = 1) -> list[tuple[int, ...]]:
    """Members of a job in equal consecutive blocks, one an actor, the last one may be shorter.

    Where the size of a block is a power of two, the sum of all members' logits has the same bits
    as in one process (`ensemble.tree_sum`).

    Args:
        whole: so many members, a stack, are never divided.
    """
    size = whole * math.ceil(math.ceil(len(ids) / whole) / actors)
    return [ids[k : k + size] for k in range(0, len(ids), size)]


def actors_of_use(job: Job, room: int, device: str = "cpu") -> int:
    """How many of at most `room` actors a job has a use for.

    One for each block of members or, where there is room, one for each member (each stack) and part
    of a batch.
    """
    whole = stack.size(job.recipe, job.spec.model, device)
    units, shards = len(blocks(job.ids, len(job.ids), whole)), job.recipe.shards
    if room >= 2 * units and shards > 1:
        return units * max(d for d in range(1, shards + 1) if shards % d == 0 and d * units <= room)
    return len(blocks(job.ids, room, whole))


class Group:
    """The actors that train one job, with the interface of a `Trainer`.

    Args:
        data: the data set in the object store.
        actors: handles of `Actor`, in the order of their ranks.
        backend: ``gloo`` or ``nccl``.
        device: the type of device that the actors have.
        options: of every actor's `Trainer`.

    Raises:
        GroupLost: from every method, when something of the group is gone.
        TrainingError: as an actor's trainer raises it.
    """

    def __init__(
        self,
        job: Job,
        data: ray.ObjectRef,
        actors: list[ActorHandle],
        backend: str,
        device: str = "cpu",
        **options: Any,
    ):
        self.job, self.actors, size = job, actors, len(actors)
        places = self._get([actor.where.remote() for actor in actors])
        nodes = ", ".join(sorted({place["node"] for place in places}))
        log.info("%s: %d actor(s) on %s", job.name, size, nodes)
        # Ranks count members first: so many consecutive ones share out a member's batches.
        whole = stack.size(job.recipe, job.spec.model, device)
        self.depth = depth = max(1, size // len(blocks(job.ids, len(job.ids), whole)))
        held = [hold for hold in blocks(job.ids, size // depth, whole) for _ in range(depth)]
        parts = blocks(tuple(range(job.recipe.shards)), depth) * len(held)
        meet: tuple[str, int] | None = None
        if size > 1:
            (meet,) = self._get([actors[0].host.remote()])
        # One copy of the start in the object store, however many actors read it.
        sent = ray.put(job)
        starting: list[ray.ObjectRef] = []
        for rank, (actor, hold) in enumerate(zip(actors, held, strict=True)):
            meeting = Meeting(*meet, rank, size, depth, backend) if meet else None
            own = {"hold": hold, "shards": parts[rank], **options}
            starting.append(actor.start.remote(sent, data, meeting, own))
        self._get(starting)

    def epoch(self, history: History) -> tuple[dict[str, float], np.ndarray]:
        """As `Trainer.epoch`; the sums also tell how many ``actors`` there were."""
        results = self._call("epoch", history)
        sums = results[0][0] | {"actors": len(self.actors)}
        return sums, np.concatenate([outputs for _, outputs in results[:: self.depth]])

    def validation_outputs(self) -> np.ndarray:
        """Outputs of all members on the validation images, (M, N, C) float32."""
        return np.concatenate(self._call("validation_outputs")[:: self.depth])

    def bias(self) -> Tensor | None:
        """That of the classifier block, which all actors hold."""
        return self._get([self.actors[0].call.remote("bias")])[0]

    def after(self) -> np.ndarray | None:
        """What the job asks for at its end, of all members."""
        told = self._call("after")[:: self.depth]
        return None if told[0] is None else np.concatenate(told)

    def state(self) -> State:
        """The state of all members, as one trainer with all of them would give it."""
        merged: State = {}
        for content in self._get([actor.state.remote() for actor in self.actors]):
            merged |= received(content)
        return merged

    def load(self, state: State) -> None:
        """Put all members into a state."""
        content = ray.put(sent(state))
        self._get([actor.load.remote(content) for actor in self.actors])

    def close(self) -> None:
        """Leave the actors ready for another job."""
        self._get([actor.close.remote() for actor in self.actors])

    def _call(self, name: str, *args: Any) -> list[Any]:
        return self._get([actor.call.remote(name, *args) for actor in self.actors])

    def _get(self, refs: list[ray.ObjectRef]) -> list[Any]:
        """Results of all, or the first failure: the others of a broken group may wait for ever."""
        waiting = list(refs)
        try:
            while waiting:
                done, waiting = ray.wait(waiting, num_returns=1)
                ray.get(done)
            return ray.get(refs)
        except LOST as error:
            raise GroupLost(f"{self.job.name}: {error}") from error
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, TrainingError):
                raise TrainingError(str(cause)) from None
            if isinstance(cause, (dist.DistError, *LOST)) or (
                len(self.actors) > 1 and isinstance(cause, RuntimeError) and self._peer_died()
            ):
                raise GroupLost(f"{self.job.name}: {cause}") from error
            raise

    def _peer_died(self) -> bool:
        # gloo reports a dead peer as a plain RuntimeError, often before Ray knows of the death.
        try:
            ray.get([actor.where.remote() for actor in self.actors], timeout=10)
        except (*LOST, GetTimeoutError):
            return True
        return False
