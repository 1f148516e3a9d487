"""Results of a benchmark that takes long: by name, in a JSON file, written whole after each."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Pieces:
    """Results by name in a JSON file, written whole after each."""

    def __init__(self, path: Path):
        self.path = path
        self.known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def __setitem__(self, name: str, value: Any) -> None:
        self.known[name] = value
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.known, indent=1, sort_keys=True) + "\n")
        os.replace(new, self.path)

    def __contains__(self, name: str) -> bool:
        return name in self.known
