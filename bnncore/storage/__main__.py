"""``python -m bnncore.storage``: count a packed file, parameters, or the papers' models."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bnncore import data, params, storage, zoo
from bnncore.packed import packfile
from bnncore.terminal import command, printable


def of_file(path: Path) -> int:
    """Print what a packed file takes."""
    path = zoo.located(path)
    program = packfile.load(path)
    for key, fact in program.info.items():
        print(printable(f"{key}: {fact}"))
    print(*storage.described(storage.counted(program, path.stat().st_size)), sep="\n")
    return 0


# torch, which takes seconds to import, is not needed to count a file: imports where it is.


def of_params(path: Path) -> int:
    """Print what everything that a parameter file asks for would take, without training."""
    from bnncore import check
    from bnncore.lowering import packing
    from bnncore.storage import untrained
    from bnncore.training import plans

    p = params.load(path)
    names = None
    if p.data.name in untrained.SHAPES:
        image, classes = untrained.SHAPES[p.data.name]
        if p.data.size:
            image = (p.data.size, p.data.size, image[2])
        image = (*image[:2], p.data.channels or image[2])
    else:
        images = data.load(p.data, Path())  # relative to where one is, as in all stages
        image, names, classes = images.image, images.classes, len(images.classes)
    check.check(p, image, classes)
    specs = {
        "fp32": plans.single_spec(p, image, classes, binary=False),
        "bnn": plans.single_spec(p, image, classes, binary=True),
        **{e.name: plans.ensemble_spec(p, e, image, classes) for e in p.ensembles.train},
    }
    models = {}
    for name, spec in specs.items():
        # Of what may be chosen once it is trained: the table of the widest, the bytes of all.
        each = [untrained.count(spec, pack, names) for pack in packing.packings(p.pack)]
        widest = max(each, key=lambda count: count.file)
        models[name] = replace(widest, file_least=min(count.file_least for count in each))
    for name, counts in models.items():
        print(f"== {printable(name)} ==", *storage.described(counts), "", sep="\n")
    print(*storage.summary(models), sep="\n")
    return 0


def of_papers(expected: Path | None) -> int:
    """Print every storage figure of both papers beside ours; 1 if any differs, else 0."""
    from bnncore.paper import figures, sizes

    lines, equal = sizes.report(figures.published(expected or figures.FIGURES))
    print(*lines, sep="\n")
    return 0 if equal else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bnncore.storage", description="What ensembles take to store."
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--papers", action="store_true",
                      help="every storage figure of both papers beside ours")  # fmt: skip
    what.add_argument("--params", type=Path, metavar="FILE",
                      help="count what a parameter file asks for, without training")  # fmt: skip
    what.add_argument("--file", type=Path, metavar="PACKED", help="count a packed file")
    parser.add_argument("--expected", type=Path, metavar="FILE",
                        help="the published figures (default: the package's own)")  # fmt: skip
    options = parser.parse_args(arguments)
    if options.expected and not options.papers:
        parser.error("--expected: expected only with --papers")

    def work() -> int:
        if options.papers:
            return of_papers(options.expected)
        return of_params(options.params) if options.params else of_file(options.file)

    return command("storage", work)


if __name__ == "__main__":
    sys.exit(main())
