"""The bit-sliced convolution against the evaluator: sizes, borders, thresholds of all kinds."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from bnncore.device import export, sliced
from bnncore.packed import execute
from bnncore.packed.program import Node, Program, Tensor, pack_bits
from bnncore.packed.rules import window
from tests.device.test_export import called, compiled
from tests.graphs import random_images

# height, width, channels, filters, kernel, stride, pad, members
SHAPES = [
    (32, 32, 16, 16, 3, 1, 1, 1),  # a row a word
    (16, 16, 32, 33, 3, 1, 1, 2),
    (8, 8, 64, 64, 3, 1, 1, 1),
    (9, 11, 6, 5, 3, 1, 1, 1),  # words that begin within a row, a last one that is not full
    (5, 3, 2, 40, 5, 1, 2, 2),
    (40, 2, 10, 3, 3, 1, 1, 1),
    (3, 37, 12, 8, 3, 1, 1, 1),
    (32, 32, 16, 32, 3, 2, 1, 1),
    (16, 15, 34, 7, 3, 2, 1, 2),
    (10, 10, 5, 9, 1, 1, 0, 1),  # an odd number of channels, no padding
    (10, 10, 33, 9, 3, 1, 0, 1),
    (12, 7, 8, 8, 2, 3, 1, 1),
    (6, 6, 130, 4, 3, 1, 1, 1),  # more than eight bits a count
]
KINDS = ("sums", "sign", "threshold", "direction", "interval", "inside")


def layer(shape: tuple[int, ...], kind: str, seed: int) -> Program:
    """Bits of the image, one binary layer, and what `kind` makes of its sums, averaged."""
    height, width, channels, filters, kernel, stride, pad, members = shape
    rng = np.random.default_rng(seed)
    products = kernel * kernel * channels
    tensors: dict[str, Tensor] = {}

    def tensor(name: str, kind: str, role: str, data: np.ndarray, own: bool) -> str:
        stored = pack_bits(data, own) if kind == "binary" else data
        tensors[name] = Tensor(kind, role, data.shape[own:], own, stored)
        return name

    def levels(name: str, kind: str = "int16") -> str:
        spread = int(products**0.5) + 1
        found = rng.integers(-spread, spread, (members, filters), endpoint=True)
        found[:, :2] = -products - 1, products + 1  # never and always reached
        return tensor(name, kind, "threshold", found.astype(kind), True)

    def turned(name: str) -> str:
        return tensor(name, "binary", "direction", rng.random((filters,)) < 0.5, False)

    plain = np.ones(channels, "<f4")
    scale = tensor("scale", "float32", "input", plain, False)
    shift = tensor("shift", "float32", "input", -128 * plain, False)
    bits = rng.random((members, filters, kernel, kernel, channels)) < 0.5
    weight = tensor("weight", "binary", "weight", bits, True)
    nodes = [
        Node("normalize", "in", (0,), {"scale": scale, "shift": shift}),
        Node("sign", "in", (1,)),
        Node("bconv", "layer", (2,), {"weight": weight},
             {"stride": stride, "pad": pad, "biases": 0}),
    ]  # fmt: skip
    if kind == "sign":
        nodes.append(Node("sign", "bits", (3,)))
    elif kind in ("threshold", "direction"):
        slots = {"threshold": levels("level", "int32")}
        if kind == "direction":
            slots["direction"] = turned("turned")
        nodes.append(Node("threshold", "bits", (3,), slots))
    elif kind != "sums":
        slots = {"low": levels("low"), "high": levels("high")}
        if kind == "inside":
            slots["inside"] = turned("turned")
        nodes.append(Node("interval", "bits", (3,), slots))
    if kind != "sums":  # each bit, weighted so that no two errors cancel
        ones = rng.random((16, 1, 1, filters)) < 0.5
        last = tensor("last", "binary", "weight", ones, False)
        attrs: dict[str, int | float] = {"stride": 1, "pad": 0, "biases": 0}
        nodes.append(Node("bconv", "last", (4,), {"weight": last}, attrs))
    out = window(height, kernel, stride, pad), window(width, kernel, stride, pad)
    nodes.append(Node("affine", "flat", (len(nodes),)))
    nodes.append(Node("flatten", "flat", (len(nodes),)))
    classes = out[0] * out[1] * (filters if kind == "sums" else 16)
    names = tuple(map(str, range(classes)))
    return Program(tuple(nodes), tensors, members, "sum", (height, width, channels), names)


CASES = [(shape, KINDS[number % len(KINDS)]) for number, shape in enumerate(SHAPES)]
MORE = [case for case in itertools.product(SHAPES, KINDS) if case not in CASES]


@pytest.mark.parametrize(
    ("shape", "kind"), [*CASES, *(pytest.param(*case, marks=pytest.mark.soak) for case in MORE)]
)
def test_a_sliced_layer_gives_the_evaluators_sums_and_bits(tmp_path, monkeypatch, shape, kind):
    monkeypatch.setattr(sliced, "wins", lambda *_: True)
    program = layer(shape, kind, sum(shape))
    images = random_images(program, 3)
    made = export.generate(program, "net")
    assert "bnn_count" in made.source
    _, scores = called(compiled(made, tmp_path), program, images, program.members)
    assert (scores == execute.Model(program, "numpy")(images, program.members)).all()


def test_odd_channels_with_padding_are_never_sliced():
    assert not sliced.wins((64, 3, 3, 63), 1, (32, 32, 64))
    assert sliced.wins((64, 3, 3, 64), 1, (32, 32, 64))


def test_a_map_of_one_pixel_is_not_sliced():
    assert not sliced.wins((64, 1, 1, 64), 0, (1, 1, 64))
