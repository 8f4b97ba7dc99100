"""Event streams in a real browser, whose connection goes down and comes back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

import jobkit
from jobkit import JobStore
from jobkit.tables import content_job_events
from tests.support.proxy import Proxy
from tests.support.runners import until
from tests.support.sse import Site, served_by_wsgi

PAGE = """<!doctype html><title>Events</title><link rel=icon href="data:,"><ul></ul><script>
const seen = new Set(), source = new EventSource("/STREAM");
let errors = 0, raw = 0, resyncs = 0;
source.onmessage = message => {
  const event = JSON.parse(message.data), item = document.createElement("li");
  raw += 1;
  if (seen.has(event.id)) return;
  seen.add(event.id);
  item.textContent = event.id + " " + event.type;
  document.querySelector("ul").append(item);
};
source.onerror = () => errors += 1;
source.addEventListener("resync", () => resyncs += 1);
END
</script>"""
END = 'source.addEventListener("end", () => source.close());'
CONNECTING, OPEN, CLOSED = 0, 1, 2


class Pages(Site):
    """``/page/...`` shows the stream of the same path; ``/patient/...`` does not know of an ``end``."""

    def wsgi(self, environ: dict[str, Any], start_response: Callable[..., object]) -> Any:
        _, kind, path = environ["PATH_INFO"].split("/", 2) if environ["PATH_INFO"].count("/") > 1 else ("", "", "")
        if kind not in ("page", "patient"):
            return super().wsgi(environ, start_response)
        page = PAGE.replace("STREAM", path).replace("END", END if kind == "page" else "").encode()
        start_response("200 Fine", [("Content-Type", "text/html"), ("Content-Length", str(len(page)))])
        return [page]


@pytest.fixture
def site(engine: sa.Engine) -> Iterator[Pages]:
    with served_by_wsgi(Pages(engine)) as site:
        site.options = {"retry": 0.05, "keep_alive": 0.5}
        yield site  # type: ignore[misc]


def move(engine: sa.Engine, job: jobkit.Job, *statuses: str) -> None:
    for status in statuses:
        with Session(engine) as session, session.begin():
            JobStore(session).transition(job.id, status=status)


def log(engine: sa.Engine) -> list[str]:
    c = content_job_events.c
    with engine.connect() as connection:
        found = connection.execute(sa.select(c.id, c.type).where(c.company_id == "acme").order_by(c.id))
        return [f"{row.id} {row.type}" for row in found]


def shown(page: Any) -> list[str]:
    found: list[str] = page.evaluate("[...document.querySelectorAll('li')].map(item => item.textContent)")
    return found


def reads(page: Any) -> bool:
    return bool(page.evaluate("source.readyState") == OPEN)


def test_a_page_shows_every_event_once_although_its_connection_was_down(
    page: Any, site: Pages, engine: sa.Engine, create: Callable[..., jobkit.Job]
) -> None:
    with Proxy("127.0.0.1", site.port) as proxy:
        page.goto(f"http://127.0.0.1:{proxy.port}/page/acme")
        until(lambda: reads(page), "an open stream", 60)
        job = create()
        until(lambda: len(shown(page)) == 1, "the first event", 60)
    # Nobody listens there now.
    until(lambda: page.evaluate("errors") >= 3, "refused attempts", 60)
    assert page.evaluate("source.readyState") == CONNECTING
    move(engine, job, "running", "done")
    for _ in range(30):
        move(engine, create(), "running", "done")
        create(company_id="other")
    assert len(shown(page)) == 1
    with Proxy("127.0.0.1", site.port, listen=proxy.port):
        until(lambda: len(shown(page)) >= 93, "every event", 60)
        move(engine, create(), "running")
        until(lambda: len(shown(page)) >= 95, "further events", 60)
        assert sorted(shown(page)) == sorted(log(engine))
        assert page.evaluate("resyncs") == 0
        page.close()


@pytest.mark.parametrize("kind", ["page", "patient"])
def test_a_page_of_a_job_misses_nothing_and_stops_when_it_is_over(
    kind: str, page: Any, site: Pages, engine: sa.Engine, create: Callable[..., jobkit.Job]
) -> None:
    job = create()
    with Proxy("127.0.0.1", site.port) as proxy:
        page.goto(f"http://127.0.0.1:{proxy.port}/{kind}/acme/{job.id}")
        until(lambda: len(shown(page)) == 1, "the state", 60)
    until(lambda: page.evaluate("errors") >= 3, "refused attempts", 60)
    move(engine, job, "running", "queued", "running", "failed")
    with Proxy("127.0.0.1", site.port, listen=proxy.port):
        until(lambda: page.evaluate("source.readyState") == CLOSED, "the end", 60)
        assert shown(page) == log(engine)
        assert page.evaluate("[raw, resyncs]") == [5, 0]
        opened = site.opened
        assert opened == (2 if kind == "page" else 3)
