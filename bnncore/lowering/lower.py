"""From a trained torch ensemble to a `Program`: trace one member, fold what folds exactly.

`lower` traces the template member with torch.fx, turns each layer into operators of `program`, and
folds chains of per-channel functions that end in a sign into thresholds. A fold is exact by
construction, not by algebra: where the chain starts at a popcount, the chain's own torch modules
are evaluated at every integer that can occur; where it starts at a float, the threshold is the very
float32 at which those modules change sign, found by bisection over the ordered floats. So a
negative batch-norm scale flips the direction, a negative PReLU slope gives an interval, and no bit
differs from torch given the same input.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from bnncore.data import normalization
from bnncore.networks.binarize import BinaryActivation, BinaryConv2d, Shift
from bnncore.networks.ensemble import Ensemble
from bnncore.networks.parts import Dropout
from bnncore.packed import program as P

FLOAT_MAX = float(np.finfo(np.float32).max)


class LowerError(ValueError):
    """A layer that has no operator in `program`; the message names it."""


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        ours = isinstance(module, BinaryConv2d | BinaryActivation | Shift | Dropout)
        return ours or super().is_leaf_module(module, name)


@dataclass
class _Value:
    """An operator on its way to becoming a `program.Node`."""

    op: str
    name: str
    inputs: list[_Value]
    tensors: dict[str, tuple[str, str, list[np.ndarray]]] = field(default_factory=dict)
    attrs: dict[str, int | float] = field(default_factory=dict)
    # For per-channel functions: the modules that compute it, one a member, and the layer they
    # come from; `rising` tells the direction of each channel (None: not monotone).
    modules: list[nn.Module] | None = None
    uses: int = 0
    shared: bool = False


def lower(
    ensemble: Ensemble,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    classes: tuple[str, ...],
    info: dict[str, str | int | float] | None = None,
) -> P.Program:
    """The Program of a whole ensemble.

    Args:
        ensemble: all members; put into evaluation mode on the CPU.
        mean, std: per channel, of images scaled to 0..1, as training normalised them.
        classes: class names.
        info: facts for people, stored with the graph.

    Raises:
        LowerError: a layer without an operator.
        ValueError: a parameter or statistic that is not finite; names it.
    """
    ensemble = ensemble.cpu().eval()
    for name, value in ensemble.state().items():
        if not torch.isfinite(value).all():
            raise ValueError(f"{name}: expected finite values, got NaN or infinity")
    with torch.no_grad():
        values, output = _Lowering(ensemble, mean, std).run()
        fold(values, partial(_thresholds, len(ensemble.ids)))
    return _assemble(ensemble, values, output, classes, info or {})


class _Lowering:
    """Walks the traced template member and emits `_Value`s."""

    def __init__(self, ensemble: Ensemble, mean, std):
        self.ensemble = ensemble
        self.members = list(ensemble.members)
        self.shared = tuple(f"{name}." for name in ensemble.shared)
        self.values: list[_Value] = []
        self.stats = (mean, std)

    def run(self) -> tuple[list[_Value], _Value]:
        template = self.members[0]
        try:
            graph = _Tracer().trace(template)
        except Exception as error:  # fx raises many kinds; all mean the same to the caller
            raise LowerError(f"{type(template).__name__}: cannot be traced: {error}") from error
        env: dict[fx.Node, _Value] = {}
        output: _Value | None = None
        for node in graph.nodes:
            if node.op == "placeholder":
                scale, shift = normalization(*self.stats)
                found = {"scale": scale, "shift": shift}
                tensors = {slot: ("input", "float32", [array]) for slot, array in found.items()}
                env[node] = self.emit("normalize", "input", [_IMAGE], tensors)
                env[node].shared = True
            elif node.op == "call_module":
                env[node] = self.module(str(node.target), env[node.args[0]])
            elif node.op in ("call_function", "call_method"):
                env[node] = self.function(node, env)
            elif node.op == "output":
                output = env[node.args[0]]
            else:
                raise LowerError(f"{node.name}: {node.op} {node.target!r} cannot be packed")
        assert output is not None
        return self.values, output

    def emit(self, op, name, inputs, tensors=None, attrs=None, modules=None) -> _Value:
        value = _Value(op, name, inputs, tensors or {}, attrs or {}, modules)
        value.shared = f"{name}.".startswith(self.shared) if self.shared else False
        for source in inputs:
            source.uses += 1
        self.values.append(value)
        return value

    def arrays(self, name: str, get) -> list[np.ndarray]:
        """`get(module)` of layer `name` in each member, or once where the layer is shared."""
        members = self.members
        if self.shared and f"{name}.".startswith(self.shared):
            members = members[:1]
        return [np.ascontiguousarray(get(m.get_submodule(name)).numpy()) for m in members]

    def modules(self, name: str) -> list[nn.Module]:
        return [m.get_submodule(name) for m in self.members]

    def module(self, name: str, x: _Value) -> _Value:
        layer = self.members[0].get_submodule(name)
        if isinstance(layer, nn.Identity | nn.Dropout | Dropout):
            return x
        if isinstance(layer, BinaryConv2d):
            return self.binary_conv(name, layer, x)
        if isinstance(layer, nn.Conv2d):
            self.plain_conv(name, layer)
            weights = self.arrays(name, lambda m: m.weight.permute(0, 2, 3, 1))
            tensors = {"weight": ("weight", "float32", weights)}
            if layer.bias is not None:
                tensors["bias"] = ("bias", "float32", self.arrays(name, lambda m: m.bias))
            return self.emit("conv", name, [x], tensors, self.geometry(name, layer))
        if isinstance(layer, nn.BatchNorm2d):
            tensors = {
                "scale": ("scale", "float32", self.arrays(name, lambda m: _folded_norm(m)[0])),
                "shift": ("shift", "float32", self.arrays(name, lambda m: _folded_norm(m)[1])),
            }
            return self.emit("affine", name, [x], tensors, modules=self.modules(name))
        if isinstance(layer, Shift):
            tensors = {"shift": ("shift", "float32", self.arrays(name, lambda m: m.shift))}
            return self.emit("affine", name, [x], tensors, modules=self.modules(name))
        if isinstance(layer, nn.PReLU):
            tensors = {"slope": ("slope", "float32", self.arrays(name, lambda m: m.weight))}
            return self.emit("prelu", name, [x], tensors, modules=self.modules(name))
        if isinstance(layer, nn.ReLU):
            return self.emit("relu", name, [x], modules=[nn.ReLU()] * len(self.members))
        if isinstance(layer, nn.Hardtanh):  # ReLU6 among them
            low, high = float(layer.min_val), float(layer.max_val)
            clips: list[nn.Module] = [nn.Hardtanh(low, high)] * len(self.members)
            return self.emit("clip", name, [x], attrs={"low": low, "high": high}, modules=clips)
        if isinstance(layer, BinaryActivation):
            return self.emit("sign", name, [x])
        if isinstance(layer, nn.MaxPool2d | nn.AvgPool2d):
            return self.pool(name, layer, x)
        if isinstance(layer, nn.AdaptiveAvgPool2d) and layer.output_size in (1, (1, 1)):
            return self.emit("global_avg", name, [x])
        if isinstance(layer, nn.Flatten) and layer.start_dim == 1:
            return self.flatten(name, x)
        if isinstance(layer, nn.Linear):
            tensors = {"weight": ("weight", "float32", self.arrays(name, lambda m: m.weight))}
            if layer.bias is not None:
                tensors["bias"] = ("bias", "float32", self.arrays(name, lambda m: m.bias))
            return self.emit("dense", name, [x], tensors)
        raise LowerError(f"layer {name!r}: {type(layer).__name__} cannot be packed")

    def function(self, node: fx.Node, env) -> _Value:
        name = node.name
        target = getattr(node.target, "__name__", str(node.target))
        tensors = [env[a] for a in node.args if isinstance(a, fx.Node)]
        if node.target in (operator.add, operator.iadd, torch.add) or target in ("add", "add_"):
            if len(tensors) == 2:
                return self.emit("add", name, tensors)
        elif node.target is torch.flatten or target == "flatten":
            start = node.kwargs.get("start_dim", node.args[1] if len(node.args) > 1 else 0)
            if start == 1:
                return self.flatten(name, tensors[0])
        elif node.target is torch.cat:
            dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
            if dim == 1:
                return self.emit("concat", name, [env[a] for a in node.args[0]])  # type: ignore[union-attr]
        elif node.target in (torch.relu, F.relu) or target in ("relu", "relu_"):
            return self.emit("relu", name, tensors, modules=[nn.ReLU()] * len(self.members))
        elif node.target is F.dropout:
            return tensors[0]
        elif (target == "mean" and next(iter(node.args[1:2] or [node.kwargs.get("dim")])) in (
            (2, 3), [2, 3], (-2, -1), [-2, -1],
        )) or (node.target is F.adaptive_avg_pool2d and node.args[1] in (1, (1, 1))):  # fmt: skip
            return self.emit("global_avg", name, tensors)
        raise LowerError(f"operation {name!r}: {target} with these arguments cannot be packed")

    def flatten(self, name: str, x: _Value) -> _Value:
        return x if x.op in ("global_avg", "flatten", "dense") else self.emit("flatten", name, [x])

    def plain_conv(self, name: str, layer: nn.Conv2d) -> None:
        simple = layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
        if not simple:
            raise LowerError(
                f"layer {name!r}: expected a convolution with groups 1, dilation 1 and zero "
                f"padding, got groups {layer.groups}, dilation {layer.dilation}, "
                f"{layer.padding_mode!r}"
            )

    def geometry(self, name: str, layer) -> dict[str, int | float]:
        stride, pad = layer.stride, layer.padding
        pairs = [(v, v) if isinstance(v, int) else tuple(v) for v in (stride, pad) if v != "same"]
        if len(pairs) < 2 or any(a != b for a, b in pairs):
            raise LowerError(f"layer {name!r}: expected equal stride and padding for H and W, got "
                             f"stride {stride}, padding {pad}")  # fmt: skip
        return {"stride": int(pairs[0][0]), "pad": int(pairs[1][0])}

    def pool(self, name: str, layer, x: _Value) -> _Value:
        kernel = layer.kernel_size
        kernel = kernel if isinstance(kernel, int) else kernel[0]
        attrs = {**self.geometry(name, layer), "kernel": int(kernel), "ceil": int(layer.ceil_mode)}
        if isinstance(layer, nn.AvgPool2d):
            attrs["include_pad"] = int(layer.count_include_pad)
            return self.emit("avgpool", name, [x], attrs=attrs)
        if layer.dilation not in (1, (1, 1)):
            raise LowerError(f"layer {name!r}: expected dilation 1, got {layer.dilation}")
        return self.emit("maxpool", name, [x], attrs=attrs)

    def binary_conv(self, name: str, layer: BinaryConv2d, x: _Value) -> _Value:
        self.plain_conv(name, layer)
        signs = self.arrays(name, lambda m: (m.binary()[0] > 0).permute(0, 2, 3, 1))
        attrs = self.geometry(name, layer)
        op = "bconv" if x.op == "sign" else "conv"
        if op == "bconv":
            attrs["biases"] = 0 if layer.bias is None else layer.out_channels
        y = self.emit(op, name, [x], {"weight": ("weight", "binary", signs)}, attrs)
        tensors = {}
        if layer.binary()[1] is not None:
            scales = self.arrays(name, lambda m: m.binary()[1])
            tensors["scale"] = ("scale", "float32", scales)
        if layer.bias is not None:
            tensors["shift"] = ("bias", "float32", self.arrays(name, lambda m: m.bias))
        if not tensors:
            return y
        return self.emit(
            "affine", name, [y], tensors, modules=[_ConvEpilogue(m) for m in self.modules(name)]
        )


_IMAGE = _Value("image", "image", [])


class _ConvEpilogue(nn.Module):
    """What `BinaryConv2d` does behind its sums, in the same order."""

    def __init__(self, conv):
        super().__init__()
        self.alpha = conv.binary()[1]
        self.bias = conv.bias

    def forward(self, y: Tensor) -> Tensor:
        if self.alpha is not None:
            y = y * self.alpha[:, None, None]
        return y if self.bias is None else y + self.bias[:, None, None]


def _folded_norm(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """(scale, shift) of a batch norm in evaluation mode, in float32, by torch's own steps.

    On x86 torch then computes ``fma(x, scale, shift)``; `program.affine` rounds twice, so values
    can differ in the last bit. Thresholds do not: they are found on torch's own function.
    """
    assert norm.running_var is not None
    assert norm.running_mean is not None
    scale = torch.rsqrt(norm.running_var + norm.eps)
    if norm.weight is not None:
        scale = norm.weight * scale
    shift = -(norm.running_mean.double() * scale.double())
    return scale, (shift if norm.bias is None else norm.bias.double() + shift).float()


def fold(values: list[_Value], folded: Callable[[_Value, list[_Value]], Any]) -> None:
    """Turn each sign, with the chain of per-channel functions in front of it, into a threshold.

    Args:
        folded: what becomes of a source and the chain behind it: (op, tensors), or None where the
            chain stays as it is.
    """
    for value in list(values):
        if value.op != "sign":
            continue
        chain: list[_Value] = []
        source = value.inputs[0]
        while source.modules is not None and source.uses == 1:
            chain.insert(0, source)
            source = source.inputs[0]
        found = folded(source, chain) if chain else None
        if found is None:
            continue
        value.op, value.tensors = found
        value.inputs = [source]
        value.shared = not _own(chain)
        for link in chain:
            values.remove(link)


def _own(chain: list[_Value]) -> bool:
    return any(not link.shared and link.tensors for link in chain)


def _thresholds(members: int, source: _Value, chain: list[_Value]):
    """The exact thresholds of a chain, of each member where one of its links is own."""
    functions = [
        nn.Sequential(*(link.modules[m] for link in chain if link.modules))
        for m in range(members if _own(chain) else 1)
    ]
    if source.op == "bconv":
        weight = source.tensors["weight"][2][0]
        return _integer_thresholds(functions, weight.shape[0], int(weight[0].size))
    return _float_thresholds(functions, chain)


def _integer_thresholds(functions, channels: int, k: int):
    """Evaluate the chain at every popcount -K..K and read off thresholds or intervals.

    Returns (op, tensors), or None where a channel changes sign more than twice.
    """
    points = torch.arange(-k, k + 1, dtype=torch.float32)
    grid = points.view(1, 1, -1, 1).expand(1, channels, -1, 1).contiguous()
    lows, highs, insides = [], [], []
    for function in functions:
        bits = (function(grid)[0, :, :, 0] >= 0).numpy()  # (channels, 2K+1)
        changes = (bits[:, 1:] != bits[:, :-1]).sum(1)
        if changes.max(initial=0) > 2:
            return None
        # The run of equal bits that is bounded on both sides, or the rising end.
        inside = np.where(changes == 2, ~bits[:, 0], True)
        run = bits == inside[:, None]
        first = np.where(run.any(1), run.argmax(1), 2 * k + 1)
        last = np.where(run.any(1), 2 * k - run[:, ::-1].argmax(1), 2 * k)
        lows.append((first - k).astype(np.int64))
        highs.append((last - k).astype(np.int64))
        insides.append(inside)
    kind = "int16" if k + 1 < 2**15 else "int32"
    dtype = P.KINDS[kind]
    one_sided = all(
        (i & ((hi == k) | (lo == -k))).all() for lo, hi, i in zip(lows, highs, insides, strict=True)
    )
    if not one_sided:
        tensors = {
            "low": ("threshold", kind, [lo.astype(dtype) for lo in lows]),
            "high": ("threshold", kind, [hi.astype(dtype) for hi in highs]),
        }
        if not all(i.all() for i in insides):
            tensors["inside"] = ("direction", "binary", insides)
        return "interval", tensors
    rising = [hi == k for hi in highs]
    limits = [np.where(r, lo, hi) for r, lo, hi in zip(rising, lows, highs, strict=True)]
    tensors = {"threshold": ("threshold", kind, [t.astype(dtype) for t in limits])}
    if not all(r.all() for r in rising):
        tensors["direction"] = ("direction", "binary", rising)
    return "threshold", tensors


def _rising(chain: list[_Value], m: int) -> np.ndarray | None:
    """Per channel: whether the chain's function rises; None where one link is not monotone."""
    rising: np.ndarray | bool = True
    for link in chain:
        if link.op == "affine" and "scale" in link.tensors:
            scales = link.tensors["scale"][2]
            rising = rising == (scales[m if len(scales) > 1 else 0] >= 0)
        elif link.op == "prelu":
            slopes = link.tensors["slope"][2]
            if (slopes[m if len(slopes) > 1 else 0] < 0).any():
                return None
    return np.asarray(rising)


