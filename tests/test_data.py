"""Data: splits, the documented layouts, and an error that names the path for each way to break."""

import errno
import io
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from bnncore import data
from bnncore.data import DataError, DataParams, Dataset, Split, images, load, moments, stratify

PARTS = ("train", "val", "test")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BNNCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("BNNCORE_DATA", raising=False)


def same(a: Dataset, b: Dataset) -> bool:
    return a.digest == b.digest and all(
        np.array_equal(getattr(a, part).images, getattr(b, part).images)
        and np.array_equal(getattr(a, part).labels, getattr(b, part).labels)
        for part in PARTS
    )


def test_every_name_has_a_reader() -> None:
    assert tuple(data.READERS) == get_args(get_type_hints(DataParams)["name"])


# ---------------------------------------------------------------------------------------- digits
def test_digits_are_all_there_once() -> None:
    from sklearn.datasets import load_digits

    original = load_digits()
    found = load(DataParams())
    assert found.name == "digits"
    assert found.image == (8, 8, 1)
    assert found.classes == tuple("0123456789")
    splits = [getattr(found, part) for part in PARTS]
    back = np.concatenate([s.images for s in splits])[..., 0].astype(int) * 16 / 255
    rows = np.column_stack(
        [np.rint(back).reshape(-1, 64), np.concatenate([s.labels for s in splits])]
    )
    expected = np.column_stack([original.images.reshape(-1, 64), original.target])
    # the same rows as often: every image is in just one part, with its label, nothing lost
    assert np.array_equal(rows[np.lexsort(rows.T)], expected[np.lexsort(expected.T)])
    assert {int(v) for s in splits for v in np.unique(s.images)} == {
        int(v * 255 / 16 + 0.5) for v in range(17)
    }


def test_digits_are_stratified() -> None:
    params = DataParams(val_fraction=0.1, test_fraction=0.25)
    found = load(params)
    counts = {part: np.bincount(getattr(found, part).labels) for part in PARTS}
    total = sum(counts.values())
    assert np.all(np.abs(counts["val"] - 0.1 * total) <= 0.5)
    assert np.all(np.abs(counts["test"] - 0.25 * total) <= 0.5)


def test_digits_seed() -> None:
    first = load(DataParams(seed=1))
    assert same(first, load(DataParams(seed=1)))
    assert not same(first, load(DataParams(seed=2)))


def test_subset_thins_out_the_training_part_only() -> None:
    whole, some = load(DataParams()), load(DataParams(subset=0.1))
    assert np.array_equal(whole.val.images, some.val.images)
    assert np.array_equal(whole.test.images, some.test.images)
    wanted = 0.1 * np.bincount(whole.train.labels)
    assert np.all(np.abs(np.bincount(some.train.labels) - wanted) <= 0.5)
    rows = {image.tobytes() for image in whole.train.images}
    assert all(image.tobytes() in rows for image in some.train.images)
    assert some.mean == moments(some.train.images)[0]


def test_size_resizes_any_set() -> None:
    found = load(DataParams(size=16))
    assert found.image == (16, 16, 1)
    small = load(DataParams())
    assert np.array_equal(found.test.labels, small.test.labels)
    shrunk = found.test.images.reshape(-1, 8, 2, 8, 2).mean((2, 4))
    assert np.corrcoef(shrunk.ravel(), small.test.images.ravel())[0, 1] > 0.95


def test_moments_are_numpys() -> None:
    train = load(DataParams()).train.images / 255
    mean, std = moments(load(DataParams()).train.images)
    np.testing.assert_allclose(mean, train.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std, train.std((0, 1, 2)), rtol=1e-12)
    assert moments(np.full((2, 3, 3, 2), 255, np.uint8)) == ((1.0, 1.0), (1.0, 1.0))


def test_digest_sees_any_change() -> None:
    found = load(DataParams())
    pixels = found.train.images.copy()
    pixels[5, 1, 1, 0] ^= 1
    assert replace(found, train=Split(pixels, found.train.labels)).digest != found.digest
    labels = found.test.labels.copy()
    labels[0] = 9 - labels[0]
    assert replace(found, test=Split(found.test.images, labels)).digest != found.digest
    assert replace(found, classes=tuple("012345678x")).digest != found.digest


