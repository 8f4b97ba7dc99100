"""What many threads send to one arrives whole and in order, and wakes it no more often than it asked."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from jobkit.base.mailbox import NEVER, Mailbox
from tests.support.runners import until


@pytest.fixture
def reader() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def asleep(mailbox: Mailbox[int], taking: Future[list[int]], least: int) -> None:
    until(lambda: mailbox._least == least)
    assert not taking.done()


def test_it_is_taken_whole_and_in_order_without_waiting_when_there_is_enough() -> None:
    mailbox: Mailbox[int] = Mailbox()
    for number in range(3):
        mailbox.put(number)
    assert len(mailbox) == 3
    assert mailbox.drain(60.0, 3) == [0, 1, 2]
    assert mailbox.drain(0.0) == []


def test_the_reader_is_woken_by_the_message_that_makes_it_enough(reader: ThreadPoolExecutor) -> None:
    mailbox: Mailbox[int] = Mailbox()
    taking = reader.submit(mailbox.drain, 60.0, 2)
    asleep(mailbox, taking, 2)
    mailbox.put(1)
    assert mailbox._bell.empty()  # one of two wakes nobody
    mailbox.put(2)
    assert taking.result(60) == [1, 2]


def test_too_few_are_taken_when_the_time_is_over() -> None:
    mailbox: Mailbox[int] = Mailbox()
    mailbox.put(1)
    assert mailbox.drain(0.01, 2) == [1]


def test_a_ring_wakes_the_reader_whatever_it_waits_for(reader: ThreadPoolExecutor) -> None:
    mailbox: Mailbox[int] = Mailbox()
    taking = reader.submit(mailbox.drain, 60.0, NEVER)
    asleep(mailbox, taking, NEVER)
    mailbox.put(1)
    mailbox.ring()
    assert taking.result(60) == [1]


def test_a_ring_before_the_reader_sleeps_is_not_lost() -> None:
    mailbox: Mailbox[int] = Mailbox()
    mailbox.ring()
    assert mailbox.drain(60.0, NEVER) == []
    mailbox.put(1)
    assert mailbox.drain(60.0) == [1]  # and keeps it awake once


def test_rings_that_are_left_over_do_not_count_as_messages() -> None:
    mailbox: Mailbox[int] = Mailbox()
    for _ in range(3):
        mailbox._bell.put(None)
    mailbox.put(1)
    assert mailbox.drain(0.01, 2) == [1]


def test_nothing_is_lost_and_nobody_sleeps_for_ever_among_many_threads() -> None:
    mailbox: Mailbox[tuple[int, int]] = Mailbox()
    senders, each, found = 4, 2_000, []
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [
            threading.Thread(target=lambda n=n: [mailbox.put((n, i)) for i in range(each)])  # type: ignore[misc]
            for n in range(senders)
        ]
        for thread in threads:
            thread.start()
        while len(found) < senders * each:
            some = mailbox.drain(30.0, 1 + len(found) % 3)
            assert some, "the reader was not woken"
            found += some
    finally:
        sys.setswitchinterval(interval)
        for thread in threads:
            thread.join()
    for n in range(senders):
        assert [i for sender, i in found if sender == n] == list(range(each))
