"""The numpy kernels, node by node, against naive loops in float64 and against torch."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from bnncore.packed import execute, numpy_kernels
from bnncore.packed.program import KINDS, Node, Program, Tensor, pack_bits
from bnncore.packed.rules import validate
from tests.graphs import logical, naive_node, programs, random_images


def as_numbers(value: np.ndarray, shape) -> np.ndarray:
    """A value of the numpy kernels as float64, bits as +-1."""
    if shape.kind != "bits":
        return value.astype(np.float64)
    bits = np.unpackbits(value, axis=-1, count=shape.dims[-1], bitorder="little")
    return bits * 2.0 - 1


@settings(max_examples=120, deadline=None)
@given(programs(), st.integers(0, 2**31))
def test_each_node_given_its_inputs(program, seed):
    """Bits and integers exactly; floats within 1e-5 of float64, relative to the terms summed."""
    shapes = validate(program)
    images = random_images(program, 2, seed)
    for member in range(program.members):
        values = execute.every_value(numpy_kernels.plan(program), images, member)
        for number, node in enumerate(program.nodes, 1):
            inputs, out = [values[source] for source in node.inputs], values[number]
            slots = {s: logical(program.tensors[name], member) for s, name in node.tensors.items()}
            for index in range(len(images)):
                plain = [
                    as_numbers(value[index], shapes[source])
                    for value, source in zip(inputs, node.inputs, strict=True)
                ]
                expected = naive_node(node, plain, slots)
                got = as_numbers(out[index], shapes[number])
                if shapes[number].kind in ("bits", "i32"):
                    assert np.array_equal(got, expected), node
                else:
                    # Cancellation must not be asked to be exact: the scale is that of the terms.
                    sizes = {slot: np.abs(array) for slot, array in slots.items()}
                    terms = naive_node(node, [np.abs(x) for x in plain], sizes)
                    bound = 1e-5 * np.maximum(np.abs(terms), np.abs(expected)) + 1e-30
                    assert (np.abs(got - expected) <= bound).all(), node


def single(op, image, tensors, attrs, kind="f32"):
    """A Program of one convolution behind the image, as +-1 if it is binary."""
    channels = image[2]
    one = np.ones(channels, np.float32)
    table = {
        "scale": Tensor("float32", "input", (channels,), False, one),
        "shift": Tensor("float32", "input", (channels,), False, -one * 127.5),
    }
    nodes = [Node("normalize", "input", (0,), {"scale": "scale", "shift": "shift"})]
    if kind == "bits":
        nodes.append(Node("sign", "sign", (1,)))
    nodes.append(Node(op, op, (len(nodes),), {slot: slot + "_" for slot in tensors}, attrs))
    table |= {slot + "_": tensor for slot, tensor in tensors.items()}
    nodes.append(Node("global_avg", "pool", (len(nodes),)))
    classes = validate_channels(nodes, table, image)
    return Program(tuple(nodes), table, 1, "mean", image, classes)


def validate_channels(nodes, table, image):
    weight = table.get("weight_")
    return tuple(map(str, range(weight.shape[0] if weight else image[2])))


def run_to(program: Program, images: np.ndarray, value: int) -> np.ndarray:
    return execute.every_value(numpy_kernels.plan(program)[:value], images)[value]


@pytest.mark.parametrize("kernel", [(1, 1), (2, 2), (3, 3), (5, 5), (3, 1), (7, 7)])
@pytest.mark.parametrize("channels", [1, 8, 20, 64, 72])
def test_binary_convolution_is_torchs(kernel, channels):
    rng = np.random.default_rng(0)
    for stride, pad in itertools.product((1, 2, 3), range(min(kernel))):
        signs = rng.random((13, *kernel, channels)) < 0.5
        weight = Tensor("binary", "weight", signs.shape, False, pack_bits(signs, False))
        attrs = {"stride": stride, "pad": pad, "biases": 0}
        program = single("bconv", (9, 8, channels), {"weight": weight}, attrs, "bits")
        images = rng.integers(0, 256, (3, 9, 8, channels), dtype=np.uint8)
        got = run_to(program, images, 3)
        x = torch.from_numpy(np.where(images > 127, 1.0, -1.0)).permute(0, 3, 1, 2)
        w = torch.from_numpy(signs * 2.0 - 1).permute(0, 3, 1, 2)
        expected = F.conv2d(x, w, stride=stride, padding=pad).permute(0, 2, 3, 1).numpy()
        assert np.array_equal(got, expected)


@pytest.mark.parametrize("kind", ["float32", "float16", "int8", "binary"])
def test_float_convolution_is_torchs(kind):
    rng = np.random.default_rng(0)
    shape = (6, 3, 3, 5)
    tensors = {}
    if kind == "binary":
        signs = rng.random(shape) < 0.5
        tensors["weight"] = Tensor(kind, "weight", shape, False, pack_bits(signs, False))
        plain = signs * 2.0 - 1
    else:
        plain = rng.normal(size=shape) * (60 if kind == "int8" else 1)
        tensors["weight"] = Tensor(kind, "weight", shape, False, plain.astype(KINDS[kind]))
        plain = plain.astype(KINDS[kind]).astype(np.float64)
    if kind == "int8":
        scale = rng.random(6).astype(np.float32)
        tensors["weight_scale"] = Tensor("float32", "weight_scale", (6,), False, scale)
        plain = (plain * scale[:, None, None, None]).astype(np.float32).astype(np.float64)
    for stride, pad in itertools.product((1, 2), (0, 1, 2)):
        program = single("conv", (9, 8, 5), tensors, {"stride": stride, "pad": pad})
        images = rng.integers(0, 256, (3, 9, 8, 5), dtype=np.uint8)
        got = run_to(program, images, 2)
        x = torch.from_numpy(images - 127.5).permute(0, 3, 1, 2)
        w = torch.from_numpy(plain).permute(0, 3, 1, 2)
        expected = F.conv2d(x, w, stride=stride, padding=pad).permute(0, 2, 3, 1).numpy()
        assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


def test_pooling_is_torchs():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 9, 7, 3), dtype=np.uint8)
    x = torch.from_numpy(images - 127.5).permute(0, 3, 1, 2)
    for kernel, stride, ceil in itertools.product((1, 2, 3, 4), (1, 2, 3), (0, 1)):
        for pad, include in itertools.product(range(kernel // 2 + 1), (0, 1)):
            attrs = {"kernel": kernel, "stride": stride, "pad": pad, "ceil": ceil}
            got = run_to(single("maxpool", (9, 7, 3), {}, attrs), images, 2)
            expected = F.max_pool2d(x, kernel, stride, pad, ceil_mode=bool(ceil))
            assert np.array_equal(got, expected.permute(0, 2, 3, 1).numpy())
            attrs["include_pad"] = include
            got = run_to(single("avgpool", (9, 7, 3), {}, attrs), images, 2)
            expected = F.avg_pool2d(x, kernel, stride, pad, bool(ceil), bool(include))
            assert np.allclose(got, expected.permute(0, 2, 3, 1).numpy(), rtol=1e-5, atol=1e-4)


def test_sign_of_zero_is_plus_one():
    zero = np.zeros((1, 1, 1, 3), np.float32)
    zero[..., 1] = -0.0
    zero[..., 2] = -1e-45
    tensor = Tensor("float32", "input", (3,), False, np.zeros(3, np.float32))
    nodes = (Node("normalize", "", (0,), {"scale": "t", "shift": "t"}), Node("sign", "", (1,)),
             Node("bconv", "", (2,), {"weight": "w"}, {"stride": 1, "pad": 0, "biases": 0}),
             Node("global_avg", "", (3,)))  # fmt: skip
    weight = Tensor("binary", "weight", (1, 1, 1, 3), False, np.array([7], np.uint8))
    program = Program(nodes, {"t": tensor, "w": weight}, 1, "mean", (1, 1, 3), ("a",))
    assert numpy_kernels.plan(program)[1].alone([zero])[0].item() == 0b011


def test_affine_rounds_twice():
    """``x * scale`` is rounded to float32 before ``+ shift``, as torch eager does."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 4, 4, 50)).astype(np.float32)
    scale, shift = rng.normal(size=(2, 50)).astype(np.float32)
    table = {
        "a": Tensor("float32", "scale", (50,), False, scale),
        "b": Tensor("float32", "shift", (50,), False, shift),
    }
    nodes = (Node("normalize", "", (0,), {"scale": "a", "shift": "b"}),
             Node("affine", "", (1,), {"scale": "a", "shift": "b"}),
             Node("global_avg", "", (2,)))  # fmt: skip
    program = Program(nodes, table, 1, "mean", (4, 4, 50), tuple(map(str, range(50))))
    got = numpy_kernels.plan(program)[1].alone([x])[0]
    product = (x.astype(np.float64) * scale).astype(np.float32)
    assert np.array_equal(got, (product.astype(np.float64) + shift).astype(np.float32))
    eager = torch.from_numpy(x) * torch.from_numpy(scale) + torch.from_numpy(shift)
    assert np.array_equal(got, eager.numpy())


def test_shared_filters_are_laid_out_once():
    rng = np.random.default_rng(0)
    for own, expected in ((False, 1), (True, 3)):
        calls = []
        shape = (4, 3, 3, 8)
        data = pack_bits(rng.random((3, *shape) if own else shape) < 0.5, own)
        program = Program((), {"w": Tensor("binary", "weight", shape, own, data)}, 3, "mean",
                          (1, 1, 1), ("a",))  # fmt: skip
        node = Node("bconv", "", (0,), {"weight": "w"})
        bound = numpy_kernels._Bound(program, node, [], None)
        pick = bound.per(lambda weight, calls=calls: calls.append(1) or weight, "weight")
        picked = [pick(member) for member in range(3)]
        assert len(calls) == expected
        assert (picked[0] is picked[2]) == (not own)
