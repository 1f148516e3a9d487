"""The pipeline as a job on a running Ray cluster: ``make submit RAY_ADDRESS=http://HEAD:8265``.

Uploads the working directory, runs the command there (`dvc repro` if none is given), shows its log
as it comes, and brings back what the command made. Everything goes through the one port of the
cluster's head, with its token; the two machines need share no files. Where the job fails, nothing
here is touched.

On the cluster the same file runs with ``--here``: it runs the command and packs what it made into
one archive in the session's log folder, which is what Ray serves through that port.

A job goes on if this process is stopped; ``--job ID`` watches it again and brings its results.
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import hashlib
import http.client
import logging
import math
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import yaml
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from bnncore import params as parameters
from bnncore import tracking
from bnncore.cluster import token
from bnncore.cluster.connect import session_folder
from bnncore.errors import UserError
from pipeline import swap
from pipeline.stage import ROOT, run

# Beside what .gitignore names; tests and figures are of no use to a job.
EXCLUDE = [".git", ".venv", ".dvc/cache", ".dvc/tmp", ".dvc/config.local", "/dvc.lock", "/models",
           "/packed", "/reports", "/checkpoints", "/mlruns", "/mlflow.db*", "/tests", "/docs",
           "/benchmarks", "__pycache__", ".*_cache", ".hypothesis"]  # fmt: skip
STORE = ["checkpoints/mlflow"]
PACKED = re.compile(r"^results: (\S+\.tar), (\d+) bytes, sha256 ([0-9a-f]{64})$", re.MULTILINE)


class SubmitError(UserError, RuntimeError):
    """The job could not be submitted, failed, or its results did not come back whole."""


def main() -> None:
    options = arguments()
    if options.here:
        sys.exit(here(options.command, options.bring))
    began = time.time()
    with swap.only(ROOT):
        pass  # what a killed process has left is put right
    client = connect(options.address)
    job = options.job or submit(client, options)
    try:
        follow(client, job)
        fetch(client, job, options.bring, ROOT, began)
    except KeyboardInterrupt:
        print(
            f"\n{job} goes on. To watch it and bring its results: --job {job}; to end it: "
            f"ray job stop {job} --address {client.get_address()}"
        )
        sys.exit(130)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.submit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--address", help="http://HEAD:8265; else RAY_ADDRESS")
    add("--job", metavar="ID", help="watch this job instead of submitting one")
    add("--bring", nargs="+", metavar="PATH", default=[], help="beside dvc.yaml's outputs")
    add("--gpus", type=float, default=0, help="for the pipeline's own process, which pretrains")
    add("--env", nargs="+", metavar="NAME", default=[], help="variables of here to set there too")
    add("--here", action="store_true", help=argparse.SUPPRESS)
    add("--traceback", action="store_true", help="of errors")
    add("command", nargs="*", default=["dvc", "repro"], help="after --; else dvc repro")
    options = parser.parse_args()
    for path in options.bring:
        if Path(path).is_absolute() or ".." in Path(path).parts or Path(path) == Path():
            parser.error(f"--bring: expected a path in the project, got {path}")
    for name in options.env:
        if name not in os.environ:
            parser.error(f"--env: expected a variable that is set, got {name}")
    return options


# -- here, beside the user ---------------------------------------------------------------------


def connect(address: str | None) -> JobSubmissionClient:
    """The cluster's job server."""
    if address:
        os.environ["RAY_ADDRESS"] = address  # which goes before Ray's own argument
        os.environ.pop("RAY_API_SERVER_ADDRESS", None)  # and before that
    address = os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
    if not address or not re.match(r"https?://", address):
        raise SubmitError(
            "RAY_ADDRESS: expected the address of a running cluster's dashboard, such as "
            f"http://127.0.0.1:8265, got {address or 'none'}"
        )
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("ray"):  # it tells of each file that it packs or not
            logging.getLogger(name).setLevel(logging.ERROR)
    try:
        return JobSubmissionClient(headers=_headers())
    except AuthenticationError as error:
        raise SubmitError(
            f"{address}: expected the cluster's token in RAY_AUTH_TOKEN, or in the file "
            f"RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token: {error.message}"
        ) from error
    except Exception as error:  # what is there may be any server
        raise SubmitError(f"{address}: expected a Ray cluster's dashboard: {error}") from error


