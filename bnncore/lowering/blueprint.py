"""Programs of ensembles that are not trained yet: every tensor's kind, shape and owner, no values.

`draw` lowers a member without weights (`lower`'s own walk, over tensors that take no memory) and
folds by what training may give: which chains become thresholds and which intervals depends on the
signs of trained scales and slopes, so there are two Programs, the smallest and the largest that can
come out. Nothing is trained, nothing large is allocated, and drawings are kept, so that a search
can ask for thousands of configurations.

Legend: `M` members, `O` filters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils._device import DeviceContext

from bnncore.lowering import fold
from bnncore.lowering.draft import IMAGE, Arrays, Draft, assemble
from bnncore.lowering.lower import Walk
from bnncore.networks.binarize import BinaryConv2d
from bnncore.networks.ensemble import Ensemble, EnsembleSpec
from bnncore.networks.parts import Backbone, ModelSpec
from bnncore.networks.sharing import SHARING, Sharing, own_layers, weight_layers
from bnncore.packed import costs, packfile, rules
from bnncore.packed import program as P
from bnncore.packed.narrow import narrowed
from bnncore.params import PackParams

# What a file says of itself, where the caller does not know yet: about as long as real ones.
INFO = {
    "name": "an-ensemble-of-ten", "backbone": "birealnet18", "kind": "ensemble", "seed": 1234,
    "width": 64, "scheme": "stochastic_rounding", "sharing": "shared_conv",
}  # fmt: skip
CLASS_NAME = 12  # characters of a class name that is not known yet
# zlib packs nearly equal graphs to slightly different sizes, in no fixed order.
GRAPH_SLACK = 1.02, 16
RESCALED = 8  # bytes that a rescaling's own numbers may take


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
        once, each = self._macs
        return once[0] + members * each[0], once[1] + members * each[1]

    @cached_property
    def _macs(self) -> tuple[tuple[int, int], tuple[int, int]]:
        return costs.once_and_each(self.most)


def draw(spec: EnsembleSpec) -> Drawing:
    """The drawing of `spec`; the same object for specs that differ in `members` only."""
    return _draw(spec.model, spec.sharing, spec.combine, spec.classifier)


@lru_cache(maxsize=4096)
def _draw(model: ModelSpec, sharing: Sharing, combine: str, classifier: str | None) -> Drawing:
    member, drafts, output = _walk(model, classifier)
    own = own_layers(member, sharing, classifier)
    shared = tuple(f"{name}." for name in weight_layers(member) if name not in own)
    if sharing.block:
        shared = ("stem.", *shared)
    spec = EnsembleSpec(model, 1, sharing, combine, classifier)
    combined = {} if classifier is None else {"bias": _zeros((model.classes,))}
    classes = tuple(map(str, range(model.classes)))

    def make(end: _End) -> P.Program:
        copies = _copies(drafts, shared)
        last = copies[drafts.index(output)]
        most = end == "most"
        fold.fold(copies, partial(_folded, most=most), partial(_turned, most=most))
        return assemble(copies, last, _tensor, spec, 1, combined, classes, {})

    return Drawing(make)


@lru_cache(maxsize=256)
def _walk(model: ModelSpec, classifier: str | None) -> tuple[Backbone, list[Draft], Draft]:
    """A member without memory, and what `lower` makes of it before anything is folded."""
    combine = "mean" if classifier is None else "sum"
    with _Meta("meta"):
        spec = EnsembleSpec(model, 1, SHARING["no_shared"], combine, classifier)
        ensemble = Ensemble(spec).eval()
        for module in ensemble.modules():
            if isinstance(module, BinaryConv2d):
                _blank_binary(module)
    channels = model.image[2]
    with torch.no_grad():
        drafts, output = _Blank(ensemble, (0.0,) * channels, (1.0,) * channels).run()
    return ensemble.members[0], drafts, output


class _Meta(DeviceContext):
    """``torch.device("meta")`` without `torch.nn.init`, which has nothing to fill there and takes a
    third of the time.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return (kwargs or {}).get("tensor", args[0] if args else None)
        return super().__torch_function__(func, types, args, kwargs)


