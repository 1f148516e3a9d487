"""`params.yaml`: a section a stage, read into typed, frozen objects before any work.

Unknown keys, wrong types and values out of range are refused with the key, the value and what is
allowed. Nothing here imports torch: the evaluator reads parameters too. What only the training
side can know (whether a backbone or a sharing pattern exists) `check` looks up, before
anything trains.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from bnncore.data import DataParams
from bnncore.errors import UserError

_STRICT = ConfigDict(extra="forbid", strict=False)
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


DataParams.__pydantic_config__ = _STRICT  # type: ignore[attr-defined]


class ParamsError(UserError, ValueError):
    """Parameters that cannot be used; names the key, the value and what is allowed."""


@dataclass(frozen=True, config=_STRICT)
class Binarizer:
    """How a layer becomes binary.

    Attributes:
        weight: ``xnor``, ``sign``, ``learned`` (`binarize.WEIGHTS`) or ``module:function``.
        activation: ``clipped``, ``bireal``, ``float`` (`binarize.ACTIVATIONS`) or
            ``module:function``.
        stochastic: in training, draw each weight's sign at every step with
            P(+1) = (clip(w, -1, 1) + 1) / 2 (BinaryConnect, Eq. 2).
    """

    weight: str = "xnor"
    activation: str = "clipped"
    stochastic: bool = False


@dataclass(frozen=True, config=_STRICT)
class ModelParams:
    """The network of one member.

    Attributes:
        backbone: a key of `backbones.BACKBONES` or ``module:function``.
        width: channels of the first convolution; None for the paper's.
        dropout: probability in front of the dense layer.
        binarizer: how its BNN is binarized.
    """

    backbone: str = "nin"
    width: Count | None = None
    dropout: Fraction = 0.0
    binarizer: Binarizer = field(default_factory=Binarizer)


@dataclass(frozen=True, config=_STRICT)
class Recipe:
    """How something is trained.

    Attributes:
        epochs: passes over the training images.
        batch_size: images a step.
        lr: learning rate at the start.
        betas: Adam's.
        weight_decay: Adam's (L2, as torch.optim.Adam).
        schedule: ``poly``: ``lr * (1 - epoch / epochs)``, changed once an epoch (the second
            paper's formula and published code); ``linear``: the same, by the step; ``plateau``: a
            tenth after `patience` epochs without a lower validation loss; ``cosine``: one half
            wave to 0, by the step; ``constant``.
        patience: epochs, for ``plateau``.
        augment: ``none``, ``crop`` (pad and random crop), ``crop_flip`` (and horizontal flip).
        pad: pixels that are padded for the crop.
        prefixes: train the mean loss over the first 1..M members instead of that of all M, so
            that every prefix is a good ensemble.
        shards: cut each batch in so many parts that batch norm sees one by one (its running
            statistics are their mean); up to so many actors can then share a member.
        compile: ``torch.compile`` the members: ``always``, ``never``, or ``auto``: where the job
            is long enough to pay for it. Needs a C++ compiler on CPUs; results differ by rounding.
    """

    epochs: Annotated[int, Field(ge=0)] = 30
    batch_size: Count = 128
    lr: Positive = 0.001
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    schedule: Literal["poly", "linear", "plateau", "cosine", "constant"] = "poly"
    patience: Count = 15
    augment: Literal["none", "crop", "crop_flip"] = "none"
    pad: Count = 4
    prefixes: bool = False
    shards: Count = 1
    compile: Literal["never", "auto", "always"] = "never"


@dataclass(frozen=True, config=_STRICT)
class CustomSharing:
    """A user's own row of `ensemble.SHARING`.

    Attributes:
        own: groups (`ensemble.GROUPS`) or patterns over layer names that each member owns.
        frozen: whether the shared layers keep the BNN's values.
        name: for tables.
    """

    own: tuple[str, ...]
    frozen: bool = True
    name: str = "custom"


@dataclass(frozen=True, config=_STRICT)
class EnsembleParams:
    """One ensemble to train.

    Attributes:
        name: unique in the run; names files and runs.
        scheme: a key of `schemes.SCHEMES`.
        sharing: a key of `ensemble.SHARING`, or a `CustomSharing`.
        members: M.
        start: where members' binary layers start: ``bnn`` (the trained BNN), ``hadamard``
            (pseudo-Hadamard, a seed a member) or ``random``.
        classifier: what a TentacleNet's block concatenates: ``logits`` (Fig. 2a), ``features``
            (Fig. 2b) or ``auto``: as the backbone has a dense layer or not.
        jitter: relative noise on the batch-norm parameters of members that start from one network.
        fresh_classifier: members that own their classifier start with a new one.
        recipe: fields of the section's recipe that differ here.

    Options of some schemes only; None for the scheme's default (`schemes.SCHEMES`):
        vote: ``soft`` or ``hard``, for schemes that vote.
        sampling: what bagging gives each member: ``bootstrap`` (as many images as there are, drawn
            with replacement), ``batch`` (a draw with replacement in each batch) or ``partition``
            (one of M disjoint parts).
        boost: how boosting stresses images: ``reweight`` (in the loss) or ``resample``.
        chain: members trained in sequence go on from the weights of the one before, instead of
            from `start`.
        residual: what gradient boosting fits: ``squared`` (the pseudo-residual, by squared error)
            or ``logits`` (cross entropy of the sum so far plus the new member).
        shrinkage: by how much gradient boosting multiplies each member's outputs.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    scheme: str = "fusion"
    sharing: str | CustomSharing = "shared_conv"
    members: Count = 3
    start: Literal["bnn", "hadamard", "random"] = "bnn"
    classifier: Literal["auto", "logits", "features"] = "auto"
    jitter: Annotated[float, Field(ge=0, le=1)] = 0.1
    fresh_classifier: bool = True
    recipe: dict[str, Any] = field(default_factory=dict)
    vote: Literal["soft", "hard"] | None = None
    sampling: Literal["bootstrap", "batch", "partition"] | None = None
    boost: Literal["reweight", "resample"] | None = None
    chain: bool | None = None
    residual: Literal["squared", "logits"] | None = None
    shrinkage: Annotated[float, Field(gt=0, le=1)] | None = None


@dataclass(frozen=True, config=_STRICT)
class EnsemblesParams:
    """The stage that trains ensembles: one recipe and a list."""

    recipe: Recipe = field(default_factory=Recipe)
    train: tuple[EnsembleParams, ...] = ()

    def __post_init__(self):
        names = [e.name for e in self.train]
        for name in {"fp32", "bnn", *names}:
            if (name in ("fp32", "bnn") and name in names) or names.count(name) > 1:
                raise ValueError(f"train: expected unique names other than fp32, bnn; got {name!r}")


@dataclass(frozen=True, config=_STRICT)
class PackParams:
    """What the packed file keeps.

    Attributes:
        affine: numbers of batch norms, scales and PReLUs that do not fold away.
        weights: first convolution, shortcuts and dense layers; int8 has a scale a channel.
    """

    affine: Literal["float32", "float16"] = "float32"
    weights: Literal["float32", "int8"] = "float32"


@dataclass(frozen=True, config=_STRICT)
class EvaluateParams:
    """How packed files are run: the set of kernels, images at a time, threads."""

    ops: Literal["compiled", "numpy"] = "compiled"
    batch: Count = 64
    threads: Count = 1


@dataclass(frozen=True, config=_STRICT)
class RayParams:
    """The cluster.

    Attributes:
        address: ``local`` starts one on this machine; else that of a running cluster. The
            environment variable RAY_ADDRESS goes first.
        actors: at most so many at once; None for as many as the cluster's CPUs or GPUs allow.
        cpus_per_actor: what one actor takes, and how many threads it runs.
        gpus_per_actor: fractions are allowed; None for 1 where the cluster has GPUs, else 0.
        wait_s: how long to wait for resources that are asked for and not there.
        replay: keep one member's activations at a time instead of all members', at about 1.4 times
            the time and with the same results; None for where they would not fit otherwise.
    """

    address: str = "local"
    actors: Count | None = None
    cpus_per_actor: Count = 1
    gpus_per_actor: Annotated[float, Field(ge=0)] | None = None
    wait_s: Annotated[float, Field(ge=0)] = 60.0
    replay: bool | None = None


@dataclass(frozen=True, config=_STRICT)
class MlflowParams:
    """Where runs are logged; None: MLFLOW_TRACKING_URI, else mlflow.db beside params.yaml."""

    uri: str | None = None
    experiment: str = "bnncore"


@dataclass(frozen=True, config=_STRICT)
class Scale:
    """By how much a preset was shortened when it was composed: a record, for the recipes and
    ``data.subset`` hold the result.

    Attributes:
        epochs: factor on the epochs of every recipe.
        subset: fraction of the training images.
    """

    epochs: Positive = 1.0
    subset: Annotated[float, Field(gt=0, le=1)] = 1.0


@dataclass(frozen=True, config=_STRICT)
class SpaceParams:
    """What a search may choose from: a configuration takes one value of each list.

    Whole numbers in equal steps (8, 16, 24) count as near one another; other lists as plain
    choices. Combinations that cannot be built are skipped.

    Attributes:
        backbone, width: of `ModelParams`.
        scheme, sharing, members, start: of `EnsembleParams`.
        affine, weights: of `PackParams`.
    """

    backbone: Annotated[tuple[str, ...], Field(min_length=1)] = ("nin", "fernet", "resnet8")
    width: Annotated[tuple[Count, ...], Field(min_length=1)] = (8, 12, 16, 20, 24, 28, 32)
    scheme: Annotated[tuple[str, ...], Field(min_length=1)] = ("tentaclenet", "fusion", "bagging")
    sharing: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "tentaclenet", "shared_conv", "all_frozen", "no_shared",
    )  # fmt: skip
    members: Annotated[tuple[Count, ...], Field(min_length=1)] = (1, 2, 3, 4, 5, 6, 7, 8)
    start: Annotated[tuple[Literal["bnn", "hadamard", "random"], ...], Field(min_length=1)] = (
        "bnn", "hadamard",
    )  # fmt: skip
    affine: Annotated[tuple[Literal["float32", "float16"], ...], Field(min_length=1)] = ("float32",)
    weights: Annotated[tuple[Literal["float32", "int8"], ...], Field(min_length=1)] = ("float32",)

    def __post_init__(self):
        for name, values in vars(self).items():
            for value in values:
                if values.count(value) > 1:
                    raise ValueError(f"{name}: expected different values, got {value!r} twice")


