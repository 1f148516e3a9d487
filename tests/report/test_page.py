"""The HTML page in a real browser, driven over the DevTools protocol."""

import asyncio
import base64
import contextlib
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from bnncore import report
from bnncore.report import page
from bnncore.report.__main__ import main
from tests.report.test_report import a_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SCREENSHOTS = os.environ.get("SCREENSHOTS")  # a folder: leave pictures there, to be looked at
HOSTILE = "</script><script>alert(1)</script> & <b>bold</b>"

browser_only = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")


def a_search():
    """A study's file with every sort of trial; the figures are made up."""
    trials = []
    for i in range(30):
        size = 4096 + 1300 * i
        accuracy = 70 + 7 * math.log(size / 4096) + 3 * math.sin(i * 2.3)
        over = size > 24 * 1024
        row = {"number": i, "members": 1 + i % 6, "sharing": "shared_conv", "width": 8 + i % 5}
        row |= {"file_bytes": size, "val_top1": None if over else accuracy, "feasible": not over}
        trials.append(row)
    trials += [
        {"rival": "int8 of the same bytes", "file_bytes": 23_000, "val_top1": 88.0},
        {"rival": "wider BNN", "file_bytes": 22_000, "val_top1": 85.0, "about": "nin 40, one BNN"},
    ]
    more = {"winner": "wider BNN", "rivals": {"one that was tried": 3, "wider BNN": None}}
    of = {"data": {"name": "folder", "path": "pictures", "seed": 0}}
    return {"budget_bytes": 24 * 1024, "trials": trials, **more, **of}


CLASSES = ["zero", "one", HOSTILE, *(f"class {i}" for i in range(3, 10))]
ABOUT = {
    "dataset": "digits",
    "classes": 10,
    "images": "1,000 train, 437 val, 360 test",
    "chance_top1": 12.5,
    "date": "2026-01-02 03:04+00:00",
    "commit": "abc1234",
    "seed": 7,
    "params": {"seed": 7, "model": {"backbone": "nin"}, "data": {"name": "digits", "seed": 0}},
}


def a_confusion(results):
    """36 images a class, the same for each model: 30 right and 6 taken for the next class."""
    matrix = [[30 * (j == i) + 6 * (j == (i + 1) % 10) for j in range(10)] for i in range(10)]
    return {"classes": CLASSES, "models": {r["name"]: matrix for r in results}}


@pytest.fixture
def reports(tmp_path):
    results, histories, anytime = a_run()
    results.append({"name": HOSTILE, "kind": "bnn", "test_top1": 80.0, "file_bytes": 9000})
    for member in range(3):
        histories[f"voting-3.{member}"] = [
            {"epoch": e, "val_top1": 40 + 9 * member + e} for e in range(1, 31)
        ]
    report.write(results, histories, tmp_path, anytime, a_confusion(results), ABOUT)
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "front.json").write_text(json.dumps(a_search()))
    return tmp_path


