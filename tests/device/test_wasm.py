"""WebAssembly in node against the evaluator; in a browser: tests/report/test_panel.py."""

from __future__ import annotations

import json
import shutil
import subprocess

import numpy as np
import pytest

from bnncore.device import compilers, wasm
from bnncore.packed import execute
from tests.device.test_export import agree, network
from tests.graphs import random_images, random_program

pytestmark = pytest.mark.skipif(
    bool(compilers.missing("ziglang")) or not shutil.which("node"), reason="needs ziglang and node"
)
CALLS = """
const [file, images, classes, members] = JSON.parse(require("fs").readFileSync(0));
WebAssembly.instantiate(require("fs").readFileSync(file)).then(({ instance: { exports: m } }) => {
  const floats = (at) => Array.from(new Float32Array(m.memory.buffer, at, classes));
  const run = (k) => ({ label: m.scores(k), scores: floats(m.out()), own: floats(m.outputs()) });
  console.log(JSON.stringify(images.map((image) => {
    new Uint8Array(m.memory.buffer, m.image(), image.length).set(image);
    const found = Array.from({ length: members }, (_, k) => run(k + 1));
    const early = [m.early(0), m.used(), m.early(1e30), m.used()];
    return { found, early, beyond: m.scores(members + 1) };
  })));
});
"""
PROGRAMS = {
    "integers": lambda: network("leanresnet8", "shared_conv", whole=True),
    "hard votes of integers": lambda: network("fernet", "no_shared", "hard_vote", whole=True),
    "floats": lambda: network("resnet8", "tentaclenet", "sum"),
    **{f"random {seed}": lambda seed=seed: random_program(seed) for seed in (3, 70, 3222)},
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_module_gives_the_evaluators_scores_for_every_number_of_members(tmp_path, name):
    program = PROGRAMS[name]()
    file = tmp_path / "net.wasm"
    file.write_bytes(wasm.module(program))
    images = random_images(program, 4)
    asked = [str(file), images.reshape(len(images), -1).tolist(), len(program.classes),
             program.members]  # fmt: skip
    done = subprocess.run(["node", "-e", CALLS], input=json.dumps(asked), text=True,
                          capture_output=True, check=True)  # fmt: skip
    got = json.loads(done.stdout)
    own = execute.Model(program, "numpy").outputs(images)
    for k in range(program.members):
        found = [image["found"][k] for image in got]
        labels = np.array([row["label"] for row in found])
        agree(program, images, k + 1, labels, np.float32([row["scores"] for row in found]))
        assert np.allclose([row["own"] for row in found], own[k], rtol=1e-4, atol=1e-3)
    for image in got:
        assert image["beyond"] == -1
        assert image["early"][1::2] == [1, program.members]
        assert image["early"][::2] == [image["found"][k]["label"] for k in (0, -1)]
