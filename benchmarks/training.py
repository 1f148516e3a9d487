"""How fast ensembles train, against torchensemble and against fewer actors; what memory they take.

    python benchmarks/training.py                   everything; half an hour on two idle cores
    python benchmarks/training.py --only NAME ..     fusion, voting, stacked, actors, memory
    python benchmarks/training.py --quick           smaller steps, nothing compiled; about a minute
    python benchmarks/training.py --json FILE       also write the rows as JSON

Every row compares two ways to do the same work, measured in turns in one run; times are medians
after a round of warm-up, ratio = peer_s / ours_s. The work is a training step: forward pass,
gradients and Adam's step on one batch that is ready in memory.

The peer trains the same binarized network made of plain torch modules, as the papers' code has
them: sign by `torch.where`, filters binarized and scaled in every pass, `nn.BatchNorm2d` and
`nn.PReLU`. Pictures and labels are random: the time does not depend on them.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import logging
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import nn

from benchmarks.rows import Bench, machine, table
from bnncore import data as D
from bnncore import params as P
from bnncore.data import Dataset, Split
from bnncore.networks.binarize import BinaryActivation, BinaryConv2d
from bnncore.networks.ensemble import Ensemble, EnsembleSpec
from bnncore.networks.parts import ModelSpec
from bnncore.networks.sharing import SHARING
from bnncore.params import Binarizer, Recipe
from bnncore.training import plans, schemes
from bnncore.training.devices import Place
from bnncore.training.feed import Feed
from bnncore.training.jobs import Job
from bnncore.training.loop import Trainer, train_many
from bnncore.training.memory import freed_memory

ROOT = Path(__file__).resolve().parents[1]
CLASSES = 10
GIB = 2**30


# ---- what is trained --------------------------------------------------------------------------


CIFAR, DIGITS = (32, 32, 3), (8, 8, 1)


def dataset(train: int, val: int = 2, image: tuple[int, int, int] = CIFAR) -> Dataset:
    """Random pictures; hardly any to validate on, which is not measured."""
    random = np.random.default_rng(0)

    def split(count: int) -> Split:
        images = random.integers(0, 256, (count, *image), dtype=np.uint8)
        return Split(images, random.integers(0, CLASSES, count))

    parts = (split(train), split(val), split(val))
    channels = image[2]
    return Dataset("random", tuple("0123456789"), *parts, (0.5,) * channels, (0.25,) * channels)


def job(
    backbone: str, members: int, sharing: str = "shared_conv",
    image: tuple[int, int, int] = CIFAR, **recipe: Any,
) -> Job:  # fmt: skip
    """A joint job at the paper's width: fusion, or a TentacleNet."""
    tentacles = sharing == "tentaclenet"
    model = ModelSpec(backbone, image, CLASSES, recipe.pop("width", None), 0.0, Binarizer())
    kind = "features" if plans.has_features(model) else "logits"
    spec = EnsembleSpec(
        model,
        members,
        SHARING[sharing],
        "sum" if tentacles else "mean",
        kind if tentacles else None,
    )
    settings = Recipe(**{"epochs": 1, "batch_size": 128, **recipe})
    start = Ensemble(spec, seed=0).state()
    return Job("job", spec, tuple(range(members)), settings, 0, start)


def stepper(trainer: Trainer, batch: int) -> Callable[[], object]:
    """One training step on the first images."""
    feed = trainer.feed
    x, y = feed.normalized(feed.images[:batch]), feed.labels[:batch]
    trainer.ensemble.train()

    def step() -> None:
        trainer.step(x, y, {})
        trainer.optimizer.step()
        if x.is_cuda:
            torch.cuda.synchronize()

    return step


class PlainSign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (x.abs() <= 1)


