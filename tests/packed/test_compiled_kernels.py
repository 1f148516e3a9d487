"""The compiled kernels against the numpy ones, step by step from the same inputs, and torch."""

from __future__ import annotations

import itertools
import os
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bnncore.lowering.lower import lower
from bnncore.networks import backbones, ensemble
from bnncore.networks.sharing import SHARING
from bnncore.packed import (
    arena,
    borders,
    compiled_kernels,
    execute,
    layouts,
    matrices,
    numpy_kernels,
    packfile,
    tiles,
)
from bnncore.packed.program import KINDS, Node, Program, Tensor, pack_bits, unpack_bits
from bnncore.packed.rules import validate
from bnncore.params import Binarizer
from tests.graphs import programs, random_images, random_program

TILES = compiled_kernels.available()
ROUNDED = ("conv", "dense", "global_avg")  # sums whose order, and so rounding, is not fixed
LEVELS = ("sign", "threshold", "interval")


class Reference:
    """The numpy kernels of a Program, for any part of its graph."""

    def __init__(self, program: Program) -> None:
        self.program, self.shapes = program, validate(program)
        self.steps = numpy_kernels.plan(program)

    def value(self, number: int, known: dict[int, np.ndarray], member: int) -> np.ndarray:
        """Compute a value from known ones, which are left as they are."""
        if number not in known:
            node = self.program.nodes[number - 1]
            inputs = [self.value(i, known, member) for i in node.inputs]
            (known[number],) = self.steps[number - 1].alone(inputs, member)
        return known[number]

    def rounded(self, number: int, known: dict[int, np.ndarray]) -> bool:
        """Whether float sums lie between the known values and this one."""
        if number in known:
            return False
        node = self.program.nodes[number - 1]
        return node.op in ROUNDED or any(self.rounded(i, known) for i in node.inputs)

    def doubtful(
        self, number: int, known: dict[int, np.ndarray], member: int, shape: tuple[int, ...]
    ) -> np.ndarray:
        """Which bits of a value that follows float sums lie within rounding of their threshold."""
        node = self.program.nodes[number - 1]
        x = self.value(node.inputs[0], known, member).astype(np.float64)
        slack = 1e-5 * max(1.0, float(np.abs(x).max()))
        near = np.zeros(shape, bool)
        for slot in ("threshold", "low", "high") if node.tensors else ("zero",):
            if slot == "zero":
                near |= np.abs(x) <= slack
            elif slot in node.tensors:
                tensor = self.program.tensors[node.tensors[slot]]
                level = tensor.data[member] if tensor.own else tensor.data
                near |= np.abs(x - level.astype(np.float64)) <= slack
        return near


def check(program: Program, images: np.ndarray, tile: str) -> None:
    """Every step of the compiled plan gives what numpy gives from the same inputs.

    Bits and integers exactly, also through affine, PReLU and add; after float sums within 1e-5 of
    the largest value that goes into them, bits there except for those within rounding of their
    threshold.
    """
    reference = Reference(program)
    shapes = reference.shapes
    steps = compiled_kernels.plan(program, tile)
    assert steps[-1].outputs == (len(program.nodes),)
    for member in range(program.members):
        values: dict[int, object] = {0: images}
        for step in steps:
            # Memory holds anything, here NaN and bits of 1: what is not written would show.
            rooms = [arena.empty(size * len(images)) for size in step.rooms]
            for room in rooms:
                room[:] = 255
            inputs = [values[number] for number in step.inputs]
            outputs = step.run(inputs, member, rooms)
            values.update(zip(step.outputs, outputs, strict=True))
            known = {number: layouts.to_plain(values[number], shapes[number])
                     for number in step.inputs}  # fmt: skip
            for number, got in zip(step.outputs, outputs, strict=True):
                check_value(reference, number, got, known, member)


