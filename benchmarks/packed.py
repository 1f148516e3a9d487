"""How fast packed networks run, against torch and onnxruntime on the same processor.

    python benchmarks/packed.py                     everything; minutes
    python benchmarks/packed.py --quick             ResNet-18 and narrow layers, in a minute or two
    python benchmarks/packed.py --json FILE         also write the rows as JSON

Every row compares two ways to do the same work, measured in turns in one run with the same number
of threads; times are medians, ratio = peer_s / ours_s. The peers get what helps them: filters are
binarized, and scaled by alpha, beforehand, and activations are binarized in one pass.

Networks have random weights: the time does not depend on them. That the results are right is
`tests/packed/test_compiled_kernels.py`'s business; here outputs are compared once, roughly, so that
nothing wrong is timed.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from benchmarks.rows import BF16, Bench, machine, processor, table

BATCH = 64
CHUNK = 8  # images in work at once: their maps stay in the second-level cache

# (filters in, filters out, kernel, side), as in the networks of both papers
LAYERS = (
    (64, 64, 3, 32),
    (128, 128, 3, 16),
    (256, 256, 3, 8),
    (512, 512, 3, 4),
    (96, 192, 5, 16),
    (192, 192, 3, 8),
    (192, 192, 1, 16),
    (32, 32, 3, 16),
    (16, 16, 3, 32),
)
AVX2 = {
    "NUMBA_CPU_NAME": "haswell",
    "NUMBA_CPU_FEATURES": "+avx,+avx2,+bmi,+bmi2,+f16c,+fma,+lzcnt,+movbe,+popcnt,+sse4.1,+sse4.2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}


# ---- networks ---------------------------------------------------------------------------------


def network(backbone: str, members: int = 1, sharing: str = "no_shared") -> tuple[Any, Any]:
    """An untrained ensemble at the paper's width with random batch norms, and its Program."""
    import torch

    from bnncore.lowering.lower import lower
    from bnncore.networks.ensemble import Ensemble, EnsembleSpec
    from bnncore.networks.parts import ModelSpec
    from bnncore.networks.sharing import SHARING
    from bnncore.params import Binarizer

    block = sharing == "tentaclenet"
    spec = EnsembleSpec(
        ModelSpec(backbone, (32, 32, 3), 10, binarizer=Binarizer()),
        members,
        SHARING[sharing],
        "sum" if block else "mean",
        "logits" if block else None,
    )
    ensemble = Ensemble(spec).eval()
    random = torch.Generator().manual_seed(0)
    for module in ensemble.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            size = module.num_features
            module.weight.data = torch.rand(size, generator=random) + 0.5
            module.weight.data[::5] *= -1
            module.bias.data = torch.randn(size, generator=random) * 0.3
            module.running_mean = torch.randn(size, generator=random) * 0.3
            module.running_var = torch.rand(size, generator=random) + 0.5
    program = lower(ensemble, (0.5,) * 3, (0.25,) * 3, tuple("0123456789"))
    return ensemble, program


