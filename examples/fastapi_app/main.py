"""The web side: orders, live pages, downloads.

Every worker process serves and renders; a job is rendered by one of them. With RENDER=0 the workers only serve, and
``jobkit work --app examples.fastapi_app.rendering:runner`` renders, in as many processes as you like.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path as FilePath
from typing import Annotated, Any
from urllib.parse import quote

import sqlalchemy as sa
from fastapi import Body, Cookie, Depends, FastAPI, Header, HTTPException, Path, Request, Response
from fastapi.responses import HTMLResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from fastapi.templating import Jinja2Templates
from pydantic import BaseModel, Field, StringConstraints

from jobkit import Job, sse
from jobkit.aio import AsyncAssetStore, AsyncJobStore
from jobkit.tables import content_jobs

from .database import Report, engine, migrate, new_session, requests
from .rendering import JOB_TYPE, assets, runner

HERE = FilePath(__file__).parent
files = AsyncAssetStore(assets)
pages = Jinja2Templates(HERE / "templates")


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    sse.end_on_signals()  # else Ctrl-C and a reload wait until the last page is closed
    await asyncio.to_thread(migrate)
    if os.environ.get("RENDER", "1") != "0":
        await asyncio.to_thread(runner.start)
    yield
    # Jobs that have not ended by then go back into the queue.
    await asyncio.to_thread(runner.stop, 3)
    await requests.dispose()
    engine.dispose()


app = FastAPI(title="Branch reports", lifespan=lifespan)
app.mount("/static", StaticFiles(directory=HERE / "static"), name="static")


# --- the company and the report of a request


async def current_company(company: Annotated[str, Cookie(max_length=100)] = "acme") -> str:
    """The cookie's company, unchecked. Yours is the company of the user who is logged in."""
    return company


Company = Annotated[str, Depends(current_company)]


async def report_and_job(report_id: Annotated[int, Path(lt=2**31)], company: Company) -> tuple[Report, Job]:
    """Both rows; 404 for another company's. The session is closed before a stream begins, which may last for hours."""
    async with new_session() as session:
        report = await session.scalar(sa.select(Report).where(Report.id == report_id, Report.company == company))
        job = report and await AsyncJobStore(session).get_by_id(report.job_id, company_id=company)
    if not report or not job:
        raise HTTPException(404)
    return report, job


Found = Annotated[tuple[Report, Job], Depends(report_and_job)]


# --- orders


Line = Annotated[
    str, StringConstraints(strip_whitespace=True, min_length=1, max_length=80, pattern=r"^[^\x00-\x1f/\\]+$")
]


class Order(BaseModel):
    title: Line
    branches: Annotated[list[Line], Field(min_length=1, max_length=50)]


@app.post("/reports", status_code=201)
async def create_report(order: Order, company: Company, response: Response) -> dict[str, Any]:
    """Create the report and its job in one transaction: both, or neither."""
    try:
        async with new_session() as session, session.begin():
            job = await AsyncJobStore(session).create(company, job_type=JOB_TYPE, input=order.model_dump())
            report = Report(company=company, title=order.title, job_id=job.id)
            session.add(report)
    except sa.exc.IntegrityError:
        raise HTTPException(409, f"There is a report “{order.title}” already.") from None
    runner.dispatch(job)  # returns at once; does nothing more if this process renders nothing
    response.headers["Location"] = app.url_path_for("show_report", report_id=report.id)
    return {"id": report.id, "job_id": job.id}


@app.post("/reports/{report_id}/cancel")
async def cancel_report(found: Found, company: Company) -> dict[str, Any]:
    """Cancel a queued job at once, ask a running one to stop; its page receives the event."""
    async with new_session() as session, session.begin():
        job = await AsyncJobStore(session).cancel(found[1].id, company_id=company)
    return {"status": job.status}


# --- pages


@app.get("/", response_class=HTMLResponse)
async def index(request: Request, company: Company) -> Response:
    # The job's row is in the same database, so its status is one join away.
    query = (
        sa.select(Report.id, Report.title, content_jobs.c.status)
        .join(content_jobs, content_jobs.c.id == Report.job_id)
        .where(Report.company == company)
        .order_by(Report.id.desc())
    )
    async with new_session() as session:
        reports = (await session.execute(query)).all()
    return pages.TemplateResponse(request, "index.html", {"company": company, "reports": reports})


@app.get("/reports/{report_id}", response_class=HTMLResponse)
async def show_report(request: Request, company: Company, found: Found) -> Response:
    report, job = found
    return pages.TemplateResponse(request, "report.html", {"company": company, "report": report, "job": job})


@app.get("/reports/{report_id}/events")
async def report_events(
    found: Found, company: Company, last_event_id: Annotated[str | None, Header()] = None
) -> Response:
    """The job's events as they happen. A browser that reconnects sends the id of its last one."""
    stream = await sse.astream(engine, company, found[1].id, last_event_id=last_event_id)
    return StreamingResponse(stream, stream.status, sse.HEADERS)


@app.get("/reports/{report_id}/file")
async def download_report(found: Found, company: Company) -> Response:
    """The file, streamed from the storage."""
    async with new_session() as session:
        made = await files.list_by_job(session, found[1].id, company_id=company)
    if not made:
        raise HTTPException(404)
    asset = made[0]
    headers = {
        "Content-Disposition": f"attachment; filename*=UTF-8''{quote(asset.original_filename or 'report', safe='')}",
        "Content-Length": str(asset.byte_size),
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "private",
        "ETag": f'"{asset.sha256}"',
    }
    return StreamingResponse(files.stream(asset), media_type=asset.content_type, headers=headers)


@app.post("/company")
async def choose_company(company: Annotated[str, Body(embed=True, min_length=1, max_length=100)]) -> Response:
    """In place of a login."""
    response = Response(status_code=204)
    response.set_cookie("company", company, httponly=True, samesite="lax")
    return response
