"""Trained packed files that come with bnncore: ``bnncore.load("zoo:NAME")``.

Beside each NAME.bnn stand NAME.yaml, the parameters it was trained by, and its entry in zoo.json:
what it is, what it reached, how it was made, and its scores on images that `images` makes.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bnncore.errors import UserError

FOLDER = Path(__file__).parent
LIST = FOLDER / "zoo.json"
PREFIX = "zoo:"


class ZooError(UserError, LookupError):
    """There is no such model."""


@dataclass(frozen=True)
class Entry:
    """A model of the zoo.

    Attributes:
        data: the images it was trained on, in words.
        about: the network and the ensemble, in words.
        val_top1, test_top1: accuracies of the packed file, in percent.
        command: what trained it.
        scores: of `images`, all members, as nested lists (images, classes).
    """

    name: str
    data: str
    about: str
    val_top1: float
    test_top1: float
    command: str
    scores: list[list[float]]

    @property
    def path(self) -> Path:
        """Where the packed file lies."""
        return FOLDER / f"{self.name}.bnn"


def entries() -> list[Entry]:
    """All there are, in the order of the table."""
    return [Entry(**one) for one in json.loads(LIST.read_text(encoding="utf-8"))]


def located(path: str | os.PathLike[str]) -> Path:
    """`path` itself or, of ``zoo:NAME``, that of the file that comes with bnncore.

    Raises:
        ZooError: there is no such model; lists those there are.
    """
    name = os.fspath(path)
    if not name.startswith(PREFIX):
        return Path(path)
    known = {entry.name: entry.path for entry in entries()}
    if (wanted := name.removeprefix(PREFIX)) not in known:
        raise ZooError(f"{name}: expected one of {', '.join(known)} behind {PREFIX!r}")
    return known[wanted]


def images(shape: tuple[int, int, int], count: int = 4) -> np.ndarray:
    """Seeded images of a network's (H, W, C), as uint8 (`count`, H, W, C): smooth ramps, which a
    network tells apart better than noise. Whole numbers alone, so they are the same everywhere.
    """
    height, width, channels = shape
    rng = np.random.RandomState(7)  # its stream never changes, as default_rng's may
    down, across, start = rng.randint(0, 512, (3, count, 1, 1, channels))
    y, x = np.arange(height)[:, None, None], np.arange(width)[:, None]
    ramps = (start + down * y // height * 2 + across * x // width * 2) % 512
    return np.minimum(ramps, 511 - ramps).astype(np.uint8)