class _Blank(Walk):
    """`lower`'s walk over a member whose parameters have shapes and no values."""

    def arrays(
        self, role: str, name: str, get: Callable[..., Tensor], kind: str = "float32"
    ) -> Arrays:
        return role, kind, [_zeros(get(self.members[0].get_submodule(name)).shape)]


def _blank_binary(module: BinaryConv2d) -> None:
    """Let `binary` give signs without values, and a scale where the binarizer has one; a user's
    function need not work without values."""
    tiny = torch.zeros(module.out_channels, 1, 1, 1, device="cpu")
    scale = None if module.scale is None else tiny.flatten()
    alpha = module._binarize(tiny, scale)[1]
    result = (module.weight.detach(), None if alpha is None else alpha.to("meta"))
    module.binary = lambda: result  # type: ignore[method-assign]


def _zeros(shape: Sequence[int], dtype: Any = np.float32) -> np.ndarray:
    return np.broadcast_to(np.zeros((), dtype), tuple(shape))


def _copies(drafts: list[Draft], shared: tuple[str, ...]) -> list[Draft]:
    copies: dict[int, Draft] = {id(IMAGE): IMAGE}
    for draft in drafts:
        copy = replace(draft, inputs=[copies[id(source)] for source in draft.inputs])
        copy.shared = draft.op == "normalize" or f"{draft.name}.".startswith(shared or ("\0",))
        copies[id(draft)] = copy
    return list(copies.values())[1:]


def _folded(source: Draft, chain: list[Draft], most: bool) -> fold.Folded | None:
    """What `fold.thresholds` may give for a chain whose values are not known yet."""
    slopes = sum(link.op == "prelu" for link in chain)
    falls = slopes > 0 or any("scale" in link.tensors for link in chain)
    names: tuple[str, ...] = ("threshold",)
    count = fold.channels(chain)
    if source.op == "bconv":
        count = source.tensors["weight"][2][0].shape[0]
        kind = fold.level_kind(source)
        if most and slopes > 1:
            return None  # may change sign more than twice
        if most and slopes:
            names = ("low", "high")
    else:
        kind = "float32"
        if most and slopes:
            return None  # a negative slope
    if count is None:
        return None
    tensors: dict[str, Arrays] = {n: ("threshold", kind, [_zeros((count,))]) for n in names}
    op = "interval" if len(names) == 2 else "threshold"
    if most and falls:
        slot = "inside" if op == "interval" else "direction"
        tensors[slot] = ("direction", "binary", [_zeros((count,))])
    return op, tensors


def _turned(chain: list[Draft], most: bool) -> dict[str, Arrays] | None:
    """What `fold.directions` may give."""
    slopes = any(link.op == "prelu" for link in chain)
    count = fold.channels(chain)
    if not most or not (slopes or any("scale" in link.tensors for link in chain)):
        return {}
    if slopes or count is None:
        return None
    return {"direction": ("direction", "binary", [_zeros((count,))])}


def _tensor(role: str, kind: str, arrays: list[np.ndarray], shared: bool) -> P.Tensor:
    tensor = P.Tensor(kind, role, tuple(arrays[0].shape), not shared, _zeros(()))
    return replace(tensor, data=_zeros(P.stored_shape(tensor, 1), P.KINDS[kind]))


def forget() -> None:
    """Drop all drawings, for when what a backbone's name means has changed."""
    for kept in (_draw, _walk, _sizes):
        kept.cache_clear()


# -- bytes -------------------------------------------------------------------------------------


def file_range(
    spec: EnsembleSpec,
    pack: PackParams | None = None,
    classes: Sequence[str] | None = None,
    info: dict[str, Any] | None = None,
    alike: bool | None = None,
) -> tuple[int, int]:
    """The least and the most bytes that the packed file of `spec` can take once it is trained.

    Args:
        pack: what the file keeps.
        classes, info: what the file will say of itself; where None, room for usual ones is in the
            most and nothing is in the least.
        alike: whether channels of the image are `packed.integers.even`; None: not known.
    """
    least, most = (_file_size(spec, pack, classes, info, alike, end) for end in _ENDS)
    return least, most


