"""Lowering: the packed program computes what torch computes, signs and thresholds exactly."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from bnncore.lowering.draft import IMAGE, Draft
from bnncore.lowering.fold import directions, fold
from bnncore.lowering.lower import LowerError, lower
from bnncore.networks.binarize import BinaryConv2d
from bnncore.networks.ensemble import Ensemble, EnsembleSpec
from bnncore.networks.sharing import SHARING
from bnncore.packed import execute
from bnncore.packed.program import unpack_bits
from bnncore.packed.rules import validate
from bnncore.params import Binarizer
from tests import tiny

CONV_HEADS = ("nin", "leanresnet8", "leanplain")
DATA = tiny.dataset((12, 12, 3), 5, train=20)


def scrambled(backbone, sharing="shared_conv", members=2, combine="mean", **changes) -> Ensemble:
    model = tiny.model(backbone, 8, DATA, **changes)
    classifier = None
    if sharing == "tentaclenet":
        combine, classifier = "sum", "logits" if backbone in CONV_HEADS else "features"
    ensemble = Ensemble(EnsembleSpec(model, members, SHARING[sharing], combine, classifier), seed=2)
    tiny.scramble(ensemble, seed=7)
    if ensemble.bias is not None:
        nn.init.normal_(ensemble.bias)
    return ensemble.eval()


def compare(ensemble: Ensemble):
    """Outputs of torch and of the packed program on the same images."""
    program = lower(ensemble, DATA.mean, DATA.std, DATA.classes)
    validate(program)
    images = np.concatenate([DATA.train.images, DATA.val.images])
    packed = execute.Model(program, ops="numpy")
    with torch.no_grad():
        expected = torch.stack(ensemble.outputs(tiny.normalized(DATA, images))).numpy()
    outputs = packed.outputs(images)
    # A float that differs in its last bit may cross a threshold: that changes an image's outputs
    # visibly. Anything systematic changes all images.
    scale = np.abs(expected).max()
    apart = np.abs(outputs - expected).max(axis=(0, 2)) > 1e-4 * scale
    assert apart.sum() <= 1, f"{apart.sum()} of {len(images)} images differ"
    return program, packed


def by_op(program):
    return {op: [n for n in program.nodes if n.op == op] for op in {n.op for n in program.nodes}}


@pytest.mark.slow
@pytest.mark.parametrize("sharing", ["shared_conv", "tentaclenet", "no_shared", "c2"])
@pytest.mark.parametrize(
    "backbone",
    ["nin", "resnet9", "fernet", "resnet8", "resnet18", "birealnet18", "reactnet10",
     "leanresnet8", "leanplain"],
)  # fmt: skip
def test_packed_equals_torch(backbone, sharing):
    if sharing == "c2" and backbone in ("fernet", *CONV_HEADS):
        pytest.skip("no shortcuts")
    ensemble = scrambled(backbone, sharing)
    program, packed = compare(ensemble)
    # combined scores, not only members' outputs
    x = tiny.normalized(DATA, DATA.val.images)
    with torch.no_grad():
        expected = ensemble(x).numpy()
    scores = packed(DATA.val.images)
    close = np.isclose(scores, expected, atol=1e-4 * np.abs(expected).max()).all(1)
    assert (~close).sum() <= 1
    own = {name.rpartition(".")[2] for name, t in program.tensors.items() if t.own}
    assert own  # norms are always a member's own


@pytest.mark.slow
@pytest.mark.parametrize(
    "binarizer",
    [
        Binarizer("xnor", "bireal"),
        Binarizer("sign", "clipped"),
        Binarizer("learned", "clipped"),
        Binarizer("tests.lowering.test_lower:thirds", "clipped"),
        Binarizer("xnor", "float"),
        Binarizer("sign", "float"),
        Binarizer("xnor", "clipped", stochastic=True),
        Binarizer("sign", act="none", stem="binary", head="binary"),
        Binarizer("xnor", shift=True, act="rprelu", stem="binary"),
        Binarizer("sign", "float", shift=True, act="prelu"),
        Binarizer("learned", shift=False, act="prelu"),
    ],
    ids=str,
)
@pytest.mark.parametrize("backbone", ["nin", "resnet8", "reactnet10", "leanresnet8", "leanplain"])
def test_packed_equals_torch_for_every_binarizer(backbone, binarizer):
    if binarizer.head == "binary" and backbone not in CONV_HEADS:
        binarizer = replace(binarizer, head="float")
    ensemble = scrambled(backbone, "no_shared", binarizer=binarizer)
    for layer in ensemble.modules():
        if isinstance(layer, BinaryConv2d) and layer.scale is not None:
            nn.init.normal_(layer.scale)  # learned scales may be negative
    program, _ = compare(ensemble)
    found = by_op(program)
    binary = [t for t in program.tensors.values() if t.role == "weight" and t.kind == "binary"]
    assert binary
    if binarizer.activation == "float":  # BinaryConnect: binary weights over float activations
        assert "bconv" not in found
        assert not {"sign", "threshold", "interval"} & set(found)
    else:
        assert "bconv" in found
    if binarizer.stem == "binary":
        (stem,) = (n for n in program.nodes if n.name == "stem.conv" and n.op == "conv")
        assert program.tensors[stem.tensors["weight"]].kind == "binary"
    if binarizer.weight == "sign" and backbone == "resnet8":
        assert not any(t.role == "scale" and "conv1" in n for n, t in program.tensors.items())


@pytest.mark.parametrize("binarizer", [Binarizer(), Binarizer(shift=True, act="rprelu")], ids=str)
@pytest.mark.parametrize("sharing", ["shared_conv", "no_shared"])
@pytest.mark.parametrize("backbone", ["nin", "fernet"])
def test_bits_are_pooled_not_numbers(backbone, sharing, binarizer):
    program, _ = compare(scrambled(backbone, sharing, binarizer=binarizer))
    shapes = validate(program)
    pools = [node for node in program.nodes if node.op == "maxpool"]
    assert len(pools) == {"nin": 1, "fernet": 2}[backbone]
    for node in pools:
        assert shapes[node.inputs[0]].kind == "bits"
        assert program.tensors[node.tensors["direction"]].own  # a fifth of all scales is below 0


PLAIN = [nn.Identity()]


@pytest.mark.parametrize(
    ("between", "users", "expected"),
    [
        ("", 1, "conv sign maxpool"),
        ("shift", 1, "conv shift sign maxpool"),
        ("shift scale", 1, "conv shift scale sign maxpool"),
        ("maxpool", 1, "conv sign maxpool maxpool"),
        ("scale maxpool shift", 1, "conv scale shift sign maxpool maxpool"),
        ("slope", 1, "conv slope sign maxpool"),
        ("bent", 1, "conv maxpool bent sign"),  # neither rises nor falls
        ("avgpool", 1, "conv maxpool avgpool sign"),
        ("", 2, "conv maxpool sign"),  # its numbers are wanted, too
    ],
)
def test_where_a_sign_goes_in_front_of_a_pool(between, users, expected):
    drafts = [Draft("conv", "conv", [IMAGE]), Draft("maxpool", "maxpool", [], attrs={"kernel": 2})]
    values = {"scale": [1.0, -1.0], "shift": [1.0, 2.0], "slope": [0.0, 0.5], "bent": [-1.0, 1.0]}
    for name in between.split():
        op = {"scale": "affine", "shift": "affine", "slope": "prelu", "bent": "prelu"}.get(name)
        slot = "slope" if op == "prelu" else name
        slots = {slot: (slot, "float32", [np.array(values[name])])} if op else {}
        drafts.append(Draft(op or name, name, [], slots, {}, PLAIN if op else None))
    drafts.append(Draft("sign", "sign", []))
    for before, after in itertools.pairwise(drafts):
        after.inputs, before.uses = [before], 1
    drafts[1].uses = users
    last = drafts[-1]
    fold(drafts, lambda source, chain: None, partial(directions, 1))
    assert " ".join(draft.name for draft in drafts) == expected
    assert [d.op == "maxpool" for d in drafts] == [d.name == "maxpool" for d in drafts]
    assert drafts[-1] is last  # what follows has it as its input
    assert all(after.inputs == [before] for before, after in itertools.pairwise(drafts))
    turned = [d.tensors["direction"][2][0].tolist() for d in drafts if "direction" in d.tensors]
    assert turned == [[True, False]] * ("scale" in between)


def thirds(weight, scale):
    """A user's own binarizer: a third of XNOR's scale."""
    from bnncore.networks.binarize import clipped_sign

    return clipped_sign(weight), weight.abs().mean(dim=(1, 2, 3)) / 3


def test_weights_are_packed_as_their_signs():
    ensemble = scrambled("resnet8", "c2", members=2)
    program = lower(ensemble, DATA.mean, DATA.std, DATA.classes)
    (node,) = [n for n in program.nodes if n.name == "body.layer1.block1.conv2" and n.op == "bconv"]
    tensor = program.tensors[node.tensors["weight"]]
    assert not tensor.own
    signs = ensemble.members[0].body.layer1.block1.conv2.weight >= 0
    assert np.array_equal(unpack_bits(tensor), signs.permute(0, 2, 3, 1).numpy())
    assert tensor.data.nbytes == 8 * 8 * 9 / 8


# -- refusals ------------------------------------------------------------------------------------


def broken(change) -> Ensemble:
    ensemble = scrambled("resnet8", "no_shared", members=1)
    change(ensemble.members[0])
    return ensemble


NAN, INF = torch.nan, torch.inf
NORM = "body.layer2.block1.norm1"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        *((f"1.{NORM}.{part}", value, "finite values, got NaN or infinity")
          for part in ("weight", "bias", "running_mean", "running_var")
          for value in (NAN, INF, -INF)),
        ("1.body.layer1.block1.act1.weight", NAN, "finite values"),
        ("1.body.layer1.block1.conv1.weight", INF, "finite values"),
        ("1.head.dense.bias", NAN, "finite values"),
        ("0.stem.conv.weight", NAN, "finite values"),
        ("shared.weights", NAN, "finite values"),
        (f"1.{NORM}.running_var", -0.5, "variances of at least 0, got -0.5"),
        (f"1.{NORM}", ("running_var", 0.0, "eps", 0.0), "a finite scale, got NaN or infinity"),
        (f"1.{NORM}", ("weight", 3e38), "a finite scale, got NaN or infinity"),
        (f"1.{NORM}", ("weight", 1e20, "running_mean", 1e20), "a finite shift, got"),
        ("1.body.layer1.block1.conv1", ("weight", 3e38), "a finite scale, got NaN or infinity"),
    ],
    ids=str,
)  # fmt: skip
def test_values_that_are_no_numbers_are_named_with_their_member(name, value, expected):
    """Of parameters and statistics, and of what they fold to: sign(NaN) would be a quiet -1."""
    ensemble = scrambled("resnet8", "no_shared", members=2)
    if isinstance(value, tuple):
        member, _, layer = name.partition(".")
        module = ensemble.members[int(member)].get_submodule(layer)
        for attribute, number in zip(value[::2], value[1::2], strict=True):
            if attribute == "eps":
                module.eps = number
            else:
                getattr(module, attribute).data.fill_(number)
    else:
        state = ensemble.state()
        state[name].view(-1)[-1] = value
        ensemble.load(state)
    with pytest.raises(LowerError, match=rf"^{re.escape(name)}: expected {expected}"):
        lower(ensemble, DATA.mean, DATA.std, DATA.classes)


def test_values_of_another_precision_are_named():
    ensemble = scrambled("resnet8", "no_shared", members=2)
    ensemble.members[1].head.half()
    with pytest.raises(LowerError, match=r"^1\.head\.dense\.weight: expected float32 values"):
        lower(ensemble, DATA.mean, DATA.std, DATA.classes)


@pytest.mark.parametrize(
    ("layer", "module", "message"),
    [
        ("act", nn.Sigmoid(), r"'body\.layer1\.block1\.act': Sigmoid cannot be packed"),
        (
            "conv2",
            BinaryConv2d(8, 8, 3, padding=1, groups=2),
            r"'body\.layer1\.block1\.conv2': groups: expected 1, got 2",
        ),
        (
            "shortcut",
            nn.Conv2d(8, 8, 3, padding=(1, 1), padding_mode="reflect"),
            r"'body\.layer1\.block1\.shortcut': padding_mode: expected 'zeros', got 'reflect'",
        ),
        (
            "shortcut",
            nn.Conv2d(8, 8, (3, 1), padding=(1, 0)),
            r"shortcut': padding: expected the same integer for H and W, got \(1, 0\)",
        ),
    ],
)
def test_what_cannot_be_packed_names_the_layer(layer, module, message):
    ensemble = broken(lambda m: setattr(m.body.layer1.block1, layer, module))
    with pytest.raises(LowerError, match=message):
        lower(ensemble.eval(), DATA.mean, DATA.std, DATA.classes)
