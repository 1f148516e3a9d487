"""Counting: by arithmetic a reader can check, against trained files, and before training."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import yaml
from PIL import Image
from torch import nn

from bnncore import storage
from bnncore.lowering import blueprint, lower
from bnncore.networks import backbones
from bnncore.networks.ensemble import Ensemble, EnsembleSpec
from bnncore.networks.parts import ModelSpec
from bnncore.networks.sharing import SHARING
from bnncore.packed import narrow, packfile
from bnncore.paper import figures as published
from bnncore.paper import sizes
from bnncore.params import Binarizer, PackParams
from bnncore.storage import untrained
from bnncore.storage.__main__ import main

DIGITS = (8, 8, 1)
CIFAR = (32, 32, 3)


def spec(backbone, members=1, sharing="no_shared", image=DIGITS, classes=10, width=8, **changes):
    binarizer = changes.pop("binarizer", Binarizer())
    model = ModelSpec(backbone, image, classes, width, binarizer=binarizer)
    if sharing == "tentaclenet":
        kind = "logits" if backbone in ("nin", "leanresnet8", "leanplain") else "features"
        return EnsembleSpec(model, members, SHARING[sharing], "sum", kind)
    return EnsembleSpec(model, members, SHARING[sharing], **changes)


def random_statistics(ensemble: Ensemble, seed: int, negative: bool) -> None:
    """Batch-norm statistics and slopes as training never leaves them, for the worst of files."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor):
        return torch.randn(tensor.shape, generator=generator)

    with torch.no_grad():
        for module in ensemble.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.copy_(normal(module.weight) if negative else module.weight)
                module.bias.copy_(normal(module.bias))
                module.running_mean.copy_(normal(module.running_mean))
                module.running_var.copy_(normal(module.running_var).abs() + 0.1)
            elif isinstance(module, nn.PReLU):
                slope = normal(module.weight).abs() + 0.01
                module.weight.copy_(-slope if negative else slope)


def lowered(of: EnsembleSpec, seed=0, negative=True, classes=None, info=None):
    ensemble = Ensemble(of, seed=seed)
    random_statistics(ensemble, seed, negative)
    channels = of.model.image[2]
    names = tuple(classes or map(str, range(of.model.classes)))
    return lower.lower(ensemble, (0.5,) * channels, (0.25,) * channels, names, info or {})


# -- the papers ---------------------------------------------------------------------------------


def test_tables_of_the_first_paper_by_hand():
    # NiN's BNN: 5x5 stem and 1x1 classifier with 32 bits, binary weights and biases with 1.
    binary = (
        192 * 160 + 160 + 160 * 96 + 96 + 96 * 192 * 25 + 192 + 2 * (192 * 192 + 192)
        + 192 * 192 * 9 + 192 + 192 * 192 + 192
    )  # fmt: skip
    stem, head = 32 * (3 * 192 * 25 + 192), 32 * (192 * 10 + 10)
    rows = storage.table(blueprint.draw(sizes.spec("nin", "cifar10", "bnn")).most)
    assert storage.tentaclenet_bits(rows, 1) == stem + binary + head
    # A TentacleNet of NiN: the last 1x1 convolution once, its mixing layer not at all.
    of = sizes.spec("nin", "cifar10", "tentaclenet", 5)
    rows = storage.table(blueprint.draw(of).most, 5)
    assert storage.tentaclenet_bits(rows, 5) == stem + 5 * binary + head
    # One of FerNet: K * C weights and C biases a tentacle.
    w = 32
    binary = (2 * (w * w * 9 + w) + w * 2 * w * 9 + 2 * w + 2 * (4 * w * w * 9 + 2 * w)
              + 2 * w * 4 * w * 9 + 4 * w + 2 * (16 * w * w * 9 + 4 * w))  # fmt: skip
    of = sizes.spec("fernet", "fer2013", "tentaclenet", 3)
    rows = storage.table(blueprint.draw(of).most, 3)
    stem = 32 * (1 * w * 9 + w)
    assert storage.tentaclenet_bits(rows, 3) == stem + 3 * binary + 3 * 32 * (4 * w * 7 + 7)


def test_tables_of_the_second_paper_by_hand():
    rows = storage.table(blueprint.draw(sizes.spec("resnet20", "cifar100", "bnn")).most)
    assert storage.by_block(rows) == {
        "conv1": 32 * 3 * 16 * 9,
        "layer1": 6 * 16 * 16 * 9,
        "layer2": 16 * 32 * 9 + 5 * 32 * 32 * 9 + 32 * (16 * 32),  # the shortcut is not binary
        "layer3": 32 * 64 * 9 + 5 * 64 * 64 * 9 + 32 * (32 * 64),
        "linear": 32 * 64 * 100,
    }


