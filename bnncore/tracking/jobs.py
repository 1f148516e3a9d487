"""What a cluster's job logged comes into the logs, and so into the store, of here."""

from __future__ import annotations

import shutil
from pathlib import Path

from bnncore.tracking.log import NOWHERE, append, digest, folder_of, resolve_uri
from bnncore.tracking.sync import Store, locked, read


def merge(folder: Path, root: Path, job: str, uri: str | None = None) -> int:
    """Take over the runs that a job logged into a sqlite store of its own; how many came.

    Their logs are what is read, files included, so that a store that is away gets them later.
    What this or another process has taken over before does not come again.

    Args:
        folder: what the job brought, with its ``checkpoints/mlflow``; nothing without it.
        root: the project.
        job: the job's id, which the runs are tagged with.
        uri: as `params.MlflowParams.uri`.
    """
    uri, came, store = resolve_uri(root, uri), 0, Store()
    for theirs in sorted(folder_of(folder).glob("*.jsonl")):
        entries = read(theirs)
        if uri == NOWHERE or not entries or not entries[0]["uri"].startswith("sqlite:"):
            continue
        ours = folder_of(root) / f"{digest([theirs.stem, uri])}.jsonl"
        files = theirs.with_suffix("")
        if files.exists():
            shutil.copytree(files, ours.with_suffix(""), dirs_exist_ok=True)
        ours.parent.mkdir(parents=True, exist_ok=True)
        with locked(ours):
            old = read(ours)
            had = {(e["op"], e["model"], e["time"]) for e in old}
            for entry in entries:
                del entry["to"], entry["fresh"]
                if (entry["op"], entry["model"], entry["time"]) not in had:
                    if "uri" in entry:
                        entry["uri"] = uri
                    if "tags" in entry:
                        entry["tags"]["bnncore.job"] = job
                    append(ours, **entry)
            came += len({e["model"] for e in entries} - {e["model"] for e in old})
        store.carry(ours)
    return came
