"""The state that a test process inherits, set to known values however the run was started.

``.ci/dev.py`` calls ``settle`` before it starts anything, and ``tests/conftest.py`` before it imports anything, for
those who start pytest themselves. Children of the tests inherit what it leaves. SIGHUP stays as it was, so that a run
under ``nohup`` outlives its terminal; no test sends it.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress

UMASK = 0o022
LANGUAGE, ZONE = "C.UTF-8", "UTC"
# Python ignores the first two itself, and ``subprocess`` restores them for its children.
KEPT_SIGNALS = {"SIGPIPE", "SIGXFSZ", "SIGHUP"}
# Variables that change what jobkit, its libraries, or programs that the tests start do: dropped by name or prefix. Not
# ``PYTHONPATH``: the board puts a package with a bug in it there.
DROPPED = {
    "CI", "COLUMNS", "LINES", "LANGUAGE", "SOURCE_DATE_EPOCH", "WEB_CONCURRENCY", "PYTEST_ADDOPTS", "PYTEST_PLUGINS",
    "DATABASE_URL", "ASSETS_URL", "SHOP_DATABASE_URL", "APP_DATABASE", "FORWARDED_ALLOW_IPS", "LD_PRELOAD",
}  # fmt: skip
DROPPED_PREFIXES = (
    "LC_",
    "PYTHON",
    "PG",
    "AWS_",
    "FLASK_",
    "WERKZEUG_",
    "UVICORN_",
    "FSSPEC_",
    "JOBKIT_",
    "PAPERCLIP_",
)
KEPT, KEPT_PREFIXES = {"PYTHONPATH", "PYTHONHOME", "PYTHONPYCACHEPREFIX"}, ("JOBKIT_TEST_",)
PROXIES = {f"{name}_PROXY" for name in ("HTTP", "HTTPS", "FTP", "ALL", "NO")}
# Dropped once pytest has read them for its own output.
COLOURS = ("NO_COLOR", "FORCE_COLOR", "PY_COLORS", "CLICOLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE")


def settle() -> None:
    """Signal dispositions and mask, umask, locale, time zone and environment are then what the tests expect."""
    _open_closed_descriptors()
    os.umask(UMASK)
    for name in list(os.environ):
        if _dropped(name):
            del os.environ[name]
    os.environ.update(LANG=LANGUAGE, TZ=ZONE)
    time.tzset()
    if threading.current_thread() is threading.main_thread():
        _restore_signals()


def settle_colours() -> None:
    """No child of a test is told to colour its output, or not to."""
    for name in COLOURS:
        os.environ.pop(name, None)


def _dropped(name: str) -> bool:
    if name in KEPT or name.startswith(KEPT_PREFIXES):
        return False
    return name in DROPPED or name.upper() in PROXIES or name.startswith(DROPPED_PREFIXES)


def _restore_signals() -> None:
    """What was ignored, as a shell has SIGINT in the background, has its default again; nothing is blocked."""
    for number in signal.valid_signals():
        if getattr(number, "name", "") in KEPT_SIGNALS or signal.getsignal(number) is not signal.SIG_IGN:
            continue
        with suppress(OSError):  # two have no disposition
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _open_closed_descriptors() -> None:
    """A file that is opened later must not become the standard input, output or error of a child."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest that is free, which is this one


def hear_hang_ups() -> None:
    """As ``preexec_fn``: the child hears SIGHUP, also when this run was started so that it does not."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
