"""Layers that compute what torch's compute, in less time or more exactly, and compilation.

**Cheap layers**: convolutions with frozen filters that keep no input; on CPUs also batch norm and
one-slope PReLU, torch's functions in far less time. In a binarized network element-wise work takes
half of a training step. torch's batch norm sums in double precision, one thread a channel, and its
PReLU gradient is not vectorised; the kernels of evaluation-mode batch norm and of leaky ReLU
compute the same, vectorised. Results differ from torch's by rounding only.

**Exact convolutions**: sums of +-1 are integers, on which a sign depends.

**Compilation**: `torch.compile` of a member's forward pass, one compilation for all members.

Legend: `B C H W` activations, `N = B * H * W` values of a channel.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from bnncore.networks.backbones import build
from bnncore.networks.binarize import BinaryConv2d
from bnncore.networks.parts import Backbone, ModelSpec
from bnncore.training.jobs import Job
from bnncore.training.stack import Run

log = logging.getLogger(__name__)
# Operations of all forward passes of a job from which on a compilation of a minute or two pays.
# A core of a CPU, with the backward passes, gets through 6e9 (AVX2) to 1.3e10 (AVX-512) of them in
# a second in narrow networks (lean ResNet-8 of width 16), and compiled saves 40 % of that time.
# Assumed of GPUs: it saves a third, and one does 2e12 of them in a second.
WORTH_COMPILING = {"cpu": 5e12, "cuda": 2e15}


@contextlib.contextmanager
def exact_convolutions(network: nn.Module) -> Iterator[None]:
    """Within, torch's convolutions on a CPU are safe for `network`, and sums of +-1 exact in them.

    - NNPACK, which torch takes where oneDNN is off, convolves by way of transforms: sums that
      should be integers come out beside them, and what should be 0 gets a sign by chance.
    - oneDNN's AVX2 convolutions (torch 2.13) write past a buffer's end when they are trained with
      fewer than 8 filters: the heap is corrupted some steps later. For such networks it is off.

    Both switches are the process's, not the thread's.
    """
    narrow = any(m.out_channels < 8 for m in network.modules() if isinstance(m, nn.Conv2d))
    onednn: Any = torch.backends.mkldnn
    before = onednn.enabled
    with torch.backends.nnpack.flags(enabled=False):
        onednn.enabled = before and not narrow
        try:
            yield
        finally:
            onednn.enabled = before


class _Norm(torch.autograd.Function):
    """``(x - mean) / sqrt(var + eps) * gamma + beta``; also gives mean and var (biased), (C,)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, ...]:
        rows = x.flatten(2)
        count = x.numel() // x.shape[1]
        mean = rows.sum(2).sum(0).div_(count)
        # Sums of squares of centred values: no cancellation where the mean is large.
        norms = torch.linalg.vector_norm(rows - mean[:, None], dim=2)
        var = norms.square_().sum(0).div_(count)
        ctx.save_for_backward(x, gamma, mean, (var + eps).rsqrt_())
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var)
        return F.batch_norm(x, mean, var, gamma, beta, False, 0.0, eps), mean, var

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple:
        x, gamma, mean, inverse = ctx.saved_tensors
        grads = torch.ops.aten.native_batch_norm_backward(
            grad, x, gamma, None, None, mean, inverse, True, ctx.eps, ctx.needs_input_grad[:3]
        )
        return *grads, None


def _norm(self: nn.BatchNorm2d, x: Tensor) -> Tensor:
    plain = self.training and self.momentum is not None and x.is_contiguous()
    if not plain or x.numel() == x.shape[1]:  # torch refuses one value a channel
        return nn.BatchNorm2d.forward(self, x)
    y, mean, var = _Norm.apply(x, self.weight, self.bias, self.eps)
    with torch.no_grad():
        count = x.numel() // x.shape[1]
        self.running_mean.lerp_(mean, self.momentum)  # type: ignore[union-attr, arg-type]
        unbiased = var * (count / (count - 1))
        self.running_var.lerp_(unbiased, self.momentum)  # type: ignore[union-attr, arg-type]
        self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
    return y


