"""What stage evaluate says of models beside their scores."""

from __future__ import annotations

import subprocess

import pytest

from bnncore import params, tracking
from pipeline import evaluate


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({}, None),
        ({"scheme": "voting", "vote": "soft"}, "vote soft"),
        ({"start": "random", "recipe": {"lr": 0.5, "epochs": 3}}, "start random, lr 0.5, epochs 3"),
        ({"fresh_classifier": False, "jitter": 0.0}, "jitter 0.0, fresh_classifier False"),
        ({"sharing": {"own": ["classifier", "body.*"]}}, "owning classifier body.* frozen"),
        ({"sharing": {"own": ["classifier"], "frozen": False}}, "owning classifier"),
    ],
)
def test_settings_of_an_ensemble(section, said):
    train = [{"name": "a", "members": 2, **section}, {"name": "b", "members": 4}]
    p = params.parse({"ensembles": {"train": train}})
    assert evaluate.settings(p, "a") == said
    assert evaluate.settings(p, "b") is None
    assert evaluate.settings(p, "bnn") is None


def test_the_commit_says_whether_files_differ_from_it(tmp_path):
    assert tracking.commit(tmp_path) is None

    def git(*words: str) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True)

    git("init", "-q", ".")
    assert tracking.commit(tmp_path) is None, "nothing is committed"
    for name in ("params.yaml", "dvc.lock"):
        (tmp_path / name).write_text("a")
    git("add", ".")
    git("commit", "-qm", "x")
    clean = tracking.commit(tmp_path)
    assert clean is not None
    assert len(clean) == 40
    (tmp_path / "dvc.lock").write_text("b")  # by every run
    (tmp_path / "new").write_text("b")
    assert tracking.commit(tmp_path) == clean
    (tmp_path / "params.yaml").write_text("b")
    assert tracking.commit(tmp_path) == f"{clean}-dirty"
