"""From a trained torch ensemble to a `Program`: trace one member, fold what folds exactly.

`lower` traces the template member with torch.fx, turns each operation (`networks.operations`) into
operators of `program`, and folds chains of per-channel functions that end in a sign (`fold`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor, fx, nn

from bnncore.data import normalization
from bnncore.lowering.draft import IMAGE, Arrays, Draft, LowerError, assemble
from bnncore.lowering.fold import directions, fold, thresholds
from bnncore.networks.binarize import BinaryActivation, BinaryConv2d, Shift
from bnncore.networks.ensemble import Ensemble
from bnncore.networks.operations import Operation, OperationError, read
from bnncore.networks.parts import Dropout
from bnncore.packed import program as P
from bnncore.packed import rules


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
        LowerError: a layer without an operator, or that does what its operator cannot; a parameter
            or statistic that is not finite. Names the layer.
    """
    ensemble = ensemble.cpu().eval()
    _check_state(ensemble)
    combined = {}
    weights = ensemble.weights[list(ensemble.ids)].numpy().astype(np.float32)
    if (weights != 1).any():
        combined["weight"] = weights
    if ensemble.bias is not None:
        combined["bias"] = ensemble.bias.detach().numpy().copy()
    many = len(ensemble.ids)
    with torch.no_grad():
        drafts, output = Walk(ensemble, mean, std).run()
        fold(drafts, partial(thresholds, many), partial(directions, many))
    made = assemble(drafts, output, _tensor, ensemble.spec, many, combined, classes, info or {})
    try:
        rules.validate(made)
    except P.PackedFormatError as error:
        raise LowerError(str(error)) from error
    return made


def _check_state(ensemble: Ensemble) -> None:
    for name, value in ensemble.state().items():
        if value.is_floating_point() and value.dtype != torch.float32:
            raise LowerError(f"{name}: expected float32 values, got {value.dtype}")
        if not torch.isfinite(value).all():
            raise LowerError(f"{name}: expected finite values, got NaN or infinity")
        if name.endswith(".running_var") and (value < 0).any():
            raise LowerError(f"{name}: expected variances of at least 0, got {value.min():g}")


def _tensor(role: str, kind: str, arrays: list[np.ndarray], shared: bool) -> P.Tensor:
    own = len(arrays) > 1
    stacked = np.stack(arrays) if own else arrays[0]
    data = P.pack_bits(stacked, own) if kind == "binary" else stacked.astype(P.KINDS[kind])
    return P.Tensor(kind, role, tuple(arrays[0].shape), own, data)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        ours = isinstance(module, BinaryConv2d | BinaryActivation | Shift | Dropout)
        return ours or super().is_leaf_module(module, name)


