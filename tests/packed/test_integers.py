"""Programs of floats as ones of integers: what they compute, and that all kernels agree exactly."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from bnncore.lowering.lower import lower
from bnncore.networks.sharing import SHARING
from bnncore.packed import execute, integers, packfile, votes
from bnncore.packed.program import KINDS, Program, Tensor
from bnncore.packed.rules import validate
from tests import tiny
from tests.graphs import random_images, random_program

BACKBONES = ("nin", "fernet", "resnet8", "resnet9", "birealnet18", "reactnet10", "leanresnet8",
             "leanplain")  # fmt: skip
OPS = ("numpy", "compiled", "torch")


def network(backbone: str, sharing: str = "shared_conv", combine: str = "mean") -> Program:
    classifier = None
    if sharing == "tentaclenet":
        combine, classifier = "sum", "features"
    ensemble = tiny.ensemble(2, sharing, combine, backbone=backbone, classifier=classifier)
    tiny.scramble(ensemble)
    return lower(ensemble, (0.4,), (0.3,), tuple("abcd"))


def whole(program: Program, images: np.ndarray) -> Program:
    return integers.converted(program, integers.ranges(program, images))


def scores(program: Program, images: np.ndarray) -> list[np.ndarray]:
    """Of all kernels."""
    return [execute.Model(program, ops)(images) for ops in OPS]


CASES = [
    *((backbone, "shared_conv", "mean") for backbone in BACKBONES),
    *(("resnet8", sharing, "mean") for sharing in SHARING if sharing != "shared_conv"),
    ("leanresnet8", "no_shared", "soft_vote"), ("leanresnet8", "no_shared", "hard_vote"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("backbone", "sharing", "combine"), CASES)
def test_networks(backbone, sharing, combine):
    program = network(backbone, sharing, combine)
    images = random_images(program, 64)
    made = whole(program, images)
    shapes = validate(made)
    kinds = {shape.kind for shape in shapes[:-1]}
    assert kinds == {"u8", "i32", "bits"}, "no floats but the outputs"
    assert all(t.kind in ("int8", "int16", "int32", "binary") or t.role == "combine"
               for t in made.tensors.values())  # fmt: skip
    first, *others = scores(made, images)
    assert all((first == other).all() for other in others)
    # What is lost: a sign near 0 may flip, and change what follows.
    before = execute.Model(program, "numpy")
    correlation = np.corrcoef(before(images).ravel(), first.ravel())[0, 1]
    assert correlation > 0.97
    assert len(packfile.encode(made)) < 1.1 * len(packfile.encode(program))


@pytest.mark.parametrize("seed", range(12))
def test_random_programs(seed):
    program = random_program(seed, sort=("integers", "floats")[seed % 2])
    images = random_images(program, 16, seed)
    if program.nodes[-1].op != "fixed":
        program = whole(program, images)
    first, *others = scores(program, images)
    assert all((first == other).all() for other in others)


def test_numbers_in_front_of_their_signs_are_those_of_floats():
    """Without layers of floats behind the image nothing is rounded: all bits are the same."""
    program = network("nin")
    images = random_images(program, 16)
    converter = integers._Converter(program, integers.ranges(program, images))
    made = converter.run()
    assert [node.op for node in made.nodes[:2]] == ["conv", "threshold"], "thresholds of sums"


def weighted(combine: str, weights: list[float], bias: bool = False) -> Program:
    program = network("leanresnet8", "no_shared", combine)
    weight = Tensor("float32", "combine", (2,), False, np.array(weights, "<f4"))
    tensors = {**program.tensors, "w": weight}
    slots = {"weight": "w"}
    if bias:
        slots["bias"] = "b"
        values = np.array([0.3, -2.0, 1.7, 0.0], KINDS["float32"])
        tensors["b"] = Tensor("float32", "combine", (4,), False, values)
    return replace(program, combine=combine, combine_tensors=slots, tensors=tensors)


@pytest.mark.parametrize("combine", ["sum", "soft_vote", "hard_vote"])
@pytest.mark.parametrize("weights", [[0.7, 1.3], [1e-6, 3.0], [123.4, 0.1]])
def test_weights_are_folded_in_or_whole_parts(combine, weights):
    program = weighted(combine, weights, combine == "sum")
    images = random_images(program, 64)
    made = whole(program, images)
    first, *others = scores(made, images)
    assert all((first == other).all() for other in others)
    spread = np.abs(execute.Model(program)(images)).max()
    assert np.median(np.abs(execute.Model(program)(images) - first)) < 0.02 * spread
    assert ("weight" in made.combine_tensors) == (combine != "sum")


def test_table_softmax_is_a_softmax():
    z = np.random.default_rng(0).normal(0, 3, (50, 10))
    z = np.rint(z * 2**8) / 2**8
    for fraction in (8, 12):
        assert np.abs(votes.table_softmax(z, fraction) - votes.softmax(z)).max() < 0.004


def test_sums_that_do_not_fit_name_their_layer():
    program = network("resnet8")
    node = program.nodes[-1]
    with pytest.raises(integers.IntegerError, match="outputs of ordinary size"):
        integers.converted(program, [1.0] * len(program.nodes) + [1e9])
    assert node.op == "dense"
