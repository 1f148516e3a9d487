"""Memory of a training step: what autograd keeps, what replay must put back, what becomes of freed
memory."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bnncore.networks.ensemble import Ensemble, draws
from bnncore.training.layers import exact_convolutions


class Undisturbed:
    """Batch-norm statistics and generators of an ensemble are left as they were on entering.

    Those of `Ensemble.prefix` only with `everything`: in a step it runs once, outside of this, and
    its statistics must not be touched before it has been run back.
    """

    def __init__(self, ensemble: Ensemble, everything: bool = False):
        self.ensemble, self.everything = ensemble, everything

    def __enter__(self) -> None:
        left = [] if self.everything else self.ensemble.prefix()
        prefix = {id(b) for module in left for b in module.buffers()}
        buffers = [b for m in self.ensemble.members for b in m.buffers() if id(b) not in prefix]
        self.buffers = [(b, b.clone()) for b in buffers]
        self.generators = [
            (rng, rng.get_state())
            for m in self.ensemble.modules()
            if draws(m) and isinstance(rng := m.generator, torch.Generator)
        ]

    def __exit__(self, *error: Any) -> None:
        with torch.no_grad():
            for buffer, value in self.buffers:
                buffer.copy_(value)
        for rng, value in self.generators:
            rng.set_state(value)


class Saved:
    """Bytes that autograd keeps for the backward pass of what runs inside, each buffer once."""

    def __init__(self, known: nn.Module):
        self._seen = {p.untyped_storage().data_ptr() for p in known.parameters()}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda x: x)
        self.bytes = 0

    def _pack(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return x

    def __enter__(self) -> Saved:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)


def saved_bytes(ensemble: Ensemble, x: Tensor, images: int) -> int:
    """Estimate of what autograd keeps in a step on so many images, measured on few.

    Args:
        x: normalised images (2 n, C, H, W); a pass over half of them and one over all are made.
    """
    ensemble.train()
    sample, kept = len(x) // 2, []
    for part in (x[:sample], x):
        with exact_convolutions(ensemble), Undisturbed(ensemble, everything=True):
            with Saved(ensemble) as saved:
                outputs = ensemble.outputs(part)
            del outputs
        kept.append(saved.bytes)
    # Filters, for one, do not grow with the batch.
    each = (kept[1] - kept[0]) / sample
    return int(kept[0] + each * (images - sample))


# glibc's mallopt: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD and M_MMAP_MAX, in the order of need.
_KEEP = ((-1, -1), (-4, 0))  # never trim the heap, map nothing beside it
_GIVE_BACK = ((-4, 1 << 16), (-3, 1 << 20), (-1, 1 << 20))  # what is above 1 MiB, at once


def freed_memory(keep: bool) -> None:
    """Whether this process keeps what it frees or gives it back at once, where it runs on glibc.

    glibc's own way lies between: it maps large activations anew, page by page, in every step,
    which took a fifth of a step's time; and it leaves holes, which made a step with replay take
    0.25 GiB more for every member (ResNet-18, batch 256).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option in _KEEP if keep else _GIVE_BACK:
            mallopt(*option)


def available(device: torch.device) -> int:
    """Bytes that can still be had on a device; for a CPU also within the control group's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = 1024 * int(line.split()[1])
    group = Path("/sys/fs/cgroup")
    limit, used = group / "memory.max", group / "memory.current"
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - int(used.read_text()))
    return free