def test_split_refuses_other_arrays() -> None:
    labels = np.zeros(2, np.int64)
    with pytest.raises(ValueError, match="uint8"):
        Split(np.zeros((2, 4, 4, 1), np.float32), labels)
    with pytest.raises(ValueError, match="contiguous"):
        Split(np.zeros((2, 3, 4, 4), np.uint8).transpose(0, 2, 3, 1), labels)
    with pytest.raises(ValueError, match=r"expected \(2,\) int64"):
        Split(np.zeros((2, 4, 4, 1), np.uint8), labels.astype(np.int32))


def test_torch_is_not_imported() -> None:
    code = (
        "import sys; from bnncore.data import *; load(DataParams());"
        "sys.exit('torch' in sys.modules or 'torchvision' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# -------------------------------------------------------------------------------------- stratify
@given(
    counts=st.lists(st.integers(3, 40), min_size=2, max_size=5),
    a=st.floats(0.01, 0.45),
    b=st.floats(0.01, 0.45),
    seed=st.integers(0, 2**32),
)
def test_stratify_divides(counts: list[int], a: float, b: float, seed: int) -> None:
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    names = tuple(map(str, range(len(counts))))
    try:
        index = stratify(labels, {"val": a, "test": b}, seed, names)
    except DataError:
        least = [max(1, round(n * a)) + max(1, round(n * b)) + 1 > n for n in counts]
        assert any(least)
        return
    assert np.array_equal(np.sort(np.concatenate(list(index.values()))), np.arange(len(labels)))
    for part, fraction in (("val", a), ("test", b)):
        got = np.bincount(labels[index[part]], minlength=len(counts))
        assert got.tolist() == [max(1, round(n * fraction)) for n in counts]
    assert np.all(np.bincount(labels[index["train"]], minlength=len(counts)) >= 1)


# --------------------------------------------------------------------------------------- folders
def write(
    root: Path,
    parts: tuple[str, ...] = PARTS,
    classes: tuple[str, ...] = ("cat", "dog"),
    n: int = 6,
    shape: tuple[int, ...] = (5, 7, 3),
) -> Path:
    """Class folders of random PNGs, no two alike; the first pixel's first value is the class."""
    rng = np.random.default_rng(0)
    for part in parts:
        for label, name in enumerate(classes):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 256, shape, np.uint8)
                pixels.flat[0] = label
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def folder(path: Path, **more: object) -> DataParams:
    return DataParams(name="folder", path=str(path), **more)  # type: ignore[arg-type]


def test_folder_three_parts(tmp_path: Path) -> None:
    root = write(tmp_path / "set")
    (root / "train" / "cat" / "notes.txt").write_text("no image")
    (root / "train" / "cat" / ".hidden.png").write_text("no image")
    (root / "README").write_text("no folder")
    found = load(folder(root))
    assert found.image == (5, 7, 3)
    assert found.classes == ("cat", "dog")
    assert [len(getattr(found, part)) for part in PARTS] == [12, 12, 12]
    for part in PARTS:
        split = getattr(found, part)
        assert np.array_equal(split.images[:, 0, 0, 0], split.labels)
        first = np.asarray(Image.open(root / part / "dog" / "0.png"))
        assert np.array_equal(split.images[6], first)


@pytest.mark.parametrize(
    ("parts", "sizes"),
    [
        (("train",), (12, 4, 4)),
        (("train", "test"), (16, 4, 20)),
        (("train", "val"), (16, 20, 4)),
    ],
)
def test_folder_missing_parts_are_split_off(
    tmp_path: Path, parts: tuple[str, ...], sizes: tuple[int, ...]
) -> None:
    root = write(tmp_path / "set", parts, n=10)
    params = folder(root, val_fraction=0.2, test_fraction=0.2)
    found = load(params)
    assert tuple(len(getattr(found, part)) for part in PARTS) == sizes
    for part in PARTS:
        split = getattr(found, part)
        assert np.bincount(split.labels).tolist() == [len(split) // 2] * 2
        assert np.array_equal(split.images[:, 0, 0, 0], split.labels)
    images = [image.tobytes() for part in PARTS for image in getattr(found, part).images]
    assert len(set(images)) == len(images) == 20 * len(parts)
    assert same(found, load(params))
    assert not same(found, load(replace(params, seed=5)))


def test_relative_path_starts_from_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "project" / "sets" / "own")
    monkeypatch.chdir(tmp_path)
    assert len(load(folder(Path("sets/own")), tmp_path / "project").train) == 12
    assert len(load(folder(Path("sets/own")), Path("project")).train) == 12


