"""An ensemble is a table of who owns what: M members made from one backbone, layers shared or own.

Sharing (`sharing.SHARING`) is structure, never state: a shared layer is the same module object in
every member, so that counting, freezing and deduplication need no further bookkeeping; a state dict
or a pickled copy would forget it. States therefore use canonical names,
``shared.<layer>.<parameter>`` and ``<member>.<layer>.<parameter>``, and any process that holds any
subset of the members can load what concerns it from the whole.

Legend: `M` members, `B` images, `C` classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bnncore.networks.backbones import build
from bnncore.networks.binarize import BinaryConv2d, pseudo_hadamard_
from bnncore.networks.combine import combine, winners
from bnncore.networks.parts import Backbone, Dropout, ModelSpec, NetworkError
from bnncore.networks.sharing import Sharing, layer_groups, own_layers, weight_layers


@dataclass(frozen=True)
class EnsembleSpec:
    """What an ensemble is: plain data.

    Attributes:
        model: the network of one member.
        members: M.
        sharing: a row of `SHARING`, or the user's own.
        combine: ``mean``, ``sum``, ``soft_vote`` or ``hard_vote`` (`program` defines them).
        classifier: None, or for a shared classifier block what it concatenates: ``logits``
            (Fig. 2a) or ``features`` (Fig. 2b). The dense layer over the concatenation is stored
            as one block of rows a member and one bias, so that its output is a sum over members.
    """

    model: ModelSpec
    members: int
    sharing: Sharing
    combine: str = "mean"
    classifier: str | None = None

    def __post_init__(self) -> None:
        if self.members < 1:
            raise NetworkError(f"members: expected at least 1, got {self.members}")
        if self.classifier is not None and self.combine != "sum":
            raise NetworkError(f"combine: a shared classifier block adds up, got {self.combine!r}")


def draws(module: nn.Module) -> bool:
    """Whether a module draws random numbers in training, from a ``generator`` of its own."""
    return isinstance(module, Dropout) or (isinstance(module, BinaryConv2d) and module.stochastic)


def generator(
    *keys: int | str | tuple[int, ...], device: str | torch.device = "cpu"
) -> torch.Generator:
    """A torch generator seeded by all of `keys`: the same keys, the same numbers."""
    digest = hashlib.sha256(repr(keys).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class Ensemble(nn.Module):
    """Members `ids` of the ensemble that `spec` describes, with shared layers as shared objects.

    Args:
        spec: the whole ensemble.
        ids: which members this process holds; all by default.
        seed: for fresh weights: those of member i depend on `seed` and i only.
    """

    members: Sequence[Backbone]  # a ModuleList
    weights: Tensor

    def __init__(self, spec: EnsembleSpec, ids: Iterable[int] | None = None, seed: int = 0):
        super().__init__()
        self.spec = spec
        self.ids = tuple(range(spec.members) if ids is None else ids)
        members = [self._member(spec, seed, i) for i in self.ids]
        self.members = nn.ModuleList(members)  # type: ignore[assignment]
        self.own = own_layers(members[0], spec.sharing, spec.classifier)
        self.shared = [n for n in weight_layers(members[0]) if n not in self.own]
        if spec.sharing.block:
            self.shared = ["stem", *(n for n in self.shared if not n.startswith("stem."))]
        # Fresh shared layers are those of member 0, whoever is held here.
        first = members[0] if self.ids[0] == 0 else self._member(spec, seed, 0)
        for name in self.shared:
            layer = first.get_submodule(name)
            if spec.sharing.frozen:
                layer.requires_grad_(False)
            parent, _, attribute = name.rpartition(".")
            for member in members:
                setattr(member.get_submodule(parent), attribute, layer)
        self.bias = None
        if spec.classifier is not None:
            self.bias = nn.Parameter(torch.zeros(spec.model.classes))
        self.register_buffer("weights", torch.ones(spec.members))

    @staticmethod
    def _member(spec: EnsembleSpec, seed: int, i: int) -> Backbone:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator("member", seed, i).initial_seed())
            member = build(spec.model)
            classes = spec.model.classes
            block: nn.Linear | None = None
            if spec.classifier == "features":
                head: Any = member.head
                head.dense = block = nn.Linear(head.dense.in_features, classes, bias=False)
            elif spec.classifier == "logits":
                member.mix = block = nn.Linear(classes, classes, bias=False)
            if block is not None:  # rows of one layer with as many inputs as all members have
                block.weight.data /= spec.members**0.5
            for name, module in member.named_modules():
                if draws(module):
                    module.generator = generator("dropout", seed, i, name)
        return member

    def prefix(self) -> list[nn.Module]:
        """The leading modules of the stem that are one object in all members: run them once."""
        stems = [list(member.stem.children()) for member in self.members]
        if self.spec.sharing.block or len(self.ids) == 1:
            return [self.members[0].stem]
        shared = []
        for modules in zip(*stems, strict=True):
            if any(m is not modules[0] for m in modules):
                break
            shared.append(modules[0])
        return shared

    def rest(self, member: Backbone, h: Tensor) -> Tensor:
        """A member's logits from the output of `prefix`."""
        prefix = self.prefix()
        if not (prefix and prefix[0] is member.stem):
            for module in list(member.stem.children())[len(prefix) :]:
                h = module(h)
        return member.tentacle(h)

    def outputs(self, x: Tensor) -> list[Tensor]:
        """Each held member's output z_i (B, C), without the block's bias."""
        for module in self.prefix():
            x = module(x)
        return [self.rest(member, x) for member in self.members]

    def forward(self, x: Tensor) -> Tensor:
        """Scores (B, C) of the held members, by ``spec.combine``."""
        return combine(self.spec.combine, self.outputs(x), self.weights[list(self.ids)], self.bias)

    def predict(self, x: Tensor) -> Tensor:
        """Predicted classes (B,) of the held members together."""
        z = self.outputs(x)
        scores = combine(self.spec.combine, z, self.weights[list(self.ids)], self.bias)
        return winners(self.spec.combine, z, scores)

    def parameters_by_name(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(canonical name, parameter), each once."""
        for name, value in self.entries():
            if isinstance(value, nn.Parameter):
                yield name, value

    def entries(self) -> Iterator[tuple[str, Tensor]]:
        """(canonical name, parameter or buffer), shared ones once; not copied."""
        shared = tuple(f"{name}." for name in self.shared)
        for k, (i, member) in enumerate(zip(self.ids, self.members, strict=True)):
            for name, value in member.state_dict(keep_vars=True).items():
                if name.startswith(shared) and shared:
                    if k == 0:
                        yield f"shared.{name}", value
                else:
                    yield f"{i}.{name}", value
        if self.bias is not None:
            yield "shared.bias", self.bias
        yield "shared.weights", self.weights

    def state(self) -> dict[str, Tensor]:
        """Canonical name -> a detached CPU copy; shared tensors once."""
        return {name: value.detach().cpu().clone() for name, value in self.entries()}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Load the held members from a state that holds at least them.

        Raises:
            ValueError: an entry is missing or has another shape.
        """
        for name, value in self.entries():
            if name not in state:
                raise NetworkError(f"state: expected an entry {name!r}, got none of that name")
            if state[name].shape != value.shape:
                raise NetworkError(
                    f"state: {name!r}: expected shape {tuple(value.shape)}, "
                    f"got {tuple(state[name].shape)}"
                )
            value.copy_(state[name])

    # -- where members start ---------------------------------------------------------------

    @torch.no_grad()
    def start_from(self, source: dict[str, Tensor], parts: tuple[str, ...] = ("",)) -> list[str]:
        """Copy a single network's state into every held member, by name and shape.

        Args:
            source: layer name -> tensor (`single_state`).
            parts: prefixes of the names to copy, such as ``("stem.",)``.

        Returns:
            Names of member parameters that found no equal in `source`.
        """
        missing: list[str] = []
        for member in self.members:
            missing = []
            for name, value in member.state_dict(keep_vars=True).items():
                if not name.startswith(parts):
                    continue
                if name in source and source[name].shape == value.shape:
                    value.copy_(source[name])
                else:
                    missing.append(name)
            for name, module in member.named_modules():
                # An FP32 source has no learned scales: they follow from its weights.
                if isinstance(module, BinaryConv2d) and f"{name}.scale" in missing:
                    module.scale.copy_(module.weight.abs().mean(dim=(1, 2, 3)))  # type: ignore[union-attr]
            rows = "head.dense.weight"
            if self.spec.classifier == "features" and rows.startswith(parts):
                # Equal members' outputs, and the bias, add up to the source's logits.
                member.get_parameter(rows).copy_(source[rows] / self.spec.members)
                self.get_parameter("bias").copy_(source["head.dense.bias"])
        return missing

    @torch.no_grad()
    def hadamard(self, seed: int) -> None:
        """Give each held member's binary filters a pseudo-Hadamard start of its own."""
        for i, member in zip(self.ids, self.members, strict=True):
            for name, module in member.named_modules():
                if isinstance(module, BinaryConv2d):
                    pseudo_hadamard_(module.weight, generator("hadamard", seed, i, name))

    @torch.no_grad()
    def diversify(self, seed: int, jitter: float, fresh_classifier: bool) -> None:
        """Make members that start from one network differ.

        Copies that are trained jointly get equal gradients and stay equal for ever, so each member
        but the first gets its batch-norm parameters jittered (gamma times ``1 + jitter * n``, beta
        plus ``jitter * n``, n standard normal) and, if asked, every member a freshly initialised
        classifier, or rows of a common one, where it owns them.
        """
        if fresh_classifier and self.bias is not None:
            self.bias.zero_()
        for i, member in zip(self.ids, self.members, strict=True):
            if fresh_classifier:
                fresh = self._member(self.spec, seed, i)
                for name, groups in layer_groups(member, self.spec.classifier).items():
                    if groups & {"classifier", "mixing"} and name in self.own:
                        member.get_submodule(name).load_state_dict(
                            fresh.get_submodule(name).state_dict()
                        )
            if i == 0 or jitter == 0:
                continue
            noise = generator("jitter", seed, i)
            shared = tuple(f"{name}." for name in self.shared)
            for name, module in member.named_modules():
                own = not (shared and f"{name}.".startswith(shared))
                if isinstance(module, nn.BatchNorm2d) and module.affine and own:
                    size = module.weight.shape
                    module.weight.mul_(1 + jitter * torch.randn(size, generator=noise))
                    module.bias.add_(jitter * torch.randn(size, generator=noise))


def single_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a one-member ensemble under plain layer names."""
    return {name.partition(".")[2]: value for name, value in state.items()}
