"""The signals by themselves: who hears what, and that no receiver spoils another."""

from __future__ import annotations

import gc
import logging
import sys
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NoReturn
from uuid import UUID, uuid4

import pytest
from blinker import ANY, NamedSignal
from blinker.base import ANY_ID

from jobkit import CONTENT_JOB_EVENTS, JobEvent, signals
from jobkit.base.clock import utcnow


def event(kind: str = "done", company_id: str = "acme", number: int = 1) -> JobEvent:
    return JobEvent(number, 1, "0-0", company_id, f"content_job.{kind}", uuid4(), utcnow(), {})


@pytest.fixture(autouse=True)
def nobody_is_left() -> Iterator[None]:
    yield
    assert not signals.any_receivers()


class Heard(list[JobEvent]):
    def __call__(self, company_id: str, *, event: JobEvent) -> None:
        assert company_id == event.company_id
        self.append(event)

    __hash__ = object.__hash__  # type: ignore[assignment]


@pytest.mark.parametrize("name", CONTENT_JOB_EVENTS)
def test_every_event_has_its_signal(name: str) -> None:
    kind = name.removeprefix("content_job.")
    signal, heard = getattr(signals, f"content_job_{kind}"), Heard()
    assert signal.name == name
    with signal.connected_to(heard):
        signals.deliver(event(other.removeprefix("content_job.")) for other in CONTENT_JOB_EVENTS)
    assert [e.type for e in heard] == [name]


COMPANY = UUID("7b6c1d52-3d13-4d1c-8f7b-0e7b1a5b2c11")


@pytest.mark.parametrize("sender", [COMPANY, UUID(str(COMPANY)), str(COMPANY)])
def test_a_receiver_of_one_company_hears_no_other_and_a_uuid_is_its_text(sender: object) -> None:
    heard = Heard()
    signals.content_job_done.connect(heard, sender=sender)
    signals.deliver([event(company_id=str(COMPANY)), event(company_id="other"), event(company_id=str(COMPANY).upper())])
    signals.content_job_done.disconnect(heard, sender=UUID(str(COMPANY)))
    signals.deliver([event(company_id=str(COMPANY))])
    assert [e.company_id for e in heard] == [str(COMPANY)]


def test_an_integer_company_is_its_text_too() -> None:
    heard = Heard()
    unsubscribe = signals.subscribe(42, heard.append)
    signals.deliver([event(company_id="42"), event(company_id="43")])
    unsubscribe()
    assert [e.company_id for e in heard] == ["42"]


def test_a_receiver_of_all_and_of_one_company_is_called_once_an_event() -> None:
    heard = Heard()
    signals.content_job_done.connect(heard)
    signals.content_job_done.connect(heard, sender="acme")
    signals.deliver([event()])
    signals.content_job_done.disconnect(heard)
    assert len(heard) == 1


def test_a_receiver_is_held_weakly_unless_asked_otherwise() -> None:
    weak, strong = Heard(), Heard()
    signals.content_job_done.connect(weak)
    signals.content_job_done.connect(strong, weak=False)
    gone, kept = weakref.ref(weak), weakref.ref(strong)
    del weak, strong
    gc.collect()
    signals.deliver([event()])
    assert gone() is None
    held = kept()
    assert held is not None
    assert len(held) == 1
    signals.content_job_done.disconnect(held)


def test_subscribe_hears_every_event_of_one_company_until_unsubscribed() -> None:
    heard: list[JobEvent] = []
    unsubscribe = signals.subscribe(COMPANY, heard.append)
    kinds = [name.removeprefix("content_job.") for name in CONTENT_JOB_EVENTS]
    signals.deliver(event(kind, company) for kind in kinds for company in (str(COMPANY), "other"))
    assert [e.type for e in heard] == list(CONTENT_JOB_EVENTS)
    assert {e.company_id for e in heard} == {str(COMPANY)}
    unsubscribe()
    unsubscribe()
    signals.deliver([event(company_id=str(COMPANY))])
    assert len(heard) == len(CONTENT_JOB_EVENTS)


def test_two_subscriptions_of_one_listener_end_one_by_one() -> None:
    heard: list[JobEvent] = []
    first, second = (signals.subscribe("acme", heard.append) for _ in range(2))
    signals.deliver([event()])
    first()
    signals.deliver([event()])
    second()
    assert len(heard) == 3


