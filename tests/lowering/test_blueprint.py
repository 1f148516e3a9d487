"""Programs before training: nothing is allocated, and the bounds hold for files as written."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from bnncore.lowering import blueprint
from bnncore.networks.backbones import BACKBONES, build
from bnncore.networks.ensemble import Ensemble, EnsembleSpec
from bnncore.networks.parts import ModelSpec
from bnncore.networks.sharing import SHARING
from bnncore.packed import packfile
from bnncore.packed import program as P
from bnncore.packed.narrow import narrowed
from bnncore.params import Binarizer, PackParams

IMAGE = (8, 8, 1)


def spec(backbone, width, members, sharing="shared_conv", combine="mean") -> EnsembleSpec:
    model = ModelSpec(backbone, IMAGE, 10, width, binarizer=Binarizer())
    if sharing == "tentaclenet":
        kind = "logits" if backbone in ("nin", "leanplain") else "features"
        return EnsembleSpec(model, members, SHARING[sharing], "sum", kind)
    return EnsembleSpec(model, members, SHARING[sharing], combine)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "width", "members"),
    [("resnet8", 8, 10**6), *((backbone, 10**5, 10**6) for backbone in BACKBONES)],
)
def test_networks_of_any_size_are_drawn_at_once_and_without_memory(backbone, width, members):
    of = spec(backbone, width, members)
    blueprint.draw(spec(backbone, 4, 2))  # what is imported and kept on first use
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that of now
    before, start = _peak(), time.thread_time()
    with torch.device("meta"):
        build(of.model)
        Ensemble(of, ids=(0,))
    drawing = blueprint.draw(of)
    for program in (drawing.most, drawing.least):
        assert program.nodes
    for pack in (PackParams(), PackParams("float16", "int8"), PackParams(integer=True)):
        # Where the maps have more values than a file may ask for, it says so as fast.
        with contextlib.suppress(P.PackedFormatError):
            assert blueprint.file_bound(of, pack) > width * members
    assert time.thread_time() - start < 30  # it took 42 s, and takes 2
    assert _peak() - before < 64 << 20


def _peak() -> int:
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x)
    return 1024 * int(line.split()[1])


def _of_many(drawn: P.Program, members: int, weights: bool, rng) -> P.Program:
    """`drawn` as a Program of so many members, with random values."""

    def values(tensor: P.Tensor) -> P.Tensor:
        shape = P.stored_shape(tensor, members)
        kind = P.KINDS[tensor.kind]
        if tensor.kind == "binary":
            signs = rng.random((members if tensor.own else 1, *tensor.shape)) < 0.5
            data = P.pack_bits(signs if tensor.own else signs[0], tensor.own)
        else:
            data = rng.integers(-9, 9, shape).astype(kind)
        return P.Tensor(tensor.kind, tensor.role, tensor.shape, tensor.own and members > 1, data)

    tensors = {name: values(t) for name, t in drawn.tensors.items()}
    if members == 1:  # as `lower` has it
        for name, t in tensors.items():
            shape = P.stored_shape(t, 1)
            tensors[name] = P.Tensor(t.kind, t.role, t.shape, False, t.data.reshape(shape))
    combined = dict(drawn.combine_tensors)
    if weights:
        combined["weight"] = "c.weight"
        data = rng.random(members).astype(np.float32) + 0.5
        tensors["c.weight"] = P.Tensor("float32", "combine", (members,), False, data)
    classes = tuple(f"class {i}" for i in range(len(drawn.classes)))
    return P.Program(
        drawn.nodes, tensors, members, drawn.combine, drawn.image, classes, combined, {"seed": 3}
    )


@pytest.mark.slow
@pytest.mark.parametrize("members", [1, 2, 9, 10, 99, 100, 999, 1000, 1024])
@pytest.mark.parametrize(
    ("backbone", "width", "sharing", "combine"),
    [
        ("nin", 4, "no_shared", "mean"),
        ("nin", 4, "tentaclenet", "sum"),
        ("fernet", 2, "shared_conv", "soft_vote"),
        ("resnet8", 2, "c2", "hard_vote"),
        ("resnet8", 2, "c3", "sum"),
        ("resnet9", 2, "all_frozen", "mean"),
        ("birealnet18", 1, "c3_blocks", "soft_vote"),
        ("reactnet10", 2, "c1", "mean"),
        ("leanplain", 2, "tentaclenet", "sum"),
        ("leanresnet8", 2, "c3_blocks", "mean"),
    ],
)
def test_bounds_hold_for_files_of_any_number_of_members(backbone, width, sharing, combine, members):
    """Headers and graphs grow with the number of members, by a digit here and there."""
    rng = np.random.default_rng(members)
    of = spec(backbone, width, members, sharing, combine)
    drawing = blueprint.draw(of)
    classes = tuple(f"class {i}" for i in range(10))
    for pack in (PackParams(), PackParams("float16", "int8")):
        least, most = blueprint.file_range(of, pack, classes, {"seed": 3})
        assert most == blueprint.file_bound(of, pack, classes, {"seed": 3})
        for drawn in (drawing.least, drawing.most):
            for weights in {False, combine not in ("mean",) and of.classifier is None}:
                program = _of_many(drawn, members, weights, rng)
                real = len(packfile.encode(narrowed(program, pack)))
                assert least <= real <= most, (pack, weights)
        assert most - real < max(150, 0.05 * real)
