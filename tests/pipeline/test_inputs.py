"""Stage inputs: what has changed in images and code reruns what reads it, and nothing else does."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import struct
import subprocess
import sys
import termios
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from bnncore import params
from pipeline import inputs

ROOT = Path(__file__).parents[2]
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
ALL = ["pretrain", "binarize", "ensemble-train", "pack", "evaluate"]
NETWORK = """
from torch import nn
from mine.parts import first, last

def network(channels, classes):
    conv = nn.Conv2d(8, 8, 3, padding=1)
    norms = [nn.BatchNorm2d(8) for _ in range(2)]
    return nn.Sequential(
        first(channels), norms[0], nn.ReLU(), conv, norms[1], nn.ReLU(), *last(classes)
    )
"""
PARTS = """
from torch import nn

def first(channels):
    return nn.Conv2d(channels, 8, 3, padding=1)

def last(classes):
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes)
"""
SIGNS = """
from bnncore.networks.binarize import clipped_sign

def signs(x):
    return clipped_sign(x)
"""


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """A project with images and code of its own, checked once."""
    folder = tmp_path_factory.mktemp("inputs")
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / "set" / name).mkdir(parents=True)
        for i in range(8):
            pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "set" / name / f"{i}.png")
    (folder / "mine").mkdir()
    for name, text in (("network", NETWORK), ("parts", PARTS), ("signs", SIGNS)):
        (folder / "mine" / f"{name}.py").write_text(text)
    (folder / "params.yaml").write_text(
        yaml.safe_dump(
            {
                "data": {"name": "folder", "path": "set"},
                "model": {
                    "backbone": "mine.network:network",
                    "binarizer": {"activation": "mine.signs:signs"},
                },
                "ensembles": {"train": [{"name": "fused", "members": 2}]},
            }
        )
    )
    return folder


@pytest.fixture
def project(original, tmp_path, monkeypatch):
    folder = tmp_path / "project"
    shutil.copytree(original, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("BNNCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(folder))
    for name in [m for m in sys.modules if m == "mine" or m.startswith("mine.")]:
        monkeypatch.delitem(sys.modules, name)
    inputs.main()
    yield folder
    for name in [m for m in sys.modules if m == "mine" or m.startswith("mine.")]:
        del sys.modules[name]


def written(folder: Path) -> dict[str, str]:
    return {f"models/inputs/{p.name}": p.read_text() for p in (folder / inputs.OUT).iterdir()}


def rerun(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """The stages that DVC would run: those that depend on what differs, and those behind them."""
    changed = {name for name in after if before.get(name) != after[name]}
    stages = []
    for name in ALL:
        if changed & set(STAGES[name]["deps"]):
            stages.append(name)
            changed |= set(STAGES[name]["outs"])
    return stages


def image(folder: Path, name: str, value: int) -> None:
    Image.new("RGB", (8, 8), (value, 1, 2)).save(folder / "set" / name)


def swap(folder: Path) -> None:
    (folder / "set/cat").rename(folder / "set/x")
    (folder / "set/dog").rename(folder / "set/cat")
    (folder / "set/x").rename(folder / "set/dog")


def same_size_and_time(folder: Path) -> None:
    path = folder / "set/cat/0.bmp"
    before = path.stat()
    image(folder, "cat/0.bmp", 9)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def touch(folder: Path) -> None:
    for path in (*folder.rglob("*.png"), *folder.rglob("*.py")):
        os.utime(path, (1, 1))


def append(folder: Path, name: str) -> None:
    with open(folder / "mine" / name, "a") as file:
        file.write("\nchanged = True\n")


KEYS = sorted({key for stage in STAGES.values() for key in stage.get("params", ())})


@pytest.mark.parametrize("key", KEYS)
def test_what_dvc_wants_written_is_named_at_once(tmp_path, monkeypatch, key):
    """bnncore has defaults, DVC has none, and asks when the stage begins."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "dvc.yaml", "dvc.yaml")
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    *above, last = key.split(".")
    section = values
    for name in above:
        section = section[name]
    del section[last]
    Path("params.yaml").write_text(yaml.safe_dump(values))
    params.load("params.yaml")
    with pytest.raises(params.ParamsError, match=rf"expected (.+, )?{re.escape(key)}[, ]"):
        inputs.main()


