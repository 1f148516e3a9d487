"""The training loop: one for FP32 networks, BNNs, single members and joint ensembles.

A `Trainer` runs the epochs of a `Job` in one process, with all of the job's members or, beside
other processes, some of them; `drive` is the loop over epochs around a trainer, with checkpoints.
Training needs torch and numpy only: no Ray, MLflow or DVC.

Every random choice is drawn from a generator that is seeded by (seed, purpose, member, epoch), so
an epoch depends on the state at its start and on nothing else: training resumed from a checkpoint
ends with the same bits.

Legend: `C` classes, `M` members, `m` of them held by a process, `N` images of a split.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from bnncore.data import Dataset
from bnncore.networks import binarize
from bnncore.networks.combine import tree_sum
from bnncore.networks.ensemble import Ensemble
from bnncore.training import devices, inference, layers, memory, stack
from bnncore.training.checkpoint import Checkpoint
from bnncore.training.devices import ALONE, Place
from bnncore.training.feed import Batch, Feed, FeedOfEach, uploaded
from bnncore.training.jobs import Epoch, History, Job, State, Teacher, Trained, TrainingError
from bnncore.training.schedule import learning_rate, phase
from bnncore.training.step import Alone, Exchange, Step
from bnncore.training.watch import require_finite

log = logging.getLogger(__name__)
Sums = dict[str, float]
OnEpoch = Callable[[Job, Epoch], None]
OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what Adam knows of a parameter


class Trains(Protocol):
    """What `drive` asks of a trainer: a `Trainer`, or several behind one face."""

    def epoch(self, history: History) -> tuple[Sums, np.ndarray]: ...
    def validation_outputs(self) -> np.ndarray: ...
    def bias(self) -> Tensor | None: ...
    def after(self) -> np.ndarray | None: ...
    def state(self) -> State: ...
    def load(self, state: State) -> None: ...


class Trainer:
    """Runs the epochs of a job in this process.

    Args:
        job: what to train.
        data: the whole data set.
        hold: the members of ``job.ids`` that this process holds; all by default.
        exchange: how to add up with the processes that hold the others.
        device: where to train.
        replay: forward once without gradients, then forward and backward member by member (stack
            by stack): memory no longer grows with M, at about 1.7 times the time. None: where the
            estimate (`memory.saved_bytes`) exceeds this process's share of the memory, or a first
            step runs out of it; members are not stacked then.
        shards: which of the ``recipe.shards`` parts of each batch this process takes; all by
            default.
        within: how to add up with the processes that take the other shards of the same members.
        memory_share: of the device's free memory that is this process's.

    Raises:
        TrainingError: the job's start holds numbers that are not finite; names them.
    """

    def __init__(
        self,
        job: Job,
        data: Dataset,
        hold: tuple[int, ...] | None = None,
        exchange: Exchange | None = None,
        device: str | torch.device = "cpu",
        replay: bool | None = False,
        shards: tuple[int, ...] | None = None,
        within: Exchange | None = None,
        memory_share: float = 1.0,
    ):
        self.device = torch.device(device)
        if isinstance(job.teacher, Teacher):
            told = inference.teacher_logits(job.teacher, data, self.device)
            job = replace(
                job, teacher=told, each=tuple(replace(one, teacher=told) for one in job.each)
            )
        self.job = job
        devices.prepare(self.device, job.recipe.deterministic)
        self.feed = (FeedOfEach if job.each else Feed)(job, data, self.device)
        self.val_images = uploaded(data.val.images, self.device)
        self._hold = hold or job.ids
        self._shards = tuple(range(job.recipe.shards)) if shards is None else shards
        self._exchanges = exchange or Alone(), within or Alone()
        self._may_replay = replay is None
        self._stepped = False
        self._build(
            stack.size(job.recipe, job.spec.model, self.device.type), bool(replay), job.start
        )
        if replay is None and self._must_replay(memory_share):
            self._build(1, True, job.start)

    def _build(self, size: int, replay: bool, state: State) -> None:
        """The network, its step and its optimizer, with members in stacks of `size`."""
        job, recipe = self.job, self.job.recipe
        self.ensemble = Ensemble(job.spec, self._hold).to(self.device)
        self.step = Step(job, self.ensemble, self._shards, *self._exchanges, replay, size)
        self.optimizer = OPTIMIZERS[recipe.optimizer](
            [parameter for parameter, _ in self.step.leaves],
            lr=recipe.lr,
            betas=recipe.betas,
            weight_decay=recipe.weight_decay,
        )
        self.load(state)
        passes = len(self.feed) * recipe.epochs * len(job.ids)
        if layers.worth_compiling(job, passes, self.device):
            images = recipe.batch_size // recipe.shards
            images *= len(self.step.units[0].ids) if job.each else 1  # what a unit sees at a time
            what = (job.spec, size, images, bool(job.each), recipe.two_step, self.device)
            self.step.run = layers.compiled(self.ensemble, images, what)
        else:
            for module in self.step.modules:
                layers.make_cheap(module, self.device.type)
        self.step.begin(0)
        if self.device.type == "cpu":
            memory.freed_memory(keep=not replay)

    def saved_bytes(self, images: int, sample: int = 2) -> int:
        """Estimate of what autograd keeps in a step on so many images; measured on a few."""
        at = torch.arange(2 * sample, device=self.device) % len(self.feed.images)
        x = self.feed.normalized(self.feed.images[at])
        if self.job.each:
            x = x.repeat_interleave(len(self.job.ids), 0)
        network = torch.nn.ModuleList(self.step.modules)
        return memory.saved_bytes(network, self.step.forward, x, images)

    def _must_replay(self, share: float) -> bool:
        held, recipe = len(self.ensemble.ids), self.job.recipe
        if held == 1:
            return False
        images = math.ceil(recipe.batch_size / recipe.shards) * len(self.step.shards)
        images *= max(1, len(self.job.each))
        need, free = self.saved_bytes(images), int(share * memory.available(self.device))
        replay = need > free
        log.log(
            logging.WARNING if replay else logging.INFO,
            "%s: a step keeps about %.2f GiB for %d members, %.2f GiB are free: %s",
            self.job.name,
            need / 2**30,
            held,
            free / 2**30,
            "members are replayed one by one" if replay else "no replay",
        )
        return replay

    def epoch(self, history: History) -> tuple[Sums, np.ndarray]:
        """Train the epoch that follows `history`.

        Returns:
            Sums over the epoch (``loss``, ``correct``, ``images``, ``steps``, ``seconds``, and the
            exchange's ``sent`` bytes and ``waited`` seconds), and the outputs of the held members
            on the validation images, (m, N, C) float32.

        Raises:
            TrainingError: the loss, an output, a parameter or a moment is not finite; names the
                job, the epoch and what it is.
        """
        started = time.perf_counter()
        sent, waited = self.step.exchanged()
        number, recipe = len(history), self.job.recipe
        order = self.feed.order(number)
        self._begin(number)
        loss_sum = torch.zeros((), device=self.device)
        correct = torch.zeros((), device=self.device)
        for step, batch in enumerate(self.feed.epoch(number, order)):
            done = (number + step / len(order)) / recipe.epochs
            loss, logits = self._gradients(batch, number)
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(recipe, history, done)
            self.optimizer.step()
            loss_sum += loss.detach() * len(batch.y)
            correct += (logits.argmax(-1) == batch.y).sum()
        self.step.end()
        total = float(loss_sum)
        if not math.isfinite(total):
            raise self._diverged(total, number + 1)
        self._require_finite(f"epoch {number + 1}")
        outputs = self.validation_outputs()
        now = self.step.exchanged()
        sums = {
            "loss": total,
            "correct": float(correct) / max(1, len(self.job.each)),
            "images": float(sum(at.shape[-1] for at in order)),
            "steps": float(len(order)),
            "sent": float(now[0] - sent),
            "waited": now[1] - waited,
            "seconds": time.perf_counter() - started,
        }
        return sums, outputs

    def _begin(self, epoch: int) -> None:
        """Make the network ready for an epoch."""
        first, _ = phase(self.job.recipe, epoch)
        binarize.real_weights(self.ensemble, self.job.recipe.two_step and first == 0)
        self.step.begin(epoch)
        self.ensemble.train()

    def _gradients(self, batch: Batch, epoch: int) -> tuple[Tensor, Tensor]:
        """A step. Where the very first runs out of memory, it is taken again with replay."""
        if self._stepped or not self._may_replay or self.step.replay:
            return self.step(batch.x, batch.y, batch.extra)
        sent = self.step.exchanged()[0]
        undisturbed = memory.Undisturbed(self.step.modules)
        undisturbed.__enter__()
        try:
            found = self.step(batch.x, batch.y, batch.extra)
        except torch.OutOfMemoryError as error:
            if self.step.exchanged()[0] != sent:  # others would not sum up a second time
                raise
            told = str(error).partition("\n")[0]
        else:
            self._stepped = True
            return found
        undisturbed.__exit__()
        log.warning("%s: %s: members are replayed one by one", self.job.name, told)
        self._build(1, True, {k: v.detach().cpu().clone() for k, v in self._entries().items()})
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self._begin(epoch)
        return self.step(batch.x, batch.y, batch.extra)

    def _diverged(self, total: float, epoch: int) -> TrainingError:
        first, members = self.step.first_not_finite()
        return TrainingError(
            f"{self.job.name}: the loss of epoch {epoch} is {total}; expected a finite number. "
            f"Outputs were first not finite after step {first}, of member(s) "
            f"{', '.join(map(str, members))}{self._advice}"
        )

    def _require_finite(self, when: str) -> None:
        entries = {n: v for n, v in self._entries().items() if not n.startswith("adam.step:")}
        require_finite(entries, f"{self.job.name}: {when}", self._advice)

    @property
    def _advice(self) -> str:
        return f". The last good epoch is kept; try a lower lr than {self.job.recipe.lr}"

    def validation_outputs(self) -> np.ndarray:
        """Outputs of the held members on the validation images, in evaluation mode: (m, N, C).

        Raises:
            TrainingError: they are not finite; names members.
        """
        outputs = inference.outputs(self.ensemble, self.val_images, self.feed.normalized)
        self._require_finite_outputs("validation", outputs)
        return outputs

    def _require_finite_outputs(self, part: str, outputs: np.ndarray) -> None:
        finite = np.isfinite(outputs).all((1, 2))
        if not finite.all():
            self._require_finite(f"on the {part} images")  # names the parameter, if one is bad
            bad = [str(i) for i, good in zip(self.ensemble.ids, finite, strict=True) if not good]
            raise TrainingError(
                f"{self.job.name}: on the {part} images: expected finite outputs, got others "
                f"of member(s) {', '.join(bad)}{self._advice}"
            )

    def after(self) -> np.ndarray | None:
        """What `Job.then` asks for: outputs on the training images (m, N, C), or new norms.

        Raises:
            TrainingError: the outputs are not finite; names members.
        """
        if self.job.then == "norms":
            inference.estimate_norms(self.ensemble, self.feed.plain(0))
        if self.job.then != "outputs":
            return None
        outputs = inference.outputs(self.ensemble, self.feed.images, self.feed.normalized)
        self._require_finite_outputs("training", outputs)
        return outputs

    def bias(self) -> Tensor | None:
        """The classifier block's bias (C,), if there is one."""
        return None if self.ensemble.bias is None else self.ensemble.bias.detach().cpu()

    def _entries(self) -> State:
        """Canonical name -> what there is under it, on the device: weights and moments."""
        entries = dict(self.ensemble.entries())
        for parameter, names in self.step.leaves:
            for key, value in self.optimizer.state.get(parameter, {}).items():
                parts = value.chunk(len(names)) if value.dim() else [value] * len(names)
                entries |= {f"adam.{key}:{n}": v for n, v in zip(names, parts, strict=True)}
        return entries

    def state(self) -> State:
        """Weights and optimizer by canonical names, on the CPU: enough to go on from here.

        Raises:
            TrainingError: something in it is not finite; names it.
        """
        state = {name: value.detach().cpu().clone() for name, value in self._entries().items()}
        require_finite(state, f"{self.job.name}: the state to keep", self._advice)
        return state

    def load(self, state: State) -> None:
        """The inverse of `state`; takes what concerns the held members from the state of all.

        Raises:
            TrainingError: something in it is not finite; names it.
        """
        self.ensemble.load(state)
        layers.binarize_frozen(self.ensemble)
        for p, names in self.step.leaves:
            if all(f"adam.{key}:{name}" in state for key in MOMENTS for name in names):
                found = {k: [state[f"adam.{k}:{name}"] for name in names] for k in MOMENTS}
                # Copied: Adam's steps change them in place. It keeps its count on the CPU.
                self.optimizer.state[p] = {
                    k: v[0].to("cpu", copy=True) if k == "step" else torch.cat(v).to(p.device)
                    for k, v in found.items()
                }
        require_finite(self._entries(), f"{self.job.name}: the state to start from")


def drive(
    job: Job,
    data: Dataset,
    trainer: Trains,
    checkpoint: Checkpoint | None = None,
    on_epoch: OnEpoch | None = None,
) -> Trained:
    """Run a job's epochs on `trainer`, going on from its checkpoint if there is one.

    A job whose checkpoint holds all epochs is not trained again.

    Args:
        trainer: a `Trainer`, or anything with its `epoch`, `state` and `load`.
        on_epoch: called with each finished epoch, those from the checkpoint included.

    Raises:
        TrainingError: something that would be kept or returned is not finite; names it. The
            checkpoint is still that of the last good epoch.
    """
    history: History = []
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
        loss, top1 = validation(job, outputs, data.val.labels, trainer)
        if not math.isfinite(loss):
            trainer.state()  # names the parameter, if one is bad
            raise TrainingError(
                f"{job.name}: the validation loss of epoch {len(history) + 1} is {loss}; expected "
                f"a finite number, from member(s) {', '.join(map(str, job.ids))} together"
            )
        epoch = _epoch(job, history, sums, loss, top1)
        history.append(epoch)
        if checkpoint:
            checkpoint.save(trainer.state(), history)
        if on_epoch:
            on_epoch(job, epoch)
    training = trainer.after() if job.then else None
    if outputs is None or job.then == "norms":
        outputs = trainer.validation_outputs()
    entries = trainer.state()
    state = {n: v for n, v in entries.items() if not n.startswith("adam.")}
    optimizer = {n: v for n, v in entries.items() if n.startswith("adam.")}
    kept = optimizer if job.keep_optimizer else {}
    return Trained(job, state, history, outputs, kept, training)


def _epoch(job: Job, history: History, sums: Sums, loss: float, top1: float) -> Epoch:
    number = len(history)
    epoch: Epoch = {
        "epoch": number + 1,
        "lr": learning_rate(job.recipe, history, number / job.recipe.epochs),
        "train_loss": sums["loss"] / sums["images"],
        "train_top1": 100 * sums["correct"] / sums["images"],
        "val_loss": loss,
        "val_top1": top1,
        "seconds": sums["seconds"],
        "images_per_s": sums["images"] / sums["seconds"],
        "time": round(time.time(), 3),
    }
    if sums["sent"]:
        epoch["actors"] = sums.get("actors", 1)
        epoch["exchange_share"] = sums["waited"] / sums["seconds"]
        epoch["sent_per_step"] = sums["sent"] / sums["steps"]
    return epoch


def validation(
    job: Job, outputs: np.ndarray, labels: np.ndarray, trainer: Trains
) -> tuple[float, float]:
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
    on_epoch: OnEpoch | None = None,
    place: Place = ALONE,
    replay: bool | None = None,
) -> list[Trained]:
    """Train jobs one after another in this process; `actors.Cluster` spreads them out.

    One thread is the default because small layers gain nothing from a second one, lose much beside
    other busy processes, and give bits that do not depend on the machine's number of cores.
    """
    torch.set_num_threads(place.threads)
    results = []
    for job in jobs:
        checkpoint = (
            Checkpoint(checkpoints, f"{job.name}-{job.digest(data)}") if checkpoints else None
        )
        try:
            trainer = Trainer(
                job, data, device=place.device, replay=replay, memory_share=place.share
            )
            results.append(drive(job, data, trainer, checkpoint, on_epoch))
        finally:
            if checkpoint:
                checkpoint.close()
    return results
