"""The pipeline: one loop that does every database step of the jobs in flight, in as few commits as possible.

Each turn is one transaction: it finishes the jobs whose files are stored, records the keys of those that were just
rendered, and claims jobs for the free slots. Between the turns no transaction is open; other threads render and store.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Iterable, Sequence

from jobkit.base.clock import AdaptivePoll, Backoff
from jobkit.base.ids import new_id
from jobkit.base.logs import exc_info_of
from jobkit.base.mailbox import NEVER, Mailbox
from jobkit.base.text import error_message
from jobkit.base.threads import Pool
from jobkit.db.failures import is_outage, refuses_values
from jobkit.errors import LeaseLost
from jobkit.events.log import may_run
from jobkit.jobs.claims import RELEASED, Claim, Completion, OnCommit
from jobkit.rendering.attempt import Attempt
from jobkit.rendering.context import RenderEnvironment
from jobkit.rendering.failures import fields_of, log_end
from jobkit.runner.in_flight import InFlight
from jobkit.runner.render_stage import RenderStage
from jobkit.runner.settings import Settings
from jobkit.runner.store_stage import StoreBatch, StoreStage
from jobkit.runner.turns import Committed, Committer, Postponed, Turn, completion_of, instead_of, not_recorded
from jobkit.types import RunnerMetrics

logger = logging.getLogger("jobkit")
# For ACTIVE_FOR seconds after a job was found, the database is polled every ACTIVE_POLL seconds.
ACTIVE_POLL, ACTIVE_FOR = 0.05, 2.0
# How long a pipeline that can claim nothing, because it is full or stopping, waits for messages at most, in seconds.
FULL_PAUSE = 5.0
# How many more jobs than slots may be rendered and wait for storage or commit: enough for commits to be shared, too few
# for their spool files to fill the disk.
BACKLOG = 32
CLAIM_LOST = "job %s was taken from this runner; its result is dropped"
# Group commit: wait for results that are about to come as long as the last commit took, within these bounds (s).
# Without it, 1 ms jobs are committed two at a time.
GROUP_COMMIT_DELAY, GROUP_COMMIT_DELAY_MOST = 0.002, 0.02

# An attempt that was rendered, a batch that was stored, or None: there may be jobs.
Message = Attempt | StoreBatch | None


class Pipeline:
    """Claims, renders, stores and finishes jobs until stopped. ``run`` belongs to one thread; any may call the rest."""

    def __init__(
        self,
        settings: Settings,
        environment: RenderEnvironment,
        in_flight: InFlight,
        *,
        render_pool: Pool,
        store_pool: Pool,
        on_commit: OnCommit,
    ) -> None:
        """``on_commit`` is called with the events of each commit, on the thread of ``run``."""
        self._concurrency, self._clock, self._on_commit = settings.concurrency, settings.clock, on_commit
        #: What it has claimed and not ended.
        self.in_flight = in_flight
        worker_id = f"{socket.gethostname()}-{os.getpid()}-{new_id().hex[-8:]}"
        self._describe_error = environment.describe_error
        self._committer = Committer(
            settings.engine, worker_id=worker_id, lease=settings.lease, clock=settings.clock, in_flight=in_flight
        )
        self.link = self._committer.link
        self._mailbox: Mailbox[Message] = Mailbox()
        self._render_stage = RenderStage(settings, environment, render_pool, in_flight, self._mailbox)
        self._store_stage = StoreStage(store_pool, settings.assets.storage.batch_bytes, self._mailbox, settings.lease)
        self._postponed = Postponed(settings.lease, in_flight)
        self._turn = Turn()
        self._should_claim, self._next_poll = True, 0.0
        self._poll = AdaptivePoll(min(ACTIVE_POLL, settings.poll_interval), settings.poll_interval, ACTIVE_FOR)
        self._stopping = self._abandoned = False
        self._backoff = Backoff()
        self._commit_delay = GROUP_COMMIT_DELAY
        self._changed = threading.Condition()
        self._idle_requests = self._idle_confirmed = 0
        self._returned = False
        #: How many jobs ended here.
        self.ended = 0
        #: Whether it left jobs that had not ended.
        self.unfinished = False
        self._rejected = 0

    def wake(self) -> None:
        """Look for jobs now rather than at the next poll. Also in a signal handler."""
        self._mailbox.put(None)

    def request_idle(self) -> int:
        """As ``wake``, and look for scheduled jobs too; return a number for ``wait_idle``."""
        with self._changed:
            self._idle_requests += 1
            idle_request = self._idle_requests
        self.wake()
        return idle_request

    def wait_idle(self, idle_request: int, timeout: float | None) -> bool:
        """Wait until no job is in flight and a claim begun since found none, or ``run`` ended; False at the timeout."""
        with self._changed:
            return self._changed.wait_for(lambda: self._idle_confirmed >= idle_request or self._returned, timeout)

    def metrics(self) -> RunnerMetrics:
        """What this pipeline counted."""
        replaced = self._render_stage.replaced + self._store_stage.replaced
        return RunnerMetrics(self.ended, self._rejected, replaced, self._render_stage.left_behind)

    def wait_ended(self, timeout: float) -> bool:
        """Wait until ``run`` has returned; False after ``timeout`` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: self._returned, timeout)

    def stop(self) -> None:
        """Claim nothing more; ``run`` returns when the jobs in flight have ended."""
        self._stopping = True
        self.wake()

    def abandon(self) -> None:
        """Put the jobs in flight back into the queue; ``run`` returns at once. What renderers still do is dropped."""
        self._stopping = self._abandoned = True
        self.in_flight.abandon()
        self._mailbox.ring()

    def leave_to_leases(self) -> None:
        """Give up the thread of ``run``, blocked in a database call for good. Its claims end with their leases."""
        self.abandon()
        for attempt in self.in_flight.attempts():
            attempt.interrupt(LeaseLost(f"the database does not answer the runner of job {attempt.claim.job_id}"))
        self._close()

    def run(self, *, until_idle: bool = False) -> None:
        """Work until stopped, or until there is nothing to do. Survives whatever the database raises."""
        try:
            while not self._finished(until_idle):
                self._collect(min(self._next_turn_in(), self._next_deadline_in()))
                for attempt, reason in self._render_stage.overdue():
                    self._turn.completions.append(self._completion(attempt, reason))
                self._store_stage.replace_overdue()
                self._stored(self._store_stage.try_again())
                self._render_stage.grow()
                for attempt in self._render_stage.stalled():
                    self._turn.completions.append(Completion(attempt.claim, outcome=RELEASED))
                turn, self._turn = self._plan(), Turn()
                if turn:
                    self._commit(turn)
                self._commit_each(self._postponed.due())
            if self._abandoned or self._committer.unsure:
                self._release_all()
        finally:
            self.link.close()
            self._store_stage.close()
            self._postponed.close()
            try:
                self._sort(self._mailbox.drain(0))
                for attempt in self._turn.rendered:  # they will not be stored
                    attempt.discard()
            finally:
                self._close()  # last: who waits for the end must find no spool file

    def _close(self) -> None:
        self._render_stage.close()
        self._store_stage.close()
        with self._changed:
            self._returned = True
            self._changed.notify_all()

    def _finished(self, until_idle: bool) -> bool:
        idle = until_idle and self._idle_confirmed >= self._idle_requests > 0
        return self._abandoned or (not self.in_flight and (self._stopping or idle))

    # --- what to do next

    def _next_turn_in(self) -> float:
        """For how many seconds to wait for messages before the next turn."""
        if self._backoff:
            return self._backoff.pause
        if self._turn:
            return 0
        if self._free() <= 0:
            return FULL_PAUSE
        return 0 if self._should_claim else max(0.0, self._next_poll - time.monotonic())

    def _next_deadline_in(self) -> float:
        """Seconds until something in a stage may be overdue."""
        stages = self._render_stage.next_deadline_in(), self._store_stage.next_deadline_in()
        return max(0.0, min(3600.0, self._postponed.next_in(), *stages))

    def _collect(self, timeout: float) -> None:
        """Sort the messages. Waits up to ``timeout`` seconds for the first, and a little for more results."""
        # While the database fails, no message ends the pause.
        self._sort(self._mailbox.drain(timeout, NEVER if self._backoff else 1))
        if self._turn.size and not self._backoff:
            expected = self._render_stage.expected_results() + self._store_stage.expected_results()
            if expected:
                self._sort(self._mailbox.drain(self._commit_delay, expected))
        if time.monotonic() >= self._next_poll:
            self._should_claim = True

    def _sort(self, messages: list[Message]) -> None:
        for message in messages:
            if message is None:
                self._should_claim = True
            elif isinstance(message, StoreBatch):
                self._stored(self._store_stage.finished(message))
            else:
                self._render_stage.finished(message)
                if message.failure is None:
                    self._turn.rendered.append(message)
                else:
                    self._turn.completions.append(self._completion(message, message.failure))

    def _stored(self, ended: Iterable[tuple[Attempt, BaseException | None]]) -> None:
        self._turn.completions += [self._completion(attempt, failure) for attempt, failure in ended]

    def _completion(self, attempt: Attempt, failure: BaseException | None) -> Completion:
        return completion_of(attempt, failure, now=self._clock())

    def _free(self) -> int:
        """How many jobs may be claimed; not above 0 when none."""
        # The jobs that this turn finishes make room for those it claims.
        unfinished = len(self.in_flight) - len(self._turn.completions)
        if self._stopping or self._render_stage.blocked or (unfinished > 0 and self._committer.exclusive):
            return 0
        room = self._concurrency + self._render_stage.ahead
        return room - max(len(self._render_stage.rendering), unfinished - BACKLOG)

    def _plan(self) -> Turn:
        """The next turn, without what is no longer in flight."""
        turn, holds = self._turn, self.in_flight.holds
        turn.completions = [completion for completion in turn.completions if holds(completion.claim)]
        for attempt in [attempt for attempt in turn.rendered if not holds(attempt.claim)]:
            attempt.discard()
            turn.rendered.remove(attempt)
        turn.limit = max(0, self._free()) if self._should_claim else 0
        turn.idle_request, turn.check_scheduled = self._idle_requests, self._idle_requests > self._idle_confirmed
        return turn

    # --- one transaction

    def _commit(self, turn: Turn) -> None:
        began = time.monotonic()
        try:
            committed = self._committer.commit(turn)
        except Exception as error:
            self._failed(turn, error)
            return
        if self._backoff.succeeded():
            logger.warning("the database answers again")
        self._commit_delay = min(max(GROUP_COMMIT_DELAY, time.monotonic() - began), GROUP_COMMIT_DELAY_MOST)
        self._after(turn, committed)

    def _after(self, turn: Turn, committed: Committed) -> None:
        """After a commit: signals, then the work that the commit allows."""
        events, claimed, locked, settled = committed
        if events:
            self._on_commit(events)
        ends = {event.job_id: event for event in events if event.type != "content_job.running"}
        for completion in turn.completions:
            job_id = completion.claim.job_id
            if job_id in locked:
                self._postponed.locked(Turn([completion]))
                continue
            attempt = self.in_flight.pop(completion.claim)
            if job_id in ends:
                self.ended += not may_run(ends[job_id])
                if attempt is not None:
                    log_end(completion.claim, ends[job_id].type, time.monotonic() - attempt.claimed)
            elif job_id in settled:
                self.ended += settled[job_id].terminal
            else:
                self._rejected += 1
                logger.warning(CLAIM_LOST, job_id, extra=fields_of(completion.claim))
        for attempt in turn.rendered:
            self._postponed.settled(attempt.claim.job_id)
        self._store_stage.submit(turn.rendered)
        self._render_stage.submit([self._begin(claim) for claim in claimed])
        if turn.limit:
            self._should_claim = self._committer.more_waiting
            if claimed:
                self._poll.found()
            elif not self.in_flight:
                with self._changed:
                    self._idle_confirmed = turn.idle_request
                    self._changed.notify_all()
            self._next_poll = time.monotonic() + self._poll.interval

    # --- when the database refuses or fails

    def _failed(self, turn: Turn, error: Exception) -> None:
        """Keep what may succeed later. What is refused is committed part by part, so that only one of them waits or
        fails.
        """
        parts = turn.parts()
        if is_outage(error) or (turn.limit and len(parts) == 1):
            if self._backoff.failed():
                logger.error("the database failed; jobs in flight are kept and tried again: %s", error_message(error))
            self._keep(turn)
        elif len(parts) > 1:
            self._commit_each(parts)
        elif refuses_values(error) or not self._postponed.refused(turn, error):
            self._give_up(turn, error)

    def _commit_each(self, parts: Sequence[Turn]) -> None:
        """Commit each of these by itself, until the database fails."""
        failures = self._backoff.failures
        for part in parts:
            if self._backoff.failures > failures:
                self._keep(part)
            else:
                self._commit(part)

    def _give_up(self, part: Turn, error: Exception) -> None:
        """End a job whose result the database refused for good, or leave it to its lease when it refuses that too."""
        claim = part.claim
        message, fields = "job %s could not be finished: %s (reference %s)", fields_of(claim)
        told = (claim.job_id, error_message(error), fields["reference"])
        logger.error(message, *told, exc_info=exc_info_of(error), extra=fields)
        for attempt in part.rendered:
            attempt.discard()
        describe = self._describe_error
        if part.rendered:
            instead: Completion | None = not_recorded(claim, error, describe)
        else:
            instead = instead_of(part.completions[0], error, describe)
        if instead is None:
            self.in_flight.pop(claim)
            message = "job %s: no end can be recorded; it stays claimed until its lease runs out"
            logger.error(message, claim.job_id, extra=fields)
        else:
            self._commit(Turn([instead]))

    def _keep(self, turn: Turn) -> None:
        """Keep the turn for the next try."""
        self._turn.completions[:0] = turn.completions
        self._turn.rendered[:0] = turn.rendered
        self._turn.may_be_committed = self._turn.may_be_committed or bool(turn.completions)
        self._should_claim = self._should_claim or bool(turn.limit)

    def _begin(self, claim: Claim) -> Attempt:
        attempt = self._render_stage.attempt(claim)
        if (former := self.in_flight.add(attempt)) is not None:
            logger.warning(CLAIM_LOST, claim.job_id, extra=fields_of(claim))
            former.interrupt(LeaseLost(f"job {claim.job_id} was taken from this runner, and claimed again"))
        return attempt

    def _release_all(self) -> None:
        """Put what is still in flight back into the queue, if the database can be reached."""
        attempts = self.in_flight.attempts()
        for attempt in attempts:
            attempt.interrupt(LeaseLost(f"the runner stopped before job {attempt.claim.job_id} ended"))
        held = [attempt.claim for attempt in attempts]
        self.unfinished = bool(held)
        if not held and not self._committer.unsure:
            return
        try:
            events = self._committer.release(held)
            self._on_commit(events)
            if events:
                self.unfinished = True
                logger.warning("stopped with %d jobs unfinished; they are queued again", len(events))
        except Exception as error:
            message = "stopped with %d jobs unfinished, and could not release them: %s"
            logger.error(message, len(held), error_message(error))
