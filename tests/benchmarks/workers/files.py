"""The files of the workers that are compared: what is in them, and how one writes them by hand."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from time import time_ns
from typing import NamedTuple


class ClaimedRow(NamedTuple):
    """A job that this worker holds."""

    job_id: uuid.UUID
    company_id: str
    number: int
    fence: int


class File(NamedTuple):
    """A file on its way: written and hashed, open, not yet under its key."""

    job: ClaimedRow
    asset_id: uuid.UUID
    key: str
    sha256: str
    size: int
    descriptor: int
    temporary: Path
    path: Path


def content(number: int) -> bytes:
    """The file of a job: 1 KiB that no other job has."""
    return f"{number:>1024}".encode()


def new_id() -> uuid.UUID:
    """A UUID of version 7, which indexes take at their end."""
    rest = int.from_bytes(os.urandom(10)) & ~(0xF << 76) & ~(0b11 << 62)
    return uuid.UUID(int=(time_ns() // 1_000_000 << 80) | (7 << 76) | (0b10 << 62) | rest)


def write(root: Path, job: ClaimedRow) -> File:
    """Write a job's file under another name into the folder it will be in, and leave it open."""
    key = f"{job.company_id}/generated/{datetime.now(UTC):%Y/%m/%d}/{new_id()}-note.txt"
    path, body = root / key, content(job.number)
    temporary = path.with_name(f".{path.name}.part")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        descriptor = os.open(temporary, flags, 0o600)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(temporary, flags, 0o600)
    digest = hashlib.sha256(body)
    os.write(descriptor, body)
    return File(job, new_id(), key, digest.hexdigest(), len(body), descriptor, temporary, path)


def publish(files: Sequence[File]) -> None:
    """Flush each file and give it its name, then flush the folders, each once."""
    for file in files:
        os.fsync(file.descriptor)
        os.close(file.descriptor)
        os.rename(file.temporary, file.path)
    for folder in {file.path.parent for file in files}:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        os.fsync(descriptor)
        os.close(descriptor)