def test_path_from_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "cifar10", ("train", "test"), tuple("abcdefghij"), n=8)
    params = DataParams(name="cifar10")
    with pytest.raises(DataError, match="BNNCORE_DATA"):
        load(params)
    monkeypatch.setenv("BNNCORE_DATA", str(tmp_path))
    assert len(load(params).test) == 80


def test_folder_gray_and_size(tmp_path: Path) -> None:
    root = write(tmp_path / "set", shape=(6, 6))
    Image.new("L", (9, 4), 70).save(root / "val" / "dog" / "0.png")
    found = load(folder(root, size=3))
    assert found.image == (3, 3, 1)
    assert np.all(found.val.images[6] == 70)
    with pytest.raises(DataError, match=r"0\.png: expected height, width, channels \(6, 6, 1\)"):
        load(folder(root))


def test_folder_kinds_of_images(tmp_path: Path) -> None:
    """Palette, CMYK and opaque alpha are read as RGB; a photograph is turned upright."""
    root = write(tmp_path / "set", shape=(4, 4, 3))
    cat = root / "train" / "cat"
    Image.new("RGB", (4, 4), (255, 0, 0)).convert("P").save(cat / "1.png")
    Image.new("RGBA", (4, 4), (0, 255, 0, 255)).save(cat / "2.png")
    Image.new("CMYK", (4, 4), (0, 0, 0, 255)).save(cat / "3.jpg")
    (cat / "3.png").unlink()
    turned = Image.new("RGB", (4, 4))
    turned.putpixel((0, 0), (9, 9, 9))
    exif = Image.Exif()
    exif[0x0112] = 3  # orientation: turned by half a circle
    turned.save(cat / "4.png", exif=exif)
    images = load(folder(root)).train.images
    assert np.all(images[1] == (255, 0, 0))
    assert np.all(images[2] == (0, 255, 0))
    assert np.all(images[3] < 3)
    assert images[4].any(-1).nonzero() == (3, 3)


def test_folder_of_classes_alone(tmp_path: Path) -> None:
    """CLASS/IMAGE: the same images, classes and split as under train/."""
    root = write(tmp_path / "set", ("train",))
    found = load(folder(root))
    assert same(found, load(folder(root / "train")))
    with pytest.raises(DataError, match="expected at least 2 class folders, got 1"):
        load(folder(write(tmp_path / "deeper", ("only",))))


def test_channels_converts_what_differs(tmp_path: Path) -> None:
    root = write(tmp_path / "set")
    gray = Image.new("L", (7, 5), 70)
    gray.save(root / "val" / "dog" / "0.png")
    assert np.all(load(folder(root, channels=3)).val.images[6] == 70)
    found = load(folder(root, channels=1))
    assert found.image == (5, 7, 1)
    expected = np.asarray(Image.open(root / "train" / "cat" / "0.png").convert("L"))
    assert np.array_equal(found.train.images[0, ..., 0], expected)
    digits = load(DataParams(channels=3, size=16))
    assert digits.image == (16, 16, 3)
    assert np.array_equal(digits.test.images[..., :1], load(DataParams(size=16)).test.images)


def test_all_bad_files_are_named_at_once(tmp_path: Path) -> None:
    root = write(tmp_path / "set", n=30)
    for i in range(28):
        (root / "train" / "cat" / f"{i}.png").write_text("no image")
    with pytest.raises(DataError) as caught:
        load(folder(root))
    *lines, last = str(caught.value).splitlines()
    assert len(lines) == 20
    assert all(line.startswith(f"{root}/train/cat/") for line in lines)
    assert last == "and 8 more"


def test_what_cannot_fit_is_refused_before_it_is_read(tmp_path: Path, monkeypatch) -> None:
    root = write(tmp_path / "set")
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 1, "SC_PAGE_SIZE": 4096}.get)
    for params in (folder(root, size=64), DataParams(size=64)):
        with pytest.raises(DataError, match=r"expected images that fit .* of memory, got .*64x64"):
            load(params)


def save(path: Path, mode: str, size: tuple[int, int]) -> None:
    Image.new(mode, size).save(path)


