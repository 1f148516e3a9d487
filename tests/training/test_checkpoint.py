"""Checkpoints and models on disk: one writer, whole files, nothing lost on a full disk or by a
kill."""

from __future__ import annotations

import json
import os
import resource
import signal
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from bnncore.networks.ensemble import Ensemble, EnsembleSpec
from bnncore.networks.sharing import SHARING
from bnncore.params import Recipe
from bnncore.training import checkpoint as checkpoints
from bnncore.training import ensembled
from bnncore.training.checkpoint import Checkpoint, resumable
from bnncore.training.ensembled import Ensembled, ModelError
from bnncore.training.jobs import Job, TrainingError, received, sent
from bnncore.training.loop import Trainer, drive, train_many
from tests import tiny

DATA = tiny.dataset()
SPEC = EnsembleSpec(tiny.model(data=DATA), 2, SHARING["shared_conv"])
JOB = Job("e", SPEC, (0, 1), Recipe(epochs=2, batch_size=16), 1, Ensemble(SPEC).state())


def model(value: float) -> Ensembled:
    state = {n: torch.full_like(v, value) for n, v in JOB.start.items()}
    return Ensembled(SPEC, state, {"e": []})


def files(folder) -> dict[str, bytes]:
    """Everything under a folder but locks, hidden files too."""
    found = (p for p in folder.rglob("*") if p.is_file() and p.name != "lock")
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in found}


# -- one writer ----------------------------------------------------------------------------------


def test_the_holder_of_a_checkpoint_is_named(tmp_path):
    first = Checkpoint(tmp_path, "e")
    with pytest.raises(
        TrainingError, match=rf"only writer.*process \(pid {os.getpid()} on .*\) holds this"
    ):
        Checkpoint(tmp_path, "e")
    first.close()
    reader, writer = os.pipe()
    other = os.fork()
    if not other:  # holds the folder until it is killed
        held = Checkpoint(tmp_path, "e")
        os.write(writer, b"!")
        signal.pause()
        held.close()
    try:
        os.read(reader, 1)
        with pytest.raises(TrainingError, match=rf"only writer.*process \(pid {other} on "):
            Checkpoint(tmp_path, "e")
    finally:
        os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)
        os.close(reader)
        os.close(writer)
    Checkpoint(tmp_path, "e").close()


def test_an_unreadable_checkpoint_is_named_and_kept(tmp_path):
    train_many([JOB], DATA, tmp_path)
    (path,) = tmp_path.glob("*/state.safetensors")
    whole = path.read_bytes()
    for broken in (b"", whole[:7], whole[:1000], whole[:-2]):
        path.write_bytes(broken)
        with pytest.raises(TrainingError, match=r"state.safetensors: expected a checkpoint"):
            train_many([JOB], DATA, tmp_path)
        assert path.read_bytes() == broken


# -- finished jobs -------------------------------------------------------------------------------


def test_a_finished_job_is_taken_from_its_checkpoint(tmp_path):
    told: list[dict] = []
    (once,) = train_many([JOB], DATA, tmp_path, lambda _, epoch: told.append(dict(epoch)))
    before = files(tmp_path)

    class Idle(Trainer):
        def epoch(self, history):
            raise AssertionError("it was to be trained no more")

    again: list[dict] = []
    (folder,) = tmp_path.iterdir()
    store = Checkpoint(tmp_path, folder.name)
    done = drive(JOB, DATA, Idle(JOB, DATA, device="cpu"), store, lambda _, e: again.append(e))
    store.close()
    assert all(torch.equal(done.state[n], v) for n, v in once.state.items())
    assert done.outputs.tobytes() == once.outputs.tobytes()
    assert again == told == once.history  # the same rows, to the moment they were finished
    assert [row["epoch"] for row in told] == [1, 2]
    assert told[0]["time"] < told[1]["time"]
    assert files(tmp_path) == before


def test_a_history_of_an_earlier_version_goes_on(tmp_path):
    store = Checkpoint(tmp_path, "e")
    half = replace(JOB, recipe=replace(JOB.recipe, epochs=1))
    trainer = Trainer(half, DATA, device="cpu")
    drive(half, DATA, trainer, store)
    state, history = store.load()
    old = [{k: v for k, v in epoch.items() if k != "time"} for epoch in history]
    store.save(state, old)
    done = drive(JOB, DATA, Trainer(JOB, DATA, device="cpu"), store)
    store.close()
    assert done.history[0] == old[0]
    assert "time" in done.history[1]


