"""Reports as PDF files, in a Flask app: one process that serves and renders.

    flask --app examples.flask_app run

Then open http://127.0.0.1:5000/acme/. DATABASE_URL and ASSETS_URL say where everything goes; without them it is an
SQLite file and a folder in ``jobkit-demo``. Needs ``pip install flask jobkit[pdf]``.

The company is part of the path here. In a real app it comes from the login, never from the request.
"""

from __future__ import annotations

import atexit
import logging
import os
import re
import signal
import sys
import threading
from pathlib import Path
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from flask import Flask, Response, abort, redirect, render_template_string, request, send_file, url_for
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from werkzeug.wrappers import Response as AnyResponse

from jobkit import AssetStore, JobEvent, JobStore, Renderers, Runner, configure_sqlite, migrations, signals
from jobkit.contrib.renderers import pdf_document
from jobkit.tables import content_jobs

FOLDER = Path("jobkit-demo")
CONTROLS = re.compile(r"[\x00-\x1f\x7f]")

PAGE = """<!doctype html>
<title>Reports of {{ company }}</title>
<h1>Reports of {{ company }}</h1>
<form method="post" action="{{ url_for('order', company=company) }}">
  <p><input name="title" required placeholder="Title">
  <p><textarea name="text" required rows="8" cols="60" placeholder="Markdown"></textarea>
  <p><button>Make a PDF</button>
</form>
<ul>
{% for report in reports %}
  <li>
    <a href="{{ url_for('status', company=company, report_id=report.id) }}">{{ report.title }}</a>: {{ report.status }}
  {% if report.result_asset_id %}
    <a href="{{ url_for('download', company=company, asset_id=report.result_asset_id) }}">download</a>
  {% endif %}{{ "(the company was told)" if report.told }}
{% endfor %}
</ul>
"""


class Base(DeclarativeBase):
    pass


class Report(Base):
    """The host's own table. It repeats nothing of the job's row."""

    __tablename__ = "reports"
    __table_args__ = (sa.UniqueConstraint("company", "title"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    company: Mapped[str]
    title: Mapped[str]
    job_id: Mapped[UUID]
    told: Mapped[bool] = mapped_column(default=False)


def create_engine(url: str | None = None) -> sa.Engine:
    """The host's engine, with the host's tables and jobkit's in its database."""
    url = url or os.environ.get("DATABASE_URL")
    if url is None:
        FOLDER.mkdir(exist_ok=True)
        url = f"sqlite:///{FOLDER}/flask.db"
    engine = sa.create_engine(url)
    if engine.dialect.name == "sqlite":
        configure_sqlite(engine)
    migrations.upgrade(engine)
    Base.metadata.create_all(engine)
    return engine


def create_app(database_url: str | None = None, assets_url: str | None = None) -> Flask:
    """The app. Nothing runs in the background before its first request."""
    app = Flask(__name__)
    app.logger.setLevel(logging.INFO)
    engine = create_engine(database_url)
    assets = AssetStore(assets_url or os.environ.get("ASSETS_URL") or FOLDER / "flask-assets", engine=engine)
    renderers = Renderers()
    pdf_document.register(renderers)
    runner = Runner(engine, assets, renderers)
    app.extensions["jobkit"] = runner

    @app.before_request
    def start_runner() -> None:
        # Not at import: a reloader's supervisor, `flask routes` and a parent that forks workers import the app too.
        # Only a process that serves gets a request. On a started runner this does nothing.
        runner.start()

    _stop_at_exit(runner)
    _tell_companies(app, engine)
    _add_routes(app, engine, assets, runner)
    return app


def _stop_at_exit(runner: Runner) -> None:
    """Wait for jobs in flight when the process exits, up to 30 seconds. A second SIGTERM ends it at once."""
    atexit.register(runner.stop)
    main = threading.current_thread() is threading.main_thread()
    if main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:  # else a server such as gunicorn has its own
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))


def _tell_companies(app: Flask, engine: sa.Engine) -> None:
    """Tell a company once that its report is ready.

    Every process with a started runner or relay gets the event. The conditional UPDATE lets only one of them act.
    """

    def tell(company_id: str, *, event: JobEvent) -> None:
        with Session(engine) as session, session.begin():
            mine = sa.update(Report).where(Report.job_id == event.job_id, Report.told.is_(False)).values(told=True)
            first = session.execute(mine).rowcount == 1
        if first:
            app.logger.info("here a mail would tell %s of asset %s", company_id, event.payload["assetId"])

    signals.content_job_done.connect(tell, weak=False)


def _add_routes(app: Flask, engine: sa.Engine, assets: AssetStore, runner: Runner) -> None:
    @app.get("/<company>/")
    def index(company: str) -> str:
        # The job's row is in the same database, so its status is one join away.
        query = (
            sa.select(Report.id, Report.title, Report.told, content_jobs.c.status, content_jobs.c.result_asset_id)
            .join(content_jobs, content_jobs.c.id == Report.job_id)
            .where(Report.company == company)
            .order_by(Report.id.desc())
        )
        with Session(engine) as session:
            return render_template_string(PAGE, company=company, reports=session.execute(query).all())

    @app.post("/<company>/reports")
    def order(company: str) -> AnyResponse:
        title, text = request.form["title"], request.form["text"]
        with Session(engine, expire_on_commit=False) as session, session.begin():
            document = {"title": title, "markdown": text}
            try:
                job = JobStore(session).create(company, job_type=pdf_document.JOB_TYPE, input=document)
            except ValueError as refused:  # too long, or text that no database takes; the message names the field
                abort(400, str(refused))
            report = Report(company=company, title=title, job_id=job.id)
            session.add(report)
            try:
                session.flush()
            except sa.exc.IntegrityError:
                abort(409, f"there is a report {title!r} already")  # leaves the block: no report, no job, no signal
        runner.dispatch(job)
        return redirect(url_for("status", company=company, report_id=report.id), 303)

    @app.get("/<company>/reports/<int:report_id>")
    def status(company: str, report_id: int) -> dict[str, Any]:
        with Session(engine) as session:
            report = session.scalar(sa.select(Report).where(Report.id == report_id, Report.company == company))
            job = report and JobStore(session).get_by_id(report.job_id, company_id=company)
        if not report or not job:
            abort(404)
        asset_id = job.result_asset_id
        return {
            "title": report.title,
            "status": job.status,
            "error": job.error_message,
            "download": asset_id and url_for("download", company=company, asset_id=asset_id),
        }

    @app.get("/<company>/assets/<asset_id>")
    def download(company: str, asset_id: str) -> Response:
        with Session(engine) as session:
            asset = assets.get_by_id(session, asset_id, company_id=company)
        if asset is None:  # unknown, malformed, or another company's
            abort(404)
        response = send_file(
            assets.open(asset),
            mimetype=asset.content_type,
            as_attachment=True,  # with a filename* beside filename when the name is not ASCII (RFC 6266, RFC 8187)
            download_name=CONTROLS.sub("_", asset.original_filename or "file"),
            etag=asset.sha256,
            last_modified=asset.created_at,
        )
        if response.status_code == 200:
            response.content_length = asset.byte_size
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.cache_control.private = True
        return response