def file_bound(
    spec: EnsembleSpec,
    pack: PackParams | None = None,
    classes: Sequence[str] | None = None,
    info: dict[str, Any] | None = None,
    alike: bool | None = None,
) -> int:
    """The greater of `file_range`, alone."""
    return _file_size(spec, pack, classes, info, alike, "most")


def _file_size(
    spec: EnsembleSpec,
    pack: PackParams | None,
    classes: Sequence[str] | None,
    info: dict[str, Any] | None,
    alike: bool | None,
    end: _End,
) -> int:
    program = getattr(draw(spec), end)
    known = tuple(classes) if classes is not None else None
    facts = tuple(info.items()) if info is not None else None
    alike = end == "least" if alike is None else alike
    shared, own, graph = _sizes(program, pack or PackParams(), known, facts, alike, end)
    sizes = {kind: shared[kind] + spec.members * own[kind] for kind in P.KINDS}
    digits = len(str(spec.members)) - 1
    if end == "most":
        if _votes(spec.combine, spec.classifier is not None):
            sizes["float32"] += 4 * spec.members
        graph += 2 * digits  # the number of members, and of their weights
    return packfile.file_size({**sizes, "graph": graph})


_Sizes = dict[str, int]  # kind -> bytes


@lru_cache(maxsize=8192)
def _sizes(
    program: P.Program,
    pack: PackParams,
    classes: tuple[str, ...] | None,
    facts: tuple[tuple[str, Any], ...] | None,
    alike: bool,
    end: _End,
) -> tuple[_Sizes, _Sizes, int]:
    """(bytes of shared tensors, of one member's own, of the graph)."""
    if classes is None:
        name = _unlike if end == "most" else partial(np.base_repr, base=36)
        classes = tuple(map(name, range(len(program.classes))))
    if facts is None:
        facts = tuple(INFO.items()) if end == "most" else ()
    labelled = replace(program, classes=classes, info=dict(facts))
    rules.validate(labelled)
    if not pack.integer:
        # One value stands for all of a tensor, so that nothing large is narrowed.
        tensors = {
            name: replace(t, data=t.data[(slice(1),) * t.data.ndim])
            for name, t in program.tensors.items()
        }
        labelled = replace(labelled, tensors=tensors)
    narrow = narrowed(labelled, pack, alike=alike)
    sizes: tuple[_Sizes, _Sizes] = (dict.fromkeys(P.KINDS, 0), dict.fromkeys(P.KINDS, 0))
    for tensor in narrow.tensors.values():
        count = math.prod(P.stored_shape(tensor, 1))
        sizes[tensor.own][tensor.kind] += count * P.KINDS[tensor.kind].itemsize
    if end == "most" and _votes(program.combine, bool(program.combine_tensors)):
        weight = P.Tensor("float32", "combine", (1,), False, np.ones(1, np.float32))
        narrow = replace(
            narrow,
            tensors={**narrow.tensors, "c.weight": weight},
            combine_tensors={"weight": "c.weight", **narrow.combine_tensors},
        )
    graph = len(packfile.graph(narrow))
    factor, more = GRAPH_SLACK
    graph = round(graph * factor) + more if end == "most" else round(graph / factor) - more
    if end == "most":  # numbers that are not known yet differ from node to node
        graph += RESCALED * sum(node.op == "rescale" for node in narrow.nodes)
    return *sizes, graph


def _votes(combine: str, classifier: bool) -> bool:
    """Whether the file may hold a weight for each member; weights of 1 are not stored."""
    return combine != "mean" and not classifier


def _unlike(index: int) -> str:
    """A made-up class name that compresses about as badly as real ones."""
    letters = "etaoinshrdlcumwfgypbvk"
    text, state = "", index + 1
    for _ in range(CLASS_NAME):
        state = state * 1103515245 + 12345 & 0x7FFFFFFF
        text += letters[(state >> 16) % len(letters)]
    return text
