"""Damaged journals, full disks: an error that says where, and no good line lost."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from bnncore.errors import UserError
from bnncore.search import space, trial
from bnncore.search import study as S
from bnncore.search.bases import Bases
from bnncore.training.devices import Place
from tests.search.studies import DATA, configuration, parse, result, study, told

P = parse(budget_kib=6)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> bytes:
    """A journal of two batches with rejections, and a rival."""
    folder = tmp_path_factory.mktemp("journal")
    of = study(folder, P)
    for _ in range(2):
        told(of, of.ask(99))
    of.keep_rival("one wider BNN", {"about": "nin 20, one BNN", "val_top1": 1.0})
    told(of, of.ask(99))
    return (folder / "journal.log").read_bytes()


def fates(of: S.Study) -> dict[str, str]:
    """Configuration -> outcome."""
    return {space.identity(r): r["outcome"] for r in of.rows()}


def trained(new: bytes) -> Callable[[bytes], bytes]:
    """Another line instead of a trial's of the first batch."""

    def change(content: bytes) -> bytes:
        lines = content.split(b"\n")
        at = next(i for i, line in enumerate(lines) if b'"outcome":"trained"' in line)
        return b"\n".join([*lines[:at], new, *lines[at + 1 :]])

    return change


def rejected(content: bytes) -> bytes:
    at = content.index(b'"outcome":"rejected"')
    return content[: at - 20] + bytes(40) + content[at + 20 :]


GOOD = b'{"op_code":0,"worker_id":"x","study_name":"another","directions":[2]}\n'
# What became of the journal -> how many trials are lost at most, and whether anything is said.
DAMAGES: dict[str, tuple[Callable[[bytes], bytes], int, bool]] = {
    "nothing": (lambda c: c, 0, False),
    "no end of line": (lambda c: c[:-1], 0, False),
    "truncated in a line": (lambda c: c[:-40], 1, False),
    "zeros at the end": (lambda c: c + bytes(500), 0, False),
    "zeros as a line": (lambda c: c + bytes(500) + b"\n", 0, True),
    "garbage in the middle": (trained(b"\x8f\x00garbage"), 1, True),
    "binary zeros in the middle": (trained(bytes(300)), 1, True),
    "a rejection": (rejected, 1, True),
    "an empty line": (trained(b""), 1, True),
    "half a line, glued": (lambda c: c[: len(c) // 2] + c[len(c) // 2 + 50 :], 2, True),
    "not UTF-8": (trained(b'{"op_code":4,"worker_id":"\xff","study_id":0}'), 1, True),
    "another's JSON": (trained(b'{"a":1}'), 1, True),
    "an unknown operation": (trained(b'{"op_code":77,"worker_id":"x"}'), 1, True),
    "an operation without its fields": (trained(b'{"op_code":4,"worker_id":"x"}'), 1, True),
    "a direction of no meaning": (
        trained(b'{"op_code":0,"worker_id":"x","study_name":"third","directions":[9]}'), 1, True),
    "no time": (
        trained(b'{"op_code":4,"worker_id":"x","study_id":0,"datetime_start":"now"}'), 1, True),
    "deep": (trained(b"[" * 100_000), 1, True),
    "its first line": (lambda c: b"garbage" + c[c.index(b"\n") :], 0, True),
    # The studies after it would get another's number.
    "the first line, another's": (lambda c: b"\x00\n" + c, 0, True),
    "another study before": (
        lambda c: GOOD + c.replace(b'"study_id":0', b'"study_id":1'), 0, False),
    "another study lost": (
        lambda c: b"\x00\n" + c.replace(b'"study_id":0', b'"study_id":1'), 0, True),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_good_lines_are_kept(tmp_path, written, damage):
    change, lost, said = DAMAGES[damage]
    path = tmp_path / "journal.log"
    path.write_bytes(written)
    whole = fates(study(tmp_path, P))
    for file in tmp_path.iterdir():
        file.unlink()
    path.write_bytes(change(written))
    os.symlink(path, tmp_path / "journal.log.lock")  # a killed writer's
    lines: list[str] = []
    of = study(tmp_path, P, lines.append)
    kept = fates(of)
    assert kept.items() <= whole.items()
    assert len(whole) - len(kept) <= lost
    assert of.rivals["one wider BNN"]["val_top1"] == 1.0
    assert bool(lines) == said
    if said:
        assert f"{path}: line " in lines[0]
        assert (tmp_path / "journal.log.damaged-1").read_bytes() == change(written)
    # It goes on: a trial that was lost is asked for again, and nothing twice.
    for _ in range(3):
        told(of, of.ask(99))
    again = fates(study(tmp_path, P))
    assert {k for k, fate in again.items() if fate == S.TRAINED} >= {
        k for k, fate in whole.items() if fate == S.TRAINED
    }
    assert len(again) == len(of.rows())


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"SQLite format 3\x00" + bytes(100), "line 1: expected a search's journal"),
        (b"a,b\n1,2\n", "line 1: expected a search's journal"),
        (bytes(4096), "line 1: expected a search's journal"),
        (b"\xff\xfe{\x00", "line 1: expected a search's journal"),
        (b'{"a":1}\n{"b":2}\n', "line 1: expected a search's journal"),
        (b"\n\n", "line 1: expected a search's journal"),
        (None, "cannot be read"),  # a folder
    ],
)  # fmt: skip
def test_what_is_no_journal_is_refused_and_left(tmp_path, content, named):
    path = tmp_path / "journal.log"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=named) as error:
        study(tmp_path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)
    assert path.is_dir() if content is None else path.read_bytes() == content


