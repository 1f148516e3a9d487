"""What a traced network may do: each module, function and method that can be packed, in one table.

A rule has torch's own signature, so that torch's arguments bind to it by place and by name, and
every argument is either understood or refused: one that is ignored is a wrong result without a
message. A rule gives the operation in the words of `packed.program`, whatever it was called as.

A value has one of three forms, and an operation takes those for which it means one thing:

====== ===================== ====================================================================
map    (B, C, H, W)
pooled (B, C, 1, 1) in torch what global pooling leaves; packed as (B, C)
vector (B, F)
====== ===================== ====================================================================
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from bnncore.networks.binarize import BinaryActivation, BinaryConv2d, Shift
from bnncore.networks.parts import Dropout, NetworkError

AXES = {"map": 4, "pooled": 4, "vector": 2}  # form -> how many torch sees
FORMS = tuple(AXES)


class OperationError(NetworkError):
    """What a traced network does and cannot be packed; names layer and argument."""


@dataclass(frozen=True)
class Value:
    """A value of a traced network, as rules see it."""

    node: fx.Node
    form: str


@dataclass(frozen=True)
class Operation:
    """One step of a traced network.

    Attributes:
        op: an operator of `packed.program`, before folding; also ``norm`` (batch norm), ``shift``,
            ``dropout`` and ``same`` (nothing at all).
        inputs: the values it takes, all of one form.
        gives: the form of its output.
        attrs: its attributes, as `program.Node` has them, or those of a module it stands for.
        inplace: whether torch writes the result over the first input.
        layer: the module that does it, if one does.
    """

    op: str
    inputs: tuple[Value, ...]
    gives: str
    attrs: dict[str, int | float]
    inplace: bool = False
    layer: nn.Module | None = None

    @property
    def form(self) -> str:
        """The form of its inputs."""
        return self.inputs[0].form


Rule = Callable[..., Operation]


def read(graph: fx.Graph, network: nn.Module) -> Iterator[tuple[fx.Node, Operation]]:
    """The operations of a traced network, in order, without its inputs and its output.

    Raises:
        OperationError: names the layer or operation, the argument, what was expected and found.
    """
    forms: dict[fx.Node, str] = {}
    # For what is done in place: the oldest node in whose memory a node lies, and the last that had
    # written there, of the memory now and of the node when it was made.
    roots: dict[fx.Node, fx.Node] = {}
    written: dict[fx.Node, fx.Node | None] = {}
    seen: dict[fx.Node, fx.Node | None] = {}
    for node in graph.nodes:
        for source in node.all_input_nodes:
            writer = written.get(roots[source])
            if writer is not None and writer is not seen[source]:
                raise OperationError(
                    f"{where(node)}: reads {source.name!r}, which {where(writer)} has written over "
                    "in place; expected inplace=False there"
                )
        forms[node], roots[node], seen[node] = "map", node, None
        if node.op in ("placeholder", "output"):
            continue
        try:
            operation = _understood(node, network, forms)
        except OperationError as error:
            raise OperationError(f"{where(node)}: {error}") from None
        forms[node] = operation.gives
        first = operation.inputs[0].node
        if operation.inplace or operation.op in ("same", "dropout", "flatten"):  # views
            roots[node], seen[node] = roots[first], seen[first]
        if operation.inplace:
            written[roots[node]] = seen[node] = node
        yield node, operation


def where(node: fx.Node) -> str:
    """How messages name a node."""
    return f"layer {node.target!r}" if node.op == "call_module" else f"operation {node.name!r}"


def _understood(node: fx.Node, network: nn.Module, forms: dict[fx.Node, str]) -> Operation:
    layer = network.get_submodule(str(node.target)) if node.op == "call_module" else None
    # By the very type: a subclass may compute something else.
    key: Any = node.target if layer is None else type(layer)
    rule = TABLE.get(key) if node.op != "get_attr" else None
    if rule is None:
        what = f"reading {key!r}" if node.op == "get_attr" else getattr(key, "__name__", key)
        raise OperationError(f"{what} cannot be packed")

    def values(given: Any) -> Any:
        return fx.map_arg(given, lambda n: Value(n, forms[n]))  # type: ignore[arg-type, return-value]

    arguments, named = values(node.args), values(node.kwargs)
    signature = _signature(rule)
    if layer is not None:
        if layer._forward_hooks or layer._forward_pre_hooks:
            raise OperationError("hooks cannot be packed; expected none")
        arguments = (*arguments, *named.values())  # one value, under whatever name
        named = {name: getattr(layer, name) for name in list(signature.parameters)[1:]}
    try:
        bound = signature.bind(*arguments, **named)
    except TypeError as error:
        raise OperationError(f"expected the arguments {signature}: {error}") from None
    return replace(rule(*bound.args, **bound.kwargs), layer=layer)


@lru_cache
def _signature(rule: Rule) -> inspect.Signature:
    found = inspect.signature(rule)
    plain = [p.replace(annotation=p.empty) for p in found.parameters.values()]
    return inspect.Signature(plain)


# -- rules ---------------------------------------------------------------------------------------


def _value(given: Any) -> Value:
    if not isinstance(given, Value):
        raise OperationError(f"expected a value of the network as input, got {given!r}")
    return given


def _step(
    op: str,
    *inputs: Any,
    takes: tuple[str, ...] = FORMS,
    gives: str | None = None,
    inplace: bool = False,
    attrs: dict[str, int | float] | None = None,
) -> Operation:
    for value in map(_value, inputs):
        if value.form not in takes or value.form != inputs[0].form:
            expected = inputs[0].form if inputs[0].form in takes else " or ".join(takes)
            raise OperationError(f"expected a {expected} as input, got a {value.form}")
    return Operation(op, inputs, gives or inputs[0].form, attrs or {}, bool(inplace))


def _only(name: str, value: Any, *allowed: Any) -> None:
    if value not in allowed:
        expected = " or ".join(map(repr, allowed))
        raise OperationError(f"{name}: expected {expected}, got {value!r}")


def _square(name: str, value: Any) -> int:
    """An integer, or one given twice, for H and W."""
    both = tuple(value) if isinstance(value, tuple | list) else (value,)
    if not 1 <= len(both) <= 2 or type(both[0]) is not int or set(both) != {both[0]}:
        raise OperationError(f"{name}: expected the same integer for H and W, got {value!r}")
    return both[0]


def _axes(name: str, value: Any, input: Any, *allowed: int) -> None:
    """Check that `value` names the axes `allowed`, from the front or from the end."""
    axes = tuple(value) if isinstance(value, tuple | list) else (value,)
    count = AXES[_value(input).form]
    good = all(type(axis) is int and -count <= axis < count for axis in axes)
    if not good or sorted(axis % count for axis in axes) != [axis % count for axis in allowed]:
        expected = allowed[0] if len(allowed) == 1 else allowed
        raise OperationError(f"{name}: expected {expected}, got {value!r}")


def _same(input: Any) -> Operation:
    return _step("same", input)


def _conv(
    input: Any,
    in_channels: Any,
    out_channels: Any,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
    bias: Any,
    padding_mode: Any,
) -> Operation:
    _only("groups", groups, 1)
    _only("dilation", _square("dilation", dilation), 1)
    _only("padding_mode", padding_mode, "zeros")
    step = _square("stride", stride)
    if padding == "valid":
        padding = 0
    elif padding == "same":  # torch allows it for a stride of 1 only
        if any(k % 2 == 0 for k in kernel_size):
            raise OperationError(f"kernel_size: expected odd sizes for 'same', got {kernel_size}")
        padding = tuple(k // 2 for k in kernel_size)
    pad = _square("padding", padding)
    takes = ("map", "pooled") if pad == 0 and set(kernel_size) == {1} else ("map",)
    return _step("conv", input, takes=takes, attrs={"stride": step, "pad": pad})


def _dense(input: Any, in_features: Any, out_features: Any, bias: Any) -> Operation:
    return _step("dense", input, takes=("vector",))


def _norm(
    input: Any,
    num_features: Any,
    eps: Any,
    momentum: Any,
    affine: Any,
    track_running_stats: Any,
    bias: Any,
) -> Operation:
    _only("track_running_stats", track_running_stats, True)
    return _step("norm", input, takes=("map", "pooled"))


def _shift(input: Any) -> Operation:
    return _step("shift", input, takes=("map", "pooled"))


def _sign(input: Any) -> Operation:
    return _step("sign", input)


def _prelu(input: Any, num_parameters: Any, init: Any) -> Operation:
    return _step("prelu", input)


def _relu(input: Any, inplace: Any = False) -> Operation:
    return _step("relu", input, inplace=inplace)


def _clip(input: Any, min_val: Any = -1.0, max_val: Any = 1.0, inplace: Any = False) -> Operation:
    bounds = {"low": float(min_val), "high": float(max_val)}
    if not all(map(math.isfinite, bounds.values())) or bounds["low"] > bounds["high"]:
        raise OperationError(f"expected finite min_val <= max_val, got {min_val}, {max_val}")
    return _step("clip", input, inplace=inplace, attrs=bounds)


def _relu6(input: Any, inplace: Any = False) -> Operation:
    return _clip(input, 0.0, 6.0, inplace)


def _dropout(input: Any, p: Any = 0.5, training: Any = True, inplace: Any = False) -> Operation:
    if p:  # True in a graph that was traced for evaluation: one that never stops
        _only("training", training, False)
    return _step("dropout", input, inplace=inplace, attrs={"p": p})


def _dropout_layer(input: Any, p: Any, inplace: Any) -> Operation:
    return _dropout(input, p, False, inplace)


def _own_dropout(input: Any, p: Any) -> Operation:
    return _dropout(input, p, False)


def _pool(
    op: str, input: Any, kernel_size: Any, stride: Any, padding: Any, ceil_mode: Any, **attrs: Any
) -> Operation:
    kernel = _square("kernel_size", kernel_size)
    step = _square("stride", stride) if stride not in (None, (), []) else kernel
    pad = _square("padding", padding)
    attrs |= {"kernel": kernel, "stride": step, "pad": pad, "ceil": int(ceil_mode)}
    return _step(op, input, takes=("map",), attrs=attrs)


def _max_pool(
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: Any = False,
    return_indices: Any = False,
) -> Operation:
    _only("dilation", _square("dilation", dilation), 1)
    _only("return_indices", return_indices, False)
    return _pool("maxpool", input, kernel_size, stride, padding, ceil_mode)


def _avg_pool(
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: Any = False,
    count_include_pad: Any = True,
    divisor_override: Any = None,
) -> Operation:
    _only("divisor_override", divisor_override, None)
    included = int(count_include_pad)
    return _pool("avgpool", input, kernel_size, stride, padding, ceil_mode, include_pad=included)


def _adaptive(input: Any, output_size: Any) -> Operation:
    _only("output_size", _square("output_size", output_size), 1)
    return _step("global_avg", input, takes=("map", "pooled"), gives="pooled")


def _mean(input: Any, dim: Any, keepdim: Any = False, *, dtype: Any = None) -> Operation:
    _only("dtype", dtype, None)
    _axes("dim", dim, input, 2, 3)
    gives = "pooled" if keepdim else "vector"
    return _step("global_avg", input, takes=("map", "pooled"), gives=gives)


def _flatten(input: Any, start_dim: Any = 0, end_dim: Any = -1) -> Operation:
    _axes("start_dim", start_dim, input, 1)
    _axes("end_dim", end_dim, input, -1)
    return _step("flatten", input, gives="vector")


def _add(input: Any, other: Any, *, alpha: Any = 1) -> Operation:
    _only("alpha", alpha, 1)
    return _step("add", input, other)


def _add_in_place(input: Any, other: Any, *, alpha: Any = 1) -> Operation:
    return replace(_add(input, other, alpha=alpha), inplace=True)


def _concat(tensors: Any, dim: Any = 0) -> Operation:
    if not isinstance(tensors, tuple | list) or not tensors:
        raise OperationError(f"tensors: expected a list of values, got {tensors!r}")
    _axes("dim", dim, tensors[0], 1)
    return _step("concat", *tensors)


_relu_in_place = partial(_relu, inplace=True)

TABLE: dict[Any, Rule] = {
    # modules
    nn.Identity: _same,
    nn.Conv2d: _conv,
    nn.Linear: _dense,
    nn.BatchNorm2d: _norm,
    nn.PReLU: _prelu,
    nn.ReLU: _relu,
    nn.ReLU6: _relu6,
    nn.Hardtanh: _clip,
    nn.Dropout: _dropout_layer,
    nn.MaxPool2d: _max_pool,
    nn.AvgPool2d: _avg_pool,
    nn.AdaptiveAvgPool2d: _adaptive,
    nn.Flatten: _flatten,
    # our own
    BinaryConv2d: _conv,
    BinaryActivation: _sign,
    Shift: _shift,
    Dropout: _own_dropout,
    # functions
    operator.add: _add,
    operator.iadd: _add_in_place,
    torch.add: _add,
    torch.cat: _concat,
    torch.concat: _concat,
    torch.relu: _relu,
    torch.relu_: _relu_in_place,
    torch.flatten: _flatten,
    torch.mean: _mean,
    F.relu: _relu,
    F.relu6: _relu6,
    F.hardtanh: _clip,
    F.dropout: _dropout,
    F.max_pool2d: _max_pool,
    F.avg_pool2d: _avg_pool,
    F.adaptive_avg_pool2d: _adaptive,
    # methods
    "add": _add,
    "add_": _add_in_place,
    "relu": _relu,
    "relu_": _relu_in_place,
    "flatten": _flatten,
    "mean": _mean,
}
