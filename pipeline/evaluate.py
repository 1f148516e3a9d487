"""Stage evaluate: run the packed files, without torch, and write the report."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from bnncore import data, execute, metrics, packfile, params, report
from pipeline.stage import MODELS, PACKED, REPORTS, ROOT, Stage, run, stage


def main() -> None:
    with stage() as s:
        images = data.load(s.params.data, ROOT)
        names = ["fp32", "bnn", *(e.name for e in s.params.ensembles.train)]
        results = [evaluated(s, name, images) for name in names]
        results = report.complete(results)
        histories = {}
        for name in names:
            histories |= curves(name)
        anytime = {r["name"]: r.pop("anytime") for r in results if r.get("anytime")}
        written = report.write(results, histories, REPORTS, anytime)
        flat = {
            r["name"]: {k: v for k, v in r.items() if isinstance(v, int | float)} for r in results
        }
        (REPORTS / "metrics.json").write_text(json.dumps(flat, indent=1))
        log(s, results, histories, written)
    if "torch" in sys.modules:
        raise RuntimeError("the packed evaluator imported torch; expected to run without it")
    report.print_table(results)


def evaluated(s: Stage, name: str, images: data.Dataset) -> dict:
    """Scores of one packed file, beside torch's."""
    path = PACKED / f"{name}.bnn"
    program = packfile.load(path)
    p = s.params.evaluate
    model = execute.Model(program, p.ops, p.threads)
    theirs = np.load(PACKED / "torch" / f"{name}.npz")
    compared, different, largest = 0, 0, 0.0
    top1, row = {}, {}
    for part, split in (("val", images.val), ("test", images.test)):
        outputs = model.outputs(split.images, batch=p.batch)
        scores, predicted = execute.combine(program, outputs)
        torch_scores, torch_predicted = execute.combine(program, theirs[part])
        compared += len(split)
        different += int((predicted != torch_predicted).sum())
        largest = max(largest, float(np.abs(outputs - theirs[part]).max(initial=0)))
        top1[part] = 100 * metrics.accuracy(predicted, split.labels)
        if part == "test":
            probabilities = execute.probabilities(program, scores)
            row = {
                "ece": metrics.calibration_error(probabilities, split.labels),
                "disagreement": metrics.disagreement(outputs.argmax(2)),
            }
    info = program.info
    return {
        "name": name,
        "kind": info["kind"],
        "backbone": info["backbone"],
        "width": info.get("width"),
        "scheme": info.get("scheme"),
        "sharing": info.get("sharing"),
        "members": program.members,
        "val_top1": top1["val"],
        "test_top1": top1["test"],
        "file_bytes": path.stat().st_size,
        "images_compared": compared,
        "images_different": different,
        "max_logit_difference": largest,
        **row,
    }


def curves(name: str) -> dict[str, list[dict]]:
    """The training curves of one model: job name -> a dict an epoch."""
    folder = MODELS / (name if name in ("fp32", "bnn") else f"ensembles/{name}")
    return json.loads((folder / "histories.json").read_text())


def log(s: Stage, results: list[dict], histories: dict, written: list[Path]) -> None:
    """Final figures of every model to MLflow, of cached stages too."""
    plain = params.plain(s.params)
    for row in results:
        name = row["name"]
        described = {
            k: row[k] for k in ("kind", "scheme", "sharing", "members", "backbone", "width")
        }
        with s.tracker.model(name, {**described, "model": plain["model"]}) as child:
            if name in histories:
                child.history(histories[name])
            child.metrics({k: v for k, v in row.items() if isinstance(v, int | float)})
            child.metrics({"file_kib": row["file_bytes"] / 1024})
            child.artifact(PACKED / f"{name}.bnn")
    for path in written:
        s.tracker.artifact(path, "report")


if __name__ == "__main__":
    run(main)
