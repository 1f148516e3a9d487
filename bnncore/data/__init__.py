"""Labelled images as arrays: `load(DataParams(...)) -> Dataset` with train, val and test parts.

Shapes: `N` images, `H W` height and width, `C` channels (1 gray, 3 RGB). Images are uint8 N H W C,
neither normalised nor augmented (the training loop does both), labels int64 in
``0 .. len(classes) - 1``, classes in alphabetical order, so that a set gets the same labels from
its own file format as from class folders.

======== ========================================================================================
digits   the 1,797 handwritten digits that scikit-learn ships: 8 x 8 gray, nothing to download
cifar10  torchvision's files, or class folders; 32 x 32 RGB
cifar100 the same, with the 100 fine labels
fer2013  its CSV, or class folders; 48 x 48 gray, with its own three-way split
folder   one's own: PART/CLASS/IMAGE, or CLASS/IMAGE alone
======== ========================================================================================

A part that the set lacks is split off its training part: seeded, and class by class, so that each
part has the classes in the same proportions. Whatever took long to read is kept as one .npz in a
cache (environment variable BNNCORE_CACHE, by default ``~/.cache/bnncore``).

Nothing here imports torch, but for the first reading of torchvision's CIFAR files.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np

from bnncore.data.cache import Found, Source, cached
from bnncore.data.cifar import cifar, torchvision_datasets
from bnncore.data.fer2013 import fer2013
from bnncore.data.folders import class_folders, where
from bnncore.data.images import SUFFIXES, read_image, resized
from bnncore.data.parts import (
    PARTS,
    DataError,
    Dataset,
    Split,
    check_classes,
    moments,
    normalization,
    stratify,
)
from bnncore.params import DataParams

__all__ = [
    "PARTS", "READERS", "SUFFIXES", "DataError", "DataParams", "Dataset", "Source", "Split",
    "load", "moments", "normalization", "read_image", "source", "stratify",
    "torchvision_datasets",
]  # fmt: skip


def load(params: DataParams, root: Path = Path(".")) -> Dataset:
    """Read, complete to three parts, resize and thin out as `params` say.

    `root` is the project's root, which a relative `params.path` starts from. The same params and
    files give the same arrays. Raises DataError, naming the path.
    """
    classes, parts = cached(source(params, root))
    train, where = parts["train"], params.path or params.name
    absent = {
        part: fraction
        for part, fraction in (("val", params.val_fraction), ("test", params.test_fraction))
        if part not in parts
    }
    if absent:
        index = stratify(train.labels, absent, params.seed, classes, where=where)
        parts = parts | {part: train[index[part]] for part in ("train", *absent)}
    if params.subset < 1:
        train = parts["train"]
        share = {"subset": params.subset}
        index = stratify(train.labels, share, params.seed, classes, rest=False, where=where)
        parts = parts | {"train": train[index["subset"]]}
    for part in PARTS:
        check_classes(where, part, parts[part].labels, classes)
    train, val, test = (resized(parts[part], params.size, params.channels) for part in PARTS)
    mean, std = moments(train.images)
    return Dataset(params.name, classes, train, val, test, mean, std)


def source(params: DataParams, root: Path = Path(".")) -> Source:
    """Where the images of `params` are, found but not read. Raises DataError, naming the path."""
    return READERS[params.name](params, root)


def _digits(params: DataParams, root: Path) -> Source:
    """scikit-learn's digits, 8 x 8, values v in 0..16 as ``(255 v + 8) // 16``.

    That is 255 v / 16 rounded, half up: 0 to 0, 16 to 255, and no two values to the same one, so
    nothing is lost.
    """

    def read() -> Found:
        package = importlib.util.find_spec("sklearn")  # importing it takes a second
        assert package is not None
        assert package.origin is not None
        path = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
        rows = np.loadtxt(path, np.int64, delimiter=",")
        images = (rows[:, :-1].reshape(-1, 8, 8, 1) * 255 + 8) // 16
        split = Split(images.astype(np.uint8), rows[:, -1])
        return tuple(str(digit) for digit in range(10)), {"train": split}

    return Source(read)


def _folder(params: DataParams, root: Path) -> Source:
    return class_folders(params, where(params, root))


READERS: dict[str, Callable[[DataParams, Path], Source]] = {
    "digits": _digits,
    "cifar10": cifar,
    "cifar100": cifar,
    "fer2013": fer2013,
    "folder": _folder,
}
