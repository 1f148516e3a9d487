"""One command for the day when there is a GPU: is training right there, how fast, in what memory?

    python benchmarks/gpu.py --json gpu.json                        at most 9 minutes
    python benchmarks/gpu.py --json gpu.json --data data/cifar10    and a real training to the end
    python benchmarks/gpu.py --json gpu.json --device cpu --tiny    the same on a CPU, in seconds

Needs torch, numpy, pydantic, PyYAML, safetensors, Pillow and tqdm. The file is written anew when a
part is done, so that what was found is not lost with the machine; what had no time left says so.

correct    gradients of a step in float64 against the loop over members on the CPU: stacked or not,
           compiled or not
rates      images a second of ResNet-20 fusion, M = 10, 4, 2, 1: looped, stacked, stacked and
           compiled, against torchensemble's way (a loop over plain modules, one backward pass) and,
           where it is installed, the library; and what 200 epochs at M = 10 would take
memory     of a step of ResNet-18, M = 10, batch 256: replayed, looped, stacked
training   fusion of ResNet-20, M = 10, on a folder of CIFAR-10 for as long as there is time
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from benchmarks.rows import machine
from benchmarks.training import dataset, in_stacks, job, peak_bytes, peers_network, stepper
from bnncore import data
from bnncore.data import Dataset
from bnncore.params import DataParams
from bnncore.training import devices, layers
from bnncore.training.feed import Feed
from bnncore.training.jobs import Epoch, Job
from bnncore.training.loop import Trainer, drive

Found = dict[str, Any]
LEFT_S = 150  # that must be left for another number of members, most of it to compile
THEIRS_S = 31_206  # Kim et al. 2022, Table 4: fusion of ten ResNet-20 on two V100


@dataclass
class Day:
    """What is measured, where, and until when.

    Attributes:
        until: when a part must be done, by `time.perf_counter`.
        found: part -> what it found.
    """

    device: str
    until: float
    file: Path | None
    folder: Path | None = None
    tiny: bool = False
    compiling: bool = True
    found: Found = field(default_factory=dict)

    @property
    def counts(self) -> tuple[int, ...]:
        return (2, 1) if self.tiny else (10, 4, 2, 1)

    @property
    def batch(self) -> int:
        return 4 if self.tiny else 128

    def job(self, members: int, backbone: str = "resnet20", **recipe: Any) -> Job:
        small = {"width": 8} if self.tiny else {}
        name = "resnet8" if self.tiny else backbone
        return job(name, members, **{"batch_size": self.batch, "stack": 1, **recipe, **small})

    def left(self) -> float:
        return self.until - time.perf_counter()

    def save(self) -> None:
        if self.file:
            self.file.write_text(json.dumps(self.found, indent=1) + "\n")

    def ways(self, of: Job, compiled: int) -> Iterator[tuple[str, Job]]:
        """The job looped and stacked, eager, and the last so many of these compiled."""
        stacks = sorted({1, len(of.ids)})
        for stack in stacks:
            name = "looped" if stack == 1 else "stacked"
            yield name, in_stacks(of, stack)
        for stack in stacks[-compiled:] if self.compiling else []:
            name = "looped, compiled" if stack == 1 else "stacked, compiled"
            yield name, in_stacks(of, stack, compile="always")


# ---- parts -------------------------------------------------------------------------------------


def correct(day: Day) -> Found:
    """The largest error of a gradient, relative to that parameter's largest, for each way."""

    def gradients(of: Job, device: str) -> dict[str, torch.Tensor]:
        trainer = Trainer(of, images, device=device)
        x, y = trainer.feed.normalized(trainer.feed.images), trainer.feed.labels
        trainer.step(x, y, {})
        return {name: g.cpu() for name, g in trainer.step.gradients().items()}

    batch = 4 if day.tiny else 16
    images, errors = dataset(batch), {}
    with float64():
        for sharing in ("shared_conv", "tentaclenet"):
            of = day.job(2 if day.tiny else 4, "resnet8", sharing=sharing, batch_size=batch)
            expected = gradients(of, "cpu")
            for label, way in day.ways(of, compiled=2):
                got = gradients(way, day.device)
                apart = {n: float((got[n] - g).norm() / g.norm()) for n, g in expected.items()}
                worst = max(apart, key=lambda n: apart[n])
                errors[f"{sharing}, {label}"] = {"error": apart[worst], "of": worst}
    return {"errors": errors, "good": all(e["error"] < 1e-9 for e in errors.values())}


@contextmanager
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def rates(day: Day) -> Found:
    """Images a second, medians of steps in turns, and what a whole training would take."""
    rounds, images = (1, dataset(day.batch)) if day.tiny else (20, dataset(day.batch))
    table: dict[str, dict[str, float]] = {}
    for members in day.counts:
        if table and day.left() < LEFT_S:
            break
        of = day.job(members)
        steps = {
            label: stepper(Trainer(way, images, device=day.device), day.batch)
            for label, way in day.ways(of, compiled=1)
        }
        steps["plain loop"] = plain_loop(of, images, day.batch, day.device)
        if importlib.util.find_spec("torchensemble"):
            steps["torchensemble"] = library(of, images, day.batch, day.device)
        taken: dict[str, list[float]] = {label: [] for label in steps}
        for number in range(rounds + 2):  # two to compile, and to fill caches
            for label, step in steps.items():
                start = time.perf_counter()
                step()
                if number > 1:
                    taken[label].append(time.perf_counter() - start)
        table[str(members)] = {k: day.batch / statistics.median(v) for k, v in taken.items()}
        day.found["rates"] = {"images_per_s": table}
        day.save()
    best = max(
        v for k, v in table[str(day.counts[0])].items() if k.startswith(("looped", "stacked"))
    )
    whole = 200 * 50_000 / best
    return {
        "images_per_s": table,
        "projected": {"epochs": 200, "images": 50_000, "seconds": whole, "theirs_s": THEIRS_S},
    }