def _float_thresholds(functions, chain: list[_Value]):
    """Bisect the ordered float32 numbers for the one at which the chain's sign changes."""
    thresholds, directions = [], []
    for m, function in enumerate(functions):
        rising = _rising(chain, m)
        if rising is None:
            return None
        channels = _channels(chain)
        rising = np.broadcast_to(rising, (channels,))

        def bits(keys: np.ndarray, function=function) -> np.ndarray:
            x = torch.from_numpy(_floats(keys)).view(1, -1, 1, 1)
            # Beside a copy, so that torch takes the path it takes for whole maps.
            return (function(x.expand(1, -1, 4, 4).contiguous())[0, :, 0, 0] >= 0).numpy()

        top = _keys(np.float32(FLOAT_MAX))
        low = np.full(channels, -top)  # the last known key on the falling side of the change
        high = np.full(channels, top)
        at_low, at_high = bits(low), bits(high)
        constant = at_low == at_high
        while (high - low > 1).any():
            middle = low + (high - low) // 2
            there = bits(middle) == at_high
            high = np.where(there, middle, high)
            low = np.where(there, low, middle)
        limit = _floats(np.where(rising, high, low))
        always, never = (
            np.where(rising, -FLOAT_MAX, FLOAT_MAX),
            np.where(rising, FLOAT_MAX, -FLOAT_MAX),
        )
        limit = np.where(constant, np.where(at_high, always, never), limit)
        thresholds.append(limit.astype(np.float32))
        directions.append(rising)
    tensors = {"threshold": ("threshold", "float32", thresholds)}
    if not all(d.all() for d in directions):
        tensors["direction"] = (
            "direction",
            "binary",
            [np.ascontiguousarray(d) for d in directions],
        )
    return "threshold", tensors


