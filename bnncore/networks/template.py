"""Any plain CNN as a backbone: first and last layer in full precision, inner convolutions binary.

TentacleNet promises its template for "any generic CNN" (section 3.1). A user's network is an
ordinary torch model, built by a function ``(channels, classes) -> nn.Module`` that parameters name
as ``module:function``. It is traced with torch.fx and split into the three parts of a `Backbone`:

====== ============================================================================================
stem   the first convolution, with the batch norm and the activation that follow it; full precision
body   everything in between. Each convolution becomes batch norm, sign, binary convolution; all
       else is kept, dense layers in full precision among it, and 1x1 convolutions behind global
       pooling, which are dense layers
head   the last layer with weights, full precision, and what follows it
====== ============================================================================================

The FP32 twin is the same network, split alike, so that layers have the same names in both and a BNN
starts from its weights. With float activations (BinaryConnect) a convolution becomes a binary one
and nothing is put in front of it.

Flattening, adaptive pooling and dropout are rewritten in the form that can be packed, by the image
size that the model is built for; what cannot be packed (`operations`) is refused. The rewritten
network is compared with the user's on random images. Convolutions on the shorter branch of an
addition count as shortcuts.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from bnncore.networks.binarize import BinaryConv2d, inner_act, inner_conv, inner_sign
from bnncore.networks.operations import Operation, OperationError, read
from bnncore.networks.parts import Backbone, Dropout, ModelSpec, NetworkError
from bnncore.params import Binarizer

BATCH = 2  # images in the runs that find shapes and compare


class TemplateError(NetworkError):
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
    traced, images = _traced(model, spec)
    expected = _run(model, images)
    traced.graph.eliminate_dead_code()
    layers = [node for node in traced.graph.nodes if _weighted(traced, node)]
    _check_layers(traced, layers, spec)
    _reshape(traced, spec)
    _rewrite(traced, _operations(traced, spec))
    _check_same(_run(traced, images), expected, spec)
    operations = _operations(traced, spec)
    stem, cut = _stem(traced, layers[0], operations)
    last = layers[-1]
    (source,) = last.all_input_nodes
    (end,) = _output(traced).all_input_nodes
    shortcuts = {f"body.{name}" for name in _shortcuts(traced, operations)}
    if spec.binarizer is not None:
        for node in layers[1:-1]:
            if operations[node].op == "conv" and operations[node].form == "map":
                _binarize(traced, node, spec.binarizer)
        if spec.binarizer.stem == "binary":
            stem.set_submodule("conv", _binary(stem.get_submodule("conv"), spec.binarizer))
        if spec.binarizer.head == "binary":
            if operations[last].op == "dense" or operations[last].form != "map":
                raise TemplateError(
                    f"model.binarizer.head: expected float with {spec.backbone}, which does not "
                    "end in a convolution of maps, got 'binary'"
                )
            name = str(last.target)
            traced.set_submodule(name, _binary(traced.get_submodule(name), spec.binarizer))
    body = _part(traced, cut, source, "Body")
    head = _part(traced, source, end, "Head")
    kind = "dense" if operations[last].op == "dense" else "conv"
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
        if isinstance(result, Tensor):
            node.meta["shape"] = tuple(result.shape)
        elif _is_plain(result):
            node.meta["value"] = result
        return result


def _is_plain(value: Any) -> bool:
    """Whether a value is made of numbers and their like: read off a size, not computed."""
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return isinstance(value, int | float | str | torch.dtype | torch.device | None)


def _traced(model: nn.Module, spec: ModelSpec) -> tuple[fx.GraphModule, Tensor]:
    """The traced network, measured, and the random images that it was measured with."""
    try:
        traced = fx.symbolic_trace(model.eval())
    except Exception as error:  # fx raises many kinds; all mean the same to the user
        raise TemplateError(
            f"{spec.backbone}: {type(model).__name__} cannot be traced: {error}; expected a "
            "network whose operations do not depend on the images' values"
        ) from error
    height, width, channels = spec.image
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    noise = torch.Generator().manual_seed(0)
    shape = (BATCH, channels, height, width)
    images = torch.randn(shape, generator=noise, device="cpu").to(device)
    run = _Measure(traced)
    try:
        with torch.no_grad():
            run.run(images.clone())
    except Exception as error:
        raise TemplateError(
            f"{spec.backbone}: {run.at!r} cannot run on images of {height} x {width} x {channels}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    logits = getattr(_output(traced).args[0], "meta", {}).get("shape")
    if logits != (BATCH, spec.classes):
        raise TemplateError(
            f"{spec.backbone}: expected logits of shape (B, {spec.classes}), got {logits}"
        )
    return traced, images


@torch.no_grad()
def _run(network: nn.Module, images: Tensor) -> Tensor:
    with torch.random.fork_rng(devices=[]):  # what is drawn here must not change training
        return images if images.is_meta else network.eval()(images.clone())


def _check_same(found: Tensor, expected: Tensor, spec: ModelSpec) -> None:
    """What a trace does not see (changes in place, random numbers) shows in the results."""
    if found.is_meta:
        return
    scale, apart = float(expected.abs().max()), float((found - expected).abs().max())
    if not apart <= 1e-3 * scale + 1e-6:
        raise TemplateError(
            f"{spec.backbone}: expected a network that computes what its trace says, got logits of "
            f"up to {scale:.2g} that differ by {apart:.2g}; are values changed in place (+=), or "
            "drawn at random?"
        )


def _output(traced: fx.GraphModule) -> fx.Node:
    return next(n for n in reversed(traced.graph.nodes) if n.op == "output")


def _weighted(traced: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(
        traced.get_submodule(str(node.target)), nn.Conv2d | nn.Linear
    )


def _operations(traced: fx.GraphModule, spec: ModelSpec) -> dict[fx.Node, Operation]:
    try:
        return dict(read(traced.graph, traced))
    except OperationError as error:
        raise TemplateError(f"{spec.backbone}: {error}") from None


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


def _reshape(traced: fx.GraphModule, spec: ModelSpec) -> None:
    """Put flattening and adaptive pooling, whatever they are written as, in the form for which they
    need no sizes; and sizes that were read off a tensor as the constants they are.
    """
    graph = traced.graph
    for node in list(graph.nodes):
        if node.op in ("placeholder", "output", "get_attr"):
            continue
        node.args, node.kwargs = (
            fx.map_arg(given, lambda n: n.meta.get("value", n))
            for given in (node.args, node.kwargs)
        )
        sources, after = node.all_input_nodes, node.meta.get("shape")
        if after is None or len(sources) != 1 or "shape" not in sources[0].meta:
            continue
        (source,) = sources
        module = traced.get_submodule(str(node.target)) if node.op == "call_module" else None
        before = source.meta["shape"]
        if type(module) is nn.AdaptiveAvgPool2d or node.target is F.adaptive_avg_pool2d:
            _replace(traced, node, source, _pooled(node, before, after, spec))
        elif type(module) is nn.Flatten or node.target in _RESHAPES:
            if len(after) == 2 < len(before) and after[1] == math.prod(before[1:]):
                _replace(traced, node, source, nn.Flatten(1))
            elif len(after) > 1 and after in (before, before[:2] + (1,) * (len(after) - 2)):
                _replace(traced, node, source, None)
            else:
                raise TemplateError(
                    f"{spec.backbone}: {str(node.target)!r}: expected to flatten all but the "
                    f"batch, got {before} to {after}"
                )
    graph.eliminate_dead_code()
    traced.recompile()


_RESHAPES = (
    "flatten", "view", "reshape", "squeeze", torch.flatten, torch.reshape, torch.squeeze,
)  # fmt: skip


def _pooled(
    node: fx.Node, before: tuple[int, ...], after: tuple[int, ...], spec: ModelSpec
) -> nn.Module | None:
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


_NOT_IN_PLACE: dict[Any, Any] = {
    "relu_": "relu", "add_": "add", torch.relu_: torch.relu, operator.iadd: operator.add,
}  # fmt: skip


def _rewrite(traced: fx.GraphModule, operations: dict[fx.Node, Operation]) -> None:
    """Dropout with masks that can be replayed, and nothing in place."""
    for node, operation in operations.items():
        if operation.op == "dropout":
            _replace(traced, node, node.all_input_nodes[0], Dropout(operation.attrs["p"]))
        elif operation.layer is not None and operation.inplace:
            operation.layer.inplace = False  # type: ignore[assignment]
        elif operation.inplace:
            node.target = _NOT_IN_PLACE.get(node.target, node.target)
            if "inplace" in node.kwargs:
                node.kwargs = {**node.kwargs, "inplace": False}
    traced.recompile()


def _replace(
    traced: fx.GraphModule, node: fx.Node, source: fx.Node, module: nn.Module | None
) -> None:
    """Put a module in the place of a node, or nothing."""
    new = source
    if module is not None:
        with traced.graph.inserting_after(node):
            new = _insert(traced, f"{node.name}_packed", module, source)
        new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    traced.graph.erase_node(node)


# -- splitting ---------------------------------------------------------------------------------


def _insert(traced: fx.GraphModule, name: str, module: nn.Module, source: fx.Node) -> fx.Node:
    """A call of `module` on `source`, under a name like `name` that nothing has yet."""
    parent, _, last = name.rpartition(".")
    while hasattr(traced.get_submodule(parent), last):
        last += "_"
    name = f"{parent}.{last}" if parent else last
    traced.add_submodule(name, module)
    return traced.graph.call_module(name, (source,))


def _stem(
    traced: fx.GraphModule, first: fx.Node, operations: dict[fx.Node, Operation]
) -> tuple[nn.Sequential, fx.Node]:
    """The first convolution with its norm and activation, and the node that ends them."""
    stem = nn.Sequential()
    stem.add_module("conv", traced.get_submodule(str(first.target)))
    end = first
    for name, kinds in (("norm", ("norm",)), ("act", ("relu", "prelu", "clip"))):
        if len(end.users) != 1:
            break
        (follower,) = end.users
        operation = operations.get(follower)
        if operation is not None and operation.op in kinds:
            layer = operation.layer
            if layer is None and operation.op == "clip":
                layer = nn.Hardtanh(operation.attrs["low"], operation.attrs["high"])
            stem.add_module(name, layer or nn.ReLU())
            end = follower
    return stem, end


def _shortcuts(traced: fx.GraphModule, operations: dict[fx.Node, Operation]) -> set[str]:
    """Names of the convolutions on the shorter branch of an addition of two."""
    above: dict[fx.Node, set[fx.Node]] = {}
    found: set[str] = set()
    for node in traced.graph.nodes:
        above[node] = {node}.union(*(above[n] for n in node.all_input_nodes))
        if node in operations and operations[node].op == "add":
            a, b = (above[value.node] for value in operations[node].inputs)
            branches = [
                {str(n.target) for n in only if _weighted(traced, n)} for only in (a - b, b - a)
            ]
            shorter, longer = sorted(branches, key=len)
            if len(shorter) < len(longer):
                found |= shorter
    return found


def _binary(layer: nn.Module, binarizer: Binarizer) -> BinaryConv2d:
    """A plain convolution as a binary one, with its weights."""
    assert isinstance(layer, nn.Conv2d)
    binary = inner_conv(
        binarizer, layer.in_channels, layer.out_channels, layer.kernel_size,
        layer.stride, layer.padding, layer.dilation, bias=layer.bias is not None,
        padding_mode=layer.padding_mode,
    )  # fmt: skip
    binary.load_state_dict(layer.state_dict(), strict=False)
    if binary.scale is not None:
        with torch.no_grad():
            binary.scale.copy_(binary.weight.abs().mean(dim=(1, 2, 3)))
    return binary


def _binarize(traced: fx.GraphModule, node: fx.Node, binarizer: Binarizer) -> None:
    """Put batch norm, sign and a binary convolution in the place of a plain one, under its name;
    behind it an activation, where the binarizer asks for one."""
    name = str(node.target)
    layer = _binary(traced.get_submodule(name), binarizer)
    traced.set_submodule(name, layer)
    front: list[nn.Module] = []
    if binarizer.activation != "float":
        front.append(nn.BatchNorm2d(layer.in_channels))
    if binarizer.activation != "float" or binarizer.shift:
        front.append(inner_sign(binarizer, layer.in_channels))
    (source,) = node.all_input_nodes
    for kind, module in zip(("norm", "sign")[2 - len(front) :], front, strict=True):
        with traced.graph.inserting_before(node):
            source = _insert(traced, f"{name}_{kind}", module, source)
    node.args, node.kwargs = (source,), {}
    if binarizer.act not in (None, "none"):
        with traced.graph.inserting_after(node):
            act = inner_act(binarizer, layer.out_channels, "none")
            behind = _insert(traced, f"{name}_act", act, node)
        node.replace_all_uses_with(behind, lambda user: user is not behind)


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
    if hasattr(head, to):
        _make_room(head, to)
    head.add_submodule(to, layer)
    node.target = to
    if dropout > 0:
        (source,) = node.all_input_nodes
        with head.graph.inserting_before(node):
            drop = _insert(head, "dropout", Dropout(dropout), source)
        node.args, node.kwargs = (drop,), {}
    head.recompile()


def _make_room(head: fx.GraphModule, name: str) -> None:
    """Give the user's module of this name, and what lies in it, another one."""
    free = name
    while hasattr(head, free):
        free += "_"
    module = head.get_submodule(name)
    head.delete_submodule(name)
    head.add_submodule(free, module)
    for node in head.graph.nodes:
        target = str(node.target)
        if node.op in ("call_module", "get_attr") and f"{target}.".startswith(f"{name}."):
            node.target = free + target[len(name) :]
