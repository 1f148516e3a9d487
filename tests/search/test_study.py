"""The search: what it rejects, what it asks for, and that no trial is lost or counted twice."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import optuna
import pytest
import ray
import yaml
from optuna.trial import TrialState

from bnncore import check, storage
from bnncore import params as P
from bnncore.cluster.actors import Cluster
from bnncore.lowering import blueprint
from bnncore.networks.ensemble import Ensemble
from bnncore.packed import execute, packfile
from bnncore.params import PackParams, ParamsError, RayParams
from bnncore.search import answer as front
from bnncore.search import space
from bnncore.search import study as S
from bnncore.search import trial as tasks
from bnncore.training import plans
from bnncore.training.ensembled import Ensembled
from bnncore.training.jobs import TrainingError
from tests import processes, tiny
from tests.pipeline.test_pipeline import closure, copy, dvc, environment

ROOT = Path(__file__).parents[2]
DATA = tiny.dataset(train=64)
SHORT = {"epochs": 2, "batch_size": 32, "lr": 0.01}
SPACE = {
    "backbone": ["nin", "resnet8"],
    "width": [8, 12],
    "scheme": ["tentaclenet", "fusion", "voting"],
    "sharing": ["tentaclenet", "shared_conv"],
    "members": [1, 2, 3, 4],
    "start": ["bnn", "hadamard"],
}


def parse(**search) -> P.Params:
    values = {"trials": 6, "budget_kib": 12, "warmup": 2, "batch": 2, "rungs": [0.5]}
    values |= {"space": SPACE | search.pop("space", {}), "rivals": False, **search}
    return tiny.parse(pretrain=SHORT, binarize=SHORT, ensembles={"recipe": SHORT}, search=values)


def configuration(**changes) -> space.Config:
    return {
        "backbone": "nin", "width": 8, "scheme": "fusion", "sharing": "shared_conv", "members": 2,
        "start": "bnn", "affine": "float32", "weights": "float32", **changes,
    }  # fmt: skip


def silent(_: str) -> None:
    pass


# -- what is known before anything trains ----------------------------------------------------------


@pytest.mark.parametrize(
    ("search", "named"),
    [
        ({"space": {"backbone": ["nin", "lenet"]}}, r"search\.space\.backbone.*'lenet'"),
        ({"space": {"scheme": ["stacking"]}}, r"search\.space\.scheme: expected some of .*fusion"),
        ({"space": {"sharing": ["c9"]}}, r"search\.space\.sharing: expected some of .*all_frozen"),
        ({"budget_kib": 1}, r"budget_kib: nothing in the space fits 1 KiB; .*nin 8.*KiB"),
        ({"space": {"width": []}}, r"search\.space\.width.*at least 1"),
        ({"space": {"members": [2, 2]}}, r"search\.space.*different values, got 2 twice"),
        ({"space": {"scheme": ["voting"], "sharing": ["tentaclenet"], "members": [2]}},
         r"nothing in it can be built:\nnin: sharing"),
        ({"rungs": [0.5, 0.25]}, r"rungs: expected rising"),
        ({"budget": 12}, r"search\.budget: unknown key.*budget_kib"),
    ],
)  # fmt: skip
def test_bad_input_is_named(search, named):
    with pytest.raises(ParamsError, match=named):
        space.Space(parse(**search), DATA)


def test_the_smallest_configuration_is_the_smallest():
    found = space.Space(parse(space={"width": [8, 12, 16], "members": [1, 2]}), DATA)
    sizes = {}
    for choice in np.ndindex(*map(len, found.values.values())):
        config = {k: v[i] for (k, v), i in zip(found.values.items(), choice, strict=True)}
        if not found.problem(config):
            sizes[space.identity(config)] = found.cost(config).file_bytes
    assert found.least.file_bytes == min(sizes.values())
    assert sizes[space.identity(found.smallest)] == min(sizes.values())


@pytest.mark.parametrize("scheme", ["fusion", "voting", "tentaclenet"])
@pytest.mark.parametrize("backbone", ["nin", "resnet8"])
def test_no_file_is_larger_than_its_cost(backbone, scheme):
    p = parse()
    sharing = "tentaclenet" if scheme == "tentaclenet" else "shared_conv"
    config = configuration(backbone=backbone, scheme=scheme, sharing=sharing, members=3)
    found = space.Space(p, DATA)
    ensemble = Ensemble(found.spec(config), seed=1)
    tiny.scramble(ensemble)
    trained = Ensembled(ensemble.spec, ensemble.state(), {"x": []})
    result = tasks.assess(trained, space.preset(p, config), DATA)
    most = found.cost(config).file_bytes
    assert 0.7 * most < result["file_bytes"] <= most


def test_cost_counts_as_storage_does():
    p = parse(count="filter_sharing")
    config = configuration(members=3)
    found = space.Space(p, DATA)
    taken = found.cost(config)
    info = space.facts(space.preset(p, config))
    counts = storage.count(found.spec(config), PackParams(), DATA.classes, info)
    assert taken.counted_kib == counts.filter_sharing / 8 / 1024
    assert taken.file_bytes == counts.file
    assert taken.megaops == (counts.float_macs + counts.binary_macs / 64) / 1e6
    program = blueprint.draw(found.spec(config)).most
    assert taken.activation_kib == execute.peak_memory(program)[0] / 1024
    over = taken.constraints(replace(p.search, budget_kib=taken.counted_kib / 2, megaops=1e9))
    assert over["size"] == pytest.approx(1.0)
    assert over["operations"] < 0
    assert "activations" not in over


def test_a_configuration_that_cannot_be_built_is_named():
    found = space.Space(parse(), DATA)
    problem = found.problem(configuration(scheme="voting", sharing="tentaclenet"))
    assert problem is not None
    assert "trained together" in problem
    assert found.problem(configuration(scheme="voting")) is None


def test_snapshots_get_epochs_that_divide():
    p = space.preset(parse(), configuration(scheme="snapshot", members=3))
    assert p.recipe(p.ensembles.train[0]).epochs == 3
    check.check(p, DATA.image, len(DATA.classes))


def test_numbers_in_equal_steps_have_an_order():
    found = space.Space(parse(space={"width": [8, 12, 16], "members": [1, 2, 4]}), DATA)
    width, members = found.distributions["width"], found.distributions["members"]
    assert isinstance(width, optuna.distributions.IntDistribution)
    assert (width.low, width.high, width.step) == (8, 16, 4)
    assert isinstance(members, optuna.distributions.CategoricalDistribution)


def test_an_int8_rival_is_judged_with_its_rounded_weights():
    """Its size is the file's, its accuracy the narrowed Program's, both as stage pack does it."""
    p = parse()
    config = configuration(backbone="resnet8")
    found = tasks.int8(1, DATA, space.preset(p, config))
    spec = plans.single_spec(space.preset(p, config), DATA.image, 4, binary=False)
    plain = storage.file_bound(spec, PackParams(), DATA.classes)
    most = storage.file_bound(spec, PackParams(weights="int8"), DATA.classes)
    assert found["file_bytes"] <= most < plain / 2.5
    (history,) = found["history"].values()
    assert len(history) == 3 * SHORT["epochs"]  # as long as an ensemble's three stages


def test_rivals_use_the_budget_and_no_more():
    p = parse(budget_kib=24)
    found = space.Space(p, DATA)
    best = configuration(backbone="fernet") | {"bound_bytes": 0}
    rivals = {r.label: r for r in space.rivals(p, found, best)}
    assert len(rivals) == 5
    for rival in rivals.values():
        if rival.int8:
            size = partial(storage.file_bound, pack=PackParams(weights="int8"))
            spec = plans.single_spec(rival.params, DATA.image, 4, binary=False)
            wider = replace(spec, model=replace(spec.model, width=rival.row["width"] + 1))
            sizes = [size(s, classes=DATA.classes) for s in (spec, wider)]
            assert sizes[0] <= 24 * 1024 < sizes[1]
            continue
        grown = "width" if rival.label == "one wider BNN" else "members"
        config = {k: rival.row[k] for k in configuration()}
        more = found.cost(config | {grown: config[grown] + 1}).file_bytes
        assert found.cost(config).file_bytes <= 24 * 1024 < more


def test_a_torn_journal_is_mended(tmp_path):
    path = tmp_path / "journal.log"
    path.write_bytes(b'{"a":1}\n{"b":2}\n{"c"')
    os.symlink(path, tmp_path / "journal.log.lock")
    S._mend(path)
    assert path.read_bytes() == b'{"a":1}\n{"b":2}\n'
    assert not os.path.lexists(tmp_path / "journal.log.lock")


# -- asking, without training ----------------------------------------------------------------------


def asked(folder: Path, p: P.Params, batches: int, wanted: int = 99) -> list[list[space.Config]]:
    """Batches that a study asks for, each answered with a made-up accuracy."""
    found = []
    with S.Search(p, DATA, folder, say=silent) as search:
        for _ in range(batches):
            trials = search.ask(wanted)
            for trial in trials:
                search._tell(trial, answer(trial.config, trial.cost.file_bytes))
            found.append([t.config for t in trials])
    return found


def answer(config: space.Config, size: int) -> dict:
    top1 = 50 + config["width"] + 2 * config["members"] + 5 * (config["scheme"] == "fusion")
    return {"val_top1": top1, "val_loss": 1.0, "file_bytes": size, "rungs": [top1 - 1, top1],
            "stopped": False, "cpu_s": 1.0, "history": {}}  # fmt: skip


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "random"])
def test_the_same_seed_asks_the_same(tmp_path, sampler):
    p = parse(sampler=sampler)
    first = asked(tmp_path / "a", p, 4)
    assert asked(tmp_path / "b", p, 4) == first
    # Stopped and started between the batches.
    again = [b for _ in range(4) for b in asked(tmp_path / "c", p, 1)]
    assert again == first
    other = asked(tmp_path / "d", replace(p, search=replace(p.search, seed=1)), 4)
    assert other != first


def test_rejections_leave_their_constraint(tmp_path):
    p = parse(budget_kib=6)
    with S.Search(p, DATA, tmp_path / "search", say=silent) as search:
        for _ in range(4):
            for trial in search.ask(99):
                search._tell(trial, answer(trial.config, trial.cost.file_bytes))
        rows = search.rows()
        trials = search.study.get_trials()
    rejected = [t for t in trials if t.user_attrs["outcome"] == S.REJECTED]
    assert rejected
    for t in rejected:
        assert t.state == TrialState.PRUNED
        assert max(t.constraints.values()) > 0
        for name, value in t.constraints.items():
            assert t.user_attrs[f"constraint_{name}"] == value  # for optuna-dashboard
        assert t.user_attrs["feasible"] is False
    sized = [t for t in rejected if "size" in t.constraints]
    for t in sized:
        over = t.user_attrs["counted_kib"] / 6 - 1
        assert t.constraints["size"] == pytest.approx(over)
    for row in rows:
        fits = row["bound_bytes"] is not None and row["bound_bytes"] <= 6 * 1024
        assert row["feasible"] == (row["outcome"] != S.REJECTED)
        assert row["feasible"] == fits


def test_the_sampler_sees_rejections_of_its_batch_alone(tmp_path):
    """Those of all batches outnumber what is trained; see `Search._history`."""
    with S.Search(parse(budget_kib=6), DATA, tmp_path / "search", say=silent) as search:
        for _ in range(4):
            for trial in search.ask(99):
                search._tell(trial, answer(trial.config, trial.cost.file_bytes))
        rejected = [t.user_attrs["batch"] for t in search._trials(S.REJECTED)]
        trained = search._trials(*S.COUNTED)
        last = max(rejected)
        assert min(rejected) < last
        seen = search._history(last).get_trials()
        assert len(seen) == len(trained) + rejected.count(last)
        assert [t.params for t in search._history(last + 1).get_trials()] == [
            t.params for t in trained
        ]


def test_a_space_comes_to_an_end(tmp_path):
    p = parse(space={"backbone": ["nin"], "width": [8], "members": [1, 2]})
    with S.Search(p, DATA, tmp_path / "search", say=silent) as search:
        while batch := search.ask(1000):
            for trial in batch:
                search._tell(trial, answer(trial.config, trial.cost.file_bytes))
        rows = search.rows()
        keys = {space.identity({k: r[k] for k in configuration()}) for r in rows}
        assert len(rows) == len(keys) == search.space.size
        assert "all 24 configurations" in search.ended


def test_networks_are_traced_when_the_space_is_made():
    """What is counted later costs no walk through a model."""
    blueprint.forget()
    found = space.Space(parse(), DATA)
    walks = blueprint._walk.cache_info().misses
    for choice in np.ndindex(*map(len, found.values.values())):
        config = {k: v[i] for (k, v), i in zip(found.values.items(), choice, strict=True)}
        if not found.problem(config):
            cost = found.cost(config)
            assert cost.file_bytes == storage.file_bound(
                found.spec(config),
                PackParams(),
                DATA.classes,
                space.facts(space.preset(parse(), config)),
            )
    assert blueprint._walk.cache_info().misses == walks > 0


def test_the_plot_of_every_sort_of_study(tmp_path, monkeypatch):
    """Drawn without complaint: some bad trials, none trained, and a budget by a paper's count."""
    with S.Search(parse(), DATA, tmp_path / "a", say=silent) as search:
        for _ in range(3):
            for trial in search.ask(99):
                result = answer(trial.config, trial.cost.file_bytes)
                if trial.number % 3 == 0:
                    result |= {"val_top1": 3.0}
                search._tell(trial, result)
        report = search.report()
        p = search.search
    empty = replace(report, rows=[], best=None, importances={})
    cases = {
        "some": (report, p),
        "none": (empty, p),
        "paper": (report, replace(p, count="tentaclenet")),
    }
    for name, (shown, limits) in cases.items():
        front.plot(shown, limits, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_limits_that_nothing_meets_are_said(tmp_path, monkeypatch):
    monkeypatch.setattr(S, "IDLE", 20)
    p = parse(megaops=1e-6)
    lines: list[str] = []
    with S.Search(p, DATA, tmp_path / "search", say=silent) as search:
        assert search.ask(10) == []
        report = search.report()
        front.show(report, search, lines.append)
        front.write(report, search, tmp_path)
    text = "\n".join(lines)
    assert "20 configurations in a row did not fit" in text
    assert re.search(r"nothing .* fits 12 KiB .* smallest .* nin 8, .* takes [\d.]+ KiB", text)
    assert not (tmp_path / "best.yaml").exists()


def test_one_process_at_a_time(tmp_path):
    open_ = partial(S.Search, parse(), DATA, tmp_path / "search", say=silent)
    with open_(), pytest.raises(RuntimeError, match="another process"):
        open_()


def test_what_a_dead_driver_left_running_is_asked_for_again(tmp_path):
    p = parse(batch=3)
    with S.Search(p, DATA, tmp_path / "a", say=silent) as search:
        whole = [t.config for _ in range(3) for t in told(search, search.ask(99))]
    with S.Search(p, DATA, tmp_path / "b", say=silent) as search:
        told(search, search.ask(99))
        batch = search.ask(99)
        told(search, batch[1:2])  # one of three came back; the others run when the driver dies
    with S.Search(p, DATA, tmp_path / "b", say=silent) as search:
        repeated = search.ask(99)
        assert [t.config for t in repeated] == [batch[0].config, batch[2].config]
        told(search, repeated)
        told(search, search.ask(99))
        rows = [r for r in search.rows() if r["outcome"] == S.TRAINED]
        outcomes = [t.user_attrs["outcome"] for t in search.study.get_trials()]
    key = [space.identity({k: r[k] for k in configuration()}) for r in rows]
    assert len(set(key)) == len(key)
    assert sorted(key) == sorted(map(space.identity, whole))
    assert outcomes.count(S.INTERRUPTED) == 2


def test_a_result_that_was_written_but_not_told_is_not_lost(tmp_path, monkeypatch):
    with S.Search(parse(), DATA, tmp_path / "a", say=silent) as search:
        first, second = search.ask(99)
        with monkeypatch.context() as dying:
            dying.setattr(search, "_settle", lambda *_: None)
            told(search, [first])
    with S.Search(parse(), DATA, tmp_path / "a", say=silent) as search:
        assert search.study.trials[first.number].state == TrialState.COMPLETE
        assert [t.config for t in search.ask(99)] == [second.config]


def told(search: S.Search, batch: list[S.Trial]) -> list[S.Trial]:
    for trial in batch:
        search._tell(trial, answer(trial.config, trial.cost.file_bytes))
    return batch


def test_hopeless_at_a_rung(tmp_path):
    p = parse(batch=4, rungs=[0.25, 0.5], keep=0.5)
    with S.Search(p, DATA, tmp_path / "a", say=silent) as search:
        first = search.ask(99)
        assert search._floors(first[0]) == [(0.25, None), (0.5, None), (1.0, None)]
        for trial, values in zip(first, ([10], [20, 25], [30, 35, 40], [40, 45, 50]), strict=True):
            result = answer(trial.config, trial.cost.file_bytes)
            result |= {"rungs": values, "stopped": len(values) < 3, "val_top1": values[-1]}
            search._tell(trial, result)
        second = search.ask(99)
        # Of four at the first rung two may be better, of three at the second one.
        assert search._floors(second[0]) == [(0.25, 20), (0.5, 35), (1.0, None)]
    two = replace(p, search=replace(p.search, objectives="accuracy_bytes"))
    with S.Search(two, DATA, tmp_path / "b", say=silent) as search:
        told(search, search.ask(99))
        (trial, *_) = search.ask(99)
        smaller = [r for r in search.rows() if r["feasible"] and r["outcome"] == S.TRAINED]
        smaller = [r for r in smaller if r["bound_bytes"] <= trial.cost.file_bytes]
        (_, floor), *_ = search._floors(trial)
        assert (floor is None) == (len(smaller) <= 2)


# -- on a cluster ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster():
    ray.init("local", num_cpus=2, include_dashboard=False, logging_level="ERROR",
             log_to_driver=False, _node_ip_address="127.0.0.1")  # fmt: skip
    with Cluster(RayParams(gpus_per_actor=0.0)) as started:
        yield started
    ray.shutdown()


def comparable(rows: list[dict]) -> list[dict]:
    return sorted(
        ({k: v for k, v in row.items() if k not in ("cpu_s", "number")} for row in rows), key=str
    )


@pytest.fixture(scope="module")
def study(cluster, tmp_path_factory):
    """A study with two workers, its report and its files."""
    folder = tmp_path_factory.mktemp("study")
    p = parse(rivals=True)
    with S.Search(p, DATA, folder / "search", say=silent) as search:
        report = search.run(cluster)
        front.write(report, search, folder / "reports")
        lines: list[str] = []
        front.show(report, search, lines.append)
    return folder, p, report, "\n".join(lines)


@pytest.mark.slow
class TestAStudy:
    def test_has_its_trials(self, study):
        _, _, report, _ = study
        counted = [r for r in report.rows if r["outcome"] in S.COUNTED]
        assert len(counted) == 6
        assert all(r["outcome"] != S.FAILED for r in counted)
        for row in counted:
            assert row["file_bytes"] <= row["bound_bytes"] <= 12 * 1024

    def test_answers_with_the_best(self, study):
        folder, _, report, said = study
        trained = [r for r in report.rows if r["outcome"] == S.TRAINED]
        assert report.best["val_top1"] == max(r["val_top1"] for r in trained)
        preset = P.load(folder / "reports/best.yaml")
        assert preset.ensembles.train[0].members == report.best["members"]
        assert preset.model.width == report.best["width"]
        check.check(preset, DATA.image, len(DATA.classes))
        assert f"{report.best['val_top1']:.2f} %" in said

    def test_front_as_files(self, study):
        folder, _, report, _ = study
        content = json.loads((folder / "reports/front.json").read_text())
        assert content["budget_bytes"] == 12 * 1024
        trials = [t for t in content["trials"] if "rival" not in t]
        assert [t["number"] for t in trials] == [r["number"] for r in report.rows]
        on = [t for t in trials if t["front"]]
        for t in trials:
            if t["val_top1"] is not None and not t["front"]:
                assert any(
                    o["val_top1"] >= t["val_top1"] and o["file_bytes"] <= t["file_bytes"]
                    for o in on
                )
        with open(folder / "reports/front.csv", newline="") as file:
            assert len(list(csv.DictReader(file))) == len(content["trials"])
        assert (folder / "reports/front.png").read_bytes()[:4] == b"\x89PNG"

    def test_rivals_are_marked(self, study):
        folder, _, _, said = study
        content = json.loads((folder / "reports/front.json").read_text())
        rivals = {t["rival"]: t for t in content["trials"] if "rival" in t}
        assert {"one wider BNN", "TentacleNet (2020)"} <= rivals.keys()
        for name, t in rivals.items():
            assert 0 < t["file_bytes"] <= 12 * 1024
            assert 0 <= t["val_top1"] <= 100
            assert name in said

    def test_goes_on_and_trains_nothing_again(self, study, cluster, tmp_path):
        folder, p, report, _ = study
        shutil.copytree(folder / "search", tmp_path / "search")
        saved = {f: f.stat().st_mtime_ns for f in (tmp_path / "search").rglob("*.safetensors")}
        assert saved
        with S.Search(p, DATA, tmp_path / "search", say=silent) as search:
            assert comparable(search.run(cluster).rows) == comparable(report.rows)
            more = search.run(cluster, trials=8)
        assert len([r for r in more.rows if r["outcome"] in S.COUNTED]) == 8
        assert comparable(report.rows) == comparable(more.rows[: len(report.rows)])
        assert all(f.stat().st_mtime_ns == t for f, t in saved.items())

    def test_does_not_depend_on_the_number_of_workers(self, study, cluster, tmp_path):
        _, p, report, _ = study
        one = Cluster(RayParams(gpus_per_actor=0.0, actors=1))
        plain = replace(p, search=replace(p.search, rivals=False))
        with one, S.Search(plain, DATA, tmp_path / "search", say=silent) as search:
            again = search.run(one)
        assert comparable(again.rows) == comparable(report.rows)

    def test_a_time_limit_begins_nothing_new(self, cluster, tmp_path):
        with S.Search(parse(), DATA, tmp_path / "search", say=silent) as search:
            report = search.run(cluster, timeout=0)
            assert report.rows == []
            assert report.best is None
            assert "0 s were over" in report.ended

    def test_two_objectives(self, cluster, tmp_path):
        p = parse(objectives="accuracy_bytes", sampler="nsga2", trials=4)
        with S.Search(p, DATA, tmp_path / "search", say=silent) as search:
            report = search.run(cluster)
            for t in search._trials(S.TRAINED):
                assert t.values == [t.user_attrs["val_top1"], t.user_attrs["file_bytes"]]
        assert len([r for r in report.rows if r["outcome"] in S.COUNTED]) == 4


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


@pytest.mark.slow
def test_a_task_that_dies_is_run_once_more(cluster, tmp_path):
    # Workers cannot import this module by name; what it sends them travels whole.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    crew, results = S.Crew(cluster, DATA), {}
    work = [
        S.Work("dies once", _die_once, (str(tmp_path / "mark"),), keep=True),
        S.Work("dies", _die, (), keep=True),
        S.Work("diverges", _diverge, ()),
        S.Work("needs one that dies", _say, (), needs="dies"),
        S.Work("needs one that lives", _say, (), needs="dies once"),
    ]
    left = crew.run(work, lambda w, result: results.update({w.name: result}))
    assert left == []
    assert results["dies once"] == "done"
    assert results["needs one that lives"] == "fine done"
    assert isinstance(results["dies"], S.WorkError)
    assert isinstance(results["needs one that dies"], S.WorkError)
    assert "the loss is nan" in str(results["diverges"])
    assert crew.retried == 2  # a loss that is not finite is not tried again


@pytest.mark.slow
def test_a_worker_is_killed_in_the_middle_of_a_trial(cluster, tmp_path):
    """Its trial is trained again, and the study is as if nothing had happened."""
    p = parse(trials=4, space={"backbone": ["nin"], "start": ["hadamard"]})
    killed = []

    def kill(line: str) -> None:
        # Between a trial's result and the next: kill a worker that is at it.
        for pid, command in processes.descendants().items():
            if not killed and command.startswith("ray::trial"):
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)

    with S.Search(p, DATA, tmp_path / "a", say=silent) as search:
        quiet = search.run(cluster)
    with S.Search(p, DATA, tmp_path / "b", say=kill) as search:
        report = search.run(cluster)
    assert killed
    assert report.retried >= 1
    assert comparable(report.rows) == comparable(quiet.rows)


