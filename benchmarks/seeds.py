"""What benchmarks that train over seeds have in common: a seed's start, and going on where one was.

Seeds that the JSON file holds already are not trained again, so they can be stopped and started.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from bnncore import params
from bnncore.data import Dataset
from bnncore.params import Params
from bnncore.training import loop, plans
from bnncore.training.jobs import State

ROOT = Path(__file__).parent.parent
# What a trained file depends on; all other sections change no result.
SECTIONS = ("seed", "data", "model", "pretrain", "binarize", "ensembles", "pack")


def seeded(p: Params, seed: int) -> Params:
    """One seed for the split and for all training."""
    return replace(p, seed=seed, data=replace(p.data, seed=seed))


def base(p: Params, images: Dataset) -> tuple[State, State]:
    """The trained FP32 network and, from it, the BNN."""
    (fp32,) = loop.train_many([plans.first_job(p, images, None)], images)
    (bnn,) = loop.train_many([plans.first_job(p, images, fp32.state)], images)
    return fp32.state, bnn.state


def main(
    script: str,
    description: str,
    one_seed: Callable[[Params, int], list[dict[str, Any]]],
    summary: Callable[[list[dict[str, Any]]], list[dict[str, Any]]],
    markdown: Callable[[list[dict[str, Any]]], str],
    plot: Callable[[list[dict[str, Any]], Path], None],
) -> None:
    """The command line: train each seed, write its rows at once; then table and plot."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seeds", type=int, nargs="+", default=[101, 102, 103, 104, 105])
    parser.add_argument("--json", type=Path, help="results, those there are of the same parameters")
    parser.add_argument("--params", type=Path, help="others than the project's, with --json")
    args = parser.parse_args()
    if args.params and not args.json:
        parser.error("--params: expected --json with it, for results of other parameters")
    args.json = args.json or Path(script).with_suffix(".json")
    p = params.load(args.params or ROOT / "params.yaml")
    rows = json.loads(args.json.read_text()) if args.json.exists() else []
    for seed in args.seeds:
        if not any(r["seed"] == seed for r in rows):
            rows += one_seed(seeded(p, seed), seed)
            args.json.write_text(json.dumps(rows, indent=1) + "\n")
    table = summary(rows)
    args.json.with_suffix(".md").write_text(markdown(table))
    plot(table, args.json.with_suffix(".png"))
    print(markdown(table))