@dataclass(frozen=True, config=_STRICT)
class SearchParams:
    """A search for the best ensemble under a budget.

    Attributes:
        trials: how many configurations are trained; those over the budget cost nothing and do not
            count.
        seed: of what is asked for. Training has the run's own seed, the same in all trials.
        sampler: ``tpe`` (multivariate), ``nsga2`` or ``random``.
        objectives: ``accuracy`` (validation), or ``accuracy_bytes``: both at once, a Pareto front.
        budget_kib: the most that a configuration may take.
        count: in what: ``file`` (the most bytes its packed file can have), ``tentaclenet`` or
            ``filter_sharing`` (either paper's count, `bnncore.storage`).
        megaops: the most operations an image, in millions: float multiply-accumulates plus a
            64th of the binary ones (Liu et al. 2018, section 4.2). None for no limit.
        activation_kib: the most memory that values between layers take at once
            (`packed.costs.peak_memory`, bits as bits). None for no limit.
        epochs: of every recipe in a trial, at most; None for the recipes' own.
        rungs: fractions of the epochs; a trial trains so far first, and further only if it is not
            hopeless.
        keep: at a rung, of the trials before it the fraction that may be better than one that goes
            on.
        batch: how many configurations are asked for at once. What is asked for depends on this
            number and not on how many workers there are, nor on their speed.
        warmup: how many trials are drawn at random before the sampler's model is asked.
        rivals: whether to train what the answer is compared with.
        space: what to choose from.
    """

    trials: Count = 40
    seed: Annotated[int, Field(ge=0)] = 0
    sampler: Literal["tpe", "nsga2", "random"] = "tpe"
    objectives: Literal["accuracy", "accuracy_bytes"] = "accuracy"
    budget_kib: Positive = 24.0
    count: Literal["file", "tentaclenet", "filter_sharing"] = "file"
    megaops: Positive | None = None
    activation_kib: Positive | None = None
    epochs: Count | None = None
    rungs: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.25,)
    keep: Annotated[float, Field(gt=0, le=1)] = 0.5
    batch: Count = 4
    warmup: Count = 12
    rivals: bool = True
    space: SpaceParams = field(default_factory=SpaceParams)

    def __post_init__(self):
        if list(self.rungs) != sorted(set(self.rungs)):
            raise ValueError(f"rungs: expected rising fractions, got {list(self.rungs)}")


