"""The page of the demo app: served for real, asked through gradio's client, and driven in a browser."""

import json
import shutil
import socket
import threading
import time
from concurrent.futures import as_completed
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image

from configs import ConfigError
from pipelines.app import AppConfig
from pipelines.demo import actions

pytestmark = pytest.mark.slow
WAIT_SECONDS = 120
BROWSER_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1280,900"
)
OPTIONS = {"guidance_scale": 1.5, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
LOCAL = {"127.0.0.1", "localhost", "::1"}


@pytest.fixture
def address(tiny_pipeline, monkeypatch):
    """Address of the page of the tiny pipeline, while it is served. The tests upload at most 1 MB."""
    pytest.importorskip("gradio", reason="needs gradio: pip install 'tessella[demo]'")
    from pipelines.demo.page import build_page, launch

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # launch lowers it
    config = AppConfig(pipeline="someone/digits", max_images=4, max_waiting=1, max_upload_megabytes=1)
    page = build_page(tiny_pipeline, config)
    yield launch(page, config)
    page.close(verbose=False)


@pytest.fixture
def client(address, tmp_path):
    from gradio_client import Client

    return Client(address, verbose=False, download_files=str(tmp_path / "downloads"), analytics_enabled=False)


@pytest.fixture
def picture(tmp_path) -> Path:
    Image.linear_gradient("L").save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


# ---------------------------------------------------------------------- through the client


def test_the_same_request_gives_the_same_files(client):
    first, again = (client.predict(classes=[3, 7], count=2, seed=5, **OPTIONS, api_name="/generate") for _ in range(2))
    assert [image["caption"] for image in first] == ["3 · seed 5", "3 · seed 6", "7 · seed 7", "7 · seed 8"]
    assert [Path(image["image"]).read_bytes() for image in first] == [
        Path(image["image"]).read_bytes() for image in again
    ]


def test_an_upload_comes_back_as_three_pictures(client, picture, tiny_pipeline):
    from gradio_client import handle_file

    *pictures, facts = client.predict(handle_file(picture), api_name="/reconstruct")
    assert [Image.open(path).size for path in pictures] == [(16, 16), (16, 16), (512, 512)]
    assert facts == actions.reconstruct(tiny_pipeline, picture.read_bytes()).facts


WRONG_UPLOADS = {
    "text.png": (b"hello", "This file cannot be used: the file is in no image format"),
    "script.png": (b"<script>alert(1)</script>", "This file cannot be used"),
    "empty.png": (b"", "the file is empty"),
    "drawing.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "This file cannot be used"),
}


@pytest.mark.parametrize("name", WRONG_UPLOADS)
def test_a_wrong_upload_is_a_message(client, tmp_path, capfd, name):
    from gradio_client import handle_file

    content, message = WRONG_UPLOADS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Exception, match=message) as caught:
        client.predict(handle_file(tmp_path / name), api_name="/reconstruct")
    assert "Traceback" not in str(caught.value) and str(tmp_path) not in str(caught.value)
    assert "Traceback" not in capfd.readouterr().err  # a visitor's mistake is nothing for the log


def test_an_upload_that_is_too_large_is_not_received(address):
    import httpx

    answer = httpx.post(f"{address}gradio_api/upload", files={"files": ("large.png", bytes(2**20 + 1))})
    assert answer.status_code == 413


def test_a_wrong_request_is_a_message(client):
    with pytest.raises(Exception, match="2 classes with 3 images each are too many; allowed are 4 images"):
        client.predict(classes=[3, 7], count=3, seed=5, **OPTIONS, api_name="/generate")


def test_a_failure_of_the_app_tells_visitors_nothing_of_the_inside(client, monkeypatch, capfd):
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("a secret path")

    monkeypatch.setattr(actions, "generate", fail)
    with pytest.raises(Exception, match=r"The app failed at this\. Its log says why\."):
        client.predict(classes=[3], count=1, seed=5, **OPTIONS, api_name="/generate")
    assert "a secret path" in capfd.readouterr().err


def test_progress_is_shown_and_a_full_queue_refuses(client, monkeypatch):
    """One request is computed, one waits, the third is told so."""
    started, go_on = threading.Event(), threading.Event()

    def generate(pipeline, most, classes, count, seed, guidance_scale, report, **options):
        report(3, 16)
        started.set()
        assert go_on.wait(WAIT_SECONDS)
        return []

    monkeypatch.setattr(actions, "generate", generate)

    def submit():
        return client.submit(classes=[3], count=1, seed=5, **OPTIONS, api_name="/generate")

    first = submit()
    assert started.wait(WAIT_SECONDS)
    others = [submit(), submit()]
    refused = next(as_completed([job.future for job in others], WAIT_SECONDS))
    assert "Queue is full" in str(refused.exception())
    while not (progress := [step for step in first.status().progress_data or [] if step.length]):
        time.sleep(0.05)
    assert [(step.index, step.length, step.desc, step.unit) for step in progress] == [(3, 16, "sampling", "codes")]
    go_on.set()
    assert [job.result(WAIT_SECONDS) for job in (first, *others) if job.future is not refused] == [[], []]


