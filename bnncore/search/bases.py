"""The pretrained networks that trials start from: each trained once, kept on disk, shared."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from bnncore import modules
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

    def needed(self, crew: Crew, p: Params, todo: list[Work]) -> tuple[str, ...]:
        """Names of the networks that what `p` are about starts from, or learns from.

        They are known to `crew` then, or what must be trained for them is added to `todo`.
        """
        names = [f"{kind}/{self._key(p)}" for kind in trial.bases(p)]
        for name in names:
            self._add(crew, p, name, todo)
        return tuple(names)

    def _add(self, crew: Crew, p: Params, name: str, todo: list[Work]) -> None:
        if self._known(crew, name, todo):
            return
        needs: tuple[str, ...] = ()
        if name.startswith("bnn/"):
            needs = (name.replace("bnn/", "fp32/", 1),)
            self._add(crew, p, *needs, todo)
        need = trial.gpu_bytes(p, self.data)
        todo.append(Work(name, trial.network, (p,), needs, math.inf, need, keep=True))

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
        """Changes with all that the two networks depend on, the code of training and of the user's
        binarizers included."""
        key = f"{p.model.backbone}-{p.model.width}"
        if key not in self._keys:
            job = plans.first_job(p, self.data, None)
            binarizer = p.model.binarizer
            code = modules.users_code([binarizer.weight, binarizer.activation])
            digest = P.digest(job.digest(self.data), p.binarize, binarizer, *code)
            self._keys[key] = f"{key}-{digest}"
        return self._keys[key]

    def save(self, name: str, trained: Ensembled) -> None:
        trained.save(self.folder / name)
