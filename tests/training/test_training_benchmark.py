"""The training benchmark: both sides train the same network, and its GPU path runs, here on a CPU
and without what a GPU machine may lack."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from benchmarks import gpu, training
from bnncore.networks.ensemble import Ensemble
from bnncore.training.loop import Trainer

ROOT = Path(__file__).parents[2]
ABSENT = ("ray", "mlflow", "optuna", "dvc", "torchensemble", "numba")


def test_the_peers_network_is_the_same_function():
    work = training.job("resnet8", 1, width=8)
    torch.manual_seed(0)
    x, y = torch.randn(6, 3, 32, 32).double(), torch.arange(6)
    peer = training.peers_network(work).double().train()
    (ours,) = Ensemble(work.spec, seed=0).double().train().members
    for module in (*ours.modules(), *peer.modules()):
        if isinstance(module, torch.nn.PReLU):
            # The peer folds alpha into its filters: sums that are 0 become noise of either sign.
            module.weight.data.fill_(1.0)
    expected, got = ours(x), peer(x)
    assert torch.allclose(expected, got, rtol=1e-9)
    for z in (expected, got):
        F.cross_entropy(z, y).backward()
    for (name, p), q in zip(ours.named_parameters(), peer.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or torch.allclose(p.grad, q.grad, rtol=1e-6, atol=1e-9), name


@pytest.mark.slow
def test_the_gpu_benchmark_on_a_cpu_without_what_a_gpu_machine_may_lack(tmp_path):
    script, file = ROOT / "benchmarks" / "gpu.py", tmp_path / "found.json"
    code = (
        "import runpy, sys\n"
        f"for name in {ABSENT!r}: sys.modules[name] = None\n"  # importing one now fails
        f"sys.argv = ['gpu.py', '--device', 'cpu', '--tiny', '--json', {str(file)!r}]\n"
        f"runpy.run_path({str(script)!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert found["correct"]["good"]
    assert len(found["correct"]["errors"]) == 4
    rates = found["rates"]["images_per_s"]
    assert list(rates) == ["2", "1"]
    assert set(rates["2"]) == {"looped", "stacked", "plain loop"}
    assert found["rates"]["projected"]["seconds"] > 0
    assert set(found["memory"]) == {"replayed", "looped", "stacked", "seconds"}
    assert len(found["training"]["epochs"]) == 2


def test_a_part_that_fails_or_has_no_time_left_does_not_lose_the_others(tmp_path, monkeypatch):
    def fails(day):
        raise RuntimeError("no such kernel")

    parts = {"one": lambda day: {"good": True}, "two": fails, "three": lambda day: day.end()}
    monkeypatch.setattr(gpu, "PARTS", {**parts, "four": parts["one"]})
    monkeypatch.setattr(gpu.Day, "end", lambda day: setattr(day, "until", 0.0) or {}, raising=False)
    day = gpu.Day("cpu", time.perf_counter() + 60, tmp_path / "found.json")
    gpu.measure(day)
    found = json.loads(day.file.read_text())
    assert found["one"]["good"]
    assert found["two"]["error"] == "RuntimeError: no such kernel"
    assert found["four"]["left_out"] == "no time left"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_gpu_without_one_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit, match="2"):
        gpu.main()
    assert "--device: expected a CUDA device, got none" in capsys.readouterr().err


def test_the_estimate_of_memory_grows_with_the_batch_but_not_its_filters():
    work = training.job("resnet8", 2, width=16)
    trainer = Trainer(work, training.dataset(16), device="cpu")
    small, large = (trainer.saved_bytes(images, sample=2) for images in (4, 16))
    exact = trainer.saved_bytes(8, sample=8)
    assert trainer.saved_bytes(8, sample=2) == pytest.approx(exact, rel=0.01)
    assert small < large < 4 * small
