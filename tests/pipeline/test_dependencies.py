"""DVC does not follow imports: that `dvc.yaml` names all code that decides what a stage writes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml

from bnncore import modules
from bnncore.training import jobs

ROOT = Path(__file__).parents[2]
STAGES = ("pretrain", "binarize", "ensemble-train", "pack", "evaluate")

# What stages reach and DVC need not watch, and why. Imports are not followed through it.
CHANGES_NOTHING = {
    "bnncore/__init__.py": "for users of the package; no stage calls its `load`",
    "bnncore/check.py": "lets parameters pass or refuses them; changes nothing of what is made",
    "bnncore/errors.py": "names of errors",
    "bnncore/modules.py": "finds files; what is in them is in the digests",
    "bnncore/tracking": "logs what stages have made",
    "pipeline/__init__.py": "empty",
    "pipeline/parent.py": "ends a stage whose dvc is gone",
}
# evaluate ends in an error if torch was imported: it runs nothing of these.
NEEDS_TORCH = {f"bnncore/{room}": "needs torch" for room in ("lowering", "networks", "training")}
SHOWN = {"bnncore/terminal.py": "how errors are shown"}
BY_STAGE = dict.fromkeys(("inputs", *STAGES[:4]), SHOWN)
BY_STAGE |= {"evaluate": {**NEEDS_TORCH, "bnncore/paper": "tables that other commands print"}}


@cache
def reached(stage: str, root: Path) -> set[str]:
    """Files below `root` that a stage may run, all imports followed, those in functions too."""
    cut = {**CHANGES_NOTHING, **BY_STAGE.get(stage, {})}

    def own(path: Path) -> bool:
        path = path.resolve()
        if not any(path.is_relative_to(root / place) for place in ("bnncore", "pipeline")):
            return False  # an environment may lie below the root
        return not covered(path.relative_to(root).as_posix(), cut)

    start = f"pipeline.{stage.replace('-', '_')}"
    return {p.resolve().relative_to(root).as_posix() for p in modules.files([start], own).values()}


def covered(file: str, by) -> bool:
    return any(file == entry or file.startswith(f"{entry}/") for entry in by)


def declared(stage: str, root: Path) -> list[str]:
    found = yaml.safe_load((root / "dvc.yaml").read_text())["stages"][stage]["deps"]
    assert found == sorted(found)
    return [dep for dep in found if dep.startswith(("bnncore", "pipeline"))]


def holes(stage: str, root: Path) -> set[str]:
    """Files that a stage may run and that no dependency covers."""
    return {file for file in reached(stage, root) if not covered(file, declared(stage, root))}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_names_the_rooms_it_uses(stage):
    files = reached(stage, ROOT)
    assert holes(stage, ROOT) == set()
    for dep in declared(stage, ROOT):
        assert (ROOT / dep).exists()
        assert any(covered(file, [dep]) for file in files), f"{dep} is not used"


def test_what_changes_nothing_is_there_and_reached():
    everything = {**CHANGES_NOTHING, **NEEDS_TORCH}
    assert all((ROOT / place).exists() for place in everything)


def test_editing_what_people_read_trains_nothing():
    for stage in ("pretrain", "binarize", "ensemble-train"):
        for room in ("tracking", "report", "search", "paper", "storage", "packed", "lowering"):
            assert not covered(f"bnncore/{room}/x.py", declared(stage, ROOT)), (stage, room)


def test_checkpoints_depend_on_the_code_that_stages_depend_on():
    rooms = {
        dep.removeprefix("bnncore/")
        for stage in ("pretrain", "binarize", "ensemble-train")
        for dep in declared(stage, ROOT)
        if dep.startswith("bnncore/")
    }
    assert rooms == set(jobs.ROOMS)
    for room in jobs.ROOMS:
        assert list((ROOT / "bnncore" / room).glob("*.py"))


HOLES = {
    "at the top": ("pipeline/pretrain.py", "import bnncore.hole"),
    "in a function": ("bnncore/networks/backbones.py", "def f():\n    from bnncore import hole"),
    "in a package": ("bnncore/training/__init__.py", "from .. import hole"),
    "by name": ("bnncore/training/loop.py", "TABLE = {'x': 'bnncore.hole'}"),
    "behind another": ("bnncore/data/parts.py", "if True:\n    from bnncore.hole import something"),
    "only for types": (
        "bnncore/data/parts.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import bnncore.hole",
    ),
}


@pytest.mark.slow
def test_planted_holes_are_seen(tmp_path):
    """In a copy, a stage's code uses modules that no dependency names, each in its own way."""
    for name in ("bnncore", "pipeline"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.html")
        )
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    expected = set()
    for kind, (file, code) in HOLES.items():
        hole = f"hole_{kind.replace(' ', '_')}"
        (tmp_path / f"bnncore/{hole}.py").write_text("something = 1\n")
        with open(tmp_path / file, "a") as opened:
            opened.write("\n" + code.replace("hole", hole) + "\n")
        expected |= set() if kind == "only for types" else {f"bnncore/{hole}.py"}
    # In a process of its own, where the copy is what is imported.
    ask = (
        "import sys; from pathlib import Path\n"
        "sys.path.insert(0, '.')\n"
        f"sys.path.append({str(ROOT)!r})\n"
        "from tests.pipeline.test_dependencies import holes\n"
        "print(*holes('pretrain', Path.cwd().resolve()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", ask], cwd=tmp_path, env={"PATH": ""}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == expected
