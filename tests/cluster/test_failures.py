"""Training survives the death of an actor, of a node and of the driver, with the same bits.

Nothing is simulated: processes get SIGKILL at random points of an epoch, files are really broken.
Each test proves that training was unfinished when it struck. `-m soak` strikes many times.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import ray
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from bnncore.cluster.connect import ClusterError
from bnncore.cluster.group import Group
from bnncore.params import RayParams
from bnncore.training import loop, schemes
from bnncore.training.jobs import TrainingError
from tests import processes
from tests.small import differences, plan

TESTS = Path(__file__).parents[1]
EPOCHS = 6


@pytest.fixture
def seed(request) -> int:
    """A seed of the moment, printed so that a failure can be repeated: BNNCORE_TEST_SEED."""
    seed = int(os.environ.get("BNNCORE_TEST_SEED", random.SystemRandom().randrange(2**31)))
    print(f"\n{request.node.name}: BNNCORE_TEST_SEED={seed}")
    return seed


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, torch.Tensor]:
    """What `driver` gives when nothing happens to it."""
    p, images = plan("tentaclenet", "tentaclenet", members=4, epochs=EPOCHS, subset=0.5)
    return schemes.train(p, lambda jobs: loop.train_many(jobs, images)).state


# -- actors ------------------------------------------------------------------------------------


@pytest.fixture
def pair(cluster):
    """A handle of two slots, and no actors of other tests."""
    cluster._end_idle()
    cluster.params = RayParams(actors=2)
    return cluster


def _strikes(rng: random.Random, cluster, undisturbed, count: int) -> None:
    """Train while `count` actors are killed, one in each of so many epochs at a random point."""
    p, images = plan("tentaclenet", "tentaclenet", members=4, epochs=EPOCHS, subset=0.5)
    struck: list[int] = []
    finished: list[int] = []
    timers: list[threading.Timer] = []
    when = set(rng.sample(range(1, EPOCHS - 1), count))

    def strike() -> None:
        while not (victims := processes.actors()) and len(finished) < EPOCHS:
            time.sleep(0.05)  # the last strike's group is not yet replaced
        struck.append(len(finished))
        processes.kill([rng.choice(victims)])

    def on_epoch(job, epoch) -> None:
        finished.append(epoch["epoch"])
        if epoch["epoch"] in when:
            # Anywhere from the checkpoint just written to the next one's.
            timers.append(threading.Timer(rng.uniform(0, 1) * epoch["seconds"], strike))
            timers[-1].start()

    before = cluster.lost
    trained = schemes.train(p, lambda jobs: cluster.train_many(jobs, images, on_epoch=on_epoch))
    for timer in timers:
        timer.join()
    assert len(struck) == count
    assert all(done < EPOCHS for done in struck), "training was over when it struck"
    assert finished == list(range(1, EPOCHS + 1)), "each epoch is told once, and none is lost"
    assert cluster.lost - before >= 1
    assert differences(undisturbed, trained.state) == []


@pytest.mark.slow
def test_a_killed_actor_costs_an_epoch_at_most(pair, undisturbed, seed):
    _strikes(random.Random(seed), pair, undisturbed, 1)


@pytest.mark.soak
@pytest.mark.parametrize("turn", range(10))
def test_twenty_killed_actors(pair, undisturbed, seed, turn):
    _strikes(random.Random(seed + turn), pair, undisturbed, 2)


@pytest.mark.slow
def test_an_actor_that_dies_right_after_an_answer(pair, monkeypatch):
    """Before the group is asked the next, whatever that is: once for each of its methods."""
    p, images = plan("tentaclenet", "tentaclenet", members=2, epochs=2, subset=0.1)
    expected = schemes.train(p, lambda jobs: loop.train_many(jobs, images)).state
    calls = ["__init__", "epoch", "bias", "state", "close"]
    struck = {}

    def striking(call, original):
        def strike(self, *args, **options):
            if call not in struck and self not in struck.values():  # each in a group of its own
                struck[call] = self
                ray.kill((args[2] if call == "__init__" else self.actors)[-1])
            return original(self, *args, **options)

        return strike

    for call in calls:
        monkeypatch.setattr(Group, call, striking(call, getattr(Group, call)))
    monkeypatch.setattr("bnncore.cluster.cluster.ATTEMPTS", len(calls) + 1)
    before = pair.lost
    trained = schemes.train(p, lambda jobs: pair.train_many(jobs, images))
    assert sorted(struck) == sorted(calls)
    assert differences(expected, trained.state) == []
    # To close an actor may be quicker than to kill it.
    assert pair.lost - before in (len(calls) - 1, len(calls))


@pytest.mark.slow
def test_a_job_that_always_loses_its_actors_is_given_up(pair):
    p, images = plan("fusion", "no_shared", members=2, epochs=50)
    stop = threading.Event()

    def relentless() -> None:
        while not stop.wait(0.05):
            processes.kill(processes.actors())

    thread = threading.Thread(target=relentless)
    thread.start()
    try:
        with pytest.raises(ClusterError, match=r"e: lost its actors 3 times"):
            schemes.train(p, lambda jobs: pair.train_many(jobs, images))
    finally:
        stop.set()
        thread.join()


# -- the driver --------------------------------------------------------------------------------


def _driver(folder: Path, *args: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(TESTS / "driver.py"), str(folder), str(EPOCHS), *args],
        env=processes.environment(**environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _epochs(driver: subprocess.Popen, until: int) -> None:
    """Read a driver's lines until so many epochs are finished."""
    lines = []
    assert driver.stdout is not None
    for line in driver.stdout:
        lines.append(line)
        if line.startswith(f"epoch {until} "):
            return
    raise AssertionError(f"the driver ended before epoch {until}:\n{''.join(lines)}")


