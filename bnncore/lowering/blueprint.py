"""Programs of ensembles that are not trained yet: every tensor's kind, shape and owner, no values.

`draw` lowers a member without weights (`lower`'s own walk, over tensors that take no memory) and
folds by what training may give: which chains become thresholds and which intervals depends on the
signs of trained scales and slopes, so there are two Programs, the smallest and the largest that can
come out. Nothing is trained, nothing large is allocated, and drawings are kept, so that a search
can ask for thousands of configurations.

Legend: `M` members, `O` filters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.utils._device import DeviceContext

from bnncore.lowering import lower
from bnncore.lowering.lower import _Value as Value
from bnncore.networks.binarize import BinaryConv2d
from bnncore.networks.ensemble import (
    SHARING,
    Ensemble,
    EnsembleSpec,
    Sharing,
    own_layers,
    weight_layers,
)
from bnncore.networks.parts import Backbone, ModelSpec
from bnncore.packed import costs, packfile
from bnncore.packed import program as P
from bnncore.packed.narrow import narrowed
from bnncore.packed.rules import validate
from bnncore.params import PackParams

# What a file says of itself, where the caller does not know yet: about as long as real ones.
INFO = {
    "name": "an-ensemble-of-ten", "backbone": "birealnet18", "kind": "ensemble", "seed": 1234,
    "width": 64, "scheme": "stochastic_rounding", "sharing": "shared_conv",
}  # fmt: skip
CLASS_NAME = 12  # characters of a class name that is not known yet
# zlib packs nearly equal graphs to slightly different sizes, in no fixed order.
GRAPH_SLACK = 1.02, 16


_End = Literal["least", "most"]
_ENDS: tuple[_End, _End] = ("least", "most")


class Drawing:
    """An ensemble without values.

    Attributes:
        least, most: Programs of one member whose `own` flags are those of the whole ensemble: the
            smallest and the largest that training can give. Their tensors are zeros without memory.
            Each is made when first asked for: a search never asks for the smallest.
    """

    def __init__(self, make: Callable[[_End], P.Program]):
        self._make = make

    @cached_property
    def least(self) -> P.Program:
        return self._make("least")

    @cached_property
    def most(self) -> P.Program:
        return self._make("most")

    def macs(self, members: int) -> tuple[int, int]:
        """(binary, float) multiply-accumulates for one image and `members` members."""
        once, each = self._macs()
        return once[0] + members * each[0], once[1] + members * each[1]

    def _macs(self) -> tuple[tuple[int, int], tuple[int, int]]:
        return _operations(self.most)


@lru_cache(maxsize=4096)
def _operations(program: P.Program) -> tuple[tuple[int, int], tuple[int, int]]:
    shapes = validate(program)[1:]
    counts = costs.operations(program)
    sums = [[0, 0], [0, 0]]
    for shape, (binary, real) in zip(shapes, counts, strict=True):
        sums[shape.own][0] += binary
        sums[shape.own][1] += real
    return (sums[0][0], sums[0][1]), (sums[1][0], sums[1][1])


def draw(spec: EnsembleSpec) -> Drawing:
    """The drawing of `spec`; the same object for specs that differ in `members` only."""
    return _draw(spec.model, spec.sharing, spec.combine, spec.classifier)


@lru_cache(maxsize=4096)
def _draw(model: ModelSpec, sharing: Sharing, combine: str, classifier: str | None) -> Drawing:
    member, values, output = _walk(model, classifier)
    own = own_layers(member, sharing, classifier)
    shared = tuple(f"{name}." for name in weight_layers(member) if name not in own)
    if sharing.block:
        shared = ("stem.", *shared)

    def make(end: _End) -> P.Program:
        copies = _copies(values, shared)
        last = copies[values.index(output)]
        lower.fold(copies, partial(_folded, most=end == "most"))
        return _program(model, copies, last, combine, classifier is not None)

    return Drawing(make)


@lru_cache(maxsize=256)
def _walk(model: ModelSpec, classifier: str | None) -> tuple[Backbone, list[Value], Value]:
    """A member without memory, and what `lower` makes of it before anything is folded."""
    combine = "mean" if classifier is None else "sum"
    spec = EnsembleSpec(model, 1, SHARING["no_shared"], combine, classifier)
    with _Meta("meta"):
        ensemble = Ensemble(spec).eval()
    for module in ensemble.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            blank = nn.Parameter(torch.zeros(()).expand(parameter.shape), requires_grad=False)
            module.register_parameter(name, blank)
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, torch.zeros((), dtype=buffer.dtype).expand(buffer.shape))
        if isinstance(module, BinaryConv2d):
            _blank_binary(module)
    channels = model.image[2]
    with torch.no_grad():
        values, output = _Blank(ensemble, (0.0,) * channels, (1.0,) * channels).run()
    return ensemble.members[0], values, output


class _Meta(DeviceContext):
    """``torch.device("meta")`` without `torch.nn.init`, which has nothing to fill there and takes a
    third of the time.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return (kwargs or {}).get("tensor", args[0] if args else None)
        return super().__torch_function__(func, types, args, kwargs)


