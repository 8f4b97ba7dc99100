"""What log records about jobs have in common: fields for ``extra``, and errors that are no larger than a page."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from jobkit.base.text import MAX_ERROR_CHARACTERS, error_message

ExcInfo = BaseException | tuple[type[BaseException], BaseException, Any]
# Causes of an error whose text is looked at.
_CAUSES = 10


def job_fields(
    job_id: UUID, company_id: str | None = None, job_type: str | None = None, attempt: int | None = None
) -> dict[str, Any]:
    """The fields of a record about a job, None for what is not known where it is logged."""
    return {"job_id": str(job_id), "company_id": company_id, "job_type": job_type, "attempt": attempt}


def exc_info_of(error: BaseException) -> ExcInfo:
    """``error`` for ``exc_info=``. In place of one with a long text, alone or in its causes: its class, its text cut to
    2,000 characters, and its traceback.
    """
    cause: BaseException | None = error
    for _ in range(_CAUSES):
        if cause is None:
            return error
        if _length(cause) > MAX_ERROR_CHARACTERS:
            break
        cause = cause.__cause__ or cause.__context__
    kind = type(type(error).__name__, (Exception,), {"__module__": type(error).__module__})
    return kind, kind(error_message(error)), error.__traceback__


def _length(error: BaseException) -> int:
    try:
        return len(str(error))
    except BaseException:  # its __str__ raises, and the formatter says so
        return 0
