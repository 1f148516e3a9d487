"""`validate` infers shapes and refuses what cannot run, naming it; windows agree with torch."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bnncore.packed import costs, execute, numpy_kernels
from bnncore.packed.program import (
    KINDS,
    Node,
    PackedFormatError,
    Program,
    Shape,
    Tensor,
    pack_bits,
    unpack_bits,
)
from bnncore.packed.rules import validate, window
from tests.graphs import programs, random_images


def small(**changes) -> Program:
    """Two members: a shared first convolution, own binary weights, own dense layer."""
    rng = np.random.default_rng(0)

    def floats(role, own, *shape):
        data = rng.normal(size=(2, *shape) if own else shape).astype(np.float32)
        return Tensor("float32", role, shape, own, data)

    def bits(role, own, *shape):
        data = pack_bits(rng.random((2, *shape) if own else shape) < 0.5, own)
        return Tensor("binary", role, shape, own, data)

    tensors = {
        "in.scale": floats("input", False, 3),
        "in.shift": floats("input", False, 3),
        "conv": floats("weight", False, 5, 3, 3, 3),
        "threshold": floats("threshold", False, 5),
        "bconv": bits("weight", True, 7, 3, 3, 5),
        "dense": floats("weight", True, 4, 7),
    }
    nodes = (
        Node("normalize", "input", (0,), {"scale": "in.scale", "shift": "in.shift"}),
        Node("conv", "conv1", (1,), {"weight": "conv"}, {"stride": 1, "pad": 1}),
        Node("threshold", "bn1", (2,), {"threshold": "threshold"}),
        Node("bconv", "conv2", (3,), {"weight": "bconv"}, {"stride": 2, "pad": 1, "biases": 0}),
        Node("global_avg", "pool", (4,)),
        Node("dense", "fc", (5,), {"weight": "dense"}),
    )
    program = Program(nodes, tensors, 2, "mean", (8, 6, 3), ("a", "b", "c", "d"))
    return replace(program, **changes)


def with_node(index: int, **changes) -> Program:
    program = small()
    nodes = list(program.nodes)
    nodes[index] = replace(nodes[index], **changes)
    return replace(program, nodes=tuple(nodes))


def with_tensor(name: str, **changes) -> Program:
    program = small()
    return replace(
        program, tensors={**program.tensors, name: replace(program.tensors[name], **changes)}
    )


def test_shapes_kinds_and_who_owns_them():
    assert validate(small()) == [
        Shape("u8", (8, 6, 3), False, 255),
        Shape("f32", (8, 6, 3), False),
        Shape("f32", (8, 6, 5), False),
        Shape("bits", (8, 6, 5), False),
        Shape("i32", (4, 3, 7), True, 3 * 3 * 5),
        Shape("f32", (7,), True),
        Shape("f32", (4,), True),
    ]


NO_PAD = {"stride": 1, "pad": 0}
NAN = np.full((5,), np.nan, np.float32)


def with_int8(scale):
    shape = small().tensors["dense"].shape
    weight = Tensor("int8", "weight", shape, True, np.ones((2, *shape), np.int8))
    scales = Tensor("float32", "weight_scale", shape[:1], False, np.full(shape[0], scale, "f4"))
    node = replace(small().nodes[-1], tensors={"weight": "dense", "weight_scale": "s"})
    tensors = {**small().tensors, "dense": weight, "s": scales}
    return small(nodes=(*small().nodes[:-1], node), tensors=tensors)


WRONG = {
    "no members": (small(members=0), "members: expected an integer from 1"),
    "too many": (small(members=3), "'bconv': expected data of shape"),
    "image": (small(image=(8, 6)), "image: expected"),
    "image size": (small(image=(8, 0, 3)), "image W: expected"),
    "classes": (small(classes=("a",)), "last node's output: expected"),
    "a class twice": (small(classes=("a", "b", "c", "a")), "class name: expected each once"),
    "a class without a name": (small(classes=("a", "b", "c", "")), "class name: expected at least"),
    "control characters": (small(classes=("a", "b", "c", "\x1b[2J")), "class name: expected"),
    "combine": (small(combine="median"), "combine: expected mean, sum"),
    "combine slot": (small(combine_tensors={"weight": "conv"}), "combine mean weight"),
    "info": (small(info={"x": float("inf")}), "info 'x': expected a finite number"),
    "no nodes": (small(nodes=()), "nodes: expected 1 to"),
    "cycle": (with_node(2, inputs=(3,)), "bn1.* input: expected an integer from 0 to 2, got 3"),
    "forward": (with_node(1, inputs=(6,)), "conv1.* input: expected an integer from 0 to 1"),
    "input kind": (with_node(3, inputs=(2,)), "conv2.* expected .*bits.*, got f32"),
    "inputs": (with_node(4, inputs=(4, 4)), "pool.* expected 1 inputs, got 2"),
    "operator": (with_node(4, op="softmax"), "pool.*expected a known operator, got softmax"),
    "missing": (with_node(2, tensors={}), "bn1.* threshold: expected a tensor, got none"),
    "unknown": (with_node(2, tensors={"threshold": "x"}), "expected a tensor of the table, got x"),
    "slot": (with_node(4, tensors={"bias": "threshold"}), "pool.*also \\['bias'\\]"),
    "attribute": (with_node(4, attrs={"x": 1}), "pool.*also \\['x'\\]"),
    "stride": (with_node(1, attrs={"stride": 0, "pad": 1}), "stride: expected an integer from 1"),
    "stride kind": (with_node(1, attrs={"stride": 1.0, "pad": 1}), "stride: expected an integer"),
    "pad": (with_node(1, attrs={"stride": 1, "pad": 3}), "pad: expected an integer from 0 to 2"),
    "no window": (
        small(image=(2, 9, 3), nodes=(small().nodes[0], replace(small().nodes[1], attrs=NO_PAD))),
        "conv1.*expected a map of at least 3x3, got 2x9",
    ),
    "slot shape": (with_node(1, tensors={"weight": "dense"}), "conv1.* weight: expected shape"),
    "slot kind": (with_node(3, tensors={"weight": "conv"}), "conv2.* weight: expected"),
    "unused": (
        small(tensors={**small().tensors, "x": small().tensors["conv"]}),
        "tensors: expected every one in use, got unused \\['x'\\]",
    ),
    "NaN": (with_tensor("threshold", data=NAN), "'threshold': expected finite numbers"),
    "infinity": (with_tensor("threshold", data=-NAN * 0 + np.inf), "'threshold': expected finite"),
    "dtype": (with_tensor("threshold", data=np.zeros(5)), "'threshold': expected float32, got"),
    "data shape": (with_tensor("threshold", data=np.zeros(6, "f4")), "data of shape \\(5,\\)"),
    "kind": (with_tensor("threshold", kind="float64"), "expected a kind of binary"),
    "role": (with_tensor("threshold", role="thing"), "expected a role of weight"),
    "size": (with_tensor("threshold", shape=(0,)), "'threshold': expected an integer from 1"),
    "spare bits": (
        with_tensor("bconv", data=np.full((2, 40), 255, np.uint8)),
        "'bconv': expected spare bits of 0",
    ),
    "infinite weights": (
        with_int8(1e37),
        "dense.* weight_scale: expected finite weights, got 9.9",
    ),
    "integer levels of floats": (
        with_tensor("threshold", kind="int16", data=np.zeros(5, "<i2")),
        "bn1.* threshold: expected .*float32.*, got int16",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_run_is_refused_by_name(case):
    program, message = WRONG[case]
    with pytest.raises(PackedFormatError, match=message):
        validate(program)


def test_votes_need_a_first_member_that_counts():
    weight = Tensor("float32", "combine", (2,), False, np.array([0, 1], np.float32))
    tensors = {**small().tensors, "w": weight}
    for combine in ("soft_vote", "hard_vote"):
        program = small(combine=combine, tensors=tensors, combine_tensors={"weight": "w"})
        with pytest.raises(PackedFormatError, match="the first above 0"):
            validate(program)
    validate(small(combine="sum", tensors=tensors, combine_tensors={"weight": "w"}))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 4), st.data())
def test_windows_are_torchs(size, kernel, stride, data):
    pad = data.draw(st.integers(0, kernel // 2))
    x = torch.zeros(1, 1, size, size)
    for ceil in (0, 1):
        count = window(size, kernel, stride, pad, ceil)
        if size + 2 * pad < kernel:
            assert count == 0
        else:
            out = torch.nn.functional.max_pool2d(x, kernel, stride, pad, ceil_mode=bool(ceil))
            assert out.shape[2] == count


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 3), st.lists(st.integers(1, 7), min_size=1, max_size=4), st.booleans())
def test_bits_pack_and_unpack(members, shape, own):
    rng = np.random.default_rng(0)
    signs = rng.random((members, *shape) if own else shape) < 0.5
    tensor = Tensor("binary", "weight", tuple(shape), own, pack_bits(signs, own))
    assert np.array_equal(unpack_bits(tensor), signs)
    first = signs.reshape(members if own else 1, -1)[:, 0]
    assert np.array_equal(tensor.data.reshape(len(first), -1)[:, 0] & 1, first)


@settings(max_examples=40, deadline=None)
@given(programs())
def test_inferred_shapes_are_those_that_come_out(program):
    shapes = validate(program)
    dtypes = {"f32": np.float32, "i32": np.int32, "bits": np.uint8}
    steps = numpy_kernels.plan(program)
    values = execute.every_value(steps, random_images(program, 2))
    for number, (step, shape) in enumerate(zip(steps, shapes[1:], strict=True), 1):
        value = values[number]
        last = -(-shape.dims[-1] // 8) if shape.kind == "bits" else shape.dims[-1]
        assert value.shape == (2, *shape.dims[:-1], last)
        assert value.dtype == dtypes[shape.kind]
        assert (step.outputs, step.own) == ((number,), shape.own)
    assert KINDS.keys() == {"binary", "float32", "float16", "int8", "int16", "int32"}
    assert costs.peak_memory(program)[0] <= costs.peak_memory(program)[1]
