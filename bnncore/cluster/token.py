"""The token that every process of a Ray cluster and every client of it shows.

Whoever has it can run any program on the cluster. Ray itself leaves its file readable by all.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path


def path() -> Path:
    """Where Ray looks for the token: RAY_AUTH_TOKEN_PATH, else its default."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def read() -> str | None:
    """The token, as Ray finds it, or None."""
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    try:
        return path().read_text().strip() or None
    except OSError:
        return None


def guard(create: bool = False) -> None:
    """Let nobody but its owner read the token's file.

    Args:
        create: make one where there is none, as Ray would for a cluster of its own.
    """
    file = path()
    # A folder that cannot be written, or another's file: Ray says what it cannot do.
    with contextlib.suppress(OSError):
        if create and read() is None:
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            new = file.with_name(f"{file.name}.{secrets.token_hex(4)}")
            with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as text:
                text.write(secrets.token_hex(32))
            with contextlib.suppress(FileExistsError):  # somebody else was first
                os.link(new, file)
            new.unlink()
        if file.stat().st_mode & 0o077:
            file.chmod(0o600)
