"""`params.yaml`: a section a stage, read into typed, frozen objects before any work.

Unknown keys, wrong types and values out of range are refused with the key, the value and what is
allowed. Nothing here imports torch: the evaluator reads parameters too. What only the training
side and the packed format can know (whether a backbone or a sharing pattern exists, how many
members a file holds) `check` looks up, before anything trains.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import yaml

from bnncore.params.search import SearchParams, SpaceParams
from bnncore.params.sections import (
    Binarizer,
    CustomSharing,
    DataParams,
    EnsembleParams,
    EnsemblesParams,
    EvaluateParams,
    MlflowParams,
    ModelParams,
    PackParams,
    Params,
    RayParams,
    Recipe,
    Scale,
)
from bnncore.params.strict_yaml import parse_yaml, read_yaml
from bnncore.params.validation import ParamsError, validated

__all__ = [
    "Binarizer", "CustomSharing", "DataParams", "EnsembleParams", "EnsemblesParams",
    "EvaluateParams", "MlflowParams", "ModelParams", "PackParams", "Params", "ParamsError",
    "RayParams", "Recipe", "Scale", "SearchParams", "SpaceParams", "digest", "load", "parse",
    "parse_yaml", "plain", "read_yaml", "save",
]  # fmt: skip


def parse(values: Any) -> Params:
    """`Params` from plain data, `scale` worked in.

    Raises:
        ParamsError: names every key that is wrong, its value and what is allowed.
    """
    if not isinstance(values, dict):
        raise ParamsError(f"params: expected a mapping of sections, got {type(values).__name__}")
    params = validated(Params, values)
    for ensemble in params.ensembles.train:
        params.recipe(ensemble)
    return params.scaled()


def load(path: str | Path = "params.yaml") -> Params:
    """Read and check a parameter file; ParamsError names the file and the key."""
    values = read_yaml(path)
    try:
        return parse(values)
    except ParamsError as error:
        raise ParamsError(f"{path}: {error}") from None


def plain(params: Any) -> dict[str, Any]:
    """A section, resolved, as plain data, ready for YAML and JSON."""
    return json.loads(json.dumps(dataclasses.asdict(params)))


def save(params: Any, path: str | Path) -> None:
    """Write the resolved copy that stands beside the weights."""
    Path(path).write_text(yaml.safe_dump(plain(params), sort_keys=False))


def digest(*parts: Any) -> str:
    """A short hash of plain data: the same parts, the same hash."""
    text = json.dumps(
        [plain(p) if dataclasses.is_dataclass(p) else p for p in parts], sort_keys=True
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]