@dataclass(frozen=True, config=_STRICT)
class Params:
    """All of `params.yaml`."""

    scale: Scale = field(default_factory=Scale)
    seed: Annotated[int, Field(ge=0)] = 0
    data: DataParams = field(default_factory=lambda: DataParams(name="digits"))
    model: ModelParams = field(default_factory=ModelParams)
    pretrain: Recipe = field(default_factory=Recipe)
    binarize: Recipe = field(default_factory=Recipe)
    ensembles: EnsemblesParams = field(default_factory=EnsemblesParams)
    pack: PackParams = field(default_factory=PackParams)
    evaluate: EvaluateParams = field(default_factory=EvaluateParams)
    search: SearchParams = field(default_factory=SearchParams)
    ray: RayParams = field(default_factory=RayParams)
    mlflow: MlflowParams = field(default_factory=MlflowParams)

    def recipe(self, ensemble: EnsembleParams) -> Recipe:
        """The recipe of one ensemble: the section's, with the ensemble's own fields."""
        merged = {**dataclasses.asdict(self.ensembles.recipe), **ensemble.recipe}
        return _validate(Recipe, merged, f"ensembles.train.{ensemble.name}.recipe")


def _validate(cls, values: Any, where: str):
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        lines = []
        for e in error.errors():
            key = ".".join(str(part) for part in (where, *e["loc"]) if str(part))
            got = e["input"] if not isinstance(e["input"], dict) else "a section"
            lines.append(f"{key}: {_allowed(cls, e)}, got {got!r}")
        raise ParamsError("\n".join(lines)) from None


