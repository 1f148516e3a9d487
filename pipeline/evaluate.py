"""Stage evaluate: run the packed files, without torch, and write the report."""

from __future__ import annotations

import dataclasses
import json
import sys
from datetime import datetime
from pathlib import Path

import numpy as np

from bnncore import data, metrics, params, report, storage, tracking
from bnncore.device import costs
from bnncore.errors import UserError
from bnncore.packed import execute, exits, integers, narrow, packfile, votes
from bnncore.packed.program import Program
from bnncore.report import live
from pipeline.stage import PACKED, REPORTS, ROOT, Stage, folder, run, stage

OPTIONS = (
    params.PackParams(affine="float16"),
    params.PackParams(weights="int8"),
    params.PackParams(affine="float16", weights="mixed"),
    params.PackParams(affine="float16", weights="int8"),
    params.PackParams(integer=True),
)


def main() -> None:
    with stage() as s:
        images = s.images()
        names = s.models()
        found = [evaluated(s, name, images) for name in names]
        counts = {r["name"]: r.pop("counts") for r in found}
        taken = {r["name"]: r.pop("confusion") for r in found}
        wrong = np.sum([r.pop("wrong") for r in found], axis=0)
        results = report.complete(found)
        trained = {name: curves(name) for name in names}
        histories: dict[str, list[dict]] = {}
        for name in names:
            histories |= trained[name]
        prefixes = {r["name"]: r.pop("anytime") for r in results}
        narrower = {r["name"]: r.pop("options") for r in results}
        REPORTS.mkdir(exist_ok=True)
        (REPORTS / "storage.txt").write_text("\n".join(stored(counts, narrower)) + "\n")
        print(*storage.summary(counts), f"by layer and part: {REPORTS / 'storage.txt'}", sep="\n")
        prefixes = {name: rows for name, rows in prefixes.items() if len(rows) > 1}
        confusion = {"classes": images.classes, "models": taken}
        facts = about(s.params, images)
        shown = live.samples(images.test.images, images.test.labels, wrong)
        written = report.write(results, histories, REPORTS, prefixes, confusion, facts, shown)
        (REPORTS / "metrics.json").write_text(json.dumps(best(results), indent=1) + "\n")
        log(s, results, trained, written)
    if "torch" in sys.modules:
        raise RuntimeError("the packed evaluator imported torch; expected to run without it")


