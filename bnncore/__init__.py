"""Ensembles of binarized neural networks: train, share, count, pack, evaluate."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bnncore.packed.execute import Model

__all__ = ["load"]


def load(path: str | os.PathLike[str], ops: str = "compiled", threads: int = 1) -> Model:
    """Read a packed file, or ``zoo:NAME`` (`bnncore.zoo`), and make it ready to run.

    See `packed.execute.Model`. No torch.
    """
    from bnncore import zoo
    from bnncore.packed import execute, packfile

    return execute.Model(packfile.load(zoo.located(path)), ops, threads)
