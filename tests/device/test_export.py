"""Generated C against the evaluator: trained kinds of networks, random programs, emulated cores."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bnncore.device import compilers, costs, emulate, export
from bnncore.device.export import Exported, ExportError
from bnncore.lowering.lower import lower
from bnncore.networks.sharing import SHARING
from bnncore.packed import execute, integers, narrow, packfile, votes
from bnncore.packed.program import Program
from bnncore.params import Binarizer, PackParams
from tests import tiny
from tests.graphs import random_images, random_program
from tests.packed.test_hostile import pooled, put_together

STRICT = ["-pedantic", "-Wall", "-Wextra", "-Wconversion", "-Werror", "-ffp-contract=off"]
COMPILER = [shutil.which("gcc")] if shutil.which("gcc") else [sys.executable, "-m", "ziglang", "cc"]
if COMPILER[0] == sys.executable:
    pytest.importorskip("ziglang")


def compiled(made: Exported, folder: Path, *flags: str) -> Path:
    """A shared library of the generated code."""
    for ending, text in ((".h", made.header), (".c", made.source), ("_test.c", made.test)):
        (folder / f"{made.name}{ending}").write_text(text)
    library = folder / f"{made.name}.so"
    source = folder / f"{made.name}.c"
    command = [*COMPILER, "-std=c99", "-O1", *STRICT, *flags, "-shared", "-fPIC",
               "-o", str(library), str(source)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return library


def called(
    library: Path, program: Program, images: np.ndarray, members: int
) -> tuple[np.ndarray, np.ndarray]:
    """(labels, scores) of ``NAME_scores``."""
    function = getattr(ctypes.CDLL(str(library)), f"{library.stem}_scores")
    labels, scores = [], np.zeros((len(images), len(program.classes)), np.float32)
    for image, row in zip(images, scores, strict=True):
        image = np.ascontiguousarray(image)
        labels.append(function(image.ctypes.data_as(ctypes.c_void_p), members,
                               row.ctypes.data_as(ctypes.c_void_p)))  # fmt: skip
    return np.array(labels), scores


def agree(program: Program, images: np.ndarray, members: int, labels, scores) -> None:
    model = execute.Model(program, "numpy")
    want = model(images, members)
    if program.nodes[-1].op == "fixed" and "weight" not in program.combine_tensors:  # of integers
        assert (scores == want).all()
        assert (labels == model.predict(images, members)).all()
        return
    # Sums of floats agree to rounding, of the largest that goes into them.
    off = 1e-4 + 1e-5 * np.abs(want).max()
    assert np.allclose(scores, want, rtol=1e-4, atol=off)
    # Where two scores are equal but for rounding, either may win.
    clear = votes.margin(want) > 1e-5
    assert (labels == model.predict(images, members))[clear].all()


def network(
    backbone: str, sharing: str, combine: str = "mean", members: int = 2, whole: bool = False
) -> Program:
    classifier = None
    if sharing == "tentaclenet":
        combine, classifier = "sum", "logits" if backbone == "nin" else "features"
    changes: dict = {"backbone": backbone, "classifier": classifier}
    if backbone.startswith("lean"):
        changes["binarizer"] = Binarizer("sign", stem="binary", head="binary")
    ensemble = tiny.ensemble(members, sharing, combine, **changes)
    tiny.scramble(ensemble)
    program = lower(ensemble, (0.4,), (0.3,), tuple("abcd"))
    return integers.converted(program, integers.ranges(program, random_images(program, 32))
                              ) if whole else program  # fmt: skip


NETWORKS = [
    *((backbone, "shared_conv", "mean") for backbone in
      ("nin", "fernet", "resnet8", "resnet9", "birealnet18", "reactnet10", "leanresnet8",
       "leanplain")),
    *(("resnet8", sharing, "mean") for sharing in SHARING if sharing != "shared_conv"),
    ("nin", "tentaclenet", "sum"), ("fernet", "no_shared", "soft_vote"),
    ("fernet", "no_shared", "hard_vote"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "sharing", "combine", "whole"),
    [
        *((*row, False) for row in NETWORKS),
        *((*row, True) for row in NETWORKS[:8] + NETWORKS[-3:]),
    ],
)
def test_networks_of_every_backbone_sharing_and_vote(tmp_path, backbone, sharing, combine, whole):
    program = network(backbone, sharing, combine, whole=whole)
    images = random_images(program, 8)
    library = compiled(export.generate(program, "net"), tmp_path)
    for members in range(1, program.members + 1):
        agree(program, images, members, *called(library, program, images, members))


PACKS = [PackParams("float16"), PackParams("float32", "int8"), PackParams("float16", "int8"),
         PackParams("float16", "mixed"), PackParams(integer=True)]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("pack", PACKS, ids=str)
def test_narrowed_files(tmp_path, pack):
    plain = network("resnet8", "shared_conv")
    program = narrow.narrowed(plain, pack, random_images(plain, 32))
    images = random_images(program, 8)
    library = compiled(export.generate(program, "net"), tmp_path)
    agree(program, images, 2, *called(library, program, images, 2))


def differ(seed: int, folder: Path, *flags: str) -> None:
    program = random_program(seed)
    images = random_images(program, 4, seed)
    library = compiled(export.generate(program, f"random{seed}"), folder, *flags)
    for members in {1, program.members}:
        agree(program, images, members, *called(library, program, images, members))


@pytest.mark.parametrize("seed", [*range(12), 3222])  # the last: only directions are own
def test_random_programs(tmp_path, seed):
    differ(seed, tmp_path)


def test_sums_of_what_is_always_0(tmp_path):
    program = packfile.decode(put_together(*pooled([5, 5, 1], (3, 2, 1))))
    images = random_images(program, 2)
    library = compiled(export.generate(program, "net"), tmp_path)
    agree(program, images, 1, *called(library, program, images, 1))
    assert costs.estimate(program).ram


@pytest.mark.soak
@pytest.mark.parametrize("start", range(0, 2000, 100))
def test_many_random_programs(tmp_path, start):
    for seed in range(start, start + 100):
        differ(seed, tmp_path)


SANITIZED = [
    *(lambda seed=seed: random_program(seed) for seed in (3, 70)),
    lambda: network("resnet8", "shared_conv"),  # sliced layers of both strides
    lambda: network("leanresnet8", "shared_conv", "soft_vote", whole=True),
]


@pytest.mark.slow
@pytest.mark.parametrize("make", SANITIZED)
@pytest.mark.skipif(COMPILER[0] == sys.executable, reason="sanitizers need gcc")
def test_the_self_test_passes_under_sanitizers_as_c_and_as_cpp(tmp_path, make):
    made = export.generate(make(), "net")
    compiled(made, tmp_path)
    for compiler in ("gcc -std=c99", "g++"):
        command = [*compiler.split(), *STRICT, "-fsanitize=address,undefined",
                   "-fno-sanitize-recover=all", "-o", "t", "net.c", "net_test.c"]  # fmt: skip
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        done = subprocess.run(["./t"], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]


def test_the_self_test_can_fail(tmp_path):
    made = export.generate(random_program(3), "net")
    compiled(made, tmp_path)
    test = tmp_path / "net_test.c"
    broken = made.test.replace("const int labels[4] = {\n    ", "const int labels[4] = {\n    1 + ")
    assert broken != made.test
    test.write_text(broken)
    subprocess.run([*COMPILER, "-o", "t", "net.c", "net_test.c"], cwd=tmp_path, check=True)
    assert subprocess.run(["./t"], cwd=tmp_path).returncode == 1


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True], ids=["floats", "integers"])
@pytest.mark.parametrize(
    ("core", "compiler"),
    [*((core, "zig") for core in emulate.CORES)]
    + [(core, "gcc") for core, facts in emulate.CORES.items() if facts.gcc],
)
@pytest.mark.skipif(bool(compilers.missing()), reason="needs the extra `device`")
def test_cores_agree_with_the_evaluator(core, compiler, whole):
    if compiler not in compilers.versions():
        pytest.skip(f"no {compiler} for other machines here")
    program = network("leanresnet8" if whole else "resnet8", "shared_conv",
                      "hard_vote" if whole else "mean", whole=whole)  # fmt: skip
    images = random_images(program, 2)
    device = emulate.Device(export.generate(program, "net"), core, compiler=compiler)
    found, instructions = device.call("scores", images, 2, count=True)
    agree(program, images, 2, np.array([label for label, _ in found]),
          np.stack([scores for _, scores in found]))  # fmt: skip
    assert instructions > 0
    assert 0 < device.deepest < 4096
    assert device.sizes.ram >= device.made.arena


@pytest.mark.parametrize("core", ["cortex-m0+", "riscv32"])
@pytest.mark.skipif(bool(compilers.missing()), reason="needs the extra `device`")
def test_the_stack_is_the_deepest_of_all_instructions(monkeypatch, core):
    import unicorn

    program = random_program(3)
    device = emulate.Device(export.generate(program, "net"), core)
    make, sp, depths = device._machine, device._register("SP"), set[int]()

    def watched() -> unicorn.Uc:
        machine = make()
        machine.hook_add(unicorn.UC_HOOK_CODE, lambda m, *_: depths.add(m.reg_read(sp)))
        return machine

    monkeypatch.setattr(device, "_machine", watched)
    device.call("scores", random_images(program, 1), 1, count=True)
    # RISC-V aligns to 16 bytes, of which the last few may be of no use.
    assert 0 <= max(depths) - min(depths) - device.deepest < (16 if core == "riscv32" else 1)


@pytest.mark.parametrize(
    ("backbone", "sharing"), [("nin", "shared_conv"), ("resnet8", "no_shared")]
)
def test_the_arena_is_within_a_tenth_of_what_is_alive_at_one_time(backbone, sharing):
    program = network(backbone, sharing)
    made = export.generate(program, "net")
    assert made.arena <= 1.1 * made.alive
    assert made.alive <= made.arena


def overwritten(program: Program) -> list[tuple[int, int]]:
    """Steps and the values that they read where another value lies by then, run for two members."""
    laid = export.lay_out(program, "net", dry=True)
    memory = np.zeros(laid.arena, int)  # which value a byte is of
    found = []

    def room(value: int) -> np.ndarray:
        at = laid.places[value]
        return memory[at : at + export._bytes(laid.code, value)]

    def run(time: int) -> None:
        step = laid.work[time]

        def read(*values: int) -> None:
            found.extend((time, v) for v in values if v in laid.places and (room(v) != v).any())

        def store(value: int) -> None:
            if value in step.outputs:
                room(value)[:] = value

        whole = () if step.anchor is None or step.image else step.anchor.inputs
        read(*whole, *(() if step.anchor else (step.start,)))
        store(step.start)
        for value, node in step.links:
            read(*(source for source in node.inputs if source not in step.made))
            store(value)
        kept = [
            v for v in whole if not (laid.writers[time].sliced and laid.code.kinds[v] == "bits")
        ]
        read(*kept)  # other pixels are yet to come

    for own in (False, True, True):
        for time, step in enumerate(laid.work):
            if step.own == own:
                run(time)
    return found


@pytest.mark.parametrize("start", range(0, 400, 100))
def test_no_step_reads_what_has_been_overwritten(start):
    for seed in range(start, start + 100):
        assert not overwritten(random_program(seed)), seed


@pytest.mark.parametrize("name", ["", "4members", "a b", "a-b", "été", "a;b"])
def test_a_name_that_is_no_identifier(name):
    with pytest.raises(ExportError, match="name: expected a C identifier"):
        export.generate(random_program(0), name)


def test_early_exit_uses_no_more_members_than_it_needs(tmp_path):
    program = network("nin", "shared_conv", members=3)
    images = random_images(program, 8)
    library = compiled(export.generate(program, "net"), tmp_path)
    function = ctypes.CDLL(str(library)).net_predict_early
    function.argtypes = [ctypes.c_void_p, ctypes.c_float, ctypes.c_void_p]
    model = execute.Model(program, "numpy")
    used = ctypes.c_int()
    for threshold in (0.0, 0.3, 1e9):
        labels, wanted = model.anytime(images, threshold)
        for image, label, members in zip(images, labels, wanted, strict=True):
            image = np.ascontiguousarray(image)
            got = function(image.ctypes.data, threshold, ctypes.byref(used))
            assert (got, used.value) == (label, members)
