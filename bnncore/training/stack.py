"""Members computed as one network: as many values, in a fraction of the operations.

A stack of m members passes on activations (B * m, C, H, W), those of an image's members next to
each other. The same memory is (B, m * C, H, W). So what members share, and what has no parameters,
runs as it is over m times as many images; and what is their own is one layer of m times as many
channels: a batch norm whose statistics are each member's, a convolution in m groups. Nothing is
copied on the way.

A stack's parameters are one tensor a layer, of which those of the members are views: states, and
everything else that knows members, find them where they were. `Ensemble.to` would part them.

Legend: `m` members of a stack, `B` images, `C` channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from bnncore.networks.binarize import WEIGHTS, BinaryConv2d, Shift
from bnncore.networks.ensemble import Ensemble
from bnncore.networks.parts import Backbone, Dropout, ModelSpec
from bnncore.params import Recipe

Parts = tuple[nn.Parameter, ...]
Run = Callable[[Backbone, Tensor], Tensor]


class Unit(nn.Module):
    """What some members of an ensemble compute behind its prefix, looped over (one) or stacked.

    Args:
        apart: whether each member of the ensemble has images of its own, (B * M, C, H, W).

    Attributes:
        ids: of the members.
        network: the parts of a `Backbone`, without the prefix.
        leaves: a stack's trained parameters, each with those of the members that it holds, one
            after another along the first axis.
    """

    def __init__(self, ensemble: Ensemble, ids: Sequence[int], apart: bool = False):
        super().__init__()
        self.ids, m = tuple(ids), len(ids)
        # Of images for each held member, those of these.
        self.mine = [ensemble.ids.index(i) for i in ids] if apart and m < len(ensemble.ids) else []
        self.held = len(ensemble.ids)
        members = [one for i, one in zip(ensemble.ids, ensemble.members, strict=True) if i in ids]
        prefix = ensemble.prefix()
        stems = [list(member.stem.children())[len(prefix) :] for member in members]
        if prefix and prefix[0] is members[0].stem:
            stems = [[] for _ in members]
        made = _Stacking()
        rest = [made.stacked(layers) for layers in zip(*stems, strict=True)]
        first = rest[0].inner if rest and isinstance(rest[0], _Grouped) else None
        if m == 1 or apart:
            pass
        elif isinstance(first, nn.Conv2d):
            rest[0] = _First(first, m)
        else:
            rest.insert(0, _Spread(m))
        parts = [made.stacked([getattr(m, part) for m in members]) for part in ("body", "head")]
        self.network = Backbone(nn.Sequential(*rest), *parts)
        self.network.mix = made.stacked([m.mix for m in members])
        self.leaves = [leaf for leaf in made.leaves if leaf[0].requires_grad]

    def forward(self, h: Tensor, run: Run = Backbone.forward) -> Tensor:
        """The prefix's output (B, C, H, W), of all members, to outputs (B, m, classes).

        Args:
            run: `Backbone.forward`, or a compiled one.
        """
        if self.mine:
            h = h.unflatten(0, (-1, self.held))[:, self.mine].flatten(0, 1)
        return run(self.network, h).unflatten(0, (-1, len(self.ids)))


# On a GPU a kernel costs some microseconds to start, however little it computes.
AUTO = {"cpu": 1, "cuda": 16}
# Pixels of an image up to which stacked steps are faster on a thread of a CPU: 1.3 to 2.5 times
# at 8 x 8 (benchmarks/training.py); at 32 x 32 they take as long as looped ones.
SMALL = 16 * 16


def size(recipe: Recipe, model: ModelSpec, device: str) -> int:
    """How many members make a unit at most: what `Recipe.stack` says; by ``auto``, where nobody
    has said how many actors there are (`spread`), what `AUTO` has."""
    wanted = AUTO[device] if recipe.stack == "auto" else recipe.stack
    return 1 if model.binarizer is not None and model.binarizer.stochastic else wanted


def spread(recipe: Recipe, model: ModelSpec, members: int, actors: int, device: str) -> Recipe:
    """The recipe for an ensemble over so many actors: by ``auto`` each of them, if it is a GPU or
    images are small, has a stack to compute.

    A ``deterministic`` one keeps its stacks, and so its bits, whatever actors there are.
    """
    if recipe.stack != "auto" or recipe.deterministic:
        return recipe
    share = math.ceil(members / max(1, actors))
    if device != "cpu":
        return replace(recipe, stack=min(AUTO[device], share))
    small = model.image[0] * model.image[1] <= SMALL
    return replace(recipe, stack=share) if small else recipe


def units(ensemble: Ensemble, size: int, apart: bool = False) -> list[Unit]:
    """The held members of an ensemble, in blocks of `size` that begin at multiples of it."""
    blocks: dict[int, list[int]] = {}
    for i in ensemble.ids:
        blocks.setdefault(i // size, []).append(i)
    return [Unit(ensemble, ids, apart) for ids in blocks.values()]


class _Stacking:
    """Puts layers of several members together; notes what became of their parameters."""

    def __init__(self) -> None:
        self.leaves: list[tuple[nn.Parameter, Parts]] = []

    def stacked(self, layers: Sequence[nn.Module]) -> nn.Module:
        """One module that computes what these do, each for its member."""
        first, m = layers[0], len(layers)
        if all(layer is first for layer in layers):
            return first
        if isinstance(first, Dropout):
            return _Masks(cast(Sequence[Dropout], layers))
        if isinstance(first, nn.Conv2d):
            conv = self._one(layers, groups=m)
            conv.in_channels, conv.out_channels = m * first.in_channels, m * first.out_channels
            if isinstance(first, BinaryConv2d) and first.binarizer not in WEIGHTS:
                conv._binarize = _each(first._binarize, m)
            return _Grouped(conv, m)
        if isinstance(first, nn.BatchNorm2d):
            return _Grouped(self._one(layers, num_features=m * first.num_features), m)
        if isinstance(first, nn.PReLU) and first.num_parameters == 1:
            return _Slopes(self._one(layers).weight)
        if isinstance(first, nn.PReLU):
            return _Grouped(self._one(layers, num_parameters=m * first.num_parameters), m)
        if isinstance(first, Shift):
            return _Grouped(self._one(layers), m)
        if isinstance(first, nn.Linear):
            dense = self._one(layers)
            return _Dense(dense.weight, dense.bias, m)
        children = {
            name: self.stacked([layer.get_submodule(name) for layer in layers])
            for name, _ in first.named_children()
        }
        return _copied(first, children)

    def _one(self, layers: Sequence[nn.Module], **numbers: Any) -> Any:
        """The first layer with the parameters of all, and such numbers in place of its own."""
        one = _copied(layers[0], {})
        for name, parameter in layers[0]._parameters.items():
            if parameter is not None:
                parts = tuple(cast(nn.Parameter, layer._parameters[name]) for layer in layers)
                whole = nn.Parameter(torch.cat([p.data for p in parts]), parameter.requires_grad)
                for part, view in zip(parts, whole.data.chunk(len(parts)), strict=True):
                    part.data = view
                one._parameters[name] = whole
                self.leaves.append((whole, parts))
        for name, buffer in layers[0]._buffers.items():
            if buffer is not None:
                found = [cast(Tensor, layer._buffers[name]) for layer in layers]
                # Members have seen equally many batches.
                one._buffers[name] = kept = torch.cat(found) if buffer.dim() else buffer
                views = kept.chunk(len(found)) if buffer.dim() else [kept] * len(found)
                for layer, view in zip(layers, views, strict=True):
                    layer._buffers[name] = view
        vars(one).update(numbers)
        return one


def _copied(module: nn.Module, children: dict[str, nn.Module]) -> Any:
    """A module like this one with other children, and room for other parameters."""
    one = object.__new__(type(module))
    one.__dict__ = {**vars(module), "_modules": dict(children)}
    one._parameters, one._buffers = dict(module._parameters), dict(module._buffers)
    return one


def _each(binarize: Any, members: int) -> Any:
    """A user's binarizer, which may look at all filters of a layer, member by member."""

    def all_of_them(weight: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
        scales: Sequence[Any] = [None] * members if scale is None else scale.chunk(members)
        both = [binarize(w, s) for w, s in zip(weight.chunk(members), scales, strict=True)]
        signs, alphas = zip(*both, strict=True)
        return torch.cat(signs), None if alphas[0] is None else torch.cat(alphas)

    return all_of_them


class _Spread(nn.Module):
    """Images for each member: (B, C, H, W) to (B * m, C, H, W)."""

    def __init__(self, members: int):
        super().__init__()
        self.members = members

    def forward(self, x: Tensor) -> Tensor:
        return x[:, None].expand(-1, self.members, *x.shape[1:]).flatten(0, 1)


class _Grouped(nn.Module):
    """A layer of m times as many channels: (B * m, C, ..) to (B * m, C', ..)."""

    def __init__(self, inner: nn.Module, members: int):
        super().__init__()
        self.inner, self.members = inner, members

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x.reshape(-1, self.members * x.shape[1], *x.shape[2:]))
        return y.reshape(-1, y.shape[1] // self.members, *y.shape[2:])


class _First(nn.Module):
    """A convolution a member of images that are the same for all: (B, C, H, W) to (B * m, ..)."""

    def __init__(self, inner: nn.Conv2d, members: int):
        super().__init__()
        self.inner, self.members = inner, members
        inner.in_channels, inner.groups = inner.in_channels // members, 1

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).unflatten(1, (self.members, -1)).flatten(0, 1)


