"""Put files and folders in the place of old ones: wholly, or not at all.

What is new is brought beside its place first, onto the same file system, and only then are names
exchanged, as a journal says. Until that says so nothing has happened; from then on whoever comes
next, after an error or a kill, ends it. The journal and a lock are in a folder of DVC's, which git
does not see.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WORK = Path(".dvc/tmp/submit")
Stamp = list[int] | None


@contextlib.contextmanager
def only(root: Path) -> Iterator[Path]:
    """Be the only one to put anything in place in `root`: a folder to work in; waits for it.

    What a killed process left undone is undone or ended first.
    """
    work = (root / WORK).resolve()
    work.mkdir(parents=True, exist_ok=True)
    with open(work / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("another process is putting results in place here; waiting for it", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        recover(work)
        with _terminable():
            yield work


def swap(new: Path, root: Path, paths: list[str], work: Path) -> None:
    """Put ``new/PATH`` into the place of ``root/PATH``, the last of `paths` last.

    A link to a folder stays, and what it points to is replaced; a link to a file is replaced.

    Args:
        work: the folder that `only` gave.
    """
    places = [place(root / path, new / path) for path in paths]
    try:
        _write(work, False, places)
        for path, there in zip(paths, places, strict=True):
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(new / path, _beside(there, "new"))
        _write(work, True, places)
        recover(work)
    except BaseException:
        recover(work)
        raise


def recover(work: Path) -> None:
    """End or undo what the journal says was begun; may be killed and called again."""
    journal = work / "journal.json"
    if not journal.exists():
        return
    content = json.loads(journal.read_text())
    for path, stamp in content["places"]:
        if content["whole"]:
            _exchange(Path(path), stamp)
        _remove(_beside(Path(path), "new"))
    for path, _ in content["places"]:
        _remove(_beside(Path(path), "old"))
    os.unlink(journal)


def _exchange(path: Path, stamp: Stamp) -> None:
    """Put what lies beside a place into it; not where somebody has made it anew meanwhile."""
    new = _beside(path, "new")
    if os.path.lexists(new):
        if stamp and _stamp(path) == stamp:
            os.rename(path, _beside(path, "old"))
        if not os.path.lexists(path):
            os.rename(new, path)


def _beside(path: Path, side: str) -> Path:
    return path.with_name(f".{path.name}.submit-{side}")


def _stamp(path: Path) -> Stamp:
    """What tells a file or a folder from one that is made in its place later."""
    with contextlib.suppress(FileNotFoundError):
        status = os.lstat(path)
        return [status.st_ino, status.st_mtime_ns]
    return None


def place(path: Path, new: Path) -> Path:
    """Where what `path` names really lies; a link to a folder that is not there yet counts."""
    real = path.parent.resolve() / path.name
    if real.is_symlink() and (real.is_dir() or (new.is_dir() and not real.exists())):
        return real.resolve()
    return real


def _write(work: Path, whole: bool, places: list[Path]) -> None:
    new = work / "journal.new"
    content = {"whole": whole, "places": [(str(path), _stamp(path)) for path in places]}
    new.write_text(json.dumps(content))
    os.replace(new, work / "journal.json")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.unlink(path)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM is an exception, as SIGINT is, so that what was begun is undone or ended."""

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    main = threading.current_thread() is threading.main_thread()  # no other is ever interrupted
    before = signal.signal(signal.SIGTERM, end) if main else None
    try:
        yield
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)
