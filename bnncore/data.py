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
folder   one's own: SPLIT/CLASS/IMAGE, the layout of `torchvision.datasets.ImageFolder`
======== ========================================================================================

A part that the set lacks is split off its training part: seeded, and class by class, so that each
part has the classes in the same proportions. Whatever took long to read is kept as one .npz in a
cache (environment variable BNNCORE_CACHE, by default ``~/.cache/bnncore``).

Nothing here imports torch, but for the first reading of torchvision's CIFAR files.
"""

from __future__ import annotations

import csv
import hashlib
import math
import os
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image, ImageOps
from tqdm import tqdm

from bnncore.errors import UserError

PARTS = ("train", "val", "test")
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
CACHE_VERSION = 1  # part of every cache key: raise it when a reader's result changes


class DataError(UserError, ValueError):
    """The data are missing or not as documented; the message names the path."""


@dataclass(frozen=True)
class DataParams:
    """Which images, and how they are divided. Values out of range raise ValueError.

    - `name`: digits, cifar10, cifar100, fer2013 or folder
    - `path`: the data's folder (or fer2013's CSV), absolute or relative to the project's root; when
      None, the folder `name` in the folder that environment variable BNNCORE_DATA names
    - `download`: fetch cifar10 and cifar100 where they are missing; nothing else ever downloads
    - `val_fraction`, `test_fraction`: of the images found for training, how many become the
      validation and test parts of a set that comes without them
    - `seed`: of these splits and of `subset`
    - `size`: resize all images to `size` x `size` pixels (bilinear); None leaves them as they are
    - `subset`: the fraction of the training part that is kept, class by class, for short runs
    """

    name: str = "digits"
    path: str | None = None
    download: bool = False
    val_fraction: float = 0.15
    test_fraction: float = 0.2
    seed: int = 0
    size: int | None = None
    subset: float = 1.0

    def __post_init__(self) -> None:
        def check(field: str, good: bool, expected: str) -> None:
            if not good:
                raise ValueError(f"data.{field}: expected {expected}, got {getattr(self, field)!r}")

        def number(value: Any, kind: type | tuple[type, ...]) -> bool:
            return isinstance(value, kind) and not isinstance(value, bool)

        names = tuple(READERS)
        check("name", self.name in names, f"one of {', '.join(names)}")
        check("path", self.path is None or isinstance(self.path, str), "a path or null")
        check("path", self.path != "", "a path or null")
        check("path", self.name != "folder" or self.path is not None, "a path (name is folder)")
        check("download", isinstance(self.download, bool), "true or false")
        for field in ("val_fraction", "test_fraction"):
            value = getattr(self, field)
            check(field, number(value, (int, float)) and 0 < value < 1, "a number in (0, 1)")
        rest = 1 - self.val_fraction
        check("test_fraction", self.test_fraction < rest, "less than 1 - data.val_fraction")
        check("seed", number(self.seed, int) and self.seed >= 0, "an integer >= 0")
        check("size", self.size is None or number(self.size, int), "an integer >= 1 or null")
        check("size", self.size is None or self.size >= 1, "an integer >= 1 or null")
        good = number(self.subset, (int, float)) and 0 < self.subset <= 1
        check("subset", good, "a number in (0, 1]")


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


def load(params: DataParams, root: Path = Path(".")) -> Dataset:
    """Read, complete to three parts, resize and thin out as `params` say.

    `root` is the project's root, which a relative `params.path` starts from. The same params and
    files give the same arrays. Raises DataError, naming the path.
    """
    classes, parts = READERS[params.name](params, root)
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
        _check_classes(where, part, parts[part].labels, classes)
    train, val, test = (_resize(parts[part], params.size) for part in PARTS)
    mean, std = moments(train.images)
    return Dataset(params.name, classes, train, val, test, mean, std)


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


# --------------------------------------------------------------------------------------- readers
# reader(params, root) -> class names, and the parts that the set has: "train" and perhaps others.
Found = tuple[tuple[str, ...], dict[str, Split]]


def _digits(params: DataParams, root: Path) -> Found:
    """scikit-learn's digits, 8 x 8, values v in 0..16 as ``(255 v + 8) // 16``.

    That is 255 v / 16 rounded, half up: 0 to 0, 16 to 255, and no two values to the same one, so
    nothing is lost.
    """
    from sklearn.datasets import load_digits  # here: it takes a second, which other sets need not

    found = load_digits()
    images = (found.images.astype(np.int64) * 255 + 8) // 16
    split = Split(images[..., None].astype(np.uint8), found.target.astype(np.int64))
    return tuple(str(digit) for digit in range(10)), {"train": split}


def _cifar(params: DataParams, root: Path) -> Found:
    """torchvision's CIFAR files, or class folders.

    The files are pickles. torchvision compares their md5 with the published ones before it
    unpickles them, and refuses others; this module never unpickles anything.
    """
    path = _where(params, root)
    count, inner = {"cifar10": (10, "cifar-10-batches-py"), "cifar100": (100, "cifar-100-python")}[
        params.name
    ]
    files = path / inner

    def read() -> Found:
        sets = _torchvision_datasets()
        maker = {"cifar10": sets.CIFAR10, "cifar100": sets.CIFAR100}[params.name]
        try:
            train = maker(path, train=True, download=params.download)
            test = maker(path, train=False)
        except Exception as error:  # of the network, the archive, or a wrong md5
            raise DataError(
                f"{files}: torchvision could not read {params.name}: {error}"
            ) from error
        return tuple(train.classes), {
            part: Split(np.ascontiguousarray(one.data), np.asarray(one.targets, dtype=np.int64))
            for part, one in (("train", train), ("test", test))
        }

    if not files.is_dir():
        if (path / "train").is_dir():
            return _class_folders(path, params.size, count)
        if not params.download:
            raise DataError(
                f"{path}: expected the folder {inner} (unpacked from {params.name}'s archive for "
                f"Python), or class folders train/CLASS/IMAGE and test/CLASS/IMAGE, found neither; "
                f"with data.download true it is fetched"
            )
        read()  # for its download: the key of the cache is made from the files
    return _cached(_key(files, _entries(files)), read)


def _fer2013(params: DataParams, root: Path) -> Found:
    """FER-2013's CSV (columns emotion, pixels, Usage; in any order), or class folders.

    Training, PublicTest and PrivateTest become train, val and test.
    """
    path = _where(params, root)
    for file in (path, path / "fer2013.csv", path / "icml_face_data.csv"):
        if file.is_file():
            return _cached(_key(file, []), partial(_fer_csv, file))
    if not (path / "train").is_dir():
        raise DataError(
            f"{path}: expected FER-2013 as fer2013.csv or icml_face_data.csv, or as class folders "
            f"train/CLASS/IMAGE, val/..., test/...; found none of them"
        )
    return _class_folders(path, params.size, len(FER_EMOTIONS))


# The CSV's numbers 0 to 6.
FER_EMOTIONS = ("angry", "disgust", "fear", "happy", "sad", "surprise", "neutral")


def _fer_csv(file: Path) -> Found:
    usages = {"Training": "train", "PublicTest": "val", "PrivateTest": "test"}
    classes = tuple(sorted(FER_EMOTIONS))
    pixels: dict[str, list[bytes]] = {part: [] for part in PARTS}
    labels: dict[str, list[int]] = {part: [] for part in PARTS}
    with open(file, newline="", encoding="utf-8-sig") as lines:
        rows = csv.reader(lines, skipinitialspace=True)
        try:
            header = [name.strip() for name in next(rows, [])]
            if missing := {"emotion", "pixels", "Usage"} - set(header):
                raise DataError(
                    f"{file}: expected columns emotion, pixels, Usage; "
                    f"lacks {', '.join(sorted(missing))}"
                )
            for row in rows:
                where = f"{file}, line {rows.line_num}"
                if len(row) != len(header):
                    raise DataError(f"{where}: expected {len(header)} fields, got {len(row)}")
                fields = dict(zip(header, row, strict=True))
                emotion, usage = fields["emotion"].strip(), fields["Usage"].strip()
                if usage not in usages:
                    wanted = ", ".join(usages)
                    raise DataError(f"{where}: expected Usage one of {wanted}, got {usage!r}")
                if emotion not in list("0123456"):
                    raise DataError(f"{where}: expected emotion 0 to 6, got {emotion!r}")
                try:
                    image = bytes(map(int, fields["pixels"].split()))
                except ValueError as error:
                    raise DataError(f"{where}: expected pixels in 0..255: {error}") from error
                if len(image) != 48 * 48:
                    raise DataError(f"{where}: expected 48 * 48 pixels, got {len(image)}")
                pixels[usages[usage]].append(image)
                labels[usages[usage]].append(classes.index(FER_EMOTIONS[int(emotion)]))
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{file}, line {rows.line_num}: not a CSV in UTF-8: {error}") from error
    parts = {}
    for part in PARTS:
        # a bytearray, not bytes: an array over bytes could not be written to
        images = np.frombuffer(bytearray().join(pixels[part]), np.uint8).reshape(-1, 48, 48, 1)
        parts[part] = Split(images, np.asarray(labels[part], dtype=np.int64))
        _check_classes(str(file), part, parts[part].labels, classes)
    return classes, parts


def _folder(params: DataParams, root: Path) -> Found:
    return _class_folders(_where(params, root), params.size)


READERS: dict[str, Callable[[DataParams, Path], Found]] = {
    "digits": _digits,
    "cifar10": _cifar,
    "cifar100": _cifar,
    "fer2013": _fer2013,
    "folder": _folder,
}


# --------------------------------------------------------------------------------- class folders
def _class_folders(path: Path, size: int | None, count: int | None = None) -> Found:
    """PART/CLASS/IMAGE, `count` classes (any number from 2 where None), through the cache.

    Hidden files, and files that do not end like an image, are passed over.
    """
    folders = [entry for entry in _entries(path) if entry.is_dir()]
    names = [entry.name for entry in folders]
    if "train" not in names or not set(names) <= set(PARTS):
        raise DataError(
            f"{path}: expected the folder train, perhaps val and test, and no others (the layout "
            f"is train/CLASS/IMAGE), got {', '.join(names) or 'no folder'}"
        )
    parts = [part for part in PARTS if part in names]
    classes: tuple[str, ...] = ()
    found: list[tuple[int, int, os.DirEntry[str]]] = []  # part, label, image
    for part in parts:
        inside = [entry for entry in _entries(path / part) if entry.is_dir()]
        here = tuple(entry.name for entry in inside)
        if part == "train":
            classes = here
            if len(here) < 2 or (count and len(here) != count):
                expected = count or "at least 2"
                raise DataError(
                    f"{path / part}: expected {expected} class folders, got {len(here)}"
                )
        if missing := [name for name in classes if name not in here]:
            raise DataError(
                f"{path / part}: expected the class folders of {path / 'train'}, "
                f"lacks {', '.join(missing)}"
            )
        if more := [name for name in here if name not in classes]:
            raise DataError(
                f"{path / part}: expected the class folders of {path / 'train'}, "
                f"which has no {', '.join(more)}"
            )
        for label, folder in enumerate(inside):
            images = []
            for entry in _entries(Path(folder.path)):
                if entry.is_dir():
                    raise DataError(
                        f"{entry.path}: expected an image, got a folder (the layout is "
                        f"{part}/CLASS/IMAGE)"
                    )
                if entry.name.lower().endswith(SUFFIXES):
                    images.append(entry)
            if not images:
                raise DataError(
                    f"{folder.path}: expected images of this class ({' '.join(SUFFIXES)}), got none"
                )
            found += ((parts.index(part), label, entry) for entry in images)

    def read() -> Found:
        images = _read_images([entry.path for _, _, entry in found], size)
        labels = np.array([label for _, label, _ in found], dtype=np.int64)
        edges = np.searchsorted([part for part, _, _ in found], range(len(parts) + 1))
        return classes, {
            part: Split(images[start:end], labels[start:end])
            for part, start, end in zip(parts, edges[:-1], edges[1:], strict=True)
        }

    return _cached(_key(path, (entry for _, _, entry in found), f"size={size}"), read)


def _read_images(paths: list[str], size: int | None) -> np.ndarray:
    """All images as one (N,H,W,C) uint8, on all cores: pillow decodes without the GIL."""
    first = _read_image(paths[0], size)
    images = np.empty((len(paths), *first.shape), np.uint8)
    block = 256

    def read(start: int) -> None:
        for index in range(start, min(start + block, len(paths))):
            image = _read_image(paths[index], size)
            if image.shape != first.shape:
                raise DataError(
                    f"{paths[index]}: expected height, width, channels {first.shape} as in "
                    f"{paths[0]}, got {image.shape}; data.size resizes, channels must agree"
                )
            images[index] = image

    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=len(paths), desc="reading images", unit="", leave=False, disable=None) as bar,
    ):
        for _ in pool.map(read, range(0, len(paths), block)):
            bar.update(min(block, len(paths) - bar.n))
    return images


def _read_image(path: str, size: int | None) -> np.ndarray:
    """One image, upright, as (H,W,1) gray or (H,W,3) RGB uint8."""
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
                alpha = image.convert("RGBA").getchannel("A")
                if alpha.getextrema() != (255, 255):
                    raise DataError(f"{path}: expected an opaque image, got transparent pixels")
            if image.mode in ("1", "L", "LA", "La"):
                image = image.convert("L")
            elif image.mode in ("RGB", "RGBA", "RGBa", "P", "PA", "CMYK", "YCbCr", "HSV", "LAB"):
                image = image.convert("RGB")
            else:  # more than 8 bits a channel, which pillow would clip without a word
                raise DataError(f"{path}: expected 8-bit gray or RGB, got mode {image.mode}")
            if size is not None and image.size != (size, size):
                image = image.resize((size, size), Image.Resampling.BILINEAR)
            pixels = np.asarray(image)
    except DataError:
        raise
    except Exception as error:  # broken files make pillow raise nearly anything
        raise DataError(f"{path}: expected a readable image: {error}") from error
    return pixels.reshape(*pixels.shape[:2], -1)


def _resize(split: Split, size: int | None) -> Split:
    if size is None or split.images.shape[1:3] == (size, size):
        return split
    images = np.empty((len(split), size, size, split.images.shape[3]), np.uint8)
    for image, result in zip(split.images, images, strict=True):
        squeezed = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
        resized = np.asarray(squeezed.resize((size, size), Image.Resampling.BILINEAR))
        result[...] = resized.reshape(result.shape)
    return Split(images, split.labels)


# ----------------------------------------------------------------------------------------- paths
def _where(params: DataParams, root: Path) -> Path:
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


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What is in `folder` and not hidden, by name."""
    try:
        with os.scandir(folder) as entries:
            return sorted((e for e in entries if e.name[0] != "."), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{folder}: expected a readable folder: {error.strerror}") from error


def _check_classes(where: str, part: str, labels: np.ndarray, classes: tuple[str, ...]) -> None:
    counts = np.bincount(labels, minlength=len(classes))
    if missing := [name for name, n in zip(classes, counts, strict=True) if n == 0]:
        raise DataError(
            f"{where}: expected each class in part {part}, got no image of {', '.join(missing)}"
        )


# ----------------------------------------------------------------------------------------- cache
def _key(path: Path, entries: Iterable[os.DirEntry[str]], detail: str = "") -> str:
    """Hash of where the data are and of each file's name, size and times.

    Names, sizes and modification times alone could agree for different data: archives often fix
    the times, and raw formats the sizes. So the place and the time of last change count as well;
    at worst that reads something again. pillow's version counts, as decoders may differ.
    """
    total = hashlib.sha256(f"{CACHE_VERSION} {PIL.__version__} {detail}\0".encode())
    total.update(os.fsencode(path))
    files: list[Path | os.DirEntry[str]] = [path] if path.is_file() else []
    for file in (*files, *entries):
        name = os.fspath(file)
        try:
            s = file.stat()
        except OSError as error:
            raise DataError(f"{name}: expected a readable file: {error.strerror}") from error
        total.update(b"\0" + os.fsencode(name))
        total.update(f"\0{s.st_size} {s.st_mtime_ns} {s.st_ctime_ns}".encode())
    return total.hexdigest()[:40]


def _cached(key: str, read: Callable[[], Found]) -> Found:
    """`read()`, or what it returned when the cache's file for `key` was written.

    A file that is not whole is written anew. Without a writable cache everything still works, and
    a warning says so.
    """
    folder = Path(os.environ.get("BNNCORE_CACHE") or Path.home() / ".cache" / "bnncore")
    file = folder / f"{key}.npz"
    try:
        with np.load(file, allow_pickle=False) as arrays:  # zip: a checksum for each array
            classes = tuple(str(name) for name in arrays["classes"])
            parts = {
                part: Split(arrays[f"{part}.images"], arrays[f"{part}.labels"])
                for part in PARTS
                if f"{part}.images" in arrays
            }
        if "train" not in parts:
            raise ValueError("no training part")
        for part, split in parts.items():
            _check_classes(str(file), part, split.labels, classes)
        return classes, parts
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        warnings.warn(f"{file}: unreadable cache, reading the images again ({error})", stacklevel=2)
    classes, parts = read()
    arrays = {"classes": np.array(classes)}
    for part, split in parts.items():
        arrays |= {f"{part}.images": split.images, f"{part}.labels": split.labels}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Written aside and renamed, so that no reader meets half a file.
        handle, aside = tempfile.mkstemp(dir=folder, prefix=".", suffix=".npz")
        try:
            with os.fdopen(handle, "wb") as out:
                np.savez(out, allow_pickle=False, **arrays)
            os.replace(aside, file)
        except BaseException:
            os.unlink(aside)
            raise
    except OSError as error:
        warnings.warn(f"{folder}: could not write the cache ({error})", stacklevel=2)
    return classes, parts


# ----------------------------------------------------------------------------------- torchvision
_kept: list[Any] = []  # a torch.library.Library forgets its operators when it is collected


def _torchvision_datasets() -> Any:
    """`torchvision.datasets`, also where torchvision's compiled operators do not load.

    Beside a torch of another build (a CPU-only one, say) `import torchvision` fails: it describes
    its operators nms and qnms, which do not exist there. No data set uses them, so their names
    are declared and the import tried again. Only then: to declare them twice ends the process.
    """
    try:
        from torchvision import datasets
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        import torch

        if not _kept:
            library = torch.library.Library("torchvision", "FRAGMENT")
            for name in ("nms", "qnms"):
                library.define(f"{name}(Tensor dets, Tensor scores, float threshold) -> Tensor")
            _kept.append(library)
        from torchvision import datasets
    return datasets


def normalization(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(scale, shift), float32 (C,): ``image * scale + shift`` is ``(image / 255 - mean) / std``."""
    m, s = np.asarray(mean, np.float64), np.asarray(std, np.float64)
    return (1 / (255 * s)).astype(np.float32), (-m / s).astype(np.float32)
