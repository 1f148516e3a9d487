"""What a file says of itself, and that bounds, stage pack and the search agree about it."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from bnncore import metrics
from bnncore.lowering import blueprint
from bnncore.lowering.packing import INTEGERS, PACKINGS, facts, packed
from bnncore.networks.ensemble import Ensemble
from bnncore.packed import execute, packfile, votes
from bnncore.params import PackParams
from bnncore.training import ensembled, plans
from tests import tiny

DATA = tiny.dataset()


def parse(pack: PackParams):
    train = [{"name": "one", "scheme": "fusion", "sharing": "shared_conv", "members": 2}]
    return tiny.parse(ensembles={"train": train}, pack=vars(pack))


def scrambled(p, name: str):
    """The section and an ensemble of random values that claims to be trained."""
    section = p.ensembles.train[0] if name == "one" else None
    if section:
        spec = plans.ensemble_spec(p, section, DATA.image, len(DATA.classes))
    else:
        spec = plans.single_spec(p, DATA.image, len(DATA.classes), binary=name == "bnn")
    ensemble = Ensemble(spec, seed=1)
    tiny.scramble(ensemble)
    return section, ensembled.Ensembled(spec, ensemble.state(), {})


AUTO = [PackParams(choose="auto"), PackParams(choose="auto", integer=True)]


@pytest.mark.slow
@pytest.mark.parametrize("pack", [*PACKINGS, INTEGERS, *AUTO])
@pytest.mark.parametrize("name", ["fp32", "bnn", "one"])
def test_a_file_is_within_its_bound_and_tells_its_facts(name, pack):
    p = parse(pack)
    section, trained = scrambled(p, name)
    found = packed(trained, p, DATA, name, section, ("val", "test"))
    told = facts(replace(p, pack=found.pack), name, section)
    assert list(found.program.info) == list(told)
    assert found.program.info | {"val_top1": 0} == told | {"val_top1": 0}
    assert told["kind"] == ("ensemble" if section else name)
    assert found.pack == pack or pack.choose == "auto"
    size = len(packfile.encode(found.program))
    assert size <= blueprint.file_bound(trained.spec, found.pack, DATA.classes, told)
    members = trained.spec.members
    assert {k: o.shape for k, o in found.theirs.items()} == dict.fromkeys(
        ("val", "test"), (members, 16, 4)
    )
    _, predicted = votes.combine(found.program, found.val)
    assert found.top1 == 100 * metrics.accuracy(predicted, DATA.val.labels)
    assert found.program.info["val_top1"] == round(found.top1, 2)
    ours = execute.Model(found.program).outputs(DATA.val.images)
    np.testing.assert_allclose(ours, found.val, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("max_drop", [0.0, 7.0, 100.0])
@pytest.mark.parametrize("among", [None, PACKINGS[1:]])
def test_auto_takes_the_smallest_that_costs_little(max_drop, among):
    p = parse(PackParams(choose="auto", max_drop=max_drop))
    section, trained = scrambled(p, "one")
    taken = packed(trained, p, DATA, "one", section, among=among)
    every = [packed(trained, parse(pack), DATA, "one", section) for pack in among or PACKINGS]
    sizes = {one.pack: len(packfile.encode(one.program)) for one in every}
    smaller = [one for one in every if sizes[one.pack] < sizes[taken.pack]]
    assert all(one.drop > max_drop for one in smaller)
    assert taken.drop <= max_drop or taken.top1 == max(one.top1 for one in every)


def test_an_accuracy_takes_no_more_room_than_was_kept_for_it():
    kept = facts(parse(PackParams()), "one")["val_top1"]
    assert all(len(json.dumps(round(v / 100, 2))) <= len(json.dumps(kept)) for v in range(10_001))


@pytest.mark.parametrize("max_drop", [0.0, 100.0])
def test_integers_come_first_where_they_are_wanted(max_drop):
    p = parse(PackParams(choose="auto", integer=True, max_drop=max_drop))
    section, trained = scrambled(p, "one")
    taken = packed(trained, p, DATA, "one", section)
    integers = packed(trained, parse(INTEGERS), DATA, "one", section)
    assert taken.pack.integer == (integers.drop <= max_drop) or taken.drop > max_drop
