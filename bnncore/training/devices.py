"""Where training computes: chosen in one place, handed on explicitly, and set up as it is said.

A stage that trains in its own process asks `of_process`; on a cluster `Cluster.device` says what
its actors and tasks reserve. Everything else is told.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from bnncore.params import RayParams

# cuBLAS is deterministic only with a workspace of its own, asked for before its first use.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@dataclass(frozen=True)
class Place:
    """What a task has of a machine.

    Attributes:
        threads: of the CPU.
        device: the type of device to train on, ``cpu`` or ``cuda``.
        share: of the device's free memory.
    """

    threads: int = 1
    device: str = "cpu"
    share: float = 1.0


ALONE = Place()


def of_process(params: RayParams) -> Place:
    """What a process has that trains by itself: the first GPU that torch sees, if GPUs are used."""
    gpu = params.gpus_per_actor != 0 and torch.cuda.is_available()
    return Place(params.cpus_per_actor, "cuda" if gpu else "cpu")


def prepare(device: torch.device, deterministic: bool) -> None:
    """Set this process's switches for training on `device`.

    TF32 would round the inputs of convolutions and products to 10 bits: no harm to +-1, but to
    first convolutions, shortcuts and gradients. Batches have few shapes, so cuDNN may try what is
    fastest for each, unless the same bits are wanted in every run.
    """
    if device.type != "cuda":
        return
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.deterministic = deterministic
    # What has no deterministic form is told by torch and computed all the same.
    torch.use_deterministic_algorithms(deterministic, warn_only=True)


def wait(device: torch.device) -> None:
    """Until a device has done what it was told: a clock that is read before times nothing."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
