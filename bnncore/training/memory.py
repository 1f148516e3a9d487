"""Memory of a training step: what autograd keeps, what replay must put back, what becomes of freed
memory."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bnncore.networks.backbones import build
from bnncore.networks.ensemble import draws
from bnncore.networks.parts import Backbone, ModelSpec
from bnncore.training.layers import exact_convolutions


class Undisturbed:
    """Batch-norm statistics and generators of modules are left as they were on entering."""

    def __init__(self, modules: Sequence[nn.Module]):
        self.network = nn.ModuleList(modules)

    def __enter__(self) -> None:
        self.buffers = [(b, b.clone()) for b in self.network.buffers()]
        self.generators = _generators(self.network)

    def __exit__(self, *error: Any) -> None:
        with torch.no_grad():
            for buffer, value in self.buffers:
                buffer.copy_(value)
        for rng, value in self.generators:
            rng.set_state(value)


def frugal(network: Backbone, x: Tensor) -> Tensor:
    """`Backbone.forward` that keeps, of the body's first stage, whose maps are the largest, only
    the blocks' inputs, and computes each block once more in the backward pass: the same bits.
    """
    h = network.stem(x)
    first, *rest = network.body.children()
    for block in first if isinstance(first, nn.Sequential) else [first]:
        contexts = partial(_again, block)
        h = checkpoint(block, h, use_reentrant=False, context_fn=contexts, preserve_rng_state=False)
    for part in rest:
        h = part(h)
    return network.mix(network.head(h))


def _again(part: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    """For the first time nothing; for the second the numbers that were drawn in the first, and
    nothing else changed by it."""
    drawn = _generators(part)

    @contextmanager
    def second() -> Iterator[None]:
        with Undisturbed([part]):
            for rng, value in drawn:
                rng.set_state(value)
            yield

    return nullcontext(), second()


def _generators(network: nn.Module) -> list[tuple[torch.Generator, Tensor]]:
    return [
        (rng, rng.get_state())
        for m in network.modules()
        if draws(m) and isinstance(rng := m.generator, torch.Generator)
    ]


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


def saved_bytes(
    network: nn.Module, forward: Callable[[Tensor], Any], x: Tensor, images: int
) -> int:
    """Estimate of what autograd keeps in a step on so many images, measured on few.

    Args:
        forward: the step's forward pass through `network`.
        x: normalised images (2 n, C, H, W); a pass over half of them and one over all are made.
    """
    sample, kept = len(x) // 2, []
    for part in (x[:sample], x):
        with exact_convolutions(network), Undisturbed([network]):
            with Saved(network) as saved:
                outputs = forward(part)
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


def of_gpu() -> int:
    """All of the memory of this process's GPU; 0 if it has none."""
    return torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else 0


def expected(model: ModelSpec, members: int, images: int) -> int:
    """What training so many members on batches of so many images takes on a GPU: a rough estimate
    from the sizes of what layers give, without any tensor.

    Counted are each module's outputs and their gradients, parameters four times (Adam's moments),
    and what CUDA takes for itself.
    """
    counted = 0

    def count(module: nn.Module, _: Any, output: Any) -> None:
        nonlocal counted
        if isinstance(output, Tensor) and not list(module.children()):
            counted += 2 * 4 * output.numel()

    with torch.device("meta"):
        network = build(model).train()
        height, width, channels = model.image
        for module in network.modules():
            module.register_forward_hook(count)
        network(torch.zeros(images, channels, height, width))
    counted += 4 * 4 * sum(p.numel() for p in network.parameters())
    return members * counted + CUDA_BYTES


CUDA_BYTES = 3 << 28  # a context and cuDNN's workspaces


def available(device: torch.device) -> int:
    """Bytes that can still be had on a device; for a CPU also within the control group's limit."""
    if device.type == "cuda":
        # What torch's allocator holds and does not use can be had, too.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
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
