"""`python -m bnncore export` and `device`."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess

import pytest

from bnncore.__main__ import main
from bnncore.device import compilers, export
from bnncore.packed import packfile
from tests.graphs import random_program


@pytest.fixture
def packed(tmp_path):
    """A small network whose layer and class names would be code, were they trusted."""
    program = random_program(3)
    evil = '*/ #error "\\'
    nodes = [dataclasses.replace(node, name=evil) for node in program.nodes]
    classes = tuple(f"{evil}??/{k}" for k in range(len(program.classes)))
    file = tmp_path / "net.bnn"
    packfile.save(dataclasses.replace(program, nodes=nodes, classes=classes), file)
    return file


@pytest.mark.skipif(not shutil.which("gcc"), reason="needs gcc")
def test_export_writes_what_compiles_and_passes_its_own_test(packed, tmp_path, capsys):
    folder = tmp_path / "build" / "small"
    assert main(["export", str(packed), "--c", str(folder)]) == 0
    names = ["small.c", "small.h", "small.md", "small_test.c"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert "small.h" in capsys.readouterr().out
    (folder / "use.c").write_text('#include "small.h"\nconst char *labels[] = SMALL_LABELS;\n')
    command = [
        "gcc",
        "-std=c99",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-o",
        "t",
        "small.c",
        "small_test.c",
        "use.c",
    ]
    subprocess.run(command, cwd=folder, check=True)
    assert subprocess.run(["./t"], cwd=folder).returncode == 0


@pytest.mark.skipif(bool(compilers.missing("ziglang")), reason="needs the extra `device`")
def test_export_writes_a_module(packed, tmp_path, capsys):
    file = tmp_path / "build" / "4 small.wasm"
    assert main(["export", str(packed), "--wasm", str(file)]) == 0
    assert file.read_bytes()[:4] == b"\0asm"
    assert f"{file}: {file.stat().st_size:,} bytes" in capsys.readouterr().out


@pytest.mark.skipif(bool(compilers.missing()), reason="needs the extra `device`")
def test_device_prints_what_the_model_takes(packed, capsys):
    command = ["device", str(packed), "--cpu", "cortex-m3", "--mhz", "100", "--cycles", "2",
               "--optimize=-Os"]  # fmt: skip
    assert main(command) == 0
    out = capsys.readouterr().out
    for row in (r"code [\d,]+, weights and tables [\d,]+", r"RAM +[\d,]+ bytes", r"cortex-m3"):
        assert re.search(row, out), out
    rows = [line.split() for line in out.splitlines() if re.match(r" +\d", line)]
    assert [row[0] for row in rows] == [str(k + 1) for k in range(len(rows))]
    for _, count, milliseconds in rows:
        expected = int(count.replace(",", "")) * 2 / 100e3
        assert float(milliseconds) == pytest.approx(expected, abs=0.006)


def test_device_estimates_without_tools(packed, monkeypatch, capsys):
    monkeypatch.setattr(compilers, "missing", lambda *_: ["ziglang"])
    assert main(["device", str(packed), "--estimate", "--mhz", "100"]) == 0
    out = capsys.readouterr().out
    exact = export.generate(packfile.load(packed), "net").arena
    assert f"RAM    {exact:,} bytes" in out
    count, ms = re.search(r"^ +1 +([\d,]+)  ([\d.]+)$", out, re.M).groups()
    assert float(ms) == pytest.approx(int(count.replace(",", "")) * 1.25 / 100e3, abs=0.006)


WRONG = {
    "a name that is no identifier": (["export", "FILE", "--c", "4x"], "4x"),
    "a name that is a header of C": (["export", "FILE", "--c", "string"], "string"),
    "nothing to write": (["export", "FILE"], "export: expected --c FOLDER or --wasm FILE"),
    "a compiler that knows no such processor": (
        ["device", "FILE", "--cpu", "riscv32", "--compiler", "gcc"],
        "compiler: expected zig for riscv32",
    ),
    "an unknown processor": (["device", "FILE", "--cpu", "z80"], "cpu: expected one of cortex-m4"),
    "too many members": (["device", "FILE", "--members", "99"], "--members: expected 1 to"),
    "no clock": (["device", "FILE", "--mhz", "0"], "--mhz: expected a number above 0, got 0"),
    "cycles that are no number": (["device", "FILE", "--cycles", "nan"], "--cycles: expected"),
    "flags that no compiler has": (["device", "FILE", "--optimize=-Ofoo"], "does not compile"),
    "an estimate of another processor": (
        ["device", "FILE", "--estimate", "--cpu", "riscv32"],
        "--cpu: the estimate is for cortex-m4",
    ),
    "no file": (["export", "none.bnn", "--c", "net"], "none.bnn"),
    "not a packed file": (["device", __file__], "test_commands.py"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_the_user_can_mend_is_one_line(packed, tmp_path, monkeypatch, capsys, case):
    if compilers.missing() and "device" in WRONG[case][0]:
        pytest.skip("needs the extra `device`")
    monkeypatch.chdir(tmp_path)
    arguments, message = WRONG[case]
    assert main([str(packed) if word == "FILE" else word for word in arguments]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("command", ["device FILE", "export FILE --wasm net.wasm"])
def test_a_missing_tool_is_named_with_its_extra(packed, monkeypatch, capsys, command):
    monkeypatch.setattr(compilers, "missing", lambda *_: ["ziglang"])
    assert main([str(packed) if word == "FILE" else word for word in command.split()]) == 1
    assert "ziglang: pip install 'bnncore[device]'" in capsys.readouterr().err