def float_twin(ensemble: Any, onnx: bool = False) -> Any:
    """The same network of torch's own layers, filters binarized and scaled beforehand."""
    import torch

    from bnncore.networks.binarize import BinaryActivation, BinaryConv2d

    class Sign(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            # One pass, where comparing and choosing takes two; differs at -0 only.
            return torch.sign(x) if onnx else torch.copysign(x.new_ones(()), x)

    def replaced(module: torch.nn.Module) -> torch.nn.Module:
        if isinstance(module, BinaryActivation):
            return Sign()
        if isinstance(module, BinaryConv2d):
            size, stride, pad = (
                (first, first)
                for first in (module.kernel_size[0], module.stride[0], int(module.padding[0]))
            )
            channels = (module.in_channels, module.out_channels)
            plain = torch.nn.Conv2d(*channels, size, stride, pad, bias=module.bias is not None)
            signs, alpha = module.binary()
            plain.weight.data = (signs * (1 if alpha is None else alpha.view(-1, 1, 1, 1))).detach()
            if module.bias is not None:
                plain.bias = module.bias
            return plain
        for name, child in module.named_children():
            setattr(module, name, replaced(child))
        return module

    twin = copy.deepcopy(ensemble)
    twin.members = torch.nn.ModuleList(replaced(member) for member in twin.members)
    return twin.eval()


def random_images(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def as_torch(images: np.ndarray) -> Any:
    """Normalised as the Program says: (B,C,H,W) float32."""
    import torch

    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25


def onnx_session(bench: Bench, twin: Any, x: Any, threads: int) -> dict[str, Callable[[], object]]:
    """The peer onnxruntime, or none where it is not installed."""
    import torch

    try:
        import onnx  # noqa: F401  what torch exports with
        import onnxruntime
    except ImportError as error:
        if threads == 1:
            bench.note(f"The rows of onnxruntime are left out: {error}.")
        return {}

    file = io.BytesIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(twin, (x,), file, dynamo=False, opset_version=17)  # type: ignore[arg-type]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        file.getvalue(), options, providers=["CPUExecutionProvider"]
    )
    name, feed = session.get_inputs()[0].name, x.numpy()
    return {"onnxruntime fp32": lambda: session.run(None, {name: feed})}


# ---- sections ---------------------------------------------------------------------------------


def resnet18(bench: Bench, quick: bool) -> None:
    """The binarized ResNet-18 for 32x32 images."""
    import torch

    from bnncore.packed.execute import Model

    ensemble, program = network("resnet18")
    images = random_images(BATCH)
    x = as_torch(images)
    lasting = x.to(memory_format=torch.channels_last)
    twin = float_twin(ensemble)
    last = copy.deepcopy(twin).to(memory_format=torch.channels_last)
    half, half_x = copy.deepcopy(last).bfloat16(), lasting.bfloat16()
    got, want = Model(program)(images), ensemble(x).detach().numpy()
    apart = np.abs(got - want).max(axis=1)
    bench.note(
        f"Logits of {BATCH} images against torch: largest difference {apart.max():.2g}, "
        f"{int((apart > 1e-4).sum())} images differ by more than 1e-4."
    )
    one = images[:1]
    single, lasting_one = (
        t[:1].clone(memory_format=f)
        for t, f in ((x, torch.contiguous_format), (lasting, torch.channels_last))
    )
    # Waiting counts as processor time too, so that says nothing of two threads.
    for threads in (1,) if bench.clock is time.process_time else (1, 2):
        torch.set_num_threads(threads)
        torch._dynamo.reset()
        model = Model(program, threads=threads)
        peers: dict[str, Callable[[], object]] = {
            "torch fp32 eager, NCHW": partial(twin, x),
            "torch fp32 eager, channels last": partial(last, lasting),
            **onnx_session(bench, float_twin(ensemble, onnx=True), x, threads),
        }
        if BF16:
            peers["torch bf16 eager, channels last"] = partial(half, half_x)
        if threads == 1 or not quick:
            peers["torch.compile fp32"] = partial(torch.compile(last), lasting)
        if BF16 and not quick:
            peers["torch.compile bf16"] = partial(torch.compile(half), half_x)
        name = f"ResNet-18, batch {BATCH}"
        work = partial(model, images, batch=CHUNK)
        ours = bench.compare(name, threads, work, peers, 5 if quick else 7)
        print(f"  {name}, {threads} threads: {BATCH / ours:.0f} images/s")
        peers = {
            "torch fp32 eager, NCHW": partial(twin, single),
            "torch fp32 eager, channels last": partial(last, lasting_one),
        }
        bench.compare("ResNet-18, batch 1", threads, partial(model, one), peers, 15)
    torch.set_num_threads(1)
    plain, packed = Model(program, "numpy"), Model(program)
    ours = bench.compare(
        f"ResNet-18, batch {BATCH}, numpy kernels",
        1,
        lambda: plain(images),
        {
            "torch fp32 eager, channels last": lambda: last(lasting),
            "the compiled kernels": lambda: packed(images, batch=CHUNK),
        },
        2 if quick else 5,
    )


SHARES = "| bits to bits | tile | products a ns | of the tile's peak |"


def layers(bench: Bench, quick: bool = False) -> None:
    """Single layers, and their shares of what their tiles do on data in the first cache.

    Args:
        quick: the narrow ones.
    """
    import torch

    from bnncore.packed import peaks

    torch.set_num_threads(1)
    tile_of, rates = dict[str, str](), bench.rates
    for channels, filters, size, side in LAYERS[-2:] if quick else LAYERS:
        name = f"{channels}->{filters} {size}x{size}, {side}x{side}"
        pad = size // 2
        random = np.random.default_rng(0)
        x = torch.from_numpy(
            random.choice([-1.0, 1.0], (BATCH, channels, side, side)).astype(np.float32)
        )
        w = torch.from_numpy(
            random.choice([-1.0, 1.0], (filters, channels, size, size)).astype(np.float32)
        )
        chunk = at_once(channels + filters, side)
        layouts = [(x, w), tuple(t.to(memory_format=torch.channels_last) for t in (x, w))]
        forms = {"torch fp32, best layout": layouts}
        if BF16:
            forms["torch bf16"] = [tuple(t.bfloat16() for t in layouts[1])]
        # Theirs, too, the images together or so many at a time, whichever takes less.
        peers: dict[str, Callable[[], object]] = {
            label: min(
                (
                    partial(convolve, torch.split(x, many), w, pad)
                    for x, w in pairs
                    for many in {chunk, BATCH}
                ),
                key=best,
            )
            for label, pairs in forms.items()
        }
        numbers, bits, tile = layer(channels, filters, size, side, chunk)
        bench.compare(f"{name}, numbers to numbers", 1, numbers, peers)
        ours = bench.compare(f"{name}, bits to bits", 1, bits, peers)
        inside = sum(
            1 for axis in range(side) for tap in range(size) if 0 <= axis + tap - pad < side
        )
        products = BATCH * inside**2 * filters * channels
        tile_of[name] = tile
        rates.setdefault(name, []).append(products / ours)
        # Beside each layer, and the best of all, as these machines have slow moments.
        rates.setdefault(tile, []).append(peaks.products(tile, bench.clock))
    found = {tile: max(rates[tile]) for tile in tile_of.values()}
    shares = [(name, tile, statistics.median(rates[name])) for name, tile in tile_of.items()]
    lines = [
        SHARES,
        "| --- | --- | ---: | ---: |",
    ]
    lines += [
        f"| {name} | {tile} | {rate / 1e9:.0f} | {100 * rate / found[tile]:.0f} % |"
        for name, tile, rate in shares
    ]
    lines += [
        "",
        "The peaks: "
        + ", ".join(f"{tile} {most / 1e9:.0f}" for tile, most in found.items())
        + " products of two signs a ns, counted and added up on data in the first cache.",
        "",
        "With few channels, and in 1x1 layers, a tile has too few products to hide what begins and "
        "ends it. From numbers to numbers a layer also reads 4 bytes a value from memory, 17 MB "
        "for 64 channels of 32x32, and writes as many, to the second cache: their pace, not the "
        "kernel's.",
    ]
    bench.note("\n".join(lines))


def at_once(channels: int, side: int) -> int:
    """How many images of a layer are in work at once where it reads and writes floats: as many as
    have 2 MB of them, by halves, but not below `CHUNK`. Bits are few: all images."""
    count = BATCH
    while count > CHUNK and 4 * count * channels * side**2 > 2 << 20:
        count //= 2
    return count


def convolve(parts: Sequence[Any], weights: Any, pad: int) -> None:
    import torch

    for part in parts:
        torch.nn.functional.conv2d(part, weights, padding=pad)


def best(work: Callable[[], object], clock: Callable[[], float] = time.process_time) -> float:
    """Seconds of the fastest of some runs, after one to warm up."""
    work()
    taken = []
    for _ in range(5):
        start = clock()
        work()
        taken.append(clock() - start)
    return min(taken)


def layer(
    channels: int, filters: int, size: int, side: int, chunk: int
) -> tuple[Callable, Callable, str]:
    """One binary layer, by the steps of a plan: from numbers to numbers, so many images at once,
    and from bits to bits; and the tile of the second."""
    from bnncore.packed import compiled_kernels
    from bnncore.packed.arena import empty
    from bnncore.packed.program import Node, Program, Tensor, pack_bits

    random = np.random.default_rng(0)
    fills: dict[str, tuple[str, str, np.ndarray]] = {
        "scale": ("float32", "input", random.normal(0, 0.02, channels)),
        "shift": ("float32", "input", random.normal(0, 1, channels)),
        "level": ("float32", "threshold", random.normal(0, 1, channels)),
        "alpha": ("float32", "scale", random.random(filters)),
        "limit": ("int16", "threshold", random.integers(-9, 9, filters)),
        "dense": ("float32", "weight", random.normal(0, 1, (10, filters))),
    }
    tensors = {
        name: Tensor(kind, role, data.shape, False, data.astype(kind))
        for name, (kind, role, data) in fills.items()
    }
    for name, shape in {
        "w": (filters, size, size, channels),
        "v": (filters, 1, 1, filters),
    }.items():
        data = pack_bits(random.random(shape) < 0.5, False)
        tensors[name] = Tensor("binary", "weight", shape, False, data)
    geometry: dict[str, int | float] = {"stride": 1, "pad": size // 2, "biases": 0}
    point: dict[str, int | float] = {"stride": 1, "pad": 0, "biases": 0}
    head = (
        Node("normalize", "input", (0,), {"scale": "scale", "shift": "shift"}),
        Node("threshold", "threshold", (1,), {"threshold": "level"}),
        Node("bconv", "conv", (2,), {"weight": "w"}, geometry),
    )
    tails = {
        "numbers": (Node("affine", "alpha", (3,), {"scale": "alpha"}),),
        "bits": (
            Node("threshold", "limit", (3,), {"threshold": "limit"}),
            Node("bconv", "after", (4,), {"weight": "v"}, point),
        ),
    }
    works = []
    for form, tail in tails.items():
        many = chunk if form == "numbers" else BATCH
        nodes = [*head, *tail]
        nodes.append(Node("global_avg", "mean", (len(nodes),)))
        nodes.append(Node("dense", "dense", (len(nodes),), {"weight": "dense"}))
        used = {name for node in nodes for name in node.tensors.values()}
        program = Program(
            tuple(nodes), {name: tensors[name] for name in used}, 1, "mean",
            (side, side, channels), tuple("0123456789"),
        )  # fmt: skip
        steps = {step.outputs[-1]: step for step in compiled_kernels.plan(program)}
        rooms = {number: [empty(size * many) for size in step.rooms]
                 for number, step in steps.items()}  # fmt: skip
        images = random.integers(0, 256, (BATCH, side, side, channels), dtype=np.uint8)
        calls = []
        for start in range(0, BATCH, many):
            (numbers,) = steps[1].alone([images[start : start + many]])
            if form == "numbers":
                signs, (bits,) = steps[2].bind([numbers], 0, rooms[2])
                calls.append(signs)
            else:
                (bits,) = steps[2].alone([numbers])
            calls.append(steps[4].bind([bits], 0, rooms[4])[0])

        def work(calls: list[Callable[[], object]]) -> None:
            for call in calls:
                call()

        works.append(partial(work, calls))
    return works[0], works[1], steps[4].tile(BATCH)


def ensembles(bench: Bench) -> None:
    """Cost over M."""
    import torch

    from bnncore.packed.execute import Model

    torch.set_num_threads(1)
    images = random_images(16)
    x = as_torch(images).to(memory_format=torch.channels_last)
    cases = (("resnet20", "shared_conv", (1, 5, 10)), ("nin", "tentaclenet", (1, 2, 4)))
    for backbone, sharing, counts in cases:
        for members in counts:
            ensemble, program = network(backbone, members, sharing)
            twin = float_twin(ensemble).to(memory_format=torch.channels_last)
            model = Model(program)
            bench.compare(
                f"{backbone}, {sharing}, M = {members}, batch 16",
                1,
                partial(model, images),
                {"torch fp32 eager, channels last": partial(twin, x)},
            )


START = """
import sys
from time import {clock} as clock
sys.path.insert(0, {root!r})
began = clock()
import numpy, bnncore, bnncore.packed.execute, bnncore.packed.packfile
import bnncore.packed.compiled_kernels
before = clock()
model = bnncore.load({file!r})
loaded = clock()
model(numpy.zeros(({batch}, 32, 32, 3), numpy.uint8))
done = clock()
try:  # of this program, where getrusage may count what its parent was before
    lines = open("/proc/self/status").read().splitlines()
    memory = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
except OSError:
    import resource
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(before - began, loaded - before, done - loaded, memory)
"""


def start_up(bench: Bench) -> None:
    """Fresh processes: load, first prediction with a cold and a warm kernel cache, memory."""
    from bnncore.packed import packfile

    _, program = network("resnet18")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "resnet18.bnn"
        packfile.save(program, file)
        root = str(Path(__file__).parents[1])

        def fresh(batch: int) -> list[float]:
            code = START.format(root=root, file=str(file), batch=batch, clock=bench.clock.__name__)
            env = {**os.environ, "NUMBA_CACHE_DIR": str(Path(folder) / "cache")}
            done = subprocess.run(
                [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
            )
            return [float(word) for word in done.stdout.split()]

        cold = fresh(1)
        warm = [
            statistics.median(values) for values in zip(*(fresh(1) for _ in range(5)), strict=True)
        ]
        memory = fresh(BATCH)[3]
    print()
    bench.add("start: imports (numpy, numba, bnncore)", "", 1, warm[0], None)
    bench.add("start: load ResNet-18", "target 50 ms", 1, warm[1], 0.05)
    bench.add("start: first prediction, warm kernel cache", "target 1 s", 1, warm[2], 1.0)
    bench.add("start: first prediction, cold kernel cache", "target 6 s", 1, cold[2], 6.0)
    bench.note(f"An evaluator's process at batch {BATCH} takes {memory / 1024:.0f} MiB at most.")


def held(bench: Bench) -> None:
    """To less than this processor has, in processes of their own: to AVX2, both sides; and without
    the matrix unit, ours."""
    from bnncore.packed import matrices, tiles

    if "avx512f" not in processor()[1]:
        print("\nno AVX-512 here: all rows above are those of AVX2")
        return
    less = {"AVX2": AVX2}
    if matrices.here():
        without = ",".join(tiles.flags()).replace("+amx", "-amx")
        less["no matrix unit"] = {
            "NUMBA_CPU_NAME": tiles.processor(),
            "NUMBA_CPU_FEATURES": without,
        }
    for name, env in less.items():
        print(f"\n{name}:", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            file, notes = Path(folder) / "rows.json", Path(folder) / "notes.md"
            for part in (("resnet18", "--quick"), ("layers",), ("ensembles",)):
                subprocess.run(
                    [sys.executable, __file__, "--json", str(file), "--markdown", str(notes)]
                    + ["--only", *part]
                    + ["--cpu-time"] * (bench.clock is time.process_time),
                    env={**os.environ, **env},
                    check=True,
                    stdout=subprocess.DEVNULL,
                )
                for row in json.loads(file.read_text()):
                    bench.rows.append({**row, "name": f"{name}: {row['name']}"})
                    print(table([bench.rows[-1]])[-1], flush=True)
                if part == ("layers",):
                    shares = "".join(notes.read_text().partition(SHARES)[1:]).split("\n\n")[:2]
                    bench.note("\n\n".join([f"{name}, the last pass:", *shares]))


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "layers": layers,
    "ensembles": ensembles,
    "start": start_up,
    "held": held,
}


def describe() -> str:
    """The processor, what the kernels are compiled for, versions."""
    import torch

    from bnncore.packed import compiled_kernels

    named = ("avx2", "fma", "avx512f", "avx512bw", "avx512_vpopcntdq", "amx_int8", "amx_bf16")
    found = ", ".join(compiled_kernels.available())
    torchs = torch.backends.cpu.get_cpu_capability()
    packages = ("numpy", "numba", "torch", "onnxruntime")
    return machine(named, packages, f"binary tiles: {found}; torch: {torchs}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="ResNet-18 and narrow layers only")
    parser.add_argument(
        "--cpu-time", action="store_true", help="count processor time, on a busy machine"
    )
    parser.add_argument("--only", choices=("resnet18", *SECTIONS), help="one section")
    parser.add_argument(
        "--passes", type=int, default=1, help="do it all so often; rows are medians of these"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there")
    options = parser.parse_args()
    if options.quick and options.only not in (None, "resnet18", "layers"):
        parser.error(f"--only {options.only}: expected resnet18 or layers with --quick")
    import torch

    began = time.perf_counter()
    about = describe()
    bench = Bench(time.process_time if options.cpu_time else time.perf_counter)
    if options.cpu_time:
        about += "\nseconds of processor time, of all threads together: the machine was busy"
    print(about, *table([])[:2], sep="\n")
    with torch.no_grad():
        for _ in range(options.passes):
            bench.notes.clear()
            if options.only in (None, "resnet18"):
                resnet18(bench, options.quick)
            if options.quick and options.only in (None, "layers"):
                layers(bench, quick=True)
            for name, section in SECTIONS.items():
                if not options.quick and options.only in (None, name):
                    section(bench)
    bench.join()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"\n{time.perf_counter() - began:.0f} s; this process took {peak:.0f} MiB at most")
    bench.write(about, options.json, options.markdown)


if __name__ == "__main__":
    main()
