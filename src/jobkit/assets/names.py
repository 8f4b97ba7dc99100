"""Object keys, each used only once; the check of keys before a storage sees them; file names in HTTP headers.

A key is ``{company}/{namespace}/YYYY/MM/DD/{uuid}-{stem}{ext}``. Text of users appears only as a sanitised stem.
"""

from __future__ import annotations

import hashlib
import re
from datetime import UTC, datetime
from functools import lru_cache
from posixpath import basename, splitext
from urllib.parse import quote
from uuid import UUID

from jobkit.base.text import sanitise
from jobkit.errors import AssetKeyRefused

MAX_KEY_BYTES = 1_000

_OUTSIDE = re.compile(r"[^A-Za-z0-9._-]+")
_RUNS = re.compile(r"__+")
_DOTS = re.compile(r"\.\.+")
_PLAIN_COMPANY = re.compile(r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*")
_SEGMENT = re.compile(r"[A-Za-z0-9_~-](?:[A-Za-z0-9._~-]*[A-Za-z0-9_~-])?")
# Names that Windows gives to devices, whatever their extension.
_DEVICES = re.compile(r"(?:con|prn|aux|nul|com[0-9]|lpt[0-9])(?:\..*)?", re.IGNORECASE)


def company_prefix(company_id: str) -> str:
    """The first segment of every key of a company, different for different companies.

    Plain ids stay readable; any other id becomes ``~`` and 160 bits of its SHA-256, which no plain id can be. Where a
    file system ignores case, ids that differ only in case share a folder; never an object, whose name has a UUID.
    """
    if len(company_id) <= 64 and _PLAIN_COMPANY.fullmatch(company_id) and not _DEVICES.fullmatch(company_id):
        return company_id
    return "~" + hashlib.sha256(company_id.encode(errors="surrogatepass")).hexdigest()[:40]


def object_key(company_id: str, namespace: str, filename: str | None, *, unique: UUID, at: datetime) -> str:
    """A new key. ``at`` is an aware time, of which the day in UTC is taken; ``unique`` must never have been used."""
    stem, extension = _split(filename)
    folder = "/".join([company_prefix(company_id), _namespace(namespace), f"{at.astimezone(UTC):%Y/%m/%d}"])
    return f"{folder}/{unique}-{stem}{extension}"


def safe_filename(filename: str | None) -> str:
    """``filename`` sanitised as in keys: a single name that stays in its folder on every file system."""
    name = "".join(_split(filename))
    return f"_{name}" if _DEVICES.fullmatch(name) else name


def check_key(company_id: str, key: str) -> None:
    """``AssetKeyRefused`` unless ``key`` can be the key of an object of this company.

    The same on every backend: relative, no ``.`` or ``..`` segment, no backslash, NUL, glob or control character.
    """
    if not isinstance(key, str) or len(key) > MAX_KEY_BYTES:
        raise AssetKeyRefused(f"object key {key!r:.80} is not a key of jobkit")
    segments = key.split("/")
    if len(segments) < 2 or not all(_SEGMENT.fullmatch(segment) for segment in segments) or ".." in key:
        raise AssetKeyRefused(f"object key {key!r:.80} is not a key of jobkit")
    if segments[0] != company_prefix(company_id):
        raise AssetKeyRefused(f"object key {key!r:.80} does not belong to company {company_id!r:.80}")


def _sanitise(text: str) -> str:
    cleaned = _DOTS.sub(".", _RUNS.sub("_", _OUTSIDE.sub("_", text.strip()))).strip("_.")
    return cleaned[:120].strip("_.") or "file"


@lru_cache(maxsize=128)
def _namespace(namespace: str) -> str:
    parts = [_sanitise(part) for part in namespace.split("/") if part.strip()]
    return "/".join(part if not _DEVICES.fullmatch(part) else f"_{part}" for part in parts[:8]) or "misc"


@lru_cache(maxsize=128)
def _split(filename: str | None) -> tuple[str, str]:
    name = basename((filename or "").replace("\\", "/").rstrip("/")).strip()
    stem, extension = splitext(name)
    extension = re.sub(r"[^a-z0-9.]", "", extension.lower())[:16]
    return _sanitise(stem), extension if len(extension) > 1 else ""


# Types that a browser shows without running scripts. HTML, SVG and XML may contain scripts.
_SHOWN = re.compile(r"(?:image/(?!svg)|audio/|video/)[\w.+-]+|application/pdf|text/plain", re.ASCII)
# attr-char of RFC 8187 section 3.2.1, without letters and digits, which quote() never escapes.
_ATTRIBUTE = "!#$&+-.^_`|~"


def content_disposition(disposition: str, filename: str | None, content_type: str) -> str:
    """A Content-Disposition header (RFC 6266): the name in ASCII for old clients, then exactly (RFC 8187).

    ``inline`` becomes ``attachment`` for a type that a browser would run as a page. ``ValueError`` for any other
    ``disposition``.
    """
    if disposition not in ("attachment", "inline"):
        raise ValueError(f"disposition must be 'attachment' or 'inline', not {disposition!r:.80}")
    if not _SHOWN.fullmatch(content_type.partition(";")[0].strip().lower()):
        disposition = "attachment"
    name = _last_segment(filename or "")
    if not name:
        return disposition
    # No quote, backslash or percent sign: clients read them differently within quotes.
    plain = re.sub(r'[^\x20-\x7e]|["\\%]', "_", name)
    exact = "" if plain == name else f"; filename*=UTF-8''{quote(name, safe=_ATTRIBUTE)}"
    return f'{disposition}; filename="{plain}"{exact}'


def _last_segment(filename: str) -> str:
    # A client may take the part before a slash for a folder.
    name = re.split(r"[/\\]", filename)[-1]
    return re.sub(r"[\t\n\ufffd]", "_", sanitise(name))[:255].strip(" .")
