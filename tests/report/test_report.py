"""The table and the plots, on made-up results."""

import csv
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bnncore import report
from bnncore.report import plots, table

ROOT = Path(__file__).parents[2]


def a_model(name, kind, members, test, size, **more):
    row = {"name": name, "kind": kind, "scheme": "single", "sharing": None, "members": members}
    row |= {"val_top1": test + 0.5, "test_top1": test, "file_bytes": size}
    row |= {"counted_kib": size / 1200, "images_compared": 360, "images_different": 0}
    return row | {"max_logit_difference": 1e-6, "backbone": "nin", "width": 16} | more


def a_run():
    """(results, histories, anytime) with the shape of a real run; the figures are made up."""
    tent = {"scheme": "tentaclenet", "sharing": "tentaclenet"}
    shared = {"scheme": "fusion", "sharing": "shared_conv"}
    vote = {"scheme": "voting", "sharing": "shared_conv"}
    results = [
        a_model("fp32", "fp32", 1, 96.9, 103_400, scheme="fp32"),
        a_model("bnn", "bnn", 1, 82.7, 7_900),
        a_model("bnn-wide", "bnn", 1, 88.6, 21_300, width=26),
        a_model("tentaclenet-1", "bnn", 1, 83.1, 8_300, **tent),
        a_model("tentaclenet-3", "ensemble", 3, 86.9, 15_900, **tent),
        a_model("tentaclenet-5", "ensemble", 5, 91.8, 23_600, **tent),
        a_model("fusion-1", "bnn", 1, 82.9, 8_000, **shared),
        a_model("fusion-3", "ensemble", 3, 87.2, 12_200, **shared),
        a_model("fusion-5", "ensemble", 5, 88.0, 16_100, **shared),
        a_model("voting-3", "ensemble", 3, 87.0, 12_190, **vote),
    ]
    histories = {}
    for i, row in enumerate(results):
        top = row["val_top1"]
        histories[row["name"]] = [
            {
                "epoch": e,
                "train_loss": 2.3 * math.exp(-e / (6 + i)) + 0.05 * i,
                "train_top1": top + 2 - 60 * math.exp(-e / 5),
                "val_loss": 2.3 * math.exp(-e / (7 + i)) + 0.1 * i,
                "val_top1": top - 60 * math.exp(-e / (4 + i / 2)) + math.sin(e * (i + 1)) * 0.8,
            }
            for e in range(1, 31)
        ]
    anytime = {
        name: [{"members": m, "top1": base + 4 * math.log(m)} for m in range(1, 6)]
        for name, base in (("tentaclenet-5", 84.0), ("fusion-5", 82.0))
    }
    anytime["fusion-5, early exit"] = [
        {"members": 5, "mean_members": 1 + 0.4 * i, "top1": 83 + 1.6 * i} for i in range(4)
    ]
    return results, histories, anytime