def evaluated(s: Stage, name: str, images: data.Dataset) -> dict:
    """Scores of one packed file, beside torch's."""
    path = PACKED / f"{name}.bnn"
    if not path.exists():
        raise UserError(f"{path}: expected what stage pack writes")
    program = packfile.load(path)
    p = s.params.evaluate
    model = execute.Model(program, p.ops, p.threads)
    theirs = np.load(PACKED / "torch" / f"{name}.npz")
    compared, different, largest = 0, 0, 0.0
    found, top1, whole, row = {}, {}, {}, {}
    for part, split in (("val", images.val), ("test", images.test)):
        outputs = found[part] = model.outputs(split.images, batch=p.batch)
        scores, predicted = votes.combine(program, outputs)
        _, torch_predicted = votes.combine(program, theirs[part])
        compared += len(split)
        different += int((predicted != torch_predicted).sum())
        largest = max(largest, float(np.abs(outputs - theirs[part]).max(initial=0)))
        top1[part] = 100 * metrics.accuracy(predicted, split.labels)
        whole[part] = 100 * metrics.accuracy(torch_predicted, split.labels)
        if part == "test":
            probabilities = votes.probabilities(program, scores)
            row = {
                "ece": metrics.calibration_error(probabilities, predicted, split.labels),
                "disagreement": metrics.disagreement(outputs.argmax(2)),
                "confusion": metrics.confusion(
                    predicted, split.labels, len(images.classes)
                ).tolist(),
                "wrong": predicted != split.labels,
            }
    print(f"{name:>16}: validation {top1['val']:.2f} %, test {top1['test']:.2f} %", flush=True)
    info = program.info
    counts = storage.counted(program, path.stat().st_size)
    flips = json.loads((PACKED / "torch" / f"{name}.flips.json").read_text())
    for flip in flips:
        print(
            f"{name}: test image {flip['image']}, member {flip['member']}: sign of {flip['layer']} "
            f"flipped, margin {flip['margin']:.3g} of values up to {flip['scale']:.3g}"
        )
    if program.members > 1:
        row |= early_exit(model, images, found)
    narrower = []
    if "pack" not in info:  # a file that is narrow already has nothing to lose
        kept = {"affine": "float32", "weights": "float32", "bytes": counts.file}
        kept["val_top1"] = top1["val"]
        narrower = [kept, *options(program, images, p)]
    figures = costs.estimate(program)
    # Each paper's ensembles are counted as that paper counts.
    first = info.get("scheme") == "tentaclenet"
    bits = counts.tentaclenet if first else counts.filter_sharing
    return {
        "name": name,
        "kind": info["kind"],
        "backbone": info["backbone"],
        "width": info.get("width"),
        "scheme": info.get("scheme"),
        "sharing": info.get("sharing"),
        "settings": settings(s.params, name),
        "members": program.members,
        "val_top1": top1["val"],
        "test_top1": top1["test"],
        "file_bytes": counts.file,
        "packed_as": info.get("pack"),
        "packing_costs": whole["val"] - top1["val"] if "pack" in info else None,
        "counted_kib": bits / 8 / 1024,
        "counted_by": "tentaclenet" if first else "filter_sharing",
        "binary_macs": counts.binary_macs,
        "float_macs": counts.float_macs,
        "ram_kib": figures.ram / 1024,
        "flash_kib": figures.flash / 1024,
        "minstructions": figures.instructions[-1] / 1e6,
        "images_compared": compared,
        "images_different": different,
        "max_logit_difference": largest,
        "flipped_signs": flips,
        "anytime": anytime(model, images.test, found["test"]),
        "options": narrower,
        "counts": counts,
        **row,
    }


def settings(p: params.Params, name: str) -> str | None:
    """What an ensemble's section says beside scheme, sharing by name, and members; in words."""
    section = p.ensembles.named(name)
    if section is None:
        return None
    said = {f.name: getattr(section, f.name) for f in dataclasses.fields(section)
            if f.default != getattr(section, f.name) != {}}  # fmt: skip
    said |= said.pop("recipe", {})
    if not isinstance(section.sharing, str):
        said["owning"] = " ".join((*section.sharing.own, "frozen" * section.sharing.frozen)).strip()
    own = [k for k in said if k not in ("name", "scheme", "sharing", "members")]
    return ", ".join(f"{k} {said[k]}" for k in own) or None


def about(p: params.Params, images: data.Dataset) -> dict:
    """What was evaluated, when, of which commit."""
    counts = np.bincount(images.test.labels, minlength=1)
    parts = {part: len(getattr(images, part)) for part in ("train", "val", "test")}
    return {
        "dataset": p.data.path if p.data.name == "folder" else p.data.name,
        "image": "x".join(map(str, images.image)),
        "classes": len(images.classes),
        "images": ", ".join(f"{count:,} {part}" for part, count in parts.items()),
        "chance_top1": 100 * float(counts.max() / counts.sum()),
        "date": datetime.now().astimezone().isoformat(" ", "minutes"),
        "commit": tracking.commit(ROOT, digits=7),
        "seed": p.seed,
        "params": params.plain(p),
    }


def best(results: list[dict]) -> dict:
    """What `dvc exp show` says of a run: of its BNNs, the one that is best in validation."""
    row = max(results, key=lambda r: (r["kind"] != "fp32", r["val_top1"], -r["file_bytes"]))
    figures = {"test_top1": row["test_top1"], "file_kib": row["file_bytes"] / 1024}
    return {"best": row["name"], **{key: round(value, 2) for key, value in figures.items()}}


