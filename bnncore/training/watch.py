"""Numbers that are not finite: found without waiting for a GPU at every step, and named.

A NaN can hide: a sign turns it into -1, a mean over members into a bad one among good ones, Adam's
moments into updates of 0. So everything that training starts from, saves or returns is looked at,
and nothing of it gets out if it is not finite.

Legend: `m` held members, `B` images, `C` classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from bnncore.training.jobs import TrainingError

SHOWN = 3  # entries that a message lists


def require_finite(entries: Mapping[str, Tensor], where: str, then: str = "") -> None:
    """Look at all entries of a state, on whatever device; waits for the device once.

    Args:
        entries: canonical name (``1.stem.conv.weight``, ``adam.exp_avg:shared.bias``) -> tensor.
        where: begins the message: the job and the moment, or the file.
        then: ends it: what to do.

    Raises:
        TrainingError: names members and parameters with numbers that are not finite.
    """
    values = [value.detach() for value in entries.values()]
    if not values:
        return
    device = max((value.device for value in values), key=lambda d: d.type != "cpu")
    good = torch.stack([value.isfinite().all().to(device) for value in values]).tolist()
    bad = [named(name) for name, fine in zip(entries, good, strict=True) if not fine]
    if bad:
        more = f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise TrainingError(
            f"{where}: expected finite numbers, got others in {', '.join(bad[:SHOWN])}{more}{then}"
        )


def named(entry: str) -> str:
    """A canonical name for people: ``member 1: stem.conv.weight``."""
    kind, _, name = entry.rpartition(":")
    owner, _, parameter = name.partition(".")
    of = f" (its {kind})" if kind else ""
    return f"{'shared' if owner == 'shared' else f'member {owner}'}: {parameter}{of}"


class Watch:
    """Since which step of an epoch a member's outputs are not finite; no step waits for it."""

    def __init__(self, held: int, device: torch.device):
        self._finite = torch.ones(held, dtype=torch.bool, device=device)
        self._steps = torch.zeros(held, dtype=torch.int64, device=device)

    def see(self, outputs: Iterable[Tensor]) -> None:
        """Look at each held member's outputs (B, C) of one step."""
        self._finite &= torch.stack(list(outputs)).isfinite().all(2).all(1)
        self._steps += self._finite

    def steps(self) -> Tensor:
        """How many steps each held member did well, (m,)."""
        return self._steps
