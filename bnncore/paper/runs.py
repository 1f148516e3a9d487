"""Finished runs, and how they stand beside the published accuracies."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bnncore import params
from bnncore.networks.backbones import BACKBONES
from bnncore.paper.figures import FiguresError, Series


@dataclass(frozen=True)
class Setting:
    """Under what conditions something was run.

    Attributes:
        dataset, backbone: what was trained on what.
        width: channels of the first convolution; None for the paper's.
        subset: fraction of the training images.
        epochs: of the model's own training; None where the run does not say.
        how: every other parameter that the model comes from, as (key, value).
        note: what of it is different where the rest is equal.
    """

    dataset: str
    backbone: str
    width: int | None
    subset: float
    epochs: int | None
    how: frozenset[tuple[str, str]] = frozenset()
    note: str = field(default="", compare=False)

    def __str__(self) -> str:
        width = "the paper's width" if self.width is None else f"width {self.width}"
        images = "" if self.subset == 1 else f", {self.subset:.0%} of the images"
        return f"{width}{images}{self.note}"


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
    """The finished runs in or below `folders`: their ``results.json``, or that in ``reports``.

    What a row does not say itself (``dataset``, ``backbone``, ``width``, ``subset``, ``epochs``,
    ``seed``) is taken from the resolved parameters of the run: ``packed/params.yaml`` or
    ``params.yaml`` beside the results or in the folder above.

    Raises:
        FiguresError: a folder without results, or results that cannot be read; names it.
    """
    runs: list[Run] = []
    for folder in folders:
        files = [folder] if folder.is_file() else _results(folder)
        if not files:
            raise FiguresError(f"{folder}: expected a finished run, found no results.json below it")
        for file in files:
            runs += _read(file)
    return runs


def _results(folder: Path) -> list[Path]:
    for file in (folder / "results.json", folder / "reports" / "results.json"):
        if file.is_file():  # a run: what lies deeper are copies of it, or not its own
            return [file]
    below = sorted(f for f in folder.glob("*/") if not f.is_symlink())
    return [
        file
        for f in below
        if f.name[0] != "." and f.name not in ("checkpoints", "mlruns")
        for file in _results(f)
    ]


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
        for path in (folder / "packed" / "params.yaml", folder / "params.yaml"):
            if path.exists():
                return params.plain(params.load(path))
    return {}


def _kind(row: dict[str, Any]) -> tuple[str, ...]:
    kind = row.get("kind") or (row["name"] if row["name"] in ("fp32", "bnn") else "ensemble")
    return (kind,) if kind != "ensemble" else (str(row["scheme"]), str(row["sharing"]))


def _run(row: dict[str, Any], p: dict[str, Any], fp32: float | None) -> Run:
    kind = _kind(row)
    data, model = p.get("data", {}), p.get("model", {})
    own: dict[str, Any] = {}
    section = {"fp32": p.get("pretrain"), "bnn": p.get("binarize")}.get(kind[0])
    if section is None:
        ensembles = p.get("ensembles", {})
        own = next((e for e in ensembles.get("train", ()) if e["name"] == row["name"]), {})
        section = {**ensembles.get("recipe", {}), **(own.get("recipe") or {})}
    backbone = str(row.get("backbone") or model["backbone"])
    width = row.get("width", model.get("width"))
    if backbone in BACKBONES and width == BACKBONES[backbone][1]:
        width = None
    epochs = row.get("epochs", section.get("epochs"))
    # A folder is taken for the data set that it is named after.
    dataset = Path(data["path"]).name if data.get("name") == "folder" else data.get("name")
    if not (dataset := row.get("dataset") or dataset):
        raise ValueError("no dataset, and no params.yaml beside it or in the folder above")
    setting = Setting(
        str(dataset),
        backbone,
        None if width is None else int(width),
        float(row.get("subset", data.get("subset", 1.0))),
        None if epochs is None else int(epochs),
        _how(p, kind, own, section or {}),
    )
    members = 1 if len(kind) == 1 else int(row["members"])
    seed = int(row.get("seed", p.get("seed", 0)))
    size = row.get("file_bytes")
    return Run(setting, kind, members, seed, float(row["test_top1"]), fp32,
               None if size is None else int(size))  # fmt: skip


# What Setting, Run or Series say themselves, and what changes no result.
_ELSEWHERE = {
    "name",
    "path",
    "download",
    "subset",
    "seed",
    "backbone",
    "width",
    "scheme",
    "members",
}
_ELSEWHERE |= {"compile", "stack", "deterministic", "shards"}


def _how(
    p: dict[str, Any], kind: tuple[str, ...], own: dict[str, Any], recipe: dict[str, Any]
) -> frozenset[tuple[str, str]]:
    """(key, value) of the parameters behind a model, those of what it starts from among them."""
    found = {name: dict(p.get(name, {})) for name in ("data", "pack", "model", "pretrain")}
    if kind == ("fp32",):
        found["model"].pop("binarizer", None)
    else:
        found["binarize"] = p.get("binarize", {})
    if len(kind) > 1:
        found["ensemble"] = {**own, "recipe": recipe}
    return frozenset(
        (key, str(value)) for key, value in _flat(found) if key.rpartition(".")[2] not in _ELSEWHERE
    )


def _flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield above + key, value


def _noted(runs: Sequence[Run]) -> list[Run]:
    """The same, their settings saying what is different of how they were trained."""
    alike: dict[tuple[Any, ...], set[frozenset[tuple[str, str]]]] = {}
    for run in runs:
        alike.setdefault(_printed(run), set()).add(run.setting.how)
    noted = []
    for run in runs:
        hows = alike[_printed(run)]
        special = sorted(run.setting.how - frozenset.intersection(*hows))
        note = "".join(f", {key} {value}" for key, value in special)
        noted.append(replace(run, setting=replace(run.setting, note=note)))
    return noted


def _printed(run: Run) -> tuple[Any, ...]:
    return *_key(run), run.setting.width, run.setting.subset, run.setting.epochs


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
    runs = _noted(runs)
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


def _nearness(setting: Setting) -> tuple[Any, ...]:
    """Settings like the paper's first."""
    width, epochs = setting.width or 0, setting.epochs or 0
    return (setting.width is not None, -width, -setting.subset, -epochs, setting.note)
