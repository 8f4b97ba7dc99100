"""Text from outside: input that a database cannot hold is refused, messages are made safe to store and print."""

from __future__ import annotations

import re

MAX_ERROR_CHARACTERS = 2_000

# C0 and C1 controls except tab and newline, bidirectional overrides and lone surrogates: PostgreSQL refuses NUL and
# surrogates, terminals obey the rest.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# The password of a URL; values whose names say that they are secret, in a query, a DSN or a printed dict. Each bounded,
# so that looking for them takes linear time.
_SECRETS = re.compile(
    r"(://[^\s/:@]{0,200}:)\S{1,500}(?=@)|((?:password|passwd|passphrase|secret|token|signature|credential)\w{0,40}"
    r"(?:=|['\"]: ?)['\"]?)[^\s&'\",;)}]{1,4000}",
    re.IGNORECASE,
)
# Everything that ends a line or that a terminal may obey; a file name is one line.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def storable(value: str, field: str, *, blank: bool = False, limit: int | None = None, controls: bool = True) -> str:
    """``value`` unchanged when both databases can hold it; ``ValueError`` naming ``field`` otherwise.

    Refused: NUL, lone surrogates, blank text unless ``blank``, more than ``limit`` characters, and unless ``controls``
    line ends and other control characters. Not a ``str``: ``TypeError``.
    """
    if not isinstance(value, str):
        raise TypeError(f"{field} must be text, not {type(value).__name__}")
    if "\0" in value:
        raise ValueError(f"{field} contains a NUL character")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{field} contains a lone surrogate") from None
    if not blank and not value.strip():
        raise ValueError(f"{field} is blank")
    if limit is not None and len(value) > limit:
        raise ValueError(f"{field} has {len(value)} characters, the limit is {limit}")
    if not controls and (control := _CONTROLS.search(value)):
        raise ValueError(f"{field} contains the control character {control.group()!a}")
    return value


def is_storable(value: str) -> bool:
    """Whether both databases can hold this text: a query for other text finds nothing."""
    try:
        storable(value, "text", blank=True)
    except ValueError:
        return False
    return True


def error_message(error: BaseException) -> str:
    """The message to store with a job that failed with ``error``: its text, or its class name when it has none.

    Never raises; at most 2,000 characters; no traceback; characters unsafe for a database or terminal are replaced, and
    passwords left out.
    """
    try:
        message = without_secrets(sanitise(str(error)))
    except BaseException:  # its __str__ raises: the failure is recorded all the same
        message = ""
    return message or sanitise(type.__dict__["__name__"].__get__(type(error)))


def sanitise(message: str) -> str:
    """``message`` with unsafe characters replaced by ``�``, cut to 2,000 characters."""
    cut = str.__getitem__(message, slice(MAX_ERROR_CHARACTERS + 1))  # plain text, whatever its class overrides
    cleaned = _UNSAFE.sub("\ufffd", cut.replace("\r\n", "\n")).strip()
    return cleaned if len(cleaned) <= MAX_ERROR_CHARACTERS else cleaned[: MAX_ERROR_CHARACTERS - 1] + "…"


def without_secrets(text: str) -> str:
    """``text`` without passwords of URLs, and without what is named as a secret; ``***`` in their place."""
    return _SECRETS.sub(lambda found: f"{found[1] or found[2]}***", text)


def printable(text: str) -> str:
    """``text`` as one line without control characters."""
    return _CONTROLS.sub("\ufffd", _UNSAFE.sub("\ufffd", text))
