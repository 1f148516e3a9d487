"""Every field of every section meets the same bad values: refused by its key within a second, or
listed here as a value that works."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import pytest

from bnncore import check
from bnncore import params as P
from bnncore.packed import rules
from bnncore.params import search, sections, types
from bnncore.training.schedule import learning_rate

IMAGE, CLASSES = (8, 8, 1), 10

BAD: dict[str, Any] = {
    "null": None,
    "true": True,
    "-1": -1,
    "0": 0,
    "1": 1,
    "1.5": 1.5,
    "0.25": 0.25,
    "2**53 + 1": 2**53 + 1,
    "10**9": 10**9,
    "10**5": 10**5,
    "10**400": 10**400,
    "-inf": -float("inf"),
    "inf": float("inf"),
    "nan": float("nan"),
    "'1'": "1",
    "''": "",
    "no-break": "a\u00a0b",
    "control": "a\x1b[31mb",
    "newline": "a\n",
    "NUL": "a\0",
    "surrogate": "a\udc80",
    "long": "a" * 300,
    "[]": [],
    "{}": {},
    "[[]]": [[]],
    "list of 200": list(range(1, 201)),
    "bytes": b"a",
    "unknown key": {"no_such_key": 1},
}

# Section -> field -> the bad values that are good there. A new field needs a row.
NUMBER = {"1", "1.5", "0.25"}
WHOLE = {"1"}
TEXT = {"'1'"}
MANY = {"1", "10**5"}
FLAG = {"true"}
SECTION = {"{}"}
OPTIONAL = {"null"}
PATH = {"null", "'1'", "no-break", "long"}
GOOD: dict[str, dict[str, set[str]]] = {
    "DataParams": {
        "name": set(), "path": {"null"}, "download": set(), "val_fraction": {"0.25"},
        "test_fraction": {"0.25"}, "seed": {"0", *MANY, "10**9"}, "size": {"null", "1"},
        "channels": {"null", "1"}, "subset": {"1", "0.25"},
    },
    "Binarizer": {
        "weight": set(), "activation": set(), "stochastic": FLAG, "shift": {"null", "true"},
        "act": OPTIONAL, "stem": set(), "head": set(),
    },
    "ModelParams": {
        "backbone": set(), "width": {"null"}, "dropout": {"0"}, "binarizer": SECTION,
    },
    "Recipe": {
        "epochs": MANY, "batch_size": set(), "lr": NUMBER, "optimizer": set(), "betas": set(),
        "weight_decay": {"0", *NUMBER}, "warmup": {"0", "1"}, "schedule": set(),
        "patience": MANY, "label_smoothing": {"0", "0.25"}, "distill": {"0", "1", "0.25"},
        "temperature": {"10**5", "10**9", *NUMBER}, "two_step": FLAG, "augment": set(),
        "pad": WHOLE, "prefixes": set(), "shards": WHOLE, "compile": set(), "stack": MANY,
        "deterministic": FLAG,
    },
    "CustomSharing": {"own": {"[]"}, "frozen": FLAG, "name": TEXT},
    "EnsembleParams": {
        "name": TEXT, "scheme": set(), "sharing": set(), "members": WHOLE, "start": set(),
        "classifier": set(), "jitter": {"0", "1", "0.25"}, "fresh_classifier": FLAG,
        "recipe": SECTION, "teacher": set(), "vote": OPTIONAL, "sampling": OPTIONAL,
        "boost": OPTIONAL, "chain": OPTIONAL, "residual": OPTIONAL, "shrinkage": OPTIONAL,
    },
    "EnsemblesParams": {"recipe": SECTION, "train": {"[]"}},
    "PackParams": {
        "affine": set(), "weights": set(), "integer": FLAG, "choose": set(),
        "max_drop": {"0", *NUMBER},
    },
    "EvaluateParams": {"ops": set(), "batch": WHOLE, "threads": WHOLE},
    "RayParams": {
        "address": set(), "actors": {"null", *MANY}, "cpus_per_actor": WHOLE,
        "gpus_per_actor": {"null", "0", "1", "0.25"}, "wait_s": {"0", "10**5", "10**9", *NUMBER},
        "replay": {"null", "true"},
    },
    "MlflowParams": {"uri": PATH, "experiment": TEXT},
    "Scale": {"epochs": NUMBER, "subset": {"1", "0.25"}},
    "SpaceParams": {
        "backbone": set(), "width": set(), "fill": set(), "scheme": set(), "sharing": set(),
        "members": set(), "start": set(),
    },
    "SearchParams": {
        "trials": MANY, "seed": {"0", *MANY, "10**9"}, "sampler": set(), "objectives": set(),
        "budget_kib": {"10**5", "10**9", *NUMBER}, "count": set(),
        "megaops": {"null", "10**5", "10**9", *NUMBER},
        "activation_kib": {"null", "10**5", "10**9", *NUMBER},
        "ram_kib": {"null", "10**5", "10**9", *NUMBER},
        "flash_kib": {"null", "10**5", "10**9", *NUMBER},
        "minstructions": {"null", "10**5", "10**9", *NUMBER}, "epochs": {"null", *MANY},
        "rungs": {"[]"}, "keep": {"1", "0.25"}, "batch": WHOLE, "warmup": MANY, "rivals": FLAG,
        "finalists": {"0", "1"}, "folds": set(), "space": SECTION,
    },
    "Params": {
        "scale": SECTION, "seed": {"0", *MANY, "10**9"}, "data": SECTION, "model": SECTION,
        "pretrain": SECTION, "binarize": SECTION, "ensembles": SECTION, "pack": SECTION,
        "evaluate": SECTION, "search": SECTION, "ray": SECTION, "mlflow": SECTION,
    },
}  # fmt: skip

# Section -> the keys that lead to it, and what else stands there.
PLACES: dict[str, list[Any]] = {
    "DataParams": ["data"],
    "Binarizer": ["model", "binarizer"],
    "ModelParams": ["model"],
    "Recipe": ["binarize"],
    "CustomSharing": ["ensembles", "train", 0, "sharing"],
    "EnsembleParams": ["ensembles", "train", 0],
    "EnsemblesParams": ["ensembles"],
    "PackParams": ["pack"],
    "EvaluateParams": ["evaluate"],
    "RayParams": ["ray"],
    "MlflowParams": ["mlflow"],
    "Scale": ["scale"],
    "SpaceParams": ["search", "space"],
    "SearchParams": ["search"],
    "Params": [],
}
REQUIRED = {"EnsembleParams": {"name": "x"}, "CustomSharing": {"own": ["classifier"]}}
SECTIONS = {
    name: cls
    for module in (sections, search)
    for name, cls in vars(module).items()
    if dataclasses.is_dataclass(cls) and cls.__module__ == module.__name__
}
FIELDS = [(n, f.name) for n, cls in SECTIONS.items() for f in dataclasses.fields(cls)]


def test_every_field_has_a_row():
    assert {name: set(row) for name, row in GOOD.items()} == {
        name: {field.name for field in dataclasses.fields(cls)} for name, cls in SECTIONS.items()
    }


def document(section: str, field: str, value: Any) -> tuple[dict, str]:
    """params.yaml with one value in its place, and the key of that place."""
    inner: Any = {**REQUIRED.get(section, {}), field: value}
    place = PLACES[section]
    for key in reversed(place):
        if isinstance(key, int):
            inner = [inner]
        else:
            inner = {**REQUIRED["EnsembleParams"], key: inner} if key == "sharing" else {key: inner}
    return inner, ".".join(map(str, [*place, field]))


@pytest.mark.parametrize(("section", "field"), FIELDS)
def test_bad_values_are_refused_by_their_key_at_once(section, field):
    check.check(P.parse({}), IMAGE, CLASSES)  # warm
    wrong = {}
    for name, value in BAD.items():
        values, key = document(section, field, value)
        started = time.thread_time()
        try:
            check.check(P.parse(values), IMAGE, CLASSES)
            said = None
        except P.ParamsError as error:
            said = str(error)
        seconds = time.thread_time() - started
        named = {key, key.replace("train.0", "train.x")}
        if seconds > 10:
            wrong[name] = f"took {seconds:.1f} s"
        elif name in GOOD[section][field]:
            if said is not None:
                wrong[name] = f"expected to work, got {said}"
        elif said is None:
            wrong[name] = "expected a refusal"
        elif not any(line.startswith(k) for line in said.splitlines() for k in named):
            wrong[name] = f"does not begin with {key}: {said}"
        elif any(line.count(k + ":") + line.count(", got") > 2 for line in said.splitlines()
                 for k in named):  # fmt: skip
            wrong[name] = f"says it twice: {said}"
    assert not wrong


def test_scale_multiplies_every_recipe_once():
    train = [{"name": "x", "recipe": {"epochs": 10, "warmup": 4}}]
    recipes = {
        "pretrain": {"epochs": 0},
        "binarize": {"epochs": 100, "two_step": True, "schedule": "cosine"},
        "ensembles": {"recipe": {"epochs": 40, "patience": 3}, "train": train},
    }
    p = P.parse({"scale": {"epochs": 0.1, "subset": 0.5}, "data": {"subset": 0.5}, **recipes})
    assert (p.pretrain.epochs, p.binarize.epochs, p.data.subset) == (0, 10, 0.25)
    assert (p.ensembles.recipe.epochs, p.ensembles.recipe.patience) == (4, 1)
    recipe = p.recipe(p.ensembles.train[0])
    assert (recipe.epochs, recipe.warmup, recipe.patience) == (1, 0, 1)
    assert P.parse(P.plain(p)) == p
    snapshots = {"name": "y", "scheme": "snapshot", "members": 8,
                 "recipe": {"epochs": 40, "warmup": 4, "schedule": "cosine"}}  # fmt: skip
    p = P.parse({"scale": {"epochs": 0.3}, "ensembles": {"train": [snapshots]}})
    recipe = p.recipe(p.ensembles.train[0])
    assert (recipe.epochs, recipe.warmup) == (16, 1)
    check.check(p, IMAGE, CLASSES)
    steps = {"epochs": 10, "warmup": 4, "two_step": True, "schedule": "cosine"}
    for factor in (0.1, 0.2, 0.5, 1.0, 3.0):
        p = P.parse({"scale": {"epochs": factor}, "binarize": steps})
        assert p.binarize.epochs == max(2, round(10 * factor))
        assert max(learning_rate(p.binarize, [], k / 100) for k in range(100)) <= p.binarize.lr
    p = P.parse({"scale": {"epochs": 1e-9}, **recipes})
    assert (p.pretrain.epochs, p.binarize.epochs) == (0, 2)  # two steps need two


X = "ensembles.train.x."
# Keys -> a value that some stage would have refused late, or that is at odds with another.
TOGETHER = [
    ({"data": {"name": "folder"}}, "data.path: expected a path"),
    ({"data": {"val_fraction": 0.5, "test_fraction": 0.5}}, "data.test_fraction: expected less"),
    ({"pretrain": {"shards": 9, "batch_size": 8}}, "pretrain.shards: expected at most batch_size"),
    ({"pretrain": {"epochs": 0}}, "pretrain.epochs: expected at least 1, got 0"),
    ({"binarize": {"epochs": 0}}, "binarize.epochs: expected at least 1, got 0"),
    ({"ensembles": {"recipe": {"epochs": 0}, "train": [{"name": "x"}]}}, "ensembles.train.x.reci"),
    ({"ensembles": {"train": [{"name": "x", "members": 1025}]}}, "ensembles.train.x.members"),
    (
        {"ensembles": {"train": [{"name": "x", "member": 3}]}},
        "ensembles.train.0.member: unknown key; expected one of name, scheme, sharing, members,",
    ),
    (
        {"ensembles": {"train": [{"name": "x", "recipe": {"lr": float("inf")}}]}},
        "ensembles.train.x.recipe.lr: expected a finite number, got inf",
    ),
    ({"ensembles": {"train": [{"name": "x"}, {"name": "x"}]}}, "ensembles.train: expected unique"),
    ({"ensembles": {"train": [{"name": "x"}, {"name": "x.0"}]}}, "ensembles.train: expected names"),
    ({"ensembles": {"train": [{"name": "bnn"}]}}, "ensembles.train: expected unique names"),
    ({"ensembles": {"train": [{"name": "ensemble"}]}}, "ensembles.train: expected unique names"),
    ({"pretrain": {"batch_size": 1}}, "pretrain.batch_size"),
    ({"model": {"backbone": "nope"}}, "model.backbone: expected one of nin,"),
    ({"model": {"backbone": "os:system"}}, "model.backbone: expected os:system"),
    ({"model": {"backbone": ":"}}, "model.backbone: "),
    (
        {"model": {"binarizer": {"weight": "os:system"}}},
        "model.binarizer.weight: os:system: expected",
    ),
    (
        {"model": {"binarizer": {"activation": "os:getcwd"}}},
        "model.binarizer.activation: os:getcwd: expected",
    ),
    (
        {"model": {"backbone": "resnet8", "binarizer": {"head": "binary"}}},
        "model.binarizer.head: expected float with a backbone that ends in a dense layer",
    ),
    ({"data": {"path": "photos"}}, "data.path: expected none where name is digits"),
    ({"binarize": {"epochs": 3, "warmup": 3}}, "binarize.warmup: expected less than epochs (3)"),
    (
        {"binarize": {"epochs": 7, "warmup": 3, "two_step": True, "schedule": "cosine"}},
        "binarize.warmup: expected less than half of epochs (3)",
    ),
    (
        {"scale": {"epochs": 1e5}, "pretrain": {"epochs": 1}, "binarize": {"epochs": 1}},
        "scale.epochs: expected a factor",
    ),
    ({"pretrain": {"prefixes": True}}, "pretrain.prefixes: expected only for ensembles"),
    *(
        (
            {"model": {"backbone": name, "dropout": 0.5}},
            f"model.dropout: expected 0 with {name}, which has no dense layer",
        )
        for name in ("nin", "leanresnet8", "leanresnet20", "leanplain")
    ),
    *(
        ({"ensembles": {"train": [{"name": "x", **row}]}}, f"{X}{said}")
        for row, said in [
            (
                {"start": "hadamard"},
                "start: expected bnn with sharing 'shared_conv', which freezes",
            ),
            ({"start": "random", "sharing": {"own": ["first_conv"]}}, "start: expected bnn with"),
            ({"scheme": "snapshot", "recipe": {"warmup": 10}}, "recipe.warmup: expected less than"),
            (
                {"scheme": "gradient_boosting", "recipe": {"label_smoothing": 0.1}},
                "recipe.label_smoothing: expected 0 with residual squared",
            ),
            (
                {"scheme": "gradient_boosting", "recipe": {"schedule": "plateau"}},
                "recipe.schedule: expected another one with scheme gradient_boosting",
            ),
            ({"scheme": "voting", "recipe": {"prefixes": True}}, "recipe.prefixes: expected only"),
            (
                {
                    "scheme": "stochastic_rounding",
                    "sharing": "no_shared",
                    "recipe": {"prefixes": True},
                },
                "recipe.prefixes: expected only",
            ),
        ]
    ),
    ({"pretrain": {"distill": 0.5}}, "pretrain.distill: expected only for binary networks"),
    ({"pretrain": {"two_step": True}}, "pretrain.two_step: expected only for binary networks"),
    ({"binarize": {"two_step": True, "epochs": 1}}, "binarize.two_step: expected at least 2"),
    (
        {"ensembles": {"recipe": {"two_step": True}, "train": [{"name": "x"}]}},
        "ensembles.train.x.recipe.two_step: expected only in binarize",
    ),
    *(
        ({"ensembles": {"recipe": {"distill": 0.5}, "train": [{"name": "x", **row}]}}, f"{X}{said}")
        for row, said in [
            ({"teacher": "x"}, "teacher: expected fp32, ensemble or the name of an earlier entry"),
            ({"teacher": "ensemble", "scheme": "voting"}, "teacher: expected ensemble only with"),
            ({"teacher": "ensemble", "members": 1}, "teacher: expected ensemble only with"),
            ({"scheme": "gradient_boosting"}, "recipe.distill: expected 0 with scheme gradient_b"),
            ({"teacher": "ensemble", "recipe": {"distill": 0}}, "teacher: expected a recipe with"),
        ]
    ),
    ({"search": {"rungs": [0.5, 0.2]}}, "search.rungs: expected rising fractions"),
    ({"search": {"space": {"width": [8, 8]}}}, "search.space.width: expected different values"),
    ({"ray": {"gpus_per_actor": 1.5}}, "ray.gpus_per_actor: expected a whole number above 1"),
    ({1: 2}, "1: "),
]


@pytest.mark.parametrize(("values", "said"), TOGETHER, ids=[said[:40] for _, said in TOGETHER])
def test_what_does_not_go_together_is_refused(values, said):
    with pytest.raises(P.ParamsError) as caught:
        check.check(P.parse(values), IMAGE, CLASSES)
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize("backbone", ["nin", "resnet18", "resnet9", "fernet", "reactnet10"])
def test_the_widest_network_is_checked_within_seconds(backbone):
    started = time.thread_time()
    values = {
        "model": {"backbone": backbone, "width": 2048},
        "ensembles": {"train": [{"name": "x"}]},
    }
    check.check(P.parse(values), IMAGE, CLASSES)
    assert time.thread_time() - started < 50


def test_what_parameters_allow_the_format_holds():
    longest = "a" * 200
    P.parse({"mlflow": {"experiment": longest}})
    with pytest.raises(P.ParamsError):
        P.parse({"mlflow": {"experiment": longest + "a"}})
    for fact in (longest, P.parse({"seed": types.EXACT}).seed):
        rules._scalar("a fact of the file", fact)


# -- YAML ------------------------------------------------------------------------------------------

BOMB = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}]\n"
    for a, b in zip("abcdefghijklmnop", "bcdefghijklmnopq", strict=True)
)
YAML = {
    "a key twice": ("seed: 1\ndata: {}\nseed: 2\n", "line 3: expected each key once, got 'seed'"),
    "twice inside": ("data: {seed: 1, seed: 1}\n", "line 1: expected each key once"),
    "anchor bomb": (BOMB, "line 2: expected at most 64 aliases and none inside an anchor"),
    "anchor in itself": ("&a [*a]", "line 1: expected at most 64 aliases"),
    "many aliases": ("a: &a [1]\nb: [" + "*a, " * 99 + "]", "line 2: expected at most 64 aliases"),
    "deep flow": ("a: " + "[" * 10_000, "line 1: expected"),
    "deep blocks": ("\n".join(" " * i + "a:" for i in range(300)), "line 33: expected at most 32"),
    "bool key": ("true: 1", "line 1: expected text or a whole number as key, got true"),
    "null key": ("~: 1", "line 1: expected text or a whole number as key, got ~"),
    "empty key": ("? \n: 1", "line 1: expected text or a whole number as key, got none"),
    "number as key": ("1: 1", "1: "),
    "list as key": ("? [a]\n: 1", "line 1: expected text or a whole number as key, got a sequence"),
    "mapping as key": ("? {a: 1}\n: 1", "line 1: expected text or a whole number as key"),
    "merge key": ("a: &a {x: 1}\nb: {<<: *a}", "line 2: expected a key, got the merge key <<"),
    "object": ("a: !!python/object:os.system x", "line 1: expected a value without a tag"),
    "tag": ("a: !!timestamp x", "line 1: expected a value without a tag"),
    "not YAML": ("a: b: c", "line 1: expected YAML: mapping values are not allowed"),
    "tab": ("a:\n\t- x", "line 2: expected YAML: found character that cannot start"),
    "control": ("a: '\x01'", "expected YAML: unacceptable character"),
    "two documents": ("a: 1\n---\nb: 1", "line 2: expected YAML: but found another document"),
    "not UTF-8": (b"seed: 1\nmodel: \xff\xfe", "line 2: expected text in UTF-8, got byte 0xff"),
    "too large": ("# " + "x" * (1 << 18), "expected at most 262,144 bytes of YAML, got more"),
    "empty": ("", "params: expected a mapping of sections, got NoneType"),
    "a list": ("- 1", "params: expected a mapping of sections, got list"),
}  # fmt: skip


@pytest.mark.parametrize("kind", YAML)
def test_yaml_is_strict(kind, tmp_path):
    content, said = YAML[kind]
    path = tmp_path / "params.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    started = time.thread_time()
    with pytest.raises(P.ParamsError) as caught:
        P.load(path)
    assert time.thread_time() - started < 50
    assert str(caught.value).startswith(f"{path}: {said}")


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(P.ParamsError, match=r"none\.yaml: expected a YAML file, found none"):
        P.load(tmp_path / "none.yaml")
    with pytest.raises(P.ParamsError, match="expected a readable file: Is a directory"):
        P.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001), ("1E5", 1e5), ("-.5", -0.5), ("1.", 1.0), ("1_000", 1000), ("-3", -3),
        (".inf", float("inf")), ("010", "010"), ("1:30", "1:30"), ("2024-01-01", "2024-01-01"),
        ("yes", True), ("~", None), ("0x10", "0x10"), ("1.2.3", "1.2.3"), ("!!str 5", "5"),
    ],
)  # fmt: skip
def test_scalars_are_read_as_hydra_reads_them(text, value):
    assert P.parse_yaml(f"a: {text}") == {"a": value}


def test_an_anchor_may_be_used():
    assert P.parse_yaml("a: &r {lr: 1}\nb: *r") == {"a": {"lr": 1}, "b": {"lr": 1}}
