"""The papers' figures, with ours in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnncore.paper.runs import Line
from bnncore.paper.sizes import curves_7b
from bnncore.report.plots import COLOURS, MARKERS, canvas, plain_label, save, whole_numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def write(lines: Sequence[Line], out: Path) -> list[Path]:
    """Draw Figure 7B, and every figure of which something is known; returns the files."""
    figures: dict[str, Callable[[Axes], None]] = {"Figure 7B": _figure_7b}
    for place in dict.fromkeys(
        line.series.place for line in lines if "Figure" in line.series.place
    ):
        here = [line for line in lines if line.series.place == place]
        if any(line.published is not None or line.ours is not None for line in here):
            figures[place] = partial(_figure, here, lines)
    for place, draw in figures.items():
        figure, (axes,) = canvas(10, 4.8)
        draw(axes)
        whole_numbers(axes)
        handles, names = axes.get_legend_handles_labels()
        unique = dict(zip(names, handles, strict=True))
        figure.legend(list(unique.values()), list(unique), fontsize=8, loc="outside right upper")
        save(figure, out / name(place))
    return [out / name(place) for place in figures]


def name(place: str) -> str:
    """The file of a figure."""
    return f"figure_{place.split('Figure ')[-1].lower()}.png"


def _style(index: int) -> dict[str, Any]:
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}


def _figure(here: Sequence[Line], lines: Sequence[Line], axes: Axes) -> None:
    """Published values dashed and hollow, ours solid and filled, with the spread over seeds."""
    of = here[0].series
    title = ": ".join(filter(None, (of.place, of.title)))
    axes.set_title(plain_label(title), loc="left", fontsize=11)
    axes.set(xlabel="tentacles" if of.delta else "members M",
             ylabel="top-1 minus FP32's, points" if of.delta else "top-1, %")  # fmt: skip
    settings = dict.fromkeys(str(line.setting) for line in here if line.setting)
    # Settings share the colour of their scheme, and differ in how dark they are.
    shades = {name: 1 - 0.6 * k / max(1, len(settings) - 1) for k, name in enumerate(settings)}
    for index, curve in enumerate(dict.fromkeys(line.series.name for line in here)):
        label = plain_label(curve)
        same = [line for line in here if line.series.name == curve]
        told = {line.members: line.published for line in same if line.published is not None}
        if told:
            # Figure 3's few known points are not joined: between them the paper gives no numbers.
            axes.plot(list(told), list(told.values()), fillstyle="none",
                      linestyle="none" if of.delta else "--",
                      label=f"{label}, published", **_style(index))  # fmt: skip
        for setting in dict.fromkeys(line.setting for line in same if line.setting):
            ours = [line for line in same if line.setting == setting]
            about = f"{setting}, {setting.epochs} epochs" if setting.epochs else str(setting)
            axes.errorbar([line.members for line in ours], [line.ours or 0 for line in ours],
                          [line.spread or 0 for line in ours], capsize=3,
                          label=f"{label}, ours: {about}", alpha=shades[str(setting)],
                          **_style(index))  # fmt: skip
    level: dict[str, Any] = {"color": "black", "linewidth": 1}
    if of.delta:
        axes.axhline(0, linestyle=":", **level)
        return
    for line in (line for line in lines if line.row == f"{of.backbone} {of.dataset} bnn"):
        if line.published is not None:
            axes.axhline(line.published, linestyle=":", label="one BNN, published", **level)
        if line.ours is not None:
            axes.axhline(line.ours, alpha=shades.get(str(line.setting), 1),
                         label=f"one BNN, ours: {line.setting}", **level)  # fmt: skip


def _figure_7b(axes: Axes) -> None:
    title = "Kim et al., Figure 7B: storage of M binarized ResNet-20 (computed)"
    axes.set_title(title, loc="left", fontsize=11)
    axes.set(xlabel="members M", ylabel="kilobits, weights only")
    for index, (sharing, curve) in enumerate(curves_7b().items()):
        axes.plot(list(curve), [bits / 1000 for bits in curve.values()], markersize=4,
                  label=sharing, **_style(index))  # fmt: skip
