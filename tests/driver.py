"""A driver to be killed: trains a small ensemble on a Ray cluster, with checkpoints.

``python tests/driver.py FOLDER EPOCHS [STRIKE]``: writes FOLDER/result.safetensors at the end. With
STRIKE the process kills itself in the middle of writing the checkpoint of that epoch.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from bnncore.cluster import actors
from bnncore.params import RayParams
from bnncore.training import checkpoint, schemes
from tests.small import plan


def strike_at(epoch: int) -> None:
    """Half of the file is written when SIGKILL comes."""

    def half_written(state, path, metadata):
        save_file(state, path, metadata)
        if metadata["history"].count('"epoch"') >= epoch:
            with open(path, "r+b") as file:
                file.truncate(Path(path).stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.save_file = half_written


def main(folder: Path, epochs: int, strike: int | None) -> None:
    logging.basicConfig()
    torch.set_num_threads(1)
    if strike:
        strike_at(strike)
    p, images = plan("tentaclenet", "tentaclenet", members=4, epochs=epochs, subset=0.5)

    def told(job, epoch):
        print(f"epoch {epoch['epoch']} actors {epoch.get('actors', 1)}", flush=True)

    with actors.Cluster(RayParams(actors=2, wait_s=60)) as cluster:
        trained = schemes.train(
            p, lambda jobs: cluster.train_many(jobs, images, folder / "checkpoints", told)
        )
        print(f"lost {cluster.lost}", flush=True)
    save_file(trained.state, folder / "result.new")
    os.replace(folder / "result.new", folder / "result.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else None)
