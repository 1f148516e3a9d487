"""What the benchmarks share: rows that compare two ways to do the same work, and how they look.

A row has ``name, peer, threads, ours_s, peer_s, ratio``; seconds are medians
(of means, where a work is short), ratio = peer_s / ours_s; a row without a peer has None for both.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

from bnncore import tracking

ROOT = Path(__file__).parents[1]
Row = dict[str, Any]


def processor() -> tuple[str, set[str]]:
    """Its name and its features, as Linux tells them."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(": ")[1] for line in lines if "model name" in line), "")
    flags = next((line for line in lines if line.startswith("flags")), "")
    return name or platform.processor(), set(flags.split())


def commit() -> str:
    """Of what runs here; "-dirty" where code or parameters are no longer those of the commit.

    Results are tracked, too, and a benchmark writes them: they do not count.
    """
    return tracking.commit(ROOT, ["*.py", "*.yaml", "*.c", "*.h"], digits=7) or "unknown"


# Without them, and where they are not to be used, torch's half precision takes many times longer.
BF16 = bool(processor()[1] & {"amx_bf16", "avx512_bf16"}) and not os.environ.get(
    "ONEDNN_MAX_CPU_ISA", ""
).endswith("AVX2")


LEAST = 0.02  # seconds of a measurement


class Bench:
    """Collects rows and prints them as they come.

    Args:
        clock: what times are read from.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.origin = f"{date.today().isoformat()}, commit {commit()}"  # when it begins
        self.rows: list[Row] = []
        self.rates: dict[str, list[float]] = {}  # of every pass, by what they are of
        self.notes: list[str] = []

    def compare(
        self,
        name: str,
        threads: int,
        ours: Callable[[], object],
        peers: dict[str, Callable[[], object]],
        rounds: int = 5,
    ) -> float:
        """One row a peer; returns our seconds.

        What is short is repeated each time it is measured: once alone it would be a measure of the
        caches that the one before has left.
        """
        every = {"": ours, **peers}
        taken: dict[str, list[float]] = {label: [] for label in every}
        for number in range(rounds + 1):
            for label, work in every.items():
                if threads > 1:  # a peer's threads spin for a while after their work
                    time.sleep(0.3)
                start, spent, times = self.clock(), 0.0, 0
                while spent < LEAST:
                    work()
                    spent, times = self.clock() - start, times + 1
                if number:  # the first round warms up
                    taken[label].append(spent / times)
        mine = statistics.median(taken[""])
        for label in peers:
            self.add(name, label, threads, mine, statistics.median(taken[label]))
        return mine

    def add(self, name: str, peer: str, threads: int, ours: float, theirs: float | None) -> None:
        ratio = None if theirs is None else theirs / ours
        row = {"name": name, "peer": peer, "threads": threads, "ours_s": ours}
        self.rows.append({**row, "peer_s": theirs, "ratio": ratio})
        print(table([self.rows[-1]])[-1], flush=True)

    def join(self) -> None:
        """One row of those that compare the same, in the order of the first ones: of medians; and
        print them where that changes anything."""
        same: dict[tuple[Any, ...], list[Row]] = {}
        for row in self.rows:
            same.setdefault((row["name"], row["peer"], row["threads"]), []).append(row)
        self.rows = []
        for rows in same.values():
            ours = statistics.median(row["ours_s"] for row in rows)
            theirs = None
            if rows[0]["peer_s"] is not None:
                theirs = statistics.median(row["peer_s"] for row in rows)
            ratio = None if theirs is None else theirs / ours
            self.rows.append({**rows[0], "ours_s": ours, "peer_s": theirs, "ratio": ratio})
        if max(map(len, same.values()), default=1) > 1:
            print("\nmedians of all passes:", *table(self.rows), sep="\n", flush=True)

    def note(self, text: str) -> None:
        """Lines that are no row: printed, and written below the table."""
        self.notes += ["", *text.splitlines()]
        print(f"\n{text}\n", flush=True)

    def write(self, about: str, json_file: Path | None, markdown: Path | None) -> None:
        """The rows as JSON; command, day, commit, machine, table and notes as Markdown."""
        if json_file:
            json_file.write_text(json.dumps(self.rows, indent=1) + "\n")
        if markdown:
            script = Path(sys.argv[0]).name
            command = " ".join(["python", f"benchmarks/{script}", *sys.argv[1:]])
            head = [f"`{command}`, {self.origin}", "", *about.splitlines(), ""]
            markdown.write_text("\n".join([*head, *table(self.rows), *self.notes]) + "\n")


def table(rows: list[Row]) -> list[str]:
    """The rows as lines of Markdown."""
    lines = [
        "| what | peer | threads | ours, ms | peer, ms | ratio |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        peer = "" if row["peer_s"] is None else f"{1e3 * row['peer_s']:.2f}"
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        cells = (
            row["name"],
            row["peer"],
            row["threads"],
            f"{1e3 * row['ours_s']:.2f}",
            peer,
            ratio,
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def machine(features: tuple[str, ...], packages: tuple[str, ...], middle: str = "") -> str:
    """The processor and which of `features` it has, versions, how busy it is."""
    model, flags = processor()
    versions = [f"python {platform.python_version()}"]
    for package in packages:
        with contextlib.suppress(ImportError):
            found = importlib.import_module(package)
            if version := getattr(found, "__version__", ""):
                versions.append(f"{package} {version}")
    lines = (
        f"processor: {model}, {os.cpu_count()} cores; "
        + " ".join(f"{name}:{'yes' if name in flags else 'no'}" for name in features),
        middle,
        ", ".join(versions),
        f"load when this began: {os.getloadavg()[0]:.1f}",
    )
    return "\n".join(line for line in lines if line)
