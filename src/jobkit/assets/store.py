"""AssetStore: objects in a storage, their rows in the caller's transaction."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar
from uuid import UUID

import sqlalchemy as sa

from jobkit.assets.intents import GarbageCollector, Intent, record_intents
from jobkit.assets.limits import LIMIT_SOURCE, MAX_GENERATED_ASSET_BYTES
from jobkit.assets.names import check_key, content_disposition
from jobkit.assets.spool import CHUNK, Limit, Spool, StagedFile
from jobkit.base.clock import Clock, seconds, utcnow
from jobkit.base.ids import ANY_COMPANY, CompanyId, CompanyScope, company_text, new_id, parse_id, require_company_id
from jobkit.base.text import storable
from jobkit.db.host import connection_of, has_asset_id, in_scope, of_company, page_size, sync_engine, writable
from jobkit.db.sqlite import refuse_deadlock
from jobkit.errors import AssetCorrupt, AssetError, AssetNotFound, ConfigurationError, JobNotFound
from jobkit.storage.base import byte_range
from jobkit.storage.opening import open_storage
from jobkit.tables import asset_intents, assets, content_jobs
from jobkit.tables import now as database_now
from jobkit.types import Asset, Body, GarbageReport, StoredObject

if TYPE_CHECKING:
    from jobkit.db.host import Host

logger = logging.getLogger("jobkit")
_c = assets.c
R = TypeVar("R")


class AssetStore:
    """Files in the storage that ``url`` names (any fsspec URL, or a folder), and their rows in SQL.

    ``engine``: the database where keys are recorded, each in a transaction of its own, before an object can exist; a
    ``Runner`` gives its own to a store that has none. ``provider``: the name of the storage in each row, by default
    ``local_disk`` for a folder, else the URL's protocol. ``max_bytes`` replaces ``MAX_GENERATED_ASSET_BYTES``.
    Threads may share a store.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        engine: sa.Engine | None = None,
        storage_options: Mapping[str, Any] | None = None,
        provider: str | None = None,
        max_bytes: int | None = None,
        clock: Clock = utcnow,
    ) -> None:
        self.storage = open_storage(url, storage_options)
        if provider is not None:
            self.storage.provider = storable(provider, "provider", limit=255)
        if max_bytes is not None and (isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 1):
            raise ValueError(f"max_bytes must be a count of bytes above zero, not {max_bytes!r}")
        self._limit = (
            Limit(MAX_GENERATED_ASSET_BYTES, LIMIT_SOURCE)
            if max_bytes is None
            else Limit(max_bytes, "AssetStore(max_bytes=)")
        )
        self._clock = clock
        self._warned = False
        self.engine: sa.Engine | None = None if engine is None else sync_engine(engine)

    def __repr__(self) -> str:
        return f"AssetStore({self.storage!r}, provider={self.provider!r})"

    @property
    def provider(self) -> str:
        """The name of this storage in ``assets.provider``."""
        return self.storage.provider

    def spool_folder(self) -> Path:
        """A private local folder for unfinished files. For runners."""
        return self.storage.spool_folder()

    def put_file(
        self,
        company_id: CompanyId,
        *,
        namespace: str = "generated",
        original_filename: str | None,
        content_type: str,
        body: Body,
    ) -> StoredObject:
        """Store ``body`` under a new key. The object is whole and durable when this returns; nothing is stored when
        it raises.

        Streams: memory stays flat at any size. ``AssetTooLarge``, ``AssetEmpty``; ``TypeError`` for a body that is
        not bytes; ``ValueError`` naming the field. The object is removed unless ``create`` gives it a row within a
        day. On SQLite, call it before the transaction of this thread has written (``ConfigurationError``).
        """
        with self.writer(
            company_id, namespace=namespace, original_filename=original_filename, content_type=content_type
        ) as out:
            out.fill(body)
        assert out.stored is not None
        return out.stored

    @contextlib.contextmanager
    def writer(
        self, company_id: CompanyId, *, namespace: str = "generated", original_filename: str | None, content_type: str
    ) -> Iterator[Spool]:
        """A seekable binary file to write into. It is stored when the ``with`` block ends, and then its ``stored`` is
        the ``StoredObject``.

        Nothing is stored when the block raises, or when the file is empty or too large.
        """
        self._refuse_deadlock()
        draft = self.draft(
            require_company_id(company_id), namespace=namespace, filename=original_filename, content_type=content_type
        )
        try:
            yield draft.spool
            engine = self.engine
            stored = draft.seal(recorded=engine is not None)
            self._record(draft, engine)
            draft.publish()
            draft.spool.stored = stored
        finally:
            draft.discard()

    def draft(self, company_id: str, *, namespace: str, filename: str | None, content_type: str) -> StagedFile:
        """A file to be written, with its new key; nothing is recorded or stored yet. For runners."""
        return StagedFile(
            self.storage,
            company_id,
            namespace=namespace,
            filename=filename,
            content_type=content_type,
            limit=self._limit,
            at=self._clock(),
        )

    def create(
        self,
        session: Host,
        company_id: CompanyId,
        stored: StoredObject,
        *,
        source_task_id: str | None,
        created_by_agent_id: object = None,
        created_by_user_id: object = None,
        job_id: UUID | str | None = None,
        position: int = 0,
    ) -> Asset:
        """Insert the row of a stored object, in the caller's transaction. An object without a row is removed later.

        ``AssetKeyRefused`` for another company's key; ``JobNotFound`` for another company's job; ``AssetNotFound`` when
        the object was already collected as garbage, or has a row.
        """
        owner = require_company_id(company_id)
        _check_stored(stored)
        check_key(owner, stored.object_key)
        _count(position, "position", most=2**31 - 1)
        if source_task_id is not None:
            storable(source_task_id, "source_task_id", blank=True)
        agent, user = _text(created_by_agent_id, "created_by_agent_id"), _text(created_by_user_id, "created_by_user_id")
        parent = parse_id(job_id)
        if job_id is not None and parent is None:
            raise ValueError(f"job_id is not a UUID: {job_id!r:.80}")
        connection = writable(session)
        if parent is not None:
            j = content_jobs.c
            if connection.execute(sa.select(j.company_id).where(j.id == parent)).scalar() not in (None, owner):
                raise JobNotFound(parent)
        self._take(connection, owner, stored)
        now = self._clock()
        asset = Asset(
            id=new_id(),
            company_id=owner,
            provider=stored.provider,
            object_key=stored.object_key,
            content_type=stored.content_type,
            byte_size=stored.byte_size,
            sha256=stored.sha256,
            original_filename=stored.original_filename,
            created_by_agent_id=agent,
            created_by_user_id=user,
            source_task_id=source_task_id,
            created_at=now,
            updated_at=now,
            job_id=parent,
            position=position,
        )
        connection.execute(assets.insert(), {column.name: getattr(asset, column.name) for column in assets.columns})
        return asset

    def get_by_id(self, session: Host, asset_id: UUID | str, *, company_id: CompanyScope = ANY_COMPANY) -> Asset | None:
        """The asset, or None: unknown, malformed, or not of the company that ``company_id`` names."""
        parsed, theirs = parse_id(asset_id), in_scope(_c.company_id, company_id)
        if parsed is None:
            return None
        connection = connection_of(session)
        query = sa.select(assets).where(has_asset_id(connection, parsed), theirs)
        row = connection.execute(query).one_or_none()
        return None if row is None else Asset(*row)

    def list_by_job(self, session: Host, job_id: UUID | str, *, company_id: CompanyScope = ANY_COMPANY) -> list[Asset]:
        """The files of a job, in the order its renderer gave them; the first is the job's result."""
        parsed, theirs = parse_id(job_id), in_scope(_c.company_id, company_id)
        if parsed is None:
            return []
        query = sa.select(assets).where(_c.job_id == parsed, theirs).order_by(_c.position, _c.id)
        return [Asset(*row) for row in connection_of(session).execute(query)]

    def list_by_company(
        self,
        session: Host,
        company_id: CompanyId,
        *,
        limit: int | None = None,
        before: Asset | UUID | str | None = None,
    ) -> list[Asset]:
        """A company's assets, newest first, ties broken by id. ``before``: the last asset of the previous page."""
        connection = connection_of(session)
        place = (_c.created_at, _sortable_id(connection))
        query = sa.select(assets).where(of_company(_c.company_id, company_id))
        if before is not None:
            last = before if isinstance(before, Asset) else self.get_by_id(session, before, company_id=company_id)
            if last is None or last.company_id != company_text(company_id):
                raise AssetNotFound(f"no asset {last.id if last else before}")
            after = (sa.literal(last.created_at, _c.created_at.type), sa.literal(last.id, _c.id.type))
            query = query.where(sa.tuple_(*place) < sa.tuple_(*after))
        query = query.order_by(*(column.desc() for column in place)).limit(page_size(limit))
        return [Asset(*row) for row in connection.execute(query)]

    def open(self, asset: Asset, *, start: int | None = None, end: int | None = None) -> BinaryIO:
        """The bytes ``[start, end)`` as a binary file, which the caller closes. Streamed. A range is cut to the asset.

        ``AssetCorrupt`` when the object is missing; ``AssetKeyRefused`` for a key that is not the company's.
        """
        self._check(asset)
        first = min(_place(start, "start", 0), asset.byte_size)
        last = min(_place(end, "end", asset.byte_size), asset.byte_size)
        return byte_range(self._open(asset), first, max(first, last))

    def verify(self, asset: Asset) -> None:
        """Read the whole object. ``AssetCorrupt`` when it is missing, or its size or sha256 is not the row's."""
        self._check(asset)
        digest, size = hashlib.sha256(), 0
        with self._open(asset) as file:
            # The object may be removed after it was opened: some storages find out only here.
            while chunk := self._found(asset, lambda: file.read(CHUNK)):
                digest.update(chunk)
                size += len(chunk)
        if size != asset.byte_size:
            raise AssetCorrupt(f"asset {asset.id} has {size} bytes in storage, its row says {asset.byte_size}")
        if digest.hexdigest() != asset.sha256:
            raise AssetCorrupt(f"asset {asset.id} has another sha256 in storage than in its row")

    def url(self, asset: Asset, *, expires_in: timedelta | float, disposition: str = "attachment") -> str:
        """A signed URL that gives anyone the bytes for ``expires_in`` (seconds or timedelta), without this process.
        S3 only; ``AssetUrlUnavailable`` elsewhere. Does not check that the object exists.

        The download has the asset's content type and file name. ``inline`` lets a browser show images, audio, video,
        PDF and plain text; other types stay attachments. S3 allows 7 days at most (``ValueError``).
        """
        self._check(asset)
        lifetime = seconds(expires_in, "expires_in")
        shown = content_disposition(disposition, asset.original_filename, asset.content_type)
        return self.storage.url(
            asset.object_key, expires_in=math.ceil(lifetime), content_type=asset.content_type, disposition=shown
        )

    def delete(self, session: Host, asset: Asset) -> None:
        """Delete the row and record its key as a tombstone, in the caller's transaction. A later garbage collection
        removes the object; a rollback keeps both. ``AssetNotFound`` when there is no such row.
        """
        _check_type(asset)
        connection = writable(session)
        # The key comes from the row: ``asset`` may have been altered.
        gone = connection.execute(
            assets.delete()
            .where(has_asset_id(connection, asset.id), of_company(_c.company_id, asset.company_id))
            .returning(_c.company_id, _c.provider, _c.object_key)
        ).one_or_none()
        if gone is None:
            raise AssetNotFound(f"no asset {asset.id}")
        tombstone = {**gone._mapping, "state": "tombstone", "not_before": database_now}
        connection.execute(asset_intents.insert().values(id=new_id(), **tombstone))

    def collect_garbage(
        self,
        *,
        older_than: timedelta | float = timedelta(hours=24),
        dry_run: bool = True,
        engine: sa.Engine | None = None,
        on_batch: Callable[[GarbageReport], object] | None = None,
    ) -> GarbageReport:
        """Remove objects without a row: those whose row was deleted, and those recorded ``older_than`` ago that never
        got one. With ``dry_run``, only report them.

        Reads the records of ``engine`` (default: the store's) for this store's provider; never lists the storage. A
        later call, a further ``older_than`` on, visits each key again and deletes its record, because a slow writer may
        store its object after the first visit. ``older_than`` must exceed the time from any file's record to its row: a
        file collected before that gets no row (``create`` raises ``AssetNotFound``, a job fails). An object that cannot
        be removed is tried again later.

        Unless ``dry_run``, unfinished files of dead processes are removed from this machine's disk too, and
        ``on_batch`` is called after each batch of keys with the report so far; what it raises ends the call.
        """
        grace = seconds(older_than, "older_than", positive=False)
        chosen = self.engine if engine is None else engine
        if chosen is None:
            raise ConfigurationError(f"{self!r} has no engine: pass collect_garbage(engine=) the one with its records")
        collector = GarbageCollector(chosen, self.storage, older_than=grace)
        return collector.preview() if dry_run else collector.run(on_batch)

    def _check(self, asset: Asset) -> None:
        """``AssetError`` for an asset of another storage, ``AssetKeyRefused`` for a key that is not its company's."""
        _check_type(asset)
        if asset.provider != self.provider:
            raise AssetError(f"asset {asset.id} is in storage {asset.provider!r}, this store is {self.provider!r}")
        check_key(asset.company_id, asset.object_key)

    def _open(self, asset: Asset) -> BinaryIO:
        return self._found(asset, lambda: self.storage.open(asset.object_key))

    def _found(self, asset: Asset, read: Callable[[], R]) -> R:
        try:
            return read()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise AssetCorrupt(f"asset {asset.id} has no object in storage {asset.provider!r}") from None

    def _record(self, draft: StagedFile, engine: sa.Engine | None) -> None:
        if engine is None:
            if not self._warned:
                logger.warning(
                    "%r has no engine: objects that a dying process leaves without a row are never removed", self
                )
            self._warned = True
            return
        self._refuse_deadlock()  # again: the block of writer() may have written SQL
        try:
            with engine.begin() as connection:
                record_intents(connection, [Intent(draft.company_id, self.provider, draft.key)])
        except sa.exc.TimeoutError as error:
            raise sa.exc.TimeoutError(
                f"{error}. Recording a file's key takes a connection beside the one of your transaction: call put_file "
                "before the transaction begins, or allow more connections by pool_size or max_overflow"
            ) from error

    def _take(self, connection: sa.Connection, owner: str, stored: StoredObject) -> None:
        """Delete the intent of an object that gets its row. ``AssetNotFound`` when it was collected or has a row."""
        if stored.recorded:
            i = asset_intents.c
            which = (i.provider == stored.provider, i.object_key == stored.object_key, i.state == "pending")
            free = connection.execute(asset_intents.delete().where(*which)).rowcount == 1
        else:
            taken = sa.select(_c.id).where(_c.company_id == owner, _c.object_key == stored.object_key)
            # A key whose asset was deleted has a tombstone, though no intent was recorded for it.
            given_up = sa.select(asset_intents.c.id).where(
                asset_intents.c.provider == stored.provider, asset_intents.c.object_key == stored.object_key
            )
            # Its tombstone may be gone too; a local folder tells at once whether the object is.
            there = stored.provider != self.provider or self.storage.size(stored.object_key) != 0
            free = there and connection.execute(taken.union_all(given_up)).first() is None
        if not free:
            raise AssetNotFound(f"{stored.object_key!r} was swept already, or has a row: store the file again")

    def _refuse_deadlock(self) -> None:
        if self.engine is not None:
            before = "call put_file before the first write of the transaction"
            refuse_deadlock(self.engine, "recording the file's key", before)