def test_parameters_of_files_that_come_with_bnncore_are_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "dvc.yaml", "dvc.yaml")
    files = [ROOT / "params.yaml", *(ROOT / "bnncore/zoo").glob("*.yaml"),
             *(ROOT / "docs/reproduction/runs").glob("*/params.yaml")]  # fmt: skip
    assert len(files) > 5
    for file in files:
        shutil.copy(file, "params.yaml")
        assert inputs.unwritten() == [], file


CHANGES = {
    "nothing": (lambda f: None, []),
    "times alone": (touch, []),
    "an image added": (lambda f: image(f, "cat/new.png", 5), ALL),
    "an image changed": (lambda f: image(f, "cat/0.png", 6), ALL),
    "changed, same size and time": (same_size_and_time, ALL),
    "an image deleted": (lambda f: (f / "set/dog/3.png").unlink(), ALL),
    "an image renamed": (lambda f: (f / "set/dog/3.png").rename(f / "set/dog/9.png"), ALL),
    "an image to another class": (lambda f: (f / "set/dog/3.png").rename(f / "set/cat/9.png"), ALL),
    "a class renamed": (lambda f: (f / "set/dog").rename(f / "set/cow"), ALL),
    "classes swapped": (swap, ALL),
    "a file that is passed over": (lambda f: (f / "set/dog/notes.txt").write_text("x"), []),
    "the data's folder moved": (lambda f: moved(f), []),
    "the backbone's code": (lambda f: append(f, "network.py"), ALL),
    "what the backbone imports": (lambda f: append(f, "parts.py"), ALL),
    "the binarizer's code": (lambda f: append(f, "signs.py"), ALL[1:]),
    "code that nobody names": (lambda f: (f / "mine/other.py").write_text("x = 1"), []),
}


def moved(folder: Path) -> None:
    (folder / "set").rename(folder / "elsewhere")
    values = yaml.safe_load((folder / "params.yaml").read_text())
    values["data"]["path"] = "elsewhere"
    (folder / "params.yaml").write_text(yaml.safe_dump(values))


@pytest.mark.parametrize("kind", CHANGES)
def test_what_changed_reruns_what_reads_it(kind, project):
    image(project, "cat/0.bmp", 8)
    inputs.main()
    before = written(project)
    change, stages = CHANGES[kind]
    change(project)
    inputs.main()
    assert rerun(before, written(project)) == stages


def test_it_is_checked_only_where_something_changed(project, capsys, monkeypatch):
    capsys.readouterr()
    monkeypatch.setattr(inputs, "check", None)  # would fail
    inputs.main()
    assert capsys.readouterr().out == ""


def test_it_says_what_was_read(project, capsys):
    shutil.copy(project / "set/cat/1.png", project / "set/dog/1.png")
    (project / "set/dog/photo.heic").write_text("x")
    inputs.main()
    said = capsys.readouterr().out
    assert "folder: 2 classes, images of 8x8x3; train 10, val 2, test 4" in said
    assert "passed over: 1 files that are no images, such as " in said
    assert "warning: 1 images are there more than once (dog/1.png is cat/1.png)" in said