def test_figure_7b_grows_by_what_members_own():
    curves = sizes.curves_7b()
    linear, conv1, shortcuts = 32 * 64 * 100, 32 * 3 * 16 * 9, 32 * (16 * 32 + 32 * 64)
    last = 64 * 64 * 9
    one = curves["no_shared"][1]
    steps = {
        "no_shared": one,
        "shared_conv": linear,
        "all_frozen": 0,
        "c1": conv1,
        "c2": shortcuts + linear,
        "c3": last + linear,
        "c3_blocks": 3 * (16 * 16 + 32 * 32 + 64 * 64) * 9 + linear,
    }
    for sharing, step in steps.items():
        assert curves[sharing] == {m: one + (m - 1) * step for m in range(1, 11)}


def test_operations_by_hand_and_linear_in_members():
    of = sizes.spec("resnet20", "cifar10", "bnn")
    counts = untrained.count(of)
    blocks = (6 * 16 * 16 * 9 * 32**2 + (16 * 32 + 5 * 32 * 32) * 9 * 16**2
              + (32 * 64 + 5 * 64 * 64) * 9 * 8**2)  # fmt: skip
    real = 3 * 16 * 9 * 32**2 + 16 * 32 * 16**2 + 32 * 64 * 8**2 + 64 * 10
    assert (counts.binary_macs, counts.float_macs) == (blocks, real)
    many = untrained.count(replace(of, members=7))
    assert (many.binary_macs, many.float_macs) == (7 * blocks, 7 * real)
    # A block that all members share runs once.
    shared = untrained.count(spec("nin", 5, "tentaclenet", CIFAR, width=192))
    alone = untrained.count(spec("nin", 1, "tentaclenet", CIFAR, width=192))
    stem = 3 * 192 * 25 * 32**2
    assert shared.float_macs - stem == 5 * (alone.float_macs - stem)