def _sortable_id(connection: sa.Connection) -> sa.ColumnElement[UUID]:
    if connection.dialect.name != "sqlite":
        return _c.id
    return sa.func.replace(sa.type_coerce(_c.id, sa.Text), "-", "", type_=_c.id.type)


def _text(value: object, field: str) -> str | None:
    return None if value is None else storable(str(value), field, blank=True)


def _check_stored(stored: StoredObject) -> None:
    """``ValueError`` or ``TypeError`` naming a field that no row can hold: hosts may make a StoredObject themselves."""
    if not isinstance(stored, StoredObject):
        raise TypeError(f"stored must be a StoredObject, not {type(stored).__name__}")
    for field in ("provider", "content_type", "sha256"):
        storable(getattr(stored, field), field)
    if stored.original_filename is not None:
        storable(stored.original_filename, "original_filename", blank=True)
    _count(stored.byte_size, "byte_size", most=2**63 - 1)


def _check_type(asset: object) -> None:
    if not isinstance(asset, Asset):
        raise TypeError(f"asset must be an Asset, not {type(asset).__name__}")


def _place(value: object, field: str, default: int) -> int:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{field} must be a number of bytes, not {type(value).__name__}")
    if value < 0:
        raise ValueError(f"{field} must not be negative, got {value}")
    return value


def _count(value: object, field: str, *, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise ValueError(f"{field} must be a count up to {most}, not {value!r:.80}")
