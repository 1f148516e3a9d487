"""Stage inputs: say what the images and the user's own code are, and refuse what cannot run.

It always runs, so that DVC sees a changed image or module: the files that it writes name contents,
whatever their times, and what depends on them runs again only if they differ. Where parameters,
images or code are others than last time, it also builds without memory what all stages would train
and pack, before any of them begins.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from bnncore import data, modules, params
from bnncore.data import fingerprint
from pipeline.stage import CHECKPOINTS, MODELS, ROOT, read, run

OUT = MODELS / "inputs"
KEPT = CHECKPOINTS / "inputs"
PACKAGE = Path(params.__file__).parents[1]


def main() -> None:
    p = params.load(ROOT / "params.yaml")
    source = data.source(p.data, ROOT)
    images = fingerprint.contents(source, KEPT / "hashes.json")
    binarizer = p.model.binarizer
    found: dict[str, Any] = {
        "images": {"files": len(images), "sha256": params.digest(sorted(images.items()))},
        "backbone": code([p.model.backbone]),
        "binarizer": code([binarizer.weight, binarizer.activation]),
    }
    package = {path.as_posix(): digest(path) for path in sorted(PACKAGE.rglob("*.py"))}
    state = params.digest(params.plain(p), found, package)
    checked = KEPT / "checked"
    if not checked.exists() or checked.read_text() != state:
        show(source, images, check(p))
        KEPT.mkdir(parents=True, exist_ok=True)
        checked.write_text(state)
    OUT.mkdir(parents=True, exist_ok=True)
    for name, content in found.items():
        (OUT / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def code(names: list[str]) -> dict[str, str]:
    """Module -> SHA-256 of the user's modules behind parameters that name a function."""
    return {name: digest(path) for name, path in sorted(modules.users_files(names).items())}


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check(p: params.Params) -> data.Dataset:
    """Read the images and refuse parameters that some stage could not use."""
    images = read(p.data)
    from bnncore import check  # torch, which takes seconds: only where something has changed

    check.check(p, images.image, images.classes)
    return images


def show(source: data.Source, contents: dict[str, str], images: data.Dataset) -> None:
    """Say what was read, and what about it may not be meant."""
    parts = ", ".join(f"{part} {len(getattr(images, part)):,}" for part in data.PARTS)
    shape = "x".join(map(str, images.image))
    print(f"{images.name}: {len(images.classes)} classes, images of {shape}; {parts}")
    if others := source.passed_over:
        print(f"passed over: {len(others)} files that are no images, such as {others[0]}")
    if twice := fingerprint.repeated(contents):
        name, first = twice[0]
        print(
            f"warning: {len(twice)} images are there more than once ({name} is {first}): copies "
            "in training and in test make accuracies look better than they are"
        )


if __name__ == "__main__":
    run(main, __doc__)
