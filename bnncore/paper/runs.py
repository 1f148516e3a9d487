"""Finished runs, and how they stand beside the published accuracies."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bnncore import params
from bnncore.networks.backbones import BACKBONES
from bnncore.paper.figures import FiguresError, Series
from bnncore.params import read_yaml


@dataclass(frozen=True)
class Setting:
    """Under what conditions something was run.

    Attributes:
        dataset, backbone: what was trained on what.
        width: channels of the first convolution; None for the paper's.
        subset: fraction of the training images.
        epochs: of the model's own training; None where the run does not say.
    """

    dataset: str
    backbone: str
    width: int | None
    subset: float
    epochs: int | None

    def __str__(self) -> str:
        width = "the paper's width" if self.width is None else f"width {self.width}"
        images = "" if self.subset == 1 else f", {self.subset:.0%} of the images"
        return f"{width}{images}"


@dataclass(frozen=True)
class Run:
    """One finished model.

    Attributes:
        kind: as in `Series`.
        top1: test accuracy in percent.
        fp32: that of the FP32 model of the same run, None where there is none.
        file_bytes: of its packed file.
    """

    setting: Setting
    kind: tuple[str, ...]
    members: int
    seed: int
    top1: float
    fp32: float | None
    file_bytes: int | None


def collect(folders: Iterable[Path]) -> list[Run]:
    """The finished runs below `folders`: every ``results.json``.

    What a row does not say itself (``dataset``, ``backbone``, ``width``, ``subset``, ``epochs``,
    ``seed``) is taken from the resolved parameters of the run: ``packed/params.yaml`` or
    ``params.yaml`` beside the results or in the folder above.

    Raises:
        FiguresError: a folder without results, or results that cannot be read; names it.
    """
    runs: list[Run] = []
    for folder in folders:
        # MLflow keeps copies of its own.
        found = [f for f in sorted(folder.rglob("results.json")) if "mlruns" not in f.parts]
        files = [folder] if folder.is_file() else found
        if not files:
            raise FiguresError(f"{folder}: expected a finished run, found no results.json below it")
        for file in files:
            runs += _read(file)
    return runs


def _read(file: Path) -> list[Run]:
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError("expected a list of objects")
        known = _parameters(file)
        fp32 = next((float(r["test_top1"]) for r in rows if _kind(r) == ("fp32",)), None)
        return [_run(row, known, fp32) for row in rows if row.get("test_top1") is not None]
    except KeyError as error:
        text = f"no {error}"
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        text = str(error)
    raise FiguresError(f"{file}: expected the results of a run: {text}")


def _parameters(file: Path) -> dict[str, Any]:
    for folder in (file.parent, file.parent.parent):
        if (resolved := folder / "packed" / "params.yaml").exists():
            return read_yaml(resolved)
        if (written := folder / "params.yaml").exists():
            found = read_yaml(written)
            whole = found.get("scale") in (None, params.plain(params.Scale()))
            return found if whole else params.plain(params.parse(found))
    return {}


def _kind(row: dict[str, Any]) -> tuple[str, ...]:
    kind = row.get("kind") or (row["name"] if row["name"] in ("fp32", "bnn") else "ensemble")
    return (kind,) if kind != "ensemble" else (str(row["scheme"]), str(row["sharing"]))


def _run(row: dict[str, Any], p: dict[str, Any], fp32: float | None) -> Run:
    kind = _kind(row)
    data, model = p.get("data", {}), p.get("model", {})
    section = {"fp32": p.get("pretrain"), "bnn": p.get("binarize")}.get(kind[0])
    if section is None:
        ensembles = p.get("ensembles", {})
        own: dict[str, Any] = next(
            (e for e in ensembles.get("train", ()) if e["name"] == row["name"]), {}
        )
        section = {**ensembles.get("recipe", {}), **(own.get("recipe") or {})}
    backbone = str(row.get("backbone") or model["backbone"])
    width = row.get("width", model.get("width"))
    if backbone in BACKBONES and width == BACKBONES[backbone][1]:
        width = None
    epochs = row.get("epochs", section.get("epochs"))
    # A folder is taken for the data set that it is named after.
    dataset = Path(data["path"]).name if data.get("name") == "folder" else data.get("name")
    setting = Setting(
        str(row.get("dataset") or dataset),
        backbone,
        None if width is None else int(width),
        float(row.get("subset", data.get("subset", 1.0))),
        None if epochs is None else int(epochs),
    )
    members = 1 if len(kind) == 1 else int(row["members"])
    seed = int(row.get("seed", p.get("seed", 0)))
    size = row.get("file_bytes")
    return Run(setting, kind, members, seed, float(row["test_top1"]), fp32,
               None if size is None else int(size))  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One line of a table: a published value and ours under one setting.

    Attributes:
        series: what the value belongs to.
        members: M.
        ours, spread: mean and sample standard deviation over the seeds; None: not run, or one seed.
        seeds: how many; 0: not run.
        setting: None: not run.
        file_bytes: of the packed file; None: not run.
    """

    series: Series
    members: int
    ours: float | None = None
    spread: float | None = None
    seeds: int = 0
    setting: Setting | None = None
    file_bytes: int | None = None

    @property
    def row(self) -> str:
        """What the value is of."""
        return self.series.label.replace("{m}", str(self.members))

    @property
    def published(self) -> float | None:
        """None where the paper (or its authors' logs) gives no number."""
        return self.series.values.get(self.members)

    @property
    def difference(self) -> float | None:
        """Ours minus published."""
        if self.ours is None or self.published is None:
            return None
        return self.ours - self.published