def _channels(chain: list[_Value]) -> int:
    return max(
        a.shape[0] for link in chain for _, _, arrays in link.tensors.values() for a in arrays
    )


def _keys(x: np.ndarray | np.float32) -> np.ndarray:
    """Finite float32 to int64 keys in the same order; -0.0 and 0.0 share key 0."""
    i = np.asarray(x, np.float32).view(np.int32).astype(np.int64)
    return np.where(i >= 0, i, -(i & 0x7FFFFFFF))


def _floats(keys: np.ndarray) -> np.ndarray:
    i = np.where(keys >= 0, keys, (-keys) | 0x80000000).astype(np.uint32)
    return i.view(np.float32)


def _assemble(ensemble: Ensemble, values: list[_Value], output: _Value, classes, info) -> P.Program:
    tensors: dict[str, P.Tensor] = {}
    nodes: list[P.Node] = []
    numbers = {id(_IMAGE): 0}
    many = len(ensemble.ids)
    for value in values:
        if value is not output and value.uses == 0:
            continue
        slots = {}
        for slot, (role, kind, arrays) in value.tensors.items():
            own = len(arrays) > 1
            stacked = np.stack(arrays) if own else arrays[0]
            shape = arrays[0].shape
            data = P.pack_bits(stacked, own) if kind == "binary" else stacked.astype(P.KINDS[kind])
            key = f"{len(nodes)}.{slot}"
            tensors[key] = P.Tensor(kind, role, tuple(shape), own, data)
            slots[slot] = key
        inputs = tuple(numbers[id(v)] for v in value.inputs)
        nodes.append(P.Node(value.op, value.name, inputs, slots, value.attrs))
        numbers[id(value)] = len(nodes)
    extra = {}
    weights = ensemble.weights[list(ensemble.ids)].numpy().astype(np.float32)
    if (weights != 1).any():
        tensors["c.weight"] = P.Tensor("float32", "combine", weights.shape, False, weights)
        extra["weight"] = "c.weight"
    if ensemble.bias is not None:
        bias = ensemble.bias.detach().numpy().copy()
        tensors["c.bias"] = P.Tensor("float32", "combine", bias.shape, False, bias)
        extra["bias"] = "c.bias"
    h, w, c = ensemble.spec.model.image
    return P.Program(
        nodes=tuple(nodes),
        tensors=tensors,
        members=many,
        combine=ensemble.spec.combine,
        image=(h, w, c),
        classes=tuple(classes),
        combine_tensors=extra,
        info=dict(info),
    )
