"""A set of images in three parts, how they are divided, and their moments."""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from bnncore.errors import UserError

PARTS = ("train", "val", "test")


class DataError(UserError, ValueError):
    """The data are missing or not as documented; the message names the path."""


@dataclass(frozen=True, eq=False)
class Split:
    """One part: `images` (N,H,W,C) uint8, `labels` (N,) int64, both contiguous."""

    images: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.ndim != 4 or images.dtype != np.uint8 or not images.flags.c_contiguous:
            got = f"{images.shape} {images.dtype}"
            raise ValueError(f"Split.images: expected contiguous (N,H,W,C) uint8, got {got}")
        if labels.shape != (len(images),) or labels.dtype != np.int64:
            got = f"{labels.shape} {labels.dtype}"
            raise ValueError(f"Split.labels: expected ({len(images)},) int64, got {got}")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: np.ndarray) -> Split:
        """The images at `index` (integers or a mask), in that order, copied."""
        return Split(
            np.ascontiguousarray(self.images[index]), np.ascontiguousarray(self.labels[index])
        )


@dataclass(frozen=True, eq=False)
class Dataset:
    """Three parts of one set of images, all H x W x C.

    `mean` and `std` (population) are per channel, of the training part's pixels / 255; a channel
    that is constant there has std 1, so that dividing by it is harmless.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    val: Split
    test: Split
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def image(self) -> tuple[int, int, int]:
        """(H, W, C)"""
        height, width, channels = self.train.images.shape[1:]
        return height, width, channels

    @cached_property
    def digest(self) -> str:
        """Identity of all arrays and class names, for logs: 16 hex digits of a SHA-256."""
        total = hashlib.sha256(repr(self.classes).encode("utf-8", "surrogateescape"))
        for split in (self.train, self.val, self.test):
            total.update(repr(split.images.shape).encode())
            total.update(split.images.data)
            total.update(split.labels.astype("<i8").data)
        return total.hexdigest()[:16]


def stratify(
    labels: np.ndarray,
    fractions: Mapping[str, float],
    seed: int,
    classes: tuple[str, ...],
    rest: bool = True,
    where: str = "data",
) -> dict[str, np.ndarray]:
    """Disjoint sets of sorted indices, `fractions[part]` of each class in each part.

    Of a class with n images a part gets ``round(n * fraction)``, at least one; what is left is
    part "train", which, if `rest`, must get at least one as well. Same arguments, same indices.
    Raises DataError, beginning with `where`, if a class has too few images.
    """
    # A stream of its own for each set of names: a subset must not repeat the split's permutation.
    stream = zlib.crc32(" ".join(fractions).encode())
    rng = np.random.default_rng([seed, stream])
    chosen: dict[str, list[np.ndarray]] = {part: [] for part in (*fractions, "train")}
    for label, name in enumerate(classes):
        members = rng.permutation(np.flatnonzero(labels == label))
        counts = [max(1, round(len(members) * fraction)) for fraction in fractions.values()]
        if sum(counts) + rest > len(members):
            wanted = " and ".join(f"{fraction:g} as {part}" for part, fraction in fractions.items())
            raise DataError(
                f"{where}: expected at least {len(fractions) + rest} images to set aside "
                f"{wanted} with one or more in each part, got {len(members)} of class {name!r}"
            )
        bounds = np.cumsum(counts)
        for part, some in zip(chosen, np.split(members, bounds), strict=True):
            chosen[part].append(some)
    return {part: np.sort(np.concatenate(some)) for part, some in chosen.items()}


def check_classes(where: str, part: str, labels: np.ndarray, classes: tuple[str, ...]) -> None:
    """Raise DataError, beginning with `where`, unless a part has images of each class."""
    counts = np.bincount(labels, minlength=len(classes))
    if missing := [name for name, n in zip(classes, counts, strict=True) if n == 0]:
        raise DataError(
            f"{where}: expected each class in part {part}, got no image of {', '.join(missing)}"
        )


def moments(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and population standard deviation of each channel of (N,H,W,C) uint8, over 255.

    From the counts of the 256 values, in integers: free of rounding, whatever the order or number
    of images. A constant channel has standard deviation 1.
    """
    means, stds = [], []
    values = range(256)
    for channel in range(images.shape[3]):
        counts = np.bincount(images[..., channel].ravel(), minlength=256).tolist()
        n = sum(counts)
        total = sum(v * k for v, k in zip(values, counts, strict=True))
        squares = sum(v * v * k for v, k in zip(values, counts, strict=True))
        means.append(total / n / 255)
        stds.append(math.sqrt(n * squares - total * total) / n / 255 or 1.0)
    return tuple(means), tuple(stds)


def normalization(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(scale, shift), float32 (C,): ``image * scale + shift`` is ``(image / 255 - mean) / std``."""
    m, s = np.asarray(mean, np.float64), np.asarray(std, np.float64)
    return (1 / (255 * s)).astype(np.float32), (-m / s).astype(np.float32)
