"""``AsyncJobStore`` and ``AsyncAssetStore``: the methods of the stores, awaited."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session

from jobkit.assets.spool import CHUNK, Spool
from jobkit.assets.store import AssetStore
from jobkit.base.clock import Clock, utcnow
from jobkit.base.ids import CompanyId
from jobkit.base.loops import Serialized, in_thread
from jobkit.db.sqlite import refuse_deadlock
from jobkit.jobs.creation import MAX_INPUT_BYTES
from jobkit.jobs.store import JobStore
from jobkit.types import Asset

if TYPE_CHECKING:
    from jobkit.db.host import Host

AsyncHost = AsyncSession | async_scoped_session[AsyncSession] | AsyncConnection
P = ParamSpec("P")
T = TypeVar("T")


async def _run(session: AsyncHost, work: Callable[[Any], T]) -> T:
    """``work`` with the synchronous face of ``session``, on its connection and in its transaction."""
    if isinstance(session, async_scoped_session):
        session = session()
    if not isinstance(session, AsyncSession | AsyncConnection):
        raise TypeError(
            f"expected an AsyncSession, async_scoped_session or AsyncConnection, not {type(session).__name__}"
        )
    return await session.run_sync(work)


def _of_jobs(
    method: Callable[Concatenate[JobStore, P], T],
) -> Callable[Concatenate[AsyncJobStore, P], Coroutine[Any, Any, T]]:
    @functools.wraps(method)
    async def call(store: AsyncJobStore, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await _run(store._session, lambda session: method(store._jobs(session), *args, **kwargs))

    return _named(call, "AsyncJobStore")


def _of_rows(
    method: Callable[Concatenate[AssetStore, Host, P], T],
) -> Callable[Concatenate[AsyncAssetStore, AsyncHost, P], Coroutine[Any, Any, T]]:
    @functools.wraps(method)
    async def call(store: AsyncAssetStore, session: AsyncHost, *args: P.args, **kwargs: P.kwargs) -> T:
        return await _run(session, lambda host: method(store._assets, host, *args, **kwargs))

    return _named(call, "AsyncAssetStore")  # type: ignore[return-value]  # session may be named, and mypy cannot say so


def _of_bytes(
    method: Callable[Concatenate[AssetStore, P], T], *, records: bool = False
) -> Callable[Concatenate[AsyncAssetStore, P], Coroutine[Any, Any, T]]:
    """``records``: whether the method writes to the database of the store's engine."""

    @functools.wraps(method)
    async def call(store: AsyncAssetStore, /, *args: P.args, **kwargs: P.kwargs) -> T:
        if records:
            store._refuse_deadlock()
        return await in_thread(method, store._assets, *args, **kwargs)

    return _named(call, "AsyncAssetStore")


def _named(function: T, owner: str) -> T:
    function.__qualname__ = f"{owner}.{function.__name__}"  # type: ignore[attr-defined]
    function.__module__ = __name__
    return function


class AsyncJobStore:
    """``JobStore`` in the transaction of an ``AsyncSession``, ``async_scoped_session`` or ``AsyncConnection``: the same
    methods, awaited, with any driver.

    Never commits. One task at a time may use a session, and so its store.
    """

    def __init__(
        self, session: AsyncHost, *, max_input_bytes: int = MAX_INPUT_BYTES, notify: bool = True, clock: Clock = utcnow
    ) -> None:
        self._session = session
        self._jobs = functools.partial(JobStore, max_input_bytes=max_input_bytes, notify=notify, clock=clock)

    create = _of_jobs(JobStore.create)
    create_many = _of_jobs(JobStore.create_many)
    get_by_id = _of_jobs(JobStore.get_by_id)
    list_by_company = _of_jobs(JobStore.list_by_company)
    count_by_company = _of_jobs(JobStore.count_by_company)
    transition = _of_jobs(JobStore.transition)
    cancel = _of_jobs(JobStore.cancel)
    retry = _of_jobs(JobStore.retry)
    cancel_all = _of_jobs(JobStore.cancel_all)
    retry_all = _of_jobs(JobStore.retry_all)
    delete = _of_jobs(JobStore.delete)


class AsyncAssetStore:
    """``AssetStore`` for asynchronous hosts: methods on rows take the caller's ``AsyncSession``, those on bytes run in
    a thread.

    ``assets`` is the store that the runner has too. A task that is cancelled while a file is stored leaves the thread
    to its end; what it stored goes at a sweep.
    """

    def __init__(self, assets: AssetStore) -> None:
        if not isinstance(assets, AssetStore):
            raise TypeError(f"expected an AssetStore, not {type(assets).__name__}")
        self._assets = assets

    def __repr__(self) -> str:
        return f"AsyncAssetStore({self._assets!r})"

    @property
    def provider(self) -> str:
        """The name of this storage in ``assets.provider``."""
        return self._assets.provider

    create = _of_rows(AssetStore.create)
    get_by_id = _of_rows(AssetStore.get_by_id)
    list_by_job = _of_rows(AssetStore.list_by_job)
    list_by_company = _of_rows(AssetStore.list_by_company)
    delete = _of_rows(AssetStore.delete)

    open = _of_bytes(AssetStore.open)
    verify = _of_bytes(AssetStore.verify)
    url = _of_bytes(AssetStore.url)
    put_file = _of_bytes(AssetStore.put_file, records=True)
    collect_garbage = _of_bytes(AssetStore.collect_garbage, records=True)

    async def stream(self, asset: Asset, *, start: int | None = None, end: int | None = None) -> AsyncIterator[bytes]:
        """The bytes ``[start, end)`` in pieces, as ``open`` has them; the file is closed with the iterator."""
        file = await self.open(asset, start=start, end=end)
        reader = Serialized(file.close)
        try:
            while chunk := await reader.call(file.read, CHUNK):
                yield chunk
        finally:
            await reader.close()

    @asynccontextmanager
    async def writer(
        self, company_id: CompanyId, *, namespace: str = "generated", original_filename: str | None, content_type: str
    ) -> AsyncIterator[Spool]:
        """As ``AssetStore.writer``, with ``async with``. ``write`` is not awaited: it writes to a local file."""
        self._refuse_deadlock()
        made = self._assets.writer(
            company_id, namespace=namespace, original_filename=original_filename, content_type=content_type
        )
        out = await asyncio.to_thread(made.__enter__)
        try:
            yield out
            self._refuse_deadlock()  # the block may have written
        except BaseException as error:
            await Serialized(functools.partial(made.__exit__, type(error), error, error.__traceback__)).close()
            raise
        await Serialized(functools.partial(made.__exit__, None, None, None)).close()

    def _refuse_deadlock(self) -> None:
        engine = self._assets.engine
        if engine is not None:
            outside = "call this before the first write of the transaction, or after its end"
            refuse_deadlock(engine, "jobkit's own", outside, task=True)
