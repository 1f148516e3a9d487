"""The pipeline as a DVC user runs it, on digits and a few epochs, in a copy of the project."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from safetensors import safe_open
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
    for compiled in ROOT.glob("bnncore/packed/__pycache__/*.nb?"):  # as good for equal files there
        (folder / compiled.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copy2(compiled, folder / compiled.relative_to(ROOT))
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
        capture_output=True, text=True,
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


@pytest.fixture(scope="module")
def narrower(finished, tmp_path_factory) -> tuple[Path, list[str]]:
    """A copy, packed otherwise and logged, and the stages that ran for it."""
    folder = tmp_path_factory.mktemp("narrower") / "copy"
    shutil.copytree(finished, folder, symlinks=True)
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["pack"]["affine"] = "float16"
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    return folder, ran(dvc(folder, "repro", MLFLOW_TRACKING_URI="sqlite:///mlflow.db"))


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
        (folder / "models/inputs/images.json").write_text("{}")
        assert ran(dvc(folder, "repro", "--dry", **QUIET)) == list(STAGES)

    def test_pack_changes_rerun_pack_and_evaluate_only(self, narrower):
        assert narrower[1] == ["pack", "evaluate"]

    def test_dvc_shows_metrics_and_stages(self, finished):
        results = json.loads((finished / "reports/results.json").read_text())
        best = max(results[1:], key=lambda r: (r["val_top1"], -r["file_bytes"]))
        shown = json.loads((finished / "reports/metrics.json").read_text())
        assert shown == {"best": best["name"], "test_top1": round(best["test_top1"], 2),
                         "file_kib": round(best["file_bytes"] / 1024, 2)}  # fmt: skip
        dvc(finished, "plots", "show")
        page = (finished / "dvc_plots/index.html").read_text()
        for name in ("test accuracy by model", "test accuracy by bytes", best["name"]):
            assert name in page
        assert "ensemble-train" in dvc(finished, "dag")

    def test_mlflow_has_a_parent_and_a_child_a_model(self, narrower):
        """Of stages that ran before, too: evaluate logs what it finds."""
        from mlflow import MlflowClient

        client = MlflowClient(f"sqlite:///{narrower[0] / 'mlflow.db'}")
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


def interrupted(
    folder: Path, stage: str, model: str, kill: Callable[[subprocess.Popen], None], **more: str
) -> dict[str, list[dict]]:
    """Run one stage by `dvc repro`, have it killed before `model` is trained, and run it again.

    Returns:
        What its checkpoints had when it was killed, as `curves` has it.
    """
    shutil.rmtree(folder / "models" / model)
    command = ["repro", "--single-item", "--force", stage]
    running = subprocess.Popen(
        ["dvc", *command], cwd=folder, env=environment(**QUIET, **more),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 240
    try:
        while not curves(folder, stage):
            assert running.poll() is None, running.stdout.read()
            assert time.monotonic() < deadline, f"no checkpoint of {stage} in time"
            time.sleep(0.01)
        kill(running)
    finally:
        processes.kill([running.pid, *processes.descendants(running.pid)])
        running.communicate()
    assert not (folder / "models" / model).exists(), "it was not finished"
    found = curves(folder, stage)
    assert ran(dvc(folder, *command, **QUIET)) == [stage]
    return found


def curves(folder: Path, stage: str) -> dict[str, list[dict]]:
    """Name of a job -> the epochs that its checkpoint has."""
    found = {}
    for path in (folder / "checkpoints" / stage).glob("*/state.safetensors"):
        with safe_open(path, "np") as file:
            found[path.parent.name.partition("-")[0]] = json.loads(file.metadata()["history"])
    return found


def everything(running: subprocess.Popen) -> None:
    # dvc first: when it sees its stage die, it begins to rewrite its lock file, and would be
    # killed with that file half written
    processes.kill([running.pid, *processes.descendants(running.pid)])


# The next test is the short form: it goes on where it was. That this comes to the same bits is
# tests/training/test_loop and, over actors, tests/cluster/test_drivers_and_nodes.
@pytest.mark.soak
@pytest.mark.parametrize(
    ("stage", "model"), [("binarize", "bnn"), ("ensemble-train", "ensembles/voted")]
)
def test_a_killed_run_ends_with_the_same_weights(finished, tmp_path, stage, model):
    folder = tmp_path / "killed"
    shutil.copytree(finished, folder, symlinks=True)
    assert interrupted(folder, stage, model, everything)
    for path in sorted((finished / "models" / model).parent.rglob("weights.safetensors")):
        ours = load_file(folder / path.relative_to(finished))
        theirs = load_file(path)
        assert ours.keys() == theirs.keys()
        assert all((ours[name] == theirs[name]).all() for name in theirs), path


@pytest.mark.slow
def test_sigkill_of_dvc_ends_its_stage_and_the_next_goes_on(finished, tmp_path):
    """Else the stage would train on, and its successor could not have its checkpoints."""
    folder = tmp_path / "killed"
    shutil.copytree(finished, folder, symlinks=True)
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["ensembles"] = {
        "recipe": {"epochs": 40, "batch_size": 256, "lr": 0.01},
        "train": [params["ensembles"]["train"][1]],
    }
    (folder / "params.yaml").write_text(yaml.safe_dump(params))

    def dvc_alone(running: subprocess.Popen) -> None:
        those = {p: processes.began(p) for p in processes.descendants(running.pid)}
        assert len(those) > 4, "Ray's are among them"
        try:
            os.kill(running.pid, signal.SIGKILL)
            running.wait()
            assert processes.gone(those, 120)
        finally:
            processes.kill(p for p, at in those.items() if at and processes.began(p) == at)

    # Ray's agents wait a minute for a server that is gone.
    quick = {"RAY_gcs_rpc_server_reconnect_timeout_s": "5"}
    found = interrupted(folder, "ensemble-train", "ensembles/fused", dvc_alone, **quick)["fused"]
    assert len(found) < 40
    trained = json.loads((folder / "models/ensembles/fused/histories.json").read_text())["fused"]
    assert len(trained) == 40
    assert trained[: len(found)] == found, "to the second as it was before"
