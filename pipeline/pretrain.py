"""Stage pretrain: train the FP32 backbone."""

from bnncore import check, params
from bnncore.training import devices, loop, plans
from bnncore.training.checkpoint import resumable
from bnncore.training.ensembled import Ensembled
from pipeline.stage import CHECKPOINTS, folder, run, stage


def main() -> None:
    with stage() as s:
        images = s.images()
        check.check(s.params, images.image, images.classes)  # stage inputs did, unless run by hand
        job = plans.first_job(s.params, images, None)
        with resumable(CHECKPOINTS / "pretrain") as checkpoints:
            place = devices.of_process(s.params.ray)
            (trained,) = loop.train_many([job], images, checkpoints, s.on_epoch, place)
            Ensembled(job.spec, trained.state, {"fp32": trained.history}).save(folder("fp32"))
            params.save(s.params, folder("fp32") / "params.yaml")


if __name__ == "__main__":
    run(main, __doc__)
