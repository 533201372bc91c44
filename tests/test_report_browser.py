"""The page of a run in a real browser, by its own protocol: what is drawn, fetched, said on the console, and how it fits."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from pipeline.artifacts import RunFolder, write_text
from pipeline.report import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome", "chromium-browser"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs a browser: chromium, google-chrome or chrome in PATH")
PATIENCE_S = 120.0
NAME = "a <b>run</b> with \"quotes\" & '日本'"


class Navigated(Exception):
    """Another page came while this one was asked."""


class Tab:
    """A page that is open in the browser."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket, self.count = socket, 0
        self.console: list[str] = []
        self.fetched: list[str] = []

    async def call(self, method: str, **given: Any) -> dict[str, Any]:
        self.count += 1
        await self.socket.send_json({"id": self.count, "method": method, "params": given})
        while True:
            answer = json.loads((await asyncio.wait_for(self.socket.receive(), PATIENCE_S)).data)
            if answer.get("id") == self.count:
                if "navigated" in answer.get("error", {}).get("message", ""):
                    raise Navigated
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self.hear(answer.get("method", ""), answer.get("params", {}))

    def hear(self, method: str, said: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            self.console.append(json.dumps(said["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled":
            self.console.append(f"{said['type']}: {[a.get('value') for a in said['args']]}")
        elif method == "Log.entryAdded":
            self.console.append(said["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.fetched.append(said["request"]["url"])

    async def value(self, code: str) -> Any:
        found = await self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def until(self, code: str) -> None:
        end = time.monotonic() + PATIENCE_S
        while True:
            with suppress(Navigated):
                if await self.value(code):
                    return
            assert time.monotonic() < end, f"{code} did not come true; the console: {self.console[:5]}"
            await asyncio.sleep(0.1)

    async def open(self, page: Path, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        for domain in ("Runtime", "Log", "Page", "Network"):
            await self.call(f"{domain}.enable")
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        await self.theme(dark)
        await self.call("Page.navigate", url=page.as_uri())
        await self.until("document.readyState === 'complete' && location.href.startsWith('file:')")

    async def theme(self, dark: bool) -> None:
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        await self.call("Emulation.setEmulatedMedia", features=features)

    async def key(self, name: str) -> None:
        for kind in ("keyDown", "keyUp"):
            await self.call("Input.dispatchKeyEvent", type=kind, key=name, code=name)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its address, host:port. One for all tests; each opens a tab of its own."""
    assert BROWSER is not None
    command = [
        BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--no-first-run",
        f"--user-data-dir={tmp_path_factory.mktemp('browser')}", "about:blank",
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        assert process.stderr is not None
        address = next((m[1] for line in process.stderr if (m := re.search(r"ws://([^/\s]+)/", line))), None)
        assert address is not None, "the browser did not start"
        yield address
    finally:
        process.terminate()
        process.wait(30)


def look(browser: str, what: Callable[[Tab], Awaitable[None]]) -> None:
    async def work() -> None:
        async with aiohttp.ClientSession() as session:
            async with session.put(f"http://{browser}/json/new?about:blank") as answer:
                target = await answer.json(content_type=None)
            async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                await what(Tab(socket))
            await session.get(f"http://{browser}/json/close/{target['id']}")

    asyncio.run(asyncio.wait_for(work(), 5 * PATIENCE_S))


# ------------------------------------------------------------------------------------------------ a run


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of SFT, a sweep of DPO, PPO that failed, and an evaluation."""
    folder = tmp_path_factory.mktemp("report") / "run"
    steps = range(10, 400, 10)
    metrics = [{"step": s, "loss": 2 / s, "tokens_per_second": 900.0 + s, "learning_rate": 1e-3 / s} for s in steps]
    metrics += [{"step": 100, "eval_loss": 0.5}, {"step": 200, "eval_loss": 0.25}]
    stages: dict[str, Any] = {"sft": ("sft", {"loss": 0.125}, metrics)}
    for beta in (0.1, 0.3):
        own = [{"step": s, "loss": beta / s, "rewards/chosen": s * beta, "rewards/rejected": -s * beta} for s in steps]
        stages[f"dpo-beta-{beta}"] = ("dpo", {"loss": beta}, own)
    reinforced = [
        {"step": s, "reward": s / 400, "kl": s / 100, "entropy": 1 / s, "clip_fraction": 1 / s} for s in steps
    ]
    stages["ppo"] = ("ppo", None, reinforced)
    judged = {
        "sft": {"exact_match": 0.5}, "dpo-beta-0.1": {"exact_match": 0.7, "kl": 1.5, "kl_stderr": 0.25},
        "dpo-beta-0.3": {"exact_match": 0.6, "kl": 0.5, "kl_stderr": 0.125},
    }  # fmt: skip
    stages["eval"] = ("evaluate", judged, [])
    records = {}
    for name, (kind, found, own) in stages.items():
        records[name] = {
            "kind": kind, "state": "done" if found else "failed", "fingerprint": name, "seconds": 3.0, "started": 1001.0,
            "inputs": [] if name == "sft" else ["stages.sft"],
        }  # fmt: skip
        where = folder / name if found else folder / ".work" / f"{name}-{name}"
        where.mkdir(parents=True)
        (where / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in own))
        samples = [{"prompt": "2+2?" * 200, "expected": "four", "answers": dict.fromkeys(judged, "four words")}]
        manifest = {
            "fingerprint": name, "kind": kind, "produces": "model", "metrics": found, "inputs": {"model": [{"stage": "sft"}]},
            "details": {"samples": samples if kind == "evaluate" else []}, "versions": {"torch": "2.0"},
        }  # fmt: skip
        if found:
            (where / "manifest.json").write_text(json.dumps(manifest))
    records["ppo"]["error"] = "out of memory\n" + "x" * 500
    records["eval"]["gates"] = [{"holds": True, "says": "exact_match of dpo is 0.7, wanted at least 0.6"}]
    sweeps = {"dpo": {f"dpo-beta-{b}": {"train.beta": b} for b in (0.1, 0.3)}}
    state = {
        "name": NAME,
        "state": "failed",
        "started": 1000.0,
        "finished": 1060.0,
        "stages": records,
        "sweeps": sweeps,
    }
    (folder / "run.json").write_text(json.dumps(state))
    (folder / "spec.yaml").write_text("name: run\n" + "long: " + "x" * 400)
    write_report(RunFolder(folder))
    return folder / "report.html"


SHOW_ALL = (
    "document.querySelectorAll('details').forEach(d => { d.open = true; }); document.querySelectorAll('.chart').length"
)
DRAWN = "[...document.querySelectorAll('.chart')].every(c => { const s = c.querySelector('.plot svg'); return s && s.clientWidth > 100 && s.clientHeight > 50; })"
LINES = "document.querySelectorAll('.plot svg .mark-line path').length"
COLOUR = "getComputedStyle(document.querySelector('.plot svg .mark-line path')).stroke"


@pytest.mark.parametrize("dark", [False, True])
def test_charts_are_drawn_nothing_is_fetched_and_the_console_is_silent(browser: str, page: Path, dark: bool) -> None:
    async def see(tab: Tab) -> None:
        await tab.open(page, height=6000, dark=dark)
        assert await tab.value(SHOW_ALL) > 10
        await tab.until(DRAWN)
        assert await tab.value(LINES) > 15
        assert tab.console == []
        assert tab.fetched == [page.as_uri()] or set(tab.fetched) == {page.as_uri(), "data:,"}
        assert await tab.value("document.querySelector('h1').textContent") == NAME
        light = await tab.value("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]")
        assert (light < 60) is dark

    look(browser, see)


def test_charts_follow_the_theme(browser: str, page: Path) -> None:
    async def see(tab: Tab) -> None:
        await tab.open(page, height=6000)
        await tab.value(SHOW_ALL)
        await tab.until(DRAWN)
        before = await tab.value(COLOUR)
        await tab.theme(dark=True)
        await tab.until(f"{COLOUR} !== {json.dumps(before)}")
        await tab.until(DRAWN)
        assert tab.console == []

    look(browser, see)


@pytest.mark.parametrize(("width", "pictures"), [(375, "down"), (768, "down"), (1280, "across")])
def test_no_width_makes_the_page_scroll_sideways(browser: str, page: Path, width: int, pictures: str) -> None:
    async def see(tab: Tab) -> None:
        await tab.open(page, width=width, height=8000)
        await tab.value(SHOW_ALL)
        await tab.until(DRAWN)
        assert await tab.value("document.documentElement.scrollWidth <= innerWidth")
        # what is wider is so within its own box
        out = "[...document.querySelectorAll('main *')].filter(e => !e.closest('.wide, pre, .text, .aside') && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"
        assert await tab.value(out) == []
        shown = await tab.value(
            "[...document.querySelectorAll('svg.chain')].filter(s => s.clientWidth).map(s => s.classList[1])"
        )
        assert shown == [pictures]

    look(browser, see)


def test_values_under_the_pointer_and_by_the_keyboard(browser: str, page: Path) -> None:
    async def see(tab: Tab) -> None:
        await tab.open(page)
        chart = "document.querySelector('#stage-sft .chart')"
        await tab.value(f"{chart}.scrollIntoView()")
        await tab.until(f"!!{chart}.querySelector('.plot svg')")
        told = f"[{chart}.querySelector('.at').textContent, ...[...{chart}.querySelectorAll('output')].map(o => o.textContent)]"
        at_rest = await tab.value(told)
        assert at_rest == ["", "0.25", "0.005128"]
        where = await tab.value(
            f"(r => [r.left + r.width * 0.55, r.top + 40])({chart}.querySelector('.plot').getBoundingClientRect())"
        )
        await tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=where[0], y=where[1])
        await tab.until(f"{told}[0].startsWith('step 2')")
        assert await tab.value(f"{chart}.querySelectorAll('.mark-rule.role-mark line').length") == 1
        await tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)
        await tab.until(f"{told}[0] === ''")
        await tab.value(f"{chart}.querySelector('.plot').focus()")
        await tab.key("Home")
        await tab.until(f"{told}[0] === 'step 10'")
        assert await tab.value(told) == ["step 10", "–", "0.2"]
        await tab.key("ArrowRight")
        await tab.until(f"{told}[0] === 'step 20'")
        assert tab.console == []

    look(browser, see)


def test_what_a_screen_reader_is_told(browser: str, page: Path) -> None:
    async def see(tab: Tab) -> None:
        await tab.open(page, height=6000)
        await tab.value(SHOW_ALL)
        await tab.until(DRAWN)
        await tab.call("Accessibility.enable")
        tree = (await tab.call("Accessibility.getFullAXTree"))["nodes"]
        named = [(n["role"]["value"], n.get("name", {}).get("value", "")) for n in tree if "role" in n]
        images = [name for role, name in named if role in ("image", "img")]
        assert len(images) > 10, images
        assert any(name.startswith("loss: held out from 0.5 at step 100 to 0.25 at step 200") for name in images)
        assert any(name.startswith("exact match against KL: sft 50.0% at 0.00") for name in images)
        assert ("link", "ppo: ppo, failed, 3.0 s, from stages.sft".replace("stages.", "")) in named
        headings = [name for role, name in named if role == "heading"]
        assert headings[0] == NAME and {"The chain", "eval: models side by side", "dpo: 2 variants", "Stages"} <= set(
            headings
        )
        assert {"rowheader", "columnheader"} <= {role for role, _ in named}

    look(browser, see)


def test_a_link_of_the_chain_unfolds_its_stage(browser: str, page: Path) -> None:
    async def see(tab: Tab) -> None:
        await tab.open(page)
        await tab.value("document.getElementById('stage-ppo').open = false")
        await tab.value(
            "document.querySelector('svg.across a[href=\"#stage-ppo\"]').dispatchEvent(new MouseEvent('click', {bubbles: true}))"
        )
        await tab.until("document.getElementById('stage-ppo').open")

    look(browser, see)


def test_a_page_of_a_run_that_goes_on_reads_itself_again_at_the_same_place(
    browser: str, page: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(page.parent, folder)
    state = json.loads((folder / "run.json").read_text()) | {"state": "running"}
    (folder / "run.json").write_text(json.dumps(state))
    write_report(RunFolder(folder))
    file = folder / "report.html"
    text = file.read_text()
    assert 'data-every="15"' in text
    file.write_text(text.replace('data-every="15"', 'data-every="1"'))

    async def see(tab: Tab) -> None:
        await tab.open(file)
        await tab.until(
            "document.getElementById('stage-sft').open = false, window.scrollTo(0, 700), window.before = 1, true"
        )
        write_text(file, file.read_text().replace("<h1>", "<h1>again: "))
        await tab.until(
            "window.before === undefined && document.querySelector('h1')?.textContent.startsWith('again: ')"
        )
        await tab.until("Math.abs(scrollY - 700) < 5")
        await tab.until("!document.getElementById('stage-sft').open && document.getElementById('stage-ppo').open")
        assert tab.console == []

    look(browser, see)