def stored(counts: dict[str, storage.Count], narrower: dict[str, list[dict]]) -> list[str]:
    """Lines: where the bytes of every model are, and what narrowing would save."""
    lines = []
    for name, counted in counts.items():
        lines += [f"== {name} ==", *storage.described(counted)]
        lines += [
            f"packed {described(o)} {o['bytes']:>9,} bytes, validation {o['val_top1']:.2f} %"
            for o in narrower[name]
        ]
        lines.append("")
    return lines


def described(option: dict) -> str:
    """What is narrower, for people."""
    if option.get("integer"):
        return f"{'with integers alone':<36}"
    return f"with affine {option['affine']}, weights {option['weights']:<7}"


def options(program: Program, images: data.Dataset, p: params.EvaluateParams) -> list[dict]:
    """What each narrowing that `pack` offers would do to bytes and validation accuracy."""
    rows = []
    for pack in OPTIONS:
        try:
            smaller = narrow.narrowed(program, pack, images.val.images)
        except (narrow.NarrowError, integers.IntegerError) as error:
            print(f"{program.info.get('name', '')}: no option: {error}")
            continue
        model = execute.Model(smaller, p.ops, p.threads)
        predicted = model.predict(images.val.images, batch=p.batch)
        top1 = 100 * metrics.accuracy(predicted, images.val.labels)
        size = len(packfile.encode(smaller))
        kinds: dict = {"affine": pack.affine, "weights": pack.weights}
        kinds |= {"integer": True} if pack.integer else {}
        rows.append({**kinds, "bytes": size, "val_top1": top1})
    return rows


def early_exit(model: execute.Model, images: data.Dataset, outputs: dict) -> dict:
    """Test accuracy and mean members used when each image stops as early as it may.

    `outputs` are the members' of ``val`` and ``test``.

    The threshold on the margin is the smallest that costs nothing on the validation part; votes
    also stop when they are decided.
    """
    val, test = images.val, images.test
    threshold = exits.choose_threshold(model, val.images, val.labels, outputs=outputs["val"])
    (reached,) = exits.exit_curve(model, test.images, test.labels, [threshold], outputs["test"])
    return {
        "exit_threshold": threshold,
        "exit_top1": 100 * (reached["accuracy"] or 0.0),
        "exit_members": reached["mean_members"],
    }


def anytime(model: execute.Model, split: data.Split, outputs: np.ndarray) -> list[dict]:
    """Accuracy and cost with only the first 1..M members, one file serving all."""
    rows = exits.curve(model, split.images, split.labels, outputs)
    return [{**row, "top1": 100 * row["accuracy"], "mean_members": row["members"]} for row in rows]


def curves(name: str) -> dict[str, list[dict]]:
    """The training curves of one model: job name -> a dict an epoch."""
    return json.loads((folder(name) / "histories.json").read_text())


def log(s: Stage, results: list[dict], trained: dict[str, dict], written: list[Path]) -> None:
    """Final figures of every model to MLflow, of cached stages too; `trained`: its `curves`."""
    plain = params.plain(s.params)
    for row in results:
        name = row["name"]
        described = {
            k: row[k] for k in ("kind", "scheme", "sharing", "members", "backbone", "width")
        }
        with s.tracker.model(name, {**described, "model": plain["model"]}) as child:
            # Members that are trained apart have curves, and runs, of their own.
            child.history(metrics.mean_curve(trained[name]))
            child.metrics({k: v for k, v in row.items() if isinstance(v, int | float)})
            child.metrics({"file_kib": row["file_bytes"] / 1024})
            child.artifact(PACKED / f"{name}.bnn")
    for path in written:
        s.tracker.artifact(path, "report")


if __name__ == "__main__":
    run(main, __doc__)
