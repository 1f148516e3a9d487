"""The reproduction report: published beside ours, and nothing where nothing has been run."""

import csv
import json
import statistics
from pathlib import Path

import pytest
import yaml

from bnncore import check, params
from bnncore.paper import figures, report, runs
from bnncore.paper.__main__ import main

PUBLISHED = figures.published()


def finished(folder, seed, rows, *, dataset="cifar100", backbone="resnet20", subset=1.0, epochs=12):
    """A run as the pipeline leaves it: results, and the resolved parameters beside the files."""
    folder.mkdir(parents=True)
    (folder / "reports").mkdir()
    (folder / "packed").mkdir()
    found = []
    for name, top1 in rows.items():
        kind = name if name in ("fp32", "bnn") else "ensemble"
        scheme, sharing, members = (None, None, 1) if kind == name else name.split("/")
        found.append(
            {"name": name, "kind": kind, "backbone": backbone, "width": None, "scheme": scheme,
             "sharing": sharing, "members": int(members), "test_top1": top1, "file_bytes": 1234}
        )  # fmt: skip
    (folder / "reports" / "results.json").write_text(json.dumps(found))
    parameters = {
        "seed": seed,
        "data": {"name": dataset, "subset": subset},
        "model": {"backbone": backbone, "width": None},
        "pretrain": {"epochs": epochs + 2},
        "binarize": {"epochs": epochs + 1},
        "ensembles": {"recipe": {"epochs": epochs}, "train": []},
    }
    (folder / "packed" / "params.yaml").write_text(yaml.safe_dump(parameters))
    return folder


@pytest.fixture
def undrawn(monkeypatch):
    """Without the figures, which take seconds."""
    monkeypatch.setattr(report.plots, "write", lambda lines, out: [])


def table(out):
    with open(out / "paper.csv", newline="") as file:
        return {(row["place"], row["row"], row["subset"]): row for row in csv.DictReader(file)}


@pytest.mark.slow
def test_without_runs_only_published_and_computed_values_appear(tmp_path):
    written = report.write([], tmp_path)
    assert all(path.stat().st_size > 0 for path in written)
    rows = table(tmp_path)
    assert all(row["ours"] == row["difference"] == row["epochs"] == "" for row in rows.values())
    assert {row["seeds"] for row in rows.values()} == {"0"}
    assert rows["TentacleNet, Table 1", "nin fp32", ""]["published"] == "88.11"
    text = (tmp_path / "paper.md").read_text()
    assert "| 11,465 | 11,465 | 93,914,880 | equal | 42.6 % | 44.4 % | 44.4 % |" in text
    assert "| nin, n = 13 | +1.00 |  |  |  |  |  |  |" in text


def test_every_published_accuracy_has_its_line():
    found = runs.lines([], PUBLISHED.series)
    published = sorted(line.published for line in found if line.published is not None)
    assert published == sorted(v for series in PUBLISHED.series for v in series.values.values())
    # 6 and 9 rows of the first paper's tables, 8 points of its Figure 3, 7 networks by themselves
    # of the second, and the points of its Figures 5A, 5B, 6, 7A, 8 and 9.
    assert len(published) == 6 + 9 + 8 + 7 + 19 + 13 + 5 + 30 + 13 + 1
    by_row = {(line.series.place, line.row): line.published for line in found}
    assert by_row["Kim et al., Figure 7A", "no shared, M = 10"] == 65.9
    assert by_row["Kim et al., Figure 9", "bagging, M = 10"] == 70.29
    assert by_row["TentacleNet, Table 2", "resnet9 benn_boosting, 25"] == -4.77


def test_runs_stand_beside_what_was_published(tmp_path, undrawn):
    a = {"fp32": 61.0, "bnn": 47.0, "fusion/shared_conv/4": 50.0, "fusion/shared_conv/3": 49.0}
    b = {"fp32": 62.0, "bnn": 47.5, "fusion/shared_conv/4": 51.0}
    folders = [finished(tmp_path / "a", 0, a), finished(tmp_path / "b", 1, b)]
    report.write(folders, tmp_path / "out")
    rows = table(tmp_path / "out")
    four = rows["Kim et al., Figure 5A", "fusion, M = 4", "1.0"]
    assert (four["ours"], four["published"], four["difference"]) == ("50.5", "53.8", "-3.3")
    assert float(four["spread"]) == pytest.approx(statistics.stdev([50, 51]), abs=1e-4)
    assert (four["seeds"], four["epochs"], four["width"]) == ("2", "12", "paper")
    assert four["file_bytes"] == "1234"
    # A member count that the paper does not have: a line without a published value.
    three = rows["Kim et al., Figure 5A", "fusion, M = 3", "1.0"]
    assert (three["published"], three["difference"], three["ours"]) == ("", "", "49.0")
    single = rows["Kim et al., in the text", "resnet20 cifar100 bnn", "1.0"]
    assert (single["ours"], single["epochs"]) == ("47.25", "13")
    # Neither another data set's line nor another sharing's is filled in.
    assert rows["Kim et al., Figure 6", "fusion, M = 4", ""]["ours"] == ""
    assert rows["Kim et al., Figure 7A", "C1, M = 4", ""]["ours"] == ""
    assert rows["Kim et al., Figure 5A", "voting, M = 4", ""]["ours"] == ""


