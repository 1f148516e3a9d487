"""A driver to be killed: trains a small ensemble on a Ray cluster, with checkpoints.

``python tests/driver.py FOLDER [STRIKE]``: writes FOLDER/result.safetensors at the end. After each
epoch it waits for a line on its input, or for that to be closed. With STRIKE, a number, the process
kills itself in the middle of writing the checkpoint of that epoch; with ``node:PID`` it kills that
node when the first state has been answered and not yet fetched.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path

import ray
from safetensors.torch import save_file

from bnncore.cluster.cluster import Cluster
from bnncore.cluster.group import Group, GroupLost
from bnncore.params import RayParams
from bnncore.training import checkpoint, schemes
from tests import processes
from tests.small import plan

EPOCHS = 6


def work():
    """The plan and the data set that are trained."""
    return plan("tentaclenet", "tentaclenet", members=4, epochs=EPOCHS)


def strike_at(epoch: int) -> None:
    """Half of the file is written when SIGKILL comes."""

    def half_written(state, path, metadata):
        save_file(state, path, metadata)
        if metadata["history"].count('"epoch"') >= epoch:
            with open(path, "r+b") as file:
                file.truncate(Path(path).stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.save_file = half_written


def strike_node(pid: int) -> None:
    """The answer lies on the node that dies."""
    get, state, struck = Group._get, Group.state, []

    def told(self, refs):
        if struck == ["asked"]:
            ray.wait(refs, num_returns=len(refs), fetch_local=False)
            processes.kill([pid, *processes.descendants(pid)])
            struck.append("killed")
        try:
            return get(self, refs)
        except GroupLost as error:
            print(f"the answer was lost: {type(error.__cause__).__name__}", flush=True)
            raise

    def asked(self):
        if not struck:
            struck.append("asked")
        return state(self)

    Group._get, Group.state = told, asked


def main(folder: Path, strike: str) -> None:
    logging.basicConfig()
    if strike.startswith("node:"):
        strike_node(int(strike.removeprefix("node:")))
    elif strike:
        strike_at(int(strike))
    p, images = work()

    def told(job, epoch):
        print(f"epoch {epoch['epoch']} actors {epoch.get('actors', 1)}", flush=True)
        sys.stdin.readline()

    with Cluster(RayParams(actors=2, wait_s=60)) as cluster:
        trained = schemes.train(
            p, lambda jobs: cluster.train_many(jobs, images, folder / "checkpoints", told)
        )
        print(f"lost {cluster.lost}", flush=True)
    save_file(trained.state, folder / "result.new")
    os.replace(folder / "result.new", folder / "result.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), "".join(sys.argv[2:]))
