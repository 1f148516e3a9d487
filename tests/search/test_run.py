"""A search on a cluster, and as a user runs it: it ends, is killed, stopped, and goes on."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import yaml

from bnncore import check
from bnncore import params as P
from bnncore.cluster.cluster import Cluster
from bnncore.cluster.crew import Crew, Work, WorkError
from bnncore.packed import packfile
from bnncore.params import RayParams
from bnncore.search import answer, rivals, space, trial
from bnncore.search import study as S
from bnncore.search.run import study_name
from bnncore.training.jobs import TrainingError
from tests import processes
from tests.pipeline.test_pipeline import copy, environment
from tests.search.studies import DATA, comparable, parse, search

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


# -- on a cluster ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def study(cluster, tmp_path_factory):
    """A study with two workers, its report and its files."""
    folder = tmp_path_factory.mktemp("study")
    p = parse(trials=4, rivals=True, finalists=2, folds=2)
    with search(folder / "search", p) as found:
        report = found.run(cluster)
    answer.write(report, folder / "reports")
    return folder, p, report


def counted(rows: list[space.Row]) -> list[space.Row]:
    return [r for r in rows if r["outcome"] in S.COUNTED]


class TestAStudy:
    def test_has_its_trials(self, study):
        _, _, report = study
        assert len(counted(report.rows)) == 4
        assert all(r["outcome"] != S.FAILED for r in counted(report.rows))
        for row in counted(report.rows):
            assert row["file_bytes"] <= row["bound_bytes"] <= 12 * 1024

    def test_has_its_rivals(self, study):
        _, _, report = study
        assert {rivals.WIDER, rivals.INT8} <= {r["rival"] for r in report.rivals}
        for row in report.rivals:
            assert 0 < row["file_bytes"] <= row["bound_bytes"] <= 12 * 1024
            check.check(report.preset(row), DATA.image, len(DATA.classes))

    def test_answers_with_the_best_of_all(self, study):
        """Of two that validate best, cross-validation decides, on all but the test images."""
        folder, _, report = study
        trained = [r for r in report.rows if r["outcome"] == S.TRAINED]
        tops = sorted(
            {space.identity(r): r["val_top1"] for r in (*trained, *report.rivals)}.values()
        )
        assert sorted(r["val_top1"] for r in report.finalists) == tops[-2:]
        assert report.winner in [row for row, _ in report.told_apart]
        assert all(len(right) == 64 + 16 for _, right in report.told_apart)
        assert P.plain(P.load(folder / "reports/best.yaml")) == P.plain(
            space.preset(report.params, report.winner)
        )

    def test_goes_on_and_trains_nothing_again(self, study, cluster, tmp_path):
        folder, p, report = study
        shutil.copytree(folder / "search", tmp_path / "search")
        saved = {f: f.stat().st_mtime_ns for f in (tmp_path / "search").rglob("*.safetensors")}
        assert saved
        lines: list[str] = []
        with search(tmp_path / "search", p, say=lines.append) as found:
            again = found.run(cluster)
            assert (again.rows, again.rivals) == (report.rows, report.rivals)
            assert len(lines) == 1  # that it goes on; nothing was trained, no fold either
            more = found.run(cluster, trials=5)
        assert len(counted(more.rows)) == 5
        assert more.rows[: len(report.rows)] == report.rows
        assert all(f.stat().st_mtime_ns == t for f, t in saved.items())

    def test_does_not_depend_on_the_number_of_workers(self, study, tmp_path):
        _, p, report = study
        plain = replace(p, search=replace(p.search, rivals=False, finalists=0))
        one = Cluster(RayParams(gpus_per_actor=0.0, actors=1))
        with one, search(tmp_path / "search", plain) as found:
            again = found.run(one, trials=3)
        assert comparable(again.rows) == comparable(report.rows[: len(again.rows)])

    def test_a_time_limit_begins_nothing_new(self, cluster, tmp_path):
        with search(tmp_path / "search") as found:
            report = found.run(cluster, timeout=0)
        assert report.rows == []
        assert report.winner is None
        assert "0 s were over" in report.ended

    def test_two_objectives(self, cluster, tmp_path):
        p = parse(objectives="accuracy_bytes", sampler="nsga2", trials=2)
        with search(tmp_path / "search", p) as found:
            report = found.run(cluster)
            for t in found.study.trials(S.TRAINED):
                assert t.values == [t.user_attrs["val_top1"], t.user_attrs["file_bytes"]]
        assert len(counted(report.rows)) == 2


# -- things that die -------------------------------------------------------------------------------


def _die_once(threads, data, mark: str) -> str:
    if not Path(mark).exists():
        Path(mark).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"


def _die(threads, data) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _diverge(threads, data) -> None:
    raise TrainingError("the loss is nan")


def _say(threads, data, *needs) -> str:
    return " ".join(("fine", *needs))


def test_a_task_that_dies_is_run_once_more(cluster, tmp_path):
    # Workers cannot import this module by name; what it sends them travels whole.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    crew, results = Crew(cluster, DATA), {}
    work = [
        Work("dies once", _die_once, (str(tmp_path / "mark"),), keep=True),
        Work("dies", _die, (), keep=True),
        Work("diverges", _diverge, ()),
        Work("needs one that dies", _say, (), needs=("dies once", "dies"), keep=True),
        Work("needs that one", _say, (), needs=("needs one that dies",)),
        Work("needs one that lives", _say, (), needs=("dies once",)),
    ]
    left = crew.run(work, lambda w, result: results.update({w.name: result}))
    assert left == []
    assert results["dies once"] == "done"
    assert results["needs one that lives"] == "fine done"
    assert isinstance(results["dies"], WorkError)
    assert isinstance(results["needs one that dies"], WorkError)
    assert isinstance(results["needs that one"], WorkError)
    assert "the loss is nan" in str(results["diverges"])
    assert crew.retried == 2  # a loss that is not finite is not tried again


SMALL = {"trials": 4, "space": {"backbone": ["nin"], "width": [8], "start": ["hadamard"]}}


@pytest.fixture(scope="module")
def quiet(cluster, tmp_path_factory) -> list[space.Row]:
    """A small study that nothing happens to."""
    with search(tmp_path_factory.mktemp("quiet") / "search", parse(**SMALL)) as found:
        return found.run(cluster).rows


def test_a_worker_is_killed_in_the_middle_of_a_trial(cluster, quiet, tmp_path, monkeypatch):
    """Its trial is trained again, and the study is as if nothing had happened."""
    mark = tmp_path / "mark"

    def struck(*args):
        if not mark.exists():  # its own copy of the module: trained, it dies before it is assessed
            mark.touch()
            trial.assess = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        return trial.train(*args)

    monkeypatch.setattr(trial, "train", struck)
    with search(tmp_path / "search", parse(**SMALL)) as found:
        report = found.run(cluster)
    assert mark.exists()
    assert report.retried >= 1
    assert comparable(report.rows) == comparable(quiet)


TOLD = re.compile(r" +\d+/4 (trial-\d+)")  # that a trial is finished


def _goes_on(cluster, folder: Path, told: list[str], quiet: list[space.Row]) -> None:
    """No finished trial is lost, none counted twice, and the study ends as if nothing had been."""
    finished = {m[1] for line in told if (m := TOLD.match(line))}
    assert 1 <= len(finished) < 4, told
    lines: list[str] = []
    with search(folder / "search", parse(**SMALL), say=lines.append) as found:
        rows = found.run(cluster).rows
    assert "goes on after" in lines[0]
    assert not any(f"{name} " in line for name in finished for line in lines)
    assert comparable(rows) == comparable(quiet)


def test_an_interrupted_search_finishes_what_runs_and_goes_on(cluster, quiet, tmp_path, capsys):
    told: list[str] = []

    def say(line: str) -> None:
        told.append(line)
        if TOLD.match(line) and sum(map(bool, map(TOLD.match, told))) == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with search(tmp_path / "search", parse(**SMALL), say=say) as found:
        report = found.run(cluster)
    assert report.ended == "interrupted"
    answer.write(report, tmp_path / "reports")
    answer.show(report)
    assert "ended because interrupted" in capsys.readouterr().out
    content = json.loads((tmp_path / "reports/front.json").read_text())
    assert 1 <= len(counted(content["trials"])) < 4
    _goes_on(cluster, tmp_path, told, quiet)


SCRIPT = """
import sys
from pathlib import Path
from bnncore.cluster.cluster import Cluster
from bnncore.params import RayParams
from tests.search import studies
from tests.search.test_run import SMALL
def say(line):
    print(line, flush=True)
    sys.stdin.readline()
