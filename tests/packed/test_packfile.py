"""The packed file: round trips, overhead, refusals, the golden file, and the independent reader."""

import itertools
import json
import os
import resource
import struct
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings

from bnncore.packed import execute, packfile, votes
from bnncore.packed.program import KINDS, Node, PackedFormatError, Program, Tensor, pack_bits
from bnncore.packed.rules import validate
from tests import reader
from tests.graphs import Builder, programs, random_images, random_program

GOLDEN = Path(__file__).parents[1] / "golden"


def same(a: Program, b: Program) -> bool:
    """Equal in everything, arrays to the bit."""
    plain = ("nodes", "members", "combine", "image", "classes", "combine_tensors", "info")
    return (
        all(getattr(a, name) == getattr(b, name) for name in plain)
        and list(a.tensors) == list(b.tensors)
        and all(
            (s.kind, s.role, s.shape, s.own) == (t.kind, t.role, t.shape, t.own)
            and s.data.dtype == t.data.dtype
            and s.data.shape == t.data.shape
            and s.data.tobytes() == t.data.tobytes()
            for s, t in zip(a.tensors.values(), b.tensors.values(), strict=True)
        )
    )


@settings(max_examples=60, deadline=None)
@given(programs())
def test_round_trip(program):
    content = packfile.encode(program)
    loaded = packfile.decode(content)
    assert same(program, loaded)
    assert packfile.encode(loaded) == content


def test_save_is_atomic_and_returns_the_size(tmp_path):
    path = tmp_path / "net.bnn"
    program = random_program(1)
    assert packfile.save(program, path) == path.stat().st_size
    before = path.read_bytes()
    broken = replace(program, combine="median")
    with pytest.raises(PackedFormatError, match="median"):
        packfile.save(broken, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["net.bnn"]
    assert same(packfile.load(path), program)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002, 0o000])