def _allowed(cls, error) -> str:
    if error["type"] == "unexpected_keyword_argument":
        owner: Any = cls
        for part in error["loc"][:-1]:
            annotations = {f.name: f.type for f in dataclasses.fields(owner)}
            owner = globals().get(str(annotations.get(str(part), "")), None)
            if owner is None:
                return "unknown key"
        return (
            f"unknown key; expected one of {', '.join(f.name for f in dataclasses.fields(owner))}"
        )
    return error["msg"].replace("Input should be", "expected").replace("Value error, ", "")


def parse(values: dict[str, Any]) -> Params:
    """`Params` from plain data.

    Raises:
        ParamsError: names every key that is wrong, its value and what is allowed.
    """
    if not isinstance(values, dict):
        raise ParamsError(f"params: expected a mapping of sections, got {type(values).__name__}")
    params = _validate(Params, values, "")
    for ensemble in params.ensembles.train:
        params.recipe(ensemble)
    return params


def load(path: str | Path = "params.yaml") -> Params:
    """Read and check a parameter file; ParamsError names the file and the key."""
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ParamsError(f"{path}: expected a parameter file, found none") from None
    except yaml.YAMLError as error:
        raise ParamsError(f"{path}: expected YAML: {error}") from None
    try:
        return parse(values)
    except ParamsError as error:
        raise ParamsError(f"{path}: {error}") from None


def plain(params) -> dict[str, Any]:
    """Resolved parameters as plain data, ready for YAML and JSON."""
    return json.loads(json.dumps(dataclasses.asdict(params)))


def save(params, path: str | Path) -> None:
    """Write the resolved copy that stands beside the weights."""
    Path(path).write_text(yaml.safe_dump(plain(params), sort_keys=False))


def digest(*parts: Any) -> str:
    """A short hash of plain data: the same parts, the same hash."""
    text = json.dumps(
        [plain(p) if dataclasses.is_dataclass(p) else p for p in parts], sort_keys=True
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]
