"""What a file says of itself, and that bounds, stage pack and the search agree about it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from bnncore import metrics
from bnncore.lowering import blueprint
from bnncore.lowering.packing import facts, packed
from bnncore.networks.ensemble import Ensemble
from bnncore.packed import execute, packfile, votes
from bnncore.params import PackParams
from bnncore.training import ensembled, plans
from tests import tiny

DATA = tiny.dataset()


def parse(pack: PackParams):
    train = [{"name": "one", "scheme": "fusion", "sharing": "shared_conv", "members": 2}]
    values = {"affine": pack.affine, "weights": pack.weights, "integer": pack.integer}
    return tiny.parse(ensembles={"train": train}, pack=values)


@pytest.mark.slow
@pytest.mark.parametrize("pack", [PackParams(), PackParams("float16", "int8"),
                                  PackParams(integer=True)], ids=str)  # fmt: skip
@pytest.mark.parametrize("name", ["fp32", "bnn", "one"])
def test_a_file_is_within_its_bound_and_tells_its_facts(name, pack):
    p = parse(pack)
    section = p.ensembles.train[0] if name == "one" else None
    if section:
        spec = plans.ensemble_spec(p, section, DATA.image, len(DATA.classes))
    else:
        spec = plans.single_spec(p, DATA.image, len(DATA.classes), binary=name == "bnn")
    ensemble = Ensemble(spec, seed=1)
    tiny.scramble(ensemble)
    trained = ensembled.Ensembled(spec, ensemble.state(), {})
    program, outputs = packed(trained, p, DATA, name, section, ("val", "test"))
    told = facts(p, name, section)
    assert list(program.info) == list(told)
    assert {k: v for k, v in program.info.items() if k != "val_top1"} == {
        k: v for k, v in told.items() if k != "val_top1"
    }
    assert told["kind"] == ("ensemble" if section else name)
    size = len(packfile.encode(program))
    assert size <= blueprint.file_bound(spec, p.pack, DATA.classes, told)
    assert {part: o.shape for part, o in outputs.items()} == {
        "val": (spec.members, 16, 4), "test": (spec.members, 16, 4),
    }  # fmt: skip
    _, predicted = votes.combine(program, outputs["val"])
    top1 = round(100 * metrics.accuracy(predicted, DATA.val.labels), 2)
    assert program.info["val_top1"] == top1
    if pack == PackParams():
        theirs = execute.Model(program).outputs(DATA.test.images)
        np.testing.assert_allclose(theirs, outputs["test"], atol=1e-4)


def test_an_accuracy_takes_no_more_room_than_was_kept_for_it():
    kept = facts(parse(PackParams()), "one")["val_top1"]
    assert all(len(json.dumps(round(v / 100, 2))) <= len(json.dumps(kept)) for v in range(10_001))
