"""What every command says of files and arguments that it cannot use: one line, and status 1."""

import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from bnncore import __main__ as packed
from bnncore import terminal
from bnncore.packed import packfile
from bnncore.packed.program import Node, Program, Tensor
from bnncore.paper import __main__ as paper
from bnncore.paper import figures
from bnncore.report import __main__ as report
from bnncore.storage import __main__ as storage
from tests.packed.test_execute import ensemble
from tests.packed.test_packfile import with_header

MAINS = {
    "bnncore": packed.main,
    "storage": storage.main,
    "report": report.main,
    "paper": paper.main,
}
BAD_NAME = "a\x1b[31m\u202eb\u2028c\x07"


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A folder with a good packed file and with everything that is not one."""
    folder = tmp_path_factory.mktemp("odd")
    packfile.save(ensemble(3), folder / "net.bnn")
    content = (folder / "net.bnn").read_bytes()
    for name, at in (("header", 40), ("data", len(content) // 2), ("graph", len(content) - 9)):
        flipped = bytearray(content)
        flipped[at] ^= 1
        (folder / f"flipped-{name}.bnn").write_bytes(flipped)
    (folder / "cut.bnn").write_bytes(content[:-5])
    (folder / "short.bnn").write_bytes(content[:5])
    (folder / "long.bnn").write_bytes(content + b"x")
    named = with_header(content, lambda header: header["__metadata__"].update(format=BAD_NAME))
    (folder / "names.bnn").write_bytes(named)
    Image.fromarray(np.zeros((9, 8, 3), np.uint8)).save(folder / "photo.png")
    (folder / "picture.bnn").write_bytes((folder / "photo.png").read_bytes())
    (folder / "empty").write_bytes(b"")
    (folder / "bytes").write_bytes(bytes(range(256)))
    (folder / "none").mkdir()
    (folder / BAD_NAME).mkdir()
    rows = {
        "object": {},
        "numbers": [1, 2],
        "nameless": [{"test_top1": 1.0}],
        "twice": [{"name": "a"}, {"name": "a"}],
        "text": [{"name": "a", "test_top1": "good"}],
        "huge": [{"name": "a", "file_bytes": 10**400}],
        "truth": [{"name": "a", "members": True}],
        "kind": [{"name": "a", "kind": ["fp32"]}],
        "controls": [{"name": BAD_NAME, "test_top1": BAD_NAME, "scheme": BAD_NAME}],
    }
    texts = {name: json.dumps(content) for name, content in rows.items()}
    texts |= {"half": "[", "deep": "[" * 100_000, "nines": f"[{'9' * 5000}]", "latin": "\xff"}
    for name, text in texts.items():
        (folder / f"run-{name}").mkdir()
        (folder / f"run-{name}" / "results.json").write_bytes(text.encode("latin-1"))
    good = json.dumps([{"name": "bnn", "kind": "bnn", "test_top1": 1.0, "backbone": "nin"}])
    for name, text in (("list", "[1]"), ("yaml", "{a: ["), ("null", "data: null"), ("tab", "\t%")):
        (folder / f"params-{name}").mkdir()
        (folder / f"params-{name}" / "results.json").write_text(good)
        (folder / f"params-{name}" / "params.yaml").write_text(text)
    known = yaml.safe_load(figures.FIGURES.read_text())
    changes = {
        "list": [],
        "sections": {"sizes": []},
        "network": known | {"sizes": [known["sizes"][0] | {"backbone": "lenet"}]},
        "images": known | {"sizes": [known["sizes"][0] | {"dataset": "mnist"}]},
        "members": known | {"sizes": [known["sizes"][0] | {"members": 0}]},
        "text": known | {"sizes": [known["sizes"][0] | {"published": "many"}]},
        "keys": known
        | {"accuracies": [{"place": "x", "series": [{"kind": ["bnn"], "values": {}}]}]},
    }
    for name, content in changes.items():
        (folder / f"figures-{name}.yaml").write_text(yaml.safe_dump(content))
    return folder


FILES = [
    ("photo.png", "not a packed file"),
    ("picture.bnn", "not a packed file"),
    ("empty", "not a packed file"),
    ("bytes", "not a packed file"),
    ("short.bnn", "not a packed file"),
    ("cut.bnn", "entry graph offsets"),
    ("long.bnn", "bytes of data"),
    ("names.bnn", r"format: expected bnncore, got a\x1b[31m\u202eb\u2028c\x07"),
    ("flipped-header.bnn", "header"),
    ("flipped-data.bnn", "sha256"),
    ("flipped-graph.bnn", "sha256"),
    ("missing.bnn", "missing.bnn: No such file"),
    ("none", "none: Is a directory"),
    ("net.bnn/x", "Not a directory"),
    (f"{BAD_NAME}/x.bnn", r"a\x1b[31m\u202eb\u2028c\x07/x.bnn: No such file"),
    ("x" * 300, "File name too long"),
]
RESULTS = ("object", "numbers", "half", "deep", "nines", "latin", "text", "huge", "controls")
CASES = [
    *(("bnncore", ["inspect", file], said) for file, said in FILES),
    *(("bnncore", ["predict", file, "photo.png"], said) for file, said in FILES[:3]),
    *(("bnncore", ["bench", file], said) for file, said in FILES[:3]),
    *(("storage", ["--file", file], said) for file, said in FILES),
    (
        "bnncore",
        ["predict", "net.bnn", "photo.png", "--members", "4"],
        "--members: expected 1 to 3",
    ),
    (
        "bnncore",
        ["predict", "net.bnn", "photo.png", "--members", "0"],
        "--members: expected 1 to 3",
    ),
    ("bnncore", ["predict", "net.bnn", "photo.png", "--top", "0"], "--top: expected at least 1"),
    ("bnncore", ["predict", "net.bnn", "photo.png", "--threshold", "1.5"], "expected 0 to 1, got"),
    ("bnncore", ["predict", "net.bnn", "none"], "none: no image files in this folder"),
    (
        "bnncore",
        ["predict", "net.bnn", "missing.png"],
        "missing.png: expected a readable image: No",
    ),
    ("bnncore", ["predict", "net.bnn", "bytes"], "bytes: expected a readable image"),
    ("bnncore", ["bench", "net.bnn", "--batch", "0"], "expected at least 1"),
    ("bnncore", ["bench", "net.bnn", "--batch", f"{10**10}"], "--batch: expected at most"),
    ("bnncore", ["bench", "net.bnn", "--batch", f"{10**30}"], "--batch: expected at most"),
    ("bnncore", ["bench", "net.bnn", "--repeats", "-1"], "expected at least 1"),
    ("bnncore", ["bench", "net.bnn", "--members", f"{10**30}"], "--members: expected 1 to 3"),
    ("report", ["--reports", "none"], "none/results.json: run the pipeline"),
    ("report", ["--reports", "none", "--html"], "none/results.json: run the pipeline"),
    ("report", ["--reports", "net.bnn"], "results.json"),
    ("report", ["--reports", BAD_NAME], r"\u202eb\u2028c\x07/results.json"),
    *(("report", ["--reports", f"run-{name}"], f"run-{name}/results.json") for name in RESULTS),
    *(("report", ["--html", "--reports", f"run-{name}"], "results.json: ") for name in RESULTS),
    ("report", ["--reports", "run-nameless"], "result 0: expected a text as 'name'"),
    ("report", ["--reports", "run-twice"], "result 1: expected a name of its own"),
    ("report", ["--reports", "run-truth"], "expected a number as 'members', got True"),
    ("report", ["--reports", "run-kind"], "expected a kind of fp32, bnn, ensemble"),
    *(("paper", [f"run-{n}", "--out", "out"], f"run-{n}/results.json: ") for n in RESULTS),
    *(
        ("paper", [f"params-{n}", "--out", "out"], f"params-{n}/results.json: ")
        for n in ("list", "yaml", "null", "tab")
    ),
    ("paper", ["missing", "--out", "out"], "missing: expected a finished run"),
    ("paper", ["none", "--out", "out"], "none: expected a finished run"),
    ("paper", ["--out", "net.bnn"], "net.bnn: "),
    *(
        (command, [*options, "--expected", f"figures-{name}.yaml"], said)
        for command, options in (("storage", ["--papers"]), ("paper", ["--out", "out"]))
        for name, said in (
            ("list", "figures-list.yaml: expected the papers' figures"),
            (
                "sections",
                "figures-sections.yaml: expected the papers' figures, got: no 'accuracies'",
            ),
            ("network", "1 lenet on cifar10"),
            ("images", "1 nin on mnist"),
            ("members", "0 nin on cifar10"),
            ("text", "many"),
            ("keys", "label"),
        )
    ),
    ("storage", ["--papers", "--expected", "bytes"], "bytes: expected the papers' figures"),
    ("storage", ["--papers", "--expected", "none"], "none: expected the papers' figures"),
    ("storage", ["--params", "missing.yaml"], "missing.yaml"),
    ("storage", ["--params", "none"], "none"),
    ("storage", ["--params", "params-yaml/params.yaml"], "params.yaml"),
]


@pytest.mark.parametrize(("name", "arguments", "said"), CASES)
def test_what_cannot_be_used_is_said_in_one_line(name, arguments, said, odd, capsys, monkeypatch):
    monkeypatch.chdir(odd)
    assert MAINS[name](arguments) == 1
    out, error = capsys.readouterr()
    assert error.startswith(f"{name}: ")
    assert said in error
    assert error.endswith("\n")
    assert error[:-1].isprintable(), "one line, and nothing that a terminal obeys"
    assert len(error) < 700
    assert out == ""
    assert not (odd / "out").exists(), "nothing half written"


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
@pytest.mark.parametrize("name", ["bnncore", "storage"])
def test_what_may_not_be_read_is_named(name, odd, capsys):
    path = odd / "closed.bnn"
    path.write_bytes(b"x")
    path.chmod(0)
    assert MAINS[name](["inspect" if name == "bnncore" else "--file", str(path)]) == 1
    assert "closed.bnn: Permission denied" in capsys.readouterr().err


def test_nothing_that_a_terminal_obeys_comes_through():
    for code in range(0x110000):
        shown = terminal.printable(chr(code))
        bad = unicodedata.category(chr(code))[0] in "CZ" and code != 0x20
        assert (shown != chr(code)) == bad, hex(code)
        assert not bad or shown.isascii()


def test_names_from_files_are_printed_harmlessly(tmp_path, capsys):
    """A table of a report takes any name; what it prints is one line a model all the same."""
    rows = [{"name": BAD_NAME, "test_top1": 1.0}, {"name": "plain"}]
    (tmp_path / "results.json").write_text(json.dumps(rows))
    for arguments in ([], ["--html"]):
        assert report.main(["--reports", str(tmp_path), *arguments]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[2].startswith(r"a\x1b[31m\u202eb\u2028c\x07  ")
        assert all(line.isprintable() for line in lines)


def _inspected(folder: Path, count: int) -> int:
    """How many calls it takes to inspect a graph of `count` nodes, most of which join 32 values."""
    one = np.ones(1, np.float32)
    tensors = {n: Tensor("float32", "input", (1,), False, one) for n in ("scale", "shift")}
    tensors["weight"] = Tensor("float32", "weight", (2, 32), True, np.ones((3, 2, 32), np.float32))
    nodes = [Node("normalize", "in", (0,), {"scale": "scale", "shift": "shift"})]
    line = [1]  # values of one channel, each from the last; what joins 32 of them nothing reads
    while len(nodes) < count - 4:
        nodes.append(Node("relu", f"relu{len(nodes)}", (line[-1],)))
        line.append(len(nodes))
        nodes.append(Node("concat", f"concat{len(nodes)}", tuple(line[-32:])))
    nodes.append(Node("concat", "concat", tuple(line[-32:])))
    nodes.append(Node("global_avg", "mean", (len(nodes),)))
    nodes.append(Node("dense", "out", (len(nodes),), {"weight": "weight"}))
    program = Program(tuple(nodes), tensors, 3, "mean", (4, 4, 1), ("a", "b"))
    packfile.save(program, folder / "large.bnn")
    calls = 0

    def count_it(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count_it)
    try:
        assert packed.main(["inspect", str(folder / "large.bnn")]) == 0
    finally:
        sys.setprofile(before)
    return calls


@pytest.mark.slow
def test_inspecting_takes_as_long_as_the_graph_is(tmp_path, capsys):
    quarter, whole = (_inspected(tmp_path, count) for count in (128, 512))
    assert whole < 5 * quarter
    # 32 maps of 4 x 4 floats wait to be joined in one; the members' own part is small.
    assert f"activations of one image: {2 * 32 * 4 * 4 * 4:,} bytes" in capsys.readouterr().out


def test_a_reader_that_leaves_early_is_no_error(odd):
    code = f"{sys.executable} -m bnncore inspect {odd / 'net.bnn'} | head -1"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(code, shell=True, env=environment, capture_output=True, text=True)
    assert done.stderr == ""
    assert "format 1" in done.stdout
