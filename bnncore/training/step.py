"""The joint step: gradients of one batch, of all of a job's members, however they are spread.

A joint step costs one small sum. Members' outputs z_i (B, C) add up to the ensemble's logits, so
processes exchange their partial sums, detached; each takes dL/dz for itself and pushes it back
through its own members. Gradients of members stay local, and only shared trained parameters need
theirs summed. The split step is therefore exact, not approximate.

Members are computed one by one, or in stacks (`stack.Unit`).

Legend: `B` images, `C` classes, `M` members of the job, `m` of them held here or in a unit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from bnncore.networks.backbones import BACKBONES
from bnncore.networks.combine import TreeSum, tree_sum
from bnncore.networks.ensemble import Ensemble, draws, generator
from bnncore.networks.parts import Backbone
from bnncore.training.jobs import Job
from bnncore.training.layers import exact_convolutions
from bnncore.training.memory import Undisturbed, frugal
from bnncore.training.stack import Run, Unit, units
from bnncore.training.watch import Watch


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


class Step:
    """Computes gradients, with the members and shards of a job that this process holds.

    Args:
        job: what is trained.
        ensemble: the held members, on their device.
        shards: which of the ``recipe.shards`` parts of each batch this process takes.
        exchange: how to add up with the processes that hold the other members.
        within: how to add up with the processes that take the other shards of the same members.
        replay: forward once without gradients, then forward and backward unit by unit (`frugal`).
        stack: how many members make a unit.

    `begin` comes before an epoch's steps, `end` after them.

    Attributes:
        units: the held members, in the order of their ids, one by one or in stacks.
        leaves: all parameters that are trained, and the canonical names of what each holds.
        shared: those that members share; their gradients are exchanged.
        run: `Backbone.forward`, or a compiled one.
    """

    def __init__(
        self,
        job: Job,
        ensemble: Ensemble,
        shards: tuple[int, ...],
        exchange: Exchange,
        within: Exchange,
        replay: bool = False,
        stack: int = 1,
    ):
        self.job, self.ensemble, self.shards = job, ensemble, shards
        self.exchange, self.within = exchange, within
        self.replay = replay
        self.run: Run = Backbone.forward
        trained = {n: p for n, p in ensemble.parameters_by_name() if p.requires_grad}
        names = {id(p): n for n, p in trained.items()}
        self.units = units(ensemble, stack, apart=bool(job.each))
        self.seeds = {one.ids[0]: one.seed for one in job.each}
        # The bias of the classifier block is left out: its gradient is the same everywhere.
        self.shared = [
            p for n, p in trained.items() if n.startswith("shared.") and n != "shared.bias"
        ]
        stacked = [leaf for unit in self.units for leaf in unit.leaves]
        behind = {id(part) for _, parts in stacked for part in parts}
        self.leaves: list[tuple[torch.nn.Parameter, tuple[str, ...]]] = [
            *((p, (n,)) for n, p in trained.items() if id(p) not in behind),
            *((whole, tuple(names[id(p)] for p in parts)) for whole, parts in stacked),
        ]
        self.own = [
            [p for p, of in self.leaves if of[0].startswith(f"{unit.ids[0]}.")]
            for unit in self.units
        ]

    @property
    def device(self) -> torch.device:
        return self.ensemble.weights.device

    def begin(self, epoch: int) -> None:
        """Make ready for an epoch: its dropout masks, each shard's statistics, nothing seen."""
        self.watch = Watch(len(self.ensemble.ids), self.device)
        for i, member in zip(self.ensemble.ids, self.ensemble.members, strict=True):
            for name, module in member.named_modules():
                if draws(module):
                    keys = ("dropout", self.seeds.get(i, self.job.seed), i, name, epoch)
                    module.generator = generator(*keys, device=self.device)
        self._sides = {
            shard: _Side(self, (self.job.seed, epoch, shard))
            for shard in (self.shards if self._cut else ())
        }

    def end(self) -> None:
        """Give the network the mean of all shards' batch-norm statistics."""
        sides = list(self._sides.values())
        if not sides or not sides[0].norms:
            return
        total = self.within.sum(tree_sum([side.flat() for side in sides]))
        sides[0].leave(total / self.job.recipe.shards)
        self._sides = {}

    @property
    def modules(self) -> list[torch.nn.Module]:
        """What computes: the prefix and the units."""
        return [*self.ensemble.prefix(), *self.units]

    def gradients(self) -> dict[str, Tensor]:
        """Canonical name -> what the last step left in ``.grad``."""
        return {
            name: part
            for whole, names in self.leaves
            if whole.grad is not None
            for name, part in zip(names, whole.grad.chunk(len(names)), strict=True)
        }

    def exchanged(self) -> tuple[int, float]:
        """Bytes that this process has sent, and seconds that it spent in sums."""
        both = (self.exchange, self.within)
        return sum(e.sent for e in both), sum(e.seconds for e in both)

    def first_not_finite(self) -> tuple[int, list[int]]:
        """The earliest step of the epoch after which outputs were not finite, and whose they were.

        All processes of a job ask at the same time.
        """
        steps = torch.zeros(len(self.job.ids), device=self.device)
        for i, n in zip(self.ensemble.ids, self.watch.steps(), strict=True):
            steps[self.job.ids.index(i)] = n
        steps = self.exchange.sum(steps) / self.within.size
        first = steps.min()
        return int(first), [i for i, n in zip(self.job.ids, steps, strict=True) if n == first]

    def __call__(self, x: Tensor, y: Tensor, extra: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Gradients of one batch, left in ``.grad``; returns the loss and the logits (B, C), or of
        jobs that are trained apart their mean loss and all logits (B, m, C).

        Args:
            x: images (B, C, H, W), normalised; those of jobs that are trained apart (B * m, ..).
            y: labels (B,), or (B, m).
            extra: the batch's rows of a job's arrays (`feed.ROWS`).
        """
        with exact_convolutions(self.ensemble):
            return self._gradients(x, y, extra)

    def _gradients(self, x: Tensor, y: Tensor, extra: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        for parameter, _ in self.leaves:
            parameter.grad = None
        scale = 1.0 if self.job.spec.combine == "sum" else 1.0 / len(self.job.ids)
        passes = [self._forward(shard, rows, x) for shard, rows in self._rows(len(x))]
        whole = [
            self._whole([p.outputs[k].detach() for p in passes], passes, len(x))
            for k in range(len(self.units))
        ]
        outputs = [z for block in whole for z in block.unbind(1)]
        self.watch.see(outputs)
        grads, loss, logits = self._objective(outputs, y, extra, scale)
        if self.job.recipe.distill and "teacher" not in extra:
            grads, more = self._from_ensemble(outputs, grads, logits, [p.rows for p in passes])
            loss = loss + more
        # Trees of one gradient a unit and shard: bits do not depend on who holds what.
        shared = TreeSum()
        for k, unit in enumerate(self.units):
            own = TreeSum()
            grad = torch.stack([grads.pop(0) for _ in range(len(unit.ids))], 1)
            for p in passes:
                if len(p.rows):
                    z = p.outputs[k]
                    if self.replay:
                        self._enter(p.shard)
                        z = unit(p.leaf, self._run_again)
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
    def _run_again(self) -> Run:
        """As the first time, to the same bits; with less memory where that can be."""
        # A user's network may change its inputs in place, or have a body of another kind.
        ours = self.job.spec.model.backbone in BACKBONES and self.run is Backbone.forward
        return frugal if ours else self.run

    @property
    def _cut(self) -> bool:
        return self.job.recipe.shards > 1

    def forward(self, x: Tensor) -> list[Tensor]:
        """Outputs (B, m, C) of each unit on images as they are, all at once."""
        for module in self.ensemble.prefix():
            x = module(x)
        return [unit(x) for unit in self.units]

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
            none = [
                h.new_zeros(0, len(unit.ids), self.job.spec.model.classes) for unit in self.units
            ]
            return _Pass(shard, rows, h, h, none)
        for module in self.ensemble.prefix():
            h = module(h)
        # Members push their gradients into this leaf.
        leaf = h.detach().requires_grad_(h.requires_grad)
        with _replayed(self.units) if self.replay else contextlib.nullcontext():
            outputs = [unit(leaf, self.run) for unit in self.units]
        return _Pass(shard, rows, h, leaf, outputs)

    def _whole(self, parts: list[Tensor], passes: list[_Pass], count: int) -> Tensor:
        """A unit's outputs (B, m, C), zero where other processes take the images."""
        if not self._cut:
            return parts[0]
        whole = parts[0].new_zeros(count, *parts[0].shape[1:])
        for part, p in zip(parts, passes, strict=True):
            whole[p.rows] = part
        return whole

    def _objective(
        self, outputs: list[Tensor], y: Tensor, extra: dict[str, Tensor], scale: float
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """dL/dz of each held member, the loss and the logits.

        The loss is the cross entropy of the combined logits, ``scale * sum(z_i) (+ bias)``; with
        `Recipe.prefixes` it is the mean of that over the first 1..M members.
        """
        if self.job.each:
            return self._apart(outputs, y, extra)
        bias = self.ensemble.bias
        if not self.job.recipe.prefixes:
            total = self.exchange.sum(tree_sum(outputs)).requires_grad_()
            logits = scale * total
            logits = logits if bias is None else logits + bias
            loss = self._loss(logits, y, extra)
            loss.backward()
            assert total.grad is not None
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

    def _apart(
        self, outputs: list[Tensor], y: Tensor, extra: dict[str, Tensor]
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """`_objective` of members that do not know of each other."""
        leaves = [z.detach().requires_grad_() for z in outputs]
        losses = [
            self._loss(z, y[:, k], {name: rows[:, k] for name, rows in extra.items()})
            for k, z in enumerate(leaves)
        ]
        torch.stack(losses).sum().backward()
        grads = [z.grad for z in leaves if z.grad is not None]
        return grads, torch.stack(losses).detach().mean(), torch.stack(outputs, 1)

    def _from_ensemble(
        self, outputs: list[Tensor], grads: list[Tensor], logits: Tensor, parts: list[Tensor]
    ) -> tuple[list[Tensor], Tensor]:
        """Let members learn from the ensemble's logits: dL/dz with that part, and the part.

        The mean over members of their `distillation`, times ``distill``, on top of the joint loss
        (Lan et al. 2018, Eq. 8).

        Args:
            parts: numbers of the images of which this process has outputs, a shard each.
        """
        recipe, losses, whole = self.job.recipe, [], []
        weight = recipe.distill / len(logits) / len(self.job.ids)
        for z, grad in zip(outputs, grads, strict=True):
            for rows in parts:
                own = z[rows].requires_grad_()
                part = weight * distillation(own, logits[rows], recipe.temperature).sum()
                part.backward()
                assert own.grad is not None
                grad = grad.index_add(0, rows, own.grad)
                losses.append(part.detach())
            whole.append(grad)
        return whole, self.exchange.sum(tree_sum(losses))

    def _loss(self, logits: Tensor, y: Tensor, extra: dict[str, Tensor]) -> Tensor:
        """Mean over the batch of each image's loss times its weight."""
        recipe = self.job.recipe
        if "targets" in extra:
            losses = (logits - extra["targets"]).square().sum(1)
        else:
            logits = logits + extra["offsets"] if "offsets" in extra else logits
            smoothing = recipe.label_smoothing
            losses = F.cross_entropy(logits, y, reduction="none", label_smoothing=smoothing)
            if "teacher" in extra:
                taught = distillation(logits, extra["teacher"], recipe.temperature)
                losses = (1 - recipe.distill) * losses + recipe.distill * taught
        return (losses * extra["weights"] if "weights" in extra else losses).mean()


def distillation(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``T^2 KL(softmax(teacher / T) || softmax(logits / T))`` of each image: (B, C) to (B,).

    Source: Hinton et al. 2015, section 2; T^2 keeps gradients at the size of the labels'.
    """
    student = F.log_softmax(logits / temperature, dim=1)
    target = F.log_softmax(teacher / temperature, dim=1)
    losses = F.kl_div(student, target, reduction="none", log_target=True).sum(1)
    return losses * temperature**2


@dataclass(eq=False)
class _Pass:
    """One shard's way through the network: images, shared prefix, each unit's outputs."""

    shard: int
    rows: Tensor
    h: Tensor
    leaf: Tensor
    outputs: list[Tensor]


class _Side:
    """What each shard has for itself in an epoch: batch-norm statistics and random generators.

    `enter` puts them into the network's modules; no numbers are copied.
    """

    def __init__(self, step: Step, seed: tuple[int, ...]):
        ensemble, network = step.ensemble, torch.nn.ModuleList(step.modules)
        norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        self.norms = [(m, {k: v.clone() for k, v in m.named_buffers()}) for m in norms]
        self._home = [dict(m.named_buffers()) for m in norms]
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

    def leave(self, values: Tensor) -> None:
        """Put the network's own buffers back, with the values of this side or those given."""
        for (norm, own), home in zip(self.norms, self._home, strict=True):
            for name, buffer in home.items():
                buffer.copy_(own[name])
            norm._buffers.update(home)
        found = [home[k] for home in self._home for k in _RUNNING]
        for buffer, part in zip(found, values.split([b.numel() for b in found]), strict=True):
            buffer.copy_(part.view_as(buffer))


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


@contextlib.contextmanager
def _replayed(units: list[Unit]) -> Iterator[None]:
    with torch.no_grad(), Undisturbed(units):
        yield
