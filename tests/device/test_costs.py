"""What networks take on a device by their shapes, against what is compiled and counted."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from bnncore.device import compilers, costs, emulate, export
from bnncore.lowering import blueprint
from bnncore.lowering.lower import lower
from bnncore.networks.ensemble import Ensemble, EnsembleSpec
from bnncore.networks.parts import ModelSpec
from bnncore.networks.sharing import SHARING
from bnncore.packed import integers, narrow, packfile
from bnncore.packed.program import Program
from bnncore.params import Binarizer, PackParams
from tests import tiny
from tests.graphs import random_images, random_program

# backbone, image, width, members (0: the FP32 network), integers
NETWORKS = [
    pytest.param(("leanplain", (16, 16, 3), 7, 0, False), marks=pytest.mark.slow),
    ("leanplain", (16, 16, 3), 6, 0, False),
    pytest.param(("leanresnet8", (28, 28, 1), 16, 1, True), marks=pytest.mark.slow),
    pytest.param(("nin", (16, 16, 3), 16, 2, True), marks=pytest.mark.slow),
    ("resnet8", (16, 16, 1), 16, 1, False),
]


def made(
    backbone, image, width, members, whole, std=0.25, stem="float"
) -> tuple[Program, EnsembleSpec]:
    binarizer = Binarizer(stem=stem) if members else None
    model = ModelSpec(backbone, image, 10, width, binarizer=binarizer)
    spec = EnsembleSpec(model, members or 1, SHARING["shared_conv" if members else "no_shared"])
    ensemble = Ensemble(spec, seed=1)
    tiny.scramble(ensemble)
    plain = lower(ensemble, (0.5,) * image[2], np.broadcast_to(std, image[2]), tuple("abcdefghij"))
    pack = PackParams(integer=whole, weights="float32" if members else "int8")
    return narrow.narrowed(plain, pack, random_images(plain, 8)), spec


@pytest.mark.parametrize("case", NETWORKS, ids=str)
@pytest.mark.skipif(bool(compilers.missing()), reason="needs the extra `device`")
def test_figures_are_those_of_compiled_code(case):
    program, _ = made(*case)
    figures = costs.estimate(program)
    code = export.generate(program, "model")
    device = emulate.Device(code, "cortex-m4")
    assert figures.ram == code.arena == device.sizes.ram
    flash = device.sizes.code + device.sizes.constants
    assert figures.flash == pytest.approx(flash, rel=0.1)
    images = export.self_images(program, 1)
    for members in {1, program.members}:
        count = device.call("scores", images, members, count=True)[1]
        assert figures.instructions[members - 1] == pytest.approx(count, rel=0.1)


@pytest.mark.parametrize(
    ("stem", "std"), [("float", 0.25), ("binary", 0.25), ("binary", (0.25, 0.24, 0.15))], ids=str
)
def test_a_drawing_has_the_figures_of_what_is_trained(stem, std):
    """RAM and instructions to the byte and to the instruction, for any number of members.

    A stem stays binary where the image's channels are about as wide as each other.
    """
    pack, info = PackParams(integer=True), {"seed": 3}
    program, spec = made("leanresnet8", (16, 16, 3), 8, 3, True, std, stem)
    alike = integers.even(1 / np.array(std))
    drawn = narrow.narrowed(blueprint.draw(spec).most, pack, alike=alike)
    size = len(packfile.encode(replace(program, info=info)))
    for known in (alike, None):
        least, most = blueprint.file_range(spec, pack, program.classes, info, known)
        assert least <= size <= most
    figures, theirs = costs.estimate(drawn, 3), costs.estimate(program)
    assert figures.ram == theirs.ram
    assert figures.instructions == theirs.instructions
    assert figures.constants == pytest.approx(theirs.constants, rel=0.05)


BYTES = {"float": 4, "uint32_t": 4, "int32_t": 4, "uint16_t": 2, "int16_t": 2, "uint8_t": 1,
         "int8_t": 1}  # fmt: skip


def test_flash_is_all_arrays_of_the_source():
    """Of weights, and of what votes take."""
    taken = set[str]()
    for seed in range(60):
        program = random_program(seed)
        code = export.generate(program, "model")
        declared = r"\nstatic const (\w+) t\d+_(\w*)\[(\d+)\](?:\[(\d+)\])? ="
        arrays = re.findall(declared, code.source)
        size = sum(BYTES[kind] * int(n) * int(m or 1) for kind, _, n, m in arrays)
        assert size == code.flash == costs.estimate(program).constants
        assert len(arrays) == code.source.count("\nstatic const ")
        taken.update(name for _, name, *_ in arrays)
    assert {"voted", "powers"} <= taken
