"""Binarization of weights and activations, as data: two tables of functions and their layers.

One rule holds everywhere, in torch and in the packed evaluator: ``sign(x) = +1 if x >= 0 else -1``
(Kim et al. 2022, Eq. 2); `torch.sign`, which gives 0 at 0, is never used.

Legend: `B C H W` activations, `O` filters, `K = C * kh * kw` weights of one filter.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnncore.networks.imports import imported
from bnncore.networks.parts import NetworkError
from bnncore.params import Binarizer


def sign(x: Tensor) -> Tensor:
    """+1 where ``x >= 0``, else -1, in the dtype of `x`; not differentiable."""
    if torch.compiler.is_compiling():
        return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)
    x = x.detach()
    # Compared straight into floats: a fifth of the time of a comparison and a conversion.
    return torch.ge(x, 0, out=torch.empty_like(x)).mul_(2).sub_(1)


class ClippedSign(torch.autograd.Function):
    """sign with the straight-through gradient 1 on [-1, 1] (Kim et al. 2022, Eq. 5).

    Keeps a byte a value for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        # By way of floats: torch's comparisons into bytes take several times longer.
        ctx.save_for_backward(x.detach().abs().le_(1).to(torch.int8))
        return sign(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (inside,) = ctx.saved_tensors
        # 0 outside whatever the gradient is there, where a product would give -0 and NaN.
        return torch.ops.aten.threshold_backward(grad, inside.to(grad.dtype), 0)


class _BiRealSign(torch.autograd.Function):
    """sign with the gradient ``2 - 2|x|`` on [-1, 1] (Liu et al. 2018, Bi-Real Net, Eq. 8)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return sign(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return x.abs().mul_(-2).add_(2).clamp_(min=0).mul_(grad)


def clipped_sign(x: Tensor) -> Tensor:
    """`sign` of `x` (any shape) with the clipped straight-through gradient."""
    return ClippedSign.apply(x)


def bireal_sign(x: Tensor) -> Tensor:
    """`sign` of `x` (any shape) with Bi-Real Net's piecewise linear gradient."""
    return _BiRealSign.apply(x)


def drawn(weight: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Stochastic rounding to +-1: +1 with probability ``(clip(w, -1, 1) + 1) / 2``.

    Kim et al. 2022, Eq. 7 would round to 0 as well; this is the form of Courbariaux et al. 2015
    (BinaryConnect, Eqs. 2, 3), which Vogel et al. 2016 sample networks by.
    """
    noise = torch.rand(weight.shape, generator=generator, device=weight.device)
    return sign(weight + (2 * noise - 1).to(weight.dtype))


def _xnor(weight: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return clipped_sign(weight), weight.abs().mean(dim=(1, 2, 3))


def _plain(weight: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return clipped_sign(weight), None


def _learned(weight: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return clipped_sign(weight), scale


# (O, C, kh, kw) latent weights, learned scale -> signs of the same shape, scale alpha (O,) or None.
WeightBinarizer = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]
WEIGHTS: dict[str, WeightBinarizer] = {
    "xnor": _xnor,  # XNOR-Net: alpha = mean |w| of each filter, differentiated through
    "sign": _plain,  # BNN (Courbariaux et al. 2016): no scale
    "learned": _learned,  # XNOR-Net++ (Bulat & Tzimiropoulos 2019): one learned scale a filter
}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor] | None] = {
    "clipped": clipped_sign,
    "bireal": bireal_sign,
    "float": None,  # BinaryConnect: weights binary, activations left alone
}


def named(table: dict[str, Any], name: str, key: str) -> Any:
    """Look `name` up in `table` (`WEIGHTS` or `ACTIVATIONS`), or import ``module:function``.

    Raises:
        NetworkError: an unknown name (lists the known ones), nothing to import there, or a function
            that does not binarize; names the parameter `key`.
    """
    if name in table:
        return table[name]
    if ":" not in name:
        raise NetworkError(
            f"{key}: expected one of {', '.join(table)} or 'module:function', got {name!r}"
        )
    function = imported(name, key)
    (_try_weights if table is WEIGHTS else _try_activation)(function, f"{key}: {name}")
    return function


@lru_cache
def _try_weights(function: WeightBinarizer, where: str) -> None:
    weight = torch.linspace(-2, 2, 2 * 3 * 3 * 3, device="cpu").view(2, 3, 3, 3)
    result = _tried(function, where, "(weights, None)", weight.requires_grad_(), None)
    if not isinstance(result, tuple) or len(result) != 2:
        raise NetworkError(f"{where}: expected (signs, scale or None), got {type(result).__name__}")
    signs, scale = result
    _expect_signs(signs, weight, where)
    good = scale is None or (isinstance(scale, Tensor) and scale.shape == (2,))
    if not good or (scale is not None and not scale.isfinite().all()):
        got = scale.tolist() if isinstance(scale, Tensor) else repr(scale)
        raise NetworkError(f"{where}: expected None or a finite scale a filter, (2,), got {got}")


@lru_cache
def _try_activation(function: Callable[[Tensor], Tensor], where: str) -> None:
    x = torch.tensor([-2.0, -0.5, -1e-30, -0.0, 0.0, 1e-30, 0.5, 2.0], device="cpu")
    x = x.view(1, 2, 2, 2)
    result = _tried(function, where, "(activations)", x.clone().requires_grad_())
    _expect_signs(result, x, where)
    if not torch.equal(result.detach(), sign(x)):
        raise NetworkError(
            f"{where}: expected +1 where x >= 0 and -1 elsewhere, got "
            f"{result.flatten().tolist()} for {x.flatten().tolist()}"
        )


def _tried(function: Callable[..., Any], where: str, arguments: str, *values: Any) -> Any:
    try:
        with torch.device("cpu"), torch.enable_grad(), torch.random.fork_rng(devices=[]):
            return function(*values)
    except (Exception, SystemExit) as error:  # of the user's function: any kind
        raise NetworkError(
            f"{where}: expected a function of {arguments}, got {type(error).__name__}: {error}"
        ) from error


def _expect_signs(signs: Any, of: Tensor, where: str) -> None:
    if not isinstance(signs, Tensor) or signs.shape != of.shape or signs.dtype != of.dtype:
        got = f"{signs.dtype} {tuple(signs.shape)}" if isinstance(signs, Tensor) else repr(signs)
        raise NetworkError(
            f"{where}: expected signs of {of.dtype} {tuple(of.shape)}, got {got:.60}"
        )
    if not (signs.detach().abs() == 1).all():
        raise NetworkError(f"{where}: expected values of +1 and -1, got {signs.unique().tolist()}")


class BinaryConv2d(nn.Conv2d):
    """Convolution with weights of +-1: ``y = (x * sign(w)) . alpha (+ bias)``.

    alpha multiplies the sums, not the filters, so that sums that are truly 0 stay 0. The products
    of +-1 inputs are exact in float32. Inputs (B, C, H, W), outputs (B, O, H', W').

    Source: TentacleNet, Eq. 1 without K; Kim et al. 2022, Eq. 1.

    Args:
        binarizer: a key of `WEIGHTS`, or ``module:function`` with the same signature.
        stochastic: in training mode, while the filters are trained, signs are `drawn`; the
            gradient and alpha stay those of `binarizer`.
    """

    def __init__(
        self, *args: Any, binarizer: str = "xnor", stochastic: bool = False, **kwargs: Any
    ):
        super().__init__(*args, **kwargs)
        self.binarizer = binarizer
        self.stochastic = stochastic
        self.generator: torch.Generator | None = None  # see `backbones.Dropout`
        self._binarize: WeightBinarizer = named(WEIGHTS, binarizer, "binarizer.weight")
        self.scale = None
        if binarizer == "learned":
            self.scale = nn.Parameter(self.weight.detach().abs().mean(dim=(1, 2, 3)))
        self.real = False  # see `real_weights`
        self._frozen: tuple | None = None

    def binary(self) -> tuple[Tensor, Tensor | None]:
        """Signs (O, C, kh, kw) and alpha (O,) or None; kept while the filters are frozen."""
        if self.weight.requires_grad:
            self._frozen = None
            if self.real:
                return self.weight, None
            signs, alpha = self._binarize(self.weight, self.scale)
            if self.stochastic and self.training:
                with torch.no_grad():
                    change = drawn(self.weight, self.generator) - signs
                signs = signs + change
            return signs, alpha
        if torch.compiler.is_compiling() and self._frozen is not None:
            return self._frozen[1]  # a graph cannot ask for versions
        version = (self.weight.data_ptr(), self.weight._version, self.weight.device)
        if self._frozen is None or self._frozen[0] != version:
            with torch.no_grad():
                self._frozen = (version, self._binarize(self.weight, self.scale))
        return self._frozen[1]

    def forward(self, x: Tensor) -> Tensor:
        signs, alpha = self.binary()
        y = F.conv2d(x, signs, None, self.stride, self.padding, self.dilation, self.groups)
        if alpha is not None:
            y = y * alpha[:, None, None]
        if self.bias is not None:
            y = y + self.bias[:, None, None]
        return y


def real_weights(network: nn.Module, real: bool) -> None:
    """Whether binary convolutions convolve with their latent weights as they are: the first of two
    steps of training (Martinez et al. 2020, section 4.1)."""
    for module in network.modules():
        if isinstance(module, BinaryConv2d):
            module.real = real


class BinaryActivation(nn.Module):
    """``sign(x)`` in the forward direction, the named gradient in the backward one.

    Args:
        kind: a key of `ACTIVATIONS` that is not ``float``, or ``module:function``.
    """

    def __init__(self, kind: str = "clipped"):
        super().__init__()
        self.kind = kind
        self.function = named(ACTIVATIONS, kind, "binarizer.activation")

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)

    def extra_repr(self) -> str:
        return self.kind


class Shift(nn.Module):
    """A learned shift of each channel, ``x + b_c``; what RSign and RPReLU are made of.

    RSign(x) = sign(x - a_c) and RPReLU(x) = PReLU(x - c_c) + d_c (Liu et al. 2020, Eqs. 1, 2).
    """

    def __init__(self, channels: int):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift[:, None, None]


# -- the pieces of backbones, as a `Binarizer` asks for them ------------------------------------


def inner_sign(binarizer: Binarizer, channels: int, shift: bool = False) -> nn.Module:
    """What stands in front of an inner convolution.

    Args:
        shift: whether the backbone's own is ReActNet's RSign, where `binarizer` leaves it open.
    """
    if binarizer.activation == "float":
        sign: nn.Module = nn.Identity()
    else:
        sign = BinaryActivation(binarizer.activation)
    wanted = shift if binarizer.shift is None else binarizer.shift
    return nn.Sequential(Shift(channels), sign) if wanted else sign


def inner_conv(binarizer: Binarizer, *args: Any, **kwargs: Any) -> BinaryConv2d:
    """An inner convolution."""
    return BinaryConv2d(
        *args, binarizer=binarizer.weight, stochastic=binarizer.stochastic, **kwargs
    )


def inner_act(binarizer: Binarizer, channels: int, own: str) -> nn.Module:
    """What stands behind an inner convolution, or its addition.

    Args:
        own: the backbone's own, where `binarizer` leaves it open: as `Binarizer.act`, or ``slope``:
            a PReLU with one slope, as in Kim et al. 2022. Without signs there is always one.
    """
    kind = binarizer.act or ("slope" if (own, binarizer.activation) == ("none", "float") else own)
    if kind == "none":
        return nn.Identity()
    if kind == "rprelu":
        return nn.Sequential(Shift(channels), nn.PReLU(channels), Shift(channels))
    return nn.PReLU(channels if kind == "prelu" else 1)


def edge_conv(
    binarizer: Binarizer | None, edge: str, cin: int, cout: int, kernel: int, bias: bool
) -> nn.Conv2d:
    """The first convolution (`edge` is ``stem``) or the last (``head``), with a norm behind it.

    With binary weights its sums have neither scale nor bias: the norm has.
    """
    shape = (cin, cout, kernel, 1, kernel // 2)
    if binarizer is None or getattr(binarizer, edge) == "float":
        return nn.Conv2d(*shape, bias=bias)
    return BinaryConv2d(*shape, bias=False, binarizer="sign", stochastic=binarizer.stochastic)


@torch.no_grad()
def pseudo_hadamard_(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Fill (O, C, kh, kw) latent weights with rows of a Sylvester-Hadamard matrix, in place.

    The matrix has the smallest order 2^k that holds max(O, K); rows and columns are drawn at
    random without replacement, so rows that are kept whole are orthogonal. The paper speaks of
    removing and replicating rows only; dropping columns as well is assumed. Entries are
    +-1/sqrt(K), the size of the usual uniform start.

    Source: TentacleNet, section 3.2.
    """
    rows, columns = weight.shape[0], weight[0].numel()
    order = 1
    while order < max(rows, columns):
        order *= 2
    i = torch.randperm(order, generator=generator)[:rows, None]
    j = torch.randperm(order, generator=generator)[None, :columns]
    parity = i & j
    for shift in (16, 8, 4, 2, 1):
        parity = parity ^ (parity >> shift)
    values = (1 - 2 * (parity & 1)).to(weight.dtype) / columns**0.5
    return weight.copy_(values.view_as(weight))
