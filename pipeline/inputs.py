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
    if missing := unwritten():
        raise params.ParamsError(
            f"params.yaml: expected {', '.join(missing)} to be written: stages of dvc.yaml depend "
            "on them, and DVC knows no defaults (docs/params.md has them)"
        )
    p.ray.place()  # wrong, it would be met when the first ensemble trains
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


def unwritten() -> list[str]:
    """Keys that a stage depends on and params.yaml does not have; DVC would ask for them when that
    stage begins, after those before it have trained."""
    if not (ROOT / "dvc.yaml").exists():  # run by hand, elsewhere
        return []
    stages = params.read_yaml(ROOT / "dvc.yaml")["stages"].values()
    written = params.read_yaml(ROOT / "params.yaml")
    keys = dict.fromkeys(key for stage in stages for key in stage.get("params", ()))
    return [key for key in keys if not _has(written, key.split("."))]


def _has(values: Any, path: list[str]) -> bool:
    return not path or (
        isinstance(values, dict) and path[0] in values and _has(values[path[0]], path[1:])
    )


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
