"""What is known of a configuration before anything trains, and of the rivals."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import optuna
import pytest

from bnncore import check
from bnncore.lowering import blueprint
from bnncore.lowering.packing import facts
from bnncore.networks.ensemble import Ensemble
from bnncore.packed import costs
from bnncore.params import PackParams, ParamsError
from bnncore.search import rivals, space, trial
from bnncore.storage import untrained
from bnncore.training import ensembled, plans
from tests import tiny
from tests.search.studies import DATA, SHORT, configuration, parse


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
         r"nothing in it can be built: nin: sharing"),
        ({"space": {"members": [1, 1025]}, "budget_kib": 1e6},
         r"search\.space\.members: expected at most 1024.*got 1025"),
        ({"rungs": [0.5, 0.25]}, r"rungs: expected rising"),
        ({"budget": 12}, r"search\.budget: unknown key.*budget_kib"),
    ],
)  # fmt: skip
def test_bad_input_is_named(search, named):
    with pytest.raises(ParamsError, match=named) as error:
        space.Space(parse(**search), DATA)
    assert "\n" not in str(error.value)


def every(found: space.Space):
    """All configurations that can be built."""
    for choice in np.ndindex(*map(len, found.values.values())):
        config = {k: v[i] for (k, v), i in zip(found.values.items(), choice, strict=True)}
        if not found.problem(config):
            yield config


def test_the_smallest_configuration_is_the_smallest():
    found = space.Space(parse(space={"width": [8, 12, 16], "members": [1, 2]}), DATA)
    sizes = {space.identity(c): found.cost(c).file_bytes for c in every(found)}
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
    trained = ensembled.Ensembled(ensemble.spec, ensemble.state(), {"x": []})
    result = trial.assess(trained, space.preset(p, config), DATA)
    most = found.cost(config).file_bytes
    assert 0.7 * most < result["file_bytes"] <= most


def test_cost_counts_as_storage_does():
    p = parse(count="filter_sharing")
    config = configuration(members=3)
    found = space.Space(p, DATA)
    taken = found.cost(config)
    info = facts(p, *space.model(space.preset(p, config)))
    info |= {"backbone": "nin"}
    counts = untrained.count(found.spec(config), PackParams(), DATA.classes, info)
    assert taken.counted_kib == counts.filter_sharing / 8 / 1024
    assert taken.file_bytes == counts.file
    assert taken.megaops == (counts.float_macs + counts.binary_macs / 64) / 1e6
    program = blueprint.draw(found.spec(config)).most
    assert taken.activation_kib == costs.peak_memory(program)[0] / 1024
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


def test_networks_are_traced_when_the_space_is_made():
    """What is counted later costs no walk through a model."""
    blueprint.forget()
    found = space.Space(parse(), DATA)
    walks = blueprint._walk.cache_info().misses
    assert all(found.cost(config).file_bytes > 0 for config in every(found))
    assert blueprint._walk.cache_info().misses == walks > 0


# -- rivals ----------------------------------------------------------------------------------------


def test_rivals_use_the_budget_and_no_more():
    p = parse(budget_kib=24)
    found = space.Space(p, DATA)
    best = configuration(backbone="fernet") | {"bound_bytes": 0}
    seen = list(rivals.rivals(p, found, best))
    assert len(seen) == 5
    for rival in seen:
        grown = "width" if rival.label in (rivals.WIDER, rivals.INT8) else "members"
        config = rival.config | {grown: rival.config[grown] + 1}
        more = rivals.rival_preset(p, rival.label, config)
        if rival.label == rivals.INT8:
            spec = plans.single_spec(more, DATA.image, 4, binary=False)
            assert more.pack.weights == "int8"
            assert not more.ensembles.train
        else:
            spec = found.spec(config)
        assert rival.cost.file_bytes <= 24 * 1024 < space.cost(spec, more, DATA.classes).file_bytes
        assert rival.feasible
        check.check(rival.params, DATA.image, len(DATA.classes))


@pytest.mark.parametrize("limit", ["megaops", "activation_kib"])
def test_a_rival_may_be_over_another_limit(limit):
    p = parse()
    best = configuration() | {"bound_bytes": 0}
    rest = {r.label: r for r in rivals.rivals(p, space.Space(p, DATA), best)}
    value = sorted(getattr(r.cost, limit) for r in rest.values())[2]
    p = parse(**{limit: value})
    for rival in rivals.rivals(p, space.Space(p, DATA), best):
        assert rival.feasible == (getattr(rival.cost, limit) <= value)


def test_an_int8_rival_is_judged_with_its_rounded_weights():
    """Its size is the file's, its accuracy the narrowed Program's, both as stage pack does it."""
    p = rivals.rival_preset(parse(), rivals.INT8, {"backbone": "resnet8", "width": 8})
    found = trial.fp32(1, DATA, p)
    spec = plans.single_spec(p, DATA.image, 4, binary=False)
    plain = blueprint.file_bound(spec, PackParams(), DATA.classes)
    assert found["file_bytes"] <= space.cost(spec, p, DATA.classes).file_bytes < plain / 2.5
    (history,) = found["history"].values()
    assert len(history) == 3 * SHORT["epochs"]  # as long as an ensemble's three stages
