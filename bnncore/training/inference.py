"""What trained members say: their outputs on images, and statistics that only a pass can tell.

Legend: `m` held members, `N` images, `B` of a batch, `C` classes; images `H W C`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn

from bnncore.data import Dataset
from bnncore.networks.combine import combine
from bnncore.networks.ensemble import Ensemble
from bnncore.training.feed import Normalized, uploaded
from bnncore.training.jobs import Teacher
from bnncore.training.layers import exact_convolutions


def member_outputs(
    ensemble: Ensemble,
    images: np.ndarray,
    data: Dataset,
    device: str | torch.device = "cpu",
) -> np.ndarray:
    """Outputs of an ensemble's members: uint8 (N, H, W, C) to float32 (m, N, C).

    Args:
        data: whose normalisation the members were trained with.
        device: where to compute; the ensemble is moved there.
    """
    device = torch.device(device)
    return outputs(ensemble.to(device), uploaded(images, device), Normalized(data, device))


def teacher_logits(teacher: Teacher, data: Dataset, device: str | torch.device) -> np.ndarray:
    """What a trained ensemble says of the training images as they are: logits (N, C) float32.

    Of votes it is the logarithm of the mean of probabilities.
    """
    ensemble = Ensemble(teacher.spec)
    ensemble.load(teacher.state)
    z = list(torch.from_numpy(member_outputs(ensemble, data.train.images, data, device)))
    weights = ensemble.weights.cpu()
    if teacher.spec.combine.endswith("vote"):
        votes = combine("soft_vote", z, weights, None)
        return votes.clamp(min=torch.finfo(votes.dtype).tiny).log().numpy()
    bias = None if ensemble.bias is None else ensemble.bias.detach().cpu()
    return combine(teacher.spec.combine, z, weights, bias).numpy()


@torch.no_grad()
def outputs(
    ensemble: Ensemble, images: Tensor, normalized: Callable[[Tensor], Tensor]
) -> np.ndarray:
    """The same, of images that are on the ensemble's device, uint8 (N, C, H, W).

    Leaves the ensemble in evaluation mode.
    """
    ensemble.eval()
    # Maps above 32 MB are mapped anew by every operation on a CPU: half of the time, with 512.
    batch = 128 if images.device.type == "cpu" else 512
    with exact_convolutions(ensemble):
        parts = [torch.stack(ensemble.outputs(normalized(part))) for part in images.split(batch)]
    return torch.cat(parts, dim=1).cpu().numpy()


@torch.no_grad()
def estimate_norms(ensemble: Ensemble, batches: Iterable[Tensor]) -> None:
    """Batch-norm statistics of the members anew: means of those of each batch (B, C, H, W).

    Dropout is off. Leaves the ensemble in evaluation mode.
    """
    ensemble.eval()
    norms = [m for m in ensemble.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch's word for the plain mean
        norm.train()
    with exact_convolutions(ensemble):
        for x in batches:
            ensemble.outputs(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