def test_write(tmp_path):
    results, histories, anytime = a_run()
    results[1] |= {"test_top1": np.float32(82.5), "file_bytes": np.int64(7900), "ece": math.nan}
    paths = report.write(results, histories, tmp_path / "reports", anytime)
    assert sorted(path.name for path in paths) == [
        "accuracy_bytes.png",
        "accuracy_members.png",
        "anytime.json",
        "anytime.png",
        "curves.png",
        "histories.json",
        "results.json",
        "table.csv",
        "table.md",
    ]
    for path in paths:
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG") == (path.suffix == ".png")
        if path.suffix == ".png":
            assert len(content) > 10_000
    again = report.write(results, histories, tmp_path / "again", anytime)
    assert [p.read_bytes() for p in again] == [p.read_bytes() for p in paths], "reproducible"
    rows = json.loads((tmp_path / "reports" / "results.json").read_text())
    assert [row["name"] for row in rows] == [row["name"] for row in results]
    assert rows[1]["test_top1"] == 82.5
    assert rows[1]["ece"] is None
    with (tmp_path / "reports" / "table.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert table[5]["name"] == "tentaclenet-5"
    assert float(table[5]["test_top1"]) == 91.8
    assert table[1]["ece"] == ""


@pytest.mark.slow
def test_nothing_known_yet(tmp_path):
    """A run with one model, or with figures missing, still makes a report."""
    unknown = {"name": "bnn", "test_top1": None, "file_bytes": None, "members": 1}
    one = a_model("bnn", "bnn", 1, 80.0, 100)
    blank = None
    for results, histories, cells in (
        ([], {}, None),
        ([{"name": "bnn"}], {"bnn": []}, ["–"] * 6),
        ([unknown], {"bnn": [{"epoch": 1, "val_top1": None}]}, ["–"] * 6),
        (
            [one],
            {"bnn": [{"epoch": 1, "val_top1": 3}]},
            ["80.00", "80.50", "100", "0.08", "–", "–"],
        ),
    ):
        report.write(results, histories, tmp_path, {"bnn": []})
        rows = (tmp_path / "table.md").read_text().splitlines()[2:]
        assert rows == ([f"| bnn | {' | '.join(cells)} |"] if cells else [])
        assert len(json.loads((tmp_path / "results.json").read_text())) == len(results)
        with (tmp_path / "table.csv").open(newline="") as file:
            assert len(list(csv.DictReader(file))) == len(results)
        plots = {p.name: p.read_bytes() for p in sorted(tmp_path.glob("*.png"))}
        blank = blank or plots  # of no model at all: empty axes
        drawn = {name for name in plots if plots[name] != blank[name]}
        wanted = {"accuracy_bytes.png", "accuracy_members.png", "curves.png"}
        assert drawn == (wanted if results == [one] else set())


def test_table():
    rows = [
        a_model("fp32", "fp32", 1, 96.875, 98_304, counted_by="filter_sharing"),
        a_model("a|b", "bnn", 1, 90, 12_288),
    ]
    text = table.markdown(rows)
    assert text.splitlines()[2:] == [
        "| fp32 | 96.88 | 97.38 | 98,304 | 81.92 | Kim et al. | 1.0× |",
        "| a\\|b | 90.00 | 90.50 | 12,288 | 10.24 | – | 8.0× |",
    ]
    lines = table.text([*rows, {"name": "unknown"}]).splitlines()
    assert len(lines) == 5
    assert len({len(line) for line in lines}) == 1, "aligned"
    assert lines[-1].split() == ["unknown", *("–" * 6)]


def test_ratio_is_to_the_fp32_model_of_the_same_shape():
    wide = {"width": 32}
    rows = report.complete(
        [
            a_model("fp32", "fp32", 1, 96, 1000),
            a_model("fp32-wide", "fp32", 1, 97, 3000, **wide),
            a_model("bnn-wide", "bnn", 1, 90, 300, **wide),
            a_model("other", "bnn", 1, 90, 300, width=8),
            a_model("given", "bnn", 1, 90, 300, fp32_ratio=7.0),
        ]
    )
    assert [row.get("fp32_ratio") for row in rows] == [1, 1, 10, None, 7]


def test_kind_is_told_from_the_scheme_and_the_members():
    rows = [{"name": "a", "scheme": "fp32"}, {"name": "b", "members": 1}]
    rows = report.complete([*rows, {"name": "c", "members": 3}])
    assert [row["kind"] for row in rows] == ["fp32", "bnn", "ensemble"]


def test_families_by_what_tells_them_apart():
    results, _, _ = a_run()
    families = table.families(results)
    assert [r["members"] for r in families["tentaclenet"]] == [1, 3, 5]
    assert list(families) == [
        "fusion, shared_conv",
        "single",
        "single, width 26",
        "tentaclenet",
        "voting, shared_conv",
    ]
    assert not any(r["kind"] == "fp32" for rows in families.values() for r in rows)


def test_a_family_is_of_equal_settings():
    """Two votes of as many members are not one curve."""
    row = {"scheme": "voting", "sharing": "no_shared", "test_top1": 90.0}
    rows = [
        {**row, "name": "soft-2", "members": 2, "settings": None},
        {**row, "name": "soft-4", "members": 4, "settings": None},
        {**row, "name": "hard-4", "members": 4, "settings": "vote hard"},
        {**row, "name": "fused-4", "scheme": "fusion", "members": 4, "settings": "jitter 0.5"},
    ]
    found = {name: [r["name"] for r in kin] for name, kin in table.families(rows).items()}
    assert found == {"fusion": ["fused-4"], "voting": ["soft-2", "soft-4"],
                     "voting, vote hard": ["hard-4"]}  # fmt: skip


def test_importable_without_torch():
    code = "import sys, bnncore.report; assert not {'torch', 'mlflow'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("low", [0.9, 3.0, 7.7, 880.0])
@pytest.mark.parametrize("times", [1.3, 2, 5, 8, 20, 61, 500, 3000, 10**6])
def test_a_size_axis_has_ticks_enough(low, times):
    _, (ax,) = plots.canvas()
    ax.set_xscale("log")
    ax.set_xlim(low, low * times)
    plots.log_ticks(ax, [low, low * times])
    shown = [tick for tick in ax.get_xticks() if low <= tick <= low * times]
    assert (1 if times < 2 else 3) <= len(shown) <= 13


@pytest.mark.parametrize("members", [[1], [3], [1, 2], [1, 3, 5], list(range(1, 40))])
def test_members_are_whole_numbers(members):
    figure, (ax,) = plots.canvas()
    ax.plot(members, members, marker="o")
    plots.whole_numbers(ax)
    figure.draw_without_rendering()
    low, high = ax.get_xlim()
    ticks = [tick for tick in ax.get_xticks() if low <= tick <= high]
    assert ticks
    assert all(tick == round(tick) for tick in ticks)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["$", "$\\frac$", "_hidden", "a_b^c", "{m}", "%s", "\\n"])