def _headers() -> dict[str, str]:
    token.guard()
    known = token.read()
    return {"Authorization": f"Bearer {known}"} if known else {}


def submit(client: JobSubmissionClient, options: argparse.Namespace) -> str:
    """Upload the working directory and start the job; returns its id."""
    uri = tracking.resolve_uri(ROOT, parameters.load(ROOT / "params.yaml").mlflow.uri)
    # A file of here is not there: its own file then, whose runs come back with the results.
    uri = "sqlite:///mlflow.db" if uri.startswith("sqlite:") else uri
    words = ["python", "-m", "pipeline.submit", "--here"]
    words += ["--bring", *options.bring] if options.bring else []
    try:
        job = client.submit_job(
            entrypoint=shlex.join([*words, "--", *options.command]),
            submission_id=f"bnncore-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}",
            entrypoint_num_gpus=options.gpus or None,
            runtime_env={
                "working_dir": str(ROOT.resolve()),
                "excludes": EXCLUDE,
                "env_vars": {"MLFLOW_TRACKING_URI": uri}
                | {name: os.environ[name] for name in options.env},
            },
        )
    except (ValueError, RuntimeError) as error:  # most often too large an upload
        raise SubmitError(
            f"expected a job that {client.get_address()} accepts: {error} (data of more than "
            "100 MiB belongs onto the nodes, see docs/cluster.md)"
        ) from error
    print(f"{job} on {client.get_address()}: {shlex.join(options.command)}", flush=True)
    return job


def follow(client: JobSubmissionClient, job: str) -> None:
    """Show the job's log until it ends.

    Raises:
        SubmitError: it failed or was stopped.
    """
    shown = 0

    async def tail() -> None:
        nonlocal shown
        skip = shown
        async for text in client.tail_job_logs(job):
            print(text[skip:], end="", flush=True)
            shown += len(text[skip:])
            skip = max(0, skip - len(text))

    while True:
        try:
            asyncio.run(tail())
            lost = None
        except (RuntimeError, OSError) as error:
            lost = error
        try:
            info = client.get_job_info(job)
        except (RuntimeError, OSError) as error:
            raise SubmitError(f"{job}: lost the cluster: {lost or error}") from error
        if info.status.is_terminal():
            break
        time.sleep(1)
    if info.status != "SUCCEEDED":
        message = (info.message or "no reason given").partition(", last available logs")[0]
        raise SubmitError(f"{job}: {info.status.lower()}, nothing was brought back: {message}")