class _Blank(lower._Lowering):
    """`lower`'s walk over a member whose parameters are zeros without memory."""

    def arrays(self, name, get) -> list[np.ndarray]:
        return [_zeros(get(self.members[0].get_submodule(name)).shape)]


def _zeros(shape: Sequence[int], dtype: Any = np.float32) -> np.ndarray:
    return np.broadcast_to(np.zeros((), dtype), tuple(shape))


def _copies(values: list[Value], shared: tuple[str, ...]) -> list[Value]:
    copies: dict[int, Value] = {id(lower._IMAGE): lower._IMAGE}
    for value in values:
        copy = replace(value, inputs=[copies[id(v)] for v in value.inputs])
        copy.shared = value.op == "normalize" or f"{value.name}.".startswith(shared or ("\0",))
        copies[id(value)] = copy
    return list(copies.values())[1:]


def _folded(source: Value, chain: list[Value], most: bool):
    """(op, tensors) of a chain in front of a sign, or None where it stays as it is."""
    slopes = sum(link.op == "prelu" for link in chain)
    falls = slopes > 0 or any("scale" in link.tensors for link in chain)
    names: tuple[str, ...] = ("threshold",)
    if source.op == "bconv":
        weight = source.tensors["weight"][2][0]
        channels, k = weight.shape[0], int(weight[0].size)
        kind = "int16" if k + 1 < 2**15 else "int32"
        if most and slopes > 1:
            return None  # may change sign more than twice
        if most and slopes:
            names = ("low", "high")
    else:
        channels, kind = lower._channels(chain), "float32"
        if most and slopes:
            return None  # a negative slope
    tensors = {n: ("threshold", kind, [_zeros((channels,))]) for n in names}
    op = "interval" if len(names) == 2 else "threshold"
    if most and falls:
        slot = "inside" if op == "interval" else "direction"
        tensors[slot] = ("direction", "binary", [_zeros((channels,))])
    return op, tensors


def _program(model, values: list[Value], output: Value, combine: str, bias: bool) -> P.Program:
    """As `lower._assemble`, without values."""
    tensors: dict[str, P.Tensor] = {}
    nodes: list[P.Node] = []
    numbers = {id(lower._IMAGE): 0}
    for value in values:
        if value is not output and value.uses == 0:
            continue
        slots = {}
        for slot, (role, kind, arrays) in value.tensors.items():
            slots[slot] = f"{len(nodes)}.{slot}"
            tensors[slots[slot]] = _blank(kind, role, arrays[0].shape, not value.shared)
        inputs = tuple(numbers[id(v)] for v in value.inputs)
        nodes.append(P.Node(value.op, value.name, inputs, slots, value.attrs))
        numbers[id(value)] = len(nodes)
    extra = {}
    if bias:
        tensors["c.bias"] = _blank("float32", "combine", (model.classes,), False)
        extra["bias"] = "c.bias"
    classes = tuple(str(i) for i in range(model.classes))
    return P.Program(tuple(nodes), tensors, 1, combine, model.image, classes, extra)


def _blank(kind: str, role: str, shape: tuple[int, ...], own: bool) -> P.Tensor:
    tensor = P.Tensor(kind, role, tuple(shape), own, _zeros(()))
    return replace(tensor, data=_zeros(P.stored_shape(tensor, 1), P.KINDS[kind]))


