"""What training leaves on disk: written whole or not at all, by one writer.

A crash, a kill or a full disk leaves what was there before, and nothing half-written that reads as
valid.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from bnncore.training.jobs import History, State, TrainingError
from bnncore.training.watch import require_finite

KEPT = "; nothing was overwritten: move it away to start this job anew"


class Checkpoint:
    """The last finished epoch of one job, in a folder of its own.

    A folder is keyed by the job's digest, so that changed parameters, data or code start anew. One
    writer holds it at a time. Files are replaced whole: a crash leaves the previous one.

    Raises:
        TrainingError: another process holds the folder; or a file cannot be read or written.
    """

    def __init__(self, folder: Path, key: str):
        self.folder = folder / key
        self.path = self.folder / "state.safetensors"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.folder / "lock", "ab+", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise TrainingError(f"{self.folder}: cannot make the checkpoint: {error}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.seek(0)
            holder = self._lock.read(200).decode(errors="replace").strip()
            self._lock.close()
            raise TrainingError(
                f"{self.folder}: expected to be the only writer, but another process "
                f"{f'({holder}) ' if holder else ''}holds this checkpoint; end it (is an earlier "
                "run still going?) and start again"
            ) from None
        with contextlib.suppress(OSError):  # the disk may be full: the lock holds all the same
            self._lock.truncate(0)
            self._lock.write(f"pid {os.getpid()} on {platform.node()}\n".encode())

    def load(self) -> tuple[State, History] | None:
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                history = json.loads(file.metadata()["history"])
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise TrainingError(
                f"{self.path}: expected a checkpoint, got an unreadable file ({error}){KEPT}"
            ) from error
        require_finite(state, str(self.path), KEPT)
        return state, history

    def save(self, state: State, history: History) -> None:
        state = {name: value.contiguous() for name, value in state.items()}
        with replaced(self.path, "the checkpoint") as new:
            save_file(state, new, {"history": json.dumps(history)})

    def close(self) -> None:
        self._lock.close()


@contextlib.contextmanager
def replaced(path: Path, what: str) -> Iterator[Path]:
    """A path to write a file or folder to; it takes the place of `path` when all is written.

    Until it does, and for good if anything fails, `path` stays what it was. A kill while a folder
    is replaced can leave no folder at `path`, but never a mixed one.

    Raises:
        TrainingError: it cannot be written; names the path.
    """
    path = path.resolve()
    new, old = (path.with_name(f".{path.name}.{word}") for word in ("new", "old"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(new)
        yield new
        for written in sorted(new.iterdir()) if new.is_dir() else [new]:
            with open(written, "rb") as file:
                os.fsync(file.fileno())
        if path.is_dir():  # a folder with something in it cannot be renamed over
            _remove(old)
            os.rename(path, old)
        os.replace(new, path)
    except (SafetensorError, OSError) as error:
        raise TrainingError(f"{path}: cannot write {what}: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            _remove(new)
            if not path.exists() and old.exists():
                os.rename(old, path)
            _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def resumable(folder: Path) -> Iterator[Path]:
    """A folder for the checkpoints of one stage, removed when what runs inside has ended well.

    A stage puts all of its outputs in place inside: what is trained is then never lost, and a stage
    that is run again takes finished jobs from their checkpoints.
    """
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