def test_an_ended_subscription_lets_go_of_its_listener_and_leaves_nothing() -> None:
    def subscribed(company_id: str) -> weakref.ref[Heard]:
        heard = Heard()
        signals.subscribe(company_id, heard.append)()
        return weakref.ref(heard)

    def connected(company_id: str) -> weakref.ref[Heard]:
        heard = Heard()
        signals.content_job_done.connect(heard, sender=company_id, weak=False)
        signals.content_job_done.disconnect(heard, sender=company_id)
        return weakref.ref(heard)

    left = [made(f"company-{number}") for number in range(100) for made in (subscribed, connected)]
    gc.collect()
    assert [ref() for ref in left if ref() is not None] == []
    signal = signals.content_job_done
    assert (len(signal._by_sender), len(signal._by_receiver), len(signal.receivers)) == (0, 0, 0)


def test_whoever_goes_looks_at_no_sender_but_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unlisted(defaultdict[str, set[int]]):
        def __iter__(self) -> NoReturn:
            raise AssertionError("with thousands of companies this takes long, and every delivery waits for it")

        keys = values = items = __iter__  # type: ignore[assignment]

    signal, heard = signals.content_job_done, [Heard() for _ in range(3)]
    monkeypatch.setattr(signal, "_by_sender", Unlisted(set))
    for company, receiver in zip(("acme", "acme", "other"), heard, strict=True):
        signal.connect(receiver, sender=company)
    signal.connect(heard[0], sender="third")
    signal.disconnect(heard[0])
    signal.disconnect(heard[2], sender="other")
    signal.disconnect(heard[2], sender="nobody's")
    signals.deliver(event(company_id=company) for company in ("acme", "other", "third"))
    signal.disconnect(heard[1])
    assert [len(events) for events in heard] == [0, 1, 0]


async def coroutine(*_: Any, **__: Any) -> None: ...


class Callable_:
    async def __call__(self, *_: Any, **__: Any) -> None: ...


@pytest.mark.parametrize("receiver", [coroutine, partial(coroutine, 1), Callable_(), Callable_().__call__])
@pytest.mark.parametrize(
    "connect",
    [
        signals.content_job_done.connect,
        lambda receiver: signals.content_job_done.connect(receiver, sender="acme", weak=False),
        signals.content_job_done.connect_via("acme"),
        lambda receiver: signals.subscribe("acme", receiver),
    ],
)
def test_a_coroutine_function_is_refused(connect: Callable[[Any], Any], receiver: Any) -> None:
    with pytest.raises(TypeError, match="coroutine function"):
        connect(receiver)


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(1), KeyboardInterrupt(), GeneratorExit()])
def test_a_receiver_that_raises_is_logged_and_the_others_still_run(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_: str, *, event: JobEvent) -> None:
        raise error

    before, after = Heard(), Heard()
    for receiver in (before, broken, after):
        signals.content_job_done.connect(receiver)
    with caplog.at_level(logging.ERROR, "jobkit"):
        signals.deliver([event(number=1), event(number=2)])
    for receiver in (before, broken, after):
        signals.content_job_done.disconnect(receiver)
    assert [e.id for e in before] == [e.id for e in after] == [1, 2]
    assert [record.exc_info[1] for record in caplog.records if record.exc_info] == [error, error]


def test_events_delivered_within_a_receiver_come_after_the_current_ones_and_never_deeper() -> None:
    order: list[tuple[int, str]] = []

    def again(_: str, *, event: JobEvent) -> None:
        order.append((event.id, "again"))
        if event.id < 5_000:
            signals.deliver([JobEvent(event.id + 1, *_rest(event))])

    def second(_: str, *, event: JobEvent) -> None:
        order.append((event.id, "second"))

    signals.content_job_done.connect(again)
    signals.content_job_done.connect(second)
    signals.deliver([event(number=1)])
    signals.content_job_done.disconnect(again)
    signals.content_job_done.disconnect(second)
    assert [number for number, _ in order] == [number for number in range(1, 5_001) for _ in range(2)]