def check_value(
    reference: Reference, number: int, got: np.ndarray, known: dict[int, np.ndarray], member: int
) -> None:
    """One value of the compiled kernels against numpy's, from known values before it."""
    program, shape = reference.program, reference.shapes[number]
    last = number == len(program.nodes)
    plain = got if last else layouts.to_plain(got, shape)
    rounded = reference.rounded(number, known)
    every = dict(known)  # and what lies between
    want = reference.value(number, every, member)
    where = f"{sorted(known)} -> {program.nodes[number - 1]}"
    assert plain.shape == want.shape, where
    if shape.kind == "bits":
        channels = shape.dims[-1]
        differ = numpy_kernels._unpack(plain, channels) != numpy_kernels._unpack(want, channels)
        if rounded:
            differ &= ~reference.doubtful(number, known, member, differ.shape)
        assert not differ.any(), where
        assert not (plain ^ want)[..., -1].max(initial=0) >> (channels % 8 or 8), where
        assert unused_bits(got, channels) == 0, where
    elif rounded:
        floats = [value for value in every.values() if value.dtype.kind == "f"]
        largest = max([1.0, *(float(np.abs(value).max(initial=0)) for value in floats)])
        np.testing.assert_allclose(plain, want, rtol=0, atol=1e-5 * largest, err_msg=where)
    else:
        np.testing.assert_array_equal(plain, want, err_msg=where)
    if shape.kind != "bits" and not last:
        assert not got[..., shape.dims[-1] :].any(), where


def unused_bits(words: np.ndarray, channels: int) -> int:
    """How many spare bits of a bits value are set."""
    packed = np.ascontiguousarray(words).view(np.uint8)
    return int(np.unpackbits(packed, axis=-1, bitorder="little")[..., channels:].sum())


def tensor(kind: str, role: str, data: np.ndarray) -> Tensor:
    stored = pack_bits(data, False) if kind == "binary" else data.astype(KINDS[kind])
    return Tensor(kind, role, data.shape, False, stored)


def one_layer(
    rng: np.random.Generator,
    channels: int,
    filters: int,
    kernel_size: int,
    stride: int,
    pad: int,
    side: tuple[int, int],
    chain: tuple[str, ...],
    beside: bool = False,
) -> Program:
    """normalize, sign, then one binary convolution and a chain of operators; dense at the end.

    Args:
        beside: add ("add", "rescale+") another convolution's sums, not those of this one.
    """
    table = {
        "in.scale": tensor("float32", "input", rng.normal(0, 0.02, channels)),
        "in.shift": tensor("float32", "input", rng.normal(0, 1, channels)),
        "w": tensor(
            "binary", "weight", rng.random((filters, kernel_size, kernel_size, channels)) < 0.5
        ),
        "dense": tensor("float32", "weight", rng.normal(0, 1, (3, filters))),
    }
    nodes = [
        Node("normalize", "in", (0,), {"scale": "in.scale", "shift": "in.shift"}),
        Node("sign", "sign", (1,)),
        Node("bconv", "conv", (2,), {"weight": "w"}, {"stride": stride, "pad": pad, "biases": 0}),
    ]
    if beside:
        nodes.append(nodes[-1])
    for op in chain:
        slots, attrs = {}, dict[str, int | float]()
        names = {
            "affine": ("scale", "shift"),
            "prelu": ("slope",),
            "rescale": ("scale", "shift"),
            "threshold": ("threshold", "direction"),
            "interval": ("low", "high", "inside"),
        }.get(op.rstrip("+"), ())
        for slot in names:
            slots[slot] = f"{len(nodes)}.{slot}"
            if op.startswith("rescale"):
                kind = {"scale": "int16", "shift": "int32"}[slot]
                table[slots[slot]] = tensor(kind, slot, rng.integers(-99, 99, filters))
                attrs = {"right": 5, "low": -3000, "high": 3000}
            elif slot in ("direction", "inside"):
                table[slots[slot]] = tensor("binary", "direction", rng.random(filters) < 0.5)
            else:
                role = "threshold" if slot in ("low", "high") else slot
                table[slots[slot]] = tensor("float32", role, rng.normal(0, 3, filters))
        inputs = (len(nodes), 3) if op in ("add", "rescale+") else (len(nodes),)
        nodes.append(Node(op.rstrip("+"), op, inputs, slots, attrs))
        if op in LEVELS:
            table["w2"] = tensor("binary", "weight", rng.random((filters, 1, 1, filters)) < 0.5)
            attrs = {"stride": 1, "pad": 0, "biases": 0}
            nodes.append(Node("bconv", "back", (len(nodes),), {"weight": "w2"}, attrs))
    nodes.append(Node("global_avg", "mean", (len(nodes),)))
    nodes.append(Node("dense", "dense", (len(nodes),), {"weight": "dense"}))
    return Program(tuple(nodes), table, 1, "mean", (*side, channels), ("a", "b", "c"))


