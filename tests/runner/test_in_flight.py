"""Which claims are held, and when a progress report wakes the lease keeper."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from jobkit.base.ids import new_id
from jobkit.jobs.claims import Claim
from jobkit.rendering.attempt import Attempt
from jobkit.rendering.context import Registration
from jobkit.runner.in_flight import InFlight


def attempt(claim: Claim) -> Attempt:
    never: Any = None
    return Attempt(claim, Registration(never), never)


def claimed() -> Claim:
    return Claim(new_id(), "acme", "note", {}, None, 1, 1)


def test_only_the_last_claim_of_a_job_is_held() -> None:
    in_flight, first = InFlight(), claimed()
    second = replace(first, fence=2)
    old, new = attempt(first), attempt(second)
    assert in_flight.add(old) is None
    assert in_flight.holds(first)
    assert in_flight.add(new) is old
    assert (in_flight.holds(first), in_flight.holds(second)) == (False, True)
    assert in_flight.attempts() == [new]
    in_flight.pop(second)
    assert (len(in_flight), in_flight.holds(second)) == (0, False)


def test_what_is_abandoned_is_still_held_and_no_longer_wanted() -> None:
    in_flight, claim = InFlight(), claimed()
    in_flight.add(attempt(claim))
    assert in_flight.wants(claim)
    in_flight.abandon()
    assert (in_flight.holds(claim), in_flight.wants(claim)) == (True, False)


def test_a_report_wakes_the_keeper_unless_it_has_just_recorded_some() -> None:
    in_flight = InFlight()
    in_flight.record_at = time.monotonic() + 3600
    in_flight.progressed()
    assert not in_flight.reported.is_set()
    in_flight.record_at = 0.0
    in_flight.progressed()
    assert in_flight.reported.is_set()
