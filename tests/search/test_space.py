"""What a choice comes to and what is known of it before anything trains, and of the rivals."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import optuna
import pytest

from bnncore import check
from bnncore import params as P
from bnncore.lowering import blueprint
from bnncore.lowering.packing import facts
from bnncore.networks.ensemble import Ensemble
from bnncore.packed import costs
from bnncore.params import PackParams, ParamsError
from bnncore.search import rivals, space, trial
from bnncore.storage import untrained
from bnncore.training import ensembled, plans
from bnncore.training.devices import Place
from tests import tiny
from tests.search.studies import DATA, SHORT, configuration, parse


@pytest.mark.parametrize(
    ("search", "named"),
    [
        ({"space": {"backbone": ["nin", "lenet"]}}, r"search\.space\.backbone.*'lenet'"),
        ({"space": {"scheme": ["stacking"]}}, r"search\.space\.scheme: expected some of .*fp32"),
        ({"space": {"width": [8], "fill": [0.5]}}, r"space\.fill: expected only with width: auto"),
        ({"space": {"width": "wide"}}, r"search\.space\.width: expected 'auto', got 'wide'"),
        ({"space": {"width": "auto"}, "budget_kib": 1}, r"nothing in the space fits 1 .*nin 2,"),
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
    for config in map(found.config, found.choices()):
        if not found.problem(config):
            yield config


def test_the_smallest_configuration_is_the_smallest():
    found = space.Space(parse(space={"width": [8, 12, 16], "members": [1, 2]}), DATA)
    sizes = {space.identity(c): found.cost(c).file_bytes for c in every(found)}
    assert found.least.file_bytes == min(sizes.values())
    assert sizes[space.identity(found.smallest)] == min(sizes.values())


@pytest.mark.slow
@pytest.mark.parametrize("pack", [{}, {"choose": "auto"}])
@pytest.mark.parametrize("scheme", ["fusion", "voting", "tentaclenet", "fp32"])
@pytest.mark.parametrize("backbone", ["nin", "resnet8"])
def test_no_file_is_larger_than_its_cost(backbone, scheme, pack):
    p = replace(parse(), pack=PackParams(**pack))
    sharing = "tentaclenet" if scheme == "tentaclenet" else "shared_conv"
    found = space.Space(p, DATA)
    config = found.config(
        configuration(backbone=backbone, scheme=scheme, sharing=sharing, members=3)
    )
    ensemble = Ensemble(found.spec(config), seed=1)
    tiny.scramble(ensemble)
    trained = ensembled.Ensembled(ensemble.spec, ensemble.state(), {"x": []})
    among = found.packings(config, replace(p.search, budget_kib=99.0))
    result = trial.assess(trial.packed(trained, space.preset(p, config), DATA, among), DATA)
    most = found.cost(config | result).file_bytes
    assert 0.7 * most < result["file_bytes"] <= most
    assert found.cost(config).file_bytes <= most  # before it is known how it will be packed


# Fixed or automatic packing, another limit -> what is the tightest then.
LIMITS = [
    ({}, {}),
    ({"choose": "auto"}, {}),
    ({}, {"megaops": 0.05}),
    ({}, {"activation_kib": 4}),
    ({"integer": True}, {"ram_kib": 12}),
    ({"integer": True}, {"minstructions": 1.5}),
    ({"choose": "auto"}, {"minstructions": 0.7}),  # narrow weights take more of them
]


@pytest.mark.slow
@pytest.mark.parametrize(("pack", "limit"), LIMITS)
def test_the_width_fills_the_budget(pack, limit):
    p = parse(space={"width": "auto", "fill": [1.0, 0.5], "scheme": ["fusion", "fp32"]}, **limit)
    found = space.Space(replace(p, pack=PackParams(**pack)), DATA)
    widths = set()
    for choice in found.choices():
        config = found.config(choice)
        if found.problem(config):
            continue
        share = replace(p.search, budget_kib=choice["fill"] * p.search.budget_kib)
        assert found.packings(config, share), "fits"
        cost = found.cost(config)
        assert max(cost.constraints(p.search).values()) <= 0, "and is trained, not rejected"
        wider = space.WIDTHS[space.WIDTHS.index(config["width"]) + 1]
        assert not found.packings(config | {"width": wider}, share), "and no wider one does"
        widths.add(config["width"])
    assert len(widths) > 3


def test_what_makes_no_difference_is_one_configuration():
    found = space.Space(parse(space={"scheme": ["fusion", "voting", "fp32"]}), DATA)
    alone = [found.config(c) for c in found.choices() if c["members"] == 1 or c["scheme"] == "fp32"]
    # Backbones x widths x (two starts of one BNN, and the FP32 network).
    assert len({space.identity(c) for c in alone}) == 2 * 2 * 3
    for config in alone:
        p = space.preset(parse(), config)
        check.check(p, DATA.image, len(DATA.classes))
        assert [e.jitter for e in p.ensembles.train] in ([0.0], [])


def test_folds_divide_all_but_the_test_images():
    folds = [trial.folded(DATA, k, 3) for k in range(3)]
    together = sorted(image.tobytes() for fold in folds for image in fold.val.images)
    assert together == sorted(i.tobytes() for part in (DATA.train, DATA.val) for i in part.images)
    for fold in folds:
        assert len(fold.train) + len(fold.val) == len(DATA.train) + len(DATA.val)
        assert {i.tobytes() for i in fold.val.images}.isdisjoint(
            i.tobytes() for i in fold.train.images
        )
        counts = np.bincount(fold.val.labels)
        assert counts.max() - counts.min() <= 2
        assert fold.test is DATA.test


def test_cost_counts_as_storage_does():
    p = parse(count="filter_sharing")
    config = configuration(members=3)
    found = space.Space(p, DATA)
    taken = found.cost(config)
    preset = space.preset(p, config)
    info = facts(preset, *space.model(preset))
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


@pytest.mark.parametrize("members", [2, 3, 5, 8, 16])
def test_a_rung_is_shorter_in_all_that_is_counted_in_epochs(members):
    recipe = P.Recipe(epochs=100, warmup=10, patience=20, schedule="plateau")
    p = parse(epochs=10)
    p = replace(p, ensembles=replace(p.ensembles, recipe=recipe))
    p = space.at_rung(space.preset(space.shortened(p), configuration(members=members)), 0.34)
    (section,) = p.ensembles.train
    rung = p.recipe(section)
    assert (rung.epochs, rung.warmup, rung.patience) == (3, 0, 1)
    p = replace(p, ensembles=replace(p.ensembles, recipe=replace(recipe, schedule="cosine")))
    snapshots = space.preset(space.shortened(p), configuration(scheme="snapshot", members=members))
    rung = (q := space.at_rung(snapshots, 0.34)).recipe(q.ensembles.train[0])
    assert rung.epochs == -(-3 // members) * members  # no cycle without an epoch, none of another
    whole = space.preset(p, configuration(scheme="snapshot", members=members))
    check.check(whole, DATA.image, len(DATA.classes))  # its warm-up ends within the first cycle


def test_dropout_is_for_backbones_that_have_a_place_for_it():
    p = parse()
    p = replace(p, model=replace(p.model, dropout=0.5))
    found = space.Space(p, DATA)
    for backbone, dropout in (("nin", 0.0), ("resnet8", 0.5)):
        config = configuration(backbone=backbone)
        assert found.problem(config) is None
        assert space.preset(p, config).model.dropout == dropout


def test_what_is_frozen_starts_from_the_bnn():
    values = {"sharing": ["shared_conv", "no_shared"], "members": [2]}
    found = space.Space(parse(space=values | {"start": ["hadamard", "bnn"]}), DATA)
    choice = configuration(sharing="shared_conv", start="hadamard")
    assert found.config(choice)["start"] == "bnn"
    assert found.config(choice | {"sharing": "no_shared"})["start"] == "hadamard"
    found = space.Space(parse(space=values | {"start": ["hadamard"]}), DATA)
    assert found.problem(choice).startswith("start: expected bnn with sharing 'shared_conv'")
    assert not found.problem(choice | {"sharing": "no_shared"})


def test_numbers_in_equal_steps_have_an_order():
    found = space.Space(parse(space={"width": [8, 12, 16], "members": [1, 2, 4]}), DATA)
    width, members = found.distributions["width"], found.distributions["members"]
    assert isinstance(width, optuna.distributions.IntDistribution)
    assert (width.low, width.high, width.step) == (8, 16, 4)
    assert isinstance(members, optuna.distributions.CategoricalDistribution)


# -- rivals ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("limit", [{}, {"megaops": 0.3}, {"activation_kib": 4}, {"flash_kib": 40}])
def test_rivals_use_the_limits_and_no_more(limit):
    p = parse(budget_kib=24, **limit)
    found = space.Space(p, DATA)
    seen = rivals.rivals(p, found, configuration(backbone="fernet"))
    assert {rivals.WIDER, rivals.INT8} <= seen.keys()
    assert len(seen) == 5 or limit
    for label, config in seen.items():
        alone = label in (rivals.WIDER, rivals.INT8)
        assert config["backbone"] == ("fernet" if alone else p.model.backbone)
        assert found.packings(config)
        values = space.WIDTHS if alone else rivals.MEMBERS
        grown = "width" if alone else "members"
        at = values.index(config[grown]) + 1
        assert at == len(values) or not found.packings(config | {grown: values[at]})
        check.check(space.preset(p, config), DATA.image, len(DATA.classes))


def test_an_fp32_network_is_judged_with_its_rounded_weights():
    """Its size is the file's, its accuracy the narrowed Program's, both as stage pack does it."""
    p = parse()
    found = space.Space(p, DATA)
    config = found.config(configuration(backbone="resnet8", scheme="fp32"))
    among = found.packings(config, replace(p.search, budget_kib=99.0))
    assert among[0] == PackParams("float16", "int8")
    result = trial.train(Place(), DATA, space.preset(p, config), among[:1], [(1.0, None)])
    spec = plans.single_spec(space.preset(p, config), DATA.image, 4, binary=False)
    plain = blueprint.file_bound(spec, PackParams(), DATA.classes)
    assert result["file_bytes"] <= found.cost(config).file_bytes < plain / 2.5
    (history,) = result["history"].values()
    assert len(history) == 3 * SHORT["epochs"]  # as long as an ensemble's three stages
