"""Stage pack: lower every trained model into a packed file; keep torch's outputs for comparison."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict

import numpy as np

from bnncore import data, params
from bnncore.lowering import packing, parity
from bnncore.networks.ensemble import Ensemble
from bnncore.packed import execute, packfile, votes
from bnncore.packed.program import Program
from bnncore.training import ensembled, plans
from pipeline.stage import PACKED, folder, run, stage


def main() -> None:
    with stage() as s:
        images = s.images()
        read = {name: trained(name, s.params, images) for name in s.models()}
        shutil.rmtree(PACKED, ignore_errors=True)
        (PACKED / "torch").mkdir(parents=True)
        for name, model in read.items():
            section = s.params.ensembles.named(name)
            parts = ("val", "test")
            found = packing.packed(model, s.params, images, name, section, parts)
            size = packfile.save(found.program, PACKED / f"{name}.bnn")
            np.savez(PACKED / "torch" / f"{name}.npz", val=found.theirs["val"],
                     test=found.theirs["test"])  # fmt: skip
            taken = packing.words(found.pack)
            # Rounded numbers flip signs; only those of exact files want an explanation.
            flips = [] if taken else differences(
                model.ensemble(), found.program, images, found.theirs["test"])  # fmt: skip
            (PACKED / "torch" / f"{name}.flips.json").write_text(json.dumps(flips))
            cost = (
                f"  {taken}, {0.0 - found.drop:+.2f} points of validation accuracy" if taken else ""
            )
            print(f"{name:>16}: {size:8,} bytes{cost}", flush=True)
        params.save(s.params, PACKED / "params.yaml")


def trained(name: str, p: params.Params, images: data.Dataset) -> ensembled.Ensembled:
    """A model, which must be what the parameters say: its file will say it of itself.

    Raises:
        ModelError: it is another one, of other parameters, or none; names its folder.
    """
    found = ensembled.Ensembled.read(folder(name))
    section = p.ensembles.named(name)
    if section is None:
        expected = plans.single_spec(p, images.image, len(images.classes), binary=name == "bnn")
    else:
        expected = plans.ensemble_spec(p, section, images.image, len(images.classes))
    if found.spec != expected:
        raise ensembled.ModelError(
            f"{folder(name)}: expected a model of today's params.yaml, it was trained by others; "
            "`dvc repro` trains it anew"
        )
    return found


def differences(
    ensemble: Ensemble, program: Program, images: data.Dataset, theirs: np.ndarray
) -> list[dict]:
    """Test images that are classified differently by the packed program, traced to a sign."""
    _, expected = votes.combine(program, theirs)
    predicted = execute.Model(program).predict(images.test.images)
    at = np.flatnonzero(predicted != expected)
    flips = (
        parity.first_flips(ensemble, program, images.test.images[at], images.mean, images.std)
        if len(at)
        else []
    )
    return [{**asdict(flip), "image": int(at[flip.image])} for flip in flips]


if __name__ == "__main__":
    run(main, __doc__)
