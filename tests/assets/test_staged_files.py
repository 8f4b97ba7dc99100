"""A draft is checked before a byte of it is written, and is in the storage only once it is published."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from jobkit.assets.spool import Limit, StagedFile
from jobkit.storage.local import LocalStorage

LIMIT = Limit(100, "a test")


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path)


@pytest.fixture
def draft(storage: LocalStorage) -> Callable[..., StagedFile]:
    def draft(**changes: Any) -> StagedFile:
        values = {"namespace": "generated", "filename": "a.txt", "content_type": "text/plain", **changes}
        return StagedFile(storage, "acme", limit=LIMIT, at=datetime(2026, 1, 2, tzinfo=UTC), **values)

    return draft


def files(storage: LocalStorage) -> list[Path]:
    return [path for path in storage.root.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("text/plain", "text/plain"),
        (" Text/PLAIN ", "text/plain"),
        ("Text/CSV; charset=UTF-8", "text/csv; charset=UTF-8"),
        ("multipart/mixed; boundary=AbC", "multipart/mixed; boundary=AbC"),
        ("text/plain \t;\tx=1", "text/plain \t;\tx=1"),
        ("text/csv; charset=utf-8", "text/csv; charset=utf-8"),
        ("image/svg+xml", "image/svg+xml"),
        ("application/vnd.openxmlformats-officedocument.wordprocessingml.document",) * 2,
    ],
)
def test_a_content_type_is_trimmed_and_its_type_lowered(
    draft: Callable[..., StagedFile], given: str, kept: str
) -> None:
    made = draft(content_type=given)
    assert made.content_type == kept
    made.discard()


@pytest.mark.parametrize(
    ("change", "error", "field"),
    [
        ({"content_type": ""}, ValueError, "content_type is blank"),
        ({"content_type": "pdf"}, ValueError, "content_type"),
        ({"content_type": "text/"}, ValueError, "content_type"),
        ({"content_type": "text/plain\r\nX-Evil: 1"}, ValueError, "content_type"),
        ({"content_type": "text/plain\r\n; x=1"}, ValueError, "content_type"),
        ({"content_type": "text/plain\x0b;x"}, ValueError, "content_type"),
        ({"content_type": "text/plain\u2028;x"}, ValueError, "content_type"),
        ({"content_type": "text/\u212aml"}, ValueError, "content_type"),
        ({"content_type": "text/plain; x=\x01"}, ValueError, "content_type"),
        ({"content_type": "tëxt/plain"}, ValueError, "content_type"),
        ({"content_type": "a/" + "b" * 300}, ValueError, "content_type has"),
        ({"content_type": None}, TypeError, "content_type must be text"),
        ({"content_type": b"text/plain"}, TypeError, "content_type must be text"),
        ({"filename": "a\0b"}, ValueError, "original_filename contains a NUL"),
        ({"filename": "a\ud800"}, ValueError, "original_filename contains a lone surrogate"),
        ({"filename": "a\r\nX-Evil: 1"}, ValueError, r"original_filename contains the control character '\\r'"),
        ({"filename": "a\x1b[31m"}, ValueError, "original_filename contains the control character"),
        ({"filename": "a\u2028b"}, ValueError, "original_filename contains the control character"),
        ({"filename": "x" * 1_025}, ValueError, "original_filename has 1025"),
        ({"filename": 7}, TypeError, "original_filename must be text"),
        ({"filename": Path("a.txt")}, TypeError, "original_filename must be text"),
        ({"namespace": " "}, ValueError, "namespace is blank"),
        ({"namespace": "a\0"}, ValueError, "namespace contains a NUL"),
        ({"namespace": "x" * 256}, ValueError, "namespace has 256"),
        ({"namespace": None}, TypeError, "namespace must be text"),
    ],
)
def test_what_cannot_be_stored_is_refused_by_name_before_a_file_exists(
    draft: Callable[..., StagedFile], storage: LocalStorage, change: dict[str, Any], error: type[Exception], field: str
) -> None:
    with pytest.raises(error, match=field):
        draft(**change)
    assert files(storage) == []


def test_nothing_is_under_the_key_before_publish_and_nothing_is_spooled_after(
    draft: Callable[..., StagedFile], storage: LocalStorage
) -> None:
    made = draft()
    made.spool.write(b"whole")
    stored = made.seal(recorded=True)
    assert files(storage) == [made.spool.path]
    made.publish()
    assert files(storage) == [storage.root / stored.object_key]
    assert (storage.root / stored.object_key).read_bytes() == b"whole"


def test_a_sealed_draft_takes_no_more_bytes(draft: Callable[..., StagedFile]) -> None:
    made = draft()
    made.spool.write(b"whole")
    made.seal(recorded=True)
    with pytest.raises(ValueError, match="closed"):
        made.spool.write(b"more")
    made.discard()


def test_the_spool_file_is_gone_when_publishing_fails(draft: Callable[..., StagedFile], storage: LocalStorage) -> None:
    made = draft()
    made.spool.write(b"whole")
    made.seal(recorded=True)
    (storage.root / "acme").write_text("a file where the company's folder should be")
    with pytest.raises(OSError, match="acme"):
        made.publish()
    assert files(storage) == [storage.root / "acme"]


def test_drafts_of_the_same_name_have_different_keys(draft: Callable[..., StagedFile]) -> None:
    made = [draft(filename="same.txt") for _ in range(50)]
    assert len({one.key for one in made}) == 50
    for one in made:
        one.discard()
