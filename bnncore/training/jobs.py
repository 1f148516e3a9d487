"""What is trained, as plain data: jobs, what becomes of them, and what both depend on.

Legend: `C` classes, `N` images of the training part.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, NotRequired, TypedDict

import numpy as np
from safetensors.numpy import save
from safetensors.torch import load
from torch import Tensor

from bnncore import modules
from bnncore.data import Dataset
from bnncore.errors import UserError
from bnncore.networks.ensemble import EnsembleSpec
from bnncore.params import Recipe, digest

State = dict[str, Tensor]


def sent(state: State) -> bytes:
    """A state on its way to another process. To pickle its tensors takes ten times as long: there
    are hundreds, most of a few dozen numbers."""
    return save({name: value.contiguous().numpy() for name, value in state.items()})


def received(content: bytes) -> State:
    """The inverse of `sent`."""
    return load(content)


# What their code computes, a checkpoint depends on; dvc.yaml names the same for the stages.
ROOMS = ("cluster", "data", "networks", "params", "training")


class TrainingError(UserError, RuntimeError):
    """Training cannot go on: numbers that are not finite, a checkpoint held or unreadable."""


@dataclass(frozen=True, eq=False)
class Teacher:
    """A trained ensemble, to be asked about the training images where a job is trained."""

    spec: EnsembleSpec
    state: State


@dataclass(frozen=True, eq=False)
class Job:
    """What to train, as plain data that any process can be sent.

    Attributes:
        name: unique in a run, for progress, runs and checkpoints.
        spec: the ensemble the members belong to.
        ids: the members that are trained together here; one for independent members.
        recipe: how.
        seed: of data order, augmentation and dropout.
        start: canonical state to start from (`Ensemble.state`).
        indices: training images to use, (n,) int64; None for all. May repeat images.
        resample: draw as many images from each batch with replacement, and use those drawn once
            each (bagging by batch, as the second paper's library did).
        weights: a weight for each training image in the loss, (N,) float32; None for 1.
        offsets: logits of earlier members, (N, C) float32, that a new member adds to.
        targets: fit these outputs, (N, C) float32, by squared error instead of the labels.
        teacher: a teacher, or its logits on the training images as they are, (N, C) float32, for
            `Recipe.distill`; where that is above 0 and there is none, members learn from the
            ensemble that they form.
        keep_optimizer: keep Adam's moments in `Trained.optimizer`, for a job that goes on from
            there: its `start` may hold them.
        then: what follows the last epoch. ``outputs``: those on the training images, not augmented,
            in `Trained.training`; ``norms``: batch-norm statistics anew (`estimate_norms`).
        each: jobs of one member, one for each of `ids`, that are computed as one stack and each
            trained as if it were alone; what is said of data and seed above they say themselves.
    """

    name: str
    spec: EnsembleSpec
    ids: tuple[int, ...]
    recipe: Recipe
    seed: int
    start: State
    indices: np.ndarray | None = None
    resample: bool = False
    weights: np.ndarray | None = None
    offsets: np.ndarray | None = None
    targets: np.ndarray | None = None
    teacher: np.ndarray | Teacher | None = None
    keep_optimizer: bool = False
    then: Literal["", "outputs", "norms"] = ""
    each: tuple[Job, ...] = ()

    def digest(self, data: Dataset) -> str:
        """Hash of everything that the result depends on: parameters, data, start, code."""
        arrays = {k: v for k, v in vars(self).items() if isinstance(v, np.ndarray)}
        parts = [f"{k}:{_hash(v)}" for k, v in arrays.items()]
        parts += [f"{k}:{_hash(v.numpy())}" for k, v in sorted(self.start.items())]
        if isinstance(self.teacher, Teacher):
            parts += [f"{k}:{_hash(v.numpy())}" for k, v in sorted(self.teacher.state.items())]
            parts.append(repr(self.teacher.spec))
        plain = [
            self.name,
            asdict(self.spec),
            self.ids,
            asdict(self.recipe),
            self.seed,
            self.resample,
            self.keep_optimizer,
            self.then,
            [one.digest(data) for one in self.each],
        ]
        return digest(plain, parts, data.digest, _code(), _users_code(self.spec))


class Epoch(TypedDict):
    """What is known of a finished epoch; a job's history is a list of them.

    Losses are means over images, top1 is in percent. `time` is when the epoch ended, in seconds
    since 1970: an epoch that is told again after a resume is the same row. Where several processes
    train a job: how many `actors`, the share of time in their sums, waiting for slower ones
    included, and the bytes that one of them sent in a step.
    """

    epoch: int
    lr: float
    train_loss: float
    train_top1: float
    val_loss: float
    val_top1: float
    seconds: float
    images_per_s: float
    time: NotRequired[float]  # not in histories of earlier versions
    actors: NotRequired[float]
    exchange_share: NotRequired[float]
    sent_per_step: NotRequired[float]


History = list[Epoch]


@dataclass(frozen=True, eq=False)
class Trained:
    """What a job gives: canonical state of its members, its epochs, validation outputs (m, N, C).

    `optimizer` is empty unless `Job.keep_optimizer`; `training` are outputs on the training images
    (m, N, C) where `Job.then` asks for them.
    """

    job: Job
    state: State
    history: History
    outputs: np.ndarray
    optimizer: State = field(default_factory=dict)
    training: np.ndarray | None = None


def _hash(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def _code() -> str:
    """Hash of the rooms that decide what training computes, all of their files."""
    package = Path(__file__).parents[1]
    files = sorted(file for room in ROOMS for file in (package / room).rglob("*.py"))
    return digest([[file.relative_to(package).as_posix(), file.read_text()] for file in files])


def _users_code(spec: EnsembleSpec) -> list[str]:
    binarizer = spec.model.binarizer
    names = [spec.model.backbone]
    names += [binarizer.weight, binarizer.activation] if binarizer else []
    return modules.users_code(names)
