"""Data on its way into a step: on the device, in the order of an epoch, augmented, normalised.

Every random choice is drawn from a generator that is seeded by (seed, purpose, epoch): an epoch
depends on its number and on nothing that was drawn before.

Legend: `N` images of a split, `B` of a batch, `H W C` their height, width and channels.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from bnncore.data import Dataset, normalization
from bnncore.networks.ensemble import generator
from bnncore.params import Recipe
from bnncore.training.jobs import Job

ROWS = ("weights", "offsets", "targets", "teacher")  # a job's arrays with a row a training image


def uploaded(images: np.ndarray, device: torch.device) -> Tensor:
    """Images (N, H, W, C) on the device, uint8 (N, C, H, W); on the CPU a view, no copy."""
    with warnings.catch_warnings():
        # Arrays in an object store are read-only, and nothing here writes to them.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(images).to(device).permute(0, 3, 1, 2)


class Normalized:
    """A data set's normalisation on a device: uint8 (B, C, H, W) to float (B, C, H, W)."""

    def __init__(self, data: Dataset, device: torch.device):
        scale, shift = normalization(data.mean, data.std)
        self.scale = torch.from_numpy(scale).to(device)[:, None, None]
        self.shift = torch.from_numpy(shift).to(device)[:, None, None]

    def __call__(self, images: Tensor) -> Tensor:
        # NCHW: stock CPU batch norm is far less accurate in channels-last.
        return images.to(torch.get_default_dtype()).contiguous() * self.scale + self.shift


@dataclass(frozen=True, eq=False)
class Batch:
    """Images (B, C, H, W), normalised, labels (B,), and the rows of a job's arrays by their name
    (`ROWS`)."""

    x: Tensor
    y: Tensor
    extra: dict[str, Tensor]


class Feed:
    """The training images of a job on a device.

    Attributes:
        images: all of the training part, uint8 (N, C, H, W).
        labels: int64 (N,).
    """

    def __init__(self, job: Job, data: Dataset, device: torch.device, images: Tensor | None = None):
        self.job, self.device = job, device
        self.normalized = Normalized(data, device)
        self.images = uploaded(data.train.images, device) if images is None else images
        self.labels = torch.from_numpy(np.array(data.train.labels)).to(device)
        extra = {name: getattr(job, name) for name in ROWS}
        self.extra = {k: torch.from_numpy(v).to(device) for k, v in extra.items() if v is not None}

    def __len__(self) -> int:
        """How many images an epoch shows, before resampling."""
        return len(self.images) if self.job.indices is None else len(self.job.indices)

    def order(self, epoch: int) -> list[Tensor]:
        """Numbers of the training images of each step."""
        job = self.job
        order = torch.randperm(len(self), generator=generator("order", job.seed, epoch))
        if job.indices is not None:
            order = torch.from_numpy(job.indices)[order]
        batches = list(order.split(job.recipe.batch_size))
        if len(batches) > 1 and len(batches[-1]) == 1:
            # Batch norm cannot normalise over one value: a single last image joins the others.
            batches[-2:] = [torch.cat(batches[-2:])]
        if job.resample:
            rng = generator("resample", job.seed, *job.ids, epoch)
            picks = [_drawn(len(b), rng) for b in batches]
            batches = [b[draw] for b, draw in zip(batches, picks, strict=True)]
        return [b.to(self.device) for b in batches]

    def epoch(self, number: int, order: list[Tensor]) -> Iterator[Batch]:
        """The batches of an epoch in their `order`, augmented."""
        rng = generator("augment", self.job.seed, number, device=self.device)
        for at in order:
            images = augmented(self.images[at], self.job.recipe, rng)
            extra = {name: values[at] for name, values in self.extra.items()}
            yield Batch(self.normalized(images), self.labels[at], extra)

    def plain(self, epoch: int) -> Iterator[Tensor]:
        """The images (B, C, H, W) of an epoch's batches as they are, normalised."""
        for at in self.order(epoch):
            yield self.normalized(self.images[at])


def _drawn(count: int, rng: torch.Generator) -> Tensor:
    """The different ones of so many drawn with replacement; two at least, for batch norm."""
    while True:
        found = torch.randint(count, (count,), generator=rng).unique()
        if len(found) > 1 or count == 1:
            return found


class FeedOfEach(Feed):
    """Those of jobs that are trained apart: batches of all side by side, (B * m, C, H, W).

    Labels are (B, m), rows of the jobs' arrays (B, m, ..), an order's steps (m, B).
    """

    def __init__(self, job: Job, data: Dataset, device: torch.device):
        super().__init__(job, data, device)
        self.feeds = [Feed(one, data, device, self.images) for one in job.each]

    def __len__(self) -> int:
        return len(self.feeds[0])

    def order(self, epoch: int) -> list[Tensor]:
        orders = zip(*(feed.order(epoch) for feed in self.feeds), strict=True)
        return [torch.stack(batches) for batches in orders]

    def epoch(self, number: int, order: list[Tensor]) -> Iterator[Batch]:
        steps = [feed.epoch(number, [at[k] for at in order]) for k, feed in enumerate(self.feeds)]
        for batches in zip(*steps, strict=True):
            x = torch.stack([b.x for b in batches], 1).flatten(0, 1)
            extra = {k: torch.stack([b.extra[k] for b in batches], 1) for k in batches[0].extra}
            yield Batch(x, torch.stack([b.y for b in batches], 1), extra)


def augmented(images: Tensor, recipe: Recipe, rng: torch.Generator) -> Tensor:
    """Pad with zeros, crop and flip at random: a whole batch (B, C, H, W), on its device."""
    if recipe.augment == "none":
        return images
    b, _, h, w = images.shape
    pad = recipe.pad
    padded = F.pad(images, (pad, pad, pad, pad))
    top, left = torch.randint(2 * pad + 1, (2, b, 1), generator=rng, device=images.device)
    rows = top + torch.arange(h, device=images.device)
    columns = left + torch.arange(w, device=images.device)
    if recipe.augment == "crop_flip":
        flip = torch.rand(b, 1, generator=rng, device=images.device) < 0.5
        columns = torch.where(flip, columns.flip(1), columns)
    batch = torch.arange(b, device=images.device)[:, None, None]
    cropped = padded.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]]
    return cropped.permute(0, 3, 1, 2)
