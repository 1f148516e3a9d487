"""What a study asks for, and that no trial is lost or counted twice; nothing trains here."""

from __future__ import annotations

import signal
from dataclasses import replace

import pytest
from optuna.trial import TrialState

from bnncore.search import space
from bnncore.search import study as S
from bnncore.search.run import INTERRUPTED
from tests.search.studies import DATA, asked, parse, result, search, study, told


@pytest.mark.parametrize("objectives", ["accuracy", "accuracy_bytes"])
@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "random"])
def test_the_same_seed_asks_the_same(tmp_path, sampler, objectives):
    p = parse(sampler=sampler, objectives=objectives)
    first = asked(tmp_path / "a", p, 4)
    assert asked(tmp_path / "b", p, 4) == first
    # Stopped and started between the batches.
    again = [b for _ in range(4) for b in asked(tmp_path / "c", p, 1)]
    assert again == first
    other = asked(tmp_path / "d", replace(p, search=replace(p.search, seed=1)), 4)
    assert other != first


def test_rejections_leave_their_constraint(tmp_path):
    of = study(tmp_path, parse(budget_kib=6))
    for _ in range(4):
        told(of, of.ask(99))
    rejected = of.trials(S.REJECTED)
    assert rejected
    for t in rejected:
        assert t.state == TrialState.PRUNED
        assert max(t.constraints.values()) > 0
        for name, value in t.constraints.items():
            assert t.user_attrs[f"constraint_{name}"] == value  # for optuna-dashboard
        assert t.user_attrs["feasible"] is False
        if "size" in t.constraints:
            over = t.user_attrs["counted_kib"] / 6 - 1
            assert t.constraints["size"] == pytest.approx(over)
    for row in of.rows():
        fits = row["bound_bytes"] is not None and row["bound_bytes"] <= 6 * 1024
        assert row["feasible"] == (row["outcome"] != S.REJECTED)
        assert row["feasible"] == fits


def test_the_sampler_sees_rejections_of_its_batch_alone(tmp_path, monkeypatch):
    """Those of all batches outnumber what is trained; see `Study._history`."""
    seen = []
    propose = S.Study._propose

    def watched(self, history, tried, seed):
        seen.append([t.user_attrs.get("outcome") for t in history.trials])
        return propose(self, history, tried, seed)

    monkeypatch.setattr(S.Study, "_propose", watched)
    of = study(tmp_path, parse(budget_kib=6))
    trained: list[S.Trial] = []
    for _ in range(4):
        seen.clear()
        batch = of.ask(99)
        assert seen[0] == len(trained) * [S.TRAINED]
        trained += told(of, batch)
    assert of.trials(S.REJECTED)


def test_a_space_comes_to_an_end(tmp_path):
    of = study(tmp_path, parse(space={"backbone": ["nin"], "width": [8], "members": [1, 2]}))
    while batch := of.ask(1000):
        told(of, batch)
    rows = of.rows()
    keys = {space.identity(r) for r in rows}
    assert keys == {space.identity(of.space.config(c)) for c in of.space.choices()}
    assert len(rows) == len(keys)
    assert [r["number"] for r in rows] == list(range(len(rows)))
    assert f"all {len(rows)} configurations" in of.ended


def test_limits_that_nothing_meets_are_said(tmp_path, monkeypatch):
    monkeypatch.setattr(S, "IDLE", 20)
    of = study(tmp_path, parse(megaops=1e-6))
    for _ in range(2):  # the second time as the first
        assert of.ask(10) == []
        assert "20 configurations in a row did not fit" in of.ended
        assert len(of.rows()) == 20


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_what_a_dead_driver_left_running_is_asked_for_again(tmp_path, sampler, fails):
    """The study then ends as if it had not died: the same trials, under the same numbers."""
    p = parse(batch=3, sampler=sampler)

    def end(of: S.Study, trials: list[S.Trial]) -> None:
        for trial in trials:
            if fails and trial.number % 2:
                of.fail(trial, "the loss is nan")
            else:
                of.tell(trial, result(trial))

    whole = study(tmp_path / "a", p)
    for _ in range(3):
        end(whole, whole.ask(99))
    of = study(tmp_path / "b", p)
    end(of, of.ask(99))
    batch = of.ask(99)
    end(of, batch[1:2])  # one of three came back; the others run when the driver dies
    of = study(tmp_path / "b", p)
    repeated = of.ask(99)
    assert [t.name for t in repeated] == [batch[0].name, batch[2].name]
    assert [t.config for t in repeated] == [batch[0].config, batch[2].config]
    end(of, repeated)
    end(of, of.ask(99))
    assert of.rows() == whole.rows()


def test_more_trials_later_are_those_of_a_longer_study(tmp_path):
    p = parse(batch=4)
    whole, of = study(tmp_path / "a", p), study(tmp_path / "b", p)
    for wanted in (4, 8):
        told(whole, whole.ask(wanted))
    for wanted in (3, 6, 6, 8):  # both batches of four are asked for in two parts
        told(of, of.ask(wanted))
        assert len(of.trials(*S.COUNTED)) <= wanted
    assert of.rows() == whole.rows()


def test_hopeless_at_a_rung(tmp_path):
    p = parse(batch=4, rungs=[0.25, 0.5], keep=0.5)
    of = study(tmp_path / "a", p)
    first = of.ask(99)
    assert of.floors(first[0]) == [(0.25, None), (0.5, None), (1.0, None)]
    for trial, values in zip(first, ([10], [20, 25], [30, 35, 40], [40, 45, 50]), strict=True):
        stopped = len(values) < 3
        of.tell(trial, result(trial, rungs=values, stopped=stopped, val_top1=values[-1]))
    second = of.ask(99)
    # Of four at the first rung two may be better, of three at the second one.
    assert of.floors(second[0]) == [(0.25, 20), (0.5, 35), (1.0, None)]
    of = study(tmp_path / "b", parse(batch=4, rungs=[0.25, 0.5], objectives="accuracy_bytes"))
    told(of, of.ask(99))
    (trial, *_) = of.ask(99)
    smaller = [r for r in of.rows() if r["outcome"] == S.TRAINED]
    smaller = [r for r in smaller if r["bound_bytes"] <= trial.cost.file_bytes]
    (_, floor), *_ = of.floors(trial)
    assert (floor is None) == (len(smaller) <= 2)


def test_studies_share_a_journal(tmp_path):
    """Changed parameters are a new study beside the old one; changed back, that goes on."""
    first, other = parse(), parse(seed=1)
    before = asked(tmp_path, first, 2)
    assert asked(tmp_path, other, 2) == asked(tmp_path / "other", other, 2)
    assert [*before, *asked(tmp_path, first, 2)] == asked(tmp_path / "first", first, 4)
    assert DATA.name in study(tmp_path, first).name


def test_one_process_at_a_time(tmp_path):
    with search(tmp_path / "search"), pytest.raises(RuntimeError, match="another process"):
        search(tmp_path / "search")
    with search(tmp_path / "search"):  # free again
        pass


def test_ctrl_c_once_and_twice(tmp_path):
    """Once asks to finish, also of a study whose time is over; twice ends at once."""
    lines: list[str] = []
    before = signal.getsignal(signal.SIGINT)
    with search(tmp_path / "search", say=lines.append) as found:
        found._stop.set()  # as a time limit does
        with found._interruptible():
            signal.raise_signal(signal.SIGINT)
            assert found.ended == INTERRUPTED
            assert "Ctrl-C again ends at once" in lines[0]
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