REFUSED = {
    "members": ({"ensembles": {"train": [{"name": "x", "members": 1025}]}}, "ensembles.train.x"),
    "backbone": ({"model": {"backbone": "mine.network:none"}}, "model.backbone: cannot import"),
    "data": ({"data": {"name": "folder", "path": "none"}}, "none: expected the data of folder"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_it_refuses_before_anything_is_written(kind, project):
    values, said = REFUSED[kind]
    written = yaml.safe_load((project / "params.yaml").read_text())
    (project / "params.yaml").write_text(yaml.safe_dump({**written, **values}))
    before = (project / inputs.KEPT / "checked").read_text()
    with pytest.raises(ValueError, match=said):
        inputs.main()
    assert (project / inputs.KEPT / "checked").read_text() == before
    with pytest.raises(ValueError, match=said):  # and again
        inputs.main()


# -- any stage, as a command -------------------------------------------------------------------


def stage(name: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return python(folder, "-m", f"pipeline.{name}", *arguments)


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": "none"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=100)


HELP = """
import contextlib, io, runpy, sys
for name in sys.argv[1:]:
    sys.argv = [name, "--help"]
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            runpy.run_module(f"pipeline.{name}", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        assert not end.code, end.code
    assert f"usage: python -m pipeline.{name}" in out.getvalue(), out.getvalue()
    print(name)
"""


@pytest.mark.slow
def test_help_does_not_run_a_stage(tmp_path):
    """All in one process: each of its own would import torch."""
    done = stage("inputs", tmp_path, "--help")
    assert done.returncode == 0, done.stderr
    assert "usage: python -m pipeline.inputs" in done.stdout
    others = [s.replace("-", "_") for s in ALL]
    done = python(tmp_path, "-c", HELP, *others)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == others
    assert list(tmp_path.iterdir()) == []


def test_an_argument_that_a_stage_does_not_know(tmp_path):
    assert stage("inputs", tmp_path, "--no-such-option").returncode == 2


@pytest.mark.parametrize("columns", [None, 0, 200])
def test_progress_says_how_long(columns, monkeypatch):
    """In a log, in a terminal without a width (what a new pty is), and in one with a width."""
    from pipeline.stage import Stage

    reader, writer = os.pipe() if columns is None else os.openpty()
    if columns:
        fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    with open(writer, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        running = Stage(params.Params(), None)
        state = {"epoch": 2, "train_loss": 0.5, "val_top1": 90.0, "seconds": 30.0}
        running._show("fused", state, 4)
        running.close()
        said = os.read(reader, 10_000).decode()
    os.close(reader)
    if columns:
        assert "2/4 [" in said
    else:
        assert "epoch 2/4, loss 0.500, validation 90.0 %, after 00:00, about 01:00 left" in said


def test_a_users_error_is_one_line_and_a_bug_is_not(tmp_path, monkeypatch, capsys):
    from pipeline.stage import run

    monkeypatch.setattr(sys, "argv", ["inputs.py"])

    def fail(error: Exception):
        def main() -> None:
            raise error

        return main

    full = OSError(28, "No space left on device")
    named = OSError(28, "No space left on device", "models/x")
    for error, said in (
        (params.ParamsError("seed: expected"), "inputs: seed: expected"),
        (params.ParamsError("a\x1b[31m: b\nc\u202e: d"), "inputs: a\\x1b[31m: b\nc\\u202e: d"),
        (full, f"inputs: {Path().resolve()}: [Errno 28] No space left on device"),
        (named, "inputs: [Errno 28] No space left on device: 'models/x'"),
    ):
        with pytest.raises(SystemExit) as caught:
            run(fail(error), "a stage")
        assert caught.value.code == said
    for bug in (ValueError("x"), RuntimeError("x"), FileNotFoundError(2, "x", "y"), KeyError("x")):
        with pytest.raises(type(bug)):
            run(fail(bug), "a stage")


def test_files_that_stand_as_they_were_are_not_read_again(tmp_path, monkeypatch):
    from bnncore import data
    from bnncore.data import fingerprint

    read = []

    def hashed(files):
        read.extend(files)
        return ["0"] * len(files)

    for name in ("cat", "dog"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(600):
            (tmp_path / f"set/{name}/{i}.png").write_bytes(b"%d" % i)
    monkeypatch.setattr(fingerprint, "_hash", hashed)
    monkeypatch.setattr(fingerprint, "_SETTLED_NS", -1)  # as if they had stood there for long
    source = data.source(data.DataParams(name="folder", path=str(tmp_path / "set")))
    for _ in range(2):
        fingerprint.contents(source, tmp_path / "kept.json")
    assert len(read) == len(set(read)) == 1_200
