"""Downloads by a URL that the storage signed: for how long, as what, and nothing else."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Callable
from datetime import timedelta
from http.client import HTTPMessage
from typing import Any
from urllib.error import HTTPError
from urllib.parse import parse_qs, urlsplit
from urllib.request import urlopen

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st
from werkzeug.http import parse_options_header

import jobkit
from jobkit import AssetStore
from jobkit.assets.names import content_disposition
from tests.support.files import keep
from tests.support.runners import until
from tests.support.s3 import S3Server, options


@pytest.fixture(params=["moto", "rclone"])
def server(request: pytest.FixtureRequest) -> S3Server:
    found: S3Server = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def sqlite_engine(sqlite_database: Any) -> sa.Engine:
    engine: sa.Engine = sqlite_database.engine
    return engine


def store_on(server: S3Server, engine: sa.Engine) -> AssetStore:
    return AssetStore(f"s3://{server.bucket}/{uuid.uuid4()}", engine=engine, storage_options=options(server))


def fetch(url: str) -> tuple[int, HTTPMessage, bytes]:
    try:
        with urlopen(url, timeout=60) as answer:
            return answer.status, answer.headers, answer.read()
    except HTTPError as error:
        with error:
            return error.code, error.headers, error.read()


def test_a_url_gives_whoever_has_it_the_bytes_with_their_type_and_name(
    server: S3Server, sqlite_engine: sa.Engine
) -> None:
    store = store_on(server, sqlite_engine)
    asset = keep(store, sqlite_engine, b"%PDF-1.7 content")
    asset = dataclasses.replace(asset, content_type="application/pdf", original_filename='né "1".pdf')
    for disposition, expires_in in (("attachment", 60), ("inline", timedelta(minutes=1)), ("attachment", 0.5)):
        url = store.url(asset, expires_in=expires_in, disposition=disposition)
        query = parse_qs(urlsplit(url).query)
        assert query["X-Amz-Algorithm"] == ["AWS4-HMAC-SHA256"]
        assert query["X-Amz-Expires"] == ["1" if expires_in == 0.5 else "60"]
    url = store.url(asset, expires_in=60)
    status, headers, body = fetch(url)
    assert (status, body) == (200, b"%PDF-1.7 content")
    assert headers["Content-Type"] == "application/pdf"
    assert (
        headers["Content-Disposition"] == "attachment; filename=\"n_ _1_.pdf\"; filename*=UTF-8''n%C3%A9%20%221%22.pdf"
    )
    assert "secret" not in url.lower()


def test_a_url_that_was_changed_or_has_expired_is_refused(rclone: S3Server, sqlite_engine: sa.Engine) -> None:
    store = store_on(rclone, sqlite_engine)
    asset, other = keep(store, sqlite_engine, b"mine"), keep(store, sqlite_engine, b"not for everyone")
    url = store.url(asset, expires_in=60)
    assert fetch(url)[0] == 200
    changes: dict[str, Callable[[str], str]] = {
        "another object": lambda u: u.replace(asset.object_key, other.object_key),
        "a longer life": lambda u: u.replace("X-Amz-Expires=60", "X-Amz-Expires=600000"),
        "another type": lambda u: u.replace("text%2Fplain", "text%2Fhtml"),
        "shown, not kept": lambda u: u.replace("attachment", "inline"),
        "another signature": lambda u: u[:-1] + ("0" if u[-1] != "0" else "1"),
        "no signature": lambda u: u.partition("?")[0],
    }
    for what, change in changes.items():
        changed = change(url)
        assert changed != url, what
        status, _, body = fetch(changed)
        assert status in (400, 403), what
        assert b"not for everyone" not in body
        assert b"mine" not in body
    short = store.url(asset, expires_in=1)
    until(lambda: fetch(short)[0] in (400, 403), "the end of a URL of one second")
    assert fetch(url)[0] == 200


def test_a_url_is_made_without_asking_whether_the_object_is_there(moto: S3Server, sqlite_engine: sa.Engine) -> None:
    store = store_on(moto, sqlite_engine)
    asset = keep(store, sqlite_engine)
    store.storage.remove(asset.object_key)
    assert fetch(store.url(asset, expires_in=60))[0] in (403, 404)


def test_the_older_signature_is_not_used_even_with_a_config_of_the_hosts_own(
    moto: S3Server, sqlite_engine: sa.Engine
) -> None:
    for config in (None, {}, {"retries": {"max_attempts": 1}}):
        given = {**options(moto), "config_kwargs": config}
        store = AssetStore(f"s3://{moto.bucket}/x", engine=sqlite_engine, storage_options=given)
        assert "X-Amz-Signature=" in store.url(keep(store, sqlite_engine), expires_in=60)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"expires_in": 0}, ValueError, "expires_in must be above zero"),
        ({"expires_in": -1}, ValueError, "expires_in must be above zero"),
        ({"expires_in": timedelta()}, ValueError, "expires_in must be above zero"),
        ({"expires_in": float("nan")}, ValueError, "expires_in"),
        ({"expires_in": "60"}, TypeError, "expires_in"),
        ({"expires_in": None}, TypeError, "expires_in"),
        ({"expires_in": 60, "disposition": "Inline"}, ValueError, "disposition must be"),
        ({"expires_in": 60, "disposition": "attachment; x"}, ValueError, "disposition must be"),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused_on_every_storage(
    sqlite_engine: sa.Engine, storage_url: str, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    store = AssetStore(storage_url, engine=sqlite_engine)
    with pytest.raises(error, match=message):
        store.url(keep(store, sqlite_engine), **arguments)


def test_s3_signs_for_seven_days_and_not_a_second_more(moto: S3Server, sqlite_engine: sa.Engine) -> None:
    store = store_on(moto, sqlite_engine)
    asset = keep(store, sqlite_engine)
    assert "X-Amz-Expires=604800" in store.url(asset, expires_in=timedelta(days=7))
    for longer in (timedelta(days=7, seconds=1), 604_800.5, 1e300):
        with pytest.raises(ValueError, match="7 days"):
            store.url(asset, expires_in=longer)


def test_a_storage_without_urls_of_its_own_says_so(engine: sa.Engine, storage_url: str) -> None:
    store = AssetStore(storage_url, engine=engine)
    asset = keep(store, engine)
    if storage_url.startswith("s3"):
        assert fetch(store.url(asset, expires_in=60))[2] == b"content"
        return
    with pytest.raises(jobkit.AssetUrlUnavailable, match=f"'{store.provider}' has no URLs") as refused:
        store.url(asset, expires_in=60)
    assert isinstance(refused.value, jobkit.AssetError)


def test_no_url_is_made_for_another_companys_key_or_another_storage(moto: S3Server, sqlite_engine: sa.Engine) -> None:
    store = store_on(moto, sqlite_engine)
    asset = keep(store, sqlite_engine)
    for change, error in (
        ({"company_id": "beta"}, jobkit.AssetKeyRefused),
        ({"object_key": "acme/../beta/x"}, jobkit.AssetKeyRefused),
        ({"object_key": "acme/*"}, jobkit.AssetKeyRefused),
        ({"provider": "other"}, jobkit.AssetError),
    ):
        with pytest.raises(error):
            store.url(dataclasses.replace(asset, **change), expires_in=60)  # type: ignore[arg-type]


# --- the header


@pytest.mark.parametrize(
    ("filename", "expected"),
    [
        ("report.pdf", 'attachment; filename="report.pdf"'),
        ("two words.pdf", 'attachment; filename="two words.pdf"'),
        (None, "attachment"),
        ("", "attachment"),
        ("  ", "attachment"),
        ("..", "attachment"),
        ("/", "attachment"),
        ('a"; filename="b', "attachment; filename=\"a_; filename=_b\"; filename*=UTF-8''a%22%3B%20filename%3D%22b"),
        ("a\r\nSet-Cookie: x=1", 'attachment; filename="a_Set-Cookie: x=1"'),
        ("../../etc/passwd", 'attachment; filename="passwd"'),
        ("C:\\Windows\\cmd.exe", 'attachment; filename="cmd.exe"'),
        ("100%41.txt", "attachment; filename=\"100_41.txt\"; filename*=UTF-8''100%2541.txt"),
        ("naïve.txt", "attachment; filename=\"na_ve.txt\"; filename*=UTF-8''na%C3%AFve.txt"),
        ("日本.png", "attachment; filename=\"__.png\"; filename*=UTF-8''%E6%97%A5%E6%9C%AC.png"),
        ("invoice\u202efdp.exe", "attachment; filename=\"invoice_fdp.exe\""),
        (".bashrc", 'attachment; filename="bashrc"'),
        ("x" * 1000, f'attachment; filename="{"x" * 255}"'),
    ],
)  # fmt: skip
def test_a_file_name_in_a_header(filename: str | None, expected: str) -> None:
    assert content_disposition("attachment", filename, "text/plain").startswith(expected)


@given(st.text(max_size=400), st.sampled_from(["attachment", "inline"]))
def test_no_file_name_breaks_out_of_the_header(filename: str, disposition: str) -> None:
    header = content_disposition(disposition, filename, "image/png")
    assert all(" " <= character <= "~" for character in header)
    kind, parameters = parse_options_header(header)
    assert kind == disposition
    assert set(parameters) <= {"filename"}
    name = parameters.get("filename", "")
    assert not set(name) & set("/\\\r\n\0")
    assert name not in (".", "..")
    if filename.isalnum() and len(filename) < 256:
        assert name == filename


@pytest.mark.parametrize(
    ("content_type", "shown"),
    [
        ("image/png", True),
        ("IMAGE/PNG", True),
        ("application/pdf", True),
        ("text/plain; charset=utf-8", True),
        ("video/mp4", True),
        ("image/svg+xml", False),
        ("text/html", False),
        ("text/html;image/png", False),
        ("application/xhtml+xml", False),
        ("text/xml", False),
        ("text/javascript", False),
        ("application/octet-stream", False),
        ("nonsense", False),
    ],
)
def test_only_what_cannot_run_a_script_is_shown_in_place(content_type: str, shown: bool) -> None:
    assert content_disposition("inline", "a", content_type).startswith("inline" if shown else "attachment")
