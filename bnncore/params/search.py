"""The section of the search: its space and its budget."""

from __future__ import annotations

from collections import Counter
from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field
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
    Width,
)


@dataclass(frozen=True, config=SECTION)
class SpaceParams:
    """What a search may choose from: a configuration takes one value of each list.

    Whole numbers in equal steps (8, 16, 24) count as near one another; other lists as plain
    choices. Combinations that cannot be built are skipped.

    Attributes:
        backbone, width: of `ModelParams`.
        scheme, sharing, members, start: of `EnsembleParams`.
        affine, weights: of `PackParams`.
    """

    backbone: Some[Text] = ("nin", "fernet", "resnet8")
    width: Some[Width] = (8, 12, 16, 20, 24, 28, 32)
    scheme: Some[Text] = ("tentaclenet", "fusion", "bagging")
    sharing: Some[Text] = ("tentaclenet", "shared_conv", "all_frozen", "no_shared")
    members: Some[Count] = (1, 2, 3, 4, 5, 6, 7, 8)
    start: Some[Literal["bnn", "hadamard", "random"]] = ("bnn", "hadamard")
    affine: Some[Literal["float32", "float16"]] = ("float32",)
    weights: Some[Literal["float32", "int8"]] = ("float32",)

    def __post_init__(self) -> None:
        for name, values in vars(self).items():
            for value, count in Counter(values).items():
                if count > 1:
                    raise ValueError(f"{name}: expected different values, got {value!r} twice")


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
    seed: Seed = 0
    sampler: Literal["tpe", "nsga2", "random"] = "tpe"
    objectives: Literal["accuracy", "accuracy_bytes"] = "accuracy"
    budget_kib: Positive = 24.0
    count: Literal["file", "tentaclenet", "filter_sharing"] = "file"
    megaops: Positive | None = None
    activation_kib: Positive | None = None
    epochs: Count | None = None
    rungs: Annotated[tuple[Between, ...], Field(max_length=100)] = (0.25,)
    keep: Share = 0.5
    batch: Threads = 4
    warmup: Count = 12
    rivals: Flag = True
    space: SpaceParams = field(default_factory=SpaceParams)

    def __post_init__(self) -> None:
        if list(self.rungs) != sorted(set(self.rungs)):
            raise ValueError(f"rungs: expected rising fractions, got {list(self.rungs)}")
