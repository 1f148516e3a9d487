"""The models that come with bnncore: each still gives its committed scores."""

import numpy as np
import pytest

import bnncore
from bnncore import params, zoo
from bnncore.__main__ import main
from bnncore.packed import packfile

ENTRIES = zoo.entries()


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.name)
def test_a_model_gives_its_committed_scores(entry):
    model = bnncore.load(f"zoo:{entry.name}")
    scores = model(zoo.images(model.program.image))
    np.testing.assert_allclose(scores, entry.scores, rtol=1e-4, atol=1e-4)
    assert len({tuple(row) for row in np.round(entry.scores, 2).tolist()}) > 1  # images tell


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.name)
def test_a_model_is_what_its_parameters_and_its_entry_say(entry):
    info = packfile.load(entry.path).info
    p = params.load(entry.path.with_suffix(".yaml"))
    assert (info["backbone"], info["width"]) == (p.model.backbone, p.model.width)
    assert info["val_top1"] == pytest.approx(entry.val_top1, abs=0.01)
    assert entry.command
    assert 0 < entry.test_top1 <= 100


def test_nothing_in_the_folder_is_without_an_entry():
    files = {path.name for path in zoo.FOLDER.iterdir() if path.suffix in (".bnn", ".yaml")}
    assert files == {entry.name + end for entry in ENTRIES for end in (".bnn", ".yaml")}


def test_commands_take_a_name_of_the_zoo(capsys):
    assert main(["zoo"]) == 0
    said = capsys.readouterr().out
    assert all(entry.name in said and entry.command in said for entry in ENTRIES)
    assert main(["inspect", f"zoo:{ENTRIES[0].name}"]) == 0
    assert main(["inspect", "zoo:none"]) == 1
    assert ENTRIES[0].name in capsys.readouterr().err