def fetch(
    client: JobSubmissionClient, job: str, bring: list[str], root: Path, began: float = math.inf
) -> None:
    """Bring back what a finished job made, all of it or nothing.

    Args:
        began: when this process began to watch the job, in seconds since 1970: what another one
            has brought since is not brought again.

    Raises:
        SubmitError: there is no archive, or it did not come whole.
    """
    found = PACKED.findall(client.get_job_logs(job))
    if not found:
        raise SubmitError(f"{job}: expected the line 'results: ...' in its log, found none")
    name, size, sha256 = found[-1]
    with swap.only(root) as work:
        brought, folder = work / f"{job}.brought", work / "incoming"
        if brought.exists() and brought.stat().st_mtime >= began:
            print(f"{job}: another process has brought its results")
            return
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            _download(client, job, name, folder / "archive.tar")
            got = digest(folder / "archive.tar")
            if got != (int(size), sha256):
                raise SubmitError(
                    f"{job}: expected {size} bytes with SHA-256 {sha256}, "
                    f"got {got[0]} with {got[1]}"
                )
            with tarfile.open(folder / "archive.tar") as tar:
                try:
                    tar.extractall(folder / "new", filter="data")
                except tarfile.FilterError as error:
                    raise SubmitError(f"{job}: expected paths in the project: {error}") from error
            runs = tracking.merge(
                folder / "new", root, job, parameters.load(root / "params.yaml").mlflow.uri
            )
            paths = [path for path in results(root, bring) if (folder / "new" / path).exists()]
            paths.sort(key=lambda path: path == "dvc.lock")  # which says that the others are there
            swap.swap(folder / "new", root, paths, work)
        except OSError as error:
            raise SubmitError(f"{job}: cannot put its results in place: {error}") from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        brought.touch()
    if "dvc.lock" in paths:
        # Into DVC's cache, or it would make them again. It refuses if the code has changed since.
        command = [sys.executable, "-m", "dvc", "commit", "--quiet", "dvc.yaml"]
        done = subprocess.run(
            command, cwd=root, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        if done.returncode:
            print(f"DVC will make them again: {done.stderr.strip()}")
    print(f"brought back: {', '.join(paths)}; {runs} MLflow runs")


def _download(client: JobSubmissionClient, job: str, name: str, path: Path) -> None:
    """A file of the log folder of the node on which the job ran.

    By plain HTTP, as the dashboard's own links do it, with the header that Ray documents for any
    client: its function for it, `ray.util.state.get_log`, asks another port for this one first.
    """
    node = client.get_job_info(job).driver_node_id
    query = urllib.parse.urlencode({"node_id": node, "filename": name, "lines": -1})
    url = f"{client.get_address().rstrip('/')}/api/v0/logs/file?{query}"
    request = urllib.request.Request(url, headers=_headers())
    try:
        with urllib.request.urlopen(request, timeout=120) as answer, open(path, "wb") as file:
            shutil.copyfileobj(answer, file, 1 << 20)
    except (urllib.error.URLError, http.client.HTTPException) as error:
        more = f": {error.read().decode(errors='replace')}" if hasattr(error, "read") else ""
        raise SubmitError(f"{job}: cannot fetch {name}: {error}{more}") from error


# -- there, on the cluster ---------------------------------------------------------------------


def here(command: list[str], bring: list[str]) -> int:
    """Run a command on a copy of the uploaded directory and pack what it made; its exit status.

    Ray may take an uploaded directory away or unpack it anew, and hands the same one to every job
    with the same content. The copy is kept, for a job that failed to be gone on with.
    """
    # In a job RAY_ADDRESS names the cluster that the job runs in.
    session = session_folder(parameters.load(ROOT / "params.yaml").ray)
    folder = session / "bnncore" / ROOT.resolve().name  # names a content
    if not folder.exists():
        new = folder.with_name(secrets.token_hex(8))
        shutil.copytree(ROOT, new)
        new.rename(folder)
    with open(folder / ".submit.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SubmitError("a job with the same files is running: wait for it") from None
        if not (folder / ".git").exists():  # DVC wants to be told
            (folder / ".dvc").mkdir(exist_ok=True)
            (folder / ".dvc" / "config.local").write_text("[core]\n    no_scm = true\n")
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        status = subprocess.run(command, cwd=folder, env={**os.environ, "PATH": path}).returncode
        if status:
            return status
        name = f"bnncore-{secrets.token_hex(8)}.tar"
        archive = session / "logs" / name  # this folder is what Ray serves
        size, sha256 = pack([*results(folder, bring), *STORE], folder, archive)
    print(f"results: {name}, {size} bytes, sha256 {sha256}", flush=True)
    return 0


def results(root: Path, bring: list[str]) -> list[str]:
    """What the stages of dvc.yaml write, dvc.lock, which says of what, and `bring`."""
    stages = yaml.safe_load((root / "dvc.yaml").read_text())["stages"].values()
    entries = [e for s in stages for k in ("outs", "metrics", "plots") for e in s.get(k, [])]
    names = ["dvc.lock", *(e if isinstance(e, str) else next(iter(e)) for e in entries), *bring]
    paths = sorted({Path(name) for name in names})
    return [str(p) for p in paths if not set(p.parents) & set(paths)]  # none inside another


def pack(paths: list[str], root: Path, archive: Path) -> tuple[int, str]:
    """Those paths that exist, as one tar file; its size and SHA-256."""
    with tarfile.open(archive, "w") as tar:
        for path in paths:
            if (root / path).exists():
                tar.add(root / path, path)
    return digest(archive)


def digest(path: Path) -> tuple[int, str]:
    """A file's size and SHA-256."""
    with open(path, "rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    run(main)