def lines(runs: Sequence[Run], published: Sequence[Series]) -> list[Line]:
    """Every accuracy of both papers, published and ours; then what was run beside.

    A published value has a line for each setting in which it was run, or a blank one.
    """
    found: list[Line] = []
    known = set()
    for series in published:
        mine = [run for run in runs if _key(run) == (series.dataset, series.backbone, series.kind)]
        counts = set(series.values) | {run.members for run in mine if series.curve}
        for members in sorted(counts or {2, 4, 6, 8, 10}):
            found += _lines([run for run in mine if run.members == members], series, members)
            known.add((series.dataset, series.backbone, series.kind, members))
    for run in runs:
        key = (*_key(run), run.members)
        if key not in known:
            known.add(key)
            name = run.kind[0] if len(run.kind) == 1 else f"{', '.join(run.kind)}, M = {{m}}"
            dataset, backbone, kind = _key(run)
            label = f"{backbone} {dataset} {name}"
            beside = Series("Not in the papers", label, dataset, backbone, kind, {})
            found += _lines([r for r in runs if (*_key(r), r.members) == key], beside, run.members)
    return found


def _key(run: Run) -> tuple[str, str, tuple[str, ...]]:
    return run.setting.dataset, run.setting.backbone, run.kind


def _lines(runs: Sequence[Run], series: Series, members: int) -> list[Line]:
    settings: dict[Setting, list[Run]] = {}
    for run in runs:
        if not (series.delta and run.fp32 is None):
            settings.setdefault(run.setting, []).append(run)
    found = []
    for setting, same in sorted(settings.items(), key=lambda item: _nearness(item[0])):
        last = {run.seed: run for run in same}.values()  # a seed that was run twice counts once
        values = [run.top1 - (run.fp32 or 0) if series.delta else run.top1 for run in last]
        spread = statistics.stdev(values) if len(values) > 1 else None
        size = next(run.file_bytes for run in last)
        mean = statistics.mean(values)
        found.append(Line(series, members, mean, spread, len(values), setting, size))
    return found or [Line(series, members)]


def _nearness(setting: Setting) -> tuple[float, ...]:
    """Settings like the paper's first."""
    width, epochs = setting.width or 0, setting.epochs or 0
    return (setting.width is not None, -width, -setting.subset, -epochs)