with studies.search(Path(sys.argv[1]) / "search", studies.parse(**SMALL), say=say) as found:
    with Cluster(RayParams(actors=2, gpus_per_actor=0.0)) as cluster:
        found.run(cluster)
"""


def test_a_killed_search_goes_on(cluster, quiet, tmp_path):
    running = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], cwd=ROOT, env=environment(PYTHONPATH="."),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    children: dict[int, str] = {}
    told: list[str] = []
    try:
        for line in running.stdout:
            told.append(line)
            print(file=running.stdin, flush=True)  # it goes on to its next line, and no further
            if TOLD.match(line):
                break
        children = processes.descendants(running.pid)
        running.kill()
        running.communicate(timeout=300)
    finally:
        running.kill()
        processes.kill(children)
    assert running.returncode == -signal.SIGKILL, told
    _goes_on(cluster, tmp_path, told, quiet)


# -- as a user runs it -----------------------------------------------------------------------------

DIGITS = {
    "data": {"name": "digits", "subset": 0.2},
    "model": {"backbone": "nin", "width": 8, "dropout": 0.0},
    "pretrain": {"epochs": 1, "batch_size": 64, "lr": 0.01},
    "binarize": {"epochs": 1, "batch_size": 64, "lr": 0.01},
    "ensembles": {"recipe": {"epochs": 2, "batch_size": 64, "lr": 0.01}, "train": []},
    "pack": {"choose": "auto"},
    "search": {
        "trials": 2, "budget_kib": 8, "batch": 2, "rungs": [], "warmup": 2, "finalists": 2,
        "folds": 2,
        "space": {"backbone": ["nin"], "width": [8, 16, 128], "scheme": ["fusion"],
                  "sharing": ["shared_conv"], "members": [1, 2], "start": ["bnn"]},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A project whose search has run."""
    folder = copy(tmp_path_factory.mktemp("project") / "project", DIGITS)
    done = subprocess.run([sys.executable, "-m", "pipeline.search"], cwd=folder, env=environment(),
                          capture_output=True, text=True, timeout=500)  # fmt: skip
    assert "the best within 8 KiB" in done.stdout, done.stderr
    return folder


