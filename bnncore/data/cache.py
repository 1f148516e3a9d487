"""Where a set is read from, and what is kept of it: as one .npz, in place of files that are slow to
read."""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import PIL

from bnncore.data.parts import PARTS, DataError, Split, check_classes

CACHE_VERSION = 1  # part of every cache key: raise it when a reader's result changes
Found = tuple[tuple[str, ...], dict[str, Split]]  # class names, "train" and perhaps other parts


@dataclass(frozen=True, eq=False)
class Source:
    """A set of images that was found and is not read yet.

    Attributes:
        read: its class names and parts.
        place: its folder or file; None where it has no files.
        files: everything that `read` reads, in that order; below `place` or `place` itself.
        detail: of `read`, beside the files.
        passed_over: files among them that are not read.
    """

    read: Callable[[], Found]
    place: Path | None = None
    files: tuple[str, ...] = ()
    detail: str = ""
    passed_over: tuple[str, ...] = field(default=(), repr=False)


def entries(folder: Path) -> list[os.DirEntry[str]]:
    """What is in `folder` and not hidden, by name."""
    try:
        with os.scandir(folder) as found:
            return sorted((e for e in found if e.name[0] != "."), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{folder}: expected a readable folder: {error.strerror}") from error


def status(file: str) -> os.stat_result:
    """`os.stat`, as a DataError where it fails."""
    try:
        return os.stat(file)
    except OSError as error:
        raise DataError(f"{file}: expected a readable file: {error.strerror}") from error


def key(place: Path, files: Iterable[str], detail: str = "") -> str:
    """Hash of where the data are and of each file's name, size and times.

    Names, sizes and modification times alone could agree for different data: archives often fix
    the times, and raw formats the sizes. So the place and the time of last change count as well;
    at worst that reads something again. pillow's version counts, as decoders may differ.
    """
    total = hashlib.sha256(f"{CACHE_VERSION} {PIL.__version__} {detail}\0".encode())
    total.update(os.fsencode(place))
    for file in files:
        s = status(file)
        total.update(b"\0" + os.fsencode(file))
        total.update(f"\0{s.st_size} {s.st_mtime_ns} {s.st_ctime_ns}".encode())
    return total.hexdigest()[:40]


def cached(source: Source) -> Found:
    """`source.read()`, or what it gave when the cache's file for its files was written.

    A file that is not whole is written anew. Without a writable cache everything still works, and
    a warning says so, with its path.
    """
    if source.place is None:
        return source.read()
    folder = Path(os.environ.get("BNNCORE_CACHE") or Path.home() / ".cache" / "bnncore")
    file = folder / f"{key(source.place, source.files, source.detail)}.npz"
    try:
        return _kept(file)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        warnings.warn(f"{file}: unreadable cache, reading the images again ({error})", stacklevel=2)
    classes, parts = source.read()
    arrays = {"classes": np.array(classes)}
    for part, split in parts.items():
        arrays |= {f"{part}.images": split.images, f"{part}.labels": split.labels}
    try:
        _keep(file, arrays)
    except OSError as error:  # a full disk among them
        reason = error.strerror or error
        warnings.warn(f"{folder}: could not write the cache ({reason})", stacklevel=2)
    return classes, parts


def _kept(file: Path) -> Found:
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
        check_classes(str(file), part, split.labels, classes)
    return classes, parts


def _keep(file: Path, arrays: dict[str, np.ndarray]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    # Written aside and renamed, so that no reader meets half a file.
    handle, aside = tempfile.mkstemp(dir=file.parent, prefix=".", suffix=".npz")
    try:
        with os.fdopen(handle, "wb") as out:
            np.savez(out, allow_pickle=False, **arrays)
        os.replace(aside, file)
    except BaseException:
        os.unlink(aside)
        raise
