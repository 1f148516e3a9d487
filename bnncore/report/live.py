"""What lets the page run the packed models: their WebAssembly, and some test images."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from bnncore.device import compilers, wasm
from bnncore.packed import packfile

SAMPLES, SAMPLE_BYTES = 36, 160 << 10  # of the page's test images, at most
MODULE_BYTES = 2 << 20  # of all WebAssembly in a page
INSTALL = ("This page can run the packed models, if a compiler is there when it is made: "
           "pip install 'bnncore[device]', then python -m bnncore.report --html")  # fmt: skip


def samples(images: np.ndarray, labels: np.ndarray, wrong: np.ndarray) -> dict[str, Any]:
    """Test images of all classes, a third of them such as models get wrong most often.

    Args:
        images: uint8 (N, H, W, C).
        labels: (N,).
        wrong: how many models get each image wrong (N,).
    """
    count = min(SAMPLES, max(1, SAMPLE_BYTES // images[0].nbytes), len(images))
    hard = np.argsort(-wrong, kind="stable")[: count // 3]
    hard = hard[wrong[hard] > 0]
    nth = np.zeros(len(labels), np.int64)  # the first of its class, the second, ...
    for label in np.unique(labels):
        nth[labels == label] = np.arange((labels == label).sum())
    order = np.lexsort((labels, nth))
    chosen = np.concatenate([hard, order[~np.isin(order, hard)][: count - len(hard)]])
    chosen = chosen[np.argsort(labels[chosen], kind="stable")]
    return {
        "image": list(images.shape[1:]),
        "labels": labels[chosen].tolist(),
        "pixels": _text(np.ascontiguousarray(images[chosen]).tobytes()),
    }


def models(files: Iterable[Path], shown: Mapping[str, Any]) -> dict[str, Any]:
    """The page's ``live``: `shown` from `samples`, and the models that take such images.

    Of files that are not there, or no longer fit, nothing is said; where no compiler is installed
    ``why`` says what is missing.
    """
    files = [file for file in files if file.exists()]
    if not files:
        return {}
    if compilers.missing("ziglang"):
        return {"why": INSTALL}
    programs = {file.stem: packfile.load(file) for file in files}
    programs = {n: p for n, p in programs.items() if list(p.image) == shown["image"]}
    with ThreadPoolExecutor() as pool:  # the work is the compiler's
        modules = dict(zip(programs, pool.map(wasm.module, programs.values()), strict=True))
    taken, without, room = {}, [], MODULE_BYTES
    for name, program in programs.items():
        room -= len(modules[name])
        if room < 0:
            without.append(name)
            room += len(modules[name])
            continue
        taken[name] = {"members": program.members, "module": _text(modules[name])}
    classes = next((program.classes for program in programs.values()), ())
    return {**shown, "classes": classes, "models": taken, "without": without} if taken else {}


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")
