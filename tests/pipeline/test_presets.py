"""Every preset composes, counts, packs and runs; the default is what params.yaml holds."""

import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from bnncore import check, params
from bnncore.lowering import lower
from bnncore.networks.ensemble import Ensemble, EnsembleSpec
from bnncore.packed import execute, packfile
from bnncore.paper import figures
from bnncore.storage import untrained
from bnncore.training import plans
from pipeline import preset
from tests.storage.test_storage import random_statistics

ROOT = Path(__file__).parents[2]
NAMES = list(preset.presets())
PAPERS = [name for name in NAMES if name != "digits"]
FIGURES = figures.published()


@cache
def composed(name: str) -> params.Params:
    return params.parse(preset.compose(name))


def specs(p: params.Params) -> dict[str, EnsembleSpec]:
    (height, width, channels), classes = untrained.SHAPES[p.data.name]
    image = (height, width, channels)
    check.check(p, image, classes)
    return {
        "fp32": plans.single_spec(p, image, classes, binary=False),
        "bnn": plans.single_spec(p, image, classes, binary=True),
        **{e.name: plans.ensemble_spec(p, e, image, classes) for e in p.ensembles.train},
    }


def test_params_yaml_is_the_composed_default():
    assert composed(preset.DEFAULT) == params.load(ROOT / "params.yaml")


# In the fast tests every sixth.
EACH = [pytest.param(n, marks=pytest.mark.slow if i % 6 else ()) for i, n in enumerate(NAMES)]


@pytest.mark.parametrize("name", EACH)
def test_preset_composes_builds_and_counts(name):
    p = composed(name)
    assert params.parse(params.plain(p)) == p
    for of in specs(p).values():
        counts = untrained.count(of, p.pack)
        assert 0 < counts.filter_sharing / 8 < counts.file_least <= counts.file
    text = (preset.CONF / "preset" / f"{name}.yaml").read_text()
    assert text.startswith("# @package _global_\n# ")


@pytest.mark.parametrize("name", PAPERS)
def test_preset_of_a_paper_runs_its_whole_schedule(name):
    p = composed(name)
    first = p.model.backbone in ("nin", "resnet9", "fernet")
    epochs = {"fernet": 300, "nin": 300, "resnet9": 300, "birealnet18": 200}
    assert p.binarize.epochs == epochs.get(p.model.backbone, 400)
    assert p.ensembles.recipe.epochs == (300 if first else 200)
    assert (p.model.width, p.data.subset, p.scale) == (None, 1.0, params.Scale())
    assert p.binarize.schedule == ("plateau" if first else "poly")


TABLE2 = [size for size in FIGURES.sizes if size.table == "TentacleNet, Table 2"]
CURVES = [series for series in FIGURES.series if series.place.startswith("Kim et al., Figure")]


@pytest.mark.parametrize("size", TABLE2, ids=lambda size: size.row)
def test_preset_of_table_2_has_the_published_size(size):
    p = composed(f"table2_{size.row.rpartition(' ')[0].replace(' ', '_')}")
    (section,) = p.ensembles.train
    counts = untrained.count(specs(p)[section.name])
    assert (section.members, p.data.name) == (size.members, size.dataset)
    assert counts.kib == size.published


@pytest.mark.parametrize("curve", CURVES, ids=lambda curve: f"{curve.place}: {curve.name}")
def test_every_published_curve_has_a_preset(curve):
    wanted = {(*curve.kind, m) for m in curve.values}
    for name in PAPERS:
        p = composed(name)
        if (p.model.backbone, p.data.name) == (curve.backbone, curve.dataset):
            wanted -= {(e.scheme, e.sharing, e.members) for e in p.ensembles.train}
    assert not wanted


def test_scale_shortens_any_preset():
    p = params.parse(preset.compose("fig5a_fusion", epochs_scale=0.05, subset=0.1))
    assert (p.pretrain.epochs, p.binarize.epochs, p.ensembles.recipe.epochs) == (20, 20, 10)
    assert p.data.subset == 0.1
    assert params.parse(params.plain(p)) == p  # once only
    p = params.parse(preset.compose("fig3_nin", epochs_scale=0.1))
    assert (p.binarize.epochs, p.binarize.patience) == (30, 2)  # 1.5, rounded to even
    p = params.parse(preset.compose("table1_fernet", epochs_scale=1e-6))
    assert p.pretrain.epochs == 1