def test_save_leaves_permissions_to_the_umask(tmp_path, umask):
    path = tmp_path / ("n" * 251 + ".bnn")  # as long as names may be
    before = os.umask(umask)
    try:
        packfile.save(random_program(1), path)
        packfile.save(random_program(2), path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    assert os.listdir(tmp_path) == [path.name]


def full(path):
    """As on a disk that holds no more than 100 bytes a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        packfile.save(random_program(2), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def no_folder(path):
    packfile.save(random_program(2), path.parent / "none" / path.name)


def a_folder(path):
    packfile.save(random_program(2), path.parent)


@pytest.mark.parametrize("fail", [full, no_folder, a_folder])
def test_a_save_that_fails_names_the_path_and_leaves_all_as_it_was(tmp_path, fail):
    path = tmp_path / "folder" / "net.bnn"
    path.parent.mkdir()
    packfile.save(random_program(1), path)
    before = path.read_bytes()
    with pytest.raises(OSError, match=f"'{path.parent}") as error:
        fail(path)
    assert not error.value.filename.endswith(".tmp")
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["net.bnn"]
    assert os.listdir(tmp_path) == ["folder"]


def test_the_safetensors_library_reads_it(tmp_path):
    path = tmp_path / "net.bnn"
    program = random_program(5)
    packfile.save(program, path)
    entries = safetensors.numpy.load_file(path)
    kinds = {tensor.kind for tensor in program.tensors.values()}
    assert entries.keys() == kinds | {"graph"}
    for kind in kinds:
        joined = b"".join(t.data.tobytes() for t in program.tensors.values() if t.kind == kind)
        assert entries[kind].tobytes() == joined
        assert entries[kind].dtype == KINDS[kind]


def residual_program(widths, blocks, members, narrow) -> Program:
    """A CIFAR ResNet as it is packed, random weights: filters shared, the rest own."""
    builder = Builder(lambda low, high: low, np.random.default_rng(0))
    builder.members = members
    small = "float16" if narrow else "float32"
    rng = builder.rng

    def tensor(kind, role, shape, own):
        own = own and members > 1
        full = (members, *shape) if own else shape
        if kind == "binary":
            data = pack_bits(rng.random(full) < 0.5, own)
        elif kind.startswith("int"):
            data = rng.integers(-100, 100, full).astype(KINDS[kind])
        else:
            data = rng.normal(size=full).astype(KINDS[kind])
        name = f"{len(builder.nodes)}.{role}"
        builder.tensors[name] = Tensor(kind, role, shape, own, data)
        return name

    def node(op, name, inputs, tensors=None, attrs=None):
        builder.nodes.append(Node(op, name, tuple(inputs), tensors or {}, attrs or {}))
        return len(builder.nodes)

    def affine(x, size, name):
        slots = {role: tensor(small, role, (size,), True) for role in ("scale", "shift")}
        return node("affine", name, [x], slots)

    def conv(x, shape, stride, name):
        slots = {"weight": tensor("int8" if narrow else "float32", "weight", shape, False)}
        if narrow:
            slots["weight_scale"] = tensor(small, "weight_scale", shape[:1], False)
        return node("conv", name, [x], slots, {"stride": stride, "pad": shape[1] // 2})

    def bconv(x, shape, stride, name):
        slots = {"weight": tensor("binary", "weight", shape, False)}
        return node("bconv", name, [x], slots, {"stride": stride, "pad": 1, "biases": 0})

    slots = {role: tensor("float32", "input", (3,), False) for role in ("scale",)}
    builder.tensors["mean"] = Tensor("float32", "input", (3,), False, np.zeros(3, np.float32))
    x = node("normalize", "input", [0], {**slots, "shift": "mean"})
    x = affine(conv(x, (widths[0], 3, 3, 3), 1, "conv1"), widths[0], "bn1")
    before = widths[0]
    for stage, width in enumerate(widths):
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            at = f"layer{stage + 1}.{block}"
            y = bconv(
                node("sign", f"{at}.sign1", [x]), (width, 3, 3, before), stride, f"{at}.conv1"
            )
            if narrow:
                level = tensor("int16", "threshold", (width,), True)
                up = tensor("binary", "direction", (width,), True)
                y = node("threshold", f"{at}.sign2", [y], {"threshold": level, "direction": up})
            else:
                y = affine(y, width, f"{at}.bn1")
                y = node(
                    "prelu", f"{at}.prelu1", [y], {"slope": tensor(small, "slope", (1,), True)}
                )
                y = node("sign", f"{at}.sign2", [y])
            y = affine(bconv(y, (width, 3, 3, width), 1, f"{at}.conv2"), width, f"{at}.bn2")
            side = x
            if stride == 2:
                side = affine(
                    conv(x, (width, 1, 1, before), 2, f"{at}.shortcut.0"),
                    width,
                    f"{at}.shortcut.1",
                )
            x = node("add", f"{at}.add", [y, side])
            x = node("prelu", f"{at}.prelu2", [x], {"slope": tensor(small, "slope", (1,), True)})
            before = width
    x = node("global_avg", "avgpool", [x])
    slots = {
        "weight": tensor("int8" if narrow else "float32", "weight", (10, before), True),
        "bias": tensor(small, "bias", (10,), True),
    }
    if narrow:
        slots["weight_scale"] = tensor(small, "weight_scale", (10,), True)
    node("dense", "linear", [x], slots)
    names = [
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    ]
    info = {"name": "resnet20", "sharing": "shared_conv", "val_top1": 85.1234, "test_top1": 84.9876}
    return Program(
        tuple(builder.nodes), builder.tensors, members, "mean", (32, 32, 3), tuple(names), {}, info
    )


def overhead(program: Program) -> tuple[int, int]:
    size = len(packfile.encode(program))
    return size, size - sum(tensor.data.nbytes for tensor in program.tensors.values())


def test_overhead_of_a_resnet20_ensemble():
    _, extra = overhead(residual_program((16, 32, 64), 3, 10, narrow=False))
    assert extra <= 8 * 1024
    size, extra = overhead(residual_program((16, 32, 64), 3, 10, narrow=True))
    assert extra <= 3 * 1024
    # The paper's weights-only figure: 45,376 for the filters and 10 dense layers of 640 floats.
    assert size <= 1.2 * (45_376 + 10 * 640 * 4)


def test_overhead_of_a_resnet18():
    size, extra = overhead(residual_program((64, 128, 256, 512), 2, 1, narrow=False))
    assert size > 1.5e6
    assert extra <= 0.01 * size


def with_header(content: bytes, change) -> bytes:
    (length,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def test_unknown_version_and_format_are_refused_by_name():
    content = packfile.encode(random_program(1))

    def version(header):
        header["__metadata__"]["version"] = "3"

    def other(header):
        header["__metadata__"]["format"] = "pt"

    with pytest.raises(PackedFormatError, match="version: expected 1 or 2, got 3"):
        packfile.decode(with_header(content, version))
    with pytest.raises(PackedFormatError, match="format: expected bnncore, got pt"):
        packfile.decode(with_header(content, other))


def test_an_older_version_holds_no_newer_operators():
    programs = [random_program(n, sort=("floats", "integers")[n % 2]) for n in range(40)]
    whole = [program.nodes[-1].op == "fixed" for program in programs]
    pooled = [
        any(node.op == "maxpool" and shapes[node.inputs[0]].kind == "bits"
            for node in program.nodes)
        for program, shapes in ((program, validate(program)) for program in programs)
    ]  # fmt: skip
    assert {*zip(whole, pooled, strict=True)} == {*itertools.product((True, False), repeat=2)}
    for program, newer in zip(programs, map(max, whole, pooled), strict=True):
        content = packfile.encode(program)
        version = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        assert version["__metadata__"]["version"] == ("2" if newer else "1")
        for other in "12":
            changed = with_header(content, lambda h, v=other: h["__metadata__"].update(version=v))
            if newer and other == "1":
                with pytest.raises(PackedFormatError, match="those of version 1, got some of 2"):
                    packfile.decode(changed)
            else:
                assert same(packfile.decode(changed), program)


def test_unknown_operator_is_refused_by_name():
    program = random_program(1)
    node = replace(program.nodes[-1], op="attention")
    broken = replace(program, nodes=(*program.nodes[:-1], node))
    with pytest.raises(PackedFormatError, match="expected a known operator, got attention"):
        packfile.encode(broken)


def test_a_file_of_another_sort_is_refused(tmp_path):
    path = tmp_path / "other"
    for content in (b"", b"PK\x03\x04", b"\x80\x04\x95", os.urandom(100)):
        path.write_bytes(content)
        with pytest.raises(PackedFormatError):
            packfile.load(path)


@settings(max_examples=40, deadline=None)
@given(programs(steps=6, side=7))
def test_the_independent_reader_agrees(program):
    check_reader(program, packfile.encode(program))


def check_reader(program, content):
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        graph = reader.read(file.name)
    images = random_images(program, 2)
    model = execute.Model(packfile.decode(content), "numpy")
    for members in {1, program.members}:
        scores = model(images, members)
        theirs = np.array([reader.classify(graph, image, members)[0] for image in images])
        if program.nodes[-1].op == "fixed":  # integers, but for a sum's weights
            assert np.allclose(scores, theirs, rtol=1e-6, atol=0)
        elif program.combine == "hard_vote":  # equal unless two logits are as good as equal
            close = (votes.margin(model.outputs(images, members).max(0)) < 1e-3).any()
            assert close or np.array_equal(scores, theirs)
        else:
            spread = 1 + np.abs(theirs).max()
            assert np.allclose(scores, theirs, rtol=1e-4, atol=1e-4 * spread)


def test_the_reader_is_short_and_alone():
    text = (Path(__file__).parents[1] / "reader.py").read_text()
    assert len(text.splitlines()) < 220
    imports = [line for line in text.splitlines() if line.startswith(("import", "from"))]
    assert {line.split()[1] for line in imports} == {"hashlib", "json", "struct", "zlib", "numpy"}


def test_golden_file():
    """A file of version 1 loads and scores as it did when it was made."""
    program = packfile.load(GOLDEN / "version1.bnn")
    images = np.load(GOLDEN / "images.npy", allow_pickle=False)
    expected = np.load(GOLDEN / "scores.npy", allow_pickle=False)
    model = execute.Model(program, "numpy")
    assert np.allclose(model.outputs(images), expected, rtol=1e-5, atol=1e-5)
    graph = reader.read(GOLDEN / "version1.bnn")
    theirs = [[reader.run(graph, image, m) for image in images] for m in range(program.members)]
    assert np.allclose(theirs, expected, rtol=1e-5, atol=1e-5)
    ops = {node.op for node in program.nodes}
    assert len(ops) == 17, "the golden file uses every operator of version 1"
    assert {tensor.kind for tensor in program.tensors.values()} == set(KINDS)
    # Written anew it is the same file; only zlib may compress differently elsewhere.
    again = packfile.decode(packfile.encode(program))
    assert same(program, again)