def test_differences_to_fp32_are_those_of_the_same_run(tmp_path, undrawn):
    name = "tentaclenet/tentaclenet/3"
    kwargs = {"dataset": "fer2013", "backbone": "fernet"}
    folders = [
        finished(tmp_path / "a", 0, {"fp32": 60.0, "bnn": 55.0, name: 59.0}, **kwargs),
        finished(tmp_path / "b", 1, {"fp32": 64.0, "bnn": 55.0, name: 62.0}, **kwargs),
        finished(tmp_path / "c", 2, {name: 40.0}, **kwargs),  # without FP32: no difference
    ]
    report.write(folders, tmp_path / "out")
    row = table(tmp_path / "out")["TentacleNet, Figure 3", "fernet, n = 3", "1.0"]
    assert (row["ours"], row["seeds"], row["unit"]) == ("-1.5", "2", "points to FP32")
    assert row["difference"] == "-1.5"


def test_runs_under_other_conditions_are_not_averaged(tmp_path):
    rows = {"fp32": 60.0, "bnn": 40.0}
    folders = [
        finished(tmp_path / "whole", 0, rows),
        finished(tmp_path / "part", 1, {**rows, "bnn": 30.0}, subset=0.1),
    ]
    lines = runs.lines(runs.collect(folders), PUBLISHED.series)
    (whole, part) = (x for x in lines if x.row == "resnet20 cifar100 bnn")
    assert (whole.ours, whole.setting.subset, whole.seeds) == (40.0, 1.0, 1)
    assert (part.ours, part.setting.subset, part.seeds) == (30.0, 0.1, 1)


def test_a_seed_that_ran_twice_counts_once(tmp_path):
    folders = [
        finished(tmp_path / "a", 3, {"bnn": 40.0}),
        finished(tmp_path / "b", 3, {"bnn": 40.0}),
    ]
    (line,) = (
        x
        for x in runs.lines(runs.collect(folders), PUBLISHED.series)
        if x.row == "resnet20 cifar100 bnn"
    )
    assert (line.seeds, line.spread) == (1, None)


def test_a_project_is_one_run_whatever_lies_deeper(tmp_path):
    """Copies for MLflow of earlier evaluations, and runs that others committed."""
    project = finished(tmp_path / "mine", 0, {"bnn": 45.0})
    for deeper in ("checkpoints/mlflow/key/files/hash", "docs/runs/other/reports", "mlruns/0"):
        (project / deeper).mkdir(parents=True)
        earlier = [{"name": "bnn", "kind": "bnn", "backbone": "nin", "test_top1": 9.0}]
        (project / deeper / "results.json").write_text(json.dumps(earlier))
    assert [run.top1 for run in runs.collect([project])] == [45.0]
    assert [run.top1 for run in runs.collect([project.parent])] == [45.0]


def test_runs_that_were_trained_otherwise_are_not_averaged(tmp_path):
    """Of one run or of two; and what differs is said."""
    rows = {"a": 60.0, "b": 70.0}
    train = [
        {"name": "a", "scheme": "bagging", "sharing": "no_shared", "members": 4},
        {"name": "b", "scheme": "bagging", "sharing": "no_shared", "members": 4,
         "sampling": "batch", "recipe": {"lr": 0.1}},
    ]  # fmt: skip
    for seed in (0, 1):
        folder = finished(tmp_path / f"{seed}", seed, {"bnn": 40.0 + seed})
        results = json.loads((folder / "reports/results.json").read_text())
        results += [{**results[0], **train[0], "name": name, "kind": "ensemble", "test_top1": top1}
                    for name, top1 in rows.items()]  # fmt: skip
        (folder / "reports/results.json").write_text(json.dumps(results))
        parameters = yaml.safe_load((folder / "packed/params.yaml").read_text())
        parameters["ensembles"]["train"] = train
        if seed:
            parameters["model"]["binarizer"] = {"weight": "sign"}
        (folder / "packed/params.yaml").write_text(yaml.safe_dump(parameters))
    found = runs.lines(runs.collect([tmp_path / "0", tmp_path / "1"]), PUBLISHED.series)
    (bnn, other) = (x for x in found if x.row == "resnet20 cifar100 bnn")
    assert {str(bnn.setting), str(other.setting)} == {
        "the paper's width, model.binarizer.weight sign",
        "the paper's width, model.binarizer.weight xnor",
    }
    bagged = [x for x in found if x.row == "resnet20 cifar100 bagging, no_shared, M = 4"]
    assert sorted((x.ours, x.seeds) for x in bagged) == [(60.0, 1), (60.0, 1), (70.0, 1), (70.0, 1)]
    assert sum("ensemble.sampling batch, model.binarizer.weight sign" in str(x.setting)
               for x in bagged) == 1  # fmt: skip