def claim(file: Path, pixels: int) -> None:
    """Make a PNG's header say that it is so wide and high."""
    content = bytearray(file.read_bytes())
    content[16:24] = struct.pack(">II", pixels, pixels)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    file.write_bytes(content)


# What is done to a whole set, and how the error begins. Kinds of images: test_images.py.
HARM: list[tuple[Callable[[Path], object], str]] = [
    (lambda r: (r / "train").rename(r.parent / "gone"), "{r}: expected the folder train"),
    (
        lambda r: (r / "val").rename(r / "valid"),
        "{r}: expected the folder train, perhaps val and test, and no others",
    ),
    (
        lambda r: [(r / "train" / name).rename(r.parent / name) for name in ("cat", "dog")],
        "{r}/train: expected at least 2 class folders, got 0",
    ),
    (
        lambda r: [file.unlink() for file in (r / "train" / "dog").iterdir()],
        "{r}/train/dog: expected images of this class",
    ),
    (
        lambda r: (r / "test" / "dog").rename(r.parent / "dog"),
        "{r}/test: expected the class folders of {r}/train, lacks dog",
    ),
    (
        lambda r: (r / "test" / "cow").mkdir(),
        "{r}/test: expected the class folders of {r}/train, which has no cow",
    ),
    (
        lambda r: (r / "train" / "cat" / "more").mkdir(),
        "{r}/train/cat/more: expected an image, got a folder",
    ),
    (
        lambda r: save(r / "val" / "cat" / "3.png", "RGB", (8, 5)),
        "{r}/val/cat/3.png: expected height, width, channels (5, 7, 3) as in {r}/train",
    ),
    (
        lambda r: save(r / "val" / "cat" / "3.png", "L", (7, 5)),
        "{r}/val/cat/3.png: expected height, width, channels (5, 7, 3) as in {r}/train",
    ),
    (  # names end up in packed files, which refuse what a terminal would not show as it is
        lambda r: [(r / part / "cow\u00a0bell").mkdir() for part in PARTS],
        "{r}/train: expected class names of printable characters, got 'cow\\xa0bell'",
    ),
    (
        lambda r: (r / "train" / "\x1b[31mcow").mkdir(),
        "{r}/train: expected class names of printable characters, got '\\x1b[31mcow'",
    ),
    (
        lambda r: os.truncate(r / "test" / "dog" / "2.png", 80),
        "{r}/test/dog/2.png: expected a readable image",
    ),
    (
        lambda r: claim(r / "test" / "dog" / "2.png", 60_000),
        "{r}/test/dog/2.png: expected a readable image",
    ),
    (
        lambda r: (r / "train" / "cat" / "x.png").symlink_to(r / "nowhere.png"),
        "{r}/train/cat/x.png: expected a readable file",
    ),
]


@pytest.mark.parametrize(("harm", "message"), HARM)
def test_folder_errors_name_the_path(tmp_path: Path, harm, message: str) -> None:
    root = write(tmp_path / "set")
    load(folder(root))  # whole, and cached: the cache must not hide what is broken afterwards
    harm(root)
    with pytest.raises(DataError) as caught:
        load(folder(root))
    assert str(caught.value).startswith(message.format(r=root))


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: expected the data of folder"):
        load(folder(tmp_path / "nowhere"))
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file: expected a readable folder"):
        load(folder(tmp_path / "file"))


def test_too_few_to_split(tmp_path: Path) -> None:
    root = write(tmp_path / "set", ("train",), n=2)
    with pytest.raises(DataError, match=r"expected at least 3 images .* got 2 of class 'cat'") as e:
        load(folder(root))
    assert str(e.value).startswith(str(root))


