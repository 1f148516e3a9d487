"""What benchmarks that train over seeds have in common: a seed's start, and going on where one was.

Seeds that the JSON file holds already are not trained again, so they can be stopped and started. A
file of other parameters or images is refused.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from bnncore import data, params
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


def digest(p: Params) -> str:
    return params.digest(*(getattr(p, section) for section in SECTIONS))


def network(p: Params) -> str:
    """What is trained, in words."""
    recipes = (p.pretrain, p.binarize, p.ensembles.recipe)
    optimizers = " and ".join(dict.fromkeys(r.optimizer for r in recipes))
    return f"{p.model.backbone} of width {p.model.width}, trained by {optimizers}"


def main(
    script: str,
    description: str,
    one_seed: Callable[[Params, int], list[dict[str, Any]]],
    summary: Callable[[list[dict[str, Any]]], list[dict[str, Any]]],
    markdown: Callable[[list[dict[str, Any]]], str],
    plot: Callable[[list[dict[str, Any]], Path], None],
) -> None:
    """The command line: train each seed, write its rows at once; then table and plot.

    The JSON file has the ``rows``, what they were ``asked`` of (None: it is not known for certain,
    so that nothing can be added), and ``of`` which network they are, in words.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seeds", type=int, nargs="+", default=[101, 102, 103, 104, 105])
    parser.add_argument("--json", type=Path, help="results, those there are of the same parameters")
    parser.add_argument("--table", action="store_true", help="train nothing; write what is known")
    parser.add_argument("--params", type=Path, help="others than the project's, with --json")
    args = parser.parse_args()
    if args.params and not args.json:
        parser.error("--params: expected --json with it, for results of other parameters")
    args.json = args.json or Path(script).with_suffix(".json")
    p = params.load(args.params or ROOT / "params.yaml")
    asked = {"params": digest(p), "data": data.load(p.data, ROOT).digest}
    known = {"asked": asked, "of": network(p), "rows": []}
    if args.json.exists():
        known = json.loads(args.json.read_text())
    if not args.table and known["asked"] != asked:
        parser.error(f"{args.json}: expected results of these parameters and images, got those of "
                     f"others ({known['of']}); name another file with --json")  # fmt: skip
    rows = known["rows"]
    for seed in () if args.table else args.seeds:
        if not any(r["seed"] == seed for r in rows):
            rows += one_seed(seeded(p, seed), seed)
            args.json.write_text(json.dumps(known, indent=1) + "\n")
    table = summary(rows)
    text = f"Of {known['of']}.\n\n{markdown(table)}"
    args.json.with_suffix(".md").write_text(text)
    plot(table, args.json.with_suffix(".png"))
    print(text)
