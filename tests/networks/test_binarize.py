"""Binarizers against values and gradients worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bnncore.networks.backbones import build
from bnncore.networks.binarize import (
    ACTIVATIONS,
    WEIGHTS,
    BinaryActivation,
    BinaryConv2d,
    Shift,
    clipped_sign,
    drawn,
    named,
    pseudo_hadamard_,
    sign,
)
from bnncore.networks.parts import ModelSpec, NetworkError
from bnncore.params import Binarizer


@pytest.mark.parametrize("name", ["clipped", "bireal"])
def test_sign_of_zero_is_plus_one(name):
    x = torch.tensor([-2.0, -1e-45, -0.0, 0.0, 1e-45, 2.0])
    expected = [-1.0, -1.0, 1.0, 1.0, 1.0, 1.0]
    assert sign(x).tolist() == expected
    assert BinaryActivation(name)(x).tolist() == expected


def test_the_clipped_sign_keeps_a_byte_a_value_and_gives_zero_outside():
    """Whatever comes from above: no -0, no NaN; the gradient of hardtanh to the bit."""
    rng = torch.Generator().manual_seed(0)
    x = torch.cat([3 * torch.randn(500, generator=rng), torch.tensor([1.0, -1.0, 0.0, -0.0])])
    x.requires_grad_()
    grad = torch.randn(504, generator=rng)
    grad[:2], x.data[:2] = torch.tensor([torch.inf, torch.nan]), torch.tensor([-2.0, 2.0])
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        y = clipped_sign(x)
    assert sum(t.nbytes for t in kept) == x.numel()
    y.backward(grad)
    bound = 1 + torch.finfo(x.dtype).eps
    expected = torch.ops.aten.hardtanh_backward(grad, x.detach(), -bound, bound)
    assert torch.equal(x.grad.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # 1 on [-1, 1], both ends included; 0 outside
        ("clipped", [0, 1, 1, 1, 1, 1, 1, 0]),
        # 2 - 2|x| on [-1, 1]
        ("bireal", [0, 0, 1, 2, 2, 0.5, 0, 0]),
    ],
)
def test_gradients_of_sign(name, expected):
    x = torch.tensor([-1.01, -1.0, -0.5, -0.0, 0.0, 0.75, 1.0, 1.01], requires_grad=True)
    upstream = torch.arange(1.0, 9.0)
    ACTIVATIONS[name](x).backward(upstream)
    assert x.grad.tolist() == [g * u for g, u in zip(expected, upstream.tolist(), strict=True)]


def conv(binarizer="xnor", weights=(0.5, -0.25, 0.0, 2.0), bias=False, **changes):
    """One 1x1 filter over four channels."""
    layer = BinaryConv2d(len(weights), 1, 1, bias=bias, binarizer=binarizer, **changes)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weights).view(1, -1, 1, 1))
    return layer


def test_xnor_value_and_gradients_by_hand():
    layer = conv()
    x = torch.tensor([1.0, -1.0, 1.0, -1.0]).view(1, 4, 1, 1).requires_grad_()
    y = layer(x)
    # signs +1 -1 +1 +1; sum 1 + 1 + 1 - 1 = 2; alpha = (0.5 + 0.25 + 0 + 2) / 4
    alpha = 2.75 / 4
    assert y.item() == 2 * alpha
    y.backward()
    # through the signs: alpha * x where |w| <= 1; through alpha: sum * sign(w) / 4, 0 at 0
    through_alpha = [2 / 4, -2 / 4, 0, 2 / 4]
    through_signs = [alpha, -alpha, alpha, 0]
    expected = [a + b for a, b in zip(through_alpha, through_signs, strict=True)]
    assert layer.weight.grad.flatten().tolist() == pytest.approx(expected)
    assert x.grad.flatten().tolist() == [alpha, -alpha, alpha, alpha]


def test_plain_sign_has_no_scale():
    layer = conv("sign")
    x = torch.tensor([1.0, -1.0, 1.0, -1.0]).view(1, 4, 1, 1)
    assert layer(x).item() == 2
    layer(x).backward()
    assert layer.weight.grad.flatten().tolist() == [1, -1, 1, 0]


def test_learned_scale_and_its_gradient():
    layer = conv("learned")
    with torch.no_grad():
        layer.scale.fill_(0.3)
    x = torch.tensor([1.0, -1.0, 1.0, -1.0]).view(1, 4, 1, 1)
    y = layer(x)
    assert y.item() == pytest.approx(0.6)
    y.backward()
    assert layer.scale.grad.tolist() == [2]
    assert layer.weight.grad.flatten().tolist() == pytest.approx([0.3, -0.3, 0.3, 0])


def test_learned_scale_starts_at_xnors():
    torch.manual_seed(0)
    layer = BinaryConv2d(3, 5, 3, binarizer="learned")
    assert torch.equal(layer.scale.detach(), layer.weight.detach().abs().mean(dim=(1, 2, 3)))


def test_convolution_equals_a_naive_one():
    torch.manual_seed(0)
    layer = BinaryConv2d(5, 7, 3, stride=2, padding=1)
    x = sign(torch.randn(2, 5, 6, 6))
    alpha = layer.weight.detach().abs().mean(dim=(1, 2, 3))
    signs = torch.where(layer.weight.detach() >= 0, 1.0, -1.0)
    expected = F.conv2d(x, signs, stride=2, padding=1) * alpha[:, None, None]
    expected = expected + layer.bias.detach()[:, None, None]
    assert torch.equal(layer(x).detach(), expected)


def half(weight, scale):
    """A user's own binarizer: signs, and one scale for all filters."""
    return clipped_sign(weight), weight.abs().mean().expand(len(weight))