class Browser:
    """Headless Chromium with one tab; `events` is all that it reported."""

    def __init__(self, socket):
        self.socket = socket
        self.events = []
        self._numbers = itertools.count(1)

    async def call(self, method, **params):
        number = next(self._numbers)
        await self.socket.send_json({"id": number, "method": method, "params": params})
        while True:
            message = await self.socket.receive_json(timeout=60)
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    async def value(self, script):
        """What the script's last expression is, or the promise that it is gives."""
        how = {"returnByValue": True, "awaitPromise": True}
        got = await self.call("Runtime.evaluate", expression=script, **how)
        assert "exceptionDetails" not in got, got
        return got["result"].get("value")

    async def open(self, url, width, height, dark=False):
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[scheme])
        await self.call("Page.navigate", url=url)
        await self.until("document.readyState == 'complete' && !!window.main")
        await self.value("new Promise(requestAnimationFrame)")
        await self.until(DRAWN)

    async def until(self, script):
        deadline = time.monotonic() + 60
        while not await self.value(script):
            assert time.monotonic() < deadline, script
            await asyncio.sleep(0.02)

    async def click(self, script):
        """Clicks the middle of the element that the script gives."""
        x, y = await self.middle(script)
        for kind in ("mousePressed", "mouseReleased"):
            await self.call(
                "Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1
            )

    async def hover(self, script):
        x, y = await self.middle(script)
        await self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    async def middle(self, script):
        await self.value(f"({script}).scrollIntoView({{block: 'center', inline: 'center'}})")
        return await self.value(
            f"(() => {{ const r = ({script}).getBoundingClientRect();"
            "return [r.x + r.width / 2, r.y + r.height / 2] })()"
        )

    async def key(self, key):
        for kind in ("keyDown", "keyUp"):
            await self.call("Input.dispatchKeyEvent", type=kind, key=key)

    async def screenshot(self, name):
        if not SCREENSHOTS:
            return
        height = await self.value("document.documentElement.scrollHeight")
        width = await self.value("innerWidth")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        shot = await self.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        Path(SCREENSHOTS, f"{name}.png").write_bytes(base64.b64decode(shot["data"]))

    def complaints(self):
        bad = {"Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"}
        return [event for event in self.events if event.get("method") in bad]

    def loaded(self):
        sent = [e for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return {e["params"]["request"]["url"] for e in sent}


def in_browser(tmp_path, drive):
    """Runs the coroutine function `drive` with a Browser, and ends Chromium after it."""
    import aiohttp

    profile = tmp_path / "profile"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
    flags += ["--disable-background-networking", "--disable-component-update"]
    flags += ["--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"]
    with (tmp_path / "chromium.log").open("w") as log:
        chromium = subprocess.Popen(
            [CHROMIUM, *flags], stdout=log, stderr=log, start_new_session=True
        )

    async def session():
        where = profile / "DevToolsActivePort"
        deadline = time.monotonic() + 60
        while not where.exists() or len(where.read_text().split()) < 2:
            assert chromium.poll() is None, (tmp_path / "chromium.log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "chromium.log").read_text()
            await asyncio.sleep(0.05)
        port = where.read_text().split()[0]
        async with aiohttp.ClientSession() as http:
            async with http.get(f"http://127.0.0.1:{port}/json/list") as answer:
                tabs = await answer.json(content_type=None)
            url = next(t["webSocketDebuggerUrl"] for t in tabs if t["type"] == "page")
            async with http.ws_connect(url, max_msg_size=0) as socket:
                browser = Browser(socket)
                for domain in ("Page", "Runtime", "Log", "Network"):
                    await browser.call(f"{domain}.enable")
                await drive(browser)

    try:
        asyncio.run(session())
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(chromium.pid, signal.SIGKILL)  # the group that this function began
        chromium.wait(30)


# The charts draw when they learn their width, as wide as that; under 260 they are scaled.
DRAWN = """[...document.querySelectorAll('figure')].every(
  (f) => f.querySelector('svg').viewBox.baseVal.width == Math.max(f.clientWidth, 260))"""
MODELS = "document.querySelector('section[aria-label=Models]')"
ROWS = f"[...{MODELS}.querySelectorAll('tbody tr')].map(r => r.dataset.id)"
HEAD = "[...document.querySelectorAll('thead button')].find(b => b.textContent == '{}')"
CHART = "document.querySelector('section[aria-label=\"{}\"] figure')"
TIP = "(t => t.hidden ? null : t.innerText)({}.querySelector('.tip'))"


@pytest.mark.slow
@browser_only
def test_the_page_in_a_browser(reports, tmp_path):
    url = page.write(reports).as_uri()

    async def drive(browser):
        await browser.open(url, 1200, 900)
        await browser.screenshot("desktop-light")
        assert "tentaclenet-5 reaches 91.8\u00a0%" in await browser.value("document.body.innerText")

        # The table sorts, by figures and by words, both ways; what is not known stays last.
        await browser.click(HEAD.format("test,\u00a0%"))
        rows = await browser.value(ROWS)
        assert rows[:2] == ["fp32", "tentaclenet-5"]
        assert rows[-1] == HOSTILE
        await browser.click(HEAD.format("test,\u00a0%"))
        assert await browser.value(ROWS) == rows[::-1]
        await browser.click(HEAD.format("model"))
        assert (await browser.value(ROWS))[1:3] == ["bnn", "bnn-wide"]
        for _ in range(2):
            await browser.click(HEAD.format("members"))
            assert (await browser.value(ROWS))[-1] == HOSTILE
        sorts = "[...document.querySelectorAll('thead [aria-sort]')].map(c => c.ariaSort)"
        assert await browser.value(sorts) == ["ascending"]

        # Hovering a point shows its configuration and lights its row; leaving hides it.
        chart = CHART.format("Accuracy against size")
        await browser.hover(f"{chart}.querySelector('[data-id=\"tentaclenet-3\"]')")
        tip = await browser.value(TIP.format(chart))
        assert tip.startswith("tentaclenet-3")
        for text in ("members\n3", "86.90 %", "15.53 KiB", "scheme\ntentaclenet", "width\n16"):
            assert text in tip
        lit = "[...document.querySelectorAll('tr.on')].map(r => r.dataset.id)"
        assert await browser.value(lit) == ["tentaclenet-3"]
        await browser.screenshot("desktop-hover")
        await browser.hover("document.querySelector('h2')")
        assert await browser.value(TIP.format(chart)) is None

        # By keyboard too.
        await browser.value(f"{chart}.querySelector('svg').focus()")
        await browser.key("ArrowRight")
        assert (await browser.value(TIP.format(chart))).startswith("bnn\n")
        await browser.key("ArrowLeft")
        assert (await browser.value(TIP.format(chart))).startswith("fp32\n")
        await browser.key("Escape")
        assert await browser.value(TIP.format(chart)) is None

        # The choices redraw: 97.4 is on the validation images only.
        axis = f"{chart}.querySelector('svg').textContent"
        assert "test accuracy" in await browser.value(axis)
        await browser.value(
            "(s => { s.value = 'val_top1'; s.dispatchEvent(new Event('change')) })"
            "(document.querySelector('section[aria-label=\"Accuracy against size\"] select'))"
        )
        assert "validation accuracy" in await browser.value(axis)

        # A click in the legend hides a line.
        lines = f"{CHART.format('Training')}.querySelectorAll('polyline').length"
        assert await browser.value(lines) == 13
        legend = "document.querySelector('section[aria-label=Training] .legend button')"
        await browser.click(legend)
        assert await browser.value(lines) == 12
        await browser.click(
            "[...document.querySelectorAll('section[aria-label=Training] .legend "
            "button')].find(b => b.textContent == 'voting-3')"
        )
        assert await browser.value(lines) == 8, "with its members"
        assert await browser.value(f"{legend}.ariaPressed") == "false"

        # Members are whole, also where their mean over the images is not.
        ticks = f"[...{CHART.format('Anytime')}.querySelectorAll('svg text[text-anchor=middle]')]"
        numbers = await browser.value(f"{ticks}.map(t => t.textContent).filter(t => t > 0)")
        assert numbers == ["1", "2", "3", "4", "5"]
        ticks = f"[...{chart}.querySelectorAll('svg text[text-anchor=middle]')]"
        sizes = await browser.value(f"{ticks}.map(t => +t.textContent).filter(t => t > 0)")
        assert len(sizes) >= 6, "sizes from 7.7 to 101 KiB"

        # Classes: what they were taken for, by table and by matrix, for the model chosen.
        place = "document.querySelector('section[aria-label=\"By class\"]')"
        assert await browser.value(f"{place}.querySelector('select').value") == "tentaclenet-5"
        cells = f"[...{place}.querySelectorAll('tbody tr')[1].children].map(c => c.textContent)"
        assert await browser.value(cells) == ["one", "36", "83.3\u00a0%", HOSTILE, "16.7\u00a0%"]
        matrix = f"{place}.querySelectorAll('.matrix tbody td')"
        assert await browser.value(f"{matrix}.length") == 100
        assert await browser.value(f"[...{matrix}].slice(10, 13).map(c => c.textContent)") == [
            *("", "30", "6")
        ]
        about = await browser.value("document.getElementById('about').textContent")
        for text in ("digits", "360 test", "12.5\u00a0%", "2026-01-02", "commit abc1234", "seed 7"):
            assert text in about
        assert '"backbone": "nin"' in await browser.value(
            "document.querySelector('pre').textContent"
        )

        search = CHART.format("Search under a budget")
        marks = f"[...{search}.querySelectorAll('.point')].length"
        assert await browser.value(marks) == len(a_search()["trials"])
        text = await browser.value(f"{search}.closest('section').textContent")
        for said in (
            "over the budget",
            "On pictures. These are other images",
            "The best that fits, nin 40, one BNN",
            "one that was tried",
        ):
            assert said in text

        assert browser.complaints() == []
        assert browser.loaded() <= {url, "data:,"}

    in_browser(tmp_path, drive)


@pytest.mark.slow
@browser_only
def test_the_page_on_a_phone_and_in_the_dark(reports, tmp_path):
    url = page.write(reports).as_uri()

    async def drive(browser):
        backs = []
        for name, width, dark in (
            ("desktop-dark", 1200, True),
            ("phone-light", 390, False),
            ("phone-dark", 390, True),
            ("narrow", 320, False),
        ):
            await browser.open(url, width, 844, dark)
            await browser.screenshot(name)
            wide = await browser.value("document.documentElement.scrollWidth - innerWidth")
            assert wide <= 0, f"{name}: the page scrolls sideways by {wide} pixels"
            # A phone makes its window wider for a page that does not fit.
            assert await browser.value("innerWidth") == width
            # A table that goes on to the right says so, until its end is seen.
            hint = f"{MODELS}.querySelector('.hint')"
            box = f"{MODELS}.querySelector('.wide')"
            hidden = f"{box}.scrollWidth > {box}.clientWidth + 2"
            assert await browser.value(hidden), "this table is wide"
            await browser.until(f"!{hint}.hidden")
            await browser.value(f"{box}.scrollLeft = 10000")
            await browser.until(f"{hint}.hidden")
            first = await browser.value("document.querySelector('tbody th').offsetWidth")
            assert 110 < first < 0.6 * width, "a name can be read, and figures beside it"
            back = await browser.value("getComputedStyle(document.body).backgroundColor")
            backs.append(back)
            # No name of a point on another.
            covered = await browser.value(
                "(() => { let n = 0; for (const f of document.querySelectorAll('figure')) {"
                "const names = [...f.querySelectorAll('text.name')];"
                "const b = names.map(t => t.getBoundingClientRect());"
                "b.forEach((p, i) => b.slice(i + 1).forEach(q => { if (p.left < q.right - 1 &&"
                "q.left < p.right - 1 && p.top < q.bottom - 3 && q.top < p.bottom - 3) n++ })) }"
                "return n })()"
            )
            assert covered == 0
            low = await browser.value(CONTRAST)
            assert not low, f"{name}: text of too little contrast: {low}"
        assert len(set(backs)) == 2
        assert backs[0] == backs[2]
        assert browser.complaints() == []

    in_browser(tmp_path, drive)


CONTRAST = """
(() => {  // WCAG 2: text has at least 4.5 : 1 on the page
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const light = (css) => {
    canvas.fillStyle = css; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map((v) => v / 255)
      .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const back = light(getComputedStyle(document.body).backgroundColor), low = new Set();
  for (const e of document.querySelectorAll('p, td, th, button, text, h1, h2, label')) {
    const style = getComputedStyle(e), l = light(e.tagName == 'text' ? style.fill : style.color);
    const ratio = (Math.max(l, back) + 0.05) / (Math.min(l, back) + 0.05);
    if (ratio < 4.5) low.add(`${e.tagName} ${ratio.toFixed(2)}`);
  }
  return [...low];
})()
"""


@browser_only
def test_a_page_with_next_to_nothing(tmp_path):
    (tmp_path / "results.json").write_text('[{"name": "bnn"}]')
    url = page.write(tmp_path).as_uri()
    report.write(
        [{"name": "one", "test_top1": 50.0, "file_bytes": 100, "members": 1}], {}, tmp_path
    )
    other = page.write(tmp_path, tmp_path / "one.html").as_uri()

    async def drive(browser):
        await browser.open(url, 800, 600)
        text = await browser.value("document.body.innerText")
        assert "No model has been evaluated yet" in text
        await browser.open(other, 800, 600)
        assert await browser.value("document.querySelectorAll('.point').length") == 2
        assert browser.complaints() == []

    in_browser(tmp_path, drive)


def test_the_page_holds_all_and_fetches_nothing(reports):
    text = page.write(reports).read_text()
    assert text.count("</script>") == 2, "a name cannot end the script that holds the data"
    assert not any(word in text for word in ("https://", "src=", "@import", "url("))
    data = text.split('id="data">')[1].split("</script>")[0]
    assert json.loads(data)["results"][-1]["name"] == HOSTILE


def test_a_search_alone_makes_a_page(tmp_path, capsys):
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "front.json").write_text(json.dumps(a_search()))
    assert main(["--html", "--reports", str(tmp_path)]) == 0
    assert "index.html" in capsys.readouterr().out
    assert "int8 of the same bytes" in (tmp_path / "index.html").read_text()


@browser_only
@pytest.mark.slow
def test_a_search_alone_is_shown(tmp_path):
    (tmp_path / "search").mkdir()
    content = a_search()
    content["trials"][0]["val_top1"] = 10.0  # far below the others: on the lower edge
    (tmp_path / "search" / "front.json").write_text(json.dumps(content))
    url = page.write(tmp_path).as_uri()

    async def drive(browser):
        await browser.open(url, 800, 900)
        text = await browser.value("document.body.textContent")
        assert "Models" not in await browser.value(
            "[...document.querySelectorAll('h2')].map((h) => h.textContent).join()"
        )
        assert "On pictures. Budget" in text, "no models beside it, so no other images"
        # A rival is the best of all, and ends the front.
        steps = f"{CHART.format('Search under a budget')}.querySelector('path[fill=none][opacity]')"
        marks = f"[...{CHART.format('Search under a budget')}.querySelectorAll('.point')]"
        middles = f"{marks}.map((m) => m.getBBox()).map((b) => b.y + b.height / 2)"
        top = await browser.value(f"Math.min(...{middles})")
        assert abs(top - await browser.value(f"{steps}.getBBox().y")) < 1
        assert "Rivals within the same budget: int8 of the same bytes 88.0" in text
        assert "scored lower, down to 10.0" in text
        assert not browser.complaints()

    in_browser(tmp_path, drive)
