"""Results come into place wholly or not at all, whatever strikes at whichever step."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest

from pipeline import swap
from tests import processes

PATHS = ["models", "reports/m.json", "packed", "fresh", "dvc.lock"]


def project(folder: Path) -> Path:
    """Folders, files, a link to a folder elsewhere, one inside a linked folder, none at all."""
    root, new, disk = folder / "here", folder / "incoming", folder / "disk"
    for place, text in ((root, "old"), (new, "new")):
        for path in ("models/a/x", "reports/m.json", "packed/p.bnn", "dvc.lock"):
            (place / path).parent.mkdir(parents=True, exist_ok=True)
            (place / path).write_text(text)
    (root / "models" / "of an older list").write_text("old")
    (new / "fresh").mkdir()
    (new / "fresh" / "f").write_text("new")
    (root / "reports" / "mine.txt").write_text("not the pipeline's")
    disk.mkdir()
    (root / "models").rename(disk / "models")
    (root / "models").symlink_to(disk / "models")
    (root / "reports").rename(disk / "reports")
    (root / "reports").symlink_to("../disk/reports")
    return root


def content(root: Path) -> dict[str, str]:
    """Path -> text of all files in place, links followed."""
    found = {}
    for folder, _, names in os.walk(root, followlinks=True):
        for name in names:
            path = Path(folder, name)
            ours = path.is_relative_to(root / ".dvc") or ".submit-" in str(path)
            if path.exists() and not ours:
                found[str(path.relative_to(root))] = path.read_text()
    return found


OLD = {
    "models/a/x": "old",
    "models/of an older list": "old",
    "reports/m.json": "old",
    "reports/mine.txt": "not the pipeline's",
    "packed/p.bnn": "old",
    "dvc.lock": "old",
}
NEW = {
    "models/a/x": "new",
    "reports/m.json": "new",
    "reports/mine.txt": "not the pipeline's",
    "packed/p.bnn": "new",
    "fresh/f": "new",
    "dvc.lock": "new",
}


def struck(at: int, strike) -> list[str]:
    """Have `strike` called before and after each step on names of files, at the `at`-th of these.

    Returns the list into which the steps are written as they come.
    """
    steps: list[str] = []

    def wrapped(name, function):
        def call(*args, **options):
            for when in ("before", "after"):
                steps.append(f"{when} {name}")
                if len(steps) - 1 == at:
                    strike()
                if when == "before":
                    result = function(*args, **options)
            return result

        return call

    swap.os = _Changed(os, {n: wrapped(n, getattr(os, n)) for n in ("rename", "replace", "unlink")})
    swap.shutil = _Changed(shutil, {n: wrapped(n, getattr(shutil, n)) for n in ("rmtree", "move")})
    return steps


class _Changed:
    """A module with some functions changed, for one other module only."""

    def __init__(self, module, functions):
        self.__dict__.update(functions)
        self._module = module

    def __getattr__(self, name):
        return getattr(self._module, name)


def swapped(root: Path) -> None:
    with swap.only(root) as work:
        swap.swap(root.parent / "incoming", root, PATHS, work)


@pytest.fixture
def restored():
    yield
    swap.os, swap.shutil = os, shutil


def _raise() -> None:
    raise OSError("the disk is full")


def _interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def _terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def steps_of_a_swap(folder: Path) -> list[str]:
    root = project(folder)
    steps = struck(-1, _raise)
    swapped(root)
    swap.os, swap.shutil = os, shutil
    assert content(root) == NEW
    shutil.rmtree(folder)
    return steps


def test_links_stay_and_nothing_is_left_over(tmp_path):
    root = project(tmp_path / "x")
    swapped(root)
    assert content(root) == NEW
    assert (root / "models").is_symlink()
    assert (root / "reports").is_symlink()
    assert list(root.glob("*/.*submit-*")) == list((root.parent / "disk").glob(".*")) == []
    assert sorted(p.name for p in (root / swap.WORK).iterdir()) == ["lock"]


@pytest.mark.parametrize("made", ["file", "folder", "dangling"])
def test_a_link_to_a_file_is_replaced_and_one_to_a_folder_is_followed(tmp_path, made):
    (tmp_path / "new").mkdir()
    (tmp_path / "disk").mkdir()
    target = tmp_path / "disk" / "target"
    if made == "file":  # as DVC makes them, into its cache
        target.write_text("cached")
        (tmp_path / "new" / "x").write_text("new")
    else:
        (tmp_path / "new" / "x").mkdir()
        (tmp_path / "new" / "x" / "y").write_text("new")
        if made == "folder":
            target.mkdir()
    (tmp_path / "x").symlink_to(target)
    with swap.only(tmp_path) as work:
        swap.swap(tmp_path / "new", tmp_path, ["x"], work)
    if made == "file":
        assert target.read_text() == "cached"
        assert (tmp_path / "x").read_text() == "new"
        assert not (tmp_path / "x").is_symlink()
    else:
        assert (tmp_path / "x").is_symlink()
        assert (target / "y").read_text() == "new"


def test_a_strike_at_every_step_leaves_all_old_or_all_new(tmp_path, restored):
    steps = steps_of_a_swap(tmp_path / "quiet")
    assert steps.count("before rename") == 2 * len(PATHS) - 1  # one was not there
    seen = set()
    for name, strike in (("error", _raise), ("SIGINT", _interrupt), ("SIGTERM", _terminate)):
        for at in range(len(steps)):
            root = project(tmp_path / f"{name}-{at}")
            struck(at, strike)
            with pytest.raises((OSError, KeyboardInterrupt, SystemExit)):
                swapped(root)
            swap.os, swap.shutil = os, shutil
            found = content(root)
            assert found in (OLD, NEW), (name, at, steps[at])
            seen.add((name, found == NEW))
            with swap.only(root):  # an error in tidying up may leave that to the next
                pass
            assert content(root) == found
            left = [*root.glob("*/.*submit-*"), *(root.parent / "disk").glob(".*")]
            assert left == [], (name, at, steps[at])
    assert len(seen) == 6, "each has struck before and after it was done"


def forked(work, *args) -> int:
    """Run `work` in a child of this process; the signal that ended it, 0 for none."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            work(*args)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    assert status in (0, signal.SIGKILL), "an error in the child"
    return status