class _LeakyReLU(torch.autograd.Function):
    """``x if x > 0 else a x`` with one trained slope `a` (1,).

    Where ``a > 0``, outputs have the signs of their inputs and tell them, up to rounding: those are
    kept, which a batch norm behind would keep in any case.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: Tensor) -> Tensor:
        ctx.slope = slope.item()
        y = F.leaky_relu(x, ctx.slope)
        ctx.of_output = ctx.slope > 0
        ctx.save_for_backward(y if ctx.of_output else x)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        (kept,) = ctx.saved_tensors
        below = None
        if ctx.needs_input_grad[1]:
            below = kept.clamp(max=0).mul_(grad).sum().view(1)
            if ctx.of_output:
                below /= ctx.slope
        return torch.ops.aten.leaky_relu_backward(grad, kept, ctx.slope, ctx.of_output), below


def _prelu(self: nn.PReLU, x: Tensor) -> Tensor:
    return _LeakyReLU.apply(x, self.weight)


class _FrozenConv(torch.autograd.Function):
    """Convolution by filters that ask for no gradient, times alpha; keeps no activations."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, filters: Tensor, alpha: Tensor | None, *geometry: Any
    ) -> Tensor:
        ctx.save_for_backward(filters, alpha)
        ctx.shape, ctx.geometry = x.shape, geometry
        y = torch.conv2d(x, filters, None, *geometry)
        return y if alpha is None else y.mul_(alpha[:, None, None])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        filters, alpha = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        if alpha is not None:
            grad = grad * alpha[:, None, None]
        grads = torch.ops.aten.convolution_backward(
            grad, grad.new_empty(ctx.shape), filters, None, stride, padding, dilation, False,
            [0] * len(stride), groups, [True, False, False],
        )  # fmt: skip
        return grads[0], *[None] * 6


def _conv(self: BinaryConv2d, x: Tensor) -> Tensor:
    frozen = not any(p.requires_grad for p in self.parameters())
    if not (frozen and x.requires_grad and isinstance(self.padding, tuple)):
        return BinaryConv2d.forward(self, x)
    filters, alpha = self.binary()
    geometry = (self.stride, self.padding, self.dilation, self.groups)
    y = _FrozenConv.apply(x, filters, alpha, *geometry)
    return y if self.bias is None else y + self.bias[:, None, None]


def make_cheap(network: nn.Module, device: str = "cpu") -> None:
    """Let the layers of a network compute in the cheap way; on a GPU those that keep less.

    Only their `forward` changes: types, parameters and states stay what they are.
    """
    for module in network.modules():
        forward = _cheap_forward(module)
        if device != "cpu" and forward is not _conv:
            continue
        if forward is not None:
            module.forward = MethodType(forward, module)


def _cheap_forward(module: nn.Module) -> Callable | None:
    if type(module) is nn.BatchNorm2d and module.affine and module.track_running_stats:
        return _norm
    if type(module) is nn.PReLU and module.num_parameters == 1:
        return _prelu
    if type(module) is BinaryConv2d and module.padding_mode == "zeros":
        return _conv
    return None


# -- compilation -----------------------------------------------------------------------------


def operations(spec: ModelSpec) -> int:
    """Floating-point operations (two a multiply-accumulate) of one image's forward pass."""
    height, width, channels = spec.image
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        build(spec).eval()(torch.zeros(1, channels, height, width))
    return counter.get_total_flops()


def binarize_frozen(network: nn.Module) -> None:
    """Binarize frozen filters now: a compiled graph takes them as they are, and cannot ask whether
    the weights behind them have changed since."""
    for module in network.modules():
        if isinstance(module, BinaryConv2d) and not module.weight.requires_grad:
            module.binary()


def compiled(network: nn.Module, images: int, what: Any) -> Run:
    """`Backbone.forward`, compiled on first use, for the units of the members in `network`.

    One graph serves all units of a kind and all jobs of a kind that a process trains one after
    another. Batches of another length, such as an epoch's last, are computed as they are.

    Args:
        images: the length of a batch.
        what: changes with everything that a graph is made for; graphs of other kinds are dropped,
            so that there are never more than torch keeps.
    """
    if _made_for[:] != [what]:
        torch.compiler.reset()
        _made_for[:] = [what]
    binarize_frozen(network)
    graph = torch.compile(Backbone.forward, dynamic=False)

    def run(unit: Backbone, h: Tensor) -> Tensor:
        return graph(unit, h) if len(h) == images else Backbone.forward(unit, h)

    return run


_made_for: list[Any] = []


def can_compile(device: torch.device) -> bool:
    """Whether `torch.compile` finds what it needs: a C++ compiler on CPUs, Triton and a C compiler
    (which Triton needs) on GPUs."""
    names = ("CXX", "g++", "clang++") if device.type == "cpu" else ("CC", "gcc", "clang")
    compiler = any(map(shutil.which, filter(None, (os.environ.get(names[0]), *names[1:]))))
    return compiler and (device.type == "cpu" or importlib.util.find_spec("triton") is not None)


def worth_compiling(job: Job, passes: int, device: torch.device) -> bool:
    """Whether to compile for so many `passes` of one image through one member; see
    `Recipe.compile`. Where it was asked for and cannot be, that is said.
    """
    recipe, spec = job.recipe, job.spec.model
    worth = operations(spec) * passes >= WORTH_COMPILING[device.type]
    if recipe.compile == "never" or (recipe.compile == "auto" and not worth):
        return False
    reason = "every batch has a length of its own" if job.resample else ""
    reason = reason or ("" if can_compile(device) else "no compiler was found")
    if reason:
        log.warning("%s: nothing is compiled: %s", job.name, reason)
    return not reason