def test_a_row_may_say_everything_itself(tmp_path):
    row = {"name": "x", "kind": "ensemble", "scheme": "bagging", "sharing": "no_shared",
           "members": 12, "test_top1": 80.0, "dataset": "cifar10", "backbone": "nin",
           "width": 192, "subset": 0.5, "epochs": 7, "seed": 9}  # fmt: skip
    fp32 = {**row, "name": "fp32", "kind": "fp32", "test_top1": 82.0}
    (tmp_path / "results.json").write_text(json.dumps([row, fp32]))
    lines = runs.lines(runs.collect([tmp_path]), PUBLISHED.series)
    (line,) = (x for x in lines if x.row == "nin benn_bagging, 12")
    assert (line.ours, line.setting.width, line.setting.epochs) == (-2.0, None, 7)
    assert str(line.setting) == "the paper's width, 50% of the images"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "results.json: expected the results of a run"),
        ('{"name": "bnn"}', "expected a list of objects"),
        ('[{"name": "x", "test_top1": 1.0}]', "no 'scheme'"),
        ('[{"name": "bnn", "test_top1": 1.0}]', "no 'backbone'"),
        (
            '[{"name": "bnn", "backbone": "nin", "test_top1": 1.0}]',
            "no dataset, and no params.yaml",
        ),
    ],
)
def test_unreadable_results_are_named(content, said, tmp_path, capsys):
    (tmp_path / "results.json").write_text(content)
    assert main([str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert said in capsys.readouterr().err


RUNS = Path(__file__).parents[2] / "docs" / "reproduction" / "runs"


@pytest.mark.parametrize("path", sorted(RUNS.glob("*/params.yaml")), ids=lambda p: p.parent.name)
def test_the_parameters_of_committed_runs_still_run(path):
    p = params.load(path)
    assert yaml.safe_load(path.read_text())["scale"] == params.plain(params.Scale())
    check.check(p, (48, 48, 1) if "fer2013" in path.parent.name else (32, 32, 3), 10)


def test_an_unresolved_scale_is_worked_in(tmp_path):
    folder = finished(tmp_path / "run", 0, {"bnn": 40.0})
    resolved = folder / "packed" / "params.yaml"
    parameters = yaml.safe_load(resolved.read_text())
    parameters |= {"scale": {"epochs": 0.5, "subset": 0.25}}
    parameters["binarize"]["epochs"] = 10
    (folder / "params.yaml").write_text(yaml.safe_dump(parameters))
    (run,) = runs.collect([folder])
    assert run.setting.subset == 1  # what is resolved goes first
    resolved.unlink()
    (run,) = runs.collect([folder])
    assert (run.setting.epochs, run.setting.subset) == (5, 0.25)


def test_tables_of_rivals_follow_with_their_plot(tmp_path, capsys, undrawn):
    rivals = tmp_path / "front16.md"
    rivals.write_text("# 16 KiB\n\n## Trained\n\n| what | % |\n| --- | ---: |\n| a # b | 1 |\n")
    out = tmp_path / "out"
    assert main(["--out", str(out), "--beside", str(rivals)]) == 0
    wanted = "## 16 KiB\n\n### Trained\n\n| what | % |\n| --- | ---: |\n| a # b | 1 |\n"
    assert (out / "paper.md").read_text().endswith(wanted)
    rivals.with_suffix(".png").write_bytes(b"")
    assert main(["--out", str(out), "--beside", str(rivals)]) == 0
    assert (
        "\n## 16 KiB\n\n![16 KiB](../front16.png)\n\n### Trained" in (out / "paper.md").read_text()
    )
    assert main(["--out", str(out), "--beside", str(tmp_path / "none.md")]) == 1
    assert "none.md: expected a text" in capsys.readouterr().err


def test_a_folder_without_results_is_named(tmp_path, capsys):
    assert main([str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 1
    assert "none: expected a finished run" in capsys.readouterr().err


def test_a_folder_is_the_set_it_is_named_after_and_runs_beside_the_papers_are_told(
    tmp_path, undrawn
):
    rows = {
        "fp32": 90.0,
        "bnn": 80.0,
        "fusion/shared_conv/2": 82.0,
        "tentaclenet/tentaclenet/3": 8.0,
    }
    run = finished(tmp_path / "run", 0, rows, dataset="folder", subset=0.5)
    path = run / "packed" / "params.yaml"
    parameters = yaml.safe_load(path.read_text())
    parameters["data"]["path"] = "somewhere/cifar10"
    path.write_text(yaml.safe_dump(parameters))
    report.write([run], tmp_path / "out")
    found = table(tmp_path / "out")
    assert found["Kim et al., Figure 6", "fusion, M = 2", "0.5"]["ours"] == "82.0"
    beside = {key[1]: row["ours"] for key, row in found.items() if key[0] == "Not in the papers"}
    assert beside == {
        "resnet20 cifar10 fp32": "90.0",
        "resnet20 cifar10 tentaclenet, tentaclenet, M = 3": "8.0",
    }
