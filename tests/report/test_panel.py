"""The packed models in the page: their WebAssembly in a real browser, against the evaluator."""

import asyncio
import base64
import json

import numpy as np
import pytest

from bnncore import report
from bnncore.device import compilers
from bnncore.packed import execute, packfile
from bnncore.report import live, page
from tests.device.test_export import network
from tests.graphs import random_images
from tests.report.test_page import CONTRAST, browser_only, in_browser

needs_zig = pytest.mark.skipif(
    bool(compilers.missing("ziglang")), reason="needs the extra `device`"
)
MODELS = {
    "fusion": ("leanresnet8", "shared_conv", "mean", 3),
    "votes": ("fernet", "no_shared", "hard_vote", 4),
    "bnn": ("nin", "shared_conv", "mean", 1),
}
PANEL = "document.querySelector('section[aria-label=\"Try the models\"]')"

EVERYTHING = """
async function everything(name, members) {  // class and scores of all images
  const size = live.image.reduce((a, b) => a * b), m = await model(name);
  const all = Uint8Array.from(atob(live.pixels), (c) => c.charCodeAt(0));
  return live.labels.map((_, i) => m.run(all.subarray(i * size, (i + 1) * size), members))
    .map((r) => [r.label, ...r.scores]);
}
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A report beside packed files of integers."""
    root = tmp_path_factory.mktemp("project")
    rows, wrong = [], 0
    (root / "packed").mkdir()
    for name, (backbone, sharing, combine, members) in MODELS.items():
        program = network(backbone, sharing, combine, members, whole=True)
        packfile.save(program, root / "packed" / f"{name}.bnn")
        images = random_images(program, 60)
        labels = np.arange(60) % len(program.classes)
        wrong = wrong + (execute.Model(program, "numpy").predict(images) != labels)
        rows.append({"name": name, "members": members, "val_top1": 50.0, "file_bytes": 9})
    shown = live.samples(images, labels, wrong)
    report.write(rows, {}, root / "reports", samples=shown)
    return root


def pixels(shown: dict) -> np.ndarray:
    flat = np.frombuffer(base64.b64decode(shown["pixels"]), np.uint8)
    return flat.reshape(len(shown["labels"]), *shown["image"])


async def settled(browser):
    for _ in range(400):
        if await browser.value(f"{PANEL}.ariaBusy == 'false'"):
            return
        await asyncio.sleep(0.05)
    raise AssertionError("the panel is still at work")


async def drag(browser, script):
    x, y = await browser.middle(script)
    moves = {"mousePressed": 0, "mouseMoved": 50, "mouseReleased": 50}
    for kind, step in moves.items():
        place = {"x": x + step, "y": y - step}
        await browser.call("Input.dispatchMouseEvent", type=kind, button="left", buttons=1,
                           clickCount=1, **place)  # fmt: skip


async def walk(browser, script):
    await browser.value(f"({script}).focus()")
    for key in ("Escape", "ArrowDown", " ", "ArrowLeft", "ArrowLeft", "ArrowLeft"):
        await browser.key(key)


@pytest.mark.slow
@browser_only
@needs_zig
def test_scores_and_panel_in_a_browser(project, tmp_path):
    url = page.write(project / "reports").as_uri()
    shown = json.loads((project / "reports" / "samples.json").read_text())
    models = {name: execute.Model(packfile.load(project / "packed" / f"{name}.bnn"), "numpy")
              for name in MODELS}  # fmt: skip
    status = f"{PANEL}.querySelector('[role=status]').textContent"

    async def drive(browser):
        await browser.open(url, 1200, 900)
        await browser.value(EVERYTHING)
        for name, model in models.items():
            for members in range(1, model.program.members + 1):
                got = await browser.value(f"everything('{name}', {members})")
                scores = np.array(got)[:, 1:].astype(np.float32)
                assert (scores == model(pixels(shown), members)).all()
                labels = model.predict(pixels(shown), members=members)
                assert (np.array(got)[:, 0] == labels).all()

        # By hand: another image, fewer members, another model.
        classes = model.program.classes
        labels = models["fusion"].predict(pixels(shown))
        for at in (1, 17):
            await browser.click(f"{PANEL}.querySelectorAll('[type=radio]')[{at}]")
            await settled(browser)
            truth = classes[shown["labels"][at]]
            right = "right" if labels[at] == shown["labels"][at] else f"wrong: it is {truth}"
            assert (await browser.value(status)).startswith(f"{classes[labels[at]]}, {right}")
        marks = f"[...{PANEL}.querySelectorAll('.samples label')]"
        crosses = await browser.value(f"{marks}.map(l => l.classList.contains('wrong'))")
        assert crosses == (labels != shown["labels"]).tolist()
        await browser.value(f"{PANEL}.querySelector('[type=range]').focus()")
        await browser.key("ArrowLeft")
        await settled(browser)
        assert "2 of 3" in await browser.value(f"{PANEL}.textContent")
        few = models["fusion"].predict(pixels(shown), members=2)
        assert (await browser.value(status)).startswith(classes[few[17]])
        await browser.value(
            "(s => { s.value = 'bnn'; s.dispatchEvent(new Event('change')) })"
            f"({PANEL}.querySelector('select'))"
        )
        await settled(browser)
        alone = models["bnn"].predict(pixels(shown))
        assert (await browser.value(status)).startswith(classes[alone[17]])
        assert await browser.value(f"{PANEL}.querySelector('[type=range]').parentNode.hidden")
        assert "ms an image" in await browser.value(f"{PANEL}.textContent")

        # A drawing, by pointer and by keys, is a new image of the model's.
        for draw in (drag, walk):
            before = await browser.value(f"{PANEL}.querySelector('.view').toDataURL()")
            await draw(browser, f"{PANEL}.querySelector('.pad')")
            await settled(browser)
            assert await browser.value(f"{PANEL}.querySelector('.view').toDataURL()") != before
            assert await browser.value(f"!{PANEL}.querySelector('.samples :checked')")
        await browser.screenshot("panel")
        for width, dark in ((390, False), (390, True)):
            await browser.open(url, width, 844, dark)
            await settled(browser)
            assert await browser.value("document.documentElement.scrollWidth") <= width
            low = await browser.value(CONTRAST)
            assert not low, low
            await browser.screenshot(f"panel-{width}{'-dark' * dark}")
        assert browser.complaints() == []
        assert browser.loaded() <= {url, "data:,"}

    in_browser(tmp_path, drive)


@browser_only
def test_without_a_compiler_the_page_says_how_to_get_it(project, tmp_path, monkeypatch):
    monkeypatch.setattr(compilers, "missing", lambda *_: ["ziglang"])
    url = page.write(project / "reports", tmp_path / "index.html").as_uri()

    async def drive(browser):
        await browser.open(url, 800, 600)
        text = await browser.value("document.body.innerText")
        assert "pip install 'bnncore[device]'" in text
        assert browser.complaints() == []

    in_browser(tmp_path, drive)


def test_samples_are_of_all_classes_and_some_are_hard():
    images = np.random.default_rng(0).integers(0, 256, (200, 2, 2, 3), np.uint8)
    labels = np.arange(200) % 7
    wrong = np.where(np.arange(200) >= 190, 2, 0)
    shown = live.samples(images, labels, wrong)
    assert len(shown["labels"]) == live.SAMPLES
    assert set(shown["labels"]) == set(range(7))
    found = {image.tobytes() for image in pixels(shown)}
    assert {image.tobytes() for image in images[190:]} <= found
    assert len(found) == live.SAMPLES
