"""Values of HTTP headers that are made of what users typed."""

from __future__ import annotations

import re
from urllib.parse import quote

from jobkit.text import sanitise

# What a browser shows by itself without running anything of it. HTML, SVG and XML are pages: they could run scripts.
_SHOWN = re.compile(r"(?:image/(?!svg)|audio/|video/)[\w.+-]+|application/pdf|text/plain", re.ASCII)
# RFC 8187 section 3.2.1: attr-char, without the letters and digits that quote() never escapes.
_ATTRIBUTE = "!#$&+-.^_`|~"


def content_disposition(disposition: str, filename: str | None, content_type: str) -> str:
    """A Content-Disposition by RFC 6266: the name in plain ASCII for old clients, then exactly, by RFC 8187.

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
    # No quote, backslash or percent sign: clients disagree about what these mean within quotes.
    plain = re.sub(r'[^\x20-\x7e]|["\\%]', "_", name)
    exact = "" if plain == name else f"; filename*=UTF-8''{quote(name, safe=_ATTRIBUTE)}"
    return f'{disposition}; filename="{plain}"{exact}'


def _last_segment(filename: str) -> str:
    # A client may take what is before a slash for a folder.
    name = re.split(r"[/\\]", filename)[-1]
    return re.sub(r"[\t\n\ufffd]", "_", sanitise(name))[:255].strip(" .")
