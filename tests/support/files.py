"""Files put and kept the way a host does, and what is then in the storage and in the tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import sqlalchemy as sa
from fsspec.implementations.memory import MemoryFileSystem
from sqlalchemy.orm import Session

from jobkit import Asset, AssetStore, StoredObject
from jobkit.tables import asset_intents, assets
from tests.support.s3 import server_of

COMPANY = "acme"


def put(store: AssetStore, body: Any = b"content", company: object = COMPANY, **options: Any) -> StoredObject:
    options = {"original_filename": "a.txt", "content_type": "text/plain", **options}
    return store.put_file(company, body=body, **options)


def keep(
    store: AssetStore, engine: sa.Engine, body: Any = b"content", company: object = COMPANY, **options: Any
) -> Asset:
    """Put a file and give it a row, committed."""
    stored = put(store, body, company)
    with Session(engine) as session, session.begin():
        return store.create(session, company, stored, **{"source_task_id": None, **options})


def objects(storage_url: str) -> dict[str, bytes]:
    """Every object in a storage, by key."""
    parts = urlsplit(storage_url)
    if parts.scheme == "memory":
        root = f"/{parts.netloc}/"
        held = {key: file.getvalue() for key, file in MemoryFileSystem.store.items() if key.startswith(root)}
        return {key.removeprefix(root): content for key, content in held.items()}
    if parts.scheme == "s3":
        server, prefix = server_of(storage_url)
        kept: dict[str, bytes] = server.objects(prefix)
        return kept
    folder = Path(unquote(parts.path))
    found = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {key.as_posix(): path.read_bytes() for key, path in found.items() if key.parts[0] != ".spool"}


def intents(engine: sa.Engine) -> dict[str, str]:
    """The state of every recorded key."""
    with engine.connect() as connection:
        rows = connection.execute(sa.select(asset_intents.c.object_key, asset_intents.c.state))
        return {row.object_key: row.state for row in rows}


def rows(engine: sa.Engine) -> list[Asset]:
    """Every asset, as committed."""
    with engine.connect() as connection:
        return [Asset(*row) for row in connection.execute(sa.select(assets).order_by(assets.c.id))]