def test_a_users_own_functions():
    layer = conv("tests.networks.test_binarize:half")
    x = torch.ones(1, 4, 1, 1)
    assert layer(x).item() == pytest.approx(2 * 2.75 / 4)
    assert BinaryActivation("tests.networks.test_binarize:clipped_sign")(torch.zeros(1)).item() == 1


def test_unknown_names_list_those_there_are():
    with pytest.raises(ValueError, match=r"key: expected one of xnor, .*learned.* got 'binary'"):
        named(WEIGHTS, "binary", "key")
    with pytest.raises(
        ValueError, match=r"key: cannot import 'tests.networks.test_binarize:nothing'"
    ):
        named(WEIGHTS, "tests.networks.test_binarize:nothing", "key")


def no_pair(weight, scale):
    return clipped_sign(weight)


def torch_sign(weight, scale):
    return torch.sign(weight - weight.flatten()[0]), None


def one_scale(weight, scale):
    return clipped_sign(weight), weight.abs().mean()


def transposed(weight, scale):
    return clipped_sign(weight).transpose(0, 1), None


def booleans(weight, scale):
    return weight >= 0, None


def not_finite(weight, scale):
    return clipped_sign(weight), weight.abs().mean((1, 2, 3)) / 0


def above_zero(x):
    return torch.where(x > 0, 1.0, -1.0)


def shifted(x):
    return clipped_sign(x - 0.25)


a_number = 3


@pytest.mark.parametrize(
    ("name", "table", "message"),
    [
        ("os:system", WEIGHTS, r"expected a function of \(weights, None\), got TypeError"),
        ("os:system", ACTIVATIONS, r"expected a function of \(activations\), got TypeError"),
        ("sys:exit", ACTIVATIONS, r"expected a function of \(activations\), got SystemExit"),
        ("{here}:no_pair", WEIGHTS, r"expected \(signs, scale or None\), got Tensor"),
        ("{here}:torch_sign", WEIGHTS, r"expected values of \+1 and -1, got \[0.0, 1.0\]"),
        ("{here}:one_scale", WEIGHTS, r"expected None or a finite scale a filter, \(2,\), got 1\."),
        ("{here}:not_finite", WEIGHTS, r"finite scale a filter, \(2,\), got \[inf, inf\]"),
        ("{here}:transposed", WEIGHTS, r"expected signs of torch.float32 \(2, 3, 3, 3\), got"),
        ("{here}:booleans", WEIGHTS, r"expected signs of torch.float32 .*, got torch.bool"),
        ("{here}:clipped_sign", WEIGHTS, r"expected a function of \(weights, None\)"),
        ("{here}:half", ACTIVATIONS, r"expected a function of \(activations\), got TypeError"),
        ("{here}:above_zero", ACTIVATIONS, r"expected \+1 where x >= 0 and -1 elsewhere"),
        ("{here}:shifted", ACTIVATIONS, r"expected \+1 where x >= 0 and -1 elsewhere"),
        ("torch:abs", ACTIVATIONS, r"expected values of \+1 and -1"),
        ("{here}:a_number", WEIGHTS, r"expected '.*' to be a function, got 3"),
        ("{here}:nothing", WEIGHTS, r"cannot import"),
        ("no.such:module", WEIGHTS, r"cannot import"),
        ("tests.networks.broken:weight", WEIGHTS, r"cannot import .*: NameError: name 'weights'"),
        (":", WEIGHTS, r"cannot import"),
    ],
)
def test_a_users_function_that_does_not_binarize_is_refused_with_its_key(name, table, message):
    name = name.format(here="tests.networks.test_binarize")
    with pytest.raises(NetworkError, match=rf"^model\.key: .*{message}"):
        named(table, name, "model.key")
    with torch.device("meta"), pytest.raises(NetworkError, match=message):
        named(table, name, "model.key")