CHAINS = [
    (),
    ("affine",),
    ("threshold",),
    ("affine", "prelu", "affine", "add", "prelu", "affine"),
    ("prelu", "relu", "interval"),
    ("affine", "add", "affine", "prelu", "affine", "sign"),
]


@pytest.mark.parametrize("beside", [False, True])
def test_every_order_of_what_follows_sums(beside: bool) -> None:
    """Each three operators one after another, also where the first of them reads a stored value."""
    rng = np.random.default_rng(0)
    tried = 0
    whole = ("rescale", "rescale+", "sign")  # a convolution follows a sign
    for chain in itertools.product((*whole, "affine", "prelu", "add"), repeat=3):
        if any("rescale" in b and a not in whole for a, b in itertools.pairwise(chain)):
            continue  # of floats
        program = one_layer(rng, 3, 5, 1, 1, 0, (2, 2), chain, beside)
        check(program, random_images(program, 2), TILES[0])
        tried += 1
    assert tried == 144


@pytest.mark.slow
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("channels", [1, 3, 16, 31, 32, 33, 64, 96, 100, 160, 192, 256])
def test_grid(channels: int, tile: str) -> None:
    """Kernel sizes, strides, paddings and batches for every channel count; chains take turns."""
    rng = np.random.default_rng(channels)
    cases = list(itertools.product((1, 3, 5), (1, 2), (0, 1, 2), (1, 5, 64)))
    count = 0
    for number, (size, stride, pad, batch) in enumerate(cases):
        if pad >= size:
            continue
        count += 1
        side = (size + number % 3, size + 2 + number % 2) if batch > 5 else (7, 6)
        filters = (1, 16, 32, 33, 64, 100)[number % 6]
        chain = CHAINS[number // 5 % len(CHAINS)]
        program = one_layer(rng, channels, filters, size, stride, pad, side, chain)
        check(program, random_images(program, batch, number), tile)
    assert count == 42


@pytest.mark.parametrize("tile", TILES)
@settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
@given(program=programs(), batch=st.integers(1, 9))
def test_random_programs(program: Program, batch: int, tile: str) -> None:
    check(program, random_images(program, batch), tile)


@pytest.mark.slow
@pytest.mark.parametrize("tile", TILES)
def test_many_random_programs(tile: str) -> None:
    for seed in range(300):
        program = random_program(seed, steps=12)
        check(program, random_images(program, 1 + seed % 13, seed), tile)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(
    ("channels", "filters", "size", "stride", "pad", "side"),
    [(64, 64, 3, 1, 1, 8), (33, 100, 5, 2, 2, 9), (192, 96, 1, 1, 0, 5), (16, 16, 3, 2, 1, 7)],
)
@pytest.mark.parametrize("batch", [1, 6])
def test_binary_convolution_equals_torch(
    tile: str, channels: int, filters: int, size: int, stride: int, pad: int, side: int,
    batch: int,
) -> None:  # fmt: skip
    rng = np.random.default_rng(0)
    program = one_layer(rng, channels, filters, size, stride, pad, (side, side), ())
    steps = {step.outputs: step for step in compiled_kernels.plan(program, tile)}
    signs = rng.random((batch, side, side, channels)) < 0.5
    weight = unpack_bits(program.tensors["w"])
    (got,) = steps[3,].alone([layouts.to_words(signs)])
    want = torch.nn.functional.conv2d(
        torch.from_numpy(signs * 2.0 - 1).permute(0, 3, 1, 2),
        torch.from_numpy(weight * 2.0 - 1).permute(0, 3, 1, 2),
        stride=stride,
        padding=pad,
    )
    np.testing.assert_array_equal(got[..., :filters], want.permute(0, 2, 3, 1).numpy())


@pytest.mark.parametrize("tile", TILES)
def test_sums_longer_than_a_tile_of_bytes_can_hold(tile: str) -> None:
    rng = np.random.default_rng(0)
    program = one_layer(rng, 2730, 3, 5, 1, 0, (5, 5), ())  # 68,250 products
    check(program, random_images(program, 2), tile)


@pytest.mark.parametrize("tile", TILES)
def test_integer_levels_beyond_all_sums(tile: str) -> None:
    """Levels that float32 cannot hold still compare as integers do."""
    rng = np.random.default_rng(0)
    program = one_layer(rng, 40, 40, 3, 1, 1, (5, 5), ("interval",))
    low = rng.choice([-(1 << 31), -(1 << 24) - 1, 0, (1 << 24) + 1, (1 << 31) - 1], 40)
    program.tensors["3.low"] = tensor("int32", "threshold", low)
    check(program, random_images(program, 3), tile)


def test_limits_of_numbers_as_limits_of_counts() -> None:
    ends = np.array(
        [-np.inf, np.inf, np.nan, -1e30, 1e30, -1e-30, 1e-30, -0.0, *np.arange(-7, 8, 0.5)],
        np.float32,
    )
    low, high = (each.reshape(-1) for each in np.meshgrid(ends, ends))
    constants = np.repeat(np.array([[-3], [0], [5]], np.int32), len(low), axis=1)
    least, most = borders.between(constants, low, high)
    for count in range(-20, 21):
        sums = (constants - 2 * count).astype(np.float32)
        want = (low <= sums) & (sums <= high)
        np.testing.assert_array_equal((least <= count) & (count <= most), want)
    ends = matrices.limits(*(np.resize(each, 32 * -(-len(low) // 32)) for each in (low, high)), 32)
    first, more = ends.transpose(1, 0, 2).reshape(2, -1)[:, : len(low)]
    for sum_ in (*range(-20, 21), -(1 << 24), 1 << 24):
        want = (low <= np.float32(sum_)) & (np.float32(sum_) <= high)
        above = (np.int32(sum_) - first.astype(np.int64)).astype(np.uint32)
        np.testing.assert_array_equal(above <= more.view(np.uint32), want)


def test_work_is_fused() -> None:
    """One step for a whole residual tail, and none for what it swallows."""
    rng = np.random.default_rng(0)
    chain = ("affine", "prelu", "affine", "add", "prelu")
    program = one_layer(rng, 64, 64, 3, 1, 1, (8, 8), chain)
    # The convolution is also the residual here, so the rest is a second step.
    assert [step.outputs for step in compiled_kernels.plan(program)] == one_each(1, 2, 3, 8, 9, 10)
    program = one_layer(rng, 64, 64, 3, 1, 1, (8, 8), ("affine", "prelu", "affine", "threshold"))
    assert [step.outputs for step in compiled_kernels.plan(program)] == one_each(1, 2, 7, 8, 9, 10)


def one_each(*numbers: int) -> list[tuple[int, ...]]:
    return [(number,) for number in numbers]


def test_shared_steps_run_once() -> None:
    """An own threshold behind a shared convolution does not drag it into every member's work."""
    for seed in range(40):
        program = random_program(seed)
        shapes = validate(program)
        for step in compiled_kernels.plan(program):
            assert {step.own} == {shapes[number].own for number in step.outputs}


def test_batches_and_threads_change_nothing() -> None:
    for seed in range(6):
        program = random_program(seed, steps=12)
        images = random_images(program, 21, seed)
        whole = execute.Model(program).outputs(images)
        parts = execute.Model(program, threads=2).outputs(images, batch=4)
        # Float sums run in the same order whatever the tile, so not a bit may differ.
        np.testing.assert_array_equal(whole, parts)


def test_no_images() -> None:
    program = random_program(3)
    assert execute.Model(program)(random_images(program, 0)).shape == (0, len(program.classes))


@pytest.mark.slow
def test_threads_do_not_disturb_each_others_memory(tmp_path: Path) -> None:
    """In one heap, and with little space between blocks, what is used after it was freed shows."""
    spec = ensemble.EnsembleSpec(
        backbones.ModelSpec("resnet20", (32, 32, 3), 10, width=32, binarizer=Binarizer()),
        1,
        SHARING["no_shared"],
    )
    network = ensemble.Ensemble(spec).eval()
    program = lower(network, (0.5,) * 3, (0.25,) * 3, tuple("0123456789"))
    (tmp_path / "model.bnn").write_bytes(packfile.encode(program))
    code = (
        "import sys, numpy as np; from bnncore.packed import execute, packfile\n"
        "program = packfile.load(sys.argv[1])\n"
        "one, two = (execute.Model(program, threads=n) for n in (1, 2))\n"
        "images = np.random.default_rng(0).integers(0, 256, (48, 32, 32, 3), dtype=np.uint8)\n"
        "wanted = one(images, batch=4)\n"
        "for _ in range(20): assert np.array_equal(two(images, batch=4), wanted)\n"
        "print('equal')"
    )
    small = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_CHECK_": "3"}
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "model.bnn"],
        env=os.environ | small, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "equal\n"), done.stderr[-2000:]


@pytest.mark.parametrize(
    ("channels", "filters", "size", "pad", "side"),
    [
        (16, 16, 7, 3, (16, 209)),  # 16 parts of 14 columns, of which the last begins behind them
        (3, 5, 3, 1, (4, 100)),
        (4, 3, 3, 1, (3, 512)),  # more parts than lanes
        (4, 3, 33, 16, (40, 40)),  # a window that no lane has room for
        (1, 2, 65, 32, (9, 32)),
        (128, 17, 16, 0, (24, 24)),  # one product too many for sums of two bytes
    ],
)
def test_maps_and_windows_that_lanes_hardly_hold(
    channels: int, filters: int, size: int, pad: int, side: tuple[int, int]
) -> None:
    rng = np.random.default_rng(0)
    for chain in ((), ("threshold",)):
        program = one_layer(rng, channels, filters, size, 1, pad, side, chain)
        check(program, random_images(program, 3), "sliced")


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("added", [None, "dense", "mean"])
def test_last_layers_of_a_few_classes(added: str | None, whole: bool) -> None:
    """Alone, and with what is added to it."""
    rng = np.random.default_rng(0)
    program = one_layer(rng, 5, 3, 3, 1, 1, (4, 4), ())
    *nodes, dense = program.nodes
    mean = nodes[-1]
    if whole:  # integers, as far as the last node
        dense = replace(dense, tensors={"weight": "whole"})
        nodes[-1] = replace(mean, op="global_sum")
    table = {**program.tensors, "whole": tensor("int8", "weight", rng.integers(-9, 9, (3, 3)))}
    nodes.append(dense)
    if added:
        second = len(nodes)
        if added == "dense":
            nodes.append(dense)
        nodes.append(Node("add", "add", (second, len(nodes) if added == "dense" else second - 1)))
    elif whole:
        nodes.append(Node("fixed", "fixed", (len(nodes),), {}, {"fraction": 3}))
    used = {name for node in nodes for name in node.tensors.values()}
    tensors = {name: data for name, data in table.items() if name in used}
    check(
        replace(program, nodes=tuple(nodes), tensors=tensors), random_images(program, 7), TILES[0]
    )


@pytest.mark.skipif("matrix" not in TILES, reason="no matrix unit here")
@pytest.mark.parametrize(
    ("channels", "filters", "size", "stride", "pad", "side"),
    [
        (64, 64, 3, 1, 1, (40, 33)),  # rows of three tiles that overlap, strips that do
        (16, 16, 3, 1, 1, (70, 32)),  # tiles one behind the other
        (96, 40, 5, 2, 2, (37, 64)),  # columns that reach over a window's end
        (192, 192, 1, 1, 0, (7, 7)),  # a map as one row
        (300, 33, 3, 1, 1, (3, 200)),  # no strip in the first cache
        (32, 16, 2, 3, 0, (20, 50)),
    ],
)
def test_matrices_on_maps_of_several_strips_and_tiles(
    channels: int, filters: int, size: int, stride: int, pad: int, side: tuple[int, int]
) -> None:
    rng = np.random.default_rng(0)
    for chain in (("threshold",), ("interval",), ("affine", "add", "prelu", "affine", "sign")):
        program = one_layer(rng, channels, filters, size, stride, pad, side, chain)
        check(program, random_images(program, 3), "matrix")


@pytest.mark.skipif("matrix" not in TILES, reason="no matrix unit here")
def test_matrices_leave_the_unit_as_they_found_it() -> None:
    """Torch's half precision uses it, too, and knows how it has set it up."""
    rng = np.random.default_rng(0)
    program = one_layer(rng, 64, 64, 3, 1, 1, (16, 16), ("threshold",))
    factors = torch.randn(2, 96, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    alone = factors[0] @ factors[1]
    for _ in range(3):
        check(program, random_images(program, 2), "matrix")
        assert torch.equal(factors[0] @ factors[1], alone)


def test_tiles_are_those_that_can_run() -> None:
    """Held to less than this processor has, a tile that needs more is not taken."""
    code = (
        "import numpy; from bnncore.packed import compiled_kernels, matrices;"
        "print(*compiled_kernels.available(), matrices.here())"
    )
    env = {**os.environ, "NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.split() == ["words", "sliced", "False"], done.stderr


def test_windows_wider_than_the_map() -> None:
    """Nearly every position is a border class of its own: planned without a table of them all."""
    rng = np.random.default_rng(0)
    program = one_layer(rng, 3, 2, 41, 1, 40, (9, 9), ("affine",))
    check(program, random_images(program, 5), TILES[0])


@pytest.mark.slow
@pytest.mark.parametrize("backbone", list(backbones.BACKBONES))
def test_backbones(backbone: str) -> None:
    """Whole networks as they are lowered, alone and with shared filters."""
    torch.manual_seed(0)
    for members, sharing in ((1, "no_shared"), (2, "shared_conv")):
        model = backbones.ModelSpec(backbone, (32, 32, 3), 10, 24, binarizer=Binarizer())
        whole = ensemble.Ensemble(ensemble.EnsembleSpec(model, members, SHARING[sharing]))
        for module in whole.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                torch.nn.init.normal_(module.weight)  # negative scales among them
                torch.nn.init.normal_(module.bias)
            if isinstance(module, torch.nn.PReLU):
                torch.nn.init.normal_(module.weight, 0.2, 0.2)
        program = lower(whole, (0.5,) * 3, (0.25,) * 3, tuple("0123456789"))
        for tile in TILES:
            check(program, random_images(program, 5), tile)


_SSE = "+sse4.2,+popcnt"
_AVX2 = f"{_SSE},+avx,+avx2,+bmi,+bmi2,+f16c,+fma,+lzcnt,+movbe,+ssse3,+sse4.1"
_AVX512 = f"{_AVX2},+avx512f,+avx512bw,+avx512dq,+avx512vl,+avx512cd"


@pytest.mark.parametrize(
    ("name", "flags", "names", "passes", "lacks"),
    [
        pytest.param(
            "nehalem", _SSE, "grid and 33 or integer_levels or sums_longer", "[33-words]",
            "nibbles", marks=pytest.mark.slow, id="nehalem",
        ),
        # Bit slices without a product of matrices of bits, in vectors of either length.
        *(
            pytest.param(
                name, flags, "33-sliced or 16-sliced or hardly", "[33-sliced]", "",
                marks=pytest.mark.soak, id=name,
            )
            for name, flags in (("haswell", _AVX2), ("skylake-avx512", _AVX512))
        ),
    ],
)  # fmt: skip
@pytest.mark.skipif("x86" not in platform.machine(), reason="names x86 processors")
def test_other_processors(
    name: str, flags: str, names: str, passes: str, lacks: str, tmp_path: Path
) -> None:
    """Other x86 processors than this, in a process of their own: same tests, other code."""
    if not {flag[1:] for flag in flags.split(",")} <= tiles.features():
        pytest.skip(f"this processor is less than a {name}")
    env = {
        **os.environ,
        "NUMBA_CPU_NAME": name,
        "NUMBA_CPU_FEATURES": flags,
        "NUMBA_CACHE_DIR": str(tmp_path),
    }
    command = [sys.executable, "-m", "pytest", "-v", "-x", __file__, "-m", "not soak"]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [*command, "-k", names], env=env, cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    assert f"{passes} PASSED" in done.stdout
    if lacks:
        assert lacks not in done.stdout, "which such a processor has not"
