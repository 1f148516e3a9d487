"""What runs inside an actor: a trainer with a block of a job's members."""

from __future__ import annotations

import gc
import os
from typing import Any

import ray
import torch
from torch import distributed as dist

from bnncore.cluster import collective
from bnncore.cluster.collective import Meeting
from bnncore.data import Dataset
from bnncore.training.jobs import Job, received, sent
from bnncore.training.loop import Trainer


class Actor:
    """Holds a trainer for one rank of one group at a time."""

    def __init__(self, threads: int, device: str):
        torch.set_num_threads(threads)
        self.device = device
        self.trainer: Trainer | None = None
        self.store: dist.TCPStore | None = None

    def where(self) -> dict[str, Any]:
        """The node (address and the start of its id) and the process."""
        node = ray.get_runtime_context().get_node_id()
        return {"node": f"{ray.util.get_node_ip_address()}/{node[:8]}", "pid": os.getpid()}

    def host(self) -> tuple[str, int]:
        """Open the meeting place of a group; returns its address."""
        self.store = collective.open_store(ray.util.get_node_ip_address())
        return self.store.host, self.store.port

    def start(
        self, job: Job, data: Dataset, meeting: Meeting | None, options: dict[str, Any]
    ) -> None:
        """Join the group, if it has others, and make ready to train.

        Args:
            options: of `Trainer`: which members and shards are this actor's, and the like.
        """
        self.close()
        exchange = within = None
        if meeting is not None:
            exchange, within = collective.join(meeting, self.store)
        self.trainer = Trainer(
            job, data, exchange=exchange, within=within, device=self.device, **options
        )

    def call(self, name: str, *args: Any) -> Any:
        """A method of the trainer, by name."""
        return getattr(self._training, name)(*args)

    @property
    def _training(self) -> Trainer:
        assert self.trainer is not None, "it is not started, or closed"
        return self.trainer

    def state(self) -> bytes:
        return sent(self._training.state())

    def load(self, state: bytes) -> None:
        self._training.load(received(state))

    def close(self) -> None:
        """Give back what the last job had, for the next."""
        self.trainer = None
        gc.collect()  # a trainer's parts know each other
        if self.device == "cuda":
            torch.cuda.empty_cache()
        collective.leave()
