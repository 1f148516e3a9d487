"""The training loop: one for FP32 networks, BNNs, single members and joint ensembles.

A `Job` says in plain data what is trained; a `Trainer` runs its epochs in one process, with all of
the job's members or, beside other processes, some of them; `drive` is the loop over epochs around a
trainer, with checkpoints. Training needs torch and numpy only: no Ray, MLflow or DVC.

A joint step costs one small sum. Members' outputs z_i (B, C) add up to the ensemble's logits, so
processes exchange their partial sums, detached; each takes dL/dz for itself and pushes it back
through its own members. Gradients of members stay local, and only shared trained parameters need
theirs summed. The split step is therefore exact, not approximate.

Every random choice is drawn from a generator that is seeded by (seed, purpose, member, epoch), so
an epoch depends on the state at its start and on nothing else: training resumed from a checkpoint
ends with the same bits.

Legend: `B` images, `C` classes, `M` members, `N` images of a split.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import inspect
import json
import logging
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from bnncore.data import Dataset, Split, normalization
from bnncore.networks.combine import TreeSum, tree_sum
from bnncore.networks.ensemble import Ensemble, EnsembleSpec, draws, generator
from bnncore.networks.imports import imported
from bnncore.networks.parts import Backbone
from bnncore.params import Recipe, digest
from bnncore.training import cheap

log = logging.getLogger(__name__)
State = dict[str, Tensor]
ROOMS = ("networks", "training")  # what their code computes, a checkpoint depends on


class TrainingError(RuntimeError):
    """Training cannot go on: a loss that is not finite, a checkpoint that is held or unreadable."""


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
        keep_optimizer: keep Adam's moments in `Trained.optimizer`, for a job that goes on from
            there: its `start` may hold them.
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
    keep_optimizer: bool = False

    def digest(self, data: Dataset) -> str:
        """Hash of everything that the result depends on: parameters, data, start, code."""
        arrays = {k: v for k, v in vars(self).items() if isinstance(v, np.ndarray)}
        parts = [f"{k}:{_hash(v)}" for k, v in arrays.items()]
        parts += [f"{k}:{_hash(v.numpy())}" for k, v in sorted(self.start.items())]
        plain = [
            self.name,
            asdict(self.spec),
            self.ids,
            asdict(self.recipe),
            self.seed,
            self.resample,
            self.keep_optimizer,
        ]
        return digest(plain, parts, data.digest, _code(), _users_code(self.spec))


def _hash(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def _code() -> str:
    """Hash of the rooms that decide what training computes, all of their files."""
    package = Path(__file__).parents[1]
    files = sorted(file for room in ROOMS for file in (package / room).rglob("*.py"))
    return digest([[file.relative_to(package).as_posix(), file.read_text()] for file in files])


def _users_code(spec: EnsembleSpec) -> list[str]:
    """The modules behind what parameters name as ``module:function``."""
    binarizer = spec.model.binarizer
    names = [spec.model.backbone]
    names += [binarizer.weight, binarizer.activation] if binarizer else []
    functions = [imported(name, "model") for name in names if ":" in name]
    return [Path(inspect.getfile(function)).read_text() for function in functions]


class Exchange(Protocol):
    """How the processes that train one job together add up: `rank` of `size`.

    Attributes:
        sent: bytes this rank has sent.
        seconds: time spent in sums, waiting for slower ranks included.
    """

    rank: int
    size: int
    sent: int
    seconds: float

    def sum(self, value: Tensor) -> Tensor:
        """Sum of `value` over the processes, in the order of their ranks; equal on all."""


class Alone:
    """The exchange of a single process."""

    rank = 0
    size = 1
    sent = 0
    seconds = 0.0

    def sum(self, value: Tensor) -> Tensor:
        return value


class Trainer:
    """Runs the epochs of a job in this process.

    Args:
        job: what to train.
        data: the whole data set.
        hold: the members of ``job.ids`` that this process holds; all by default.
        exchange: how to add up with the processes that hold the others.
        device: where to train; a GPU if there is one.
        replay: forward once without gradients, then forward and backward member by member:
            memory no longer grows with M, at about 1.4 times the time. None: where the estimate
            (`saved_bytes`) exceeds this process's share of the memory.
        shards: which of the ``recipe.shards`` parts of each batch this process takes; all by
            default.
        within: how to add up with the processes that take the other shards of the same members.
        memory_share: of the device's free memory that is this process's.
    """

    def __init__(
        self,
        job: Job,
        data: Dataset,
        hold: tuple[int, ...] | None = None,
        exchange: Exchange | None = None,
        device: str | torch.device | None = None,
        replay: bool | None = False,
        shards: tuple[int, ...] | None = None,
        within: Exchange | None = None,
        memory_share: float = 1.0,
    ):
        self.job = job
        self.exchange = exchange or Alone()
        self.within = within or Alone()
        self.shards = tuple(range(job.recipe.shards)) if shards is None else shards
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.ensemble = Ensemble(job.spec, hold or job.ids)
        self.ensemble.to(self.device)
        self.members = cast(list[Backbone], list(self.ensemble.members))
        self.trained = {n: p for n, p in self.ensemble.parameters_by_name() if p.requires_grad}
        # The bias of the classifier block is left out: its gradient is the same everywhere.
        self.shared = [
            p for n, p in self.trained.items() if n.startswith("shared.") and n != "shared.bias"
        ]
        self.own = [
            [p for n, p in self.trained.items() if n.startswith(f"{i}.")] for i in self.ensemble.ids
        ]
        recipe = job.recipe
        self.optimizer = torch.optim.Adam(
            self.trained.values(),
            lr=recipe.lr,
            betas=recipe.betas,
            weight_decay=recipe.weight_decay,
        )
        self.load(job.start)
        scale, shift = normalization(data.mean, data.std)
        self.scale = torch.from_numpy(scale).to(self.device)[:, None, None]
        self.shift = torch.from_numpy(shift).to(self.device)[:, None, None]
        self.images = self.uploaded(data.train)
        self.labels = torch.from_numpy(np.array(data.train.labels)).to(self.device)
        self.val_images = self.uploaded(data.val)
        self._reset_watch()
        layers = [m for m in self.ensemble.modules() if isinstance(m, torch.nn.Conv2d)]
        self._narrow = any(m.out_channels < 8 for m in layers)
        extra = {"weights": job.weights, "offsets": job.offsets, "targets": job.targets}
        self.extra = {
            k: torch.from_numpy(v).to(self.device) for k, v in extra.items() if v is not None
        }
        self._tentacle: cheap.Tentacle = Backbone.tentacle
        if self._worth_compiling():
            self._tentacle = cheap.compiled(self.ensemble)
        elif self.device.type == "cpu":
            cheap.make(self.ensemble)
        self._sides: dict[int, _Side] = {}
        self._seed_dropout(0)
        self.replay = self._must_replay(memory_share) if replay is None else replay
        if self.device.type == "cpu":
            cheap.freed_memory(keep=not self.replay)

    def _worth_compiling(self) -> bool:
        recipe = self.job.recipe
        if recipe.compile != "auto":
            return recipe.compile == "always"
        images = len(self.images) if self.job.indices is None else len(self.job.indices)
        work = cheap.operations(self.job.spec.model) * images * recipe.epochs * len(self.job.ids)
        worth = work >= cheap.WORTH_COMPILING[self.device.type]
        return worth and cheap.can_compile(self.device)

    def saved_bytes(self, images: int, sample: int = 2) -> int:
        """Estimate of what autograd keeps in a step on so many images; measured on a few."""
        if not len(self.images):
            return 0
        self.ensemble.train()
        kept = []
        for count in (sample, 2 * sample):
            at = torch.arange(count, device=self.device) % len(self.images)
            with _undisturbed(self.ensemble, everything=True), cheap.Saved(self.ensemble) as saved:
                outputs = self.ensemble.outputs(self._normalized(self.images[at]))
            del outputs
            kept.append(saved.bytes)
        # Filters, for one, do not grow with the batch.
        each = (kept[1] - kept[0]) / sample
        return int(kept[0] + each * (images - sample))

    def _must_replay(self, share: float) -> bool:
        if len(self.members) == 1:
            return False
        images = math.ceil(self.job.recipe.batch_size / self.job.recipe.shards) * len(self.shards)
        need, free = self.saved_bytes(images), int(share * cheap.memory(self.device))
        replay = need > free
        log.log(
            logging.WARNING if replay else logging.INFO,
            "%s: a step keeps about %.2f GiB for %d members, %.2f GiB are free: %s",
            self.job.name,
            need / 2**30,
            len(self.members),
            free / 2**30,
            "members are replayed one by one" if replay else "no replay",
        )
        return replay

    # -- one epoch -------------------------------------------------------------------------

    def epoch(self, history: list[dict[str, Any]]) -> tuple[dict[str, float], np.ndarray]:
        """Train the epoch that follows `history`.

        Returns:
            Sums over the epoch (``loss``, ``correct``, ``images``, ``steps``, ``seconds``, and the
            exchange's ``sent`` bytes and ``waited`` seconds), and the outputs of the held members
            on the validation images, (m, N, C) float32.

        Raises:
            TrainingError: the loss is not finite; names the job, the epoch and the step.
        """
        started = time.perf_counter()
        sent, waited = self._exchanged()
        number, recipe = len(history), self.job.recipe
        batches = self._batches(number)
        augment = generator("augment", self.job.seed, number, device=self.device)
        self._seed_dropout(number)
        self.ensemble.train()
        self._reset_watch()
        loss_sum = torch.zeros((), device=self.device)
        correct = torch.zeros((), device=self.device)
        for step, at in enumerate(batches):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(
                    recipe, history, (number + step / len(batches)) / recipe.epochs
                )
            x = self._normalized(augmented(self.images[at], recipe, augment))
            loss, logits = self.step(x, self.labels[at], {k: v[at] for k, v in self.extra.items()})
            self.optimizer.step()
            loss_sum += loss.detach() * len(at)
            correct += (logits.argmax(1) == self.labels[at]).sum()
        self._mean_norms()
        total = float(loss_sum)
        if not math.isfinite(total):
            raise self._not_finite(total, number + 1)
        outputs = self.validation_outputs()
        sums = {
            "loss": total,
            "correct": float(correct),
            "images": float(sum(map(len, batches))),
            "steps": float(len(batches)),
            "sent": float(self._exchanged()[0] - sent),
            "waited": self._exchanged()[1] - waited,
            "seconds": time.perf_counter() - started,
        }
        return sums, outputs

    def _exchanged(self) -> tuple[int, float]:
        both = (self.exchange, self.within)
        return sum(e.sent for e in both), sum(e.seconds for e in both)

    def step(self, x: Tensor, y: Tensor, extra: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Gradients of one batch, left in ``.grad``; returns the loss and the logits (B, C)."""
        enabled = torch.backends.mkldnn.enabled
        if self._narrow:
            # oneDNN's AVX2 convolutions (torch 2.13) write past a buffer's end when they are
            # trained with fewer than 8 channels: the heap is corrupted some steps later.
            torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
        try:
            return self._step(x, y, extra)
        finally:
            torch.backends.mkldnn.enabled = enabled

    def _step(self, x: Tensor, y: Tensor, extra: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        self.optimizer.zero_grad(set_to_none=True)
        scale = 1.0 if self.job.spec.combine == "sum" else 1.0 / len(self.job.ids)
        passes = [self._forward(shard, rows, x) for shard, rows in self._rows(len(x))]
        outputs = [
            self._whole([p.outputs[k].detach() for p in passes], passes, len(x))
            for k in range(len(self.members))
        ]
        self._watch(outputs)
        grads, loss, logits = self._objective(outputs, y, extra, scale)
        # Trees of one gradient a member and shard: bits do not depend on who holds what.
        shared = TreeSum()
        for k, (member, grad) in enumerate(zip(self.members, grads, strict=True)):
            own = TreeSum()
            for p in passes:
                if len(p.rows):
                    z = p.outputs[k]
                    if self.replay:
                        self._enter(p.shard)
                        z = self.ensemble.rest(member, p.leaf, self._tentacle)
                    z.backward(grad[p.rows] if self._cut else grad)
                    if p.leaf.grad is not None:
                        p.h.backward(p.leaf.grad, retain_graph=True)
                        p.leaf.grad = None
                if self.shared:
                    shared.add(_taken(self.shared))
                if self._cut:
                    own.add(_taken(self.own[k]))
            if self._cut:
                _given(self.own[k], self.within.sum(own.value()))
        if self.shared:
            _given(self.shared, self.exchange.sum(shared.value()))
        return loss, logits

    @property
    def _cut(self) -> bool:
        return self.job.recipe.shards > 1

    def _enter(self, shard: int) -> None:
        if self._cut:
            self._sides[shard].enter()

    def _rows(self, count: int) -> list[tuple[int, Tensor]]:
        """This process's shards of a batch: (shard, numbers of its images)."""
        rows = torch.arange(count, device=self.device)
        shards = self.job.recipe.shards
        # Batch norm needs two images; what remains of a short batch goes to the first shards.
        parts = list(rows.tensor_split(max(1, min(shards, count // 2))))
        parts += [rows[:0]] * (shards - len(parts))
        return [(shard, parts[shard]) for shard in self.shards]

    def _forward(self, shard: int, rows: Tensor, x: Tensor) -> _Pass:
        self._enter(shard)
        h = x[rows] if self._cut else x
        if not len(rows):
            none = h.new_zeros(0, self.job.spec.model.classes)
            return _Pass(shard, rows, h, h, [none] * len(self.members))
        for module in self.ensemble.prefix():
            h = module(h)
        # Members push their gradients into this leaf.
        leaf = h.detach().requires_grad_(h.requires_grad)
        with _replayed(self.ensemble) if self.replay else contextlib.nullcontext():
            outputs = [self.ensemble.rest(m, leaf, self._tentacle) for m in self.members]
        return _Pass(shard, rows, h, leaf, outputs)

    def _whole(self, parts: list[Tensor], passes: list[_Pass], count: int) -> Tensor:
        """A member's outputs (B, C), zero where other processes take the images."""
        if not self._cut:
            return parts[0]
        whole = parts[0].new_zeros(count, parts[0].shape[1])
        for part, p in zip(parts, passes, strict=True):
            whole[p.rows] = part
        return whole

    def _mean_norms(self) -> None:
        """Give all shards the mean of their batch-norm statistics."""
        sides = list(self._sides.values())
        if not sides or not sides[0].norms:
            return
        total = self.within.sum(tree_sum([side.flat() for side in sides]))
        for side in sides:
            side.fill(total / self.job.recipe.shards)
        sides[0].enter()

    def _objective(self, outputs: list[Tensor], y, extra, scale: float):
        """dL/dz of each held member, the loss and the logits.

        The loss is the cross entropy of the combined logits, ``scale * sum(z_i) (+ bias)``; with
        `Recipe.prefixes` it is the mean of that over the first 1..M members.
        """
        bias = self.ensemble.bias
        if not self.job.recipe.prefixes:
            total = self.exchange.sum(tree_sum(outputs)).requires_grad_()
            logits = scale * total
            logits = logits if bias is None else logits + bias
            loss = self._loss(logits, y, extra)
            loss.backward()
            return [total.grad] * len(outputs), loss, logits.detach()
        # Every process needs all outputs here; each fills in its own.
        slots = torch.zeros((len(self.job.ids), *outputs[0].shape), device=self.device)
        mine = [self.job.ids.index(i) for i in self.ensemble.ids]
        for k, z in zip(mine, outputs, strict=True):
            slots[k] = z
        slots = self.exchange.sum(slots).requires_grad_()
        sums = slots.cumsum(0)
        if self.job.spec.combine != "sum":
            sums = sums / torch.arange(1, len(slots) + 1, device=self.device)[:, None, None]
        sums = sums if bias is None else sums + bias
        loss = torch.stack([self._loss(z, y, extra) for z in sums]).mean()
        loss.backward()
        assert slots.grad is not None
        return [slots.grad[k] for k in mine], loss, sums[-1].detach()

    def _loss(self, logits: Tensor, y: Tensor, extra: dict[str, Tensor]) -> Tensor:
        """Mean over the batch of each image's loss times its weight."""
        if "targets" in extra:
            losses = (logits - extra["targets"]).square().sum(1)
        else:
            logits = logits + extra["offsets"] if "offsets" in extra else logits
            losses = F.cross_entropy(logits, y, reduction="none")
        return (losses * extra["weights"] if "weights" in extra else losses).mean()

    def _reset_watch(self) -> None:
        held = len(self.ensemble.ids)
        self._finite = torch.ones(held, dtype=torch.bool, device=self.device)
        self._finite_steps = torch.zeros(held, dtype=torch.int64, device=self.device)

    def _watch(self, outputs: list[Tensor]) -> None:
        """Count, for each held member, the steps before its outputs were first not finite."""
        self._finite &= torch.stack(outputs).isfinite().all(2).all(1)
        self._finite_steps += self._finite

    def _not_finite(self, total: float, epoch: int) -> TrainingError:
        steps = torch.zeros(len(self.job.ids), device=self.device)
        for i, n in zip(self.ensemble.ids, self._finite_steps, strict=True):
            steps[self.job.ids.index(i)] = n
        steps = self.exchange.sum(steps) / self.within.size
        first = steps.min()
        members = [i for i, n in zip(self.job.ids, steps, strict=True) if n == first]
        return TrainingError(
            f"{self.job.name}: the loss of epoch {epoch} is {total}; expected a finite number. "
            f"Outputs were first not finite after step {int(first)}, of member(s) "
            f"{', '.join(map(str, members))}. The last good epoch is kept; try a lower lr than "
            f"{self.job.recipe.lr}"
        )

    # -- data and randomness ---------------------------------------------------------------

    def _batches(self, epoch: int) -> list[Tensor]:
        """Numbers of the training images of each step."""
        job, size = self.job, self.job.recipe.batch_size
        n = len(self.images) if job.indices is None else len(job.indices)
        order = torch.randperm(n, generator=generator("order", job.seed, epoch))
        if job.indices is not None:
            order = torch.from_numpy(job.indices)[order]
        batches = list(order.split(size))
        if len(batches) > 1 and len(batches[-1]) == 1:
            # Batch norm cannot normalise over one value: a single last image joins the others.
            batches[-2:] = [torch.cat(batches[-2:])]
        if job.resample:
            rng = generator("resample", job.seed, *job.ids, epoch)
            picks = [torch.randint(len(b), (len(b),), generator=rng).unique() for b in batches]
            batches = [b[draw] for b, draw in zip(batches, picks, strict=True)]
        return [b.to(self.device) for b in batches]

    def _seed_dropout(self, epoch: int) -> None:
        for i, member in zip(self.ensemble.ids, self.members, strict=True):
            for name, module in member.named_modules():
                if draws(module):
                    keys = ("dropout", self.job.seed, i, name, epoch)
                    module.generator = generator(*keys, device=self.device)
        self._sides = {}
        for shard in self.shards if self._cut else ():
            self._sides[shard] = _Side(self.ensemble, (self.job.seed, epoch, shard))

    def uploaded(self, split: Split) -> Tensor:
        """The images of a split on the device, uint8 (N, C, H, W); on the CPU a view, no copy."""
        with warnings.catch_warnings():
            # Arrays in an object store are read-only, and nothing here writes to them.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            images = torch.from_numpy(split.images)
        return images.to(self.device).permute(0, 3, 1, 2)

    def _normalized(self, images: Tensor) -> Tensor:
        # NCHW: stock CPU batch norm is far less accurate in channels-last.
        return images.float().contiguous() * self.scale + self.shift

    @torch.no_grad()
    def outputs(self, images: Tensor, batch: int = 512) -> np.ndarray:
        """Outputs of the held members in evaluation mode: uint8 (N, C, H, W) to (m, N, classes)."""
        self.ensemble.eval()
        parts = []
        for part in images.split(batch):
            parts.append(torch.stack(self.ensemble.outputs(self._normalized(part))))
        return torch.cat(parts, dim=1).cpu().numpy()

    def validation_outputs(self) -> np.ndarray:
        """`outputs` on the validation images."""
        return self.outputs(self.val_images)

    @torch.no_grad()
    def estimate_norms(self) -> None:
        """Batch-norm statistics of the held members anew: means of those of each training batch.

        One pass over the training images as they are, in an order drawn once; dropout is off.
        """
        self.ensemble.eval()
        norms = [m for m in self.ensemble.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # torch's word for the plain mean
            norm.train()
        for at in self._batches(0):
            self.ensemble.outputs(self._normalized(self.images[at]))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()

    def bias(self) -> Tensor | None:
        """The classifier block's bias (C,), if there is one."""
        return None if self.ensemble.bias is None else self.ensemble.bias.detach().cpu()

    # -- state -----------------------------------------------------------------------------

    def state(self) -> State:
        """Weights and optimizer by canonical names, on the CPU: enough to go on from here."""
        state = self.ensemble.state()
        for name, p in self.trained.items():
            for key, value in self.optimizer.state.get(p, {}).items():
                state[f"adam.{key}:{name}"] = value.detach().cpu().clone()
        return state

    def load(self, state: State) -> None:
        """The inverse of `state`; takes what concerns the held members from the state of all."""
        self.ensemble.load(state)
        cheap.binarize_frozen(self.ensemble)
        for name, p in self.trained.items():
            keys = ("step", "exp_avg", "exp_avg_sq")
            found = {k: state[f"adam.{k}:{name}"] for k in keys if f"adam.{k}:{name}" in state}
            if found:
                moved = {k: v.clone() if k == "step" else v.to(p.device) for k, v in found.items()}
                self.optimizer.state[p] = moved


@dataclass(eq=False)
class _Pass:
    """One shard's way through the network: images, shared prefix, each member's outputs."""

    shard: int
    rows: Tensor
    h: Tensor
    leaf: Tensor
    outputs: list[Tensor]


class _Side:
    """What each shard has for itself in an epoch: batch-norm statistics and random generators.

    `enter` puts them into the network's modules; no numbers are copied.
    """

    def __init__(self, ensemble: Ensemble, seed: tuple[int, ...]):
        norms = [m for m in ensemble.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        self.norms = [(m, {k: v.clone() for k, v in m.named_buffers()}) for m in norms]
        self.generators: list[tuple[Any, torch.Generator]] = []
        for i, member in zip(ensemble.ids, ensemble.members, strict=True):
            for name, module in member.named_modules():
                if draws(module):
                    device = next(member.parameters()).device
                    rng = generator("dropout of a shard", *seed, i, name, device=device)
                    self.generators.append((module, rng))

    def enter(self) -> None:
        for norm, own in self.norms:
            norm._buffers.update(own)
        for module, rng in self.generators:
            module.generator = rng

    def flat(self) -> Tensor:
        """Running means and variances, one after another."""
        return torch.cat([own[k] for _, own in self.norms for k in _RUNNING])

    def fill(self, values: Tensor) -> None:
        found = [own[k] for _, own in self.norms for k in _RUNNING]
        for buffer, part in zip(found, values.split([b.numel() for b in found]), strict=True):
            buffer.copy_(part)


_RUNNING = ("running_mean", "running_var")


def _taken(parameters: list[torch.nn.Parameter]) -> Tensor:
    """Their gradients, one after another; none are left."""
    parts = []
    for p in parameters:
        parts.append(torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten())
        p.grad = None
    return torch.cat(parts)


def _given(parameters: list[torch.nn.Parameter], flat: Tensor) -> None:
    """The inverse of `_taken`."""
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = part.view_as(p)


class _undisturbed:
    """Batch-norm statistics and generators are left as they were on entering.

    Those of `Ensemble.prefix` only with `everything`: in a step it runs once, outside of this, and
    its statistics must not be touched before it has been run back.
    """

    def __init__(self, ensemble: Ensemble, everything: bool = False):
        self.ensemble, self.everything = ensemble, everything

    def __enter__(self):
        left = [] if self.everything else self.ensemble.prefix()
        prefix = {id(b) for module in left for b in module.buffers()}
        buffers = [b for m in self.ensemble.members for b in m.buffers() if id(b) not in prefix]
        self.buffers = [(b, b.clone()) for b in buffers]
        self.generators = [
            (rng, rng.get_state())
            for m in self.ensemble.modules()
            if draws(m) and isinstance(rng := m.generator, torch.Generator)
        ]

    def __exit__(self, *error):
        with torch.no_grad():
            for buffer, value in self.buffers:
                buffer.copy_(value)
        for rng, value in self.generators:
            rng.set_state(value)


@contextlib.contextmanager
def _replayed(ensemble: Ensemble) -> Iterator[None]:
    with torch.no_grad(), _undisturbed(ensemble):
        yield


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


def learning_rate(recipe: Recipe, history: list[dict[str, Any]], done: float) -> float:
    """The learning rate when the fraction `done` of all steps has been taken."""
    if recipe.schedule == "poly":
        return recipe.lr * (1 - math.floor(done * recipe.epochs + 1e-9) / recipe.epochs)
    if recipe.schedule == "linear":
        return recipe.lr * (1 - done)
    if recipe.schedule == "cosine":
        return recipe.lr * 0.5 * (1 + math.cos(math.pi * done))
    if recipe.schedule == "plateau":
        rate, best, waited = recipe.lr, math.inf, 0
        for epoch in history:
            waited = 0 if epoch["val_loss"] < best else waited + 1
            best = min(best, epoch["val_loss"])
            if waited >= recipe.patience:
                rate, waited = rate * 0.1, 0
        return rate
    return recipe.lr


# -- the loop over epochs --------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Trained:
    """What a job gives: canonical state of its members, a dict an epoch, validation outputs.

    `optimizer` is empty unless `Job.keep_optimizer`.
    """

    job: Job
    state: State
    history: list[dict[str, Any]]
    outputs: np.ndarray
    optimizer: State = field(default_factory=dict)


class Checkpoint:
    """The last finished epoch of one job, in a folder of its own.

    A folder is keyed by the job's digest, so that changed parameters, data or code start anew. One
    writer holds it at a time. Files are replaced whole: a crash leaves the previous one.

    Raises:
        TrainingError: another process holds the folder; or the file cannot be read.
    """

    def __init__(self, folder: Path, key: str):
        self.folder = folder / key
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / "state.safetensors"
        self._lock = open(self.folder / "lock", "w")  # noqa: SIM115
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise TrainingError(
                f"{self.folder}: expected to be the only writer, but another process holds this "
                "checkpoint; end it (is an earlier run still going?) and start again"
            ) from None

    def load(self) -> tuple[State, list[dict[str, Any]]] | None:
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                history = json.loads(file.metadata()["history"])
                return {name: file.get_tensor(name) for name in file.keys()}, history  # noqa: SIM118
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise TrainingError(
                f"{self.path}: expected a checkpoint, got an unreadable file ({error}); nothing "
                "was overwritten: move it away to start this job anew"
            ) from error

    def save(self, state: State, history: list[dict[str, Any]]) -> None:
        temporary = self.path.with_suffix(".new")
        state = {name: value.contiguous() for name, value in state.items()}
        try:
            save_file(state, temporary, {"history": json.dumps(history)})
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
        except (SafetensorError, OSError) as error:
            temporary.unlink(missing_ok=True)
            raise TrainingError(f"{self.path}: cannot write the checkpoint: {error}") from error

    def close(self, remove: bool = False) -> None:
        if remove:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()


@contextlib.contextmanager
def resumable(folder: Path) -> Iterator[Path]:
    """A folder for the checkpoints of one stage, removed when the stage's work is written."""
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def drive(
    job: Job,
    data: Dataset,
    trainer: Any,
    checkpoint: Checkpoint | None = None,
    on_epoch: Callable[[Job, dict[str, Any]], None] | None = None,
) -> Trained:
    """Run a job's epochs on `trainer`, going on from its checkpoint if there is one.

    Args:
        trainer: a `Trainer`, or anything with its `epoch`, `state` and `load`.
        on_epoch: called with each finished epoch: ``epoch, lr, train_loss, train_top1, val_loss,
            val_top1`` (top1 in percent), ``seconds``, ``images_per_s``; where several processes
            train the job, also ``actors``, ``exchange_share`` (of the time, waiting for slower ones
            included) and ``sent_per_step`` (bytes, one actor's).
    """
    history: list[dict[str, Any]] = []
    found = checkpoint.load() if checkpoint else None
    if found:
        state, history = found
        trainer.load(state)
        for epoch in history:
            if on_epoch:
                on_epoch(job, epoch)
    outputs = None
    while len(history) < job.recipe.epochs:
        sums, outputs = trainer.epoch(history)
        number = len(history)
        lr = learning_rate(job.recipe, history, number / job.recipe.epochs)
        loss, top1 = validation(job, outputs, data.val.labels, trainer)
        epoch = {
            "epoch": number + 1,
            "lr": lr,
            "train_loss": sums["loss"] / sums["images"],
            "train_top1": 100 * sums["correct"] / sums["images"],
            "val_loss": loss,
            "val_top1": top1,
            "seconds": sums["seconds"],
            "images_per_s": sums["images"] / sums["seconds"],
        }
        if sums["sent"]:
            epoch["actors"] = sums.get("actors", 1)
            epoch["exchange_share"] = sums["waited"] / sums["seconds"]
            epoch["sent_per_step"] = sums["sent"] / sums["steps"]
        history.append(epoch)
        if checkpoint:
            checkpoint.save(trainer.state(), history)
        if on_epoch:
            on_epoch(job, epoch)
    if outputs is None:
        outputs = trainer.validation_outputs()
    entries = trainer.state()
    state = {n: v for n, v in entries.items() if not n.startswith("adam.")}
    optimizer = {n: v for n, v in entries.items() if n.startswith("adam.")}
    return Trained(job, state, history, outputs, optimizer if job.keep_optimizer else {})


def validation(job: Job, outputs: np.ndarray, labels: np.ndarray, trainer) -> tuple[float, float]:
    """Mean cross entropy and top-1 in percent of the members together on the validation part."""
    z = torch.from_numpy(outputs)
    total = tree_sum(list(z))
    logits = total if job.spec.combine == "sum" else total / len(z)
    bias = trainer.bias()
    logits = logits if bias is None else logits + bias
    y = torch.from_numpy(np.asarray(labels))
    return float(F.cross_entropy(logits, y)), 100 * float((logits.argmax(1) == y).float().mean())


def train_many(
    jobs: list[Job],
    data: Dataset,
    checkpoints: Path | None = None,
    on_epoch: Callable[[Job, dict[str, Any]], None] | None = None,
    threads: int = 1,
    replay: bool | None = None,
) -> list[Trained]:
    """Train jobs one after another in this process; `actors.Cluster` spreads them out.

    One thread is the default because small layers gain nothing from a second one, lose much beside
    other busy processes, and give bits that do not depend on the machine's number of cores.
    """
    torch.set_num_threads(threads)
    results = []
    for job in jobs:
        checkpoint = (
            Checkpoint(checkpoints, f"{job.name}-{job.digest(data)}") if checkpoints else None
        )
        try:
            trainer = Trainer(job, data, replay=replay)
            results.append(drive(job, data, trainer, checkpoint, on_epoch))
        finally:
            if checkpoint:
                checkpoint.close()
    return results