SCRIPT = """
import sys
from pathlib import Path
from bnncore import search as S, front
from bnncore.actors import Cluster
from bnncore.params import RayParams
from tests import test_search as T
p = T.parse(trials=8, batch=4)
with S.Search(p, T.DATA, Path(sys.argv[1]) / "search", say=lambda s: print(s, flush=True)) as s:
    with Cluster(RayParams(actors=2, gpus_per_actor=0.0)) as c:
        report = s.run(c)
        front.write(report, s, Path(sys.argv[1]) / "reports")
        front.show(report, s)
sys.exit(130 if report.ended == "interrupted" else 0)
"""


def started(folder: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder)], cwd=ROOT, env=environment(PYTHONPATH="."),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def counted(folder: Path) -> list[dict]:
    content = json.loads((folder / "reports/front.json").read_text())
    return [t for t in content["trials"] if t["outcome"] in S.COUNTED]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("whole")
    running = started(folder)
    output, _ = running.communicate(timeout=500)
    assert running.returncode == 0, output
    return counted(folder)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_driver_ends_in_the_middle_and_goes_on(tmp_path, uninterrupted, how):
    """No finished trial is lost, none counted twice, and the study ends as if nothing had been."""
    running = started(tmp_path)
    seen: list[str] = []
    try:
        for line in running.stdout:
            seen.append(line)
            if re.match(r" +\d+/8 trial", line):
                break
        children = processes.descendants(running.pid)
        running.send_signal(how)
        output, _ = running.communicate(timeout=300)
    finally:
        if how == signal.SIGKILL:
            processes.kill(children)
    if how == signal.SIGINT:  # finishes what runs, reports what there is
        assert running.returncode == 130, output
        assert "ended because interrupted" in output
        before = counted(tmp_path)
        assert 1 <= len(before) < 8
    else:
        assert running.returncode == -signal.SIGKILL
        finished = {m[1] for line in seen if (m := re.match(r" +\d+/8 (trial-\d+)", line))}
        assert finished
    again = started(tmp_path)
    output, _ = again.communicate(timeout=500)
    assert again.returncode == 0, output
    assert "goes on after" in output
    if how == signal.SIGKILL:
        assert not any(f"{name} " in output.split("study tiny")[0] for name in finished)
    rows = counted(tmp_path)
    keys = [space.identity({k: r[k] for k in configuration()}) for r in rows]
    assert len(keys) == len(set(keys)) == 8
    assert comparable(rows) == comparable(uninterrupted)


