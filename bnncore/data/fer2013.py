"""FER-2013 from its CSV, or from class folders."""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path

import numpy as np

from bnncore.data.cache import Found, Source
from bnncore.data.folders import class_folders, where
from bnncore.data.parts import PARTS, DataError, Split, check_classes
from bnncore.params import DataParams


def fer2013(params: DataParams, root: Path) -> Source:
    """FER-2013's CSV (columns emotion, pixels, Usage; in any order), or class folders.

    Training, PublicTest and PrivateTest become train, val and test.
    """
    path = where(params, root)
    for file in (path, path / "fer2013.csv", path / "icml_face_data.csv"):
        if file.is_file():
            return Source(partial(_read, file), file, (str(file),))
    if not (path / "train").is_dir():
        raise DataError(
            f"{path}: expected FER-2013 as fer2013.csv or icml_face_data.csv, or as class folders "
            f"train/CLASS/IMAGE, val/..., test/...; found none of them"
        )
    return class_folders(params, path, len(FER_EMOTIONS))


# The CSV's numbers 0 to 6.
FER_EMOTIONS = ("angry", "disgust", "fear", "happy", "sad", "surprise", "neutral")


def _read(file: Path) -> Found:
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
        check_classes(str(file), part, parts[part].labels, classes)
    return classes, parts
