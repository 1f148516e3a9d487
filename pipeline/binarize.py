"""Stage binarize: binarize the pretrained backbone and train the single BNN."""

from bnncore import params
from bnncore.training import devices, loop, plans
from bnncore.training.checkpoint import resumable
from bnncore.training.ensembled import Ensembled
from pipeline.stage import CHECKPOINTS, folder, run, stage


def main() -> None:
    with stage() as s:
        images = s.images()
        fp32 = Ensembled.read(folder("fp32")).state
        job = plans.first_job(s.params, images, fp32)
        with resumable(CHECKPOINTS / "binarize") as checkpoints:
            place = devices.of_process(s.params.ray)
            (trained,) = loop.train_many([job], images, checkpoints, s.on_epoch, place)
            Ensembled(job.spec, trained.state, {"bnn": trained.history}).save(folder("bnn"))
            params.save(s.params, folder("bnn") / "params.yaml")


if __name__ == "__main__":
    run(main, __doc__)
