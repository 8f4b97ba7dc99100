"""jobkit: content jobs for Python web apps. Only the public names; no module of the package imports this one."""

from jobkit import errors, migrations, signals, tables
from jobkit.assets.limits import MAX_GENERATED_ASSET_BYTES
from jobkit.assets.store import AssetStore
from jobkit.base.ids import ANY_COMPANY
from jobkit.db.sqlite import configure_sqlite
from jobkit.errors import (
    AssetCorrupt,
    AssetEmpty,
    AssetError,
    AssetKeyRefused,
    AssetNotFound,
    AssetTooLarge,
    AssetUrlUnavailable,
    ConfigurationError,
    Discard,
    EventsPruned,
    IdempotencyConflict,
    InvalidTransition,
    JobCancelled,
    JobkitError,
    JobNotFound,
    JobTimeout,
    LeaseLost,
    RenderInterrupted,
    Retry,
    SchemaOutOfDate,
    Snooze,
    UnknownJobType,
    UserError,
)
from jobkit.events.relay import Relay
from jobkit.events.watch import watch
from jobkit.jobs.store import JobStore
from jobkit.maintenance.prune import PruneReport, prune
from jobkit.maintenance.rescue import RescueReport
from jobkit.rendering.context import RenderContext
from jobkit.rendering.renderers import Renderers
from jobkit.runner.runner import Runner
from jobkit.serving import lifespan, on_exit
from jobkit.tables import metadata
from jobkit.types import (
    CONTENT_JOB_EVENTS,
    CONTENT_JOB_STATUSES,
    Asset,
    GarbageReport,
    Job,
    JobEvent,
    JobRequest,
    JobState,
    JobStatus,
    Rendered,
    RunnerMetrics,
    StoredObject,
)

ContentJobStatus = JobStatus
__version__ = "0.1.0"

__all__ = [
    "ANY_COMPANY", "CONTENT_JOB_EVENTS", "CONTENT_JOB_STATUSES", "MAX_GENERATED_ASSET_BYTES", "Asset",
    "AssetCorrupt", "AssetEmpty", "AssetError", "AssetKeyRefused", "AssetNotFound", "AssetStore", "AssetTooLarge",
    "AssetUrlUnavailable", "ConfigurationError", "ContentJobStatus", "Discard", "EventsPruned", "GarbageReport",
    "IdempotencyConflict", "InvalidTransition", "Job", "JobCancelled", "JobEvent", "JobNotFound", "JobRequest",
    "JobState", "JobStatus", "JobStore", "JobTimeout", "JobkitError", "LeaseLost", "PruneReport", "Relay",
    "RenderContext", "RenderInterrupted", "Rendered", "Renderers", "RescueReport", "Retry", "Runner",
    "RunnerMetrics", "SchemaOutOfDate", "Snooze", "StoredObject", "UnknownJobType", "UserError", "configure_sqlite",
    "errors", "lifespan", "metadata", "migrations", "on_exit", "prune", "signals", "tables", "watch",
]  # fmt: skip
