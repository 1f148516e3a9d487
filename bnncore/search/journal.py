"""The journal of a search on disk, and what is kept of a damaged one.

Optuna's journal is a JSON object a line. Of ours no line needs another one but that which began its
study: a trial is written once, in one line, when its fate is known, and names its study, as rivals
do. So lines can be lost one by one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend, JournalFileBackend
from safetensors import SafetensorError

from bnncore.errors import UserError

Record = dict[str, Any]
BEGIN_STUDY, STUDY_ATTRIBUTE, BEGIN_TRIAL = 0, 2, 4  # what Optuna's lines do


class SearchError(UserError, RuntimeError):
    """A search that cannot go on; says where, why, and what to do."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Errors of the disk name `path`.

    Raises:
        SearchError: for one of them inside.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise SearchError(
            f"{path}: cannot be written ({why}); what was written before is kept: put that right "
            "and start again"
        ) from error


class Journal(JournalFileBackend):
    """Optuna's backend, with errors that name the file."""

    def __init__(self, path: Path):
        self.path = path
        with writing(path):
            super().__init__(str(path))

    def append_logs(self, logs: list[Record]) -> None:
        with writing(self.path):
            super().append_logs(logs)


class _Reader(BaseJournalBackend):
    """Records for Optuna to read, one at a time, to see whether it can."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    def read_logs(self, log_number_from: int) -> Iterator[Record]:
        yield from self.records[log_number_from:]

    def append_logs(self, logs: list[Record]) -> None:
        raise NotImplementedError


def mend(path: Path, study: Record, say: Callable[[str], None]) -> None:
    """Make a journal readable, once no other process has it: drop what a killed writer left of its
    last line, and keep what is good where lines are damaged, the damaged file beside it.

    Args:
        study: the line that begins the study at hand, for where that one is lost.

    Raises:
        SearchError: it cannot be read, or is no journal; it is left as it is.
    """
    # Its lock outlives a killed process.
    path.with_name(path.name + ".lock").unlink(missing_ok=True)
    try:
        content = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise SearchError(f"{path}: cannot be read ({error.strerror or error})") from error
    *lines, last = content.split(b"\n")
    *records, end = _read([*lines, last])
    head = b'{"op_code":'
    torn = not lines and last[: len(head)] == head[: len(last)]  # in its very first line
    if content and not any([*records, end, torn]):
        raise SearchError(
            f"{path}: line 1: expected a search's journal, got something else; nothing was "
            "changed: move the file away to begin anew"
        )
    with writing(path):
        if all(records):
            if end:  # all of it but the end of the line
                with open(path, "ab") as file:
                    file.write(b"\n")
            elif last:
                os.truncate(path, len(content) - len(last))
            return
        kept = _kept([*records, *([end] if end else [])], study)
        aside = next(p for k in range(1, 10**6)
                     if not (p := path.with_name(f"{path.name}.damaged-{k}")).exists())  # fmt: skip
        shutil.copy2(path, aside)
        new = path.with_name(path.name + ".new")
        with open(new, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(r, separators=(",", ":")) + "\n" for r in kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    bad = [i for i, record in enumerate(records, 1) if record is None]
    more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
    say(
        f"{path}: line {bad[0]}{more}: damaged; kept {len(kept)} lines, and the damaged file as "
        f"{aside.name}; trials that were lost are trained again"
    )


def _read(lines: list[bytes]) -> list[Record | None]:
    """What the lines say; None for one that is no JSON or that Optuna cannot read."""
    found: list[Record | None] = []
    reader = _Reader()
    optuna = JournalStorage(reader)
    for line in lines:
        try:
            record = json.loads(line.decode())
            reader.records.append(record)
            optuna.get_all_studies()  # reads on
        except Exception:  # whatever Optuna raises of a line that is not its own
            record = None
        found.append(record)
    return found


def _kept(records: list[Record | None], study: Record) -> list[Record]:
    """Good lines. Optuna's refer to studies and trials by how many came before, so after a lost
    line only those are kept that name their study, with its number put right.
    """
    kept: list[Record] = []
    numbers: dict[str, int] = {}
    lost = False
    for record in records:
        if record is None:
            lost = True
            continue
        if record["op_code"] == BEGIN_STUDY:
            numbers.setdefault(record["study_name"], len(numbers))
        elif lost:
            name = _study(record)
            if name == study["study_name"] and name not in numbers:
                numbers[name] = len(numbers)
                kept.append(study)
            if name not in numbers:
                continue
            record["study_id"] = numbers[name]
        kept.append(record)
    return kept


def _study(record: Record) -> str:
    """The study that a trial or a rival names; empty where none is named."""
    found: Any = None
    if record["op_code"] == BEGIN_TRIAL:
        found = record.get("user_attrs")
    elif record["op_code"] == STUDY_ATTRIBUTE and isinstance(record["user_attr"], dict):
        found = next(iter(record["user_attr"].values()), None)
    return found.get("study", "") if isinstance(found, dict) else ""
