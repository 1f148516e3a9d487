"""Look at a packed file, classify images with it, time it: ``python -m bnncore --help``."""

from __future__ import annotations

import argparse
import csv
import functools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from bnncore import zoo
from bnncore.device import commands as device
from bnncore.device.costs import estimate
from bnncore.errors import UserError
from bnncore.packed import costs, execute, packfile, votes
from bnncore.packed.program import Program, Tensor
from bnncore.packed.rules import validate, version
from bnncore.terminal import columns, command, printable


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = _parser().parse_args(arguments)

    def run() -> int | None:
        if "file" in options:
            options.file = zoo.located(options.file)
        return options.run(options)

    return command("bnncore", run)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bnncore", description="Tools for packed files.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, run, text in (
        ("inspect", _inspect, "layers, shapes, bytes, sharing, accuracy, memory, operations"),
        ("predict", _predict, "classify image files, or all images below a folder"),
        ("bench", _bench, "images a second, with one thread and with all"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("file", type=Path, help="a packed file, or zoo:NAME")
        command.set_defaults(run=run)
        if name == "predict":
            command.add_argument("images", type=Path, nargs="+",
                                 help="image files or folders; - for a list on stdin")  # fmt: skip
            command.add_argument("--top", type=int, default=3, help="classes to show (default 3)")
            command.add_argument("--threshold", type=float, default=0.0, metavar="P",
                                 help="'unsure' where no class is as probable, 0 to 1")  # fmt: skip
            form = command.add_mutually_exclusive_group()
            form.add_argument("--json", action="store_const", dest="form", const="json",
                              default="text", help="an object a line")  # fmt: skip
            form.add_argument("--csv", action="store_const", dest="form", const="csv")
        if name != "inspect":
            command.add_argument("--members", type=int, help="use the first so many (default all)")
        if name == "predict":
            command.add_argument("--ops", choices=sorted(execute.OPS), default="compiled")
        if name == "bench":
            command.add_argument("--batch", type=int, default=64, help="images (default 64)")
            command.add_argument("--torch", action="store_true", help="also torch fp32 eager")
            command.add_argument("--repeats", type=int, default=5, help="timed runs (default 5)")
            command.add_argument("--layers", action="store_true", help="what each layer takes")
    device.register(commands)
    text = "the trained packed files that come with bnncore"
    commands.add_parser("zoo", help=text, description=text).set_defaults(run=_zoo)
    return parser


def _inspect(options: argparse.Namespace) -> None:
    program = packfile.load(options.file)
    shapes = validate(program)
    size = options.file.stat().st_size
    counted = sum(tensor.data.nbytes for tensor in program.tensors.values())
    members = f"{program.members} member{'s' if program.members > 1 else ''}"
    height, width, channels = program.image
    print(printable(f"{options.file}: format {version(program, shapes)}, {members}, combined by "
                    f"{program.combine}"))  # fmt: skip
    print(printable(f"image {height}x{width}x{channels}, {len(program.classes)} classes: "
                    f"{_shorten(', '.join(program.classes), 60)}"))  # fmt: skip
    for key, fact in program.info.items():
        print(printable(f"{key}: {fact}"))
    print()
    rows = [("#", "operator", "layer", "from", "output", "run", "tensors", "bytes", "MACs")]
    operations = costs.operations(program)
    for index, node in enumerate(program.nodes):
        shape = shapes[index + 1]
        tensors = [(slot, program.tensors[name]) for slot, name in node.tensors.items()]
        rows.append((
            str(index + 1),
            node.op,
            node.name,
            ",".join(map(str, node.inputs)),
            f"{'x'.join(map(str, shape.dims))} {shape.kind}",
            f"x{program.members}" if shape.own else "once",
            " ".join(_describe(slot, tensor, program.members) for slot, tensor in tensors),
            str(sum(tensor.data.nbytes for _, tensor in tensors) or ""),
            str(sum(operations[index]) or ""),
        ))  # fmt: skip
    print(*columns(rows, "><<<<<<>"), sep="\n")
    print()
    kinds: dict[tuple[str, str], int] = {}
    for tensor in program.tensors.values():
        group = (tensor.kind, "own" if tensor.own else "shared")
        kinds[group] = kinds.get(group, 0) + tensor.data.nbytes
    held = [(count, *group) for group, count in sorted(kinds.items())]
    held += [(counted, "all tensors", ""), (size - counted, "graph and header", "")]
    print(*columns([("bytes", "kind", ""), *held, (size, "file", "")], "><"), sep="\n")
    packed, floats = costs.peak_memory(program)
    print(f"\npeak activations of one image: {packed:,} bytes with bits, {floats:,} all in float32")
    for count in sorted({1, program.members}):
        binary, full = costs.cost(program, count)
        print(f"operations of one image, {count} of {members}: "
              f"{binary:,} binary and {full:,} float multiply-accumulates")  # fmt: skip


def _describe(slot: str, tensor: Tensor, members: int) -> str:
    copies = f"{members}*" if tensor.own else ""
    return f"{slot}:{tensor.kind}[{copies}{'x'.join(map(str, tensor.shape))}]"


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def _predict(options: argparse.Namespace) -> int:
    # Here: what reads images needs more than numpy and numba, which inspect and bench do without.
    from bnncore.data import SUFFIXES, DataError, read_image

    program = packfile.load(options.file)
    _check_members(options.members, program)
    if options.top < 1:
        raise UserError(f"--top: expected at least 1, got {options.top}")
    if not 0 <= options.threshold <= 1:
        raise UserError(f"--threshold: expected 0 to 1, got {options.threshold:g}")
    height, width, channels = program.image
    if channels not in (1, 3):
        raise UserError(f"image files have 1 or 3 channels, this network takes {channels}")
    paths = list(_image_paths(options.images, SUFFIXES))
    top = min(options.top, len(program.classes))
    show = _shower(options.form, max((len(str(path)) for path in paths), default=0), top)
    model = execute.Model(program, options.ops)
    failed = 0
    for start in range(0, len(paths), 64):
        read: list[Path] = []
        images: list[np.ndarray] = []
        for path in paths[start : start + 64]:
            try:
                images.append(read_image(path, (height, width), channels))
                read.append(path)
            except DataError as error:  # the others are wanted all the same
                failed = 1
                print(f"bnncore: {printable(str(error))}", file=sys.stderr)
        if not read:
            continue
        scores, labels = votes.combine(program, model.outputs(np.stack(images), options.members))
        found = votes.probabilities(program, scores)
        for path, label, row in zip(read, labels, found, strict=True):
            # First what the model answers: of classes with as many votes that is not the lowest.
            order = sorted(range(len(row)), key=lambda k: (k != label, -row[k]))[:top]
            best = [(program.classes[k], float(row[k])) for k in order]
            show(str(path), best[0][0] if best[0][1] >= options.threshold else None, best)
    return failed


Best = list[tuple[str, float]]  # classes and their probabilities, the best first


def _shower(form: str, wide: int, top: int) -> Callable[[str, str | None, Best], None]:
    """What prints an image's path, its label (None: unsure) and its best classes."""
    if form == "csv":
        write = csv.writer(sys.stdout, lineterminator="\n").writerow
        ranks = range(1, top + 1)
        write(["image", "label", *(f"{what}{rank}" for rank in ranks for what in ("class", "p"))])

    def show(path: str, label: str | None, best: Best) -> None:
        if form == "json":
            print(json.dumps({"image": path, "label": label, "classes": dict(best)}))
        elif form == "csv":
            cells = [cell for name, p in best for cell in (name, f"{p:.4f}")]
            answer = "unsure" if label is None else label
            write([printable(cell) for cell in (path, answer, *cells)])
        else:
            unsure = ["unsure"] if label is None else []
            found = [f"{name} {100 * p:.1f} %" for name, p in best]
            print(printable("  ".join([f"{path:{wide}}", *unsure, *found])))

    return show


def _image_paths(given: Sequence[Path], endings: tuple[str, ...]) -> Iterable[Path]:
    for path in given:
        if str(path) == "-":
            lines = (line.rstrip(b"\r\n") for line in sys.stdin.buffer)
            named = [Path(os.fsdecode(line)) for line in lines if line]
            if not named:
                raise UserError("-: expected names of images on the standard input, got none")
            yield from _image_paths(named, endings)
        elif path.is_dir():
            inside = (p for p in path.rglob("*") if p.name.lower().endswith(endings))
            found = sorted(p for p in inside if p.name[0] != ".")
            if not found:
                raise UserError(f"{path}: no image files in this folder")
            yield from found
        else:
            yield path


def _bench(options: argparse.Namespace) -> None:
    program = packfile.load(options.file)
    _check_members(options.members, program)
    if min(options.batch, options.repeats) < 1:
        raise UserError("--batch and --repeats: expected at least 1")
    outputs = 4 * program.members * len(program.classes)

    def require_room(values: int) -> None:
        """For a batch, whose values have so many bytes an image."""
        each = math.prod(program.image) + values + outputs
        most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 // each
        if options.batch > most:
            raise UserError(
                f"--batch: expected at most {most}, which fill half of this machine's memory, got "
                f"{options.batch}"
            )

    require_room(costs.peak_memory(program)[1])
    images = np.random.default_rng(0).integers(
        0, 256, (options.batch, *program.image), dtype=np.uint8
    )
    every = os.cpu_count() or 1
    models: dict[tuple[str, int], execute.Model] = {}
    for ops in execute.OPS if options.torch else [ops for ops in execute.OPS if ops != "torch"]:
        for threads in sorted({1, every}):
            try:
                start = time.perf_counter()
                # torch divides a batch itself; the others work on parts of it side by side.
                model = execute.Model(program, ops, 1 if ops == "torch" else threads)
                require_room(model.memory)  # kernels that lay values out round channels up
                model(images, options.members, options.batch)
                first = time.perf_counter() - start
                models[ops, threads] = model
            except ImportError as error:
                print(f"{ops}: not available: {error}", file=sys.stderr)
                break
            if threads == 1:
                print(f"{ops}: ready and first batch in {first:.2f} s")
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in models}
    for _ in range(options.repeats):  # interleaved, so that a slow moment hits all alike
        for (ops, threads), model in models.items():
            if ops == "torch":
                sys.modules["torch"].set_num_threads(threads)
            start = time.perf_counter()
            model(images, options.members, options.batch)
            seconds[ops, threads].append(time.perf_counter() - start)
    rows = [("ops", "threads", "ms a batch", "images/s")]
    for (ops, threads), taken in seconds.items():
        median = statistics.median(taken)
        rows.append((ops, str(threads), f"{1e3 * median:.1f}", f"{options.batch / median:.0f}"))
    print(f"batch of {options.batch}, median of {options.repeats}:")
    print(*columns(rows, "<>"), sep="\n")
    if options.layers:
        _bench_layers(program, images, options.repeats)


def _bench_layers(program: Program, images: np.ndarray, repeats: int) -> None:
    """Print the compiled kernels' steps for one member: time, tile, binary products a second, and
    which part that is of what the tile does on data at hand."""
    from bnncore.packed import peaks

    model = execute.Model(program)
    model.layers(images)
    runs = [model.layers(images) for _ in range(repeats)]
    operations = zip(program.nodes, costs.operations(program), strict=True)
    products = {(node.name, node.op): binary for node, (binary, _) in operations}
    medians = [
        statistics.median(seconds for _, seconds in step) for step in zip(*runs, strict=True)
    ]
    rows = [("step", "tile", "ms", "share", "binary MAC/ns", "of the tile's peak")]
    peak = functools.cache(peaks.products)
    for (step, _), seconds in zip(runs[0], medians, strict=True):
        layer, _, ops = step.about.rpartition(": ")
        rate = products[layer, ops.split(", ")[0]] * len(images) / seconds
        tile = step.tile(len(images)) if step.tile else ""
        rows.append((
            printable(step.about),
            tile,
            f"{1e3 * seconds:.3f}",
            f"{seconds / sum(medians):.1%}",
            f"{rate / 1e9:.0f}" if rate else "",
            f"{rate / peak(tile):.0%}" if rate else "",
        ))  # fmt: skip
    print("\none thread, one member:")
    print(*columns(rows, "<<>"), sep="\n")


def _zoo(_: argparse.Namespace) -> None:
    rows = [("name", "data", "what", "test, %", "bytes", "RAM, bytes", "M instructions")]
    found = zoo.entries()
    for entry in found:
        program = packfile.load(entry.path)
        figures = estimate(program)
        rows.append((
            entry.name, entry.data, entry.about, f"{entry.test_top1:.2f}",
            f"{entry.path.stat().st_size:,}", f"{figures.ram:,}",
            f"{figures.instructions[-1] / 1e6:.2f}",
        ))  # fmt: skip
    print(*columns(rows, "<<<>"), sep="\n")
    print("\nRAM and instructions an image: estimated, of Cortex-M4. Trained by:")
    print(*columns([(entry.name, entry.command) for entry in found], "<<"), sep="\n")
    print(f"Their parameters are beside them in {zoo.FOLDER}; "
          f"python -m bnncore predict {zoo.PREFIX}{found[0].name} IMAGE runs one.")  # fmt: skip


def _check_members(members: int | None, program: Program) -> None:
    if members is not None and not 1 <= members <= program.members:
        raise UserError(f"--members: expected 1 to {program.members}, got {members}")


if __name__ == "__main__":
    sys.exit(main())
