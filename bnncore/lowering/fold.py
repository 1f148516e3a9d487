"""Chains of per-channel functions in front of a sign, as thresholds.

A fold is exact by construction, not by algebra: where the chain starts at a popcount, the chain's
own torch modules are evaluated at every integer that can occur; where it starts at a float, the
threshold is the very float32 at which those modules change sign, found by bisection over the
ordered floats. So a negative batch-norm scale flips the direction, a negative PReLU slope gives an
interval, a scale of 0 a channel that is always on or off, and no bit differs from torch given the
same finite input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from bnncore.lowering.draft import Arrays, Draft, LowerError
from bnncore.packed import program as P

FLOAT_MAX = float(np.finfo(np.float32).max)
LARGEST = 2.0**24  # of the values for which a chain must not give NaN

Folded = tuple[str, dict[str, Arrays]]  # op and tensors
Turned = Callable[[list[Draft]], dict[str, Arrays] | None]


def fold(
    drafts: list[Draft],
    folded: Callable[[Draft, list[Draft]], Folded | None],
    turned: Turned,
) -> None:
    """Turn each sign, with the chain of per-channel functions in front of it, into a threshold.

    Args:
        folded: what becomes of a source and the chain behind it, or None where it stays.
        turned: the slots of a max pooling of bits that takes the place of one in front of a chain,
            or None where it stays.
    """
    for draft in list(drafts):
        if draft.op == "sign":
            _before_pool(drafts, draft, turned)
    for draft in list(drafts):
        if draft.op != "sign":
            continue
        chain, source = _chain(draft)
        found = folded(source, chain) if chain else None
        if found is None:
            continue
        draft.op, draft.tensors = found
        draft.inputs = [source]
        draft.shared = not _own(chain)
        for link in chain:
            drafts.remove(link)


def _before_pool(drafts: list[Draft], sign: Draft, turned: Turned) -> None:
    """Take a sign, and the functions of each channel in front of it, in front of the max pooling
    that they stand behind.

    Where they rise, the largest of some values gives 1 where any of them does; where they fall,
    where all of them do. Rounding keeps the order, so that this is exact. Bits are pooled instead
    of numbers: a thirty-second of the memory, and what comes before the pooling can fold.
    """
    chain, pool = _chain(sign)
    if pool.op != "maxpool" or pool.uses > 1 or pool.inputs[0].uses > 1:
        return
    slots = turned(chain)
    if slots is None:
        return
    before = pool.inputs[0]
    # What uses the sign has to find bits of the pooled size there, so that the two change places.
    for name in ("op", "name", "attrs"):
        mine, other = getattr(sign, name), getattr(pool, name)
        setattr(sign, name, other)
        setattr(pool, name, mine)
    pool.shared, sign.shared = sign.shared, not _own(chain)
    sign.tensors = slots
    drafts.remove(pool)
    drafts.insert(drafts.index(sign), pool)
    if chain:
        chain[0].inputs = [before]
    pool.inputs, sign.inputs = [chain[-1] if chain else before], [pool]
    _before_pool(drafts, pool, turned)


def _chain(sign: Draft) -> tuple[list[Draft], Draft]:
    """The functions of each channel in front of a sign, and what they work on."""
    chain: list[Draft] = []
    source = sign.inputs[0]
    while source.modules is not None and source.uses == 1:
        chain.insert(0, source)
        source = source.inputs[0]
    return chain, source


def directions(members: int, chain: list[Draft]) -> dict[str, Arrays] | None:
    """The slots of a max pooling of the bits of a chain, of each member where one of its links is
    own; None where a link neither rises nor falls."""
    found = []
    for m in range(members if _own(chain) else 1):
        rising = _rising(chain, m)
        if rising is None:
            return None
        found.append(rising)
    if all(rising.all() for rising in found):
        return {}
    return {"direction": ("direction", "binary", [np.ascontiguousarray(r) for r in found])}


def _own(chain: list[Draft]) -> bool:
    return any(not link.shared and link.tensors for link in chain)


def level_kind(source: Draft) -> str:
    """The smallest kind that holds the thresholds of a binary convolution's sums -K..K."""
    weight = source.tensors["weight"][2][0]
    return "int16" if weight[0].size + 1 < 2**15 else "int32"


def channels(chain: list[Draft]) -> int | None:
    """How many channels a chain has; None where nothing in it tells."""
    sizes = [
        arrays[0].shape[0]
        for link in chain
        for _, _, arrays in link.tensors.values()
        if link.op == "affine" or arrays[0].shape[0] > 1  # one slope may serve all channels
    ]
    return max(sizes, default=None)


def thresholds(members: int, source: Draft, chain: list[Draft]) -> Folded | None:
    """The exact thresholds of a chain, of each member where one of its links is own.

    Raises:
        LowerError: the chain gives NaN for ordinary inputs; names its last layer.
    """
    functions = [
        [link.modules[m] for link in chain if link.modules]
        for m in range(members if _own(chain) else 1)
    ]
    if source.op == "bconv":
        return _integer_thresholds(functions, source, chain[-1].name)
    return _float_thresholds(functions, chain)


# -- chains behind popcounts ---------------------------------------------------------------------


