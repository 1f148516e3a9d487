"""Image files as arrays: one reader, for training and for classifying.

Shapes: `H W` height and width, `C` channels, 1 gray or 3 RGB.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from bnncore.data.parts import DataError, Split

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_MODES = {1: "L", 3: "RGB"}
_SIXTEEN = re.compile(r";16[BLN]")  # in how pillow names what a file has
_SHOWN = 20  # bad files that an error names
log = logging.getLogger(__name__)


def read_image(
    path: str | os.PathLike[str], size: tuple[int, int] | None, channels: int | None = None
) -> np.ndarray:
    """One image, upright, as (H,W,1) gray or (H,W,3) RGB uint8.

    Args:
        size: (H, W) to resize to, bilinear; None leaves it as it is.
        channels: 1 or 3 to convert to; None for what the file has.

    Raises:
        DataError: it cannot be read, has transparent pixels, more than 8 bits a channel, or
            several pictures; names the file.
    """
    try:
        with Image.open(path) as opened:
            # Photographs of telephones (MPO) hold a preview or a second view behind the picture.
            if opened.format != "MPO" and getattr(opened, "is_animated", False):
                raise DataError(f"{path}: expected one picture, got several in a file")
            if _SIXTEEN.search(str([tile.args for tile in opened.tile])):
                # Of colours, pillow would cut 8 without a word.
                raise DataError(f"{path}: expected 8-bit gray or RGB, got 16 bits a channel")
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
            if channels is not None:
                image = image.convert(_MODES[channels])
            pixels = _resized(image, size)
    except DataError:
        raise
    except Exception as error:  # broken files make pillow raise nearly anything
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: expected a readable image: {reason}") from error
    return pixels


def read_images(paths: Sequence[str], size: int | None, channels: int | None) -> np.ndarray:
    """All images as one (N,H,W,C) uint8, on all cores: pillow decodes without the GIL.

    Raises:
        DataError: names all files that cannot be read, or that differ from the first in shape.
    """
    square = None if size is None else (size, size)
    found: list[np.ndarray] = []
    bad: list[str] = []
    for first in paths:  # one that can be read says what shape the others have
        try:
            found.append(read_image(first, square, channels))
            break
        except DataError as error:
            bad.append(str(error))
    shape = found[0].shape if found else (0, 0, 1)
    images = _room(first, (len(paths), *shape))
    block = 256

    def read(start: int) -> list[str]:
        wrong = []
        for index in range(start, min(start + block, len(paths))):
            try:
                image = read_image(paths[index], square, channels)
            except DataError as error:
                wrong.append(str(error))
                continue
            if image.shape == shape:
                images[index] = image
            else:
                wrong.append(
                    f"{paths[index]}: expected height, width, channels {shape} as in {first}, got "
                    f"{image.shape}; data.size resizes, data.channels converts"
                )
        return wrong

    start = len(bad)
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=len(paths), desc="reading images", unit="", leave=False, disable=None) as bar,
    ):
        for wrong in pool.map(read, range(start, len(paths), block)):
            bad += wrong
            bar.update(min(block, len(paths) - bar.n))
    if bad:
        more = [f"and {len(bad) - _SHOWN} more"] if len(bad) > _SHOWN else []
        raise DataError("\n".join([*bad[:_SHOWN], *more]))
    return images


def resized(split: Split, size: int | None, channels: int | None) -> Split:
    """A part whose images are of `size` x `size` pixels and so many channels, None for as found."""
    height, width, found = split.images.shape[1:]
    square = (height, width) if size is None else (size, size)
    if (*square, channels or found) == (height, width, found):
        return split
    images = _room("data.size", (len(split), *square, channels or found))
    for image, result in zip(split.images, images, strict=True):
        picture = Image.fromarray(image[..., 0] if found == 1 else image)
        result[...] = _resized(picture.convert(_MODES[channels or found]), square)
    return Split(images, split.labels)


def _resized(image: Image.Image, size: tuple[int, int] | None) -> np.ndarray:
    """The pixels of an image, (H,W,C), in this (H, W)."""
    if size is not None and image.size != (size[1], size[0]):
        image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    pixels = np.asarray(image)
    return pixels.reshape(*pixels.shape[:2], -1)


def _room(where: str, shape: tuple[int, ...]) -> np.ndarray:
    """An array for images, if this machine has the memory."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    need = int(np.prod(shape, dtype=np.int64))
    if need > memory:
        raise DataError(
            f"{where}: expected images that fit {memory / 2**30:.1f} GiB of memory, got "
            f"{'x'.join(map(str, shape))} bytes; data.size makes them smaller"
        )
    return np.empty(shape, np.uint8)
