"""The command line on real files."""

import csv
import io
import json
import re

import pytest
from PIL import Image

from bnncore.__main__ import main
from bnncore.lowering.lower import lower
from bnncore.packed import compiled_kernels, costs, execute, packfile
from tests import tiny
from tests.graphs import random_images
from tests.packed.test_execute import OPS, ensemble


@pytest.fixture
def net(tmp_path):
    path = tmp_path / "net.bnn"
    packfile.save(ensemble(3), path)
    return path


def lowered(backbone, **changes):
    ensemble = tiny.ensemble(1, "shared_conv", backbone=backbone, **changes)
    return lower(ensemble, (0.5,), (0.2,), tuple("abcd"))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images" / "deep").mkdir(parents=True)
    images = random_images(ensemble(3), 3)
    for index, name in enumerate(("a.png", "b.PNG", "deep/c.bmp")):
        Image.fromarray(images[index]).save(tmp_path / "images" / name)
    (tmp_path / "images" / "notes.txt").write_text("not an image")
    return tmp_path / "images"


def test_inspect(net, capsys):
    assert main(["inspect", str(net)]) == 0
    out = capsys.readouterr().out
    program = ensemble(3)
    for node in program.nodes:
        assert node.name in out
    assert "format 1, 3 members, combined by mean" in out
    assert "weight:binary[3*7x3x3x5]" in out
    assert f"{net.stat().st_size}  file" in out
    assert f"{costs.cost(program, 3)[0]:,} binary" in out
    assert f"{costs.peak_memory(program)[0]:,} bytes with bits" in out


@pytest.mark.parametrize("ops", OPS)
def test_predict_a_folder(net, folder, capsys, ops):
    arguments = ["predict", str(net), str(folder), "--members", "2", "--top", "2", "--ops", ops]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    program = ensemble(3)
    labels = execute.Model(program, "numpy").predict(random_images(program, 3), 2)
    assert len(lines) == 3
    for line, name, label in zip(lines, ("a.png", "b.PNG", "c.bmp"), labels, strict=True):
        path, best, *rest = re.split(r"\s{2,}", line)
        assert path.endswith(name)
        assert best.split()[0] == program.classes[label]
        assert len(rest) == 1


@pytest.mark.parametrize("combine", ["mean", "sum", "soft_vote", "hard_vote"])
def test_predict_answers_what_the_model_does(tmp_path, capsys, combine):
    """Where members disagree, too: two that do are a tie of a hard vote."""
    program = ensemble(4, combine)
    packfile.save(program, tmp_path / "net.bnn")
    images = random_images(program, 40)
    for index, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{index:02}.png")
    arguments = ["predict", str(tmp_path / "net.bnn"), str(tmp_path), "--members", "2", "--json"]
    assert main(arguments) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    model = execute.Model(program, "numpy")
    disagree = model.outputs(images, 2).argmax(2)
    assert (disagree[0] > disagree[1]).any(), "the lower class would be right by chance"
    labels = [program.classes[k] for k in model.predict(images, 2)]
    assert [row["label"] for row in rows] == labels
    assert [next(iter(row["classes"])) for row in rows] == labels


@pytest.mark.parametrize("form", ["text", "json", "csv"])
@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_predict_a_list(net, folder, capsys, monkeypatch, form, threshold):
    """A list on stdin, one of them no image: the others are classified, once a line."""
    given = [folder / "a.png", folder / "notes.txt", folder / "deep", folder / "a.png"]
    listed = "".join(f"{path}\n" for path in given).encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(listed)))
    arguments = ["predict", str(net), "-", "--ops", "numpy", "--threshold", str(threshold)]
    assert main([*arguments, *([] if form == "text" else [f"--{form}"])]) == 1
    out, error = capsys.readouterr()
    assert "notes.txt: expected a readable image" in error
    assert len(error.splitlines()) == 1
    program = ensemble(3)
    labels = execute.Model(program, "numpy").predict(random_images(program, 3)[[0, 2, 0]])
    expected = [program.classes[label] for label in labels]
    if form == "json":
        rows = [json.loads(line) for line in out.splitlines()]
        got = [row["label"] or "unsure" for row in rows]
        best = [max(row["classes"], key=row["classes"].get) for row in rows]
        paths = [row["image"] for row in rows]
    elif form == "csv":
        rows = list(csv.DictReader(out.splitlines()))
        got, best = [row["label"] for row in rows], [row["class1"] for row in rows]
        paths = [row["image"] for row in rows]
        assert all(float(row["p1"]) >= float(row["p2"]) for row in rows)
    else:
        cells = [re.split(r"\s{2,}", line) for line in out.splitlines()]
        paths = [row[0] for row in cells]
        got = [row[1].split()[0] for row in cells]
        best = [row[1 + (threshold > 0)].split()[0] for row in cells]
    assert paths == [str(folder / name) for name in ("a.png", "deep/c.bmp", "a.png")]
    assert best == expected
    assert got == (["unsure"] * 3 if threshold else expected)


def test_bench(net, capsys):
    arguments = ["bench", str(net), "--batch", "2", "--repeats", "1", "--members", "2", "--torch"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "images/s" in out
    for ops in execute.OPS:
        assert f"{ops} " in out


def test_bench_counts_the_memory_of_every_kernel(tmp_path, monkeypatch, capsys):
    """Of few channels, which the compiled kernels round up."""
    net = tmp_path / "net.bnn"
    program = lowered("resnet8", width=2)
    packfile.save(program, net)
    taken = execute.Model(program).memory
    assert taken > 2 * costs.peak_memory(program)[1]
    monkeypatch.setattr("os.sysconf", lambda name: 128 * taken if name == "SC_PAGE_SIZE" else 1)
    assert main(["bench", str(net), "--batch", "64"]) == 1
    assert "--batch: expected at most" in capsys.readouterr().err


def test_bench_shows_what_each_layer_takes(tmp_path, capsys):
    net = tmp_path / "net.bnn"  # in which norms have the names of their convolutions
    packfile.save(lowered("birealnet18"), net)
    assert main(["bench", str(net), "--batch", "2", "--repeats", "1", "--layers"]) == 0
    rows = capsys.readouterr().out.partition("one thread, one member:")[2].splitlines()[2:]
    steps = compiled_kernels.plan(packfile.load(net))
    assert sorted(row.split(":")[0] for row in rows) == sorted(s.about.split(":")[0] for s in steps)
    binary = [row.split() for row in rows if ": bconv" in row]
    assert binary
    assert all(set(compiled_kernels.TILES) & set(row) for row in binary)
    percent = [[float(w[:-1]) for w in row.split() if w.endswith("%")] for row in rows]
    assert sum(shares[0] for shares in percent) == pytest.approx(100, abs=len(rows))
    # of the peak of its tile, where there are products to count
    assert [len(shares) == 2 for shares in percent] == [": bconv" in row for row in rows]
