"""A real Chromium, headless, driven from plain tests.

Playwright wants an event loop. Its own synchronous wrapper runs one on the thread that calls, where every later
``asyncio.run`` of the test process is then refused; so the loop has a thread of its own here, and a ``Remote`` stands
for each of Playwright's objects: ``page.goto(url)`` in a test is ``await page.goto(url)`` over there. The loop runs
all the time: a handler that is given to ``page.on`` is called when something happens, on that thread.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.support import chromium

DEADLINE = 60.0
# Nothing but 127.0.0.1: no look-ups of Google's hosts, no updates, no lists of unsafe sites, no proxy.
QUIET = [
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic"),
    *("--disable-client-side-phishing-detection", "--disable-domain-reliability", "--disable-default-apps"),
    *("--disable-extensions", "--safebrowsing-disable-auto-update", "--metrics-recording-only", "--no-pings"),
    *("--no-first-run", "--no-default-browser-check", "--no-proxy-server", "--disable-gpu", "--disable-dev-shm-usage"),
    "--disable-features=OptimizationHints,MediaRouter,Translate,AutofillServerCommunication,CertificateTransparencyComponentUpdater",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
]


class Loop:
    """An event loop on a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tests-browser", daemon=True)
        self._thread.start()

    def call(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """What ``function`` returns over there, awaited if it can be."""

        async def run() -> Any:
            found = function(*arguments, **options)
            return await found if inspect.isawaitable(found) else found

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(2 * DEADLINE)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(DEADLINE)
        self._loop.close()


class Remote:
    """One of Playwright's objects on the thread of its loop: what it has is read and called there, and waited for."""

    def __init__(self, loop: Loop, target: Any) -> None:
        self._loop, self._target = loop, target

    def __getattr__(self, name: str) -> Any:
        found = self._loop.call(getattr, self._target, name)
        return self._call(found) if callable(found) and not _is_playwrights(found) else self._wrap(found)

    def __enter__(self) -> Any:
        return self._wrap(self._loop.call(self._target.__aenter__))

    def __exit__(self, *error: Any) -> None:
        self._loop.call(self._target.__aexit__, *error)

    def _call(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            given = [_unwrap(argument) for argument in arguments]
            return self._wrap(self._loop.call(method, *given, **{k: _unwrap(v) for k, v in options.items()}))

        return call

    def _wrap(self, found: Any) -> Any:
        if isinstance(found, list):
            return [self._wrap(item) for item in found]
        return Remote(self._loop, found) if _is_playwrights(found) else found


def _is_playwrights(found: Any) -> bool:
    return type(found).__module__.startswith("playwright.")


def _unwrap(argument: Any) -> Any:
    return argument._target if isinstance(argument, Remote) else argument


@contextmanager
def browser() -> Iterator[Any]:
    """A Chromium; its processes end with the block. A ``RuntimeError`` that says how to get one where there is none."""
    if chromium.unwanted():
        pytest.skip("JOBKIT_TEST_NO_BROWSER is set")
    program = chromium.find()
    if program is None or not os.access(program, os.X_OK):
        raise RuntimeError(f"{chromium.HELP} Found: {program or 'nothing'}")
    from playwright.async_api import async_playwright  # slow to import; most runs of a few tests need none

    loop = Loop()
    try:
        # A home of its own: nothing is read from the user's settings, nothing is left there.
        with tempfile.TemporaryDirectory(prefix="jobkit-browser-", ignore_cleanup_errors=True) as home:
            playwright = loop.call(async_playwright().start)
            try:
                home_is = dict.fromkeys(("HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"), home)
                launch = playwright.chromium.launch
                launched = loop.call(launch, executable_path=program, args=QUIET, env={**os.environ, **home_is})
                yield Remote(loop, launched)
                loop.call(launched.close)
            finally:
                loop.call(playwright.stop)
    finally:
        loop.close()


@contextmanager
def page(browser: Any) -> Iterator[Any]:
    """A page in a profile of its own. A script of the page that raises fails the test."""
    context = browser.new_context(viewport={"width": 900, "height": 640}, reduced_motion="reduce")
    context.set_default_timeout(DEADLINE * 1000)
    raised: list[str] = []
    try:
        opened = context.new_page()
        opened.on("pageerror", lambda error: raised.append(str(error)))
        yield opened
    finally:
        context.close()
    assert not raised, f"the page raised {raised}"
