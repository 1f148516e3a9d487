"""A process that DVC started ends when DVC does, SIGKILL included.

Else a stage would train on, hold its checkpoints against the next `dvc repro`, and what it finishes
would be thrown away. Linux could be asked for a signal at the parent's death, but DVC starts its
stages by a shell that may live on, and that signal comes at the death of the parent's thread.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import psutil

SHELLS = {"sh", "bash", "dash", "zsh", "ksh", "fish"}
LOOK_S = 0.5
END_S = 3.0  # for what is tidied up at SIGTERM, Ray's processes among it


def end_with_dvc() -> None:
    """Watch DVC from a thread; nothing where DVC has not started this process.

    Raises:
        SystemExit: DVC has ended already.
    """
    if "DVC_STAGE" in os.environ:
        ancestors = _ancestors()
        if ancestors[-1:] == [1] and "dvc" not in " ".join(psutil.Process(1).cmdline()):
            sys.exit("DVC has ended before its stage began")
        threading.Thread(target=_watch, args=(ancestors,), daemon=True).start()


def _ancestors() -> list[int]:
    """Process ids of this process' shells and of what started these."""
    found: list[int] = []
    for process in psutil.Process().parents():
        found.append(process.pid)
        if process.name() not in SHELLS:
            break
    return found


def _watch(ancestors: list[int]) -> None:
    while True:
        time.sleep(LOOK_S)
        try:
            now = [process.pid for process in psutil.Process().parents()[: len(ancestors)]]
        except psutil.Error:
            continue  # one has ended as it was asked
        if now != ancestors:
            break
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(END_S)
    os.kill(os.getpid(), signal.SIGKILL)
