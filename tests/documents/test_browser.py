"""The browser that other tests look through: real, quiet, and gone without a trace."""

from __future__ import annotations

import asyncio
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import chromium
from tests.support.browser import browser as a_browser
from tests.support.browser import page as a_page

PAGE = b"""<!doctype html><title>Hello</title><link rel=icon href="data:,"><button>Press</button><p></p>
<a href="/file" download="tea.txt">file</a>
<script>document.querySelector("button").onclick = () => document.querySelector("p").textContent = "pressed"</script>"""


class Pages(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = b"three teapots" if self.path == "/file" else PAGE
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


def test_a_page_is_opened_pressed_and_read_and_its_download_arrives(page: Any, url: str) -> None:
    page.goto(url)
    page.get_by_role("button", name="Press").click()
    page.get_by_text("pressed").wait_for()
    assert (page.title(), page.locator("p").inner_text()) == ("Hello", "pressed")
    with page.expect_download() as download:
        page.get_by_role("link").click()
    assert download.value.suggested_filename == "tea.txt"
    assert Path(download.value.path()).read_bytes() == b"three teapots"


def test_a_browser_leaves_asyncio_to_the_test(page: Any, url: str) -> None:
    page.goto(url)
    assert asyncio.run(asyncio.sleep(0, "free")) == "free"
    page.reload()


def test_a_handler_is_called_while_the_test_does_something_else(page: Any) -> None:
    heard = threading.Event()
    page.on("console", lambda message: heard.set())
    page.evaluate("setTimeout(() => console.log('later'), 50)")
    assert heard.wait(60)


def test_nothing_but_this_machine_is_ever_looked_up(page: Any) -> None:
    with pytest.raises(Exception, match="ERR_NAME_NOT_RESOLVED"):
        page.goto("http://example.com/")


def test_a_script_of_a_page_that_raises_fails_its_test(browser: Any) -> None:
    with pytest.raises(AssertionError, match="teapot"), a_page(browser) as page, page.expect_event("pageerror"):
        page.evaluate("setTimeout(() => { throw new Error('teapot') })")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"PATH": "", "HOME": "/nowhere"}, "apt-get install chromium"),
        ({"JOBKIT_TEST_CHROMIUM": "/no/such/program"}, "Found: /no/such/program"),
    ],
)
def test_without_a_browser_a_test_that_needs_one_fails_and_says_what_helps(
    settings: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("JOBKIT_TEST_CHROMIUM", "JOBKIT_TEST_NO_BROWSER", "PLAYWRIGHT_BROWSERS_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(chromium, "ON_A_MAC", Path("/nowhere"))
    with pytest.raises(RuntimeError, match=words), a_browser():
        pass


def test_who_wants_no_browser_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOBKIT_TEST_NO_BROWSER", "1")
    with pytest.raises(pytest.skip.Exception), a_browser():
        pass
