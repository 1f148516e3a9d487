"""Training survives the death of its driver and of a node, with the same bits.

Nothing is simulated: processes get SIGKILL at random points of an epoch, files are really broken.
A driver begins an epoch when it is told to, so that it is unfinished when it is struck, however
late that is. `-m soak` strikes many times.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from tests import processes
from tests.driver import EPOCHS
from tests.small import differences

TESTS = Path(__file__).parents[1]


@contextmanager
def _driver(folder: Path, *args: str, **environment: str) -> Iterator[subprocess.Popen]:
    running = subprocess.Popen(
        [sys.executable, str(TESTS / "driver.py"), str(folder), *args],
        env=processes.environment(**environment),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield running
    finally:
        offspring = processes.descendants(running.pid)
        running.kill()
        running.wait()
        processes.kill(offspring)


def _into(driver: subprocess.Popen, folder: Path, epoch: int, rng: random.Random) -> None:
    """Let a driver go on to somewhere in the epoch after this one."""
    lines = []
    for line in driver.stdout:
        lines.append(line)
        if line.startswith("epoch "):
            print(file=driver.stdin, flush=True)
        if line.startswith(f"epoch {epoch} "):
            time.sleep(rng.uniform(0, 1) * _history(folder)[-1]["seconds"])
            return
    raise AssertionError(f"the driver ended before epoch {epoch}:\n{''.join(lines)}")


def _history(folder: Path) -> list[dict]:
    (path,) = folder.glob("checkpoints/*/state.safetensors")
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["history"])


# -- the driver --------------------------------------------------------------------------------


def _kill_driver(folder: Path, rng: random.Random, undisturbed, writing: bool = False) -> None:
    """Killed at any moment of its first epochs, once more as it writes a checkpoint if `writing`,
    and gone on with."""
    # Ray's agents wait a minute for a server that is gone.
    with _driver(folder, RAY_gcs_rpc_server_reconnect_timeout_s="5") as driver:
        _into(driver, folder, rng.randrange(1, EPOCHS - 2), rng)
        offspring = processes.descendants(driver.pid)
        driver.kill()
        driver.wait()
    if writing:
        done = len(_history(folder))
        with _driver(folder, str(done + 2)) as driver:
            output, _ = driver.communicate()
        assert driver.returncode == -signal.SIGKILL, output
        assert len(_history(folder)) == done + 1, "the epoch before is kept"
    assert not (folder / "result.safetensors").exists()
    with _driver(folder) as driver:
        output, _ = driver.communicate()
    assert driver.returncode == 0, output
    assert differences(undisturbed, load_file(folder / "result.safetensors")) == []
    ended = processes.gone(offspring, 150)
    processes.kill([] if ended else offspring)
    assert ended, "processes of a killed driver live on"


# That a kill as a checkpoint is written leaves the one before: tests/training/test_checkpoint.
@pytest.mark.slow
def test_a_killed_driver_goes_on_where_it_was(tmp_path, undisturbed, seed):
    _kill_driver(tmp_path, random.Random(seed), undisturbed)


@pytest.mark.soak
@pytest.mark.parametrize("turn", range(10))
def test_ten_killed_drivers(tmp_path, undisturbed, seed, turn):
    _kill_driver(tmp_path, random.Random(seed + turn), undisturbed, writing=True)


# -- nodes -------------------------------------------------------------------------------------


def _kill_node(folder: Path, rng: random.Random, undisturbed, answered: bool = False) -> None:
    """SIGKILL one of two nodes: at any time, or when its actor has answered, before its answer is
    fetched."""
    with processes.two_nodes(folder) as (environment, (_, second)):
        strike = [f"node:{second.pid}"] if answered else []
        with _driver(folder, *strike, **environment) as driver:
            if not answered:
                _into(driver, folder, rng.randrange(1, EPOCHS - 1), rng)
                processes.kill([second.pid, *processes.descendants(second.pid)])
            output, _ = driver.communicate(timeout=300)
    assert driver.returncode == 0, output
    lines = output.splitlines()
    assert [x for x in lines if x.startswith("lost ")] not in ([], ["lost 0"]), output
    assert not answered or "the answer was lost: ObjectReconstructionFailedError" in lines, output
    assert f"epoch {EPOCHS} actors 1" in lines, "it went on with the members on fewer actors"
    assert differences(undisturbed, load_file(folder / "result.safetensors")) == []


@pytest.mark.slow
def test_a_node_killed_between_an_answer_and_its_fetch(tmp_path, undisturbed, seed):
    _kill_node(tmp_path, random.Random(seed), undisturbed, answered=True)


@pytest.mark.soak
@pytest.mark.parametrize("turn", range(5))
def test_five_killed_nodes(tmp_path, undisturbed, seed, turn):
    _kill_node(tmp_path, random.Random(seed + turn), undisturbed)
