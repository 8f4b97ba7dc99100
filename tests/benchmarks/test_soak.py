"""The soak's verdict: what grows is seen, what only varies is not."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.benchmarks.samples import LIMITS, ROWS, Sample, grown, trend

# Half an hour, sampled every five seconds.
TIMES = [5.0 * number for number in range(361)]
FLAT = {
    "RSS, MiB": 90.0,
    "USS, MiB": 75.0,
    "C heap in use, MiB": 21.0,
    "descriptors": 21.0,
    "threads": 19.0,
    "Python blocks": 390_000.0,
}
LIMITED = {**LIMITS, "assets": ROWS}


def samples(
    change: Callable[[str, float, float], float], *, collected_every: int = 12, times: list[float] = TIMES
) -> list[Sample]:
    """Figures as ``change(name, value, at)`` makes them of those of a process that stays flat."""
    made = []
    for number, at in enumerate(times):
        figures = {name: change(name, value, at) for name, value in {**FLAT, "assets": 1_200.0}.items()}
        if number % collected_every:
            del figures["Python blocks"]
        made.append(Sample(at, figures))
    return made


def noisy(seed: int) -> Callable[[str, float, float], float]:
    """Memory varies by a few per cent, now and then there is a peak, readers come and go, tables fill and empty."""
    rng = random.Random(seed)
    noise: dict[str, Callable[[float, float], float]] = {
        "RSS, MiB": lambda value, _: value * rng.gauss(1, 0.02) + (30 if rng.random() < 0.02 else 0),
        "USS, MiB": lambda value, _: value * rng.gauss(1, 0.02),
        "C heap in use, MiB": lambda value, _: value + rng.gauss(0, 0.3),
        "descriptors": lambda value, _: value + rng.choice((0, 0, 0, 1, 3, 5)),
        "threads": lambda value, _: value + rng.choice((0, 0, 1, 2)),
        "Python blocks": lambda value, _: value + rng.gauss(0, 300),
        "assets": lambda value, at: value * (0.7 + at % 60 / 100),
    }
    return lambda name, value, at: noise[name](value, at)


@pytest.mark.parametrize("seed", range(20))
def test_what_only_varies_is_flat(seed: int) -> None:
    assert grown(samples(noisy(seed)), LIMITED) == []


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("name", "an_hour"),
    [
        ("RSS, MiB", 32.0),
        ("USS, MiB", 30.0),
        ("C heap in use, MiB", 5.0),
        ("descriptors", 10.0),
        ("threads", 10.0),
        ("Python blocks", 30_000.0),
        ("assets", 6_000.0),
    ],
)
def test_what_grows_is_seen_among_what_varies(name: str, an_hour: float, seed: int) -> None:
    """Python blocks: 72,000 jobs an hour, of which less than half leave one."""
    vary = noisy(seed)

    def grow(figure: str, value: float, at: float) -> float:
        return vary(figure, value, at) + (an_hour * at / 3600 if figure == name else 0)

    (found,) = grown(samples(grow), LIMITED)
    assert found.startswith(f"{name} grew from ")


def test_growth_that_stops_within_the_first_fifth_is_none() -> None:
    first = TIMES[-1] / 5

    def warm_up(name: str, value: float, at: float) -> float:
        return value * (0.5 + 0.5 * min(1.0, at / first))

    assert grown(samples(warm_up), LIMITED) == []
    found = trend(samples(warm_up), "RSS, MiB")
    assert (found.before, found.middle, found.after, found.highest) == (90, 90, 90, 90)


def test_what_shrinks_and_a_table_that_stays_next_to_empty_are_flat() -> None:
    def change(name: str, value: float, at: float) -> float:
        return at / 10 if name == "assets" else value * (1 - at / 3600)

    assert grown(samples(change), LIMITED) == []


def test_memory_has_to_stay_below_both_limits() -> None:
    """Of a small process a tenth is too much, of a large one eight mebibytes."""
    for size, more in ((400.0, 12.0), (60.0, 7.0)):
        stepped = samples(lambda _, value, at: value, times=TIMES)
        made = [Sample(at, {**figures, "RSS, MiB": size + more * (at > TIMES[-1] * 0.5)}) for at, figures in stepped]
        assert grown(made, LIMITED) == [f"RSS, MiB grew from {size:,.1f} to {size + more:,.1f}"]


@pytest.mark.parametrize("count", [1, 3])
def test_too_few_samples_are_no_verdict(count: int) -> None:
    with pytest.raises(ValueError, match="too short: a fifth of the time has no sample of"):
        grown(samples(lambda _, value, at: value, times=TIMES[:count]), LIMITED)


SAMPLED = """
from tests.benchmarks.samples import of_process

of_process(collected=True)  # what it imports and keeps at first use is no growth
before, held = of_process(collected=True), [[] for _ in range(20_000)]
ballast = bytearray(b"x" * (20 << 20))
with open("/proc/self/status"), open("/proc/self/stat"):
    after = of_process(collected=True)
grown = {name: after[name] - value for name, value in before.items()}
assert abs(grown["Python blocks"] - len(held)) < 1_000, grown
assert grown["RSS, MiB"] > len(ballast) / (1 << 20) - 3, grown
assert grown["descriptors"] == 2, grown
assert abs(grown.get("C heap in use, MiB", 20) - 20) < 1, grown
assert "Python blocks" not in of_process(collected=False)
"""


def test_a_process_is_sampled_as_it_is() -> None:
    """One of its own: in that of the tests, what earlier ones left goes at any time."""
    subprocess.run([sys.executable, "-c", SAMPLED], check=True, timeout=60)
