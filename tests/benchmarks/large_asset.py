"""A large output on its way from a renderer through the spool into the storage, and back: time and memory.

``python -m tests.benchmarks.large_asset`` on a local folder, ``--s3`` on a server of the S3 protocol that it starts.
Times are the median of ``--rounds``, memory the most of all, in one process; beside them on a local folder what plain
Python takes for the same bytes: written, hashed and flushed to disk, or read and hashed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import sqlalchemy as sa

import jobkit
from tests.benchmarks.measuring import MIB, memory, reset_peak

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench", "AWS_DEFAULT_REGION": "us-east-1"}


def timed(act: Callable[[], Any]) -> tuple[float, float]:
    """Seconds on the clock, and of this process on a processor."""
    os.sync()  # what was written before is not this one's burden
    start, used = time.perf_counter(), time.process_time()
    act()
    return time.perf_counter() - start, time.process_time() - used


class Bench:
    def __init__(self, folder: Path, assets: jobkit.AssetStore, size: int, chunk: int) -> None:
        self.folder, self.assets, self.size = folder, assets, size
        self.block = os.urandom(chunk)
        self.engine = sa.create_engine(f"sqlite:///{folder}/bench.db")
        jobkit.configure_sqlite(self.engine)
        jobkit.migrations.upgrade(self.engine)
        renderers = jobkit.Renderers()
        renderers.register("large")(self.render)
        self.runner = jobkit.Runner(self.engine, assets, renderers)
        self.rendered = 0

    def body(self, size: int) -> Iterator[bytes]:
        while size > 0:
            yield self.block[:size]
            size -= len(self.block)

    def render(self, ctx: jobkit.RenderContext) -> jobkit.Rendered:
        return jobkit.Rendered("large.bin", "application/octet-stream", self.body(ctx.input["size"]))

    def job(self, size: int) -> jobkit.Asset:
        """One job, from its creation to its end."""
        job = self.runner.submit("bench", job_type="large", input={"size": size})
        self.runner.run_until_idle(timeout=600)
        with self.engine.connect() as connection:
            (asset,) = self.assets.list_by_job(connection, job.id)
        assert asset.byte_size == size
        return asset

    def raw_write(self) -> None:
        """Write, hash and flush the same bytes, and no more."""
        digest = hashlib.sha256()
        with open(self.folder / "raw.bin", "wb", buffering=0) as file:
            for piece in self.body(self.size):
                digest.update(piece)
                file.write(piece)
            os.fsync(file.fileno())

    def raw_read(self) -> None:
        """Read and hash them."""
        digest = hashlib.sha256()
        with open(self.folder / "raw.bin", "rb", buffering=0) as file:
            while piece := file.read(MIB):
                digest.update(piece)

    def read(self, asset: jobkit.Asset, start: int, end: int) -> None:
        with self.assets.open(asset, start=start, end=end) as file:
            left = end - start
            while piece := file.read(MIB):
                left -= len(piece)
        assert left == 0

    def drop(self, asset: jobkit.Asset) -> None:
        with self.engine.begin() as connection:
            self.assets.delete(connection, asset)
        self.assets.collect_garbage(older_than=timedelta(0), dry_run=False)


class Figures:
    """What was measured, by name, a value a round."""

    def __init__(self) -> None:
        self.idle = memory("VmRSS")
        self.values: dict[str, list[float]] = {}

    def note(self, name: str, act: Callable[[], Any]) -> None:
        """Time and memory of ``act``: how far the process grows beyond what it was before all rounds."""
        reset_peak()
        wall, cpu = timed(act)
        for kind, value in (("s", wall), ("CPU s", cpu), ("MiB over idle", (memory("VmHWM") - self.idle) / MIB)):
            self.values.setdefault(f"{name}: {kind}", []).append(value)

    def show(self) -> None:
        for name, values in self.values.items():
            summary = max(values) if "MiB" in name else statistics.median(values)
            print(f"{name:48} {summary:8.2f}   {' '.join(f'{value:.2f}' for value in values)}")

    def compare(self, base: str, other: str) -> None:
        """How fast ``other`` is beside ``base``: 1 as fast, 0.8 a quarter slower."""
        for kind in ("s", "CPU s"):
            raw, ours = self.values[f"{base}: {kind}"], self.values[f"{other}: {kind}"]
            pairs = [a / b for a, b in zip(raw, ours, strict=True)]
            rounds = " ".join(f"{pair:.2f}" for pair in pairs)
            best = min(raw) / min(ours)
            print(f"{f'{base} / {other}, {kind}':48} {statistics.median(pairs):8.2f}   {rounds}   best/best {best:.2f}")


def measure(bench: Bench, rounds: int, *, local: bool) -> None:
    bench.drop(bench.job(MIB))  # whatever is imported or connected at first use
    figures = Figures()
    for number in range(rounds):
        made: list[jobkit.Asset] = []
        raw = [lambda: figures.note("raw write", bench.raw_write)] if local else []
        job = [lambda: figures.note("job", lambda: made.append(bench.job(bench.size)))]  # noqa: B023
        for step in raw + job if number % 2 else job + raw:
            step()
        (asset,) = made
        start, end = bench.size // 10, bench.size - bench.size // 10
        figures.note("open 80 %", lambda: bench.read(asset, start, end))  # noqa: B023
        figures.note("verify", lambda: bench.assets.verify(asset))  # noqa: B023
        if local:
            figures.note("raw read", bench.raw_read)
        bench.drop(asset)
    figures.show()
    if local:
        figures.compare("raw write", "job")
        figures.compare("raw read", "verify")


@contextmanager
def s3_server() -> Iterator[str]:
    """moto in a process of its own, so that its memory is not ours; its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while server.poll() is None and time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=500, metavar="MIB")
    parser.add_argument("--chunk", type=int, default=1024, metavar="KIB", help="what the renderer yields at a time")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--s3", action="store_true")
    parser.add_argument("--folder", type=Path, help="where to write (default: the folder for temporary files)")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="jobkit-bench-", dir=options.folder))
    size, chunk = options.size * MIB, options.chunk * 1024
    print(f"{options.size} MiB in pieces of {options.chunk} KiB, {options.rounds} rounds: summary, then each round")
    try:
        if not options.s3:
            measure(Bench(folder, jobkit.AssetStore(folder / "assets"), size, chunk), options.rounds, local=True)
            return
        os.environ.update(CREDENTIALS)
        with s3_server() as url:
            import s3fs

            s3fs.S3FileSystem(endpoint_url=url, skip_instance_cache=True).mkdir("bench")
            assets = jobkit.AssetStore("s3://bench/assets", storage_options={"endpoint_url": url})
            measure(Bench(folder, assets, size, chunk), options.rounds, local=False)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
