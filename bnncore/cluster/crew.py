"""Tasks on the cluster: functions that take a data set and give a result, retried, in an order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from bnncore.cluster.cluster import Cluster
from bnncore.data import Dataset
from bnncore.training.devices import Place
from bnncore.training.jobs import TrainingError


@dataclass(eq=False)
class Work:
    """One task.

    Attributes:
        name: unique.
        run: a function of a module that takes (place, data, *args, *results of `needs`).
        needs: other tasks whose results it takes; they must be known or among the same work.
        weight: what is heavier starts earlier.
        bytes: what its training takes of a GPU's memory.
        keep: whether the result is kept as an object that later tasks may need.
    """

    name: str
    run: Callable
    args: tuple
    needs: tuple[str, ...] = ()
    weight: float = 0.0
    bytes: int = 0
    keep: bool = False


class WorkError(RuntimeError):
    """A task failed, twice where that could help; the message is the last cause's."""


class Crew:
    """Runs tasks on the cluster, as many at once as it has room for."""

    def __init__(self, cluster: Cluster, data: Dataset):
        self.cluster = cluster
        self.data = ray.put(data)
        self.kept: dict[str, Any] = {}  # name -> ray.ObjectRef
        self.retried = 0

    def keep(self, name: str, value: Any) -> None:
        """Make a result known, one copy in the object store."""
        self.kept[name] = ray.put(value)

    def run(
        self,
        todo: list[Work],
        done: Callable[[Work, Any], None],
        stopping: Callable[[], bool] = lambda: False,
    ) -> list[Work]:
        """Run `todo` and call `done` with each result, or with its `WorkError`.

        A task that crashes, or whose worker or node dies, is run once more. Once `stopping`, what
        runs is finished and nothing else begun.

        Returns:
            The tasks that were not begun.
        """
        waiting = sorted(todo, key=lambda work: -work.weight)
        running: dict[Any, Work] = {}
        crashed: set[str] = set()
        while True:
            ready = [w for w in waiting if self.kept.keys() >= set(w.needs)]
            for work in [] if stopping() else ready:
                gpus, place = self.cluster.place(work.bytes)
                if len(running) < max(1, self.cluster.slots(gpus)):
                    waiting.remove(work)
                    running[self._start(work, gpus, place)] = work
            if not running:
                return waiting
            finished, _ = ray.wait(list(running), timeout=1)
            for ref in finished:
                work = running.pop(ref)
                try:
                    result = ray.get(ref)
                except RayError as error:
                    cause = error.cause if isinstance(error, RayTaskError) else error
                    # A loss that is not finite would not be finite the second time.
                    if work.name not in crashed and not isinstance(cause, TrainingError):
                        crashed.add(work.name)
                        self.retried += 1
                        waiting.insert(0, work)
                        continue
                    failed = WorkError(_brief(cause))
                    lost = [work]
                    for one in lost:  # it grows: what needs what was lost is lost, too
                        done(one, failed)
                        lost += [w for w in waiting if one.name in w.needs]
                        waiting = [w for w in waiting if w not in lost]
                    continue
                if work.keep:
                    self.keep(work.name, result)
                done(work, result)

    def _start(self, work: Work, gpus: float, place: Place) -> Any:
        args = (*work.args, *(self.kept[name] for name in work.needs))
        task = ray.remote(work.run).options(
            num_cpus=place.threads, num_gpus=gpus, max_retries=0, name=work.name
        )
        return task.remote(place, self.data, *args)


def _brief(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