def test_the_users_code_is_of_the_study(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "their_net.py").write_text("def net(channels, classes): ...\n")
    p = parse()
    theirs = replace(p.search, space=replace(p.search.space, backbone=("their_net:net",)))
    before = study_name(replace(p, search=theirs), DATA)
    assert study_name(replace(p, search=theirs), DATA) == before
    (tmp_path / "their_net.py").write_text("def net(channels, classes): ...  # otherwise\n")
    assert study_name(replace(p, search=theirs), DATA) != before


def test_mlflow_has_a_parent_and_a_child_a_trial(project):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("bnncore").experiment_id])
    parent = next(r for r in runs if "mlflow.parentRunId" not in r.data.tags)
    assert parent.info.run_name.startswith("search")
    children = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    trained = [r for r in children if r.data.params.get("outcome") == S.TRAINED]
    assert len(trained) == 2
    for r in trained:
        assert {"val_top1", "file_bytes", "file_kib", "constraint_size"} <= r.data.metrics.keys()
        assert len(client.get_metric_history(r.info.run_id, "val_top1")) >= 2
    assert any(r.info.run_name.startswith("rival-") for r in children)


@pytest.mark.parametrize("rival", [None, rivals.INT8])
def test_the_pipeline_trains_what_finish_trains(project, cluster, tmp_path, monkeypatch, rival):
    """The stages make of best.yaml, byte for byte, the file that ``--finish`` makes."""
    from pipeline import binarize, ensemble_train, pack, pretrain
    from pipeline import search as stage

    shutil.copytree(project, tmp_path, dirs_exist_ok=True, symlinks=True)
    monkeypatch.chdir(tmp_path)
    values = yaml.safe_load(Path("params.yaml").read_text())
    Path("params.yaml").write_text(yaml.safe_dump(values | {"mlflow": {"uri": "none"}}))
    monkeypatch.setattr(sys, "argv", ["pipeline.search", "--finish"])
    if rival:  # suppose that it won
        better = answer.Report.compared.fget
        monkeypatch.setattr(answer.Report, "compared", property(
            lambda self: sorted(better(self), key=lambda r: r.get("rival") != rival)))  # fmt: skip
    stage.main()
    made = Path("reports/search/best.bnn").read_bytes()
    assert packfile.decode(made).members == 1 or not rival
    finished = json.loads(Path("reports/search/finished.json").read_text())
    assert finished["file_bytes"] == len(made) <= 8 * 1024
    shutil.copy("reports/search/best.yaml", "params.yaml")
    monkeypatch.setattr(sys, "argv", ["pipeline"])
    for each in (pretrain, binarize, ensemble_train, pack):
        each.main()
    assert Path("packed/fp32.bnn" if rival else "packed/best.bnn").read_bytes() == made
    if rival:  # a table without ensembles
        subprocess.run([sys.executable, "-m", "pipeline.evaluate"], env=environment(), check=True,
                       capture_output=True, timeout=300)  # fmt: skip
        rows = json.loads(Path("reports/results.json").read_text())
        assert (rows[0]["name"], rows[0]["file_bytes"]) == ("fp32", len(made))
        assert rows[0]["test_top1"] == pytest.approx(finished["test_top1"])


def test_a_hopeless_budget_is_named_before_anything_trains(tmp_path, monkeypatch):
    from pipeline import search as stage
    from pipeline.stage import run

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pipeline/search.py"])
    Path("params.yaml").write_text(yaml.safe_dump(DIGITS | {"search": {"budget_kib": 0.5}}))
    with pytest.raises(SystemExit, match=r"search: search\.budget_kib: nothing .* fits 0\.5 KiB"):
        run(stage.main)
    assert not Path("checkpoints").exists()