def plain_loop(work: Job, images: Dataset, batch: int, device: str) -> Callable[[], object]:
    """A fusion step as torchensemble has it, without the library: plain modules, one after another,
    the mean of their outputs, one backward pass, one optimizer."""
    network = peers_network(work)
    members = nn.ModuleList(copy.deepcopy(network) for _ in work.ids).to(device).train()
    optimizer = torch.optim.Adam(members.parameters(), lr=work.recipe.lr)
    feed = Feed(work, images, torch.device(device))
    x, y = feed.normalized(feed.images[:batch]), feed.labels[:batch]

    def step() -> None:
        optimizer.zero_grad()
        logits = torch.stack([member(x) for member in members]).mean(0)
        nn.functional.cross_entropy(logits, y).backward()
        optimizer.step()
        devices.wait(x.device)

    return step


def library(work: Job, images: Dataset, batch: int, device: str) -> Callable[[], object]:
    """A step of torchensemble's FusionClassifier: its own forward pass over its own members."""
    import torchensemble

    fusion = torchensemble.FusionClassifier(
        peers_network(work), len(work.ids), cuda=device == "cuda"
    )
    fusion.estimators_ = nn.ModuleList(fusion._make_estimator() for _ in work.ids).to(device)
    fusion.train()
    optimizer = torch.optim.Adam(fusion.estimators_.parameters(), lr=work.recipe.lr)
    feed = Feed(work, images, torch.device(device))
    x, y = feed.normalized(feed.images[:batch]), feed.labels[:batch]

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(fusion._forward(x), y).backward()
        optimizer.step()
        devices.wait(x.device)

    return step


def memory(day: Day) -> Found:
    """The most bytes that were allocated in a step; on a CPU by the whole process until then."""
    members, batch = (2, 4) if day.tiny else (10, 256)
    images, found = dataset(batch), {}
    for label, stack, replay in (
        ("replayed", 1, True),
        ("looped", 1, False),
        ("stacked", members, False),
    ):
        gc.collect()  # the last trainer, whose parts know each other
        if day.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        of = day.job(members, "resnet18", batch_size=batch, stack=stack)
        step = stepper(Trainer(of, images, device=day.device, replay=replay), batch)
        try:
            step()
            start = time.perf_counter()
            step()
        except torch.OutOfMemoryError as error:
            found[label] = {"out_of_memory": str(error).partition("\n")[0]}
        else:
            seconds = time.perf_counter() - start
            peak = torch.cuda.max_memory_allocated() if day.device == "cuda" else peak_bytes()
            found[label] = {"bytes": peak, "seconds": seconds}
        del step
    return found


class TimeIsUp(Exception):
    """Between two epochs."""


def training(day: Day) -> Found:
    """Members from fresh weights, on the joint loss, as `ensemble-train` trains them."""
    if day.folder is None and not day.tiny:
        return {"left_out": "no --data"}
    images = dataset(16, 8)
    if day.folder is not None:
        images = data.load(DataParams(name="cifar10", path=str(day.folder.resolve())))
    recipe = {"epochs": 2 if day.tiny else 200, "augment": "crop_flip", "schedule": "cosine"}
    of = day.job(day.counts[0], stack="auto", compile="auto", **recipe)
    epochs: list[Epoch] = []

    def told(_: Job, epoch: Epoch) -> None:
        epochs.append(epoch)
        day.found["training"] = {"epochs": epochs}
        day.save()
        if day.left() < 1.5 * epoch["seconds"]:
            raise TimeIsUp

    try:
        drive(of, images, Trainer(of, images, device=day.device, replay=None), on_epoch=told)
    except TimeIsUp:
        return {
            "epochs": epochs,
            "ended": f"after {len(epochs)} of {of.recipe.epochs}: no more time",
        }
    return {"epochs": epochs}


PARTS = {"correct": correct, "rates": rates, "memory": memory, "training": training}


def measure(day: Day) -> Found:
    """All parts, each saved when it is done."""
    for name, part in PARTS.items():
        began = time.perf_counter()
        if day.left() < 0:
            found: Found = {"left_out": "no time left"}
        else:
            try:
                found = part(day)
            except Exception as error:  # what the others find is worth having
                found = {**day.found.get(name, {}), "error": f"{type(error).__name__}: {error}"}
        day.found[name] = {**found, "seconds": round(time.perf_counter() - began, 2)}
        day.save()
        print(f"{name}: {json.dumps(day.found[name])}", flush=True)
    return day.found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="small networks and batches")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="of CIFAR-10")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what is found there")
    parser.add_argument("--minutes", type=float, default=9.0, help="in which all must be done")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device: expected a CUDA device, got none (torch {torch.__version__})")
    until = time.perf_counter() + 60 * options.minutes
    compiling = not options.tiny and layers.can_compile(torch.device(options.device))
    day = Day(options.device, until, options.json, options.data, options.tiny, compiling)
    if options.device == "cpu":
        torch.set_num_threads(1)
    where = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    about = machine((), ("numpy", "torch")).splitlines()
    day.found["about"] = {"device": where, "compiled": compiling, "machine": about}
    found = measure(day)
    if any("error" in part for part in found.values()) or not found["correct"].get("good", True):
        sys.exit(1)


if __name__ == "__main__":
    main()