@pytest.mark.parametrize("content", [b"", b'{"op_code', b'{"op_code":0,"worker'])
def test_a_journal_that_had_hardly_begun_begins_anew(tmp_path, content):
    (tmp_path / "journal.log").write_bytes(content)
    of = study(tmp_path)
    assert of.rows() == []
    told(of, of.ask(99))
    assert len(study(tmp_path).trials(S.TRAINED)) == 2


def test_a_full_disk_names_the_file_and_loses_nothing_written(tmp_path):
    of = study(tmp_path)
    first, second = of.ask(99)
    of.tell(first, result(first))
    path = tmp_path / "journal.log"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot be written") as error:
            of.tell(second, result(second))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(error.value).startswith(str(path))
    again = study(tmp_path)
    assert [t.config for t in again.ask(99)] == [second.config]


def test_other_code_of_the_users_is_another_network(tmp_path, monkeypatch):
    module = tmp_path / "mine_for_bases.py"
    monkeypatch.syspath_prepend(tmp_path)
    p = space.preset(parse(), configuration())
    binarizer = replace(p.model.binarizer, weight="mine_for_bases:weight")
    p = replace(p, model=replace(p.model, binarizer=binarizer))
    names = set()
    for remark in ("# one", "# two"):
        module.write_text(f"from tests.networks.test_binarize import half as weight  {remark}\n")
        todo: list = []
        names.update(Bases(DATA, tmp_path, str).needed(SimpleNamespace(kept={}), p, todo))
    assert len(names) == 2


@pytest.mark.parametrize("file", ["weights.safetensors", "spec.json", "histories.json"])
def test_a_damaged_network_is_trained_again(tmp_path, file):
    class Known:  # as much of a crew as is asked of it
        def __init__(self):
            self.kept: dict = {}

        def keep(self, name, value):
            self.kept[name] = value

    lines: list[str] = []
    bases = Bases(DATA, tmp_path, lines.append)
    p = space.preset(parse(), configuration())
    todo: list = []
    (name,) = bases.needed(Known(), p, todo)
    assert [w.name.split("/")[0] for w in todo] == ["fp32", "bnn"]
    network = trial.network(Place(), DATA, p)
    for work in todo:
        bases.save(work.name, network)
    again: list = []
    assert bases.needed(Known(), p, again) == (name,)
    assert again == []
    (tmp_path / name / file).write_bytes(b"\x00")
    assert bases.needed(Known(), p, again) == (name,)
    assert [w.name for w in again] == [name]
    assert str(Path(name)) in lines[0]
    bases.save(name, network)
    assert bases.needed(Known(), p, again[:0]) == (name,)
    assert json.loads((tmp_path / name / "spec.json").read_text())
    assert len(lines) == 1