# ----------------------------------------------------------------------------------------- cache
def test_cache_is_used_and_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write(tmp_path / "set")
    first = load(folder(root))
    (file,) = (tmp_path / "cache").iterdir()

    with monkeypatch.context() as patch:
        patch.setattr(images, "read_image", None)  # reading an image would now fail
        assert same(first, load(folder(root)))
        assert same(first, load(folder(root, seed=3)))  # no part to split off: seed has no say

    whole = file.read_bytes()
    pickled = io.BytesIO()
    np.savez(pickled, classes=np.array([{}], dtype=object))
    cut, flipped = whole[: len(whole) // 2], whole[:300] + b"!" + whole[301:]
    for broken in (b"", b"PK", cut, flipped, pickled.getvalue()):
        file.write_bytes(broken)
        with pytest.warns(UserWarning, match="unreadable cache"):
            assert same(first, load(folder(root)))
        assert file.read_bytes() == whole


def test_cache_sees_changes_of_equal_name_size_and_time(tmp_path: Path) -> None:
    root = write(tmp_path / "set")
    image = root / "train" / "cat" / "0.bmp"
    Image.new("RGB", (7, 5), (1, 2, 3)).save(image)
    before = image.stat()
    assert np.all(load(folder(root)).train.images[0] == (1, 2, 3))
    Image.new("RGB", (7, 5), (3, 2, 1)).save(image)
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = image.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert np.all(load(folder(root)).train.images[0] == (3, 2, 1))


def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write(tmp_path / "set")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BNNCORE_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match=f"{tmp_path}/file: could not write the cache"):
        assert len(load(folder(root)).train) == 12