def test_other_threads_get_their_turn_within_many_receivers_and_within_many_events(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[object] = []
    monkeypatch.setattr(signals, "RECEIVERS_PER_TURN", 10)
    monkeypatch.setattr(signals.time, "sleep", lambda seconds: calls.append(("gave way", seconds)))
    receivers = [lambda *_, event, number=number: calls.append(number) for number in range(4)]
    for receiver in receivers:
        signals.content_job_done.connect(receiver)
    signals.deliver(event() for _ in range(8))
    assert [place for place, call in enumerate(calls) if call == ("gave way", 0)] == [9, 20, 31]
    assert len(calls) == 3 + 8 * 4
    signals.deliver([event()])
    for receiver in receivers:
        signals.content_job_done.disconnect(receiver)


@pytest.mark.parametrize("moves", ["to all", "to the company"])
def test_who_is_connected_all_along_hears_an_event_once_though_it_moves_meanwhile(
    monkeypatch: pytest.MonkeyPatch, moves: str
) -> None:
    signal, heard = signals.content_job_done, Heard()
    first, then = ("acme", ANY) if moves == "to all" else (ANY, "acme")
    signal.connect(heard, sender=first)
    choose, moved = signal._choose, []

    def meanwhile(sender_id: Any) -> Any:
        chosen = choose(sender_id)
        if not moved:  # another thread, between the two choices
            moved.append(sender_id)
            signal.connect(heard, sender=then)
            if moves != "to all":
                signal.disconnect(heard, sender=first)
                signal.connect(heard, sender=then)
        return chosen

    monkeypatch.setattr(signal, "_choose", meanwhile)
    signals.deliver([event()])
    assert len(heard) == 1
    signal.disconnect(heard)


def test_who_comes_while_this_very_thread_delivers_is_heard_of_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    signal, heard, other = signals.content_job_done, Heard(), Heard()
    signal.connect(other)
    connect = NamedSignal.connect

    def interrupted(*args: Any, **options: Any) -> Any:
        signals.deliver([event()])  # as from a signal handler, before blinker has written the receiver down
        return connect(*args, **options)

    monkeypatch.setattr(NamedSignal, "connect", interrupted)
    signal.connect(heard)
    signals.deliver([event()])
    assert (len(heard), len(other)) == (1, 2)
    for receiver in (heard, other):
        signal.disconnect(receiver)


def test_a_muted_signal_tells_nobody() -> None:
    heard = Heard()
    with signals.content_job_done.connected_to(heard):
        with signals.content_job_done.muted():
            signals.deliver([event()])
        signals.deliver([event()])
    assert len(heard) == 1


def test_nobody_hears_anything_after_a_test_has_cleared_the_signals() -> None:
    heard = Heard()
    signals.content_job_done.connect(heard)
    signals.deliver([event()])
    signals.content_job_done._clear_state()
    signals.deliver([event()])
    assert len(heard) == 1
    heard_of = weakref.ref(heard)
    del heard
    assert heard_of() is None


def test_a_receiver_that_was_collected_is_not_called_though_nobody_has_noticed_yet(
    caplog: pytest.LogCaptureFixture,
) -> None:
    heard = Heard()
    signals.content_job_done.connect(heard)
    audience = list(signals.content_job_done.audience("acme"))
    gone = weakref.ref(heard)
    del heard
    assert gone() is None
    assert [held() for _, held in audience] == [None]
    signals.content_job_done._chosen[ANY_ID] = audience
    signals.deliver([event()])
    assert caplog.records == []
    signals.content_job_done._chosen.clear()


def _rest(event: JobEvent) -> tuple[Any, ...]:
    return event.seq, event.cursor, event.company_id, event.type, event.job_id, event.created_at, event.payload


def test_receivers_may_come_and_go_on_other_threads_while_events_are_sent() -> None:
    stop, failures = threading.Event(), []
    steady = Heard()

    def churn(number: int) -> None:
        try:
            count = 0
            while not stop.is_set():
                count += 1
                company = f"company-{number}-{count}"
                heard: list[JobEvent] = []
                unsubscribe = signals.subscribe(company, heard.append)
                signals.deliver([event(company_id=company)])
                unsubscribe()
                signals.deliver([event(company_id=company)])
                assert len(heard) == 1, heard
        except BaseException as error:
            failures.append(error)

    signals.content_job_running.connect(steady)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=churn, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    signals.deliver(event("running", f"steady-{number}") for number in range(3_000))
    stop.set()
    for thread in threads:
        thread.join(60)
    sys.setswitchinterval(interval)
    signals.content_job_running.disconnect(steady)
    assert failures == []
    assert len(steady) == 3_000