def test_checkpoints_go_when_the_stage_is_done_and_not_before(tmp_path):
    folder = tmp_path / "stage"
    for error in (KeyboardInterrupt, OSError):
        with pytest.raises(error), resumable(folder) as where:  # noqa: PT012
            train_many([JOB], DATA, where)
            raise error
        assert list(folder.glob("*/state.safetensors"))
    with resumable(folder):
        assert list(folder.glob("*/state.safetensors"))
    assert not folder.exists()


# -- full disks and kills ------------------------------------------------------------------------


@contextmanager
def room_for(size: int):
    """Files cannot grow beyond so many bytes, as on a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def save_checkpoint(folder, value: float) -> None:
    store = Checkpoint(folder, "e")
    try:
        store.save(model(value).state, [])
    finally:
        store.close()


def save_model(folder, value: float) -> None:
    model(value).save(folder / "e")


@pytest.mark.parametrize("save", [save_checkpoint, save_model])
@pytest.mark.parametrize("room", [0, 100, 1000, 20_000])
def test_a_full_disk_is_named_and_nothing_is_lost(tmp_path, save, room):
    save(tmp_path, 1.0)
    before = files(tmp_path)
    assert max(map(len, before.values())) > room
    with room_for(room), pytest.raises(TrainingError, match=rf"{tmp_path}/e.*: cannot write the"):
        save(tmp_path, 2.0)
    assert files(tmp_path) == before, "the old ones as they were, and no half file"


def test_a_disk_that_is_full_from_the_start_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match=r"file/e: cannot make the checkpoint"):
        Checkpoint(tmp_path / "file", "e")
    with pytest.raises(TrainingError, match=r"file/e: cannot write the model"):
        model(1.0).save(tmp_path / "file" / "e")


CALLS = {  # what changes the disk, in each of the modules that save
    (checkpoints.os, "replace"),
    (checkpoints.os, "rename"),
    (checkpoints.os, "fsync"),
    (checkpoints.shutil, "rmtree"),
    (checkpoints, "save_file"),
    (ensembled, "save_file"),
    (ensembled.Path, "write_text"),
    (ensembled.Path, "mkdir"),
}


def killed_at(strike: int, save, folder) -> bool:
    """Save in a process that is killed before its call number `strike`; False if it ended first."""
    child = os.fork()
    if not child:
        count = 0

        def struck(function):
            def call(*args, **kwargs):
                nonlocal count
                if count == strike:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1
                return function(*args, **kwargs)

            return call

        for owner, name in CALLS:
            setattr(owner, name, struck(getattr(owner, name)))
        save(folder, 2.0)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.slow
@pytest.mark.parametrize("save", [save_checkpoint, save_model])
def test_a_kill_at_any_moment_leaves_no_mixture(tmp_path, save):
    def found(folder) -> float | None:
        """The value of all entries of what is there, None for nothing."""
        try:
            if save is save_model:
                state = Ensembled.read(folder / "e").state
            else:
                store = Checkpoint(folder, "e")
                state, _ = store.load()
                store.close()
        except ModelError:
            return None
        (value,) = {v.unique().item() for v in state.values()}
        return value

    strikes, seen = 0, []
    for strikes in range(100):
        folder = tmp_path / str(strikes)
        save(folder, 1.0)
        if not killed_at(strikes, save, folder):
            break
        seen.append(found(folder))
        save(folder, 3.0)  # what the kill left is in nobody's way
        assert found(folder) == 3.0
        assert not [name for name in files(folder) if ".new" in name or ".old" in name]
    assert strikes > 3
    assert found(tmp_path / str(strikes)) == 2.0
    assert set(seen) <= ({1.0, 2.0} if save is save_checkpoint else {1.0, 2.0, None})
    assert seen.count(None) <= 1  # between the two renames of a folder


def test_a_model_without_one_of_its_files_is_named(tmp_path):
    for name in ("spec.json", "histories.json", "weights.safetensors"):
        model(1.0).save(tmp_path / "m")
        (tmp_path / "m" / name).unlink()
        with pytest.raises(ModelError, match=rf"{tmp_path}/m: expected a trained model.*{name}"):
            Ensembled.read(tmp_path / "m")
    assert json.loads((tmp_path / "m" / "spec.json").read_text())["members"] == 2


def test_a_state_arrives_as_it_was_sent():
    state = {
        "a": torch.randn(4, 3).t(),  # not contiguous
        "count": torch.tensor(7),
        "none": torch.zeros(0, 2),
        "twice": (both := torch.randn(5)),
        "the same": both,
        "part": torch.randn(6)[2:4],
    }
    there = received(sent(state))
    assert there.keys() == state.keys()
    for name, value in state.items():
        assert there[name].dtype == value.dtype
        assert there[name].shape == value.shape
        assert torch.equal(there[name], value)
    there["a"].add_(1)  # it is the receiver's own
    assert not torch.equal(there["a"], state["a"])