def forget() -> None:
    """Drop all drawings, for when what a backbone's name means has changed."""
    for kept in (_operations, _draw, _walk, _sizes):
        kept.cache_clear()


def _blank_binary(module: BinaryConv2d) -> None:
    """Let `binary` give blank signs, and a scale where the binarizer has one."""
    outputs = module.out_channels
    tiny = torch.zeros(outputs, 1, 1, 1)
    _, alpha = module._binarize(tiny, None if module.scale is None else torch.zeros(outputs))
    result = (module.weight.to("meta"), alpha)  # compared there, signs take no memory either
    module.binary = lambda: result  # type: ignore[method-assign]


# -- bytes -------------------------------------------------------------------------------------


def file_range(
    spec: EnsembleSpec,
    pack: PackParams | None = None,
    classes: Sequence[str] | None = None,
    info: dict[str, Any] | None = None,
) -> tuple[int, int]:
    """The least and the most bytes that the packed file of `spec` can take once it is trained.

    Args:
        pack: what the file keeps.
        classes, info: what the file will say of itself; where None, room for usual ones is in the
            most and nothing is in the least.
    """
    least, most = (_file_size(spec, pack, classes, info, end) for end in _ENDS)
    return least, most


def file_bound(
    spec: EnsembleSpec,
    pack: PackParams | None = None,
    classes: Sequence[str] | None = None,
    info: dict[str, Any] | None = None,
) -> int:
    """The greater of `file_range`, alone."""
    return _file_size(spec, pack, classes, info, "most")


def _file_size(spec: EnsembleSpec, pack, classes, info, end: _End) -> int:
    program = getattr(draw(spec), end)
    known = tuple(classes) if classes is not None else None
    facts = tuple(info.items()) if info is not None else None
    shared, own, overhead = _sizes(program, pack or PackParams(), known, facts, end)
    votes = end == "most" and _votes(spec.combine, spec.classifier is not None)
    return shared + spec.members * own + overhead + (4 * spec.members if votes else 0)


@lru_cache(maxsize=8192)
def _sizes(program, pack, classes, facts, end: _End) -> tuple[int, int, int]:
    """(bytes of shared tensors, of one member's own, of everything else)."""
    if classes is None:
        length = CLASS_NAME if end == "most" else 1
        classes = tuple(_unlike(i, length) for i in range(len(program.classes)))
    if facts is None:
        facts = tuple(INFO.items()) if end == "most" else ()
    labelled = replace(program, classes=classes, info=dict(facts))
    if end == "most" and _votes(program.combine, bool(program.combine_tensors)):
        tensors = dict(program.tensors)
        tensors["c.weight"] = P.Tensor("float32", "combine", (1,), False, np.ones(1, np.float32))
        extra = {"weight": "c.weight", **program.combine_tensors}
        labelled = replace(labelled, tensors=tensors, combine_tensors=extra)
    labelled = narrowed(labelled, pack)
    everything = sum(t.data.nbytes for t in labelled.tensors.values())
    overhead = len(packfile.encode(labelled)) - everything
    if end == "most":
        factor, more = GRAPH_SLACK
        overhead = round(overhead * factor) + more
    else:
        overhead = round(overhead / GRAPH_SLACK[0]) - GRAPH_SLACK[1]
    counted = [t for n, t in labelled.tensors.items() if n != "c.weight"]
    shared = sum(t.data.nbytes for t in counted if not t.own)
    own = sum(t.data.nbytes for t in counted if t.own)
    return shared, own, overhead


def _votes(combine: str, classifier: bool) -> bool:
    """Whether the file may hold a weight for each member; weights of 1 are not stored."""
    return combine != "mean" and not classifier


def _unlike(index: int, length: int) -> str:
    """A made-up class name that compresses about as badly as real ones."""
    letters = "etaoinshrdlcumwfgypbvk"
    text, state = "", index + 1
    for _ in range(length):
        state = state * 1103515245 + 12345 & 0x7FFFFFFF
        text += letters[(state >> 16) % len(letters)]
    return text
