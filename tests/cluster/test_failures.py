"""Training survives the death of its actors, with the same bits.

Nothing is simulated: processes get SIGKILL at random points of an epoch. `-m soak` strikes many
times.
"""

from __future__ import annotations

import math
import random
import threading

import pytest
import ray
import torch

from bnncore.cluster.connect import ClusterError
from bnncore.cluster.group import Group
from bnncore.params import RayParams
from bnncore.training import loop, schemes
from bnncore.training.jobs import TrainingError
from tests import driver, processes
from tests.driver import EPOCHS
from tests.small import differences, plan


@pytest.fixture
def pair(cluster):
    """A handle of two slots, and no actors of other tests."""
    cluster._end_idle()
    cluster.params = RayParams(actors=2)
    return cluster


def _strikes(rng: random.Random, cluster, undisturbed, count: int) -> None:
    """Train while `count` actors are killed, one in each of so many epochs at a random point."""
    p, images = driver.work()
    struck: list[int] = []
    finished: list[int] = []
    fastest = math.inf
    timers: list[threading.Timer] = []
    over = threading.Event()
    when = set(rng.sample(range(1, EPOCHS - 1), count))

    def strike() -> None:
        while not (victims := processes.actors()):
            if over.wait(0.05):  # else the last strike's group is not yet replaced
                return
        struck.append(len(finished))
        processes.kill([rng.choice(victims)])

    def on_epoch(job, epoch) -> None:
        nonlocal fastest
        for timer in timers:
            timer.join()  # however late it is, there is an epoch left to lose
        finished.append(epoch["epoch"])
        fastest = min(fastest, epoch["seconds"])
        if epoch["epoch"] in when:
            # Anywhere from the checkpoint just written to the next one's.
            timers.append(threading.Timer(rng.uniform(0, 1) * fastest, strike))
            timers[-1].start()

    before = cluster.lost
    try:
        trained = schemes.train(p, lambda jobs: cluster.train_many(jobs, images, on_epoch=on_epoch))
    finally:
        over.set()
        for timer in timers:
            timer.join()
    assert len(struck) == count
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


@pytest.mark.parametrize(
    "calls",
    [
        pytest.param(["__init__", "epoch", "state"], marks=pytest.mark.slow),
        pytest.param(["bias", "close"], marks=pytest.mark.soak),
    ],
    ids="-".join,
)
def test_an_actor_that_dies_right_after_an_answer(pair, monkeypatch, calls):
    """Before the group is asked the next, whatever that is: once for each of its methods."""
    p, images = plan("tentaclenet", "tentaclenet", members=2, epochs=2, subset=0.1)
    expected = schemes.train(p, lambda jobs: loop.train_many(jobs, images)).state
    struck = {}

    def striking(call, original):
        def strike(self, *args, **options):
            if call not in struck and self not in struck.values():  # each in a group of its own
                struck[call] = self
                victim = (args[2] if call == "__init__" else self.actors)[-1]
                pid = ray.get(victim.where.remote())["pid"]
                ray.kill(victim)
                assert processes.gone([pid], 60)
            return original(self, *args, **options)

        return strike

    for call in calls:
        monkeypatch.setattr(Group, call, striking(call, getattr(Group, call)))
    monkeypatch.setattr("bnncore.cluster.cluster.ATTEMPTS", len(calls) + 1)
    before = pair.lost
    trained = schemes.train(p, lambda jobs: pair.train_many(jobs, images))
    assert sorted(struck) == sorted(calls)
    assert differences(expected, trained.state) == []
    assert pair.lost - before == len(calls)


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


@pytest.mark.slow
def test_divergence_is_named_from_an_actor(cluster):
    p, images = plan("fusion", "no_shared", members=3)
    job = p.job((0, 1, 2), "e")
    name = next(n for n in job.start if n.startswith("2.stem.conv"))
    job.start[name] = torch.full_like(job.start[name], 3e38)  # finite, but its sums are not
    with pytest.raises(TrainingError, match=r"of member\(s\) 2\."):
        cluster.train_many([job], images)
