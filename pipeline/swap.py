"""Put files and folders in the place of old ones: wholly, or not at all.

What is new is brought beside its place first, onto the same file system; then names are exchanged,
and an exchange that fails is undone. A journal says how far it came: if the process is killed,
`recover` undoes or ends it, and nothing is lost. The journal and a lock are in a folder of DVC's,
which git does not see.
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
BRINGING, EXCHANGING, DONE = "bringing", "exchanging", "done"
Entry = dict[str, Any]  # paths "place", "new" and "old", and the "stamp" of what is new


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
    entries = [_entry(place(root / path, new / path)) for path in paths]
    try:
        _write(work, BRINGING, entries)
        for path, entry in zip(paths, entries, strict=True):
            Path(entry["new"]).parent.mkdir(parents=True, exist_ok=True)
            shutil.move(new / path, entry["new"])
            entry["stamp"] = _stamp(entry["new"])
    except BaseException:
        recover(work)
        raise
    with _uninterrupted():
        try:
            _write(work, EXCHANGING, entries)
            for entry in entries:
                if os.path.lexists(entry["place"]):
                    os.rename(entry["place"], entry["old"])
                os.rename(entry["new"], entry["place"])
            _write(work, DONE, entries)
        finally:
            recover(work)


def recover(work: Path) -> None:
    """End or undo what the journal says was begun; may be killed and called again."""
    journal = work / "journal.json"
    if not journal.exists():
        return
    with _uninterrupted():
        content = json.loads(journal.read_text())
        phase, entries = content["phase"], content["entries"]
        if phase == EXCHANGING:
            for entry in reversed(entries):
                _undo(**entry)
            _write(work, BRINGING, entries)
        for entry in entries:
            _remove(Path(entry["old" if phase == DONE else "new"]))
        os.unlink(journal)


def _undo(place: str, new: str, old: str, stamp: list[int]) -> None:
    """Each step leaves what the next call takes up."""
    if os.path.lexists(place) and _stamp(place) == stamp:
        os.rename(place, new)
    if os.path.lexists(old):
        if os.path.lexists(place):  # somebody has made it anew since
            _remove(Path(old))
        else:
            os.rename(old, place)


def _stamp(path: str) -> list[int]:
    """What tells a file or a folder from one that is made in its place later."""
    status = os.lstat(path)
    return [status.st_ino, status.st_mtime_ns]


def place(path: Path, new: Path) -> Path:
    """Where what `path` names really lies; a link to a folder that is not there yet counts."""
    real = path.parent.resolve() / path.name
    if real.is_symlink() and (real.is_dir() or (new.is_dir() and not real.exists())):
        return real.resolve()
    return real


def _entry(path: Path) -> Entry:
    sides = {side: str(path.with_name(f".{path.name}.submit-{side}")) for side in ("new", "old")}
    return {"place": str(path), **sides}


def _write(work: Path, phase: str, entries: list[Entry]) -> None:
    new = work / "journal.new"
    new.write_text(json.dumps({"phase": phase, "entries": entries}))
    os.replace(new, work / "journal.json")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.unlink(path)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM is an exception, as SIGINT is, so that what was begun is undone."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    with _handled({signal.SIGTERM: end}):
        yield


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """SIGINT and SIGTERM come when the body has ended."""
    came: list[int] = []
    try:
        note = dict.fromkeys(
            (signal.SIGINT, signal.SIGTERM), lambda number, frame: came.append(number)
        )
        with _handled(note):
            yield
    finally:
        for number in came:
            signal.raise_signal(number)


@contextlib.contextmanager
def _handled(handlers: dict[signal.Signals, Any]) -> Iterator[None]:
    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():  # no other is ever interrupted
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
