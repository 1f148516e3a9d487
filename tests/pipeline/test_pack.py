"""What stage pack takes for the model that parameters name."""

from __future__ import annotations

import pytest

from bnncore import data, params
from bnncore.networks.ensemble import Ensemble
from bnncore.training import ensembled, plans
from pipeline import pack
from pipeline.stage import folder

FUSED = {"name": "fused", "members": 2}
VOTED = {"name": "voted", "scheme": "voting", "sharing": "all_frozen", "members": 2}


def read(ensembles=(FUSED, VOTED), **model):
    model = {"backbone": "leanresnet8", "width": 4, **model}
    return params.parse({"model": model, "ensembles": {"train": list(ensembles)}})


@pytest.mark.parametrize(
    ("changed", "other"),
    [
        (read(), []),
        (read(width=5), ["fp32", "bnn", "fused", "voted"]),
        (read(binarizer={"weight": "sign"}), ["bnn", "fused", "voted"]),
        (read([{**FUSED, "members": 3}, VOTED]), ["fused"]),
        (read([FUSED, {**VOTED, "sharing": "no_shared"}]), ["voted"]),
        (read([FUSED, {**VOTED, "scheme": "fusion"}]), ["voted"]),
    ],
)
def test_models_of_other_parameters_are_not_packed(tmp_path, monkeypatch, changed, other):
    monkeypatch.chdir(tmp_path)
    images, p = data.load(params.DataParams()), read()
    shape = images.image, len(images.classes)
    specs = {"fp32": plans.single_spec(p, *shape, binary=False),
             "bnn": plans.single_spec(p, *shape, binary=True),
             **{e.name: plans.ensemble_spec(p, e, *shape) for e in p.ensembles.train}}  # fmt: skip
    for name, spec in specs.items():
        folder(name).parent.mkdir(parents=True, exist_ok=True)
        ensembled.Ensembled(spec, Ensemble(spec).state(), {}).save(folder(name))
    for name in specs:
        if name in other:
            with pytest.raises(ensembled.ModelError, match=f"{folder(name)}: expected a model of"):
                pack.trained(name, changed, images)
        else:
            assert pack.trained(name, changed, images).spec == specs[name]
