"""The table of operations: every argument of torch's is understood or refused, and what is accepted
computes what torch computes."""

from __future__ import annotations

import copy
import inspect
import operator
import random

import numpy as np
import pytest
import torch
from torch import fx, nn
from torch.fx.operator_schemas import get_signature_for_torch_op
from torch.nn import functional as F

from bnncore.lowering.lower import LowerError, lower
from bnncore.networks.binarize import BinaryActivation, BinaryConv2d, Shift
from bnncore.networks.ensemble import Ensemble, EnsembleSpec
from bnncore.networks.operations import TABLE
from bnncore.networks.parts import Backbone, Dropout, ModelSpec
from bnncore.networks.sharing import SHARING
from bnncore.networks.template import TemplateError, binarized
from bnncore.packed import execute
from tests import tiny

DATA = tiny.dataset((12, 12, 3), 4)
OURS = (BinaryConv2d, BinaryActivation, Shift, Dropout)

# -- signatures --------------------------------------------------------------------------------

# Not read off a module, because it keeps them elsewhere or they change nothing.
OF_CONSTRUCTORS = {"device", "dtype", "min_value", "max_value"}
# No parameter of any rule, so refused when they are given.
REFUSED = {"out"}
BY_PLACE = (operator.add, operator.iadd)  # (a, b), and their names cannot be used


def _signatures(target) -> list[inspect.Signature]:
    """torch's own signatures of an entry of the table, without `self`."""
    if isinstance(target, type):
        return [inspect.signature(target)]
    if target is F.max_pool2d:  # two functions behind one name, this is the one that is called
        return [inspect.signature(F._max_pool2d)]
    if isinstance(target, str):
        target = getattr(torch, target.removesuffix("_"))
    try:
        return [inspect.signature(target)]
    except ValueError:  # a builtin, whose overloads are in its schema
        found = get_signature_for_torch_op(target)
        first = [next(iter(s.parameters.values())) for s in found]
        tensors = ("input", "tensors")
        return [s for s, p in zip(found, first, strict=True) if p.name in tensors]


def _plain(default):
    empty = inspect.Parameter.empty
    return None if default in (empty, []) else 0 if default == [0, 0] else default


@pytest.mark.parametrize("target", TABLE, ids=lambda t: getattr(t, "__name__", str(t)))
def test_every_argument_of_torchs_is_in_the_rule(target):
    """A new argument in a new torch fails here, until the table says what it means."""
    ours = dict(inspect.signature(TABLE[target]).parameters)
    if target in OURS:
        return
    if target in BY_PLACE:
        assert list(ours)[:2] == ["input", "other"]
        return
    for signature in _signatures(target):
        theirs = {
            name: p
            for name, p in signature.parameters.items()
            if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        }
        if isinstance(target, type):
            names = theirs.keys() - OF_CONSTRUCTORS
            assert names == ours.keys() - {"input"}
            continue
        if "dim" in ours and "dim" not in theirs:
            continue  # the mean of everything has no dim, so it does not bind
        assert theirs.keys() - REFUSED <= ours.keys(), signature
        for place, (name, p) in enumerate(theirs.items()):
            if name in REFUSED:
                continue
            assert p.kind == p.KEYWORD_ONLY or list(ours)[place] == name
            assert _plain(ours[name].default) == _plain(p.default), name


# -- values ------------------------------------------------------------------------------------


class Net(nn.Module):
    """A stem, one operation on its map (or on what pooling leaves), and a head."""

    def __init__(self, call, before="map", channels=4):
        super().__init__()
        self.before = before
        self.one = nn.Conv2d(3, 4, 3, padding=1)
        self.act = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.layer = call if isinstance(call, nn.Module) else None
        self.call = None if isinstance(call, nn.Module) else call
        self.last = nn.LazyLinear(4)

    def forward(self, x):
        x = self.act(self.one(x))
        if self.before != "map":
            x = self.pool(x)
        if self.before == "vector":
            x = torch.flatten(x, 1)
        x = self.layer(x) if self.call is None else self.call(x)
        return self.last(torch.flatten(x, 1))


CHOICES = {
    "kernel_size": (1, 2, 3, (2, 2), (3, 2), (3, 3)),
    "stride": (None, 1, 2, (2, 2), (1, 2), [2]),
    "padding": (0, 1, (1, 1), (0, 1)),
    "dilation": (1, 2, (1, 1)),
    "ceil_mode": (False, True),
    "count_include_pad": (True, False),
    "divisor_override": (None, 3),
    "return_indices": (False, True),
    "output_size": (1, (1, 1), 2, (1, 3), (1, None)),
    "dim": (1, 2, 3, -1, -3, (2, 3), [3, 2], (-2, -1), (-1, -2), (1, 2), (2, -1), (2,)),
    "keepdim": (False, True),
    "dtype": (None, torch.float64),
    "start_dim": (0, 1, 2, -3, -1),
    "end_dim": (-1, 3, 2, 1),
    "inplace": (False, True),
    "p": (0.0, 0.5),
    "training": (False, True),
    "min_val": (-1.0, 0, 0.1),
    "max_val": (0.5, 6, float("inf")),
    "alpha": (1, 1.0, 3, -2),
    # constructors
    "groups": (1, 2),
    "bias": (True, False),
    "padding_mode": ("zeros", "reflect", "circular"),
    "eps": (1e-5, 0.1),
    "momentum": (0.1, None),
    "affine": (True, False),
    "track_running_stats": (True, False),
    "num_parameters": (1, 4),
    "init": (0.25, -0.5),
    "in_channels": (4,),
    "out_channels": (4, 6),
    "in_features": (4, 144 * 4),
    "out_features": (5,),
    "num_features": (4,),
}


