"""Narrowed files against hand-computed values, and against torch with the same narrowing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bnncore.data import normalization
from bnncore.lowering.lower import lower
from bnncore.networks.binarize import BinaryConv2d
from bnncore.networks.ensemble import Ensemble, EnsembleSpec
from bnncore.networks.parts import ModelSpec
from bnncore.networks.sharing import SHARING
from bnncore.packed import execute, narrow, packfile
from bnncore.packed.program import Node, Program, Tensor, unpack_bits
from bnncore.params import Binarizer, PackParams

STATS = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.25))
BOTH = PackParams("float16", "int8")


def trained(seed: int = 0, members: int = 2, width: int = 8) -> Ensemble:
    """ResNet-20s with statistics that training could leave, negative slopes among them."""
    model = ModelSpec("resnet20", (16, 16, 3), 5, width, 0.0, Binarizer())
    ensemble = Ensemble(EnsembleSpec(model, members, SHARING["shared_conv"]), seed=seed)
    g = torch.Generator().manual_seed(seed)
    for module in ensemble.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 1, generator=g)
            module.running_var.uniform_(0.5, 3, generator=g)
            module.weight.data.normal_(0.5, 0.5, generator=g)
            module.bias.data.normal_(0, 0.5, generator=g)
        if isinstance(module, torch.nn.PReLU):
            module.weight.data.normal_(0.1, 0.3, generator=g)
    return ensemble.eval()


def value(program: Program, node: Node, slot: str, member: int) -> torch.Tensor:
    tensor = program.tensors[node.tensors[slot]]
    array = tensor.data[member] if tensor.own else tensor.data
    return torch.from_numpy(array.astype(np.float32))


@torch.no_grad()
def rounded(ensemble: Ensemble, program: Program) -> None:
    """Write a narrowed program's numbers back into the torch modules they came from."""
    for m, member in enumerate(ensemble.members):
        for node in program.nodes:
            if node.op in ("normalize", "add", "bconv", "relu", "global_avg"):
                continue
            module = member.get_submodule(node.name)
            if node.op in ("conv", "dense"):
                weight = value(program, node, "weight", m)
                if "weight_scale" in node.tensors:
                    scale = value(program, node, "weight_scale", m)
                    weight = weight * scale.view(-1, *(1,) * (weight.dim() - 1))
                module.weight.copy_(weight.permute(0, 3, 1, 2) if node.op == "conv" else weight)
                if "bias" in node.tensors:
                    module.bias.copy_(value(program, node, "bias", m))
            elif node.op == "prelu":
                module.weight.copy_(value(program, node, "slope", m))
            elif node.op == "affine" and isinstance(module, BinaryConv2d):
                signs, _ = module.binary()
                alpha = value(program, node, "scale", m)
                module.weight.copy_(signs * alpha[:, None, None, None])
            elif node.op == "affine":
                replaced(module, value(program, node, "scale", m), value(program, node, "shift", m))
            elif node.op == "threshold":
                if program.tensors[node.tensors["threshold"]].kind != "float16":
                    continue  # on popcounts: integers, exact, from what torch still has
                t = value(program, node, "threshold", m)
                sign = torch.ones_like(t)
                if "direction" in node.tensors:
                    tensor = program.tensors[node.tensors["direction"]]
                    bits = unpack_bits(tensor)
                    sign = torch.from_numpy(bits[m] if tensor.own else bits).float() * 2 - 1
                norm = member.get_submodule(node.name.replace("sign", "norm"))
                replaced(norm, sign, -sign * t)
            else:
                assert node.op == "interval", node.op


def replaced(norm, scale: torch.Tensor, shift: torch.Tensor) -> None:
    """A batch norm that computes ``x * scale + shift``."""
    norm.eps = 0.0
    norm.running_var.fill_(1)
    norm.running_mean.zero_()
    norm.weight.copy_(scale)
    norm.bias.copy_(shift)