class Walk:
    """Walks the traced template member and emits drafts."""

    def __init__(self, ensemble: Ensemble, mean: tuple[float, ...], std: tuple[float, ...]):
        self.members = list(ensemble.members)
        self.ids = ensemble.ids
        self.shared = tuple(f"{name}." for name in ensemble.shared)
        self.drafts: list[Draft] = []
        self.stats = (mean, std)

    def run(self) -> tuple[list[Draft], Draft]:
        """(all drafts in order, the one that gives the logits)."""
        template = self.members[0]
        try:
            graph = _Tracer().trace(template)
        except Exception as error:  # fx raises many kinds; all mean the same to the caller
            raise LowerError(f"{type(template).__name__}: cannot be traced: {error}") from error
        scale, shift = normalization(*self.stats)
        stats = {"scale": ("input", "float32", [scale]), "shift": ("input", "float32", [shift])}
        drafts = {
            node: self.emit("normalize", "input", [IMAGE], stats)
            for node in graph.nodes
            if node.op == "placeholder"
        }
        for draft in drafts.values():
            draft.shared = True
        try:
            for node, operation in read(graph, template):
                name = str(node.target) if operation.layer is not None else node.name
                inputs = [drafts[value.node] for value in operation.inputs]
                drafts[node] = self.lowered(name, operation, inputs)
        except OperationError as error:
            raise LowerError(str(error)) from None
        (output,) = (n for n in graph.nodes if n.op == "output")
        return self.drafts, drafts[output.args[0]]

    def emit(
        self,
        op: str,
        name: str,
        inputs: list[Draft],
        tensors: dict[str, Arrays] | None = None,
        attrs: dict[str, int | float] | None = None,
        modules: list[nn.Module] | None = None,
    ) -> Draft:
        shared = f"{name}.".startswith(self.shared) if self.shared else False
        draft = Draft(op, name, inputs, tensors or {}, attrs or {}, modules, shared)
        for source in inputs:
            source.uses += 1
        self.drafts.append(draft)
        return draft

    def arrays(
        self, role: str, name: str, get: Callable[..., Tensor], kind: str = "float32"
    ) -> Arrays:
        """`get(module)` of layer `name` in each member, or once where the layer is shared."""
        members = list(zip(self.ids, self.members, strict=True))
        if self.shared and f"{name}.".startswith(self.shared):
            members = members[:1]
        found = []
        for i, member in members:
            value = get(member.get_submodule(name))
            if not torch.isfinite(value).all():
                raise LowerError(f"{i}.{name}: expected a finite {role}, got NaN or infinity")
            found.append(np.ascontiguousarray(value.numpy()))
        return role, kind, found

    def lowered(self, name: str, operation: Operation, inputs: list[Draft]) -> Draft:
        """What an operation becomes."""
        op, attrs, x = operation.op, operation.attrs, inputs[0]
        if op in ("same", "dropout"):
            return x
        if op in ("global_avg", "flatten") and operation.form != "map":
            return x
        if op in ("conv", "dense"):
            return self.products(name, operation, x)
        if op == "flatten":
            inputs = [self.floats(x)]
        modules: list[nn.Module] | None = None
        tensors: dict[str, Arrays] = {}
        if op in ("norm", "shift", "prelu"):
            modules = [member.get_submodule(name) for member in self.members]
            if op == "norm":
                tensors["scale"] = self.arrays("scale", name, lambda m: _folded_norm(m)[0])
                tensors["shift"] = self.arrays("shift", name, lambda m: _folded_norm(m)[1])
            elif op == "shift":
                tensors["shift"] = self.arrays("shift", name, lambda m: m.shift)
            else:
                tensors["slope"] = self.arrays("slope", name, lambda m: m.weight)
            op = "prelu" if op == "prelu" else "affine"
        elif op == "relu":
            modules = [nn.ReLU()] * len(self.members)
        elif op == "clip":
            modules = [nn.Hardtanh(attrs["low"], attrs["high"])] * len(self.members)
        return self.emit(op, name, inputs, tensors, attrs, modules)

    def floats(self, x: Draft) -> Draft:
        """`x` for an operator that takes no integers: sums of +-1 are some."""
        return self.emit("affine", x.name, [x]) if _whole(x) else x

    def products(self, name: str, operation: Operation, x: Draft) -> Draft:
        """A convolution or a dense layer."""
        op, layer, attrs = operation.op, operation.layer, dict(operation.attrs)
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        if op == "conv" and operation.form == "pooled":  # 1x1 over the one value of each channel
            if isinstance(layer, BinaryConv2d):
                raise LowerError(f"layer {name!r}: a binary layer behind global pooling")
            op, attrs = "dense", {}
        if isinstance(layer, BinaryConv2d):
            return self.binary_conv(name, layer, attrs, x)

        def weight(layer: nn.Module) -> Tensor:
            if op == "dense":
                return layer.weight.flatten(1)  # type: ignore[operator]
            return layer.weight.permute(0, 2, 3, 1)  # type: ignore[operator]

        x = self.floats(x)
        tensors = {"weight": self.arrays("weight", name, weight)}
        if layer.bias is not None:
            tensors["bias"] = self.arrays("bias", name, lambda m: m.bias)
        return self.emit(op, name, [x], tensors, attrs)

    def binary_conv(
        self, name: str, layer: BinaryConv2d, attrs: dict[str, int | float], x: Draft
    ) -> Draft:
        """Sums of +-1, and what follows them."""
        signs = self.arrays(
            "weight", name, lambda m: (m.binary()[0] > 0).permute(0, 2, 3, 1), "binary"
        )
        if x.op == "sign":
            op = "bconv"
            attrs["biases"] = 0 if layer.bias is None else layer.out_channels
        else:
            op, x = "conv", self.floats(x)
        y = self.emit(op, name, [x], {"weight": signs}, attrs)
        tensors = {}
        if layer.binary()[1] is not None:
            tensors["scale"] = self.arrays("scale", name, lambda m: m.binary()[1])
        if layer.bias is not None:
            tensors["shift"] = self.arrays("bias", name, lambda m: m.bias)
        if not tensors:
            return y
        modules: list[nn.Module] = [_Epilogue(m.get_submodule(name)) for m in self.members]
        return self.emit("affine", name, [y], tensors, modules=modules)


def _whole(x: Draft) -> bool:
    return x.op == "bconv" or (x.op in ("maxpool", "concat") and all(map(_whole, x.inputs)))


class _Epilogue(nn.Module):
    """What `BinaryConv2d` does behind its sums, in the same order."""

    def __init__(self, conv: nn.Module):
        super().__init__()
        assert isinstance(conv, BinaryConv2d)
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