def test_command_writes_a_parameter_file(tmp_path, capsys):
    path = tmp_path / "params.yaml"
    arguments = ["fig8_voting", "--epochs-scale", "0.5", "seed=7", "--output", str(path)]
    assert preset.main([*arguments, "model.width=8"]) == 0
    p = params.load(path)
    assert (p.seed, p.model.width, p.binarize.epochs) == (7, 8, 100)
    assert preset.main([]) == 0
    listed = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in listed] == NAMES


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fig5c_fusion"], "expected one of digits, fig3_fernet,"),
        (["digits", "data.nmae=cifar10"], "data.nmae"),
        (["digits", "--subset", "1.5"], "scale.subset"),
        (["digits", "--epochs-scale", "0"], "scale.epochs: expected greater than 0"),
        (["digits", "pretrain.lr=-1"], "pretrain.lr: expected greater than 0, got -1"),
    ],
)
def test_command_refuses_what_it_cannot_compose(arguments, said, tmp_path, capsys):
    path = tmp_path / "params.yaml"
    assert preset.main([*arguments, "--output", str(path)]) == 1
    assert said in capsys.readouterr().err
    assert not path.exists()


@pytest.mark.slow
def test_dvc_composes_the_same(tmp_path):
    def sh(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True)

    dvc = (sys.executable, "-m", "dvc")
    identity = ("-c", "user.name=x", "-c", "user.email=x@example.org")
    sh("git", "init", "-q")
    sh(*dvc, "init", "-q")
    hydra = "[core]\n    analytics = false\n[hydra]\n    enabled = true\n"
    (tmp_path / ".dvc" / "config").write_text(hydra)
    (tmp_path / "conf").symlink_to(preset.CONF)
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    copy = {"cmd": "cp params.yaml seen.yaml", "deps": ["params.yaml"], "outs": ["seen.yaml"]}
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"copy": copy}}))
    sh("git", "add", "-A")
    sh("git", *identity, "commit", "-qm", "x")
    done = sh(*dvc, "exp", "run", "-S", "preset=fig5a_voting", "-S", "scale.epochs=0.1")
    assert done.returncode == 0, done.stderr
    seen = yaml.safe_load((tmp_path / "seen.yaml").read_text())
    assert seen == preset.compose("fig5a_voting", epochs_scale=0.1)
    done = sh(*dvc, "exp", "run", "-S", "preset=nope")
    assert done.returncode != 0
    assert "fig5a_voting" in done.stderr


# -- packed and run ------------------------------------------------------------------------------


@cache
def packed_against_torch(of: EnsembleSpec, votes: bool) -> tuple[np.ndarray, bool]:
    """Largest difference of member outputs from torch's for each image, relative to the largest
    output; and whether the file has a size that was foreseen."""
    ensemble = Ensemble(of, seed=5)
    random_statistics(ensemble, 5, negative=True)
    if votes:
        ensemble.weights.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(5))
    channels = of.model.image[2]
    mean, std = (0.5,) * channels, (0.25,) * channels
    classes = tuple(f"class {i}" for i in range(of.model.classes))
    content = packfile.encode(lower.lower(ensemble, mean, std, classes))
    program = packfile.decode(content)
    images = np.random.default_rng(5).integers(0, 256, (4, *of.model.image), dtype=np.uint8)
    got = execute.Model(program).outputs(images)
    x = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25
    with torch.no_grad():
        wanted = np.stack([z.numpy() for z in ensemble.outputs(x)])
    counts = untrained.count(of, classes=classes, info={})
    foreseen = counts.file_least <= len(content) <= counts.file
    return np.abs(got - wanted).max((0, 2)) / np.abs(wanted).max(), foreseen


def check_preset(name: str, width: int | None) -> None:
    """Pack and run what a preset asks for, with two members, on random weights and batch-norm
    statistics, negative scales and slopes among them; presets that differ in M share the work."""
    p = composed(name)
    schemes_of = {e.name: e.scheme for e in p.ensembles.train}
    distinct = {}
    for key, of in specs(p).items():
        model = replace(of.model, width=width)
        few = replace(of, model=model, members=min(of.members, 2))
        distinct[few] = schemes_of.get(key, "") in ("boosting", "gradient_boosting")
    for of, votes in distinct.items():
        differences, foreseen = packed_against_torch(of, votes)
        assert foreseen
        # A float that falls on its threshold in one rounding and beside it in another flips one
        # bit, and that image's outputs move a little: seldom, and never much.
        assert (differences < 1e-5).sum() >= 3, differences
        assert (differences < 0.1).all(), differences


@pytest.mark.slow
@pytest.mark.parametrize("name", PAPERS)
def test_preset_packs_and_runs_as_torch_does(name):
    check_preset(name, width=12)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["table1_nin", "table1_resnet9", "table1_fernet", "fig5a_fusion", "fig8_fusion"]
)
def test_preset_packs_and_runs_at_full_width(name):
    check_preset(name, width=None)


@pytest.mark.soak
@pytest.mark.parametrize("name", PAPERS)
def test_every_preset_packs_and_runs_at_full_width(name):
    check_preset(name, width=None)
