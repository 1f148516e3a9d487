"""The cheap layers are torch's layers: values, gradients and statistics, within rounding."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from bnncore import cheap


def _pair(layer: nn.Module) -> tuple[nn.Module, nn.Module]:
    other = copy.deepcopy(layer)
    cheap.make(other)
    return layer, other


def _run(layer: nn.Module, x: torch.Tensor, upstream: torch.Tensor):
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(upstream)
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters()), *layer.buffers()]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("shape", [(5, 3, 7, 4), (64, 16, 8, 8), (2, 9, 1, 1)])
def test_batch_norm(shape, offset, training):
    torch.manual_seed(0)
    layer = nn.BatchNorm2d(shape[1]).double().train(training)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(shape[1]))
        layer.bias.copy_(torch.randn(shape[1]))
    x = torch.randn(shape).double() * 3 + offset
    upstream = torch.randn(shape).double()
    for a, b in zip(*(_run(one, x, upstream) for one in _pair(layer)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * (1 + offset))


def test_batch_norm_in_float32_is_as_exact_as_torchs():
    torch.manual_seed(0)
    x = torch.randn(64, 16, 16, 16) + 30
    layer, quick = _pair(nn.BatchNorm2d(16))
    exact = copy.deepcopy(layer).double()(x.double())
    errors = [(one(x) - exact).abs().max().item() for one in (layer, quick)]
    assert errors[1] <= 2 * errors[0]


@pytest.mark.parametrize("slope", [0.25, 0.0, -0.5, 2.0])
def test_prelu(slope):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 5, 5).double()
    x[0, 0, 0] = torch.tensor([0.0, -0.0, 1.0, -1.0, 0.0])
    upstream = torch.randn(x.shape).double()
    layer = nn.PReLU(init=slope).double()
    for a, b in zip(*(_run(one, x, upstream) for one in _pair(layer)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_one_value_a_channel_is_refused_as_by_torch():
    layer = nn.BatchNorm2d(3)
    cheap.make(layer)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(torch.zeros(1, 3, 1, 1))
