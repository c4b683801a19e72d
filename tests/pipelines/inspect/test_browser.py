"""Pages in a real browser, light and dark, wide and narrow: no errors and no requests."""

import base64
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cli import main

CHROMIUM = next(
    (
        path
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (path := shutil.which(name))
    ),
    None,
)
DRIVER = shutil.which("chromedriver")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pages(
    scene_folder: Path, teacher_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The page of a cache with its teacher, and the page of a run trained on the cache."""
    root = tmp_path_factory.mktemp("browser")
    cache = root / "cache"
    run = root / "run"
    small = ("--precision", "fp32", "--device", "cpu")
    commands = (
        (
            "extract",
            scene_folder,
            "--teacher",
            teacher_dir,
            "--out",
            cache,
            *small,
            "--batch-size",
            "8",
        ),
        (
            "train",
            cache,
            "--student",
            "resnet10t",
            "--epochs",
            "2",
            "--warmup-epochs",
            "1",
            "--batch-size",
            "8",
            "--fpn-width",
            "8",
            "--log-every",
            "1",
            "--out",
            run,
            *small,
        ),
        (
            "inspect",
            cache,
            "--teacher",
            teacher_dir,
            "--device",
            "cpu",
            "--report",
            root / "cache.html",
        ),
        ("inspect", run, "--cache", cache, "--device", "cpu", "--report", root / "run.html"),
    )
    kept = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(root / "xdg")
    try:
        for command in commands:
            result = CliRunner().invoke(main, [str(argument) for argument in command])
            assert result.exit_code == 0, result.output
    finally:
        os.environ.pop("XDG_CACHE_HOME")
        if kept is not None:
            os.environ["XDG_CACHE_HOME"] = kept
    return {"cache": root / "cache.html", "run": root / "run.html"}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Headless Chromium that logs its console and its network."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    if CHROMIUM is None or DRIVER is None:
        pytest.skip(
            "chromium and chromedriver are not installed (apt install chromium chromium-driver)"
        )
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    profile = tmp_path_factory.mktemp("profile")
    # Root may not use the sandbox; /dev/shm is small in containers.
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        f"--user-data-dir={profile}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


def show(browser: Any, page: Path, width: int, scheme: str) -> None:
    """Open a page from disk at a window width and in a colour scheme."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get(page.as_uri())


def screenshot(browser: Any, width: int) -> bytes:
    """Return the whole page as PNG."""
    height = browser.execute_script("return document.documentElement.scrollHeight")
    clip = {"x": 0, "y": 0, "width": width, "height": min(height, 16000), "scale": 1}
    shot = browser.execute_cdp_cmd(
        "Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip}
    )
    return base64.b64decode(shot["data"])


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 360])
@pytest.mark.parametrize("kind", ["cache", "run"])
def test_a_page_is_whole(
    browser: Any, pages: dict[str, Path], kind: str, width: int, scheme: str, tmp_path: Path
) -> None:
    """A page loads without errors or requests, and its text, pictures and charts are visible.

    Pictures and charts have a size, the page is not wider than the window, and the contrast fits
    the scheme. A screenshot is saved for review.
    """
    page = pages[kind]
    show(browser, page, width, scheme)
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {
        m["params"]["request"]["url"]
        for m in messages
        if m["method"] == "Network.requestWillBeSent"
    }
    assert {url for url in asked if not url.startswith("data:")} == {page.as_uri()}
    sizes = browser.execute_script(
        "return [...document.images].map(i => [i.complete, i.naturalWidth, i.clientWidth])"
    )
    assert len(sizes) >= (200 if kind == "cache" else 24)
    assert all(complete and natural > 0 and shown > 0 for complete, natural, shown in sizes)
    charts = browser.execute_script(
        "return [...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect().height)"
    )
    assert len(charts) >= 10 and min(charts) > 60
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    colours = browser.execute_script(
        "const s = getComputedStyle(document.body);"
        "return [s.backgroundColor, s.color].map(c => c.match(/\\d+/g).slice(0, 3).map(Number))"
    )
    paper, ink = (sum(colour) / 3 for colour in colours)
    assert paper - ink > 150 if scheme == "light" else ink - paper > 150
    shot = screenshot(browser, width)
    (tmp_path / f"{kind}-{width}-{scheme}.png").write_bytes(shot)
    assert len(shot) > 30_000


@pytest.mark.parametrize("kind", ["cache", "run"])
def test_charts_can_be_read(browser: Any, pages: dict[str, Path], kind: str) -> None:
    """Chart labels are uncut and apart, 9 to 15 px high, at least two per numeric axis.

    On a wide screen no chart scrolls.
    """
    for width in (1200, 400):
        show(browser, pages[kind], width, "light")
        charts = browser.execute_script(
            """return [...document.querySelectorAll('svg')].map(svg => {
                 const box = e => {
                   const b = e.getBoundingClientRect();
                   return [b.left, b.top, b.right, b.bottom];
                 };
                 const texts = [...svg.querySelectorAll('text')];
                 const slanted = t => /rotate\\(-[56]0\\)/.test(t.getAttribute('transform'));
                 return {name: svg.getAttribute('aria-label'), box: box(svg),
                         size: 10.5 * svg.getScreenCTM().a,
                         grid: svg.querySelectorAll('.grid').length,
                         all: texts.map(t => [t.textContent, ...box(t)]),
                         upright: texts.filter(t => !slanted(t))
                                       .map(t => [t.textContent, ...box(t)])};
               })"""
        )
        for chart in charts:
            left, top, right, bottom = chart["box"]
            for text, *b in chart["all"]:
                within = (
                    left - 1 <= b[0]
                    and b[2] <= right + 1
                    and top - 1 <= b[1]
                    and b[3] <= bottom + 1
                )
                assert within, (chart["name"], text)
            for (one, *a), (other, *b) in itertools.combinations(
                [t for t in chart["upright"] if t[0]], 2
            ):
                apart = a[2] <= b[0] + 1 or b[2] <= a[0] + 1 or a[3] <= b[1] + 3 or b[3] <= a[1] + 3
                assert apart, (chart["name"], one, other)
            assert chart["grid"] == 0 or chart["grid"] >= 2, chart["name"]
            assert 9 <= chart["size"] <= 15, chart["name"]
    show(browser, pages[kind], 1200, "light")
    wide = browser.execute_script(
        "return [...document.querySelectorAll('.scroll')]"
        ".filter(e => e.scrollWidth > e.clientWidth).length"
    )
    assert wide == 0