@pytest.mark.parametrize(
    ("seed", "weights"), [(0, "int8"), (1, "int8"), (2, "mixed"), (3, "float16")]
)
def test_equals_torch_with_the_same_narrowing(seed, weights):
    ensemble = trained(seed)
    whole = lower(ensemble, *STATS, tuple("abcde"))
    program = narrow.narrowed(whole, PackParams("float16", weights))
    kinds = [program.tensors[n.tensors["weight"]].kind for n in program.nodes if n.op != "bconv"
             and "weight" in n.tensors]  # fmt: skip
    assert kinds[0] == ("float16" if weights == "mixed" else weights)
    assert set(kinds[1:]) == {"int8" if weights == "mixed" else weights}
    rounded(ensemble, program)
    images = np.random.default_rng(seed).integers(0, 256, (32, 16, 16, 3), np.uint8)
    scale, shift = (torch.from_numpy(a)[:, None, None] for a in normalization(*STATS))
    x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).float() * scale + shift
    with torch.no_grad():
        theirs = torch.stack(ensemble.outputs(x)).numpy()
    ours = execute.Model(program, ops="numpy").outputs(images)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_int8_by_hand():
    data = np.array([[1.0, -0.5, 0.25], [0.0, 0.0, 0.0]], np.float32)
    weights, scales = narrow._int8(Tensor("float32", "weight", (2, 3), False, data))
    step = np.float32(np.float16(1 / 127))
    np.testing.assert_array_equal(weights.data[0], np.rint(data[0] / step).clip(-127, 127))
    np.testing.assert_array_equal(weights.data[1], 0)
    np.testing.assert_allclose(weights.data[0] * scales.data[0], data[0], atol=step / 2 + 1e-3)


def test_own_weights_get_a_scale_a_member():
    data = np.stack([np.full((2, 3), 1.0), np.full((2, 3), 8.0)]).astype(np.float32)
    weights, scales = narrow._int8(Tensor("float32", "weight", (2, 3), True, data))
    assert scales.own
    assert scales.data.shape == (2, 2)
    np.testing.assert_allclose(weights.data * scales.data[:, :, None], data, rtol=0.01)


def test_float16_rounds_to_nearest_and_names_what_does_not_fit():
    tensor = Tensor("float32", "scale", (2,), False, np.array([1 / 3, -2.0], np.float32))
    small = narrow._float16(tensor, "layer 'a'")
    np.testing.assert_array_equal(small.data, np.array([1 / 3, -2.0], np.float16))
    huge = Tensor("float32", "scale", (1,), False, np.array([1e6], np.float32))
    with pytest.raises(ValueError, match=r"layer 'a'.*65504"):
        narrow._float16(huge, "layer 'a'")


def test_a_channel_that_is_never_on_stays_so():
    never = np.array([np.finfo(np.float32).max, -np.finfo(np.float32).max], np.float32)
    small = narrow._float16(Tensor("float32", "threshold", (2,), False, never), "x")
    np.testing.assert_array_equal(small.data, np.array([65504, -65504], np.float16))


def test_nothing_asked_nothing_changed():
    program = lower(trained(), *STATS, tuple("abcde"))
    assert packfile.encode(narrow.narrowed(program, PackParams())) == packfile.encode(program)


@pytest.mark.parametrize(
    "options",
    [("float16", "float32"), *(("float32", kind) for kind in ("int8", "mixed", "float16"))],
)
def test_each_option_alone_makes_the_file_smaller(options):
    program = lower(trained(), *STATS, tuple("abcde"))
    assert len(packfile.encode(narrow.narrowed(program, PackParams(*options)))) < len(
        packfile.encode(program)
    )


def test_ten_members_fit_in_a_fifth_more_than_the_papers_weights():
    """ResNet-20, shared filters, M = 10, CIFAR-10: 70,976 bytes of weights in the paper's count."""
    paper = (13824 + 13824 + 67072 + 268288 + 10 * 20480) / 8
    model = ModelSpec("resnet20", (32, 32, 3), 10, 16, 0.0, Binarizer())
    ensemble = Ensemble(EnsembleSpec(model, 10, SHARING["shared_conv"]))
    ensemble.diversify(0, 0.1, True)
    program = narrow.narrowed(lower(ensemble, *STATS, tuple("0123456789")), BOTH)
    assert paper == 70976
    assert len(packfile.encode(program)) <= 1.2 * paper
