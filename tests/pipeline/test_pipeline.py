"""The pipeline as a DVC user runs it, on digits and a few epochs, in a copy of the project."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from safetensors.numpy import load_file

from bnncore.packed import packfile
from tests import processes

ROOT = Path(__file__).parents[2]
STAGES = ("pretrain", "binarize", "ensemble-train", "pack", "evaluate")


# -- a copy to run in ------------------------------------------------------------------------------

TINY = {
    "pack": {},  # nothing rounded, so that packed and trained models can be compared exactly
    "model": {"backbone": "nin", "width": 8, "dropout": 0.0},
    "pretrain": {"epochs": 2, "batch_size": 128, "lr": 0.01},
    "binarize": {"epochs": 3, "batch_size": 128, "lr": 0.01},
    "ensembles": {
        "recipe": {"epochs": 2, "batch_size": 128, "lr": 0.01},
        "train": [
            {"name": "tentacles", "scheme": "tentaclenet", "sharing": "tentaclenet",
             "members": 2, "start": "hadamard"},
            {"name": "fused", "scheme": "fusion", "sharing": "shared_conv", "members": 2},
            {"name": "voted", "scheme": "voting", "sharing": "shared_conv", "members": 2},
        ],
    },
}  # fmt: skip


def copy(folder: Path, params: dict) -> Path:
    """The project as git would hand it out, with other parameters, in a repository of its own."""
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    for name in files:
        if (ROOT / name).is_file() and not name.startswith(("tests/", "benchmarks/", "docs/")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    merged = {**yaml.safe_load((ROOT / "params.yaml").read_text()), **params}
    (folder / "params.yaml").write_text(yaml.safe_dump(merged, sort_keys=False))
    (folder / "dvc.lock").unlink(missing_ok=True)
    subprocess.run(["git", "init", "-q", "."], cwd=folder, check=True)
    return folder


QUIET = {"MLFLOW_TRACKING_URI": "none"}  # each stage would start a process that logs


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_", "DVC_"))}
    return {**kept, "PATH": path, "PYTHONUNBUFFERED": "1", **more}


def dvc(folder: Path, *arguments: str, ok: bool = True, **more: str) -> str:
    done = subprocess.run(
        ["dvc", *arguments], cwd=folder, env=environment(**more),
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    output = done.stdout + done.stderr
    if ok:
        assert done.returncode == 0, output[-4000:]
    else:
        assert done.returncode != 0, output[-4000:]
    return output


def ran(output: str) -> list[str]:
    """Stages that ran, but for inputs, which always does."""
    return [stage for stage in STAGES if f"Running stage '{stage}'" in output]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = copy(tmp_path_factory.mktemp("pipeline"), TINY)
    assert ran(dvc(folder, "repro", **QUIET)) == list(STAGES)
    return folder


@pytest.mark.slow
class TestTheWholePipeline:
    def test_the_report_has_every_model(self, finished):
        results = json.loads((finished / "reports/results.json").read_text())
        assert [r["name"] for r in results] == ["fp32", "bnn", "tentacles", "fused", "voted"]
        for row in results:
            assert row["images_compared"] > 600
            assert row["images_different"] == 0
            assert row["max_logit_difference"] < 1e-4
            assert 0 < row["test_top1"] <= 100
            assert row["file_bytes"] == (finished / f"packed/{row['name']}.bnn").stat().st_size
            assert row["counted_kib"] * 1024 < row["file_bytes"]
        for name in ("accuracy_bytes", "accuracy_members", "curves", "anytime"):
            assert (finished / f"reports/{name}.png").read_bytes()[:4] == b"\x89PNG"

    def test_members_differ(self, finished):
        results = {
            r["name"]: r for r in json.loads((finished / "reports/results.json").read_text())
        }
        assert all(results[n]["disagreement"] > 0 for n in ("tentacles", "fused", "voted"))

    def test_shared_filters_are_stored_once(self, finished):
        program = packfile.load(finished / "packed/fused.bnn")
        binary = [t for t in program.tensors.values() if t.kind == "binary" and t.role == "weight"]
        assert binary
        assert not any(t.own for t in binary)

    def test_nothing_changed_nothing_runs(self, finished):
        assert ran(dvc(finished, "repro", **QUIET)) == []

    def test_other_images_run_all(self, finished, tmp_path):
        """DVC goes by what stage inputs writes; test_inputs has what it writes of which change."""
        folder = tmp_path / "copy"
        shutil.copytree(finished, folder, symlinks=True)
        code = (folder / "pipeline/inputs.py").read_text()
        other = code.replace('{"files": len(images)', '{"files": 1 + len(images)')
        assert other != code
        (folder / "pipeline/inputs.py").write_text(other)
        dvc(folder, "repro", "inputs", **QUIET)
        assert ran(dvc(folder, "repro", "--dry", **QUIET)) == list(STAGES)

    def test_pack_changes_rerun_pack_and_evaluate_only(self, finished, tmp_path):
        folder = tmp_path / "copy"
        shutil.copytree(finished, folder, symlinks=True)
        params = yaml.safe_load((folder / "params.yaml").read_text())
        params["pack"]["affine"] = "float16"
        (folder / "params.yaml").write_text(yaml.safe_dump(params))
        assert ran(dvc(folder, "repro", **QUIET)) == ["pack", "evaluate"]

    def test_dvc_shows_metrics_and_stages(self, finished):
        shown = dvc(finished, "metrics", "show", "--md").splitlines()
        (row,) = (line for line in shown if "metrics/fused.json" in line)
        assert "test_top1" in shown[0]
        assert row.count("|") == shown[0].count("|")
        assert "ensemble-train" in dvc(finished, "dag")

    def test_mlflow_has_a_parent_and_a_child_a_model(self, finished):
        """Of stages that ran before, too: evaluate logs what it finds."""
        from mlflow import MlflowClient

        dvc(finished, "repro", "--single-item", "--force", "evaluate",
            MLFLOW_TRACKING_URI="sqlite:///mlflow.db")  # fmt: skip
        client = MlflowClient(f"sqlite:///{finished / 'mlflow.db'}")
        experiment = client.get_experiment_by_name("bnncore")
        runs = client.search_runs([experiment.experiment_id])
        parents = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
        assert len(parents) == 1
        children = {
            r.info.run_name: r
            for r in runs
            if r.data.tags.get("mlflow.parentRunId") == parents[0].info.run_id
        }
        assert {"fp32", "bnn", "tentacles", "fused", "voted"} <= set(children)
        assert "test_top1" in children["fused"].data.metrics
        curve = client.get_metric_history(children["bnn"].info.run_id, "val_top1")
        assert {m.step for m in curve} >= {1, 2, 3}


# -- killed and started again ----------------------------------------------------------------------


def killed_once(folder: Path, stage: str, after_epochs: int) -> str:
    """Start `dvc repro`; SIGKILL it and all its children once a checkpoint has so many epochs."""
    running = subprocess.Popen(
        ["dvc", "repro"], cwd=folder, env=environment(**QUIET),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 240
    try:
        while time.monotonic() < deadline:
            for path in (folder / "checkpoints" / stage).glob("*/state.safetensors"):
                if epochs(path) >= after_epochs:
                    return f"killed at {epochs(path)} epochs of {path.parent.name}"
            assert running.poll() is None, running.stdout.read()
            time.sleep(0.01)
        raise AssertionError(f"no checkpoint of {stage} in time")
    finally:
        # dvc first: when it sees its stage die, it begins to rewrite its lock file, and would be
        # killed with that file half written
        processes.kill([running.pid, *processes.descendants(running.pid)])
        running.communicate()


def epochs(path: Path) -> int:
    from safetensors import safe_open

    try:
        with safe_open(path, "np") as file:
            return len(json.loads(file.metadata()["history"]))
    except FileNotFoundError:
        return 0


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["binarize", "ensemble-train"])
def test_a_killed_run_ends_with_the_same_weights(finished, tmp_path, stage):
    folder = copy(tmp_path / "killed", TINY)
    print(killed_once(folder, stage, 1))
    done = "models/bnn" if stage == "binarize" else "models/ensembles/voted"
    assert not (folder / done / "weights.safetensors").exists()  # it was not finished
    dvc(folder, "repro", "ensemble-train", **QUIET)
    for path in sorted((finished / "models").rglob("weights.safetensors")):
        ours = load_file(folder / path.relative_to(finished))
        theirs = load_file(path)
        assert ours.keys() == theirs.keys()
        assert all((ours[name] == theirs[name]).all() for name in theirs), path
