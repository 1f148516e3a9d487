"""What packed networks take on microcontrollers: instructions an image, flash, RAM, stack.

    python benchmarks/device.py                  networks of integers on all cores, of floats on M4
    python benchmarks/device.py --quick          the layers alone
    python benchmarks/device.py --write          also benchmarks/device.md and device.json

Needs the extra `device`. Code is compiled by zig, for Cortex-M4 by Arm's gcc too where it is
installed, and runs on unicorn's cores; instructions are counted, so the figures are the same
everywhere; they are not cycles. Networks beside the zoo's have random weights, on which counts
hardly depend.

The peer is int8 ResNet-8 of MLPerf Tiny through CMSIS-NN, compiled by gcc -O3 and counted alike.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from bnncore import params as P
from bnncore import zoo
from bnncore.device import compilers, costs, emulate, export
from bnncore.lowering.lower import lower
from bnncore.networks.ensemble import Ensemble, EnsembleSpec
from bnncore.networks.parts import ModelSpec
from bnncore.networks.sharing import SHARING
from bnncore.packed import narrow, packfile
from bnncore.packed.program import Node, Program, Tensor, pack_bits
from tests import tiny

OPTIMIZE = "-O2"
SMALL = 16 * 16  # numbers of an image up to which floats are counted in software, too
# name: backbone, image, members, and whether it is packed with `integer`. All of width 16. Those of
# floats are counted on Cortex-M4 alone: without a float unit an image takes hundreds of millions.
NETWORKS = {
    "digits NiN, integers": ("nin", (8, 8, 1), 1, True),
    "lean ResNet-8": ("leanresnet8", (32, 32, 3), 1, True),
    "lean ResNet-8, four members": ("leanresnet8", (32, 32, 3), 4, True),
    "lean ResNet-8, floats": ("leanresnet8", (32, 32, 3), 1, False),
    "lean ResNet-20": ("leanresnet20", (32, 32, 3), 1, True),
    "ResNet-8 of the papers": ("resnet8", (32, 32, 3), 1, True),
    "ResNet-8 of the papers, floats": ("resnet8", (32, 32, 3), 1, False),
}
WIDTH = 16
# CMSIS-NN's figures of int8 ResNet-8: core -> instructions.
PEER = {"cortex-m4": 29_850_000, "cortex-m3": 41_750_000, "cortex-m0+": 97_400_000}
ESTIMATED = ("cortex-m4", "zig")  # what `device --estimate` is of
LAYERS = ((16, 32), (32, 16), (64, 8))  # channels, height and width


def network(backbone: str, image: tuple[int, int, int], members: int, integer: bool) -> Program:
    """An ensemble with random weights that shares its binary filters; stems of lean ones are binary
    too."""
    stem = "binary" if backbone.startswith("lean") else "float"
    spec = ModelSpec(backbone, image, 10, WIDTH, binarizer=P.Binarizer(stem=stem))
    ensemble = Ensemble(EnsembleSpec(spec, members, SHARING["shared_conv"]), seed=1)
    tiny.scramble(ensemble)
    channels = image[2]
    program = lower(ensemble, (0.5,) * channels, (0.25,) * channels, tuple("abcdefghij"))
    images = export.self_images(program, 16)
    return narrow.narrowed(program, P.PackParams(integer=integer), images)


def stack(channels: int, size: int, layers: int) -> Program:
    """So many binary 3x3 layers with thresholds, between a sign and a layer of ten outputs."""
    rng = np.random.default_rng(0)
    tensors = {
        "scale": Tensor("float32", "input", (channels,), False, np.ones(channels, "<f4")),
        "shift": Tensor("float32", "input", (channels,), False, np.full(channels, -128, "<f4")),
    }
    nodes = [
        Node("normalize", "input", (0,), {"scale": "scale", "shift": "shift"}),
        Node("sign", "input", (1,)),
    ]

    def bconv(name: str, filters: int, kernel: int) -> None:
        shape = (filters, kernel, kernel, channels)
        data = pack_bits(rng.random(shape) < 0.5, False)
        tensors[f"{name}.weight"] = Tensor("binary", "weight", shape, False, data)
        attrs: dict[str, int | float] = {"stride": 1, "pad": kernel // 2, "biases": 0}
        nodes.append(Node("bconv", name, (len(nodes),), {"weight": f"{name}.weight"}, attrs))

    for k in range(layers):
        bconv(f"layer{k}", channels, 3)
        levels = rng.integers(-9, 9, channels).astype("<i2")
        tensors[f"level{k}"] = Tensor("int16", "threshold", (channels,), False, levels)
        nodes.append(Node("threshold", f"layer{k}", (len(nodes),), {"threshold": f"level{k}"}))
    bconv("head", 10, 1)
    nodes.append(Node("global_avg", "head", (len(nodes),)))
    return Program(
        nodes, tensors, members=1, combine="mean", image=(size, size, channels),
        classes=tuple("abcdefghij"),
    )  # fmt: skip


def programs() -> Iterator[tuple[str, Program, bool]]:
    """(name, program, whether it is counted on cores without a float unit too): the trained files
    that come with bnncore and `NETWORKS`."""
    for entry in zoo.entries():
        program = packfile.load(entry.path)
        yield f"zoo:{entry.name}", program, math.prod(program.image) <= SMALL
    for name, row in NETWORKS.items():
        yield name, network(*row), row[-1]


def builds() -> list[tuple[str, str]]:
    """(core, compiler) of what is counted."""
    by_gcc = [("cortex-m4", "gcc")] if "gcc" in compilers.versions() else []
    return by_gcc + [(core, "zig") for core in emulate.CORES]


def counted(program: Program, core: str, compiler: str) -> tuple[emulate.Device, int]:
    """The device and instructions of one image, all members."""
    device = emulate.Device(export.generate(program, "model"), core, OPTIMIZE, compiler)
    images = export.self_images(program, 1)
    return device, device.call("scores", images, program.members, count=True)[1]


def layer(channels: int, size: int, core: str, compiler: str) -> dict[str, Any]:
    """Instructions of one binary 3x3 layer from bits to bits: what a second one adds."""
    first, second = (counted(stack(channels, size, layers), core, compiler)[1] for layers in (1, 2))
    macs = 9 * channels * channels * size * size
    count = second - first
    return {"layer": f"{channels} to {channels} at {size}x{size}", "core": core,
            "compiler": compiler, "instructions": count,
            "macs_per_instruction": round(macs / count, 2)}  # fmt: skip


def rows_of_networks() -> Iterator[dict[str, Any]]:
    built = builds()
    for name, program, everywhere in programs():
        estimate = costs.estimate(program)
        for core, compiler in built:
            if emulate.CORES[core].fpu or everywhere:
                device, count = counted(program, core, compiler)
                sizes = device.sizes
                row = {
                    "network": name, "core": core, "compiler": compiler, "members": program.members,
                    "instructions": count,
                    "code": sizes.code, "constants": sizes.constants, "ram": sizes.ram,
                    "alive": device.made.alive, "stack": device.deepest,
                }  # fmt: skip
                if (core, compiler) == ESTIMATED:
                    flash = estimate.flash / (sizes.code + sizes.constants)
                    row["estimate"] = f"{estimate.instructions[-1] / count - 1:+.1%}"
                    row["estimate_flash"] = f"{flash - 1:+.1%}"
                yield row


def table(rows: list[dict[str, Any]], titles: dict[str, str]) -> str:
    lines = ["| " + " | ".join(titles.values()) + " |", "|" + " --- |" * len(titles)]
    for row in rows:
        cells = (row.get(key, "") for key in titles)
        texts = (f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in cells)
        lines.append("| " + " | ".join(texts) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="the layers alone")
    parser.add_argument("--write", action="store_true", help="benchmarks/device.md and .json")
    options = parser.parse_args()
    if options.quick and options.write:
        parser.error("--write: expected without --quick, which leaves out what is written")
    layers = [layer(*shape, *build) for shape in LAYERS for build in builds()]
    titles = {"layer": "layer", "core": "core", "compiler": "compiler",
              "instructions": "instructions",
              "macs_per_instruction": "MAC an instruction"}  # fmt: skip
    parts = [table(layers, titles)]
    print(parts[0], flush=True)
    if options.quick:
        return
    networks = []
    for row in rows_of_networks():
        networks.append(row)
        print(row, file=sys.stderr, flush=True)
        if "ResNet" in row["network"] and row["core"] in PEER:
            row["peer"] = f"{PEER[row['core']] / row['instructions']:.2f}"
    titles = {"network": "network", "core": "core", "compiler": "compiler",
              "instructions": "instructions", "peer": "int8 ResNet-8 / this", "code": "code",
              "constants": "constants", "ram": "RAM", "stack": "stack",
              "estimate": "instructions, estimate",
              "estimate_flash": "flash, estimate"}  # fmt: skip
    parts.append(table(networks, titles))
    print(parts[1])
    if options.write:
        place = Path(__file__)
        facts = {"compilers": ", ".join(compilers.versions().values()),
                 "unicorn": metadata.version("unicorn"), "optimize": OPTIMIZE, "layers": layers,
                 "networks": networks}  # fmt: skip
        place.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")
        text = TEXT.format(compilers=facts["compilers"], optimize=OPTIMIZE, layers=parts[0],
                           networks=parts[1])  # fmt: skip
        place.with_suffix(".md").write_text(text)


TEXT = """# Networks on microcontrollers

Made by `python benchmarks/device.py --write` with {compilers}, at `{optimize}`, contraction
off. Instructions an image, counted on emulated cores: exact, the same everywhere, not cycles. Bytes
are those of the linked code. Weights are trained in the networks of the zoo, random elsewhere.

## Binary 3x3 layers, from bits to bits, zero padding exact

{layers}

## Networks

{networks}

Peer: int8 ResNet-8 (MLPerf Tiny) through CMSIS-NN, gcc -O3, counted alike: 29.85 M instructions on
Cortex-M4, 41.75 M on M3, 97.4 M on M0; code and tables 18.5 KB, weights 77.4 KB, RAM 51.5 KB. The
column divides its instructions by this network's; above 1 this network takes fewer. The last two
columns say by how much `device --estimate` is above what was counted and compiled.

Those called zoo are the trained files that come with bnncore, with floats. All others have width
16; in the ResNets 16, 32 and 64 channels. Those that are not called floats are packed with
`integer`: nothing is a float but the ten scores, residuals take 16 bits. With floats each float
operation is a call of some fifty to a hundred instructions on cores without a float unit.
"""


if __name__ == "__main__":
    main()
