"""A draft: a file being made, with the key it will be published under."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from jobkit.ids import new_id
from jobkit.keys import object_key
from jobkit.spool import Spool
from jobkit.text import storable
from jobkit.types import StoredObject
from jobkit.uploads import Upload

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jobkit.storage import Storage

# RFC 9110 section 8.3.1: type "/" subtype, then parameters, which are only kept free of control characters.
_CONTENT_TYPE = re.compile(r"([A-Za-z0-9!#$%&'*+.^_`|~-]+/[A-Za-z0-9!#$%&'*+.^_`|~-]+)([ \t]*;[\t\x20-\x7e]*)?")


@dataclass(frozen=True, slots=True)
class Limit:
    """How many bytes a file may have, and who said so."""

    max_bytes: int | float
    source: str


class Draft:
    """One file on its way into a storage. Nothing of it is in the storage before ``publish``."""

    def __init__(
        self,
        storage: Storage,
        company_id: str,
        *,
        namespace: str,
        filename: str | None,
        content_type: str,
        limit: Limit,
        at: datetime,
    ) -> None:
        if filename is not None:
            storable(filename, "original_filename", blank=True, limit=1_024, controls=False)
        self.company_id = company_id
        self.filename = filename
        self.content_type = _checked_type(content_type)
        storable(namespace, "namespace", limit=255)
        unique = new_id()
        self.key = object_key(company_id, namespace, filename, unique=unique, at=at)
        self._storage = storage
        self.spool = Spool(
            storage.spool_folder(), unique.hex, filename=filename, limit=limit.max_bytes, limit_source=limit.source
        )

    def seal(self, *, recorded: bool) -> StoredObject:
        """What will be stored; the spool file is whole and closed. ``AssetEmpty`` or ``AssetTooLarge`` otherwise."""
        sha256 = self.spool.seal()
        self.spool.close()
        return StoredObject(
            provider=self._storage.provider,
            object_key=self.key,
            content_type=self.content_type,
            byte_size=self.spool.size,
            sha256=sha256,
            original_filename=self.filename,
            recorded=recorded,
        )

    def publish(self) -> None:
        """Store the sealed file under its key, durably; the spool file is gone afterwards, whatever happened."""
        for failure in publish([self]).values():
            raise failure

    def discard(self) -> None:
        """Remove the spool file. Nothing was published, or it stays to the sweep."""
        self.spool.discard()


def publish(drafts: Sequence[Draft]) -> dict[str, BaseException]:
    """Store sealed files of one storage, each durably under its key; those that were not, by their keys, with the
    reason. The spool files are gone afterwards, whatever happened.
    """
    stored = False
    try:
        uploads = [Upload(draft.spool.path, draft.key, draft.content_type) for draft in drafts]
        failures = drafts[0]._storage.publish(uploads)
        stored = True
    finally:
        for draft in drafts:
            if stored and draft.key not in failures:
                draft.spool.release()
            draft.discard()
    return failures


def _checked_type(content_type: str) -> str:
    cleaned = storable(content_type, "content_type", limit=255).strip()
    match = _CONTENT_TYPE.fullmatch(cleaned)
    if match is None:
        raise ValueError(f"content_type {cleaned!r:.80} is not a media type such as 'application/pdf'")
    return match[1].lower() + (match[2] or "")  # the value of a parameter may be one where case counts
