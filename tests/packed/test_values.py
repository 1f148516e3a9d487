"""Infinities, NaN, zeros of both signs, denormals and huge numbers: all kernels agree, in chains.

Every sum here is exact in float32 in any order (powers of two, each filter picks one channel), so
that agreement is equality. A weight of 0 still makes NaN of an infinity.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from bnncore.lowering import torch_kernels
from bnncore.packed import compiled_kernels, execute, numpy_kernels
from bnncore.packed.program import KINDS, Node, Program, Tensor, pack_bits
from bnncore.packed.rules import validate

SIDE = 4
KERNELS = {
    "numpy": numpy_kernels.plan,
    "torch": torch_kernels.plan,
    **{tile: partial(compiled_kernels.plan, tile=tile) for tile in compiled_kernels.available()},
}

# What `Chain.start` makes of an image, by channel modulo 5: x in {-128, -1, 0, 1, 127} times
HUGE = 1.5 * 2.0**121  # times 127 is infinity; sums of these do not overflow
SCALES = (HUGE, 2.0**-138, 1.0, HUGE, -HUGE)  # and channel 3 has inf - inf
PIXELS = np.array([0, 127, 128, 129, 255], np.uint8)


class Chain:
    """A Program that grows by one operator at a time, on maps of one number of channels."""

    def __init__(self, channels: int) -> None:
        self.channels, self.side, self.integers = channels, SIDE, False
        self.nodes: list[Node] = []
        self.tensors: dict[str, Tensor] = {}
        scale = np.resize(np.array(SCALES, np.float32), channels)
        other = np.where(np.arange(channels) % 5 == 3, -scale, np.float32(0))
        one, shift = np.ones(channels), np.full(channels, -128.0)
        self.add("normalize", 0, scale=self.floats("input", one), shift=self.floats("input", shift))
        self.add("affine", 1, scale=self.floats("scale", scale))
        self.add("affine", 1, scale=self.floats("scale", other))
        self.add("add", 2, 3)

    def add(self, op: str, *inputs: int, **rest: str | float) -> None:
        slots = {key: value for key, value in rest.items() if isinstance(value, str)}
        attrs = {key: value for key, value in rest.items() if not isinstance(value, str)}
        if op == "conv" and self.integers:  # takes none
            self.add("affine")
        self.integers = op == "bconv" or (op in ("maxpool", "concat") and self.integers)
        self.nodes.append(Node(op, op, inputs or (len(self.nodes),), slots, attrs))

    def floats(self, role: str, data: np.ndarray, kind: str = "float32") -> str:
        name = f"t{len(self.tensors)}"
        stored = pack_bits(data > 0, False) if kind == "binary" else data.astype(KINDS[kind])
        self.tensors[name] = Tensor(kind, role, data.shape, False, stored)
        return name

    def cycle(self, role: str, *values: float, kind: str = "float32") -> str:
        """One value a channel, in turn; five of them go with the `SCALES`."""
        return self.floats(role, np.resize(np.array(values), self.channels), kind)

    def filters(self, size: int) -> str:
        """Each filter adds up one channel's taps, with signs, and all others' times 0."""
        weight = np.zeros((self.channels, size, size, self.channels))
        for k in range(self.channels):
            weight[k, :, :, k] = np.resize([0.25, -0.25, 0.125, 0], (size, size))
        return self.floats("weight", weight)

    def bits(self) -> None:
        """From bits back to numbers, one filter a channel, padded."""
        shape = (self.channels, 3, 3, self.channels)
        weight = np.random.default_rng(0).normal(size=shape)
        self.add("bconv", weight=self.floats("weight", weight, "binary"), stride=1, pad=1, biases=0)

    def finish(self) -> Program:
        self.add("affine")  # integers to floats
        self.add("flatten")
        count = self.side * self.side * self.channels
        names = tuple(str(number) for number in range(count))
        image = (SIDE, SIDE, self.channels)
        program = Program(tuple(self.nodes), self.tensors, 1, "mean", image, names)
        validate(program)
        return program


def shrink(chain: Chain, op: str, **more: int) -> None:
    if chain.side > 1:
        chain.add(op, kernel=2, stride=2, pad=0, ceil=0, **more)
        chain.side //= 2


def level(chain: Chain, op: str, **slots: str) -> None:
    chain.add(op, **slots)
    chain.bits()


OPERATORS = {
    "nothing": lambda chain: None,
    "affine": lambda c: c.add(
        "affine", scale=c.cycle("scale", 0.5, 0, -1), shift=c.cycle("shift", 0, 0, 1, 0, 0)
    ),
    "prelu": lambda c: c.add("prelu", slope=c.cycle("slope", 0.5, 0, -0.5)),
    "prelu of 0": lambda c: c.add("prelu", slope=c.floats("slope", np.zeros(1))),
    "relu": lambda c: c.add("relu"),
    "clip": lambda c: c.add("clip", low=-(2.0**121), high=2.0**121),
    "sign": lambda c: level(c, "sign"),
    "threshold": lambda c: level(
        c, "threshold", threshold=c.cycle("threshold", 0, -1, HUGE),
        direction=c.cycle("direction", 1, 0, kind="binary"),
    ),
    "interval": lambda c: level(
        c, "interval", low=c.cycle("threshold", -1, 0, -HUGE),
        high=c.cycle("threshold", 1, 0, HUGE),
        inside=c.cycle("direction", 1, 0, kind="binary"),
    ),
    "add itself": lambda c: c.add("add", len(c.nodes), len(c.nodes)),
    "subtract": lambda c: (
        c.add("affine", scale=c.floats("scale", -np.ones(c.channels))),
        c.add("add", len(c.nodes), len(c.nodes) - 1),
    ),
    "concat": lambda c: (
        c.add("concat", len(c.nodes), len(c.nodes)),
        c.add("conv", weight=c.floats("weight", np.eye(c.channels, 2 * c.channels)[:, None, None]),
              stride=1, pad=0),
    ),
    "conv 1x1": lambda c: c.add("conv", weight=c.filters(1), stride=1, pad=0),
    "conv 3x3": lambda c: c.add(
        "conv", weight=c.filters(3), bias=c.cycle("bias", 0, 0, 1, 0, 0), stride=1, pad=1
    ),
    "maxpool": lambda c: shrink(c, "maxpool"),
    "maxpool over the edge": lambda c: c.add("maxpool", kernel=3, stride=1, pad=1, ceil=0),
    "avgpool": lambda c: shrink(c, "avgpool", include_pad=0),
}  # fmt: skip
HEADS = {
    "global_avg": lambda c: c.add("global_avg"),
    "flatten": lambda c: c.add("flatten"),
}


def images(channels: int) -> np.ndarray:
    """Some with every value, some with few infinities or none, so that they are seen apart."""
    rng = np.random.default_rng(0)
    shape = (SIDE, SIDE, channels)
    odd = [rng.choice(PIXELS, shape, p=[rare / 2, *[(1 - rare) / 3] * 3, rare / 2])
           for rare in (0.0, 0.03, 0.03, 0.1, 0.4)]  # fmt: skip
    return np.stack(odd)


def run(steps: list, x: np.ndarray) -> np.ndarray:
    (output,) = steps[-1].outputs
    return execute.every_value(steps, x)[output]


def check(program: Program, what: str) -> np.ndarray:
    x = images(program.image[2])
    results = {}
    with np.errstate(all="ignore"):
        for name, plan in KERNELS.items():
            steps = plan(program)
            results[name] = run(steps, x)
            alone = run(steps, x[-2:-1])
            np.testing.assert_array_equal(alone, results[name][-2:-1], err_msg=f"{what}, {name}")
    for name, result in results.items():
        np.testing.assert_array_equal(result, results["numpy"], err_msg=f"{what}, {name}")
    return results["numpy"]


@pytest.mark.parametrize("channels", [5, 16, 37])
def test_what_the_chains_begin_with(channels: int) -> None:
    """The values that this file is about do occur."""
    z = check(Chain(channels).finish(), "the beginning")
    finite = np.abs(z[np.isfinite(z)])
    kinds = {
        "NaN": np.isnan(z),
        "inf": np.isposinf(z),
        "-inf": np.isneginf(z),
        "denormal": (finite > 0) & (finite < np.finfo(np.float32).tiny),
        "huge": finite > 1e36,
        "zero": finite == 0,
    }
    assert [name for name, found in kinds.items() if not found.any()] == []


@pytest.mark.slow
@pytest.mark.parametrize("first", OPERATORS)
def test_chains_of_two(first: str) -> None:
    for number, second in enumerate(OPERATORS):
        channels = (5, 37)[(number + list(OPERATORS).index(first)) % 2]
        chain = Chain(channels)
        OPERATORS[first](chain)
        OPERATORS[second](chain)
        check(chain.finish(), f"{first}, {second}, {channels} channels")


@pytest.mark.slow
def test_longer_chains() -> None:
    rng = np.random.default_rng(1)
    for _ in range(100):
        names = rng.permutation(list(OPERATORS))[:5]
        chain = Chain(int(rng.choice([5, 16, 32, 37])))
        for name in names:
            OPERATORS[name](chain)
        check(chain.finish(), ", ".join(names))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("first", OPERATORS)
def test_heads(first: str, head: str) -> None:
    chain = Chain(5)
    OPERATORS[first](chain)
    chain.add("affine")
    HEADS[head](chain)
    size = chain.channels * (chain.side**2 if head == "flatten" else 1)
    chain.add("dense", weight=chain.floats("weight", np.eye(7, size)))
    names = tuple("abcdefg")
    program = Program(tuple(chain.nodes), chain.tensors, 1, "mean", (SIDE, SIDE, 5), names)
    check(program, f"{first}, {head}, dense")
