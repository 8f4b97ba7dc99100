"""What is told of a failed attempt: a text to the user, the rest to operators, both under one reference."""

from __future__ import annotations

import dis
import hashlib
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

from jobkit import errors
from jobkit.base.logs import exc_info_of, job_fields
from jobkit.base.text import error_message, sanitise
from jobkit.jobs.claims import Claim

logger = logging.getLogger("jobkit")

# Their texts are written for users: by jobkit, or by the renderer, which raises the last four to be understood.
_MEANT = (
    errors.JobkitError, errors.RenderInterrupted, errors.UserError, errors.Retry, errors.Snooze, errors.Discard,
)  # fmt: skip


class Told(NamedTuple):
    """``message``: for users, on the row, in events and streams. ``detail``: for operators, None when the message says
    all.
    """

    message: str
    detail: str | None


def tell(
    error: BaseException,
    claim: Claim,
    describe: Callable[[BaseException], str | None] | None = None,
    *,
    of_input: bool = False,
) -> Told:
    """What to tell of the failure of an attempt. Never raises.

    ``describe``: the host's decision; None, or an error in it, leaves it to jobkit. ``of_input``: whether the input
    was being checked. Users are told the text of jobkit's own errors (not of its set-up), of those that renderers raise
    for them, and of checks of the input; otherwise a neutral sentence with the reference of the attempt.
    """
    reference, whole = reference_of(claim), error_message(error)
    message = _described(error, describe, claim) or (
        whole if is_for_users(error, of_input=of_input) else f"an internal error (reference {reference})"
    )
    if message == whole:
        return Told(message, None)
    return Told(message, sanitise(f"reference {reference}: {type(error).__name__}: {whole}"))


def is_for_users(error: BaseException, *, of_input: bool = False) -> bool:
    """Whether the text of ``error`` is meant for users."""
    if isinstance(error, _MEANT):
        return not isinstance(error, errors.ConfigurationError)
    # An argument, or a piece of input, that a line of jobkit refused: such an error of the host may say anything.
    if of_input and any(kind.__name__ == "ValidationError" for kind in type(error).__mro__):  # msgspec's, jsonschema's
        return True
    return isinstance(error, ValueError | TypeError) and (of_input or _is_raised_by_jobkit(error))


def reference_of(claim: Claim) -> str:
    """A short text that names the attempt, the same in every process."""
    return hashlib.sha256(claim.job_id.bytes + claim.fence.to_bytes(8)).hexdigest()[:8]


def fields_of(claim: Claim) -> dict[str, Any]:
    """The fields of a log record about the attempt, for ``extra``."""
    fields = job_fields(claim.job_id, claim.company_id, claim.job_type, claim.attempt)
    return {**fields, "reference": reference_of(claim)}


def log_end(claim: Claim, kind: str, seconds: float) -> None:
    """Log the end of an attempt: one line, whose ``duration`` is that since the claim."""
    if logger.isEnabledFor(logging.INFO):
        outcome = kind.removeprefix("content_job.")
        fields = {**fields_of(claim), "outcome": outcome, "duration": round(seconds, 3)}
        told = (claim.job_id, claim.job_type, claim.company_id, outcome, seconds, claim.attempt)
        with suppress(Exception):  # a host's log handler may raise
            logger.info("job %s (%r) of company %r: %s after %.3f s, attempt %d", *told, extra=fields)


def _described(
    error: BaseException, describe: Callable[[BaseException], str | None] | None, claim: Claim
) -> str | None:
    if describe is None:
        return None
    try:
        described = describe(error)
        return None if described is None else sanitise(str(described)) or None
    except Exception as failure:
        told, fields = (claim.job_id, error_message(failure)), fields_of(claim)
        with suppress(Exception):  # a host's log handler may raise
            logger.error("job %s: describe_error raised: %s", *told, exc_info=exc_info_of(failure), extra=fields)
        return None


def _is_raised_by_jobkit(error: BaseException) -> bool:
    """By a ``raise`` there: what else fails in a line of jobkit may be an iterator of the host's, written in C."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None or not str(traceback.tb_frame.f_globals.get("__name__")).startswith("jobkit."):
        return False
    return traceback.tb_frame.f_code.co_code[traceback.tb_lasti] == dis.opmap["RAISE_VARARGS"]
