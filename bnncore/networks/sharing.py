"""Who owns what: the rows of both papers, and which layers of a network a row names.

An ensemble is M members made from one backbone; each layer is shared by all of them or a member's
own. `SHARING` holds the rows; a new sharing pattern is one row.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from bnncore.networks.backbones import LeanLayer, ResidualBlock, ShortcutLayer
from bnncore.networks.binarize import BinaryConv2d
from bnncore.networks.parts import Backbone, NetworkError

# Layers are named by pattern over their dotted names, or by one of these groups.
GROUPS = {
    "first_conv": "the first convolution",
    "binary_conv": "the binary convolutions of the body, shortcuts left out",
    "shortcut": "the convolutions on shortcuts",
    "last_conv": "the last convolution of the body",
    "block_last_conv": "the last convolution of every basic block",
    "classifier": "the last layer: the dense layer, or the last convolution where there is none",
    "mixing": "a tentacle's rows of the shared classifier block's dense layer",
}


@dataclass(frozen=True)
class Sharing:
    """Which layers are a member's own; all others are shared.

    Normalisation and activation parameters are always the member's own, but for those inside a
    block that is shared as a whole.

    Attributes:
        name: for people.
        own: groups of `GROUPS` or patterns over layer names (``body.layer*.conv2``).
        frozen: whether what is shared keeps its values while the rest is trained.
        block: whether the stem is shared as a whole block: convolution, norm, activation.
    """

    name: str
    own: tuple[str, ...]
    frozen: bool
    block: bool = False


SHARING = {
    row.name: row
    for row in (
        Sharing("tentaclenet", ("binary_conv", "shortcut", "mixing"), frozen=False, block=True),
        Sharing("no_shared", ("*",), frozen=False),
        Sharing("shared_conv", ("classifier",), frozen=True),
        Sharing("all_frozen", (), frozen=True),
        Sharing("c1", ("first_conv",), frozen=True),
        Sharing("c2", ("shortcut", "classifier"), frozen=True),
        Sharing("c3", ("last_conv", "classifier"), frozen=True),
        Sharing("c3_blocks", ("block_last_conv", "classifier"), frozen=True),
    )
}


def weight_layers(member: nn.Module) -> dict[str, nn.Module]:
    """The layers that can be shared, by dotted name, in forward order: convolutions and dense."""
    return {n: m for n, m in member.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}


def layer_groups(member: Backbone, classifier: str | None = None) -> dict[str, set[str]]:
    """Layer name -> the groups of `GROUPS` it belongs to."""
    layers = weight_layers(member)
    groups: dict[str, set[str]] = {name: set() for name in layers}
    body = []
    for name, module in layers.items():
        if name.startswith("mix"):
            groups[name].add("mixing")
        elif name.startswith("head."):
            groups[name].add("mixing" if classifier == "features" else "classifier")
        elif name.startswith("stem."):
            groups[name].add("first_conv")
        elif ".shortcut." in name or name in member.shortcuts:
            groups[name].add("shortcut")
        elif isinstance(module, nn.Conv2d):
            body.append(name)
            if isinstance(module, BinaryConv2d):
                groups[name].add("binary_conv")
    if body:
        groups[body[-1]].add("last_conv")
    for name, module in member.named_modules():
        if isinstance(module, ResidualBlock):
            groups[f"{name}.conv2"].add("block_last_conv")
        elif isinstance(module, ShortcutLayer | LeanLayer) and name.endswith(("2", "4", "6", "8")):
            groups[f"{name}.conv"].add("block_last_conv")  # a basic block is two such layers
    return groups


def own_layers(member: Backbone, sharing: Sharing, classifier: str | None = None) -> set[str]:
    """Names of the layers that `sharing` makes each member's own.

    Raises:
        NetworkError: a group or pattern that matches no layer of this backbone.
    """
    groups = layer_groups(member, classifier)
    own = {name for name, module in weight_layers(member).items() if _always_own(member, name)}
    for pattern in sharing.own:
        matched = {name for name in groups if pattern in groups[name] or fnmatchcase(name, pattern)}
        optional = sharing.name == "tentaclenet" and pattern == "shortcut"
        if not matched and not optional:
            raise NetworkError(
                f"sharing {sharing.name!r}: {pattern!r} matches no layer of this backbone; "
                f"expected a group ({', '.join(GROUPS)}) or a pattern over {', '.join(groups)}"
            )
        own |= matched
    return own


def _always_own(member: nn.Module, layer: str) -> bool:
    # Kim et al. 2022: "Weights of downsampling layers were not shared" in ReActNet-10.
    parent, _, _ = layer.rpartition(".shortcut.")
    if not parent:
        return False
    binary = isinstance(member.get_submodule(layer), BinaryConv2d)
    return binary and isinstance(member.get_submodule(parent), ShortcutLayer)
