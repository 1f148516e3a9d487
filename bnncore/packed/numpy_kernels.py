"""The kernels in numpy: one step a node, plain enough to be the reference for all others.

How values look here: numbers as float32 or int32 (B,H,W,C) or (B,F); bits as uint8
(B,H,W,ceil(C/8)), the channel c in bit ``c % 8`` of byte ``c // 8``, spare bits 0.

A binary convolution of K = kh·kw·C products is an XOR of packed words and a popcount:
``sum(a * w) = K - 2 * popcount(bits(a) ^ bits(w))``. Training pads with zeros, which no bit can
say, so a padded tap enters as bits of 0 and is taken out again: it wrongly gave
``C - 2 * popcount(w)``, which depends on the position in the map alone (see `borders`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np

from bnncore.packed import borders
from bnncore.packed.arena import Kernel
from bnncore.packed.program import Node, Program, Shape, Tensor, unpack_bits
from bnncore.packed.rules import validate

Array = np.ndarray
Run = Callable[[Sequence[Array], int], Array]
T = TypeVar("T")

_PIXELS = 4096  # output positions worked on at once: long enough for numpy's loops, short enough
_BLOCK = 1 << 15  # for the cache; and elements of one block of (filters, positions)


def plan(program: Program) -> list[Kernel]:
    """One step for each node of a Program."""
    shapes = validate(program)
    steps = []
    for number, node in enumerate(program.nodes, 1):
        run = one_output(operator(program, node, [shapes[i] for i in node.inputs], shapes[number]))
        steps.append(Kernel(node.inputs, (number,), shapes[number].own, run))
    return steps


def operator(program: Program, node: Node, inputs: list[Shape], out: Shape) -> Run:
    """``run(values, member) -> value`` of a node with inputs and an output of these shapes."""
    return _BUILD[node.op](_Bound(program, node, inputs, out))


def one_output(run: Run) -> Callable[[Sequence[Any], int, Sequence[Array]], Sequence[Any]]:
    """A kernel's `run`, of what gives one value and finds memory itself."""
    return lambda values, member, rooms: (run(values, member),)


class _Bound:
    """A node with its shapes, and its tensors as plain arrays."""

    def __init__(self, program: Program, node: Node, inputs: list[Shape], out: Shape) -> None:
        self.node, self.inputs, self.out = node, inputs, out
        self.tensors = {slot: program.tensors[name] for slot, name in node.tensors.items()}

    def attr(self, name: str) -> int:
        return int(self.node.attrs[name])

    def per(self, prepare: Callable[..., T], *slots: str) -> Callable[[int], T]:
        """``prepare(*arrays of the slots)`` for a member, None for an absent slot; see `plain`."""
        tensors = [self.tensors.get(slot) for slot in slots]

        def make(member: int) -> T:
            return prepare(*(None if t is None else plain(t, member) for t in tensors))

        return each_member(make, [tensor for tensor in tensors if tensor is not None])

    def window(self) -> borders.Window:
        """Of a convolution."""
        _, *kernel, _ = self.tensors["weight"].shape
        return borders.Window.of(
            (kernel[0], kernel[1]), self.attr("stride"), self.attr("pad"),
            self.inputs[0].dims[:2], self.out.dims[:2],
        )  # fmt: skip


def each_member(make: Callable[[int], T], tensors: Iterable[Tensor]) -> Callable[[int], T]:
    """``make(member)``, called once a member, or once if all tensors are shared; when needed."""
    own = any(tensor.own for tensor in tensors)
    made: dict[int, T] = {}

    def get(member: int) -> T:
        member = member if own else 0
        if member not in made:
            made[member] = make(member)
        return made[member]

    return get


def plain(tensor: Tensor, member: int) -> Array:
    """A member's copy: booleans, float32, or integers."""
    data = unpack_bits(tensor) if tensor.kind == "binary" else tensor.data
    data = data[member] if tensor.own else data
    return data.astype(np.float32) if data.dtype.kind == "f" else data


