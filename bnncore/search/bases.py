"""The pretrained networks that trials start from: each trained once, kept on disk, shared."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from bnncore import params as P
from bnncore.cluster.crew import Crew, Work
from bnncore.data import Dataset
from bnncore.params import Params
from bnncore.search import trial
from bnncore.training import plans
from bnncore.training.ensembled import Ensembled


class Bases:
    """FP32 networks and BNNs of a study's backbones and widths, a folder each."""

    def __init__(self, data: Dataset, folder: Path, say: Callable[[str], None]):
        self.data, self.folder, self.say = data, folder, say
        self._keys: dict[str, str] = {}  # network -> the name of what is kept of it

    def needed(self, crew: Crew, p: Params, todo: list[Work]) -> str | None:
        """The name of the network that what `p` are about starts from, or None.

        It is known to `crew` then, or what must be trained for it is added to `todo`.
        """
        first = trial.base(p)
        if first is None:
            return None
        key = self._key(p)
        fp32, bnn = f"fp32/{key}", f"bnn/{key}"
        wanted = bnn if first == "bnn" else fp32
        if not self._known(crew, wanted, todo):
            if wanted == bnn and not self._known(crew, fp32, todo):
                todo.append(Work(fp32, trial.network, (p,), None, math.inf, keep=True))
            needs = fp32 if wanted == bnn else None
            todo.append(Work(wanted, trial.network, (p,), needs, math.inf, keep=True))
        return wanted

    def _known(self, crew: Crew, name: str, todo: list[Work]) -> bool:
        if name in crew.kept or any(work.name == name for work in todo):
            return True
        folder = self.folder / name
        if not folder.exists():
            return False
        try:
            crew.keep(name, Ensembled.read(folder))
        except ValueError as error:
            self.say(f"{str(error).splitlines()[0]}; it is trained again")
            return False
        return True

    def _key(self, p: Params) -> str:
        """Changes with all that the two networks depend on, the code of training included."""
        key = f"{p.model.backbone}-{p.model.width}"
        if key not in self._keys:
            job = plans.first_job(p, self.data, None)
            digest = P.digest(job.digest(self.data), p.binarize, p.model.binarizer)
            self._keys[key] = f"{key}-{digest}"
        return self._keys[key]

    def save(self, name: str, trained: Ensembled) -> None:
        trained.save(self.folder / name)