def test_any_name_is_drawn_as_it_is(name, tmp_path):
    """Names that matplotlib would read as a formula, or leave out of a legend."""
    row = a_model(name, "ensemble", 3, 80.0, 1000, scheme=name)
    report.write(
        [row, a_model("x", "bnn", 1, 79.0, 900, scheme="y")],
        {name: [{"epoch": 1, "train_loss": 1.0, "val_top1": 2.0}]},
        tmp_path,
        {name: [{"members": 1, "top1": 50.0}]},
    )
    _, (ax,) = plots.canvas()
    ax.plot([1], [1], label=plots.plain_label(name))
    (text,) = ax.legend().get_texts()
    assert text.get_text().strip().replace("\\$", "$") == name


def test_names_cover_no_point_no_name_and_cross_the_front_least():
    points = [(x, y, f"model {x}") for x, y in ((2, 50), (3, 60), (4, 70), (8, 80), (8.2, 80.1))]
    front = [(x, y) for x, y, _ in points[:4]]
    figure, (ax,) = plots.canvas()
    ax.scatter(*zip(*[p[:2] for p in points], strict=True))
    ax.margins(0.12, 0.14)
    ax.step(*zip(*front, strict=True), where="post")
    plots.labels(figure, ax, points, front)
    boxes = [note.get_window_extent() for note in ax.texts if note.get_text()]
    assert len(boxes) == len(points)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    at = [ax.transData.transform(p[:2]) for p in points]
    assert not any(box.contains(*xy) for box in boxes for xy in at)
    for (x0, y0), (x1, y1) in itertools.pairwise(front):
        path = [(x0 + (x1 - x0) * k / 99, y0) for k in range(100)]
        path += [(x1, y0 + (y1 - y0) * k / 99) for k in range(100)]
        assert not any(box.contains(*ax.transData.transform(p)) for box in boxes for p in path)