class PlainActivation(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return PlainSign.apply(x)


class PlainConv(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        alpha = self.weight.abs().mean(dim=(1, 2, 3), keepdim=True)
        weight = PlainSign.apply(self.weight) * alpha
        return nn.functional.conv2d(x, weight, self.bias, self.stride, self.padding)


class PlainDropout(nn.Dropout):
    pass


def plain(member: nn.Module) -> nn.Module:
    """The same network, weights and frozen layers included, as plain torch modules."""

    def replaced(module: nn.Module) -> nn.Module:
        if isinstance(module, BinaryActivation):
            return PlainActivation()
        if isinstance(module, BinaryConv2d):
            channels = (module.in_channels, module.out_channels)
            shape: Any = (module.kernel_size, module.stride, module.padding)
            conv = PlainConv(*channels, *shape, bias=module.bias is not None)
            conv.weight, conv.bias = module.weight, module.bias
            return conv
        if type(module).__name__ == "Dropout":
            return PlainDropout(module.p)  # type: ignore[arg-type]
        for name, child in module.named_children():
            setattr(module, name, replaced(child))
        return module

    return replaced(copy.deepcopy(member))


def peers_network(of: Job) -> nn.Module:
    """One member of an ensemble for a library that copies it."""
    ensemble = Ensemble(of.spec, seed=0)
    for module in ensemble.modules():
        if hasattr(module, "generator"):
            module.generator = None  # not drawn from without dropout, and not copyable
    return plain(ensemble.members[0])


# ---- against torchensemble --------------------------------------------------------------------


class Turns:
    """A loader for a library's `fit`, which times its steps and lets others have theirs between.

    Attributes:
        taken: label -> seconds of each step but the first; the library's under "".
    """

    def __init__(self, bench: Bench, batch: tuple, rounds: int, others: dict[str, Callable]):
        self.bench, self.batch, self.rounds, self.others = bench, batch, rounds, others
        self.taken: dict[str, list[float]] = {label: [] for label in ("", *others)}
        self.dataset = self  # where the library looks for the classes
        self.classes = range(CLASSES)

    def __iter__(self) -> Iterator[tuple]:
        for number in range(self.rounds + 1):
            for label, work in self.others.items():
                self._time(label, number, work)
            start = self.bench.clock()
            yield self.batch  # what the library does with it ends with its asking for the next
            if number:
                self.taken[""].append(self.bench.clock() - start)

    def _time(self, label: str, number: int, work: Callable) -> None:
        start = self.bench.clock()
        work()
        if number:
            self.taken[label].append(self.bench.clock() - start)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """In an empty folder, without output: torchensemble and its processes print each step, and
    write logs."""
    here, out = os.getcwd(), os.dup(1)
    sys.stdout.flush()
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        os.chdir(folder)
        os.dup2(nowhere.fileno(), 1)
        try:
            yield
        finally:
            sys.stdout.flush()
            os.dup2(out, 1)
            os.close(out)
            os.chdir(here)
            logging.disable(logging.NOTSET)


def fusion(bench: Bench, quick: bool) -> None:
    """A step of ours, eager and compiled, against one of torchensemble's FusionClassifier."""
    import torchensemble

    members, batch, rounds = (4, 64, 3) if quick else (8, 128, 7)
    threads = 1 if bench.clock is time.process_time else 2
    torch.set_num_threads(threads)
    work = job("resnet20", members, batch_size=batch)
    data = dataset(batch)
    others = {"eager": stepper(Trainer(work, data, device="cpu"), batch)}
    if not quick:
        compiling = replace(work, recipe=replace(work.recipe, compile="always"))
        others["compiled, float32"] = stepper(Trainer(compiling, data, device="cpu"), batch)
    feed = Feed(work, data, torch.device("cpu"))
    turns = Turns(bench, (feed.normalized(feed.images), feed.labels), rounds, others)
    library = torchensemble.FusionClassifier(peers_network(work), members, cuda=False)
    library.set_optimizer("Adam", lr=work.recipe.lr)
    with quietly():
        library.fit(turns, epochs=1, save_model=False)
    theirs = statistics.median(turns.taken[""])
    for label in others:
        name = f"ResNet-20, fusion, M = {members}, batch {batch}, {label}"
        ours = statistics.median(turns.taken[label])
        bench.add(name, "torchensemble FusionClassifier", threads, ours, theirs)
    bench.note("bf16: there is no such option; docs/training.md says why")


def voting(bench: Bench, quick: bool) -> None:
    """An epoch of 8 members side by side on two actors, against torchensemble's two processes.

    Ours is once the whole of `Cluster.train_many` for one epoch, with the members' networks built
    and sent; and once a later epoch: half of what a run of three takes longer than a run of one.
    The peer's is one of its later epochs.
    """
    import torchensemble

    from bnncore.cluster.cluster import Cluster
    from bnncore.cluster.connect import connect
    from bnncore.params import RayParams

    members, batch, steps, rounds = (2, 32, 2, 1) if quick else (8, 128, 4, 3)
    whole = job("resnet20", members, batch_size=batch)
    jobs = [replace(whole, name=f"member-{i}", ids=(i,)) for i in whole.ids]
    longer = [replace(one, recipe=replace(one.recipe, epochs=3)) for one in jobs]
    data = dataset(batch * steps)
    feed = Feed(jobs[0], data, torch.device("cpu"))
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(feed.normalized(feed.images), feed.labels),
        batch_size=batch,
    )
    taken: dict[str, list[float]] = {"ours": [], "ours, later": [], "theirs": []}

    class Timed(torchensemble.VotingClassifier):
        """Tells when its epochs begin, and lets ours have a turn before."""

        began: float | None = None

        def train(self, mode: bool = True):
            now = time.perf_counter()
            if self.began is not None:
                taken["theirs"].append(now - self.began)
            cluster.train_many(jobs, data)
            once = time.perf_counter() - now
            taken["ours"].append(once)
            now = time.perf_counter()
            cluster.train_many(longer, data)
            taken["ours, later"].append((time.perf_counter() - now - once) / 2)
            self.began = time.perf_counter()
            return super().train(mode)

    connect(RayParams(), num_cpus=2)
    with Cluster(RayParams(actors=2)) as cluster, quietly():
        library = Timed(estimator=peers_network(whole), n_estimators=members, cuda=False, n_jobs=2)
        library.set_optimizer("Adam", lr=whole.recipe.lr)
        library.fit(loader, epochs=rounds + 2, save_model=False)
    end_ray()
    name = f"ResNet-20, voting, M = {members}, batch {batch}, an epoch of {steps} steps, 2 actors"
    peer = "torchensemble VotingClassifier(n_jobs=2)"
    theirs = statistics.median(taken["theirs"][1:])
    for label, times in (("", taken["ours, later"]), (", set-up included", taken["ours"])):
        bench.add(name + label, peer, 1, statistics.median(times[1:]), theirs)


# ---- members in stacks ------------------------------------------------------------------------


def stacked(bench: Bench, quick: bool) -> None:
    """On one thread: steps of members in a stack, against one by one; then what a trial of the
    search trains on digits, all members of an ensemble in one process, by ``auto`` and looped."""
    torch.set_num_threads(1)
    members, batch, rounds = (4, 64, 2) if quick else (8, 64, 9)
    images = dataset(batch, image=DIGITS)
    for scheme, sharing in (("fusion", "shared_conv"), ("TentacleNet", "tentaclenet")):
        for backbone, width in (("nin", 16), ("leanresnet8", 8)):
            work = job(backbone, members, sharing, DIGITS, width=width, batch_size=batch)
            together, apart = (
                stepper(Trainer(in_stacks(work, size), images, device="cpu"), batch)
                for size in (members, 1)
            )
            name = f"digits, {backbone} of width {width}, {scheme}, M = {members}, batch {batch}"
            bench.compare(f"{name}, one stack", 1, together, {"looped": apart}, rounds)
    p = P.load(ROOT / "params.yaml")
    p = replace(p, ensembles=replace(p.ensembles, recipe=replace(p.ensembles.recipe, epochs=2)))
    digits = D.load(p.data, ROOT)
    fp32 = plans.first_job(p, digits, None).start  # time does not depend on weights
    bnn = plans.first_job(p, digits, fp32).start
    run = partial(train_many, data=digits)
    for section in p.ensembles.train[-1:] if quick else p.ensembles.train:
        if section.members > 1:
            plan = plans.plan(p, section, digits, fp32, bnn)
            ours, looped = (
                partial(schemes.train, one, run) for one in (plan.over(1), in_stacks(plan, 1))
            )
            name = f"two epochs of {section.name} of params.yaml on digits, in one process"
            bench.compare(name, 1, ours, {"looped": looped}, 1 if quick else 5)


def in_stacks(of: Any, size: int, **recipe: Any) -> Any:
    """A job, or a plan, with another recipe."""
    return replace(of, recipe=replace(of.recipe, stack=size, **recipe))


# ---- over actors ------------------------------------------------------------------------------


def actors(bench: Bench, quick: bool) -> None:
    """Joint training over two actors of one thread, against one, and against one process of two."""
    from bnncore.cluster.cluster import Cluster
    from bnncore.cluster.connect import connect
    from bnncore.params import RayParams

    batch, steps, rounds = (32, 2, 2) if quick else (128, 3, 5)
    members = 8
    data = dataset(batch * steps)
    last: dict[str, Any] = {}

    def keep(_: Job, epoch: dict[str, Any]) -> None:
        last.update(epoch)

    for sharing, scheme in (("shared_conv", "fusion"), ("tentaclenet", "TentacleNet")):
        # The first epoch of a job warms its actors up, the second is measured.
        work = job("resnet20", members, sharing, batch_size=batch, epochs=2)
        connect(RayParams(), num_cpus=3)
        taken: dict[str, list[float]] = {"two": [], "one": [], "process": []}
        with Cluster(RayParams(actors=1)) as one, Cluster(RayParams(actors=2)) as two:
            runs = {
                "two": two.train_many,
                "one": one.train_many,
                "process": partial(train_many, place=Place(threads=2), replay=False),
            }
            for _ in range(rounds):
                for label, run in runs.items():
                    run([work], data, on_epoch=keep)
                    taken[label].append(last["seconds"] / steps)
                    if label == "two":
                        sent, waited = last["sent_per_step"], last["exchange_share"]
        end_ray()
        medians = {label: statistics.median(times) for label, times in taken.items()}
        name = f"ResNet-20, {scheme}, M = {members}, batch {batch}, 2 actors of 1 thread"
        bench.add(name, "1 actor of 1 thread", 1, medians["two"], medians["one"])
        bench.add(name, "1 process of 2 threads", 2, medians["two"], medians["process"])
        trainer = Trainer(work, data, device="cpu")
        logits = batch * CLASSES * 4
        shared = sum(4 * p.numel() for p in trainer.step.shared)
        bench.note(
            f"{scheme}: an actor of two sent {sent:.0f} bytes a step; B * C * 4 = {logits} and "
            f"the shared gradients are {shared}: {sent / (logits + shared):.2f} times their sum. "
            f"{100 * waited:.1f} % of its time went into sums, waiting for the other included."
        )
        predict(bench, scheme, medians["one"] / members, batch, trainer)


def predict(bench: Bench, scheme: str, member: float, batch: int, trainer: Trainer) -> None:
    """Step times on 1 to 64 actors, from one actor's time and that of sums between two."""
    sizes = (1, 250_000)
    times = sums(sizes)
    latency, per_byte = times[0], (times[-1] - times[0]) / (4 * sizes[-1])
    shared = sum(p.numel() for p in trainer.step.shared)
    exchanged = [batch * CLASSES] + [shared] * bool(shared)
    members = 64
    lines = [
        f"{scheme} of {members} members at batch {batch}, predicted seconds a step:",
        "",
        "| actors | members each | compute | sums | step | speed-up |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for count in (1, 2, 4, 8, 16, 32, 64):
        compute = -(-members // count) * member
        wait = sum(
            2 * (count - 1) * (latency / 2 + per_byte * 2 * 4 * n / count / 2) for n in exchanged
        )
        total = compute + wait
        lines.append(
            f"| {count} | {-(-members // count)} | {compute:.3f} | {wait:.5f} | {total:.3f} "
            f"| {members * member / total:.1f} |"
        )
    lines += [
        "",
        f"Assumed: a member takes {member:.3f} s on one thread (measured: one actor's step over its"
        f" members), whoever trains it; each actor has a core of its own; a sum is two rounds of"
        f" R - 1 messages one after another (in truth they overlap), a message takes half of the"
        f" {1e3 * latency:.2f} ms of a sum of 4 bytes between two actors here and"
        f" {1e9 * per_byte:.2f} ns a byte (measured over loopback: a real network has more of"
        f" both). Waiting for a slower actor is not in it.",
    ]
    bench.note("\n".join(lines))


def sums(sizes: tuple[int, ...], repeats: int = 30) -> list[float]:
    """Seconds of `Collective.sum` of so many floats between two processes, medians."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from benchmarks.training import _sum\n"
        "_sum(sys.argv[2], int(sys.argv[3]), eval(sys.argv[4]), int(sys.argv[5]))"
    )
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", code, str(ROOT), f"{folder}/meet"]
        rest = [repr(sizes), str(repeats)]
        other = subprocess.Popen([*command, "1", *rest])
        done = subprocess.run([*command, "0", *rest], capture_output=True, text=True, check=True)
        other.wait()
    return [float(word) for word in done.stdout.split()]


def _sum(meet: str, rank: int, sizes: tuple[int, ...], repeats: int) -> None:
    from torch import distributed as dist

    from bnncore.cluster.collective import Collective

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
    collective = Collective("gloo")
    for size in sizes:
        value, times = torch.ones(size), []
        for _ in range(repeats):
            start = time.perf_counter()
            collective.sum(value)
            times.append(time.perf_counter() - start)
        if rank == 0:
            print(statistics.median(times))
    dist.destroy_process_group()


def end_ray() -> None:
    import ray

    ray.shutdown()


# ---- memory -----------------------------------------------------------------------------------


def memory(bench: Bench, quick: bool) -> None:
    """Replay: what it saves in a process of its own, and what it costs in time."""
    members, batch, threads = (3, 16, 1) if quick else (10, 256, 2)
    if bench.clock is time.process_time:
        threads = 1
    seconds, peak = fresh_step(members, batch, threads, bench.clock)
    name = f"ResNet-18, fusion, M = {members}, batch {batch}, one step with replay"
    bench.add(name, "", threads, seconds, None)
    bench.note(
        f"{name}: the process took {peak / GIB:.2f} GiB at most, torch included"
        + ("" if quick else " (target 3 GiB, goal 1.5 GiB)")
    )
    threads = 1 if bench.clock is time.process_time else 2
    torch.set_num_threads(threads)
    members, batch = (2, 16) if quick else (4, 32)
    work, data = job("resnet18", members, batch_size=batch), dataset(batch)
    keeping, replaying = (Trainer(work, data, device="cpu", replay=r) for r in (False, True))

    def alternating(trainer: Trainer) -> Callable[[], object]:
        step = stepper(trainer, batch)

        def run() -> None:
            freed_memory(keep=not trainer.step.replay)  # of the process: the other changed it
            step()

        return run

    steps = [alternating(trainer) for trainer in (keeping, replaying)]
    for step in steps:
        step()
    theirs = replaying.step.gradients()
    for name, gradient in keeping.step.gradients().items():
        if not torch.equal(gradient, theirs[name]):
            raise SystemExit(f"{name}: expected the same gradient with and without replay")
    bench.compare(
        f"ResNet-18, fusion, M = {members}, batch {batch}, with replay (same bits)",
        threads,
        steps[1],
        {"without replay": steps[0]},
        2 if quick else 5,
    )


def fresh_step(
    members: int, batch: int, threads: int, clock: Callable[[], float]
) -> tuple[float, int]:
    """Seconds and peak bytes of one step of ResNet-18 with replay in a fresh process."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from benchmarks.training import _step\n"
        "_step(sys.argv[2], *map(int, sys.argv[3:]))"
    )
    numbers = map(str, (members, batch, threads))
    command = [sys.executable, "-c", code, str(ROOT), clock.__name__, *numbers]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, peak = done.stdout.split()
    return float(seconds), int(peak)


def _step(clock_name: str, members: int, batch: int, threads: int) -> None:
    clock = getattr(time, clock_name)
    torch.set_num_threads(threads)
    work = job("resnet18", members, batch_size=batch)
    step = stepper(Trainer(work, dataset(batch), device="cpu", replay=True), batch)
    start = clock()
    step()
    seconds = clock() - start
    print(seconds, peak_bytes())


def peak_bytes() -> int:
    """The most memory that this process has had, not what its parent had before."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return 1024 * int(line.split()[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# ---- all of it --------------------------------------------------------------------------------

SECTIONS: dict[str, Callable[[Bench, bool], None]] = {
    "fusion": fusion,
    "voting": voting,
    "stacked": stacked,
    "actors": actors,
    "memory": memory,
}
SIDE_BY_SIDE = ("voting", "actors")  # of several processes: processor time says nothing of them


def describe() -> str:
    named = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16")
    return machine(
        named,
        ("numpy", "torch", "ray", "torchensemble"),
        f"torch: {torch.backends.cpu.get_cpu_capability()}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small steps, nothing compiled")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count processor time, on a busy machine: one thread, no rows of several processes",
    )
    parser.add_argument("--only", choices=tuple(SECTIONS), nargs="+", help="some sections")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there")
    options = parser.parse_args()
    began = time.perf_counter()
    about = describe()
    bench = Bench(time.process_time if options.cpu_time else time.perf_counter)
    if options.cpu_time:
        about += "\nseconds of processor time, on one thread: the machine was busy"
    print(about, *table([])[:2], sep="\n", flush=True)
    for name, section in SECTIONS.items():
        if options.only and name not in options.only:
            continue
        if options.cpu_time and name in SIDE_BY_SIDE:
            bench.note(f"{name}: not measured, processor time says nothing of it")
        else:
            section(bench, options.quick)
    print(f"{time.perf_counter() - began:.0f} s")
    bench.write(about, options.json, options.markdown)


if __name__ == "__main__":
    main()
