"""Class folders: PART/CLASS/IMAGE, or CLASS/IMAGE alone."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from bnncore.data.cache import Found, Source, entries
from bnncore.data.images import SUFFIXES, read_images
from bnncore.data.parts import PARTS, DataError, Split
from bnncore.params import DataParams


def where(params: DataParams, root: Path) -> Path:
    """The folder or file of the data; DataError where there is none."""
    if params.path is not None:
        path = Path(root) / Path(params.path).expanduser()
        told = f"data.path = {params.path}"
    elif parent := os.environ.get("BNNCORE_DATA"):
        path = Path(parent) / params.name
        told = f"BNNCORE_DATA = {parent}"
    else:
        raise DataError(
            f"{params.name}: expected data.path, or environment variable BNNCORE_DATA naming the "
            f"folder that holds {params.name}/; got neither"
        )
    if not path.exists() and not params.download:
        raise DataError(f"{path}: expected the data of {params.name} ({told}), no such folder")
    return path.absolute()


def class_folders(params: DataParams, path: Path, count: int | None = None) -> Source:
    """PART/CLASS/IMAGE or CLASS/IMAGE, `count` classes (any number from 2 where None).

    Hidden files, and files that do not end like an image, are passed over.
    """
    parts = _parts(path)
    classes: tuple[str, ...] = ()
    found: list[tuple[int, int, str]] = []  # part, label, image
    passed_over: list[str] = []
    for number, (part, place) in enumerate(parts.items()):
        inside = [entry for entry in entries(place) if entry.is_dir()]
        here = tuple(entry.name for entry in inside)
        if part == "train":
            classes = here
            if len(here) < 2 or (count and len(here) != count):
                expected = count or "at least 2"
                raise DataError(f"{place}: expected {expected} class folders, got {len(here)}")
        _check_names(place, here, parts["train"], classes)
        for label, folder in enumerate(inside):
            images, others = _images(Path(folder.path))
            found += ((number, label, image) for image in images)
            passed_over += others

    def read() -> Found:
        images = read_images([image for _, _, image in found], params.size, params.channels)
        labels = np.array([label for _, label, _ in found], dtype=np.int64)
        edges = np.searchsorted([number for number, _, _ in found], range(len(parts) + 1))
        return classes, {
            part: Split(images[start:end], labels[start:end])
            for part, start, end in zip(parts, edges[:-1], edges[1:], strict=True)
        }

    detail = f"size={params.size}" + (f" channels={params.channels}" if params.channels else "")
    files = tuple(image for _, _, image in found)
    return Source(read, path, files, detail, tuple(passed_over))


def _parts(path: Path) -> dict[str, Path]:
    """Part -> the folder that holds its class folders."""
    names = [entry.name for entry in entries(path) if entry.is_dir()]
    if names and not set(names) & set(PARTS):
        return {"train": path}
    if "train" not in names or not set(names) <= set(PARTS):
        raise DataError(
            f"{path}: expected the folder train, perhaps val and test, and no others (the layout "
            f"is train/CLASS/IMAGE), or class folders alone (CLASS/IMAGE), got "
            f"{', '.join(names) or 'no folder'}"
        )
    return {part: path / part for part in PARTS if part in names}


def _check_names(place: Path, here: tuple[str, ...], train: Path, classes: tuple[str, ...]) -> None:
    """The class folders of a part are those of the training part, with names that can be shown."""
    for name in here:
        if not name.isprintable():
            raise DataError(f"{place}: expected class names of printable characters, got {name!r}")
    if missing := [name for name in classes if name not in here]:
        raise DataError(
            f"{place}: expected the class folders of {train}, lacks {', '.join(missing)}"
        )
    if more := [name for name in here if name not in classes]:
        raise DataError(
            f"{place}: expected the class folders of {train}, which has no {', '.join(more)}"
        )


def _images(folder: Path) -> tuple[list[str], list[str]]:
    """The images of a class, and the files that are passed over."""
    images: list[str] = []
    others: list[str] = []
    for entry in entries(folder):
        if entry.is_dir():
            raise DataError(
                f"{entry.path}: expected an image, got a folder (the layout is PART/CLASS/IMAGE, "
                "or CLASS/IMAGE)"
            )
        (images if entry.name.lower().endswith(SUFFIXES) else others).append(entry.path)
    if not images:
        raise DataError(f"{folder}: expected images of this class ({' '.join(SUFFIXES)}), got none")
    return images, others
