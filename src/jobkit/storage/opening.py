"""The storage that a URL names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from jobkit.errors import ConfigurationError
from jobkit.storage.base import Storage
from jobkit.storage.local import LocalStorage
from jobkit.storage.remote import BUCKETS, PROTOCOL, FsspecStorage

if TYPE_CHECKING:
    from collections.abc import Mapping


def open_storage(url: str | os.PathLike[str], options: Mapping[str, Any] | None) -> Storage:
    """The storage a URL names: a local folder for ``file://`` or a path, else an fsspec filesystem, which connects on
    first use.

    ``ConfigurationError`` for a URL that chains protocols, names a host or no folder, a protocol that fsspec does not
    know or whose package is missing, or options for a local folder.
    """
    text = os.fspath(url)
    if isinstance(url, str) and "::" in text:
        raise ConfigurationError(
            "a storage URL that chains protocols with '::' is refused: it could read from elsewhere"
        )
    match = PROTOCOL.match(text) if isinstance(url, str) else None
    protocol = match[1].lower() if match else "file"
    if protocol in ("file", "local"):
        if options:
            raise ConfigurationError(f"a local folder takes no storage options, got {', '.join(sorted(options))}")
        path = _local_path(text) if match else text
        if not path:
            raise ConfigurationError("a storage URL needs a folder: file:///srv/assets, or a path")
        return LocalStorage(Path(os.path.abspath(path)))
    if match and not match[2]:
        raise ConfigurationError(f"a storage URL begins with {protocol}://, or it is a path: pass a pathlib.Path")
    _require_driver(protocol)
    if protocol in BUCKETS and not text.partition("://")[2].strip("/"):
        raise ConfigurationError(f"storage {protocol}:// needs a bucket: {protocol}://bucket/prefix")
    return FsspecStorage(text, options or {})


def _local_path(url: str) -> str:
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        host = parts.netloc.rpartition("@")[2]  # without a password
        raise ConfigurationError(
            f"file://{host} names a host: an absolute folder has three slashes, a relative one is a plain path"
        )
    if parts.query or parts.fragment:
        raise ConfigurationError("a file:// URL must write '?' as %3F and '#' as %23")
    return unquote(parts.path)


def _require_driver(protocol: str) -> None:
    import fsspec

    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        raise ConfigurationError(f"storage {protocol}:// needs another package: {error}") from error
    except ValueError:
        raise ConfigurationError(f"storage {protocol}:// is not known to fsspec") from None
