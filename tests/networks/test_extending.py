"""Two recipes followed: a binarizer and a sharing row, from parameters to a packed file."""

from __future__ import annotations

import numpy as np
import torch

from bnncore import check
from bnncore.lowering import blueprint
from bnncore.lowering.lower import lower
from bnncore.networks import binarize, sharing
from bnncore.packed import execute, packfile
from bnncore.training import plans, schemes
from bnncore.training.loop import train_many
from tests import tiny

DATA = tiny.dataset((12, 12, 1), 4, train=32)


def median(weight, scale):
    """Signs, and the median of a filter's absolute weights as its scale."""
    return binarize.clipped_sign(weight), weight.abs().flatten(1).median(dim=1).values


def test_a_binarizer_and_a_sharing_row_are_one_line_each(monkeypatch):
    monkeypatch.setitem(binarize.WEIGHTS, "median", median)
    row = sharing.Sharing("own_stems", ("first_conv", "body.layer3.*"), frozen=False)
    monkeypatch.setitem(sharing.SHARING, "own_stems", row)
    p = tiny.parse(
        model={"backbone": "resnet8", "width": 8, "binarizer": {"weight": "median"}},
        ensembles={
            "train": [{"name": "e", "scheme": "fusion", "sharing": "own_stems", "members": 2}],
            "recipe": {"epochs": 1, "batch_size": 32},
        },
    )
    check.check(p, DATA.image, 4)
    (fp32,) = train_many([plans.first_job(p, DATA, None)], DATA)
    (bnn,) = train_many([plans.first_job(p, DATA, fp32.state)], DATA)
    plan = plans.plan(p, p.ensembles.train[0], DATA, fp32.state, bnn.state)
    ensemble = schemes.train(plan, lambda jobs: train_many(jobs, DATA)).ensemble().eval()

    # The row: what members own, and that what they share was trained.
    layers = [sharing.weight_layers(member) for member in ensemble.members]
    own = {n for n in layers[0] if layers[0][n] is not layers[1][n]}
    assert own == {"stem.conv", *(n for n in layers[0] if n.startswith("body.layer3."))}
    kept = ensemble.state()["shared.body.layer1.block1.conv1.weight"]
    assert not torch.equal(kept, bnn.state["0.body.layer1.block1.conv1.weight"])

    # The binarizer: packed and run, it is torch's, in a file of the size that was foreseen.
    program = lower(ensemble, DATA.mean, DATA.std, DATA.classes)
    with torch.no_grad():
        expected = ensemble(tiny.normalized(DATA, DATA.val.images)).numpy()
    packed = execute.Model(program, ops="numpy")(DATA.val.images)
    apart = np.abs(packed - expected).max(1) > 1e-4 * np.abs(expected).max()
    assert apart.sum() <= 1
    assert len(packfile.encode(program)) <= blueprint.file_bound(ensemble.spec)