# -- as a user runs it -----------------------------------------------------------------------------


def test_the_stage_names_every_module_it_uses():
    stage = yaml.safe_load((ROOT / "search/dvc.yaml").read_text())["stages"]["search"]
    code = {Path(d) for d in stage["deps"] if d.endswith(".py")}
    by_name = [Path("bnncore/ops.py"), Path("bnncore/kernel.py")]
    assert code == set().union(*map(closure, [Path("pipeline/search.py"), *by_name]))
    assert stage["deps"] == sorted(stage["deps"])


DIGITS = {
    "model": {"backbone": "nin", "width": 8, "dropout": 0.0},
    "pretrain": {"epochs": 1, "batch_size": 256, "lr": 0.01},
    "binarize": {"epochs": 1, "batch_size": 256, "lr": 0.01},
    "ensembles": {"recipe": {"epochs": 2, "batch_size": 256, "lr": 0.01}, "train": []},
    "search": {
        "trials": 2, "budget_kib": 8, "batch": 2, "rungs": [], "warmup": 2,
        "space": {"backbone": ["nin"], "width": [8, 16, 64], "scheme": ["fusion"],
                  "sharing": ["shared_conv"], "members": [1, 2], "start": ["bnn"]},
    },
}  # fmt: skip


@pytest.mark.slow
def test_the_pipeline_runs_the_answer(tmp_path):
    folder = copy(tmp_path / "project", DIGITS)
    output = dvc(folder, "repro", "search/dvc.yaml")
    assert "the best within 8 KiB" in output
    assert "Running stage 'search" not in dvc(folder, "repro", "search/dvc.yaml")
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.search", "--finish"], cwd=folder, env=environment(),
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "trained in full" in done.stdout
    best = yaml.safe_load((folder / "reports/search/best.yaml").read_text())
    size = (folder / "reports/search/best.bnn").stat().st_size
    assert size <= 8 * 1024
    packfile.load(folder / "reports/search/best.bnn")

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
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

    shutil.copy(folder / "reports/search/best.yaml", folder / "params.yaml")
    assert "search" not in dvc(folder, "repro")  # unless asked for
    rows = json.loads((folder / "reports/results.json").read_text())
    row = next(r for r in rows if r["name"] == "best")
    assert row["members"] == best["ensembles"]["train"][0]["members"]
    assert row["file_bytes"] == size
    finished = json.loads((folder / "reports/search/finished.json").read_text())
    assert row["test_top1"] == pytest.approx(finished["test_top1"])


@pytest.mark.slow
def test_a_hopeless_budget_is_named_before_anything_trains(tmp_path):
    folder = copy(tmp_path / "project", DIGITS | {"search": {"budget_kib": 0.5}})
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.search"], cwd=folder, env=environment(),
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1
    assert "search: search.budget_kib: nothing in the space fits 0.5 KiB" in done.stderr
    assert not (folder / "checkpoints/search/fp32").exists()
