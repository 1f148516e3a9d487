"""The section of the search: its space and its budget."""

from __future__ import annotations

from collections import Counter
from dataclasses import field
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag
from pydantic.dataclasses import dataclass

from bnncore.params.types import (
    SECTION,
    Between,
    Count,
    Flag,
    Positive,
    Seed,
    Share,
    Some,
    Text,
    Threads,
    Whole,
    Width,
)

Widths = Annotated[
    Annotated[Literal["auto"], Tag("<auto>")] | Annotated[Some[Width], Tag("<list>")],
    Discriminator(lambda value: "<auto>" if isinstance(value, str) else "<list>"),
]


@dataclass(frozen=True, config=SECTION)
class SpaceParams:
    """What a search may choose from: a configuration takes one value of each list.

    Whole numbers in equal steps (8, 16, 24) count as near one another; other lists as plain
    choices. Combinations that cannot be built are skipped. How trials are packed says ``pack``.

    Attributes:
        backbone: of `ModelParams`.
        width: of `ModelParams`; ``auto``: the widest that all limits allow.
        fill: with ``auto``, the widest that fits into such a share of the budget.
        scheme, sharing, members, start: of `EnsembleParams`; scheme ``fp32`` is the FP32 network
            with its weights in int8, which has no sharing, members or start. One member is one
            BNN: it has no scheme and no sharing. A sharing that freezes what is shared starts from
            the BNN.
    """

    backbone: Some[Text] = ("nin", "fernet", "resnet8")
    width: Widths = "auto"
    fill: Some[Share] = (1.0,)
    scheme: Some[Text] = ("tentaclenet", "fusion", "bagging", "fp32")
    sharing: Some[Text] = ("tentaclenet", "shared_conv", "all_frozen", "no_shared")
    members: Some[Count] = (1, 2, 3, 4, 5, 6, 7, 8)
    start: Some[Literal["bnn", "hadamard", "random"]] = ("bnn", "hadamard")

    def __post_init__(self) -> None:
        for name, values in vars(self).items():
            for value, count in Counter(values).items() if values != "auto" else ():
                if count > 1:
                    raise ValueError(f"{name}: expected different values, got {value!r} twice")
        if self.width != "auto" and self.fill != (1.0,):
            raise ValueError(f"fill: expected only with width: auto, got {list(self.fill)}")


@dataclass(frozen=True, config=SECTION)
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
        ram_kib, flash_kib, minstructions: of the packed file as C on a Cortex-M4, with all members:
            static memory, code and constants, millions of instructions an image
            (`device.costs.estimate`). None for no limit.
        epochs: of every recipe in a trial, at most; None for the recipes' own.
        rungs: fractions of the epochs; a trial trains so far first, and further only if it is not
            hopeless.
        keep: at a rung, of the trials before it the fraction that may be better than one that goes
            on.
        batch: how many configurations are asked for at once. What is asked for depends on this
            number and not on how many workers there are, nor on their speed.
        warmup: how many trials are drawn at random before the sampler's model is asked.
        rivals: whether to train what the answer is compared with, where no trial did.
        finalists: at the end so many, of those that the validation part cannot tell from its best,
            are told apart by cross-validation: trained once a fold. Fewer than 2: none.
        folds: into how many parts training and validation images are divided for that.
        space: what to choose from.
    """

    trials: Count = 40
    seed: Seed = 0
    sampler: Literal["tpe", "nsga2", "random"] = "tpe"
    objectives: Literal["accuracy", "accuracy_bytes"] = "accuracy"
    budget_kib: Positive = 24.0
    count: Literal["file", "tentaclenet", "filter_sharing"] = "file"
    megaops: Positive | None = None
    activation_kib: Positive | None = None
    ram_kib: Positive | None = None
    flash_kib: Positive | None = None
    minstructions: Positive | None = None
    epochs: Count | None = None
    rungs: Annotated[tuple[Between, ...], Field(max_length=100)] = (0.25,)
    keep: Share = 0.5
    batch: Threads = 4
    warmup: Count = 12
    rivals: Flag = True
    finalists: Annotated[Whole, Field(ge=0, le=100)] = 4
    folds: Annotated[Whole, Field(ge=2, le=100)] = 4
    space: SpaceParams = field(default_factory=SpaceParams)

    def __post_init__(self) -> None:
        if list(self.rungs) != sorted(set(self.rungs)):
            raise ValueError(f"rungs: expected rising fractions, got {list(self.rungs)}")