def killed_swap(root: Path, at: int) -> None:
    struck(at, _kill)
    swapped(root)


def killed_recovery(root: Path, at: int) -> None:
    struck(at, _kill)
    with swap.only(root):
        pass


@pytest.mark.slow
def test_sigkill_at_every_step_is_put_right_by_the_next(tmp_path):
    """Killed while it mends what is half old, half new, too: at each of its steps in turn."""
    steps = steps_of_a_swap(tmp_path / "quiet")
    half = 0
    for at in range(len(steps)):
        root = project(tmp_path / str(at))
        assert forked(killed_swap, root, at) == signal.SIGKILL
        torn = content(root) not in (OLD, NEW)
        half += torn
        kills = 0
        while forked(killed_recovery, root, kills if torn else -1):
            kills += 1
        assert content(root) in (OLD, NEW), (at, steps[at])
        left = [*root.glob("*/.*submit-*"), *(root.parent / "disk").glob(".*")]
        assert left == [], (at, steps[at])
    assert half > 3, "it was killed in the middle, too"


@pytest.mark.parametrize("which", ["first", "last"])
def test_what_was_made_after_a_kill_is_not_taken_back(tmp_path, which):
    steps = steps_of_a_swap(tmp_path / "quiet")
    renames = [k for k, step in enumerate(steps) if step == "after rename"]
    root = project(tmp_path / "x")
    at = renames[0] if which == "first" else renames[-1]
    assert forked(killed_swap, root, at) == signal.SIGKILL
    assert (content(root) == NEW) == (which == "last")
    shutil.rmtree(root / "packed")
    (root / "packed").mkdir()
    (root / "packed" / "p.bnn").write_text("made anew")
    with swap.only(root):
        pass
    assert content(root) == NEW | {"packed/p.bnn": "made anew"}


def test_one_at_a_time(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from pipeline import swap\n"
        "with swap.only(Path(sys.argv[1])): print('in', flush=True); sys.stdin.read()\n"
    )
    first, second = (
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=processes.environment(),
        )
        for _ in range(2)
    )  # fmt: skip
    try:
        lines = {p: p.stdout.readline().strip() for p in (first, second)}
        waits = "another process is putting results in place here; waiting for it"
        assert sorted(lines.values()) == sorted(["in", waits])
        (holder,) = (p for p in lines if lines[p] == "in")
        (waiter,) = (p for p in lines if lines[p] == waits)
        time.sleep(0.2)
        holder.stdin.close()
        assert waiter.stdout.readline().strip() == "in"
        waiter.stdin.close()
        assert holder.wait(30) == waiter.wait(30) == 0
    finally:
        for p in (first, second):
            p.kill()
            p.wait()
            p.stdout.close()
