"""One reader: what `predict` sees of an image file is what training sees of it, kind by kind."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bnncore import data
from bnncore.__main__ import main
from bnncore.packed import execute, packfile
from bnncore.packed.program import Node, Program, Tensor

PIXELS = np.random.default_rng(1).integers(0, 256, (6, 9, 3), dtype=np.uint8)
GRAY = PIXELS[..., 0]
COLOUR = Image.fromarray(PIXELS)


def turned(orientation: int) -> Callable[[Path], None]:
    def save(path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        COLOUR.save(path, exif=exif)

    return save


def transparent(path: Path) -> None:
    image = COLOUR.convert("RGBA")
    image.putpixel((1, 1), (1, 2, 3, 4))
    image.save(path)


def several(path: Path) -> None:
    COLOUR.save(path, save_all=True, append_images=[COLOUR.rotate(180)])


def sixteen_bits(path: Path) -> None:
    """RGB, which pillow reads and does not write."""
    height, width, _ = PIXELS.shape
    rows = b"".join(b"\0" + row.tobytes() for row in PIXELS.astype(">u2") * 257)

    def chunk(kind: bytes, content: bytes) -> bytes:
        checked = kind + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    head = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    chunks = (b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in chunks))


# kind -> (suffix, how it is saved, what reading gives: None for RGB, or the refusal)
KINDS: dict[str, tuple[str, Callable[[Path], object], str | None]] = {
    "RGB": ("png", COLOUR.save, None),
    "gray": ("png", Image.fromarray(GRAY).save, None),
    "black and white": ("png", COLOUR.convert("1").save, None),
    "palette": ("png", COLOUR.convert("P").save, None),
    "CMYK": ("jpg", COLOUR.convert("CMYK").save, None),
    "opaque alpha": ("png", COLOUR.convert("RGBA").save, None),
    "gray with opaque alpha": ("png", Image.fromarray(GRAY).convert("LA").save, None),
    **{f"orientation {k}": ("png", turned(k), None) for k in range(1, 9)},
    "webp": ("webp", lambda path: COLOUR.save(path, lossless=True), None),
    "capitals": ("PNG", COLOUR.save, None),
    "transparent": ("png", transparent, "expected an opaque image"),
    "16 bits": ("png", Image.fromarray(GRAY.astype(np.uint16) * 257).save, "expected 8-bit"),
    "16 bits of colours": ("png", sixteen_bits, "expected 8-bit"),
    "32 bits": ("tif", Image.fromarray(GRAY.astype(np.int32)).save, "expected 8-bit"),
    "floats": ("tif", Image.fromarray(GRAY.astype(np.float32)).save, "expected 8-bit"),
    "animated": ("png", several, "expected one picture"),
    "several pages": ("tif", several, "expected one picture"),
    "text": ("png", lambda path: path.write_text("no image"), "expected a readable image"),
    "empty": ("png", lambda path: path.write_bytes(b""), "expected a readable image"),
}


def network(height: int, width: int, channels: int) -> Program:
    """A packed network of one dense layer and two classes."""

    def tensor(role: str, *shape: int) -> Tensor:
        return Tensor("float32", role, shape, False, np.ones(shape, np.float32))

    tensors = {
        "scale": tensor("scale", channels),
        "shift": tensor("shift", channels),
        "weight": tensor("weight", 2, height * width * channels),
    }
    nodes = (
        Node("normalize", "in", (0,), {"scale": "scale", "shift": "shift"}),
        Node("flatten", "flat", (1,)),
        Node("dense", "out", (2,), {"weight": "weight"}),
    )
    return Program(nodes, tensors, 1, "mean", (height, width, channels), ("a", "b"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [3, 1])
def test_predict_reads_what_training_reads(kind, channels, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("BNNCORE_CACHE", str(tmp_path / "cache"))
    suffix, save, refusal = KINDS[kind]
    for name in ("a", "b"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(1, 4):
            COLOUR.save(tmp_path / "set" / name / f"{i}.png")
    path = tmp_path / "set" / "a" / f"0.{suffix}"
    save(path)
    packfile.save(network(5, 5, channels), tmp_path / "net.bnn")
    seen: list[np.ndarray] = []
    run = execute.Model.outputs

    def spy(self, images, *rest):
        seen.append(images)
        return run(self, images, *rest)

    monkeypatch.setattr(execute.Model, "outputs", spy)
    status = main(["predict", str(tmp_path / "net.bnn"), str(path), "--ops", "numpy"])
    said = capsys.readouterr().err
    params = data.DataParams(
        name="folder", path=str(tmp_path / "set"), size=5, channels=channels, val_fraction=0.3
    )
    if refusal is None:
        assert status == 0, said
        trained = data.source(params).read()[1]["train"].images[0]
        assert np.array_equal(seen[0], trained[None])
    else:
        assert status == 1
        assert re.match(rf"bnncore: {path}: {refusal}", said)
        with pytest.raises(data.DataError) as caught:
            data.load(params)
        assert said == f"bnncore: {caught.value}\n"


def test_a_set_of_one_size_is_seen_alike_without_resizing(tmp_path):
    """`turned` images too: height and width change places."""
    for orientation in range(1, 9):
        turned(orientation)(tmp_path / f"{orientation}.png")
        image = data.read_image(tmp_path / f"{orientation}.png", None)
        assert image.shape == ((6, 9, 3) if orientation <= 4 else (9, 6, 3))
        assert {image[y, x].tobytes() for y in (0, -1) for x in (0, -1)} == {
            PIXELS[y, x].tobytes() for y in (0, -1) for x in (0, -1)
        }


def test_predict_in_a_folder_passes_over_what_training_passes_over(tmp_path, capsys):
    packfile.save(network(6, 9, 3), tmp_path / "net.bnn")
    folder = tmp_path / "images"
    folder.mkdir()
    COLOUR.save(folder / "a.png")
    (folder / "._a.png").write_text("no image")
    COLOUR.save(folder / "b.gif")
    assert main(["predict", str(tmp_path / "net.bnn"), str(folder), "--ops", "numpy"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
