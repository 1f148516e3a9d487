"""Search for the best ensemble under a budget; no stage of DVC: its study goes on by itself."""

from __future__ import annotations

import argparse
import gc
import json
import sys
from functools import partial
from pathlib import Path

from bnncore import check, data, metrics, params
from bnncore.cluster.cluster import Cluster
from bnncore.packed import execute, packfile
from bnncore.search import answer
from bnncore.search import run as searching
from bnncore.search.answer import Report
from bnncore.search.run import Search
from bnncore.tracking import Tracker
from bnncore.training.checkpoint import resumable
from pipeline.stage import CHECKPOINTS, REPORTS, ROOT, read, run

OUT = REPORTS / "search"


def main() -> None:
    options = arguments()
    p = params.load(ROOT / "params.yaml")
    images = read(p.data)
    check.check(p, images.image, len(images.classes))
    settings = p.mlflow
    with Search(p, images, CHECKPOINTS / "search") as search:
        # What does not change the study does not begin another run.
        known = {"study": search.study.name, "data": {"name": images.name}, **searching.studied(p)}
        with Tracker(
            ROOT, known, settings.uri, experiment=settings.experiment, name="search"
        ) as tracker, Cluster(p.ray) as cluster:  # fmt: skip
            search.tracker = tracker
            # What is imported stays: a full collection took 0.2 s in the middle of a rejection.
            gc.freeze()
            # Written before the rivals too, so that a stop meanwhile leaves an answer.
            report = search.run(cluster, options.trials, options.timeout,
                                partial(answer.write, out=OUT))  # fmt: skip
            written = answer.write(report, OUT)
            answer.show(report)
            winner = report.winner
            if winner:
                tracker.metrics({k: winner[k] for k in ("val_top1", "file_bytes")})
            if options.finish and winner and report.ended != searching.INTERRUPTED:
                written.append(finish(report, images, cluster, tracker))
            for path in written:
                tracker.artifact(path, "search")
    print(f"\n{OUT / 'best.yaml'}: cp it to params.yaml, and dvc repro trains it"
          if winner else f"\n{OUT / 'front.csv'} lists what was asked for")  # fmt: skip
    if report.ended == searching.INTERRUPTED:
        sys.exit(130)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m pipeline.search", description=__doc__)
    parser.add_argument("--trials", type=int, help="in all, those of earlier runs included")
    parser.add_argument("--timeout", type=float, metavar="S", help="begin nothing after S seconds")
    parser.add_argument("--finish", action="store_true", help="train the best by the full recipes")
    parser.add_argument("--traceback", action="store_true", help="of errors")
    options = parser.parse_args()
    if options.trials is not None and options.trials < 1:
        parser.error(f"--trials: expected at least 1, got {options.trials}")
    if options.timeout is not None and not options.timeout >= 0:
        parser.error(f"--timeout: expected at least 0 seconds, got {options.timeout:g}")
    return options


def finish(report: Report, images: data.Dataset, cluster: Cluster, tracker: Tracker) -> Path:
    """Train the best in full; its packed file, and what it scores, go to ``reports/search``."""
    winner = report.winner
    assert winner is not None
    packed, scored = (OUT / name for name in answer.FINISHED)
    with resumable(CHECKPOINTS / "search-finish") as checkpoints:
        trained, program = searching.finish(report.preset(winner), images, cluster, checkpoints)
        size = packfile.save(program, packed)
        if size > winner["bound_bytes"]:
            raise RuntimeError(
                f"best.bnn: expected at most {winner['bound_bytes']} bytes, got {size}"
            )
        model = execute.Model(packfile.load(packed), report.params.evaluate.ops)
        scores: dict[str, float] = {"file_bytes": size}
        for part, split in (("val", images.val), ("test", images.test)):
            predicted = model.predict(split.images)
            scores[f"{part}_top1"] = 100 * metrics.accuracy(predicted, split.labels)
        scored.write_text(json.dumps(scores, indent=1) + "\n")
    print(
        f"\ntrained in full: validation {scores['val_top1']:.2f} %, test {scores['test_top1']:.2f} "
        f"%, {size:,} bytes ({packed})"
    )
    with tracker.model("best", {"about": answer.about(winner)}) as child:
        child.history(metrics.mean_curve(trained.histories))
        child.metrics(scores)
    return scored


if __name__ == "__main__":
    run(main)