def _history(folder: Path) -> list[dict]:
    (path,) = folder.glob("checkpoints/*/state.safetensors")
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["history"])


def _kill_driver(folder: Path, rng: random.Random, undisturbed) -> None:
    """Killed at any moment of its first epochs; gone on with, and killed as it writes a
    checkpoint; gone on with."""
    # Ray's agents wait a minute for a server that is gone.
    driver = _driver(folder, RAY_gcs_rpc_server_reconnect_timeout_s="5")
    _epochs(driver, rng.randrange(1, EPOCHS // 2))
    time.sleep(rng.uniform(0, 0.5))
    offspring = processes.descendants(driver.pid)
    driver.kill()
    driver.wait()
    done = len(_history(folder))
    assert done < EPOCHS - 1, "training was nearly over when it struck"
    driver = _driver(folder, str(done + 2))
    output, _ = driver.communicate()
    assert driver.returncode == -signal.SIGKILL, output
    assert len(_history(folder)) == done + 1, "the epoch before is kept"
    assert not (folder / "result.safetensors").exists()
    again = _driver(folder)
    output, _ = again.communicate()
    assert again.returncode == 0, output
    assert differences(undisturbed, load_file(folder / "result.safetensors")) == []
    ended = processes.gone(offspring, 150)
    processes.kill([] if ended else offspring)
    assert ended, "processes of a killed driver live on"


@pytest.mark.slow
def test_a_killed_driver_goes_on_where_it_was(tmp_path, undisturbed, seed):
    _kill_driver(tmp_path, random.Random(seed), undisturbed)


@pytest.mark.soak
@pytest.mark.parametrize("turn", range(10))
def test_ten_killed_drivers(tmp_path, undisturbed, seed, turn):
    _kill_driver(tmp_path, random.Random(seed + turn), undisturbed)


# -- nodes -------------------------------------------------------------------------------------


def _kill_node(folder: Path, rng: random.Random, undisturbed, answered: bool = False) -> None:
    """SIGKILL one of two nodes: at any time, or when its actor has answered, before its answer is
    fetched."""
    with processes.two_nodes(folder) as (environment, (_, second)):
        strike = [f"node:{second.pid}"] if answered else []
        driver = _driver(folder, *strike, **environment)
        try:
            if not answered:
                _epochs(driver, rng.randrange(1, EPOCHS - 1))
                time.sleep(rng.uniform(0, 0.5))
                done = len(_history(folder))
                processes.kill([second.pid, *processes.descendants(second.pid)])
                assert done < EPOCHS, "training was over when it struck"
            output, _ = driver.communicate(timeout=300)
        finally:
            driver.kill()
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


# -- numbers and files -------------------------------------------------------------------------


def _job(epochs: int = 2, **recipe):
    p, images = plan("fusion", "no_shared", members=3, epochs=epochs, recipe=recipe)
    return p.job((0, 1, 2), "e"), images


@pytest.mark.slow
def test_divergence_is_named_from_an_actor(cluster):
    job, images = _job()
    name = next(n for n in job.start if n.startswith("2.stem.conv"))
    job.start[name] = torch.full_like(job.start[name], 3e38)  # finite, but its sums are not
    with pytest.raises(TrainingError, match=r"of member\(s\) 2\."):
        cluster.train_many([job], images)
