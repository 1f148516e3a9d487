"""A process ends with the `dvc` that started it, and with nothing else."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests import processes

CHILD = """
import signal, sys, time
from pipeline import parent
if "deaf" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
parent.end_with_dvc()
print("began", flush=True)
time.sleep(60)
"""
STARTER = "import subprocess, sys; subprocess.run(['sh', '-c', sys.argv[1]])"


@pytest.mark.parametrize(
    ("started", "words", "ends"),
    [
        ("dvc", "{}", True),  # the shell becomes its only command
        ("dvc", "{}; true", True),  # the shell lives on
        ("dvc", "{} deaf; true", True),
        ("hand", "{}; true", False),
    ],
)
def test_a_stage_ends_with_what_started_it(tmp_path, started, words, ends):
    (tmp_path / "child.py").write_text(CHILD)
    command = words.format(f"{sys.executable} {tmp_path / 'child.py'}")
    env = {k: v for k, v in processes.environment().items() if k != "DVC_STAGE"}
    env |= {"DVC_STAGE": "pretrain"} if started == "dvc" else {}
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER, command], env=env, stdout=subprocess.PIPE, text=True
    )
    those: dict[int, str] = {}
    try:
        assert starter.stdout.readline() == "began\n"
        those = processes.descendants(starter.pid)
        (child,) = (p for p, line in those.items()
                    if "child.py" in line and not line.startswith("sh"))  # fmt: skip
        starter.kill()
        starter.wait()
        assert processes.gone([child], 60 if ends else 2) == ends
    finally:
        processes.kill(those or processes.descendants(starter.pid))
        starter.kill()
        starter.wait()
        starter.stdout.close()
