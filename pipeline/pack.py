"""Stage pack: lower every trained model into a packed file; keep torch's outputs for comparison."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np

from bnncore import data, metrics, params
from bnncore.lowering import lower, parity
from bnncore.networks.ensemble import Ensemble
from bnncore.packed import execute, narrow, packfile
from bnncore.training import inference
from bnncore.training.ensembled import Ensembled
from pipeline.stage import MODELS, PACKED, ROOT, run, stage


def models() -> dict[str, Path]:
    """Name -> folder of everything that the earlier stages trained, in the order of the table."""
    ensembles = [path.parent for path in sorted((MODELS / "ensembles").glob("*/spec.json"))]
    return {folder.name: folder for folder in (MODELS / "fp32", MODELS / "bnn", *ensembles)}


def main() -> None:
    with stage() as s:
        images = data.load(s.params.data, ROOT)
        order = [e.name for e in s.params.ensembles.train]
        shutil.rmtree(PACKED, ignore_errors=True)
        (PACKED / "torch").mkdir(parents=True)
        found = models()
        for name in ("fp32", "bnn", *order):
            trained = Ensembled.read(found[name])
            ensemble = trained.ensemble()
            section = next((e for e in s.params.ensembles.train if e.name == name), None)
            info = facts(s.params, name, section)
            program = lower.lower(ensemble, images.mean, images.std, images.classes, info)
            theirs = torch_outputs(ensemble, images)
            _, predicted = execute.combine(program, theirs["val"])
            program.info["val_top1"] = round(
                100 * metrics.accuracy(predicted, images.val.labels), 2
            )
            program = narrow.narrowed(program, s.params.pack)
            size = packfile.save(program, PACKED / f"{name}.bnn")
            np.savez(PACKED / "torch" / f"{name}.npz", val=theirs["val"], test=theirs["test"])
            flips = differences(ensemble, program, images, theirs["test"])
            (PACKED / "torch" / f"{name}.flips.json").write_text(json.dumps(flips))
            print(f"{name:>16}: {size:8,} bytes", flush=True)
        params.save(s.params, PACKED / "params.yaml")


def differences(
    ensemble: Ensemble, program, images: data.Dataset, theirs: np.ndarray
) -> list[dict]:
    """Test images that are classified differently by the packed program, traced to a sign."""
    _, expected = execute.combine(program, theirs)
    predicted = execute.Model(program).predict(images.test.images)
    at = np.flatnonzero(predicted != expected)
    flips = (
        parity.first_flips(ensemble, program, images.test.images[at], images.mean, images.std)
        if len(at)
        else []
    )
    return [{**asdict(flip), "image": int(at[flip.image])} for flip in flips]


def facts(p: params.Params, name: str, section: params.EnsembleParams | None) -> dict:
    """What the file says of itself."""
    found = {"name": name, "backbone": p.model.backbone, "kind": name, "seed": p.seed}
    if p.model.width:
        found["width"] = p.model.width
    if section is not None:
        sharing = section.sharing
        found |= {
            "kind": "ensemble",
            "scheme": section.scheme,
            "sharing": sharing if isinstance(sharing, str) else sharing.name,
        }
    return found


def torch_outputs(ensemble: Ensemble, images: data.Dataset) -> dict[str, np.ndarray]:
    """Member outputs of torch on the validation and test parts, (M, N, C) float32 each."""
    return {
        "val": inference.member_outputs(ensemble, images.val.images, images),
        "test": inference.member_outputs(ensemble, images.test.images, images),
    }


if __name__ == "__main__":
    run(main)
