"""The sections of `params.yaml` as typed, frozen objects.

Types are exact: no bool is a number and no text is one; numbers are finite and have an upper bound,
so that nothing is accepted that cannot run. What only the training side and the packed format know
(whether a backbone exists, how many members a file holds) `bnncore.check` looks up.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections import Counter
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag
from pydantic.dataclasses import dataclass

from bnncore.params.search import SearchParams
from bnncore.params.types import (
    MANY,
    SECTION,
    Batch,
    Between,
    Channels,
    Count,
    Flag,
    Fraction,
    NotNegative,
    Number,
    Place,
    Positive,
    Rate,
    Seed,
    Share,
    Text,
    Threads,
    Whole,
    Width,
)
from bnncore.params.validation import ParamsError, validated


@dataclass(frozen=True, config=SECTION)
class DataParams:
    """Which images, and how they are divided.

    Attributes:
        name: the set; ``folder`` is one's own.
        path: the data's folder (or fer2013's CSV), absolute or relative to the project's root; when
            None, the folder `name` in the folder that environment variable BNNCORE_DATA names.
            ``digits`` needs neither, ``folder`` always a path.
        download: fetch cifar10 and cifar100 where they are missing; nothing else ever downloads.
        val_fraction, test_fraction: of the images found for training, how many become the
            validation and test parts of a set that comes without them.
        seed: of these splits and of `subset`.
        size: resize all images to `size` x `size` pixels (bilinear); None leaves them as they are.
        channels: 1 makes all images gray, 3 RGB; None takes them as they are, all alike.
        subset: the fraction of the training part that is kept, class by class, for short runs.
    """

    name: Literal["digits", "cifar10", "cifar100", "fer2013", "folder"] = "digits"
    path: Place | None = None
    download: Flag = False
    val_fraction: Between = 0.15
    test_fraction: Between = 0.2
    seed: Seed = 0
    size: Annotated[Whole, Field(ge=1, le=1024)] | None = None
    channels: Channels | None = None
    subset: Share = 1.0

    def __post_init__(self) -> None:
        if self.name == "folder" and self.path is None:
            raise ValueError("path: expected a path where name is folder, got None")
        if self.name == "digits" and self.path is not None:
            raise ValueError(
                "path: expected none where name is digits, which come with scikit-learn, got "
                f"{self.path!r}; name: folder reads one's own"
            )
        if self.download and self.name not in ("cifar10", "cifar100"):
            raise ValueError(
                f"download: expected false where name is {self.name} (cifar10 and cifar100 can be "
                "fetched), got True"
            )
        if self.test_fraction >= 1 - self.val_fraction:
            raise ValueError(
                f"test_fraction: expected less than 1 - val_fraction ({1 - self.val_fraction:g}), "
                f"got {self.test_fraction!r}"
            )


@dataclass(frozen=True, config=SECTION)
class Binarizer:
    """How a layer becomes binary.

    Attributes:
        weight: a row of `binarize.WEIGHTS` or ``module:function``.
        activation: a row of `binarize.ACTIVATIONS` or ``module:function``; with ``float`` only
            weights are binary.
        stochastic: in training, draw each weight's sign at every step with
            P(+1) = (clip(w, -1, 1) + 1) / 2 (BinaryConnect, Eq. 2).
        shift: a learned shift a channel in front of each sign (RSign; Liu et al. 2020, ReActNet);
            None for the backbone's own: reactnet10 has them.
        act: what stands behind each binary convolution, or its addition: ``none``, ``prelu`` (a
            slope a channel), ``rprelu`` (ReActNet's, with shifts before and behind); None for the
            backbone's own: the papers'.
        stem: weights of the first convolution, ``float`` or ``binary``, on the image's numbers.
        head: weights of the last layer; ``binary`` where it is a convolution (nin, lean backbones).
    """

    weight: Text = "xnor"
    activation: Text = "clipped"
    stochastic: Flag = False
    shift: Flag | None = None
    act: Literal["none", "prelu", "rprelu"] | None = None
    stem: Literal["float", "binary"] = "float"
    head: Literal["float", "binary"] = "float"


@dataclass(frozen=True, config=SECTION)
class ModelParams:
    """The network of one member.

    Attributes:
        backbone: a row of `backbones.BACKBONES` or ``module:function``.
        width: channels of the first convolution; None for the paper's.
        dropout: probability in front of the dense layer, of a backbone that has one.
        binarizer: how its BNN is binarized.
    """

    backbone: Text = "nin"
    width: Width | None = None
    dropout: Fraction = 0.0
    binarizer: Binarizer = field(default_factory=Binarizer)


_TIMED = ("epochs", "warmup", "patience")


@dataclass(frozen=True, config=SECTION)
class Recipe:
    """How something is trained.

    Attributes:
        epochs: passes over the training images.
        batch_size: images a step; two at least, which batch norms need.
        lr: learning rate at the start.
        optimizer: ``adam`` or ``adamw``.
        betas: the optimizer's.
        weight_decay: Adam's, added to gradients (L2), or AdamW's, taken off the weights (Loshchilov
            & Hutter 2019).
        warmup: epochs in which the learning rate rises from 0, linearly, by the step, to what the
            schedule says (Goyal et al. 2017).
        schedule: ``poly``: ``lr * (1 - epoch / epochs)``, changed once an epoch (the second
            paper's formula and published code); ``linear``: the same, by the step; ``plateau``: a
            tenth after `patience` epochs without a lower validation loss; ``cosine``: one half
            wave to 0, by the step; ``constant``.
        patience: epochs, for ``plateau``.
        label_smoothing: how much of each label is spread over all classes (Szegedy et al. 2016).
        distill: the part of the loss that is a teacher's (`step.distillation`), 0 for none: the
            FP32 network's, but for ensembles that name another.
        temperature: by which logits are divided there.
        two_step: of stage binarize: the first half of the epochs with binary activations and real
            weights, the second from there with binary ones, each half with a whole schedule
            (Martinez et al. 2020).
        augment: ``none``, ``crop`` (pad and random crop), ``crop_flip`` (and horizontal flip).
        pad: pixels that are padded for the crop.
        prefixes: train the mean loss over the first 1..M members instead of that of all M, so
            that every prefix is a good ensemble; of members that are trained together.
        shards: cut each batch in so many parts that batch norm sees one by one (its running
            statistics are their mean); up to so many actors can then share a member.
        compile: ``torch.compile`` the members: ``always``, ``never``, or ``auto``: where the job
            is long enough to pay for it. Needs a C++ compiler on CPUs; results differ by rounding.
        stack: compute so many members as one network, in blocks that no actors divide; 1 for each
            by itself. ``auto``: each actor's share of the members, on GPUs up to 16, on CPUs 1
            where images have more than 16 x 16 pixels. Results differ by rounding.
        deterministic: on GPUs, the same bits in every run on the same machine, at some cost in
            time; on CPUs it is always so. With ``stack: auto``, the same stacks whatever actors
            there are.
    """

    epochs: Annotated[Whole, Field(ge=0, le=MANY)] = 30
    batch_size: Annotated[Batch, Field(ge=2)] = 128
    lr: Rate = 0.001
    optimizer: Literal["adam", "adamw"] = "adam"
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    weight_decay: Annotated[NotNegative, Field(le=100)] = 0.0
    warmup: Annotated[Whole, Field(ge=0, le=MANY)] = 0
    schedule: Literal["poly", "linear", "plateau", "cosine", "constant"] = "poly"
    patience: Count = 15
    label_smoothing: Fraction = 0.0
    distill: Annotated[Number, Field(ge=0, le=1)] = 0.0
    temperature: Positive = 2.0
    two_step: Flag = False
    augment: Literal["none", "crop", "crop_flip"] = "none"
    pad: Annotated[Whole, Field(ge=1, le=256)] = 4
    prefixes: Flag = False
    shards: Threads = 1
    compile: Literal["never", "auto", "always"] = "never"
    stack: Annotated[Whole, Field(ge=1, le=MANY)] | Literal["auto"] = "auto"
    deterministic: Flag = False

    def __post_init__(self) -> None:
        if self.shards > self.batch_size:
            raise ValueError(
                f"shards: expected at most batch_size ({self.batch_size}), got {self.shards}"
            )
        whole = max(1, self.epochs // (1 + self.two_step))  # of a schedule, at least
        if self.epochs and self.warmup >= whole:
            half = "half of " if self.two_step else ""
            raise ValueError(
                f"warmup: expected less than {half}epochs ({whole}), got {self.warmup}"
            )
        if self.two_step and (self.epochs < 2 or self.schedule == "plateau"):
            raise ValueError(
                "two_step: expected at least 2 epochs, and a schedule other than plateau, got "
                f"{self.epochs} and {self.schedule}"
            )

    def times(self, factor: float) -> Recipe:
        """So many times as long: `epochs`, of which at least one is left (of two steps two), and
        what is counted in them, `warmup` and `patience`."""
        if not self.epochs:
            return self
        epochs = max(1 + self.two_step, round(factor * self.epochs))
        warmup = min(round(factor * self.warmup), epochs // (1 + self.two_step) - 1)
        patience = min(max(1, round(factor * self.patience)), MANY)
        return dataclasses.replace(self, epochs=epochs, warmup=warmup, patience=patience)

    def cycles(self, count: int) -> Recipe:
        """As long or longer: so many cycles of the same length, the warm-up within the first."""
        if not self.epochs:
            return self
        each = -(-self.epochs // count)
        return dataclasses.replace(self, epochs=each * count, warmup=min(self.warmup, each - 1))

    def differs(self, other: Recipe) -> dict[str, int]:
        """The fields that are counted in epochs and are not as in `other`."""
        return {k: v for k in _TIMED if (v := getattr(self, k)) != getattr(other, k)}


@dataclass(frozen=True, config=SECTION)
class CustomSharing:
    """A row of one's own, beside those of `sharing.SHARING`.

    Attributes:
        own: groups (`sharing.GROUPS`) or patterns over layer names that each member owns.
        frozen: whether the shared layers keep the BNN's values.
        name: for tables.
    """

    own: Annotated[tuple[Text, ...], Field(max_length=1000)]
    frozen: Flag = True
    name: Text = "custom"


Sharing = Annotated[
    Annotated[Text, Tag("<row>")] | Annotated[CustomSharing, Tag("<section>")],
    Discriminator(lambda value: "<row>" if isinstance(value, str) else "<section>"),
]


@dataclass(frozen=True, config=SECTION)
class EnsembleParams:
    """One ensemble to train.

    Attributes:
        name: unique in the run; names files and runs.
        scheme: a row of `schemes.SCHEMES`.
        sharing: a row of `sharing.SHARING`, or a section `CustomSharing`.
        members: how many, M.
        start: where members' binary layers start: ``bnn`` (the trained BNN), ``hadamard``
            (pseudo-Hadamard, a seed a member) or ``random``.
        classifier: what a TentacleNet's block concatenates: ``logits`` (Fig. 2a), ``features``
            (Fig. 2b) or ``auto``: as the backbone has a dense layer or not.
        jitter: relative noise on the batch-norm parameters of members that start from the BNN, and
            not from one another (boosting that chains, snapshot, stochastic_rounding).
        fresh_classifier: such members, where they own their classifier, start with a new one.
        recipe: fields of ``ensembles.recipe`` that differ here.
        teacher: who teaches where the recipe has ``distill``: ``fp32``; the name of an ensemble
            earlier in the list; or ``ensemble``: the members themselves, together, each of them
            (Lan et al. 2018), where they are trained jointly.

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

    name: Annotated[Text, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=100)]
    scheme: Text = "fusion"
    sharing: Sharing = "shared_conv"
    members: Count = 3
    start: Literal["bnn", "hadamard", "random"] = "bnn"
    classifier: Literal["auto", "logits", "features"] = "auto"
    jitter: Annotated[Number, Field(ge=0, le=1)] = 0.1
    fresh_classifier: Flag = True
    recipe: dict[str, Any] = field(default_factory=dict)
    teacher: Text = "fp32"
    vote: Literal["soft", "hard"] | None = None
    sampling: Literal["bootstrap", "batch", "partition"] | None = None
    boost: Literal["reweight", "resample"] | None = None
    chain: Flag | None = None
    residual: Literal["squared", "logits"] | None = None
    shrinkage: Share | None = None


@dataclass(frozen=True, config=SECTION)
class EnsemblesParams:
    """The stage that trains ensembles.

    Attributes:
        recipe: of all ensembles of the list.
        train: the ensembles.
    """

    recipe: Recipe = field(default_factory=Recipe)
    train: Annotated[tuple[EnsembleParams, ...], Field(max_length=1000)] = ()

    def __post_init__(self) -> None:
        names = Counter(e.name for e in self.train)
        for name, count in names.items():
            if name in ("fp32", "bnn", "ensemble") or count > 1:
                raise ValueError(
                    f"train: expected unique names other than fp32, bnn, ensemble, got {name!r}"
                )
            stem, _, member = name.rpartition(".")  # members trained apart are called NAME.MEMBER
            if stem in names and member.isdecimal():
                raise ValueError(
                    f"train: expected names unlike those of members, got {name!r} beside {stem!r}"
                )
        known = ["fp32", "ensemble"]
        for ensemble in self.train:
            if ensemble.teacher not in known:
                raise ValueError(
                    f"train.{ensemble.name}.teacher: expected fp32, ensemble or the name of an "
                    f"earlier entry, got {ensemble.teacher!r}"
                )
            known.append(ensemble.name)

    def named(self, name: str) -> EnsembleParams | None:
        """The ensemble of this name; None where there is none, as for fp32 and bnn."""
        return next((e for e in self.train if e.name == name), None)


@dataclass(frozen=True, config=SECTION)
class PackParams:
    """What the packed file keeps.

    Attributes:
        affine: numbers of batch norms, scales and PReLUs that do not fold away.
        weights: first convolution, shortcuts and dense layers; int8 has a scale a filter;
            ``mixed``: the first convolution in float16, the others in int8.
        integer: no floats from bytes to logits, whatever the others say: the same scores on every
            device, few instructions on those without a float unit.
        choose: ``fixed``: as the keys above say. ``auto``: the smallest packing that costs at most
            `max_drop`, or with `integer` that one first; nothing is trained for that
            (`lowering.packing`).
        max_drop: points of validation accuracy that ``auto`` may give away.
    """

    affine: Literal["float32", "float16"] = "float32"
    weights: Literal["float32", "float16", "int8", "mixed"] = "float32"
    integer: Flag = False
    choose: Literal["fixed", "auto"] = "fixed"
    max_drop: Annotated[NotNegative, Field(le=100)] = 0.2

    def __post_init__(self) -> None:
        if self.choose == "auto" and (self.affine, self.weights) != ("float32", "float32"):
            raise ValueError("choose: expected fixed beside affine or weights, got 'auto'")


@dataclass(frozen=True, config=SECTION)
class EvaluateParams:
    """How packed files are run.

    Attributes:
        ops: the kernels; ``numpy`` needs no compiling and is slow.
        batch: images at a time.
        threads: that share a batch.
    """

    ops: Literal["compiled", "numpy"] = "compiled"
    batch: Batch = 64
    threads: Threads = 1


# How Ray takes them, without a server of jobs, which only `ray job` and `make submit` ask.
ADDRESS = r"local|auto|ray://\S+|[^/\s]+:[0-9]{1,5}"
ADDRESSES = "local, auto, HOST:PORT or ray://HOST:PORT"


@dataclass(frozen=True, config=SECTION)
class RayParams:
    """The cluster.

    Attributes:
        address: ``local`` starts one on this machine; ``auto``, HOST:PORT and ray://HOST:PORT are
            running ones. The environment variable RAY_ADDRESS goes first.
        actors: at most so many at once; None for as many as the cluster's CPUs or GPUs allow.
        cpus_per_actor: what one actor takes, and how many threads it runs.
        gpus_per_actor: fractions are allowed; None for 1 where the cluster has GPUs, else 0.
        wait_s: how long to wait for resources that are asked for and not there.
        replay: keep one member's activations at a time instead of all members', at about 1.7 times
            the time and with the same results; None for where they would not fit otherwise.
    """

    address: Text = "local"
    actors: Count | None = None
    cpus_per_actor: Threads = 1
    gpus_per_actor: Annotated[NotNegative, Field(le=1024)] | None = None
    wait_s: NotNegative = 60.0
    replay: Flag | None = None

    def __post_init__(self) -> None:
        gpus = self.gpus_per_actor or 0.0
        if gpus > 1 and not math.isclose(gpus, round(gpus)):
            raise ValueError(f"gpus_per_actor: expected a whole number above 1, got {gpus}")
        if not re.fullmatch(ADDRESS, self.address):
            raise ValueError(f"address: expected {ADDRESSES}, got {self.address!r}")

    def place(self) -> str:
        """RAY_ADDRESS, else `address`.

        Raises:
            ParamsError: RAY_ADDRESS is of another form.
        """
        place = os.environ.get("RAY_ADDRESS") or self.address
        if not re.fullmatch(ADDRESS, place):
            more = "; http:// is for jobs, `make submit`" * place.startswith("http")
            raise ParamsError(f"RAY_ADDRESS: expected {ADDRESSES}, got {place!r}{more}")
        return place


@dataclass(frozen=True, config=SECTION)
class MlflowParams:
    """Where runs are logged.

    Attributes:
        uri: the tracking store, or ``none`` to log nothing; None for what MLFLOW_TRACKING_URI says,
            else ``mlflow.db`` beside `params.yaml`.
        experiment: the name under which MLflow shows the runs.
    """

    uri: Place | None = None
    experiment: Text = "bnncore"


@dataclass(frozen=True, config=SECTION)
class Scale:
    """Factors that make a run shorter, or longer, without editing what they multiply.

    Attributes:
        epochs: on every recipe's ``epochs``, ``warmup`` and ``patience``; at least one is left of
            epochs and patience, and of a snapshot ensemble's epochs a multiple of its members.
        subset: on ``data.subset``.
    """

    epochs: Positive = 1.0
    subset: Share = 1.0


@dataclass(frozen=True, config=SECTION)
class Params:
    """All of `params.yaml`.

    Attributes:
        seed: of all training: first weights, the order of images, what is drawn.
    """

    scale: Scale = field(default_factory=Scale)
    seed: Seed = 0
    data: DataParams = field(default_factory=DataParams)
    model: ModelParams = field(default_factory=ModelParams)
    pretrain: Recipe = field(default_factory=Recipe)
    binarize: Recipe = field(default_factory=Recipe)
    ensembles: EnsemblesParams = field(default_factory=EnsemblesParams)
    pack: PackParams = field(default_factory=PackParams)
    evaluate: EvaluateParams = field(default_factory=EvaluateParams)
    search: SearchParams = field(default_factory=SearchParams)
    ray: RayParams = field(default_factory=RayParams)
    mlflow: MlflowParams = field(default_factory=MlflowParams)

    def __post_init__(self) -> None:
        for name in ("distill", "two_step"):
            if getattr(self.pretrain, name):
                raise ValueError(
                    f"pretrain.{name}: expected only for binary networks, got "
                    f"{getattr(self.pretrain, name)}"
                )
        for name in ("pretrain", "binarize"):
            if getattr(self, name).prefixes:
                raise ValueError(f"{name}.prefixes: expected only for ensembles, got True")

    def scaled(self) -> Params:
        """The same without `scale`, which has multiplied what it says."""
        if self.scale == Scale():
            return self
        factor, train = self.scale.epochs, self.ensembles.train
        recipes = (self.pretrain, self.binarize, self.ensembles.recipe, *map(self.recipe, train))
        longest = max(recipe.epochs for recipe in recipes)
        if factor * longest > MANY:
            raise ParamsError(
                f"scale.epochs: expected a factor that makes at most {MANY:,} epochs, got "
                f"{factor:g} times {longest:,}"
            )
        recipe = self.ensembles.recipe.times(factor)

        def own(ensemble: EnsembleParams) -> dict[str, Any]:
            """The fields in which it differs from the other ensembles, all worked in."""
            mine = self.recipe(ensemble).times(factor)
            if ensemble.scheme == "snapshot":
                mine = mine.cycles(ensemble.members)
            others = {k: v for k, v in ensemble.recipe.items() if k not in _TIMED}
            return others | mine.differs(recipe)

        return dataclasses.replace(
            self,
            scale=Scale(),
            data=dataclasses.replace(self.data, subset=self.data.subset * self.scale.subset),
            pretrain=self.pretrain.times(factor),
            binarize=self.binarize.times(factor),
            ensembles=EnsemblesParams(
                recipe, tuple(dataclasses.replace(e, recipe=own(e)) for e in train)
            ),
        )

    def recipe(self, ensemble: EnsembleParams) -> Recipe:
        """The recipe of one ensemble: the section's, with the ensemble's own fields."""
        merged = {**dataclasses.asdict(self.ensembles.recipe), **ensemble.recipe}
        where = f"ensembles.train.{ensemble.name}"
        recipe = validated(Recipe, merged, f"{where}.recipe")
        if recipe.two_step:
            raise ParamsError(f"{where}.recipe.two_step: expected only in binarize, got true")
        if ensemble.teacher != "fp32" and not recipe.distill:
            raise ParamsError(
                f"{where}.teacher: expected a recipe with distill above 0, got {ensemble.teacher!r}"
            )
        return recipe
