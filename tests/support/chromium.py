"""Where a Chromium for the tests is. Needs the standard library only: ``.ci/dev.py`` asks before anything is installed.

Looked for in this order: ``JOBKIT_TEST_CHROMIUM``; the usual names on PATH; Chrome on a Mac; what ``playwright install
chromium`` has downloaded. With ``JOBKIT_TEST_NO_BROWSER=1`` nobody looks, and the tests that need one are left out.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ON_A_MAC = Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")
HELP = (
    "No Chromium for the tests that need a browser. One of these helps: apt-get install chromium, which "
    "`.ci/dev.py test` does by itself as root; any other Chromium or Chrome on PATH; JOBKIT_TEST_CHROMIUM set to the "
    "program; `python -m playwright install chromium`; or JOBKIT_TEST_NO_BROWSER=1 to leave these tests out."
)


def unwanted() -> bool:
    """Whether the user wants no test with a browser."""
    return os.environ.get("JOBKIT_TEST_NO_BROWSER") == "1"


def find() -> Path | None:
    """The program, or None. One that the user named is taken as it is, so that a wrong name is noticed."""
    if named := os.environ.get("JOBKIT_TEST_CHROMIUM"):
        return Path(named)
    for name in NAMES:
        if on_path := shutil.which(name):
            return Path(on_path)
    return next((path for path in [ON_A_MAC, *_downloaded()] if os.access(path, os.X_OK)), None)


def _downloaded() -> list[Path]:
    """Playwright's own, the newest first."""
    caches = [Path.home() / ".cache/ms-playwright", Path.home() / "Library/Caches/ms-playwright"]
    if chosen := os.environ.get("PLAYWRIGHT_BROWSERS_PATH"):
        caches.insert(0, Path(chosen))
    programs = ("chrome-linux*/chrome", "chrome-mac*/*.app/Contents/MacOS/*")
    found = [path for cache in caches for program in programs for path in cache.glob(f"chromium-*/{program}")]
    return sorted(found, key=lambda path: path.as_posix(), reverse=True)
