"""Stage ensemble-train: train every ensemble of the list on Ray actors."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial

from bnncore import params
from bnncore.cluster.cluster import Cluster
from bnncore.params import EnsembleParams
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
        todo = s.params.ensembles
        place = {e.name: f"ensemble {i + 1} of {len(todo.train)}" for i, e in enumerate(todo.train)}

        def make(
            ensemble: EnsembleParams,
            train_many: schemes.TrainMany,
            result_of: Callable[[str], Ensembled],
        ) -> Ensembled:
            earlier = {e.name: result_of(e.name) for e in todo.train if e.name == ensemble.teacher}
            s.say(f"{ensemble.name}: {place[ensemble.name]}")
            plan = plans.plan(s.params, ensemble, images, fp32, bnn, earlier, cluster.device)
            trained = schemes.train(plan.over(cluster.slots()), train_many)
            trained.save(folder(ensemble.name))
            return trained

        s.say("starting Ray")
        with (
            Cluster(s.params.ray) as cluster,
            resumable(CHECKPOINTS / "ensemble-train") as checkpoints,
        ):
            makers = {e.name: partial(make, e) for e in todo.train}
            cluster.side_by_side(makers, images, checkpoints, s.on_epoch)
            params.save(s.params, out / "params.yaml")


if __name__ == "__main__":
    run(main, __doc__)
