"""The training benchmark: both sides train the same network, and its GPU path runs, here on a CPU
and without what a GPU machine may lack."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from benchmarks import training
from benchmarks.rows import Bench
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


def test_gpu_rows_on_a_cpu(capsys):
    bench = Bench(time.perf_counter)
    training.gpu(bench, "cpu", (1, 2), 4, 1, False, "resnet8", width=8)
    assert [row["name"] for row in bench.rows] == [
        f"resnet8, fusion, M = {members}, batch 4, eager" for members in (1, 2)
    ]
    assert all(row["ours_s"] > 0 and row["ratio"] > 0 for row in bench.rows)
    assert "projected for 200 epochs of 50000 images at M = 2" in "\n".join(bench.notes)
    assert "images a second on cpu" in capsys.readouterr().out


@pytest.mark.slow
def test_gpu_rows_need_no_cluster_tracking_or_peer():
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        f"for name in {ABSENT!r}: sys.modules[name] = None\n"  # importing one now fails
        "import time\n"
        "from benchmarks import training\n"
        "from benchmarks.rows import Bench\n"
        "training.describe()\n"
        "training.gpu(Bench(time.perf_counter), 'cpu', (1,), 4, 1, False, 'resnet8', width=8)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "plain loop" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_gpu_without_one_is_refused():
    script = str(ROOT / "benchmarks" / "training.py")
    done = subprocess.run([sys.executable, script, "--gpu"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "--gpu: expected a CUDA device, got none" in done.stderr


def test_the_estimate_of_memory_grows_with_the_batch_but_not_its_filters():
    work = training.job("resnet8", 2, width=16)
    trainer = Trainer(work, training.dataset(16), device="cpu")
    small, large = (trainer.saved_bytes(images, sample=2) for images in (4, 16))
    exact = trainer.saved_bytes(8, sample=8)
    assert trainer.saved_bytes(8, sample=2) == pytest.approx(exact, rel=0.01)
    assert small < large < 4 * small
