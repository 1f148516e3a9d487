"""Put a trained packed file into the zoo that comes with bnncore, or replace it there.

    python benchmarks/zoo.py digits-fusion4 --file packed/fusion-4.bnn --params params.yaml \\
        --results reports/results.json --model fusion-4 --command "make repro"
    python benchmarks/zoo.py NAME --file "checkpoints/front16/pieces/X seed 0.bnn" \\
        --params "checkpoints/front16/pieces/X seed 0.yaml" \\
        --results docs/reproduction/front16.json --model X/0 --command "python benchmarks/front.py"

Accuracies are those of the results; the scores that its test compares are computed here.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from bnncore import params, zoo
from bnncore.packed import execute, packfile
from bnncore.packed.program import Program


def about(program: Program) -> str:
    """A network in words, from its file."""
    info = program.info
    network = f"{info['backbone']} {info['width']}"
    if info["kind"] == "fp32":
        whole = any(tensor.kind == "int8" for tensor in program.tensors.values())
        return f"{network}, FP32 network{' in int8' if whole else ''}"
    if program.members == 1:
        return f"{network}, one BNN"
    return f"{network}, {info['scheme']} of {program.members}, {info['sharing']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name")
    for option in ("file", "params", "results"):
        parser.add_argument(f"--{option}", type=Path, required=True)
    parser.add_argument("--model", required=True, help="whose accuracies, in the results")
    parser.add_argument("--command", required=True, help="what trained it")
    args = parser.parse_args()
    results = json.loads(args.results.read_text())
    if isinstance(results, list):
        results = {row["name"]: row for row in results}
    row, p = results[args.model], params.load(args.params)
    program = packfile.load(args.file)
    entry = zoo.Entry(
        args.name, "CIFAR-10 (JPEG copy)" if p.data.name == "cifar10" else p.data.name,
        about(program),
        round(row["val_top1"], 2), round(row["test_top1"], 2), args.command,
        execute.Model(program, "numpy")(zoo.images(program.image)).astype(float).round(4).tolist(),
    )  # fmt: skip
    shutil.copyfile(args.file, entry.path)
    shutil.copyfile(args.params, entry.path.with_suffix(".yaml"))
    known = {one.name: one for one in zoo.entries()} if zoo.LIST.exists() else {}
    known[args.name] = entry
    text = json.dumps([asdict(one) for one in known.values()], indent=1)
    zoo.LIST.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