def test_papers_command_prints_every_figure_as_equal(capsys):
    assert main(["--papers"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "27 of 27 figures equal"
    assert sum(" equal" in line for line in lines[:-1]) == 15 + 12
    assert not any("DIFFERENT" in line for line in lines)


OTHERS = [pytest.param(n, marks=pytest.mark.slow)
          for n in ("resnet9", "fernet", "resnet20", "resnet18")]  # fmt: skip


@pytest.mark.parametrize("name", ["nin", *OTHERS])
def test_papers_command_fails_when_one_channel_count_changes(name, monkeypatch, capsys):
    builder, width = backbones.BACKBONES[name]

    def narrower(*args):
        network = builder(*args)
        convolutions = [m for m in network.body.modules() if isinstance(m, nn.Conv2d)]
        last = convolutions[-1]  # one filter less in one layer
        last.weight = nn.Parameter(last.weight[:-1])
        return network

    monkeypatch.setitem(backbones.BACKBONES, name, (narrower, width))
    monkeypatch.setattr(sizes, "_left_out", list)  # such a network does not run
    monkeypatch.setattr(sizes, "_operations", lambda figures: [])
    blueprint.forget()
    try:
        assert main(["--papers"]) == 1
    finally:
        blueprint.forget()
    last = capsys.readouterr().out.splitlines()[-1]
    equal, _, of, *_ = last.split()
    assert last.endswith("figures equal")
    assert 0 < int(equal) < int(of)


def test_papers_command_fails_when_the_expected_figure_differs(tmp_path, capsys):
    other = tmp_path / "figures.yaml"
    other.write_text(published.FIGURES.read_text().replace("published: 645", "published: 646"))
    assert main(["--papers", "--expected", str(other)]) == 1
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "26 of 27 figures equal"
    (different,) = (line for line in out.splitlines() if "DIFFERENT" in line)
    assert "nin tentaclenet 5" in different
    # A published figure that is not counted is a difference too.
    more = "sizes:\n- {table: x, row: x, backbone: nin, dataset: cifar10, kind: no, "
    more += "members: 1, published: 1}\n"
    other.write_text(published.FIGURES.read_text().replace("sizes:\n", more))
    assert main(["--papers", "--expected", str(other)]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "27 of 28 figures equal"


def test_papers_command_says_which_file_is_missing(tmp_path, capsys):
    assert main(["--papers", "--expected", str(tmp_path / "none.yaml")]) == 1
    assert "none.yaml: expected the papers' figures" in capsys.readouterr().err


# -- trained files, and before training ----------------------------------------------------------

# Every backbone, and every sharing with two of them; soak: all with all.
STRUCTURES = [
    pytest.param(backbone, sharing, marks=() if sharing in ("shared_conv", "tentaclenet")
                 else pytest.mark.slow if backbone in ("resnet8", "nin") else pytest.mark.soak)
    for backbone in ("nin", "fernet", "resnet8", "resnet9", "birealnet18", "reactnet10",
                     "leanresnet8", "leanplain")
    for sharing in SHARING
    if not (backbone in ("nin", "fernet", "leanplain") and sharing in ("c2", "c3_blocks"))
    if not (backbone == "leanresnet8" and sharing == "c2")
]  # fmt: skip


@pytest.mark.parametrize("negative", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("backbone", "sharing"), STRUCTURES)
def test_counts_before_training_are_those_of_the_file(backbone, sharing, negative):
    classes = tuple(f"class {i}" for i in range(10))
    info = {"name": "x", "backbone": backbone, "seed": 3}
    for members in (1, 3) if negative else (3,):
        of = spec(backbone, members, sharing)
        program = lowered(of, members, negative, classes, info)
        content = packfile.encode(program)
        real = storage.counted(packfile.decode(content), len(content))
        drawn = untrained.count(of, classes=classes, info=info)
        assert drawn.tentaclenet == real.tentaclenet
        assert drawn.filter_sharing == real.filter_sharing
        assert (drawn.binary_macs, drawn.float_macs) == (real.binary_macs, real.float_macs)
        assert drawn.file_least <= real.file <= drawn.file
        if negative:
            assert drawn.file <= 1.1 * real.file
        # Without knowing what the file says of itself the bound still holds.
        assert real.file <= blueprint.file_bound(of)


@pytest.mark.parametrize("weight", ["sign", "learned"])
@pytest.mark.parametrize("activation", ["bireal", "float"])
def test_counts_of_other_binarizers(weight, activation):
    for backbone in ("nin", "resnet8"):
        of = spec(backbone, 2, "shared_conv", binarizer=Binarizer(weight, activation))
        size = len(packfile.encode(lowered(of)))
        counts = untrained.count(of)
        same = untrained.count(spec(backbone, 2, "shared_conv"))
        assert counts.file_least <= size <= counts.file
        # The papers count neither scales nor activations, and a bias of a binary layer as one bit.
        assert counts.tentaclenet == same.tentaclenet == storage.counted(lowered(of)).tentaclenet
        assert counts.filter_sharing == same.filter_sharing


@pytest.mark.slow
@pytest.mark.parametrize("affine", ["float32", "float16"])
@pytest.mark.parametrize("weights", ["float32", "float16", "int8", "mixed"])
def test_bound_of_narrowed_files(affine, weights):
    pack = PackParams(affine, weights)
    for backbone, sharing in (("nin", "tentaclenet"), ("resnet8", "c2"), ("reactnet10", "c1")):
        of = spec(backbone, 3, sharing)
        program = narrow.narrowed(lowered(of), pack)
        size = len(packfile.encode(program))
        counts = untrained.count(of, pack, classes=program.classes, info={})
        assert counts.file_least <= size <= counts.file <= 1.1 * size
        # The papers' counts are of the trained network, whatever the file keeps of it.
        assert storage.counted(program).tentaclenet == counts.tentaclenet
        assert storage.counted(program).filter_sharing == counts.filter_sharing
        assert untrained.table(of, pack) == storage.table(program)


def test_a_float_network_counts_32_bits_each():
    of = EnsembleSpec(ModelSpec("nin", DIGITS, 10, 8), 1, SHARING["no_shared"])
    network = backbones.build(of.model)
    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    values = sum(p.numel() for layer in layers for p in layer.parameters())
    counts = untrained.count(of)
    assert counts.tentaclenet == 32 * values
    assert counts.file_least <= len(packfile.encode(lowered(of))) <= counts.file


def test_vote_weights_are_in_the_file_and_in_neither_paper():
    of = spec("resnet8", 4, combine="soft_vote")
    ensemble = Ensemble(of)
    plain = storage.counted(lower.lower(ensemble, (0.5,), (0.25,), tuple("0123456789")))
    ensemble.weights.copy_(torch.tensor([1.0, 2.0, 0.5, 0.25]))
    program = lower.lower(ensemble, (0.5,), (0.25,), tuple("0123456789"))
    voted = storage.counted(program)
    assert voted.tentaclenet == plain.tentaclenet
    assert voted.filter_sharing == plain.filter_sharing
    parts = storage.by_part(voted.entries)
    assert parts["votes and biases of the combination"] == (4 * 4, 0)
    assert plain.file < voted.file <= blueprint.file_bound(of)


def test_rows_add_up_to_the_file():
    program = lowered(spec("reactnet10", 3, "shared_conv"))
    counts = storage.counted(program)
    data = sum(t.data.nbytes for t in program.tensors.values())
    assert sum(row.file_bytes for row in counts.entries) == data
    parts = storage.by_part(counts.entries)
    assert sum(shared + 3 * own for shared, own in parts.values()) == data
    layers = storage.by_layer(counts.entries)
    combined = sum(row.file_bytes for row in counts.entries if row.layer == "combine")
    assert sum(taken for _, taken in layers) + combined == data
    assert sum(weights.counted_bits for weights, _ in layers) == counts.filter_sharing


def test_layers_say_who_owns_what():
    entries = storage.table(lowered(spec("resnet8", 3, "c2")))
    layers = {weights.layer: (weights, taken) for weights, taken in storage.by_layer(entries)}
    stem, taken = layers["stem.conv"]
    assert (storage.block(stem.layer), stem.shape, stem.binary) == ("conv1", (8, 3, 3, 1), False)
    assert (stem.own, stem.copies, stem.counted_bits) == (False, 1, 32 * 72)
    assert taken > 4 * 72, "the norm behind it counts to it"
    shortcut, _ = layers["body.layer2.block1.shortcut.conv"]
    own = (shortcut.own, shortcut.copies, shortcut.counted_bits)
    assert own == (True, 3, 3 * 32 * 8 * 16)
    conv, _ = layers["body.layer1.block1.conv1"]
    assert (conv.binary, conv.own, conv.counted_bits) == (True, False, 8 * 8 * 9)


def test_counting_a_packed_file_needs_no_torch(tmp_path):
    path = tmp_path / "x.bnn"
    packfile.save(lowered(spec("nin", 2, "tentaclenet")), path)
    code = (
        "import sys; from bnncore.storage.__main__ import main; "
        f"assert main(['--file', {str(path)!r}]) == 0; assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.split()[:2] == ["the", "file"])
    assert line.split()[-1] == f"{path.stat().st_size:,}"


def test_params_command_counts_without_training(tmp_path, capsys):
    path = tmp_path / "params.yaml"
    path.write_text("""
model: {backbone: resnet20}
data: {name: cifar100}
ensembles:
  train:
  - {name: ten, scheme: fusion, sharing: shared_conv, members: 10}
""")
    assert main(["--params", str(path)]) == 0
    out = capsys.readouterr().out
    *_, fp32, bnn, ten = out.splitlines()
    assert fp32.split()[0] == "fp32"
    assert bnn.split()[3] == f"{32 * (432 + 6400) + 13824 + 67072 + 268288:,}"
    assert ten.split()[:2] == ["ten", "10"]
    path.write_text("model: {backbone: resnet21}\n")
    assert main(["--params", str(path)]) == 1
    assert "resnet20" in capsys.readouterr().err


def test_params_command_finds_images_as_the_stages_do(tmp_path, capsys, monkeypatch):
    """Relative to where it is run, wherever the file of parameters lies."""
    monkeypatch.chdir(tmp_path)
    for name in ("cat", "dog"):
        (tmp_path / "mine" / name).mkdir(parents=True)
        for i in range(5):
            Image.new("L", (9, 9), i).save(tmp_path / "mine" / name / f"{i}.png")
    path = tmp_path / "reports" / "search" / "best.yaml"
    path.parent.mkdir(parents=True)
    model = {"backbone": "resnet8", "width": 8}
    path.write_text(yaml.safe_dump({"model": model, "data": {"name": "folder", "path": "mine"}}))
    assert main(["--params", str(path)]) == 0
    assert "== bnn ==" in capsys.readouterr().out


def test_params_command_counts_the_images_and_the_packing_that_are_asked_for(tmp_path, capsys):
    def bnn(**sections) -> tuple[str, int, int]:
        path = tmp_path / "params.yaml"
        model = {"backbone": "resnet8", "width": 8}
        path.write_text(yaml.safe_dump({"model": model, **sections}))
        assert main(["--params", str(path)]) == 0
        _, _, out = capsys.readouterr().out.partition("== bnn ==")
        last = {line.rsplit(maxsplit=1)[0].strip(): line.split()[-1] for line in out.splitlines()
                if line.strip()}  # fmt: skip
        ends = (last["at least"], last["the file, once trained: at most"])
        shape = out.split("stem.conv")[1].split()[0]
        return shape, *(int(end.replace(",", "")) for end in ends)

    shape, least, most = bnn()
    assert shape == "8x3x3x1"
    assert bnn(data={"channels": 3})[0] == "8x3x3x3"
    narrow = bnn(pack={"affine": "float16", "weights": "int8"})
    assert narrow[1] < narrow[2] < least
    assert bnn(pack={"choose": "auto"})[1:] == (narrow[1], most)


def test_drawings_are_kept_across_members():
    a, b = spec("nin", 2, "tentaclenet"), spec("nin", 9, "tentaclenet")
    assert blueprint.draw(a) is blueprint.draw(b)
    own = untrained.count(b).file - untrained.count(a).file
    program = blueprint.draw(a).most
    assert own == 7 * sum(t.data.nbytes for t in program.tensors.values() if t.own)
