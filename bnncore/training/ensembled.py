"""A trained ensemble, and its folder on disk."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from bnncore.errors import UserError
from bnncore.networks.ensemble import Ensemble, EnsembleSpec
from bnncore.training.checkpoint import replaced
from bnncore.training.jobs import History, State, TrainingError
from bnncore.training.watch import require_finite


class ModelError(UserError, ValueError):
    """A folder does not hold a trained model."""


@dataclass(frozen=True, eq=False)
class Ensembled:
    """A trained ensemble.

    Attributes:
        spec: its structure.
        state: canonical state of all members.
        histories: job name -> its epochs.
    """

    spec: EnsembleSpec
    state: State
    histories: dict[str, History]

    def ensemble(self) -> Ensemble:
        """The torch module, loaded."""
        ensemble = Ensemble(self.spec)
        ensemble.load(self.state)
        return ensemble

    def save(self, folder: Path) -> None:
        """Write weights, structure and curves, shared tensors once; `folder` is replaced whole.

        Raises:
            TrainingError: a weight is not finite (names it), or the folder cannot be written.
        """
        require_finite(self.state, f"{folder}: the model to save")
        with replaced(folder, "the model") as new:
            new.mkdir()
            save_file(self.state, new / "weights.safetensors")
            (new / "spec.json").write_text(json.dumps(asdict(self.spec), indent=1))
            (new / "histories.json").write_text(json.dumps(self.histories))

    @classmethod
    def read(cls, folder: Path) -> Ensembled:
        """The inverse of `save`.

        Raises:
            ModelError: a file is missing or broken, or a weight is not finite; names it.
        """
        try:
            spec = TypeAdapter(EnsembleSpec).validate_json((folder / "spec.json").read_text())
            histories = json.loads((folder / "histories.json").read_text())
            state = load_file(folder / "weights.safetensors")
            require_finite(state, "weights.safetensors")
        except (OSError, ValueError, SafetensorError, TrainingError) as error:
            raise ModelError(f"{folder}: expected a trained model, got: {error}") from error
        return cls(spec, state, histories)