@pytest.mark.parametrize(
    "name", ["os:system", "torch:abs", "tests.networks.test_binarize:above_zero"]
)
def test_a_users_network_that_is_none_is_refused_with_its_key(name):
    with pytest.raises(NetworkError, match=r"^model\.backbone: expected .* a function of"):
        build(ModelSpec(name, (8, 8, 1), 4, binarizer=Binarizer()))


def test_frozen_filters_are_binarized_once_and_again_when_they_change():
    layer = conv().requires_grad_(False)
    first = layer.binary()[0]
    assert layer.binary()[0] is first
    with torch.no_grad():
        layer.weight.neg_()
    assert layer.binary()[0].flatten().tolist() == [-1, 1, 1, -1]  # sign(-0.0) = +1


def test_stochastic_rounding_has_the_documented_probability():
    w = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0])
    draws = drawn(w.expand(20_000, -1), torch.Generator().manual_seed(0))
    assert draws.unique().tolist() == [-1, 1]
    share = (draws == 1).double().mean(0)
    expected = (w.clamp(-1, 1).double() + 1) / 2
    # five standard deviations of a mean of 20,000 draws
    assert (share - expected).abs().max() < 5 * (0.25 / 20_000) ** 0.5
    assert share[[0, 1, 5, 6]].tolist() == [0, 0, 1, 1]


def test_stochastic_filters_are_drawn_in_training_only():
    layer = conv(weights=(0.0,) * 64, stochastic=True)
    layer.generator = torch.Generator().manual_seed(1)
    first, second = layer.binary()[0], layer.binary()[0]
    assert not torch.equal(first, second)
    first.sum().backward()
    assert layer.weight.grad.unique().tolist() == [1]  # the gradient of the clipped sign
    assert torch.equal(layer.eval().binary()[0], torch.ones(1, 64, 1, 1))


def test_react_functions():
    shift, prelu = Shift(2), nn.PReLU(2)
    with torch.no_grad():
        shift.shift.copy_(torch.tensor([0.5, -0.5]))
        prelu.weight.copy_(torch.tensor([0.25, -2.0]))
    x = torch.tensor([-1.0, 0.25]).view(1, 2, 1, 1)
    assert sign(shift(x)).flatten().tolist() == [-1, -1]
    assert prelu(shift(x)).flatten().tolist() == [-0.5 * 0.25, -0.25 * -2.0]


@pytest.mark.parametrize("shape", [(4, 2, 1, 1), (8, 8, 1, 1), (5, 3, 3, 3), (16, 2, 2, 2)])
def test_pseudo_hadamard(shape):
    weight = torch.empty(shape)
    pseudo_hadamard_(weight, torch.Generator().manual_seed(0))
    rows = weight.flatten(1)
    k = rows.shape[1]
    assert torch.equal(rows.abs(), torch.full_like(rows, k**-0.5))
    again = pseudo_hadamard_(torch.empty(shape), torch.Generator().manual_seed(0))
    other = pseudo_hadamard_(torch.empty(shape), torch.Generator().manual_seed(1))
    assert torch.equal(weight, again)
    assert not torch.equal(weight, other)


@pytest.mark.parametrize("shape", [(8, 8, 1, 1), (5, 16, 1, 1), (3, 2, 2, 2)])
def test_pseudo_hadamard_rows_that_are_kept_whole_are_orthogonal(shape):
    rows = pseudo_hadamard_(torch.empty(shape), torch.Generator().manual_seed(2)).flatten(1)
    # K is the matrix's order here, so no column is dropped
    assert torch.allclose(rows @ rows.T, torch.eye(len(rows)), atol=1e-6)