@pytest.mark.parametrize(
    "changes, hidden",
    [
        ({}, set()),
        ({"has_null": False}, {"Guidance"}),
        ({"class_names": (), "class_counts": ()}, {"Classes", "Guidance"}),
    ],
)
def test_what_a_prior_cannot_is_hidden(tiny_pipeline, monkeypatch, changes, hidden):
    pytest.importorskip("gradio", reason="needs gradio: pip install 'tessella[demo]'")
    from pipelines.demo.page import build_page

    monkeypatch.setattr(tiny_pipeline, "layout", replace(tiny_pipeline.layout, **changes))
    components = build_page(tiny_pipeline, AppConfig(pipeline="someone/digits")).config["components"]
    visible = {component["props"].get("label"): component["props"].get("visible") for component in components}
    assert {label for label in ("Classes", "Guidance", "Seed", "Top-k") if not visible[label]} == hidden


def test_a_port_in_use_is_a_message(address, tiny_pipeline):
    from pipelines.demo.page import build_page, launch

    config = AppConfig(pipeline="someone/digits", port=urlsplit(address).port)
    with pytest.raises(ConfigError, match="port: received"):
        launch(build_page(tiny_pipeline, config), config)


def test_the_app_asks_nothing_of_other_machines(monkeypatch, request, picture):
    """Neither when it starts nor when it answers."""
    asked: set[str] = set()
    looked_up, connected = socket.getaddrinfo, socket.socket.connect

    def look_up(host, *arguments, **options):
        asked.add(str(host))
        return looked_up(host, *arguments, **options)

    def connect(self, where):
        asked.update([str(where[0])] if isinstance(where, tuple) else [])
        return connected(self, where)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(socket.socket, "connect", connect)
    test_an_upload_comes_back_as_three_pictures(
        request.getfixturevalue("client"), picture, request.getfixturevalue("tiny_pipeline")
    )
    assert asked and asked <= LOCAL


# ---------------------------------------------------------------------- in a browser


@pytest.fixture
def browser(tmp_path):
    selenium = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install selenium")
    found = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
    driver = shutil.which("chromedriver")
    if driver is None or not any(found):
        pytest.skip("needs Chromium and its driver: apt-get install chromium chromium-driver")
    options = selenium.ChromeOptions()
    options.binary_location = next(filter(None, found))
    for flag in [*BROWSER_FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    opened = selenium.Chrome(options, selenium.ChromeService(driver))
    yield opened
    opened.quit()


def requested_hosts(browser) -> set[str | None]:
    """Hosts of everything that the page has loaded. Pages of the browser itself do not count."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [message["params"] for message in messages if message["method"] == "Network.requestWillBeSent"]
    addresses = [urlsplit(params["request"]["url"]) for params in sent if "chrome" not in params["documentURL"]]
    return {address.hostname for address in addresses if address.scheme in ("http", "https", "ws", "wss")}


class Visitor:
    """Reads and clicks in the page. Each step is one script, because the page may exchange an element between two."""

    VISIBLE = "[...document.querySelectorAll(arguments[0])].filter(element => element.checkVisibility())"

    def __init__(self, browser):
        from selenium.webdriver.support.ui import WebDriverWait

        self.browser, self.patience = browser, WebDriverWait(browser, WAIT_SECONDS)

    def count(self, selector: str) -> int:
        return self.browser.execute_script(f"return {self.VISIBLE}.length", selector)

    def text(self, selector: str = "body") -> str:
        return self.browser.execute_script(f"return {self.VISIBLE}.map(element => element.innerText).join()", selector)

    def act(self, script: str, selector: str, text: str = "") -> None:
        """Waits for a visible element with this text, and runs a script with it."""
        chosen = f"const element = {self.VISIBLE}.find(element => element.innerText.includes(arguments[1]))"
        whole = f"{chosen}; if (element) {{ {script} }}; return Boolean(element)"
        self.patience.until(lambda browser: browser.execute_script(whole, selector, text))

    def click(self, selector: str, text: str = "") -> None:
        self.act("element.click()", selector, text)

    def wait(self, holds) -> None:
        self.patience.until(lambda _: holds())

    def upload(self, path: Path) -> None:
        self.wait(lambda: self.browser.find_elements("css selector", "input[type=file]"))
        self.browser.find_element("css selector", "input[type=file]").send_keys(str(path))


def test_a_visitor_generates_images_and_uploads_a_picture(browser, address, picture, tmp_path):
    visitor = Visitor(browser)
    browser.get(address)
    one = "element.value = 1; element.dispatchEvent(new Event('input', {bubbles: true}))"
    visitor.act(one, "input[type=number][aria-label*='Images of each class']")
    assert browser.title == "someone/digits"
    visitor.click("#generate")
    visitor.wait(lambda: visitor.count(".gallery-item img") == 2)
    assert all(words in visitor.text() for words in ("0 · seed 0", "1 · seed 1", "The same seed"))

    visitor.click("button[role=tab]", "Reconstruct")
    (tmp_path / "text.png").write_text("hello")
    visitor.upload(tmp_path / "text.png")
    visitor.wait(lambda: "This file cannot be used: the file is in no image format" in visitor.text(".toast-body"))
    assert "Traceback" not in browser.page_source and str(tmp_path) not in browser.page_source

    visitor.click("button[aria-label=Clear]")
    visitor.upload(picture)
    visitor.wait(lambda: "PSNR" in visitor.text() and visitor.count(".picture img") == 3)
    assert "16 in a grid of 4×4" in visitor.text()

    assert requested_hosts(browser) <= LOCAL
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
