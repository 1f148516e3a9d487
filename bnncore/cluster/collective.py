"""Sums over the actors of a group, through torch.distributed: gloo between CPUs, NCCL between GPUs.

Legend: `R` actors of a group (ranks).
"""

from __future__ import annotations

import math
import os
import socket
import time
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist

from bnncore.networks.combine import tree_sum
from bnncore.training import devices


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
        """Sum of `value` over the ranks, equal on all."""
        devices.wait(value.device)  # for what it is made of
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
        devices.wait(value.device)
        self.seconds += time.perf_counter() - started
        return result


@dataclass(frozen=True)
class Meeting:
    """Where and as what a rank joins its group.

    Attributes:
        address, port: of the first rank's store.
        rank, size: this rank, of so many.
        depth: so many consecutive ranks add up among themselves too; 1 for none.
        backend: ``gloo`` or ``nccl``.
    """

    address: str
    port: int
    rank: int
    size: int
    depth: int
    backend: str


def open_store(address: str) -> dist.TCPStore:
    """A store where the ranks of a group find each other; it listens on `address` and no other."""
    listener = socket.create_server((address, 0), backlog=1024)
    port = listener.getsockname()[1]
    return dist.TCPStore(
        address, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )


def join(meeting: Meeting, own: dist.TCPStore | None) -> tuple[Collective, Collective | None]:
    """Join a group: how to add up over all of it and, where its depth is over 1, with neighbours.

    Args:
        own: the store, in the first rank.
    """
    m = meeting
    if m.backend == "gloo" and m.address.startswith("127."):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = own if m.rank == 0 else dist.TCPStore(m.address, m.port, m.size, False)
    dist.init_process_group(m.backend, store=store, rank=m.rank, world_size=m.size)
    if m.depth == 1:
        return Collective(m.backend), None
    neighbours = [list(range(k, k + m.depth)) for k in range(0, m.size, m.depth)]
    groups = [dist.new_group(ranks, backend=m.backend) for ranks in neighbours]  # all make all
    return Collective(m.backend), Collective(m.backend, groups[m.rank // m.depth])


def leave() -> None:
    """Leave the group, if this process is in one."""
    if dist.is_initialized():
        dist.destroy_process_group()