def _pack(bits: Array) -> Array:
    """Booleans (..., C) -> bytes (..., ceil(C/8))."""
    channels = bits.shape[-1]
    if channels % 8 == 0:  # then the rows join without spare bits, and one long call is faster
        packed = np.packbits(np.ascontiguousarray(bits).reshape(-1), bitorder="little")
        return packed.reshape(*bits.shape[:-1], channels // 8)
    return np.packbits(bits, axis=-1, bitorder="little")


def _unpack(packed: Array, channels: int) -> Array:
    return np.unpackbits(packed, axis=-1, count=channels, bitorder="little").view(bool)


def _taps(x: Array, kernel: tuple[int, int], stride: int, out: tuple[int, int]) -> list[Array]:
    """For each tap of the kernel the (B,Ho,Wo,C) view of the inputs it meets."""
    height, width = ((size - 1) * stride + 1 for size in out)
    return [
        x[:, i : i + height : stride, j : j + width : stride]
        for i in range(kernel[0])
        for j in range(kernel[1])
    ]


def _padded(
    x: Array, pad: int, kernel: int, stride: int, out: tuple[int, int], fill: float
) -> Array:
    """Pad both sides by `pad`, and further at the end where `ceil` made windows reach out."""
    more = [
        max(0, (count - 1) * stride + kernel - size - 2 * pad)
        for count, size in zip(out, x.shape[1:3], strict=True)
    ]
    if not pad and not any(more):
        return x
    margins = ((0, 0), (pad, pad + more[0]), (pad, pad + more[1]), (0, 0))
    return np.pad(x, margins, constant_values=fill)


def _normalize(bound: _Bound) -> Run:
    return _affine(bound)


def _affine(bound: _Bound) -> Run:
    scales = bound.per(lambda scale: scale, "scale")
    shifts = bound.per(lambda shift: shift, "shift")

    def run(values: Sequence[Array], member: int) -> Array:
        x = values[0].astype(np.float32)
        scale, shift = scales(member), shifts(member)
        if scale is not None:
            x *= scale
        if shift is not None:
            x += shift
        return x

    return run


def float_weight(weight: Array, scale: Array | None) -> Array:
    """Booleans to +-1, int8 times its filter's scale; (O, ...) -> float32 (O, everything else)."""
    flat = weight.reshape(len(weight), -1)
    if flat.dtype == bool:
        return np.where(flat, np.float32(1), np.float32(-1))
    flat = flat.astype(np.float32)
    return flat if scale is None else flat * scale[:, None]


def _matrix(weight: Array, scale: Array | None) -> Array:
    return float_weight(weight, scale).T.copy()


def _conv(bound: _Bound) -> Run:
    """Of integers too: float32 holds every sum of theirs on the way, in any order."""
    _, kh, kw, channels = bound.tensors["weight"].shape
    stride, pad = bound.attr("stride"), bound.attr("pad")
    height, width, filters = bound.out.dims
    taps = kh * kw * channels
    weights = bound.per(_matrix, "weight", "weight_scale")
    biases = bound.per(lambda bias: bias, "bias")
    zeros = bound.per(lambda zero: 0 if zero is None else zero, "zero")
    step = max(1, _PIXELS // (height * width))

    def run(values: Sequence[Array], member: int) -> Array:
        x = framed(_float(values[0]), pad, zeros(member))
        weight, bias = weights(member), biases(member)
        out = np.empty((len(x), height, width, filters), np.float32)
        for start in range(0, len(x), step):
            views = _taps(x[start : start + step], (kh, kw), stride, (height, width))
            columns = np.concatenate(views, axis=-1).reshape(-1, taps)
            part = out[start : start + step].reshape(-1, filters)
            np.matmul(columns, weight, out=part)
            if bias is not None:
                part += bias
        return out if bound.out.kind == "f32" else out.astype(np.int32)

    return run


def framed(x: Array, pad: int, fill: Array | int) -> Array:
    """Maps (B,H,W,C) with so many pixels around them, of 0 or of a number a channel."""
    if not pad:
        return x
    batch, height, width, channels = x.shape
    out = np.empty((batch, height + 2 * pad, width + 2 * pad, channels), x.dtype)
    out[...] = fill
    out[:, pad:-pad, pad:-pad] = x
    return out


def _bconv(bound: _Bound) -> Run:
    _, kh, kw, channels = bound.tensors["weight"].shape
    stride, pad = bound.attr("stride"), bound.attr("pad")
    height, width, filters = bound.out.dims
    step = max(1, _PIXELS // (height * width))
    words = bound.per(_words, "weight")
    window = bound.window()

    def border(weight: Array) -> Array:
        ones = weight.sum(3, dtype=np.int32)
        return window.constants(ones, channels).astype(np.int32)[window.class_of]

    constants = bound.per(border, "weight")

    def run(values: Sequence[Array], member: int) -> Array:
        x = np.pad(values[0], ((0, 0), (pad, pad), (pad, pad), (0, 0))) if pad else values[0]
        weight, constant = words(member), constants(member)
        out = np.empty((len(x), height, width, filters), np.int32)
        for start in range(0, len(x), step):
            views = _taps(x[start : start + step], (kh, kw), stride, (height, width))
            part = out[start : start + step]
            _count_differences(_columns(views), weight, part.reshape(-1, filters))
            part *= -2
            part += constant
        return out

    return run


def _words(weight: Array) -> Array:
    """Booleans (O,kh,kw,C) -> uint64 (words, O): bytes of the taps end to end, then zero bytes."""
    packed = _pack(weight).reshape(len(weight), -1)
    whole = np.zeros((len(weight), -(-packed.shape[1] // 8) * 8), np.uint8)
    whole[:, : packed.shape[1]] = packed
    return np.ascontiguousarray(whole.view(np.uint64).T)


def _columns(views: list[Array]) -> Array:
    """Bytes (B,Ho,Wo,n) of every tap -> uint64 (words, B·Ho·Wo), in the order of `_words`."""
    count = views[0].shape[-1]
    positions = views[0].size // count
    if count % 8 == 0:
        whole = np.empty((len(views), count // 8, *views[0].shape[:3]), np.uint64)
        for tap, view in enumerate(views):
            whole[tap] = np.moveaxis(view.view(np.uint64), -1, 0)
        return whole.reshape(-1, positions)
    wide = np.zeros((positions, -(-len(views) * count // 8) * 8), np.uint8)
    shaped = wide[:, : len(views) * count].reshape(*views[0].shape[:3], len(views), count)
    for tap, view in enumerate(views):
        shaped[:, :, :, tap] = view
    return np.ascontiguousarray(wide.view(np.uint64).T)


def _count_differences(columns: Array, weight: Array, out: Array) -> None:
    """``out[p, o] = sum over words of popcount(columns[word, p] ^ weight[word, o])``."""
    words, positions = columns.shape
    filters = weight.shape[1]
    wide = min(positions, _PIXELS)
    high = min(filters, max(1, _BLOCK // wide))
    mixed = np.empty((3, high, wide), np.uint64)
    ones = np.empty((3, high, wide), np.uint8)
    total = np.empty((high, wide), np.int32)
    for p in range(0, positions, wide):
        for o in range(0, filters, high):
            n, m = min(high, filters - o), min(wide, positions - p)
            for k in range(0, words, 3):  # three words count to 192 at most and fit a byte
                d = min(3, words - k)
                left = columns[k : k + d, None, p : p + m]
                np.bitwise_xor(left, weight[k : k + d, o : o + n, None], out=mixed[:d, :n, :m])
                np.bitwise_count(mixed[:d, :n, :m], out=ones[:d, :n, :m])
                for i in range(1, d):
                    ones[0, :n, :m] += ones[i, :n, :m]
                if k:
                    total[:n, :m] += ones[0, :n, :m]
                else:
                    total[:n, :m] = ones[0, :n, :m]
            out[p : p + m, o : o + n] = total[:n, :m].T


def _prelu(bound: _Bound) -> Run:
    slopes = bound.per(lambda slope: slope, "slope")

    def run(values: Sequence[Array], member: int) -> Array:
        x = _float(values[0])
        return np.where(x >= 0, x, x * slopes(member))

    return run


def _float(x: Array) -> Array:
    return x.astype(np.float32, copy=False)


def _relu(bound: _Bound) -> Run:
    return lambda values, member: np.maximum(_float(values[0]), np.float32(0))


def _clip(bound: _Bound) -> Run:
    low, high = np.float32(bound.node.attrs["low"]), np.float32(bound.node.attrs["high"])
    return lambda values, member: np.clip(_float(values[0]), low, high)


def _sign(bound: _Bound) -> Run:
    return lambda values, member: _pack(values[0] >= 0)


def _comparable(x: Array, level: Array) -> Array:
    """Integers are compared with integers as they are, with floats as floats; both are exact."""
    return x if level.dtype.kind == "i" else _float(x)


def _threshold(bound: _Bound) -> Run:
    levels = bound.per(lambda level: level, "threshold")
    directions = bound.per(_unless_all, "direction")

    def run(values: Sequence[Array], member: int) -> Array:
        level, up = levels(member), directions(member)
        x = _comparable(values[0], level)
        return _pack(x >= level if up is None else np.where(up, x >= level, x <= level))

    return run


def _interval(bound: _Bound) -> Run:
    lows = bound.per(lambda low: low, "low")
    highs = bound.per(lambda high: high, "high")
    insides = bound.per(_unless_all, "inside")

    def run(values: Sequence[Array], member: int) -> Array:
        low, high, keep = lows(member), highs(member), insides(member)
        between = (_comparable(values[0], low) >= low) & (_comparable(values[0], high) <= high)
        return _pack(between if keep is None else between == keep)

    return run


def _unless_all(bits: Array | None) -> Array | None:
    return None if bits is None or bits.all() else bits


def _rescale(bound: _Bound) -> Run:
    scales, shifts, slopes = (bound.per(lambda x: x, slot) for slot in ("scale", "shift", "slope"))
    right, low, high = (bound.attr(name) for name in ("right", "low", "high"))

    def run(values: Sequence[Array], member: int) -> Array:
        x, *more = (value.astype(np.int32) for value in values)
        scale, slope = scales(member).astype(np.int32), slopes(member)
        if slope is not None:
            scale = np.where(x >= 0, scale, slope)
        y = (x * scale + shifts(member)) >> right
        return np.clip(y + more[0] if more else y, low, high)

    return run


def _fixed(bound: _Bound) -> Run:
    unit = 2.0 ** -bound.attr("fraction")
    return lambda values, member: (values[0] * unit).astype(np.float32)


def _add(bound: _Bound) -> Run:
    return lambda values, member: np.add(values[0], values[1], dtype=np.float32)


def _concat(bound: _Bound) -> Run:
    channels = [shape.dims[-1] for shape in bound.inputs]
    if bound.out.kind != "bits":
        dtype = np.float32 if bound.out.kind == "f32" else np.int32
        return lambda values, member: np.concatenate(
            [x.astype(dtype, copy=False) for x in values], axis=-1
        )
    if not any(size % 8 for size in channels[:-1]):
        return lambda values, member: np.concatenate(values, axis=-1)
    return lambda values, member: _pack(
        np.concatenate([_unpack(x, n) for x, n in zip(values, channels, strict=True)], axis=-1)
    )


def _maxpool(bound: _Bound) -> Run:
    kernel, stride, pad = (bound.attr(name) for name in ("kernel", "stride", "pad"))
    out = (bound.out.dims[0], bound.out.dims[1])

    falling = bound.per(lambda up: None if up is None or up.all() else _pack(~up), "direction")

    def largest(x: Array) -> Array:
        larger = np.bitwise_or if x.dtype == np.uint8 else np.maximum  # of eight bits at once
        least = {"f": -np.inf, "i": np.iinfo(np.int32).min, "u": 0}[x.dtype.kind]
        views = _taps(_padded(x, pad, kernel, stride, out, least), (kernel, kernel), stride, out)
        best = views[0].copy()
        for view in views[1:]:
            larger(best, view, out=best)
        return best

    def run(values: Sequence[Array], member: int) -> Array:
        turn = falling(member)
        return largest(values[0]) if turn is None else largest(values[0] ^ turn) ^ turn

    return run


def _averages(bound: _Bound) -> tuple[Run, Array]:
    """The sums over windows, and what an average divides them by, (Ho,Wo,1)."""
    kernel, stride, pad = (bound.attr(name) for name in ("kernel", "stride", "pad"))
    out = (bound.out.dims[0], bound.out.dims[1])
    # What a window divides by: with include_pad also its taps in the padding, but not those that
    # `ceil` adds beyond.
    reach = pad if bound.attr("include_pad") else 0
    size = bound.inputs[0].dims[:2]
    divisor = borders.divisors(size, out, (kernel, kernel), stride, pad, reach)[..., None]

    def sums(values: Sequence[Array], member: int) -> Array:
        padded = _padded(values[0], pad, kernel, stride, out, 0)
        views = _taps(padded, (kernel, kernel), stride, out)
        total = views[0].copy()
        for view in views[1:]:
            total += view
        return total

    return sums, divisor


def _avgpool(bound: _Bound) -> Run:
    sums, divisor = _averages(bound)

    def run(values: Sequence[Array], member: int) -> Array:
        total = sums([_float(values[0])], member)
        total /= divisor
        return total

    return run


def _sumpool(bound: _Bound) -> Run:
    sums, divisor = _averages(bound)
    factor = borders.factors(divisor).astype(np.int32)
    return lambda values, member: sums(values, member) * factor


def _global_avg(bound: _Bound) -> Run:
    return lambda values, member: values[0].mean(axis=(1, 2), dtype=np.float32)


def _global_sum(bound: _Bound) -> Run:
    return lambda values, member: values[0].astype(np.int32).sum((1, 2), np.int32)


def _flatten(bound: _Bound) -> Run:
    return lambda values, member: values[0].transpose(0, 3, 1, 2).reshape(len(values[0]), -1)


def _dense(bound: _Bound) -> Run:
    weights = bound.per(_matrix, "weight", "weight_scale")
    biases = bound.per(lambda bias: bias, "bias")

    def run(values: Sequence[Array], member: int) -> Array:
        out = _float(values[0]) @ weights(member)
        bias = biases(member)
        if bias is not None:
            out += bias
        return out if bound.out.kind == "f32" else out.astype(np.int32)

    return run


_BUILD: dict[str, Callable[[_Bound], Run]] = {
    "normalize": _normalize,
    "conv": _conv,
    "bconv": _bconv,
    "affine": _affine,
    "prelu": _prelu,
    "relu": _relu,
    "clip": _clip,
    "sign": _sign,
    "threshold": _threshold,
    "interval": _interval,
    "add": _add,
    "concat": _concat,
    "maxpool": _maxpool,
    "avgpool": _avgpool,
    "sumpool": _sumpool,
    "global_avg": _global_avg,
    "global_sum": _global_sum,
    "flatten": _flatten,
    "dense": _dense,
    "rescale": _rescale,
    "fixed": _fixed,
}
