"""What a search says, writes and has trained is the best of everything that was trained."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import yaml

from bnncore import check
from bnncore import params as P
from bnncore.search import answer, rivals, space
from bnncore.search import study as S
from bnncore.search.plot import plot
from tests.search.studies import DATA, configuration, parse, report, result, study

PARAMS = parse()
TAKEN = {"bound_bytes": 9999, "counted_kib": 9.0, "megaops": 0.1, "activation_kib": 1.0,
         "affine": "float16", "weights": "mixed", "integer": False, "drop": 0.1}  # fmt: skip


def trial(number: int, top1: float, size: int, loss: float = 1.0, **config) -> dict:
    row = {"number": number, **configuration(**config), "outcome": S.TRAINED, "val_top1": top1}
    return row | {"val_loss": loss, "file_bytes": size, "stopped_top1": None, **TAKEN}


def rival(label: str, top1: float, size: int) -> dict:
    config = {
        rivals.WIDER: configuration(**space.ONE_BNN, width=37),
        rivals.INT8: configuration(**space.ONE_FP32, width=18),
    }.get(label, configuration())
    return {"rival": label, **config, "val_top1": top1, "file_bytes": size, **TAKEN}


def right(percent: int, shift: int = 0) -> np.ndarray:
    """So many of 400 images, the first ones, or those behind."""
    return np.roll(np.arange(400) < 4 * percent, shift)


PAPER = next(iter(rivals.PAPERS))
# Rows of trials, rows of rivals -> the number or the label of the best.
CASES = {
    "a trial": ([trial(1, 90, 10), trial(2, 95, 20)], [rival(rivals.WIDER, 94, 5)], 2),
    "one wider BNN": ([trial(1, 98.9, 20)], [rival(rivals.WIDER, 100, 24)], rivals.WIDER),
    "int8": ([trial(1, 41.3, 20)], [rival(rivals.INT8, 94.4, 24)], rivals.INT8),
    "a paper's": ([trial(1, 41.3, 20)], [rival(PAPER, 50, 24), rival(rivals.INT8, 45, 2)], PAPER),
    "the smaller of two trials": ([trial(1, 90, 20, 0.1), trial(2, 90, 10, 0.9)], [], 2),
    "of the same bytes, the surer": ([trial(1, 90, 10, 0.9), trial(2, 90, 10, 0.1)], [], 2),
    "the smaller, a rival": ([trial(1, 90, 20)], [rival(rivals.WIDER, 90, 19)], rivals.WIDER),
    "the smaller, a trial": ([trial(1, 90, 20)], [rival(rivals.WIDER, 90, 21)], 1),
    "a trial that was a rival": (
        [trial(1, 90, 20)], [{"rival": rivals.WIDER, **trial(1, 90, 20)}], 1),
    "an FP32 network that was a trial": ([trial(1, 90, 20, **space.ONE_FP32)], [], 1),
    "a trial, another was stopped": (
        [trial(1, 50, 20), trial(2, 0, 10) | {"outcome": S.STOPPED, "stopped_top1": 99.0}], [], 1),
}  # fmt: skip
# Bytes, and what is right, of two finalists -> which is the best.
FOLDS = {
    "the more accurate": ([(20, right(95)), (10, right(80))], 0),
    "the smaller of two that are equal": ([(20, right(90)), (10, right(90))], 1),
    "the smaller of two that differ here and there": ([(20, right(91)), (10, right(90, 200))], 1),
    "though the other had validated better": ([(10, right(80)), (20, right(95))], 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_best_is_the_best_of_everything_trained(tmp_path, case):
    rows, others, expected = CASES[case]
    found = report(study(tmp_path), PARAMS, others)
    found = replace(found, rows=rows)
    lines: list[str] = []
    answer.show(found, lines.append)
    answer.write(found, tmp_path)
    winner = next(r for r in (*rows, *others) if expected in (r.get("rival"), r.get("number")))
    words = str(expected) if "rival" in winner else f"(trial {expected})"
    everything = [r for r in (*rows, *others) if r.get("outcome", S.TRAINED) == S.TRAINED]
    assert winner["val_top1"] == max(r["val_top1"] for r in everything)

    # Headline: the winner, and where it is a rival, what it beat.
    at = next(i for i, line in enumerate(lines) if line.startswith("the best within 12 KiB"))
    assert words in lines[at]
    assert f"{winner['val_top1']:.2f} %" in lines[at]
    assert ("it beat the best configuration of the search" in lines[at + 1]) == ("rival" in winner)
    content = json.loads((tmp_path / "front.json").read_text())
    assert content["winner"] == expected
    assert content["data"] == P.plain(PARAMS.data)
    (last,) = [t for t in content["trials"] if t["front"] and t["val_top1"] == winner["val_top1"]]
    assert last.get("rival", last.get("number")) == expected

    # best.yaml: trains the winner, and says what it is.
    text = (tmp_path / "best.yaml").read_text()
    preset = P.load(tmp_path / "best.yaml")
    check.check(preset, DATA.image, len(DATA.classes))
    assert text.startswith("# @package _global_\n")
    assert words in text.splitlines()[1]
    assert preset.model.width == winner["width"]
    assert preset.pack == P.PackParams("float16", "mixed")  # as it was, nothing left to choose
    if winner["scheme"] == "fp32":
        assert preset.ensembles.train == ()
        assert preset.pretrain.epochs == 3 * PARAMS.pretrain.epochs
        assert "the model fp32" in text
    else:
        (ensemble,) = preset.ensembles.train
        assert (ensemble.members, ensemble.sharing) == (winner["members"], winner["sharing"])
        assert (ensemble.jitter == 0) == (winner["members"] == 1)
    if "rival" in winner:
        assert "# The best configuration of the search: " in text


@pytest.mark.parametrize("case", FOLDS)
def test_finalists_are_told_apart(tmp_path, case):
    two, expected = FOLDS[case]
    rows = [trial(k, 90 - k, size) for k, (size, _) in enumerate(two)]
    p = parse(finalists=2)
    known = {k: images for k, (_, images) in enumerate(two)}
    rows.append(trial(2, 87, 1))  # a third that validates almost as well
    found = replace(report(study(tmp_path), p), rows=rows, right=lambda row: known[row["number"]])
    assert [r["number"] for r in found.finalists] == [0, 1]
    assert found.winner["number"] == expected
    assert [r["number"] for r in found.compared] == [expected, 1 - expected, 2]
    lines: list[str] = []
    answer.show(found, lines.append)
    assert f"(trial {expected})" in next(line for line in lines if line.startswith("the best"))
    at = next(k for k, line in enumerate(lines) if "cross-validation, on 400 images" in line)
    assert sum("the best:" in line for line in lines[at + 1 : at + 3]) == 1
    # Until all folds of all are there, or where the validation part tells them apart, it decides.
    for missing in ({0}, {1}, {0, 1}):
        less = replace(found, right=lambda row, m=missing: None if row["number"] in m else known[1])
        assert less.winner["number"] == 0
        answer.show(less, lines.append)
        assert f"{2 - len(missing)} of 2 finalists have all folds" in "\n".join(lines)
    assert replace(found, images=10**6).finalists == []


def test_what_is_of_another_answer_is_removed(tmp_path):
    rows = [trial(1, 90, 10), trial(2, 80, 5)]
    found = replace(report(study(tmp_path), PARAMS), rows=rows)
    for now, kept in ((found, True), (replace(found, rows=rows[1:]), False)):
        answer.write(found, tmp_path)
        for name in answer.FINISHED:
            (tmp_path / name).write_text("")
        answer.write(now, tmp_path)
        assert [(tmp_path / name).exists() for name in answer.FINISHED] == [kept, kept]


def test_nothing_fits(tmp_path, monkeypatch):
    monkeypatch.setattr(S, "IDLE", 20)
    p = parse(megaops=1e-6)
    of = study(tmp_path, p)
    assert of.ask(10) == []
    lines: list[str] = []
    (tmp_path / "best.yaml").write_text("of an earlier search")
    answer.show(report(of, p), lines.append)
    answer.write(report(of, p), tmp_path)
    text = "\n".join(lines)
    assert "20 configurations in a row did not fit" in text
    assert re.search(r"nothing .* fits 12 KiB .* smallest .* nin 8, .* takes [\d.]+ KiB", text)
    assert not (tmp_path / "best.yaml").exists()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A report of three batches, a third of the trials bad, with a rival."""
    of = study(tmp_path_factory.mktemp("study"))
    for _ in range(3):
        for t in of.ask(99):
            of.tell(t, result(t, **({} if t.number % 3 else {"val_top1": 3.0})))
    return report(of, PARAMS, [rival(rivals.WIDER, 80, 11_000)])


def test_front_as_files(found, tmp_path):
    answer.write(found, tmp_path)
    content = json.loads((tmp_path / "front.json").read_text())
    assert content["budget_bytes"] == 12 * 1024
    assert content["best"] == found.best["number"]
    trials = [t for t in content["trials"] if "rival" not in t]
    assert [t["number"] for t in trials] == [r["number"] for r in found.rows]
    on = [t for t in content["trials"] if t["front"]]
    assert on
    for t in content["trials"]:
        if t["val_top1"] is not None and not t["front"]:
            assert any(
                o["val_top1"] >= t["val_top1"] and o["file_bytes"] <= t["file_bytes"] for o in on
            )
    with open(tmp_path / "front.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == len(content["trials"])
    assert yaml.safe_load((tmp_path / "importances.json").read_text()) == found.importances


@pytest.mark.parametrize("sort", ["some", "none", "paper"])
def test_the_plot_of_every_sort_of_study(found, tmp_path, sort):
    """Drawn without complaint: some bad trials, none trained, and a budget by a paper's count."""
    changed = {
        "some": found,
        "none": replace(found, rows=[], rivals=[], importances={}),
        "paper": replace(found, params=parse(count="tentaclenet")),
    }[sort]
    plot(changed, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