class _Slopes(nn.Module):
    """PReLU with one slope a member, (m,)."""

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, len(self.weight), x[0].numel())
        return _PReLU.apply(rows, self.weight[:, None]).view(x.shape)


class _PReLU(torch.autograd.Function):
    """``x if x > 0 else a x`` with slopes (m, 1) over (B, m, n), vectorised in both directions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slopes: Tensor) -> Tensor:
        ctx.save_for_backward(x, slopes)
        return torch.ops.aten._prelu_kernel(x, slopes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        x, slopes = ctx.saved_tensors
        below = (x.clamp(max=0) * grad).sum((0, 2))[:, None]
        above = torch.ops.aten.threshold_backward(grad, x, 0)
        return torch.lerp(above, grad, slopes), below  # `grad` itself where both are equal


class _Dense(nn.Module):
    """A dense layer a member: (B * m, K) to (B * m, O); weights (m * O, K), biases (m * O,)."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, members: int):
        super().__init__()
        self.weight, self.bias, self.members = weight, bias, members

    def forward(self, x: Tensor) -> Tensor:
        rows = x.unflatten(0, (-1, self.members)).transpose(0, 1)
        weight = self.weight.unflatten(0, (self.members, -1))
        y = torch.bmm(rows, weight.transpose(1, 2)).transpose(0, 1)
        if self.bias is not None:
            y = y + self.bias.unflatten(0, (self.members, -1))
        return y.flatten(0, 1)


class _Masks(nn.Module):
    """Dropout by each member's own generator, so with the masks that it has alone."""

    def __init__(self, layers: Sequence[Dropout]):
        super().__init__()
        self.layers = nn.ModuleList(layers)  # generators are put into these

    def forward(self, x: Tensor) -> Tensor:
        parts = x.unflatten(0, (-1, len(self.layers))).unbind(1)
        kept = [layer(part) for layer, part in zip(self.layers, parts, strict=True)]
        return torch.stack(kept, 1).flatten(0, 1)