def test_cache_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write(tmp_path / "set")

    def full(*arguments: object, **more: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(np, "savez", full)
    with pytest.warns(UserWarning, match=f"{tmp_path}/cache: could not write .*No space left"):
        assert len(load(folder(root)).train) == 12
    assert list((tmp_path / "cache").iterdir()) == []


# --------------------------------------------------------------------------------------- FER-2013
EMOTIONS = ("angry", "disgust", "fear", "happy", "sad", "surprise", "neutral")


def fer_lines() -> list[str]:
    """Two faces a class and part; pixel 0 is the CSV's class, pixel 1 the part."""
    rng = np.random.default_rng(0)
    lines = ["emotion,pixels,Usage"]
    for part, usage in enumerate(("Training", "PublicTest", "PrivateTest")):
        for emotion in (*range(7), *range(7)):
            pixels = rng.integers(0, 256, 48 * 48)
            pixels[:2] = emotion, part
            lines.append(f"{emotion},{' '.join(map(str, pixels))},{usage}")
    return lines


def test_fer_csv(tmp_path: Path) -> None:
    lines = fer_lines()
    (tmp_path / "fer2013.csv").write_text("\n".join(lines))
    found = load(DataParams(name="fer2013", path=str(tmp_path)))
    assert found.image == (48, 48, 1)
    assert found.classes == tuple(sorted(EMOTIONS))
    for number, part in enumerate(PARTS):
        split = getattr(found, part)
        assert len(split) == 14
        assert np.all(split.images[:, 0, 1, 0] == number)
        named = [EMOTIONS[i] for i in split.images[:, 0, 0, 0]]
        assert [found.classes[label] for label in split.labels] == named
    row = list(map(int, lines[3].split(",")[1].split()))
    assert found.train.images[2].ravel().tolist() == row

    # the other column order in use, with blanks in the header; and the file itself as the path
    other = tmp_path / "other.csv"
    swapped = [",".join([e, u, p]) for e, p, u in (line.split(",") for line in lines[1:])]
    other.write_text("\r\n".join(["emotion, Usage, pixels", *swapped]))
    assert same(found, load(DataParams(name="fer2013", path=str(other))))

    # and as folders
    for part in PARTS:
        split = getattr(found, part)
        for i, label in enumerate(split.labels):
            place = tmp_path / "folders" / part / found.classes[label]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(split.images[i, ..., 0]).save(place / f"{i}.png")
    folders = load(DataParams(name="fer2013", path=str(tmp_path / "folders")))
    assert folders.classes == found.classes
    assert {
        i.tobytes(): k for i, k in zip(folders.val.images, folders.val.labels, strict=True)
    } == {i.tobytes(): k for i, k in zip(found.val.images, found.val.labels, strict=True)}


@pytest.mark.parametrize(
    ("line", "old", "new", "message"),
    [
        (0, "Usage", "usage", "expected columns emotion, pixels, Usage; lacks Usage"),
        (2, "Training", "Train", "line 3: expected Usage one of Training, PublicTest, PrivateTest"),
        (2, "1,", "7,", "line 3: expected emotion 0 to 6, got '7'"),
        (2, "1,1 ", "1,256 ", "line 3: expected pixels in 0..255"),
        (2, "1,1 ", "1,x ", "line 3: expected pixels in 0..255"),
        (2, "1,1 ", "1,", "line 3: expected 48 \\* 48 pixels, got 2303"),
        (2, ",Training", "", "line 3: expected 3 fields, got 2"),
    ],
)
def test_fer_csv_errors(tmp_path: Path, line: int, old: str, new: str, message: str) -> None:
    lines = fer_lines()
    assert old in lines[line]
    lines[line] = lines[line].replace(old, new, 1)
    file = tmp_path / "fer2013.csv"
    file.write_text("\n".join(lines))
    with pytest.raises(DataError, match=message) as caught:
        load(DataParams(name="fer2013", path=str(file)))
    assert str(caught.value).startswith(str(file))


def test_fer_csv_lacks_a_class_or_part(tmp_path: Path) -> None:
    file = tmp_path / "fer2013.csv"
    params = DataParams(name="fer2013", path=str(file))
    lines = fer_lines()
    file.write_text("\n".join(x for x in lines if not (x[0] == "3" and x.endswith("PublicTest"))))
    with pytest.raises(DataError, match="each class in part val, got no image of happy"):
        load(params)
    file.write_text("\n".join(lines[:15]))
    with pytest.raises(DataError, match="each class in part val, got no image of angry, disgust"):
        load(params)
    file.write_text("")
    with pytest.raises(DataError, match="lacks Usage, emotion, pixels"):
        load(params)
    with pytest.raises(DataError, match=r"expected FER-2013 as fer2013\.csv or icml"):
        load(DataParams(name="fer2013", path=str(file.parent / "..")))


# ------------------------------------------------------------------------------------------ CIFAR
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_missing(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"expected the folder cifar-100?-(batches-py|python)") as e:
        load(DataParams(name=name, path=str(tmp_path)))
    assert str(e.value).startswith(str(tmp_path))
    assert "data.download" in str(e.value)
    assert list(tmp_path.iterdir()) == []


def test_cifar_with_a_wrong_md5_is_never_unpickled(tmp_path: Path) -> None:
    files = tmp_path / "cifar-10-batches-py"
    files.mkdir()
    # a pickle, written by hand, that would make a file
    evil = f"cos\nmkdir\n(S'{tmp_path / 'proof'}'\ntR.".encode()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"):
        (files / name).write_bytes(evil)
    with pytest.raises(DataError, match=f"{files}: torchvision could not read cifar10.*corrupt"):
        load(DataParams(name="cifar10", path=str(tmp_path)))
    assert not (tmp_path / "proof").exists()


def test_cifar_folders_need_all_classes(tmp_path: Path) -> None:
    write(tmp_path, ("train", "test"))
    with pytest.raises(DataError, match="train: expected 10 class folders, got 2"):
        load(DataParams(name="cifar10", path=str(tmp_path)))


# ---------------------------------------------------------------------------- the whole real sets
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "image", "sizes"),
    [
        ("cifar10", (32, 32, 3), (42_500, 7_500, 10_000)),
        ("fer2013", (48, 48, 1), (28_709, 3_589, 3_589)),
    ],
)
def test_real_sets(
    name: str, image: tuple[int, ...], sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = os.environ.get("BNNCORE_TEST_DATA")
    if not parent:
        pytest.skip("BNNCORE_TEST_DATA does not name the folder of the unpacked sets")
    monkeypatch.setenv("BNNCORE_DATA", parent)
    params = DataParams(name=name)
    found = load(params)
    assert found.image == image
    assert tuple(len(getattr(found, part)) for part in PARTS) == sizes
    if name == "cifar10":
        assert np.bincount(found.train.labels).tolist() == [4_250] * 10
        # as published for the lossless training images
        np.testing.assert_allclose(found.mean, (0.4914, 0.4822, 0.4465), atol=0.003)
        np.testing.assert_allclose(found.std, (0.2470, 0.2435, 0.2616), atol=0.005)
    for label in range(0, len(found.classes), 3):
        place = Path(parent, name, "test", found.classes[label])
        first = min(place.iterdir(), key=lambda file: file.name)
        index = int(np.flatnonzero(found.test.labels == label)[0])
        expected = np.asarray(Image.open(first)).reshape(image)
        assert np.array_equal(found.test.images[index], expected)
    with monkeypatch.context() as patch:
        patch.setattr(images, "read_image", None)
        assert same(found, load(params))
