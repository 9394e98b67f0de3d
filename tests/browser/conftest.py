"""A browser, and the four places where the tab is to work, each with its own gradio in an environment of its own."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --host-resolver-rules=MAP\u0020*.googleapis.com\u0020127.0.0.1"
).split(" --")
PLACES = {
    "6": ("alone", ""), "4.40": ("fake_host", "forge-neo"), "3.41": ("fake_host", "a1111"),
    "3.43": ("fake_host", "sdnext"),
}  # fmt: skip
SHORT = "6"
"""The place of the short tests."""

PATIENCE = 240_000
"""Milliseconds. The tests' machine may be busy; a browser that waits costs nothing."""


def python_of(version: str) -> str:
    """The Python that has this gradio. ``install.py test`` makes those of the hosts."""
    if named := os.environ.get(f"I2L_TEST_GRADIO_{version.replace('.', '_')}"):
        return named
    return sys.executable if version == "6" else str(ROOT / ".private" / f"gradio-{version}" / "bin" / "python")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """They take minutes, so they run when they are meant to; but for the short ones, under one gradio, where there is
    a browser. They run after all others: the browser's client keeps an event loop running in this thread, and others
    start one of their own."""
    items.sort(key=lambda item: HERE in item.path.parents)
    for item in items:
        if HERE not in item.path.parents or os.environ.get("I2L_BROWSER"):
            continue
        where = getattr(getattr(item, "callspec", None), "params", {}).get("place", SHORT)
        if not item.get_closest_marker("short") or where != SHORT:
            item.add_marker(pytest.mark.skip(reason="run with `python install.py browser`"))
        elif not Path(CHROMIUM).is_file():
            item.add_marker(pytest.mark.skip(reason="there is no chromium (apt-get install chromium)"))


@dataclass
class Place:
    """A running page. ``kill`` it, ``start`` it again: its folders stay."""

    version: str
    root: Path
    port: int = 0
    process: subprocess.Popen | None = None
    environment: dict = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    @property
    def lora(self) -> Path:
        return self.root / "models" / "Lora"

    def start(self) -> None:
        kind, flavour = PLACES[self.version]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = self.port or probe.getsockname()[1]
        script = HERE / "alone.py" if kind == "alone" else HERE.parent / "fake_host" / "webui.py"
        own = {
            "FAKE_ROOT": self.root, "FAKE_FLAVOUR": flavour, "I2L_STATE": self.root / "state",
            "I2L_MODELS": self.root / "weights", "I2L_CACHE": self.root / "cache", "OMP_NUM_THREADS": "1",
            "I2L_ENGINE_PYTHON": self.root / "engine", "GRADIO_TEMP_DIR": self.root / "uploads",
            "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        log = (self.root / "log.txt").open("ab")
        environment = {**os.environ, **{key: str(value) for key, value in own.items()}, **self.environment}
        self.process = subprocess.Popen(
            [python_of(self.version), str(script), str(self.port)],
            env=environment,
            cwd=self.root,
            stdout=log,
            stderr=log,
        )
        end = time.monotonic() + PATIENCE / 1000
        while time.monotonic() < end:
            assert self.process.poll() is None, (self.root / "log.txt").read_text()[-3000:]
            with suppress(OSError), urllib.request.urlopen(self.url, timeout=10):
                return
            time.sleep(0.2)
        raise AssertionError((self.root / "log.txt").read_text()[-3000:])

    def kill(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()

    def engine(self) -> int:
        """The process number of the engine of the job at work. Brief jobs have some of their own, which end soon."""
        end = time.monotonic() + PATIENCE / 1000
        while len(found := self.engines()) != 1:
            assert time.monotonic() < end, found
            time.sleep(0.1)
        return found[0]

    def engines(self) -> list[int]:
        """Process numbers of the engines that belong to this place."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                words = (folder / "environ").read_bytes()
                line = (folder / "cmdline").read_bytes()
                if f"I2L_STATE={self.root / 'state'}".encode() in words and b"engine.py" in line:
                    found.append(int(folder.name))
        return found


@pytest.fixture(scope="session", params=list(PLACES))
def place(request, tmp_path_factory):
    version = request.param
    python = python_of(version)
    if not Path(python).is_file():
        pytest.skip(f"there is no environment with gradio {version} (python install.py test makes it)")
    if subprocess.run([python, "-c", "import gradio"], capture_output=True).returncode:
        pytest.skip(f"gradio {version} is not installed")
    root = tmp_path_factory.mktemp(f"place-{version}")
    (root / "models" / "Lora").mkdir(parents=True)
    (root / "extensions").mkdir()
    (root / "extensions" / "image-to-lora").symlink_to(ROOT)
    engine = root / "engine"
    engine.write_text(f"#!/bin/sh\nexec {sys.executable} {HERE / 'engine.py'}\n")
    engine.chmod(0o755)
    place = Place(version, root)
    place.start()
    yield place
    place.kill()


@pytest.fixture(scope="session")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not Path(CHROMIUM).is_file():
        pytest.skip("there is no chromium (apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", *(f"--{f}" for f in FLAGS[1:])]
        )
        yield browser
        browser.close()


def stop_all(page):
    """Stop what a test has left at work: the next one finds an empty queue."""
    stop = "document.querySelectorAll('#i2l .i2l-job [data-i2l=cancel]').forEach((one) => one.click())"
    end = time.monotonic() + 30
    with suppress(Exception):  # the page may have been left, or its WebUI been killed
        while page.locator('#i2l_jobs[data-active="1"]').count() and time.monotonic() < end:
            page.evaluate(stop)
            page.wait_for_timeout(500)


@pytest.fixture
def open_page(browser, place):
    """Opens the tab in a browser window of its own; (dark=True) for the dark theme."""
    contexts = []

    def open_page(dark=False):
        context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme="dark" if dark else "light")
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.goto(place.url + ("?__theme=dark" if dark else ""), wait_until="domcontentloaded")
        show(page)
        return page

    def show(page):
        page.locator("#i2l_panes").wait_for(state="attached")
        if PLACES[place.version][0] == "fake_host":
            page.locator("button", has_text="Image to LoRA").first.click()
        page.locator('#i2l_models input[name="i2l_model"]').first.wait_for()

    open_page.show = show
    yield open_page
    for page in [page for context in contexts for page in context.pages][-1:]:
        stop_all(page)
    for context in contexts:
        context.close()


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    made = []
    for number in range(3):
        picture = Image.effect_mandelbrot((300 + 40 * number, 220), (-2, -1, 1, 1), 20 + number)
        path = folder / f"picture {number}.png"
        Image.merge("RGB", [picture, picture.rotate(90 * number), Image.new("L", picture.size, 80 * number)]).save(path)
        made.append(str(path))
    text = folder / "text.png"
    text.write_text("no picture at all")
    return [*made, str(text)]
