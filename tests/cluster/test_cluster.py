"""What a stage asks of a cluster, and what is said where there is too little."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import ray
import torch
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

from bnncore.cluster import cluster as cluster_module
from bnncore.cluster.cluster import Cluster
from bnncore.cluster.connect import ClusterError
from bnncore.params import RayParams
from bnncore.training import loop, schemes
from bnncore.training.jobs import TrainingError
from tests.small import differences, plan


@pytest.fixture
def joined(local_ray, monkeypatch):
    """As if others had started it: it may grow."""
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)


def _pending() -> list[list[dict[str, float]]]:
    """The bundles of the placement groups that wait, which is what an autoscaler looks at."""
    return [
        list(group["bundles"].values())
        for group in placement_group_table().values()
        if group["state"] in ("PENDING", "INFEASIBLE")
    ]


def _asked(params: RayParams) -> list[list[dict[str, float]]]:
    """What waits while a handle is being opened, and nothing before or after."""
    assert _pending() == []
    found: list[list[dict[str, float]]] = []
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.1):
            found.extend(bundles for bundles in _pending() if bundles not in found)

    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(look)
        try:
            with Cluster(params) as cluster:
                assert cluster.slots() == 4
        finally:
            ended.set()
            looking.result()  # or what went wrong in it
            assert _pending() == [], "nodes that came for it may go"
    return found


@pytest.mark.slow
def test_with_too_few_it_asks_waits_and_goes_on(joined, caplog):
    began = time.monotonic()
    assert _asked(RayParams(actors=5, gpus_per_actor=0, wait_s=2)) == [[{"CPU": 1.0}] * 5]
    assert time.monotonic() - began >= 2
    (line,) = caplog.messages
    assert "5 actor(s) of 1 CPU each were asked for; the cluster has 4 CPU, 0 GPU" in line
    assert "after waiting 2 s): room for 4; going on with those" in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            {"gpus_per_actor": 0.5, "wait_s": 1},
            r"1 actor\(s\) of 1 CPU and 0.5 GPU each .* has 4 CPU, 0 GPU .* room for 0; expected",
        ),
        ({"cpus_per_actor": 64, "wait_s": 0}, r"64 CPU each.*has 4 CPU.*after waiting 0 s"),
    ],
)
def test_with_none_it_waits_and_names_what_is_missing(joined, params, message):
    with pytest.raises(ClusterError, match=message):
        _asked(RayParams(**params))


@pytest.mark.slow
def test_with_enough_it_neither_asks_nor_waits(joined, caplog):
    assert _asked(RayParams(actors=4, gpus_per_actor=0, wait_s=300)) == []
    assert caplog.messages == []


@pytest.mark.slow
def test_a_cluster_that_is_busy_with_other_work_is_named(local_ray, cluster, monkeypatch):
    """A group is had whole or not at all: two of four CPUs are not enough for three."""
    monkeypatch.setattr("bnncore.cluster.cluster.START_S", 1.0)
    cluster.params = RayParams(actors=3, wait_s=0)
    cluster._end_idle()
    others = placement_group([{"CPU": 1}] * 2)
    assert others.wait(30)
    p, images = plan("fusion", "no_shared", members=3, epochs=1)
    try:
        with pytest.raises(ClusterError, match=r"3 actor\(s\) of 1 CPU each .* busy with other"):
            schemes.train(p, lambda jobs: cluster.train_many(jobs, images))
    finally:
        remove_placement_group(others)
    assert cluster._busy == []
    monkeypatch.undo()
    trained = schemes.train(p, lambda jobs: cluster.train_many(jobs, images))
    assert [e["actors"] for e in trained.histories["e"]] == [3]


@pytest.mark.slow
def test_no_more_than_its_actors_at_once_and_they_are_used_again(cluster):
    """Four CPUs, but two actors: three jobs of one and then one of two."""
    cluster.params = RayParams(actors=2)
    cluster._end_idle()
    p, images = plan("voting", "all_frozen", members=3, epochs=1)
    busy: list[int] = []
    cluster.train_many(
        [p.job((i,), f"e.{i}") for i in range(3)],
        images,
        on_epoch=lambda job, epoch: busy.append(sum(gang.size for gang in cluster._busy)),
    )
    assert 1 <= max(busy) <= 2
    assert len(cluster._idle) == 2
    p, images = plan("fusion", "no_shared", members=2, epochs=1)
    kept = _pids(cluster)
    for _ in range(2):
        schemes.train(p, lambda jobs: cluster.train_many(jobs, images))
        assert _pids(cluster) == kept


def _pids(cluster) -> set[int]:
    return {place["pid"] for place in ray.get([s.actor.where.remote() for s in cluster._idle])}


@pytest.mark.slow
def test_what_a_lost_actor_leaves_is_given_back(cluster):
    """One of two jobs side by side loses its actor, of a room that both are in: it goes on when
    the other is done with that room, and nothing stays reserved."""
    cluster.params = RayParams(actors=2)
    cluster._end_idle()
    two, images = plan("fusion", "no_shared", members=2, epochs=1)
    schemes.train(two, lambda jobs: cluster.train_many(jobs, images))
    (room,) = {seat.room for seat in cluster._idle}
    kept = _pids(cluster)
    one, _ = plan("voting", "no_shared", members=1, epochs=1)
    schemes.train(one, lambda jobs: cluster.train_many(jobs, images))
    assert _pids(cluster) == kept, "one of two is enough for it, and the other stays"
    p, images = plan("voting", "no_shared", members=2, epochs=4)
    before, struck = cluster.lost, []

    def strike(job, epoch) -> None:
        if not struck:
            busy = [gang for gang in cluster._busy if gang.size == 1]
            struck.append(busy[-1].seats[0])
            ray.kill(struck[0].actor)

    alone = schemes.train(p, lambda jobs: loop.train_many(jobs, images))
    trained = schemes.train(p, lambda jobs: cluster.train_many(jobs, images, on_epoch=strike))
    assert cluster.lost == before + 1
    assert differences(alone.state, trained.state) == []
    assert struck[0].room is room
    assert not room.seats
    assert all(seat.room.whole for seat in cluster._idle)
    cluster._end_idle()
    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU") != 4:
        assert time.monotonic() < deadline, "what was reserved is not given back"
        time.sleep(0.1)


def _maker(p, name: str, when: threading.Event | None = None, after: str = ""):
    """Trains plan `p` under another name, once something has happened or another is trained."""

    def make(train_many, result_of):
        while when and not when.wait(0.05):
            train_many([])  # lets others have their turn
        if after:
            result_of(after)
        named = dataclasses.replace(p, params=dataclasses.replace(p.params, name=name))
        return schemes.train(named, train_many)

    return make


@pytest.mark.slow
def test_side_by_side_uses_idle_actors_and_gives_the_same_bits(cluster):
    """Two actors, of which `chain`, which trains member after member, has one."""
    cluster.params = RayParams(actors=2)
    cluster._end_idle()
    made = {
        "chain": plan("snapshot", "no_shared", members=3, epochs=15),
        "small": plan("voting", "no_shared", members=1, epochs=2),
        "wide": plan("fusion", "no_shared", members=2, epochs=2),
        "late": plan("fusion", "no_shared", members=1, epochs=1),
    }
    images = made["wide"][1]
    told: list[str] = []
    sizes: set[tuple[int, ...]] = set()
    begun = threading.Event()

    def on_epoch(job, epoch) -> None:
        told.append(job.name.partition(".")[0])
        if told[-1] == "chain":
            begun.set()
        if told[-1] in ("chain", "small"):
            sizes.add(tuple(gang.size for gang in cluster._busy))

    schemes.train(made["wide"][0], lambda jobs: cluster.train_many(jobs, images))  # starts them
    after = {"small": {"when": begun}, "late": {"after": "wide"}}
    makers = {name: _maker(p, name, **after.get(name, {})) for name, (p, _) in made.items()}
    trained = cluster.side_by_side(makers, images, on_epoch=on_epoch)
    assert list(trained) == list(made)
    for name, (p, _) in made.items():
        alone = schemes.train(p, lambda jobs: loop.train_many(jobs, images))
        assert differences(alone.state, trained[name].state) == []
    assert (1, 1) in sizes, "small was trained beside the chain"
    assert told.index("late") > len(told) - told[::-1].index("wide") - 1
    assert cluster._busy == []
    assert cluster._queue == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "where", ["before its jobs", "in its jobs", "after its jobs", "at the keyboard"]
)
def test_the_first_that_fails_stops_the_others(cluster, tmp_path, monkeypatch, where):
    """Of two actors `long` has one; `wide` waits for both, and must not have them then."""
    cluster.params = RayParams(actors=2)
    p, images = plan("fusion", "no_shared", members=1, epochs=1000)
    wide, _ = plan("fusion", "no_shared", members=2, epochs=1)
    bad, _ = plan("fusion", "no_shared", members=1, epochs=1)
    name = next(n for n in bad.start if n.startswith("0.stem.conv"))
    bad.start[name] = torch.full_like(bad.start[name], 3e38)  # finite, but its sums are not
    begun, never, gangs = threading.Event(), threading.Event(), []
    gang = cluster_module.Gang
    monkeypatch.setattr(
        cluster_module, "Gang", lambda *args: gangs.append(gang(*args)) or gangs[-1]
    )

    def on_epoch(job, epoch) -> None:
        if job.name == "long" and not begun.is_set():
            begun.set()
            if where == "at the keyboard":
                os.kill(os.getpid(), signal.SIGINT)

    def failing(train_many, result_of):
        if where == "in its jobs":
            return _maker(bad, "bad", begun)(train_many, result_of)
        if where == "at the keyboard":
            return _maker(bad, "bad", never)(train_many, result_of)
        if where == "after its jobs":
            _maker(plan("fusion", "no_shared", members=1, epochs=1)[0], "ok")(train_many, result_of)
        while not begun.wait(0.05):
            train_many([])
        raise TrainingError("bad: no luck")

    def waiting(train_many, result_of):
        return result_of("bad")

    makers = {"long": _maker(p, "long"), "wide": _maker(wide, "wide", begun)}
    makers |= {"bad": failing, "student": waiting}
    error, text = (
        (TrainingError, "^bad: ") if where != "at the keyboard" else (KeyboardInterrupt, None)
    )
    with pytest.raises(error, match=text):
        cluster.side_by_side(makers, images, tmp_path, on_epoch)
    assert 2 not in [made.size for made in gangs]
    assert cluster._busy == []
    assert cluster._queue == []
    (kept,) = tmp_path.glob("long-*/state.safetensors")
    assert kept.stat().st_size
    assert cluster.side_by_side({}, images) == {}
