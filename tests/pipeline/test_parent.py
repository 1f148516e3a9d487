"""A stage ends with the `dvc` that started it, and the next one goes on from its checkpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from safetensors import safe_open

from bnncore.training.ensembled import Ensembled
from tests import processes
from tests.pipeline import test_pipeline

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
    assert starter.stdout.readline() == "began\n"
    those = list(processes.descendants(starter.pid))
    (child,) = (p for p, line in processes.descendants(starter.pid).items() if "child.py" in line
                and not line.startswith("sh"))  # fmt: skip
    try:
        starter.kill()
        starter.wait()
        assert processes.gone([child], 10 if ends else 2) == ends
    finally:
        processes.kill(those)
        starter.stdout.close()


@pytest.mark.slow
def test_sigkill_of_dvc_ends_its_stage_and_the_next_goes_on(tmp_path):
    short = {"epochs": 1, "batch_size": 256, "lr": 0.01}
    folder = test_pipeline.copy(
        tmp_path / "project",
        {
            "data": {"name": "digits", "subset": 0.5},
            "model": {"backbone": "nin", "width": 8, "dropout": 0.0},
            "pretrain": short,
            "binarize": short,
            "ensembles": {
                "recipe": short,
                "train": [
                    {"name": "fused", "scheme": "fusion", "sharing": "shared_conv", "members": 2,
                     "recipe": {"epochs": 40}},
                ],
            },
            "mlflow": {"uri": "none"},
        },
    )  # fmt: skip
    stages = {
        name: {"cmd": f"python -m pipeline.{name.replace('-', '_')}", "deps": deps, "outs": [out]}
        for name, deps, out in (
            ("pretrain", ["params.yaml"], "models/fp32"),
            ("binarize", ["models/fp32"], "models/bnn"),
            ("ensemble-train", ["models/bnn"], "models/ensembles"),
        )
    }
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    command = ["dvc", "repro", "ensemble-train"]
    dvc = subprocess.Popen(
        command, cwd=folder, env=test_pipeline.environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    those: dict[int, int | None] = {}
    try:
        deadline = time.monotonic() + 300
        while not (found := _histories(folder)):
            assert dvc.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        those = {p: processes.began(p) for p in processes.descendants(dvc.pid)}
        assert len(those) > 4, "Ray's are among them"
        os.kill(dvc.pid, signal.SIGKILL)
        dvc.wait()
        assert processes.gone(those, 30)
    finally:
        processes.kill(p for p, when in those.items() if when and processes.began(p) == when)
        dvc.kill()
        dvc.wait()
    (found,) = _histories(folder)
    assert len(found) < 40, "it was not finished"
    assert test_pipeline.ran(test_pipeline.dvc(folder, *command[1:])) == ["ensemble-train"]
    trained = Ensembled.read(folder / "models/ensembles/fused").histories["fused"]
    assert len(trained) == 40
    assert trained[: len(found)] == found, "to the second as it was before"


def _histories(folder: Path) -> list[list[dict]]:
    found = []
    for path in (folder / "checkpoints/ensemble-train").glob("*/state.safetensors"):
        with safe_open(path, "np") as file:
            found.append(json.loads(file.metadata()["history"]))
    return found