def _integer_thresholds(
    functions: list[list[nn.Module]], source: Draft, name: str
) -> Folded | None:
    """Evaluate the chain at every popcount -K..K and read off thresholds or intervals.

    Returns None where a channel changes sign more than twice.
    """
    weight = source.tensors["weight"][2][0]
    k = int(weight[0].size)
    points = torch.arange(-k, k + 1, dtype=torch.float32)
    grid = points.view(1, 1, -1, 1).expand(1, len(weight), -1, 1).contiguous()
    lows, highs, insides = [], [], []
    for m, function in enumerate(functions):
        values = nn.Sequential(*function)(grid)[0, :, :, 0]
        _check_numbers(values, m, name)
        bits = (values >= 0).numpy()  # (channels, 2K+1)
        changes = (bits[:, 1:] != bits[:, :-1]).sum(1)
        if changes.max(initial=0) > 2:
            return None
        # The run of equal bits that is bounded on both sides, or the rising end.
        inside = np.where(changes == 2, ~bits[:, 0], True)
        run = bits == inside[:, None]
        first = np.where(run.any(1), run.argmax(1), 2 * k + 1)
        last = np.where(run.any(1), 2 * k - run[:, ::-1].argmax(1), 2 * k)
        lows.append(first - k)
        highs.append(last - k)
        insides.append(inside)
    one_sided = all(
        (i & ((hi == k) | (lo == -k))).all() for lo, hi, i in zip(lows, highs, insides, strict=True)
    )
    kind = level_kind(source)
    if one_sided:
        rising = [hi == k for hi in highs]
        limits = [np.where(r, lo, hi) for r, lo, hi in zip(rising, lows, highs, strict=True)]
        return _threshold(kind, limits, rising)
    dtype = P.KINDS[kind]
    tensors: dict[str, Arrays] = {
        "low": ("threshold", kind, [lo.astype(dtype) for lo in lows]),
        "high": ("threshold", kind, [hi.astype(dtype) for hi in highs]),
    }
    if not all(i.all() for i in insides):
        tensors["inside"] = ("direction", "binary", insides)
    return "interval", tensors


def _threshold(kind: str, limits: list[np.ndarray], rising: list[np.ndarray]) -> Folded:
    levels = [limit.astype(P.KINDS[kind]) for limit in limits]
    tensors: dict[str, Arrays] = {"threshold": ("threshold", kind, levels)}
    if not all(r.all() for r in rising):
        tensors["direction"] = ("direction", "binary", rising)
    return "threshold", tensors


def _check_numbers(values: Tensor, member: int, name: str) -> None:
    if values.isnan().any():
        raise LowerError(
            f"layer {name!r} of member {member}: expected numbers in front of its sign, got NaN "
            "for ordinary inputs: values overflow there"
        )


# -- chains behind floats ------------------------------------------------------------------------


def _float_thresholds(functions: list[list[nn.Module]], chain: list[Draft]) -> Folded | None:
    """Bisect the ordered float32 numbers for the one at which the chain's sign changes."""
    count = channels(chain)
    if count is None:
        return None
    limits, directions = [], []
    for m, function in enumerate(functions):
        slopes = _rising(chain, m)
        if slopes is None:
            return None
        rising = np.broadcast_to(slopes, (count,))
        for ordinary in (-LARGEST, -1.0, 0.0, 1.0, LARGEST):
            values = nn.Sequential(*function)(_map(np.full(count, ordinary)))
            _check_numbers(values, m, chain[-1].name)

        def bits(keys: np.ndarray, function: Sequence[nn.Module] = function) -> np.ndarray:
            return (_numbers(function, _map(_floats(keys)))[0, :, 0, 0] >= 0).numpy()

        top = _keys(np.float32(FLOAT_MAX))
        low = np.full(count, -top)  # the last known key on the lower side of the change
        high = np.full(count, top)
        at_low, at_high = bits(low), bits(high)
        while (high - low > 1).any():
            middle = low + (high - low) // 2
            there = bits(middle) == at_high
            high = np.where(there, middle, high)
            low = np.where(there, low, middle)
        limit = _floats(np.where(rising, high, low))
        end = np.where(rising == at_high, -FLOAT_MAX, FLOAT_MAX)  # always, or never
        limits.append(np.where(at_low == at_high, end, limit))
        directions.append(np.ascontiguousarray(rising))
    return _threshold("float32", limits, directions)


def _map(x: np.ndarray) -> Tensor:
    """(1, C, 4, 4) of C values: beside copies, so that torch takes the path of whole maps."""
    values = torch.from_numpy(x.astype(np.float32)).view(1, -1, 1, 1)
    return values.expand(1, -1, 4, 4).contiguous()


def _numbers(function: Sequence[nn.Module], x: Tensor) -> Tensor:
    """The chain's values, but where infinity times 0 gives NaN what the largest number gives.

    The largest inputs overflow in a scale above 1; a scale or slope of 0 behind it is a constant
    all the same.
    """
    for module in function:
        y = module(x)
        if y.isnan().any():
            y = torch.where(y.isnan(), module(x.clamp(-FLOAT_MAX, FLOAT_MAX)), y)
        x = y
    return x


def _rising(chain: list[Draft], m: int) -> np.ndarray | None:
    """Per channel: whether the chain's function rises; None where one link is not monotone."""
    rising: np.ndarray | bool = True
    for link in chain:
        if link.op == "affine" and "scale" in link.tensors:
            scales = link.tensors["scale"][2]
            rising = rising == (scales[m if len(scales) > 1 else 0] >= 0)
        elif link.op == "prelu":
            slopes = link.tensors["slope"][2]
            if (slopes[m if len(slopes) > 1 else 0] < 0).any():
                return None
    return np.asarray(rising)


def _keys(x: np.ndarray | np.float32) -> np.ndarray:
    """Finite float32 to int64 keys in the same order; -0.0 and 0.0 share key 0."""
    i = np.asarray(x, np.float32).view(np.int32).astype(np.int64)
    return np.where(i >= 0, i, -(i & 0x7FFFFFFF))


def _floats(keys: np.ndarray) -> np.ndarray:
    i = np.where(keys >= 0, keys, (-keys) | 0x80000000).astype(np.uint32)
    return i.view(np.float32)
