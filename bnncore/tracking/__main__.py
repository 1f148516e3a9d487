"""``python -m bnncore.tracking``: carry over what stores have missed, or show the runs."""

from __future__ import annotations

import argparse
import os
import select
import sys
import time
from pathlib import Path

from bnncore import params
from bnncore.terminal import command
from bnncore.tracking.runs import folder_of
from bnncore.tracking.sync import Store, sync
from bnncore.tracking.ui import ui


def main(argv: list[str] | None = None) -> int:
    """Command line: --flush carries over what is kept, --ui shows the runs."""
    parser = argparse.ArgumentParser(prog="python -m bnncore.tracking", description=main.__doc__)
    do = parser.add_mutually_exclusive_group(required=True)
    do.add_argument("--flush", action="store_true", help="log what tracking servers have missed")
    do.add_argument("--ui", action="store_true", help="MLflow's pages on 127.0.0.1")
    do.add_argument("--follow", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, default=Path(), help="the project's directory")
    parser.add_argument("--port", type=int, default=5000, help="for --ui")
    args = parser.parse_args(argv)
    if not args.root.is_dir():
        parser.error(f"--root: expected the project's folder, got {args.root}")
    if not 1 <= args.port <= 65535:
        parser.error(f"--port: expected 1 to 65535, got {args.port}")
    if args.ui:
        return command("tracking", lambda: show(args.root, args.port))
    if args.follow:
        return follow(args.root, Path(args.follow[0]), int(args.follow[1]))
    left = sync(args.root)
    print(f"{left} runs left in {folder_of(args.root)}" if left else "all is logged")
    return 1 if left else 0


def show(root: Path, port: int) -> None:
    """MLflow's pages on the store that the project's parameters name."""
    file = root / "params.yaml"
    ui(root, port, params.load(file).mlflow.uri if file.exists() else None)


def follow(root: Path, folder: Path, stage: int) -> int:
    """Carry a project's runs until the standard input ends; 1 if those of `folder` could not be.

    The process `stage`, which began this one, holds the input's other end; but so may another
    that it forked: hence this ends, too, when it is another's child.
    """
    store, ended = Store(), False
    while not ended:
        ended = bool(select.select([sys.stdin], [], [], 0.5)[0]) or os.getppid() != stage
        sync(root, store, wait=False)
    if store.carry(folder):  # one that refused is asked once more; one that hangs had its time
        time.sleep(1)
    return 1 if store.carry(folder) else 0


if __name__ == "__main__":
    sys.exit(main())
