"""The pipeline: one loop that does every database step of the jobs in flight, as few commits as possible.

Each turn is one transaction: it ends the jobs whose files are stored, records the keys of those that were just
rendered, and claims jobs for the free slots. Rendering and storing happen on other threads, between the turns; no
transaction is open then.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from uuid import UUID

import sqlalchemy as sa

from jobkit.assets.store import AssetStore
from jobkit.base.clock import AdaptivePoll, Backoff, Clock
from jobkit.base.text import error_message
from jobkit.base.threads import Pool
from jobkit.db.connections import SharedConnection, is_outage
from jobkit.db.dialects.base import EventRow
from jobkit.errors import LeaseLost
from jobkit.jobs import claims
from jobkit.jobs.claims import RELEASED, Claim, Completion
from jobkit.rendering.attempt import Attempt
from jobkit.rendering.renderers import Renderers
from jobkit.runner.mailbox import NEVER, Mailbox
from jobkit.runner.render_stage import Workshop
from jobkit.runner.store_stage import StoreBatch
from jobkit.runner.turns import Committed, Committer, Turn, end
from jobkit.types import JobStatus, RunnerMetrics

logger = logging.getLogger("jobkit")

# After a job was seen, the next is looked for this often for this long, both in seconds; then at the poll interval.
ACTIVE_POLL = 0.05
ACTIVE_FOR = 2.0
# How long a runner that can claim nothing, because it is full or stopping, waits for its renderers before it looks
# again, in seconds; what they send wakes it at once.
FULL_PAUSE = 5.0
# Jobs that were rendered and wait for storage or commit may number this many more than the slots, so that their commits
# can be shared without their spool files filling the disk.
BACKLOG = 32
CLAIM_LOST = "job %s was taken from this runner; its result is dropped"
# A turn waits for the jobs that are likely to join it for as long as the last one took, within these bounds in seconds:
# what comes later would wait for that long. Jobs of a millisecond otherwise arrive two at a time.
GROUP_COMMIT_DELAY, GROUP_COMMIT_DELAY_MOST = 0.002, 0.02
# Events of jobs that will run again.
BACK_IN_QUEUE = ("content_job.queued", "content_job.retrying")

Message = Attempt | StoreBatch | None


class Pipeline:
    """Claims, renders, stores and finishes jobs until it is told to stop. ``run`` belongs to one thread; the rest to
    any.
    """

    def __init__(
        self,
        engine: sa.Engine,
        assets: AssetStore,
        renderers: Renderers,
        *,
        slots: Pool,
        publishers: Pool,
        concurrency: int,
        lease: float,
        poll_interval: float,
        worker_id: str,
        clock: Clock,
        shared: SharedConnection,
        on_commit: Callable[[Sequence[EventRow]], object],
        progressed: Callable[[], None],
    ) -> None:
        self._concurrency = concurrency
        self._clock, self._on_commit = clock, on_commit
        self._committer = Committer(engine, worker_id=worker_id, lease=lease, clock=clock, holds=self._holds)
        # What was rendered, what was stored, and that there may be jobs.
        self._inbox: Mailbox[Message] = Mailbox()
        self._workshop = Workshop(
            assets,
            renderers,
            concurrency=concurrency,
            slots=slots,
            publishers=publishers,
            lease=lease,
            shared=shared,
            progressed=progressed,
            wanted=lambda attempt: not self._abandoned and self._holds(attempt.claim),
            rendered=self._inbox.put,
            stored=self._inbox.put,
        )
        self.link = self._committer.link
        self._turn = Turn()
        self._attempts: dict[UUID, Attempt] = {}
        self._should_claim, self._next_poll = True, 0.0
        self._poll = AdaptivePoll(min(ACTIVE_POLL, poll_interval), poll_interval, ACTIVE_FOR)
        self._stopping = self._abandoned = False
        self._backoff = Backoff()
        self._gather = GROUP_COMMIT_DELAY
        self._asking = threading.Condition()
        self._idle_requests = self._idle_confirmed = 0
        self._over = False
        self.ended = 0
        self._rejected = 0

    def wake(self) -> None:
        """Look for jobs now rather than at the next poll. From any thread."""
        self._inbox.put(None)

    def ask(self) -> int:
        """As ``wake``, for every kind of job; return a number for ``wait_idle``."""
        with self._asking:
            self._idle_requests += 1
            asked = self._idle_requests
        self._inbox.put(None)
        return asked

    def attempts(self) -> list[Attempt]:
        """The attempts in flight. From any thread."""
        return list(self._attempts.values())

    def wait_idle(self, asked: int, timeout: float | None) -> bool:
        """Wait until a look for jobs that began after that ``ask`` found none and none is in flight, or until ``run``
        has returned; False at the timeout.
        """
        with self._asking:
            return self._asking.wait_for(lambda: self._idle_confirmed >= asked or self._over, timeout)

    def metrics(self) -> RunnerMetrics:
        """What this pipeline counted. From any thread."""
        return RunnerMetrics(self.ended, self._rejected, self._workshop.replaced)

    def wait_over(self, timeout: float) -> bool:
        """Wait until ``run`` has returned; False at the timeout."""
        with self._asking:
            return self._asking.wait_for(lambda: self._over, timeout)

    def stop(self) -> None:
        """Claim nothing more; ``run`` returns when the jobs in flight have ended."""
        self._stopping = True
        self._inbox.put(None)

    def abandon(self) -> None:
        """Put the jobs in flight back into the queue; ``run`` returns at once. What their renderers still do changes
        nothing.
        """
        self._stopping = self._abandoned = True
        self._inbox.ring()

    def leave_to_leases(self) -> None:
        """Count as over although ``run`` goes on: a call to the database never answers. Its jobs are left to their
        leases.
        """
        self.abandon()
        for attempt in self.attempts():
            attempt.interrupt(LeaseLost(f"the database does not answer the runner of job {attempt.claim.job_id}"))
        self._close()

    def run(self, *, until_idle: bool = False) -> None:
        """Work until stopped, or until there is nothing to do. Survives whatever the database does."""
        try:
            while not self._finished(until_idle):
                self._collect(min(self._patience(), self._workshop.patience))
                for attempt, reason in self._workshop.overdue():
                    self._turn.ends.append(self._end(attempt, reason))
                self._workshop.engage()
                for attempt in self._workshop.stuck():
                    self._turn.ends.append(Completion(attempt.claim, outcome=RELEASED))
                turn, self._turn = self._plan(), Turn()
                if turn:
                    self._take(turn)
            if self._abandoned or self._committer.unsure:
                self._release_all()
        finally:
            self.link.close()
            try:
                self._drop()
            finally:
                self._close()  # the last thing: whoever waits for it finds no file left

    def _close(self) -> None:
        self._workshop.close()
        with self._asking:
            self._over = True
            self._asking.notify_all()

    def _drop(self) -> None:
        """Remove the spool files of what was rendered and will not be stored."""
        self._sort_all(self._inbox.take(0))
        for attempt in self._turn.rendered:
            attempt.discard()

    def _finished(self, until_idle: bool) -> bool:
        if self._abandoned:
            return True
        return not self._attempts and (
            self._stopping or (until_idle and self._idle_confirmed >= self._idle_requests > 0)
        )

    # --- what to do next

    def _patience(self) -> float:
        if self._backoff:
            return self._backoff.pause
        if self._turn:
            return 0
        if self._free() <= 0:
            return FULL_PAUSE
        return 0 if self._should_claim else max(0.0, self._next_poll - time.monotonic())

    def _collect(self, timeout: float) -> None:
        """Sort what the other threads sent; wait up to ``timeout`` for the first of it, and a little for the rest."""
        # While the database fails, the pause lasts whatever comes.
        self._sort_all(self._inbox.take(timeout, NEVER if self._backoff else 1))
        if self._turn.size and not self._backoff and (others := self._workshop.soon):
            self._sort_all(self._inbox.take(self._gather, others))
        if time.monotonic() >= self._next_poll:
            self._should_claim = True

    def _sort_all(self, messages: list[Message]) -> None:
        for message in messages:
            self._sort(message)

    def _sort(self, message: Message) -> None:
        if message is None:
            self._should_claim = True
        elif isinstance(message, StoreBatch):
            self._workshop.settled(message)
            self._turn.ends += [self._end(attempt, message.failures.get(attempt)) for attempt in message.attempts]
        else:
            self._workshop.ended(message)
            if message.failure is None:
                self._turn.rendered.append(message)
            else:
                self._turn.ends.append(self._end(message, message.failure))

    def _end(self, attempt: Attempt, failure: BaseException | None) -> Completion:
        return end(attempt, failure, now=self._clock())

    def _free(self) -> int:
        if self._stopping:
            return 0
        room = self._concurrency + self._workshop.ahead
        # What ends with the same turn makes room for what it claims.
        return room - max(len(self._workshop.rendering), len(self._attempts) - len(self._turn.ends) - BACKLOG)

    def _plan(self) -> Turn:
        turn = self._turn
        turn.ends = [end for end in turn.ends if self._holds(end.claim)]
        for attempt in [attempt for attempt in turn.rendered if not self._holds(attempt.claim)]:
            attempt.discard()
            turn.rendered.remove(attempt)
        turn.limit = max(0, self._free()) if self._should_claim else 0
        turn.asked, turn.check_scheduled = self._idle_requests, self._idle_requests > self._idle_confirmed
        return turn

    def _holds(self, claim: Claim) -> bool:
        """Whether this is the last claim of its job that this runner knows of: the job may have been taken from it, and
        then claimed by it again.
        """
        attempt = self._attempts.get(claim.job_id)
        return attempt is not None and attempt.claim.fence == claim.fence

    # --- one transaction

    def _take(self, turn: Turn) -> None:
        began = time.monotonic()
        try:
            committed = self._committer.commit(turn)
        except Exception as error:
            if is_outage(error):
                self._pause(turn, error)
            else:
                self._one_by_one(turn, error)
            return
        if self._backoff.succeeded():
            logger.warning("the database answers again")
        self._gather = min(max(GROUP_COMMIT_DELAY, time.monotonic() - began), GROUP_COMMIT_DELAY_MOST)
        self._after(turn, committed)

    def _after(self, turn: Turn, committed: Committed) -> None:
        """What follows a commit: signals, then the work that the commit allows."""
        events, taken, settled = committed
        if events:
            self._on_commit(events)
        told = {event.job_id: event.type for event in events if event.type != "content_job.running"}
        for completion in turn.ends:
            job_id = completion.claim.job_id
            self._attempts.pop(job_id, None)
            if job_id in told:
                self.ended += told[job_id] not in BACK_IN_QUEUE
            elif job_id in settled:
                self.ended += settled[job_id].terminal
            else:
                self._rejected += 1
                logger.warning(CLAIM_LOST, job_id)
        self._workshop.store(turn.rendered)
        self._workshop.render([self._begin(claim) for claim in taken])
        if turn.limit:
            self._polled(turn, found=len(taken))

    def _polled(self, turn: Turn, *, found: int) -> None:
        self._should_claim = self._committer.waiting
        if found:
            self._poll.found()
        elif not self._attempts:
            with self._asking:
                self._idle_confirmed = turn.asked
                self._asking.notify_all()
        self._next_poll = time.monotonic() + self._poll.interval

    # --- when the database refuses or fails

    def _one_by_one(self, turn: Turn, error: Exception) -> None:
        """Do each part by itself, so that what the database refuses fails alone."""
        parts = turn.parts()
        if len(parts) > 1:
            for part in parts:
                self._take(part)
        elif turn.limit:
            self._pause(turn, error)
        else:
            self._refused(turn, error)

    def _refused(self, part: Turn, error: Exception) -> None:
        claim = part.ends[0].claim if part.ends else part.rendered[0].claim
        logger.error("job %s could not be finished: %s", claim.job_id, error_message(error), exc_info=error)
        if part.rendered:
            part.rendered[0].discard()
        elif part.ends[0].outcome.status is not JobStatus.DONE:
            self._attempts.pop(claim.job_id, None)  # not even its failure can be written: its lease will run out
            return
        message = error_message(getattr(error, "orig", None) or error)
        self._take(Turn(ends=[claims.failed(claim, f"the result could not be recorded: {message}")]))

    def _pause(self, turn: Turn, error: Exception) -> None:
        """Keep the work, log once, and come back after a while."""
        if self._backoff.failed():
            logger.error("the database failed; jobs in flight are kept and tried again: %s", error_message(error))
        self._turn.ends[:0] = turn.ends
        self._turn.rendered[:0] = turn.rendered
        self._turn.again = self._turn.again or bool(turn.ends)
        self._should_claim = self._should_claim or bool(turn.limit)

    # --- other threads

    def _begin(self, claim: Claim) -> Attempt:
        attempt = self._workshop.attempt(claim)
        if (former := self._attempts.get(claim.job_id)) is not None:
            logger.warning(CLAIM_LOST, claim.job_id)
            former.interrupt(LeaseLost(f"job {claim.job_id} was taken from this runner, and claimed again"))
        self._attempts[claim.job_id] = attempt
        return attempt

    def _release_all(self) -> None:
        """Give back what is still in flight, as far as the database lets us."""
        for attempt in self._attempts.values():
            attempt.interrupt(LeaseLost(f"the runner stopped before job {attempt.claim.job_id} ended"))
        held = [attempt.claim for attempt in self._attempts.values()]
        if not held and not self._committer.unsure:
            return
        try:
            events = self._committer.release(held)
            self._on_commit(events)
            if events:
                logger.warning("stopped with %d jobs unfinished; they are queued again", len(events))
        except Exception as error:
            logger.error(
                "stopped with %d jobs unfinished, and could not release them: %s", len(held), error_message(error)
            )
