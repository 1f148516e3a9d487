"""Stage ensemble-train: train every ensemble of the list on Ray actors."""

from __future__ import annotations

import shutil
from functools import partial

from bnncore import params
from bnncore.cluster.cluster import Cluster
from bnncore.training import plans, schemes
from bnncore.training.checkpoint import resumable
from bnncore.training.ensembled import Ensembled
from pipeline.stage import CHECKPOINTS, MODELS, folder, run, stage


def main() -> None:
    with stage() as s:
        images = s.images()
        fp32 = Ensembled.read(folder("fp32")).state
        bnn = Ensembled.read(folder("bnn")).state
        out = MODELS / "ensembles"
        shutil.rmtree(out, ignore_errors=True)  # nothing of a longer list may stay behind
        out.mkdir(parents=True)  # the list may be empty
        trained: dict[str, Ensembled] = {}
        print("starting Ray", flush=True)
        with (
            Cluster(s.params.ray) as cluster,
            resumable(CHECKPOINTS / "ensemble-train") as checkpoints,
        ):
            train_many = partial(
                cluster.train_many, data=images, checkpoints=checkpoints, on_epoch=s.on_epoch
            )
            todo = s.params.ensembles.train
            for i, ensemble in enumerate(todo):
                print(f"{ensemble.name}: ensemble {i + 1} of {len(todo)}", flush=True)
                plan = plans.plan(s.params, ensemble, images, fp32, bnn, trained, cluster.device)
                plan = plan.over(cluster.slots())
                trained[ensemble.name] = schemes.train(plan, train_many)
                trained[ensemble.name].save(folder(ensemble.name))
            params.save(s.params, out / "params.yaml")


if __name__ == "__main__":
    run(main, __doc__)
