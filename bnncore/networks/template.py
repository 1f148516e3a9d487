"""Any plain CNN as a backbone: first and last layer in full precision, inner convolutions binary.

TentacleNet promises its template for "any generic CNN" (section 3.1). A user's network is an
ordinary torch model, built by a function ``(channels, classes) -> nn.Module`` that parameters name
as ``module:function``. It is traced with torch.fx and split into the three parts of a `Backbone`:

====== ============================================================================================
stem   the first convolution, with the batch norm and the activation that follow it; full precision
body   everything in between. Each convolution becomes batch norm, sign, binary convolution; all
       else is kept, dense layers and convolutions in groups in full precision among it
head   the last layer with weights, full precision, and what follows it
====== ============================================================================================

The FP32 twin is the same network, split alike, so that layers have the same names in both and a BNN
starts from its weights. With float activations (BinaryConnect) a convolution becomes a binary one
and nothing is put in front of it.

Pooling, flattening and dropout are rewritten in the form that can be packed, by the image size that
the model is built for. Convolutions on the shorter branch of an addition count as shortcuts.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from bnncore.networks.binarize import BinaryActivation, BinaryConv2d
from bnncore.networks.parts import Backbone, Dropout, ModelSpec
from bnncore.params import Binarizer

ACTIVATIONS = (nn.ReLU, nn.PReLU, nn.Hardtanh)  # ReLU6 is a Hardtanh
BATCH = 2  # images in the run that finds shapes


class TemplateError(ValueError):
    """A network that the template cannot be applied to; names the layer or operation."""


def binarized(model: nn.Module, spec: ModelSpec) -> Backbone:
    """The backbone of a user's plain FP32 model; its FP32 twin where ``spec.binarizer`` is None.

    Args:
        model: freshly built, (B, C, H, W) to logits (B, classes); taken apart.
        spec: with the image size to build for.

    Raises:
        TemplateError: it cannot be traced, does not fit the image, or has no place to split.
    """
    if not isinstance(model, nn.Module):
        raise TemplateError(f"{spec.backbone}: expected a torch module, got {type(model).__name__}")
    if spec.width is not None:
        raise TemplateError(
            f"model.width: expected none for {spec.backbone}, which sets its own, got {spec.width}"
        )
    traced = _traced(model, spec)
    _canonical(traced, spec)
    layers = [n for n in traced.graph.nodes if _weighted(traced, n)]
    _check_layers(traced, layers, spec)
    stem, cut = _stem(traced, layers[0])
    last = layers[-1]
    (source,) = last.all_input_nodes
    (end,) = _output(traced).all_input_nodes
    shortcuts = {f"body.{name}" for name in _shortcuts(traced)}
    if spec.binarizer is not None:
        for node in layers[1:-1]:
            _binarize(traced, node, spec.binarizer)
    body = _part(traced, cut, source, "Body")
    head = _part(traced, source, end, "Head")
    kind = "dense" if isinstance(traced.get_submodule(str(last.target)), nn.Linear) else "conv"
    _rename(head, str(last.target), kind, spec.dropout)
    backbone = Backbone(stem, body, head)
    backbone.shortcuts = frozenset(shortcuts)
    return backbone.train()


# -- tracing -----------------------------------------------------------------------------------


class _Measure(fx.Interpreter):
    """Runs a graph and notes in each node's meta the tensor's shape, or the value if it is none."""

    at = "input"

    def run_node(self, node: fx.Node) -> Any:
        self.at = str(node.target)
        result = super().run_node(node)
        key = "shape" if isinstance(result, torch.Tensor) else "value"
        node.meta[key] = tuple(result.shape) if key == "shape" else result
        return result


def _traced(model: nn.Module, spec: ModelSpec) -> fx.GraphModule:
    try:
        traced = fx.symbolic_trace(model.eval())
    except Exception as error:  # fx raises many kinds; all mean the same to the user
        raise TemplateError(
            f"{spec.backbone}: {type(model).__name__} cannot be traced: {error}; expected a "
            "network whose operations do not depend on the images' values"
        ) from error
    height, width, channels = spec.image
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    run = _Measure(traced)
    try:
        with torch.no_grad():
            run.run(torch.zeros(BATCH, channels, height, width, device=device))
    except Exception as error:
        raise TemplateError(
            f"{spec.backbone}: {run.at!r} cannot run on images of {height} x {width} x {channels}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    shape = _output(traced).args[0].meta.get("shape")  # type: ignore[union-attr]
    if shape != (BATCH, spec.classes):
        raise TemplateError(
            f"{spec.backbone}: expected logits of shape (B, {spec.classes}), got {shape}"
        )
    return traced


def _output(traced: fx.GraphModule) -> fx.Node:
    return next(n for n in reversed(traced.graph.nodes) if n.op == "output")


def _weighted(traced: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(
        traced.get_submodule(str(node.target)), nn.Conv2d | nn.Linear
    )


def _check_layers(traced: fx.GraphModule, layers: list[fx.Node], spec: ModelSpec) -> None:
    where = spec.backbone
    targets = [str(n.target) for n in traced.graph.nodes if n.op == "call_module"]
    for name in targets:
        module = traced.get_submodule(name)
        if targets.count(name) > 1 and next(module.parameters(), None) is not None:
            raise TemplateError(f"{where}: layer {name!r}: expected to be used once, got it twice")
    if len(layers) < 2:
        found = ", ".join(str(n.target) for n in layers) or "none"
        raise TemplateError(f"{where}: expected at least two layers with weights, got {found}")
    first = layers[0]
    if not isinstance(traced.get_submodule(str(first.target)), nn.Conv2d):
        raise TemplateError(f"{where}: layer {first.target!r}: expected a convolution first")
    image = next(n for n in traced.graph.nodes if n.op == "placeholder")
    for node in image.users:
        if node is not first:
            raise TemplateError(
                f"{where}: {node.target!r} reads the images; expected only the first convolution, "
                f"{first.target!r}, to do so, so that there is a first block to share"
            )


# -- one form for each operation ---------------------------------------------------------------


def _canonical(traced: fx.GraphModule, spec: ModelSpec) -> None:
    """Rewrite pooling, flattening, dropout and in-place operations in the form that is packed."""
    graph = traced.graph
    for node in list(graph.nodes):
        if node.op in ("placeholder", "output", "get_attr"):
            continue
        # Sizes that were read off a tensor are constants for one image size.
        values = fx.map_arg(node.args, lambda n: n.meta.get("value", n))
        named = fx.map_arg(node.kwargs, lambda n: n.meta.get("value", n))
        node.args, node.kwargs = values, named
        module = traced.get_submodule(str(node.target)) if node.op == "call_module" else None
        for attribute in ("inplace",):
            if getattr(module, attribute, False):
                setattr(module, attribute, False)
        if "inplace" in node.kwargs:
            node.kwargs = {**node.kwargs, "inplace": False}
        if node.target is operator.iadd:
            node.target = operator.add
        replacement = _replacement(node, module, spec)
        if replacement is _KEEP:
            continue
        source = node.args[0]
        if replacement is None:
            node.replace_all_uses_with(source)
        else:
            with graph.inserting_after(node):
                new = _insert(traced, f"{node.name}_packed", replacement, source)
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
        graph.erase_node(node)
    graph.eliminate_dead_code()
    traced.recompile()


_KEEP = object()


def _replacement(node: fx.Node, module: nn.Module | None, spec: ModelSpec) -> Any:
    """The module to put in the place of `node`; None to leave it out, `_KEEP` to leave it be."""
    if not node.args or not isinstance(node.args[0], fx.Node):
        return _KEEP
    before, after = node.args[0].meta.get("shape"), node.meta.get("shape")
    target, arguments = node.target, _arguments(node)
    if isinstance(module, nn.Dropout):
        return Dropout(module.p)
    if target is F.dropout:
        return Dropout(arguments(("p", 0.5)))
    if isinstance(module, nn.AdaptiveAvgPool2d) or target is F.adaptive_avg_pool2d:
        return _pooled(node, before, after, spec)
    if target is F.max_pool2d:
        k, s, p, d, c, _ = arguments(
            ("kernel_size", None), ("stride", None), ("padding", 0), ("dilation", 1),
            ("ceil_mode", False), ("return_indices", False),
        )  # fmt: skip
        return nn.MaxPool2d(k, s, p, d, ceil_mode=c)
    if target is F.avg_pool2d:
        k, s, p, c, i = arguments(
            ("kernel_size", None), ("stride", None), ("padding", 0), ("ceil_mode", False),
            ("count_include_pad", True),
        )  # fmt: skip
        return nn.AvgPool2d(k, s, p, c, i)
    names = ("flatten", "view", "reshape", "squeeze")
    reshapes = isinstance(module, nn.Flatten) or target in names or target is torch.flatten
    if reshapes and after is not None and before is not None and len(after) == 2:
        return None if len(before) == 2 else nn.Flatten(1)
    return _KEEP


def _arguments(node: fx.Node) -> Callable[..., Any]:
    """Look up the arguments behind the first, given by place or by name."""

    def look(*wanted: tuple[str, Any]) -> Any:
        found = [
            node.args[k + 1] if len(node.args) > k + 1 else node.kwargs.get(name, default)
            for k, (name, default) in enumerate(wanted)
        ]
        return found[0] if len(found) == 1 else found

    return look


def _pooled(node: fx.Node, before, after, spec: ModelSpec) -> nn.Module | None:
    """Adaptive average pooling from one known size to another."""
    (h, w), (oh, ow) = before[2:], after[2:]
    if (oh, ow) == (1, 1):
        return nn.AdaptiveAvgPool2d(1)
    if (h, w) == (oh, ow):
        return None
    if h % oh == 0 and w % ow == 0 and h // oh == w // ow:
        return nn.AvgPool2d(h // oh)
    raise TemplateError(
        f"{spec.backbone}: {str(node.target)!r}: adaptive pooling from {h} x {w} to {oh} x {ow} "
        f"cannot be packed; expected a whole ratio, so another image size than {spec.image[:2]}"
    )


# -- splitting ---------------------------------------------------------------------------------


def _insert(traced: fx.GraphModule, name: str, module: nn.Module, source: fx.Node) -> fx.Node:
    while hasattr(traced, name):
        name += "_"
    traced.add_submodule(name, module)
    return traced.graph.call_module(name, (source,))


def _stem(traced: fx.GraphModule, first: fx.Node) -> tuple[nn.Sequential, fx.Node]:
    """The first convolution with its norm and activation, and the node that ends them."""
    stem = nn.Sequential()
    stem.add_module("conv", traced.get_submodule(str(first.target)))
    end = first
    for name, kinds in (("norm", nn.BatchNorm2d), ("act", ACTIVATIONS)):
        if len(end.users) != 1:
            break
        (follower,) = end.users
        module: nn.Module | None = None
        if follower.op == "call_module":
            module = traced.get_submodule(str(follower.target))
        elif follower.target in (F.relu, torch.relu, "relu", "relu_"):
            module = nn.ReLU()
        if isinstance(module, kinds):
            stem.add_module(name, module)
            end = follower
    return stem, end


def _shortcuts(traced: fx.GraphModule) -> set[str]:
    """Names of the convolutions on the shorter branch of an addition of two."""
    above: dict[fx.Node, set[fx.Node]] = {}
    found: set[str] = set()
    for node in traced.graph.nodes:
        above[node] = {node}.union(*(above[n] for n in node.all_input_nodes))
        if node.target in (operator.add, torch.add, "add") and len(node.all_input_nodes) == 2:
            a, b = (above[n] for n in node.all_input_nodes)
            branches = [
                {str(n.target) for n in only if _weighted(traced, n)} for only in (a - b, b - a)
            ]
            shorter, longer = sorted(branches, key=len)
            if len(shorter) < len(longer):
                found |= shorter
    return found


def _binarize(traced: fx.GraphModule, node: fx.Node, binarizer: Binarizer) -> None:
    """Put batch norm, sign and a binary convolution in the place of a plain one, under its name."""
    name = str(node.target)
    layer = traced.get_submodule(name)
    if not isinstance(layer, nn.Conv2d) or layer.groups != 1:
        return
    binary = BinaryConv2d(
        layer.in_channels, layer.out_channels, layer.kernel_size,
        layer.stride, layer.padding, layer.dilation, bias=layer.bias is not None,
        padding_mode=layer.padding_mode,
        binarizer=binarizer.weight, stochastic=binarizer.stochastic,
    )  # fmt: skip
    binary.load_state_dict(layer.state_dict(), strict=False)
    if binary.scale is not None:
        with torch.no_grad():
            binary.scale.copy_(binary.weight.abs().mean(dim=(1, 2, 3)))
    traced.set_submodule(name, binary)
    if binarizer.activation != "float":
        (source,) = node.all_input_nodes
        with traced.graph.inserting_before(node):
            norm = _insert(traced, f"{name}_norm", nn.BatchNorm2d(layer.in_channels), source)
            sign = _insert(traced, f"{name}_sign", BinaryActivation(binarizer.activation), norm)
        node.args = (sign,)


def _part(traced: fx.GraphModule, start: fx.Node, end: fx.Node, name: str) -> fx.GraphModule:
    """The nodes that lead from `start` to `end`, as a module of one input."""
    graph = fx.Graph()
    copies = {start: graph.placeholder("x")}

    def copy(node: fx.Node) -> fx.Node:
        if node.op == "placeholder":
            raise TemplateError(
                f"{name.lower()}: expected all paths to pass through {start.target!r}, so that the "
                f"network can be split there; got one around it to {end.target!r}"
            )
        return graph.node_copy(node, lambda n: copies[n])

    needed = _needed(end, start)
    for node in traced.graph.nodes:
        if node in needed and node not in copies:
            copies[node] = copy(node)
    graph.output(copies[end])
    return fx.GraphModule(traced, graph, name)


def _needed(end: fx.Node, start: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    waiting = [end]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            if node is not start:
                waiting += node.all_input_nodes
    return found


def _rename(head: fx.GraphModule, name: str, to: str, dropout: float) -> None:
    """Call the head's layer ``dense`` or ``conv``, as in every backbone; dropout in front of it."""
    (node,) = (n for n in head.graph.nodes if str(n.target) == name)
    layer = head.get_submodule(name)
    head.delete_submodule(name)
    head.add_submodule(to, layer)
    node.target = to
    if dropout > 0:
        with head.graph.inserting_before(node):
            node.args = (_insert(head, "dropout", Dropout(dropout), node.args[0]),)
    head.recompile()