def _arguments(target, turn: int, rng: random.Random) -> dict:
    """Random arguments: what has to be given, one other in turn, and few more."""
    own = target if isinstance(target, type) else TABLE[target]
    known = {n: p for n, p in inspect.signature(own).parameters.items() if n in CHOICES}
    optional = [n for n, p in known.items() if p.default is not p.empty]
    turns = [*optional, None]
    found = {}
    for name in known:
        wanted = name not in optional or name == turns[turn % len(turns)]
        if wanted or rng.random() < 0.1:
            found[name] = rng.choice(CHOICES[name])
    if target is nn.Conv2d and rng.random() < 0.3:
        found["padding"] = rng.choice(("valid", "same"))
    return found


def _call(target, turn: int, rng: random.Random):
    """(module or function of a value, how it is written)."""
    arguments = _arguments(target, turn, rng)
    text = f"{getattr(target, '__name__', target)}({arguments})"
    if isinstance(target, type):
        return target(**arguments), text
    if target in (torch.cat, torch.concat):
        if rng.random() < 0.5:
            arguments["dim"] = 1
        if rng.random() < 0.5:
            return lambda x: target(tensors=[x, x.relu()], **arguments), text + " tensors="
        return lambda x: target((x, x.relu()), *arguments.values()), text
    if target in BY_PLACE:
        other = rng.choice((None, 1))
        return lambda x: target(x, x.relu() if other is None else other), f"{text} {other}"
    two = "other" in inspect.signature(TABLE[target]).parameters
    if isinstance(target, str):
        return lambda x: getattr(x, target)(*[x.relu()] * two, **arguments), text
    keyword = rng.random() < 0.3
    if keyword:
        return lambda x: target(input=x, **({"other": x.relu()} if two else {}), **arguments), text
    return lambda x: target(x, *[x.relu()] * two, **arguments), text


def _ensemble(net: nn.Module, spec: ModelSpec) -> Ensemble:
    """An ensemble of one member that is `net`, its operations not rewritten by the template."""
    member = Backbone(nn.Identity(), net, nn.Identity())
    ensemble = copy.copy(ANY)
    ensemble.members = nn.ModuleList([member])
    return ensemble.eval()


ANY = Ensemble(EnsembleSpec(tiny.model("nin", 8, DATA), 1, SHARING["no_shared"]))
ANY.shared = []
SPEC = ModelSpec("tests:net", DATA.image, 4)
IMAGES = DATA.val.images[:6]
FUZZED = [t for t in TABLE if t not in OURS]


def _packed_equals(ensemble: Ensemble, expected: torch.Tensor, x: torch.Tensor) -> None:
    program = lower(ensemble, DATA.mean, DATA.std, DATA.classes)
    ours = execute.Model(program, ops="numpy")(IMAGES)
    scale = float(expected.abs().max())
    apart = np.abs(ours - expected.numpy()).max(1) > 1e-4 * scale
    assert apart.sum() <= 1, (ours, expected)


@pytest.mark.parametrize(
    "rounds",  # each optional argument has its turn in 8
    [pytest.param(8, marks=pytest.mark.slow), pytest.param(16, marks=pytest.mark.soak)],
)
@pytest.mark.parametrize("target", FUZZED, ids=lambda t: getattr(t, "__name__", str(t)))
def test_random_arguments_give_torchs_values_or_are_refused_by_name(target, rounds):
    """By `lower`, and by the template in both twins."""
    rng = random.Random(f"{target}"[:40])
    x = tiny.normalized(DATA, IMAGES)
    accepted = 0
    for turn in range(8 * rounds):
        if turn >= rounds and accepted:
            break
        torch.manual_seed(rng.randrange(1 << 30))
        forms = ("map", "map", "map", "pooled", "vector")
        before = rng.choice(forms[-1:] if target is nn.Linear else forms)
        try:
            call, text = _call(target, turn, rng)
            net = Net(call, before).eval()
            with torch.no_grad():
                net(x.clone())
                tiny.scramble(net)
                expected = net(x.clone())
            fx.symbolic_trace(net)
        except Exception:  # torch refuses these arguments itself
            continue
        if expected.shape != (len(IMAGES), 4) or expected.dtype != torch.float32:
            continue
        for way in (_lowered, _templated):
            refusal = ""
            try:
                way(net, expected, x)
                accepted += 1
            except (LowerError, TemplateError) as error:
                refusal = str(error)
            except AssertionError as error:
                raise AssertionError(f"{text} on a {before}: {error}") from error
            named = ("layer", "operation", "node", "tests:net")
            assert not refusal or any(name in refusal for name in named), (text, before, refusal)
    assert accepted


def _lowered(net, expected, x) -> None:
    _packed_equals(_ensemble(net, SPEC), expected, x)


def _templated(net, expected, x) -> None:
    twin = binarized(net, SPEC).eval()
    found = twin(x).detach()
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()) + 1e-6)
    _packed_equals(_ensemble(twin, SPEC), expected, x)
