"""What identifies a set of image files: their names and contents, wherever they lie."""

from __future__ import annotations

import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bnncore.data.cache import Source, status
from bnncore.data.parts import DataError

_SETTLED_NS = 2_000_000_000  # a file changed more recently may change again with the same times


def contents(source: Source, kept: Path | None = None) -> dict[str, str]:
    """Name below ``source.place`` -> SHA-256, of every file that is read.

    Args:
        kept: a file that remembers hashes, by size and times; without it all files are read.

    Raises:
        DataError: a file cannot be read; names it.
    """
    if source.place is None:
        return {}
    known = _known(kept)
    now = time.time_ns()
    hashes: dict[str, list] = {}
    todo = []
    for file in source.files:
        s = status(file)
        times = [s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino]
        before = known.get(file)
        hashes[file] = before if before and before[:-1] == times else [*times, ""]
        if not hashes[file][-1]:
            todo.append(file)
    blocks = [todo[i : i + 512] for i in range(0, len(todo), 512)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for block, found in zip(blocks, pool.map(_hash, blocks), strict=True):
            for file, one in zip(block, found, strict=True):
                hashes[file][-1] = one
    if kept and todo:
        settled = {f: h for f, h in hashes.items() if now - max(h[1], h[2]) > _SETTLED_NS}
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(settled))
    below = len(os.path.join(source.place, ""))
    return {file[below:] or Path(file).name: found[-1] for file, found in hashes.items()}


def _known(kept: Path | None) -> dict[str, list]:
    try:
        return json.loads(kept.read_text()) if kept else {}
    except (OSError, ValueError):
        return {}


def _hash(files: list[str]) -> list[str]:
    found = []
    for file in files:
        try:
            with open(file, "rb", buffering=0) as opened:
                found.append(hashlib.sha256(opened.read()).hexdigest())
        except OSError as error:
            raise DataError(f"{file}: expected a readable file: {error.strerror}") from error
    return found


def repeated(hashes: dict[str, str]) -> list[tuple[str, str]]:
    """(name, name of an earlier file) of all files that have the contents of another."""
    first: dict[str, str] = {}
    return [(name, first[h]) for name, h in hashes.items() if first.setdefault(h, name) != name]
