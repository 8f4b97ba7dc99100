"""What it costs to tell many receivers of an event, and that the jobs do not wait for them.

    python -m tests.benchmarks.receivers [--receivers 1000] [--jobs 1500] [--rounds 5] [URL]

First the CPU time of one event's delivery, by the number of receivers that hear it: jobkit's, and that of blinker's own
``send`` to as many. Then whole content jobs beside no receiver, many, and a slow one: jobs that take no time, then a
fifth as many of 10 ms; the database at URL must be empty (default: an SQLite file). Variants alternate, and ratios are
those of single rounds; all are medians with the least and the most.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import sqlalchemy as sa
from blinker import NamedSignal

import jobkit
from jobkit import JobRequest, JobStore, signals
from jobkit.base.clock import utcnow
from jobkit.events.relay import running_feed
from tests.benchmarks.daily import Figures, until
from tests.benchmarks.databases import database
from tests.support.runners import note, only

Receiver = Callable[..., None]
# How long the slow receiver takes for each event, in seconds.
SLOW = 0.005
# How long a job takes that is not quick, in seconds: little, for a report or an image.
WORK = 0.01
# How long each figure of a round is measured, in calls of receivers.
CALLS = 100_000


def trivial() -> Receiver:
    return lambda _company_id, *, event: None


def slow() -> Receiver:
    return lambda _company_id, *, event: time.sleep(SLOW)


@contextmanager
def connected(receivers: Sequence[Receiver], *, own_companies: bool = False) -> Iterator[None]:
    """To every signal; with ``own_companies`` each for a company of its own, of which the first is ``acme``."""
    all_signals: list[Any] = [getattr(signals, name.replace(".", "_")) for name in jobkit.CONTENT_JOB_EVENTS]
    for signal in all_signals:
        for number, receiver in enumerate(receivers):
            if own_companies:
                signal.connect(receiver, sender=f"company-{number}" if number else "acme")
            else:
                signal.connect(receiver)
    yield
    for signal in all_signals:
        for receiver in receivers:
            signal.disconnect(receiver)


def an_event() -> jobkit.JobEvent:
    return jobkit.JobEvent(1, 1, "0-0", "acme", "content_job.done", uuid4(), utcnow(), {})


def microseconds(act: Callable[[], object], calls: int) -> float:
    """CPU time of this thread for each."""
    used = time.thread_time()
    for _ in range(calls):
        act()
    return (time.thread_time() - used) / calls * 1e6


def deliveries(most: int) -> dict[str, float]:
    """Microseconds an event, by who hears it; and how many more for each receiver more."""
    event, found = an_event(), {}
    each: dict[tuple[str, int], float] = {}
    for count in sorted({1, 10, 100, most}):
        receivers, blinker, calls = [trivial() for _ in range(count)], NamedSignal("plain"), CALLS // (count + 10)
        for receiver in receivers:
            blinker.connect(receiver)
        with connected(receivers):
            each["jobkit", count] = microseconds(lambda: signals.deliver([event]), calls)
        each["blinker", count] = microseconds(lambda b=blinker: b.send("acme", event=event), calls)  # type: ignore[misc]
    for whose in ("jobkit", "blinker"):
        found.update({f"{whose}, {count:,} receivers": each[whose, count] for count in (1, 10, 100, most)})
        few, many = ((each[whose, count] - each[whose, 1]) / (count - 1) for count in (100, most))
        found[f"{whose}, each receiver more, of {most:,}"] = many
        found[f"{whose}, the same against of 100, ratio"] = many / few
    found["jobkit against blinker, each receiver more, ratio"] = (each["jobkit", most] - each["jobkit", 1]) / (
        each["blinker", most] - each["blinker", 1]
    )
    return found | own_companies(event, most)


def own_companies(event: jobkit.JobEvent, count: int) -> dict[str, float]:
    """So many receivers of one company each, and an event that one of them hears."""
    receivers, spent = [trivial() for _ in range(count)], time.thread_time()
    with connected(receivers, own_companies=True):
        connecting = time.thread_time() - spent
        hearing = microseconds(lambda: signals.deliver([event]), CALLS // 10)
        spent = time.thread_time()
    going = time.thread_time() - spent
    return {
        f"jobkit, {count:,} receivers for a company each, one hears it": hearing,
        "such a receiver comes, on one signal": connecting / count / len(jobkit.CONTENT_JOB_EVENTS) * 1e6,
        "such a receiver goes, on one signal": going / count / len(jobkit.CONTENT_JOB_EVENTS) * 1e6,
    }


def rendering(
    engine: sa.Engine, folder: Path, jobs: int, receivers: Sequence[Receiver], *, work: float = 0.0
) -> dict[str, float]:
    """Jobs of so many seconds with a small file, beside these receivers: how fast they ended, and what that and the
    telling took.
    """

    def render(ctx: jobkit.RenderContext) -> jobkit.Rendered:
        if work:
            time.sleep(work)
        return note(ctx)

    runner = jobkit.Runner(engine, jobkit.AssetStore(folder, engine=engine), only(render))
    with engine.begin() as connection:
        JobStore(connection).create_many("acme", [JobRequest("note") for _ in range(jobs)])
    with connected(receivers), runner:
        feed, relay = running_feed(engine), next(t for t in threading.enumerate() if t.name == "jobkit-relay")
        assert feed is not None
        assert relay.ident is not None
        clock = time.pthread_getcpuclockid(relay.ident)
        begun, used, telling = time.perf_counter(), time.process_time(), time.clock_gettime(clock)
        until(lambda: runner.metrics().ended == jobs)
        took, used = time.perf_counter() - begun, time.process_time() - used
        told, telling = feed.delivered_count, time.clock_gettime(clock) - telling
    return {
        "jobs a second": jobs / took,
        "CPU, µs a job": used / jobs * 1e6,
        "CPU of telling it, µs a job": telling / jobs * 1e6,
        "CPU of the rest, µs a job": (used - telling) / jobs * 1e6,
        "told when the jobs had ended, % of events": told / (2 * jobs) * 100,
    }


def compared(
    engine: sa.Engine, folder: Path, jobs: int, work: float, variants: Mapping[str, Sequence[Receiver]]
) -> Figures:
    """One round of all variants, each also as a part of the first."""
    found: Figures = {}
    for name, receivers in variants.items():
        measured = rendering(engine, folder, jobs, receivers, work=work)
        found.update({f"{name}: {figure}": value for figure, value in measured.items()})
    first, *others = variants
    for name in others:
        for figure in ("jobs a second", "CPU of the rest, µs a job"):
            found[f"{name}: {figure}, against {first}"] = found[f"{name}: {figure}"] / found[f"{first}: {figure}"]
    return found


def show(rounds: Sequence[Figures]) -> None:
    for name in rounds[0]:
        values = sorted(figures[name] for figures in rounds)
        print(f"  {name:<66} {statistics.median(values):9.2f}   ({values[0]:.2f} to {values[-1]:.2f})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", nargs="?")
    parser.add_argument("--receivers", type=int, default=1_000, help="how many are many: more than one")
    parser.add_argument("--jobs", type=int, default=1_500)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print("an event, microseconds of CPU")
    show([deliveries(options.receivers) for _ in range(options.rounds)])
    variants = {
        "no receiver": [],
        f"{options.receivers:,} receivers": [trivial() for _ in range(options.receivers)],
        "one of 5 ms": [slow()],
    }
    with database(options.url) as (engine, folder):
        for jobs, work in ((options.jobs, 0.0), (max(1, options.jobs // 5), WORK)):
            print(f"{jobs} jobs of {work * 1000:g} ms on {engine.dialect.name}")
            show([compared(engine, folder / "assets", jobs, work, variants) for _ in range(options.rounds)])


if __name__ == "__main__":
    main()
