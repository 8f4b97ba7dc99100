"""Real servers of the S3 protocol, started by the tests: moto, for behaviour, and rclone, which checks signatures."""

from __future__ import annotations

import functools
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

KEY, SECRET = "AKIDJOBKITTESTS", "wJalrXUtnFEMI-bPxRfiCYEXAMPLEKEY"
START_DEADLINE = 60.0


class S3Server(Protocol):
    """A server with one bucket."""

    bucket: str
    endpoint: str

    def objects(self, prefix: str) -> dict[str, bytes]:
        """Every object below a prefix, by what follows it. Behind the protocol's back."""

    def stop(self) -> None: ...


# By bucket: what a test knows of a storage is its URL.
SERVERS: dict[str, S3Server] = {}


def share_the_api_model() -> None:
    """Read botocore's description of the S3 API once, not for each of hundreds of clients."""
    import botocore.session
    from botocore.loaders import create_loader

    botocore.session.create_loader = functools.cache(create_loader)


def environment(server: S3Server) -> Mapping[str, str]:
    """What AWS tools, and so s3fs, read their settings from."""
    return {
        "AWS_ENDPOINT_URL_S3": server.endpoint,
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        # A checksum of one part of an object is none of the whole, and rclone does not send those of parts.
        "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
    }


def options(server: S3Server, secret: str = SECRET) -> dict[str, Any]:
    """The same as ``storage_options``."""
    return {
        "key": KEY,
        "secret": secret,
        "endpoint_url": server.endpoint,
        "client_kwargs": {"region_name": "us-east-1"},
        "config_kwargs": {"response_checksum_validation": "when_required"},
    }


def server_of(url: str) -> tuple[Any, str]:
    """The server that a URL's bucket is on, and the prefix in it."""
    bucket, _, prefix = url.partition("://")[2].partition("/")
    return SERVERS[bucket], prefix.strip("/") + "/"


class Moto:
    """moto's server, in this process: Python code that behaves as AWS says, and checks no secret."""

    bucket = "jobkit-moto"

    def __init__(self) -> None:
        from moto.server import ThreadedMotoServer

        share_the_api_model()
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._server.start()
        host, port = self._server.get_host_and_port()
        self.endpoint = f"http://{host}:{port}"
        self._backend.create_bucket(self.bucket, region_name="us-east-1")
        SERVERS[self.bucket] = self

    @property
    def _backend(self) -> Any:
        from moto.backends import get_backend

        return get_backend("s3")["123456789012"]["aws"]

    def objects(self, prefix: str) -> dict[str, bytes]:
        keys = self._backend.buckets[self.bucket].keys
        return {name.removeprefix(prefix): key.value for name, key in keys.items() if name.startswith(prefix)}

    def overwrite(self, path: str, content: bytes | None) -> None:
        """Change one object, or remove it, behind the protocol's back."""
        if content is None:
            self._backend.delete_object(self.bucket, path)
        else:
            self._backend.put_object(self.bucket, path, content)

    def unfinished(self) -> int:
        """How many uploads in parts are open."""
        return len(self._backend.buckets[self.bucket].multiparts)

    def stop(self) -> None:
        self._server.stop()


class Rclone:
    """``rclone serve s3`` on a folder: another implementation, which refuses what is not signed with the secret."""

    bucket = "jobkit-rclone"

    def __init__(self) -> None:
        share_the_api_model()
        self._home = Path(tempfile.mkdtemp(prefix="jobkit-rclone-"))
        self._folder = self._home / "served"
        (self._folder / self.bucket).mkdir(parents=True)
        command = [
            *(str(Path(sys.executable).parent / "rclone"), "serve", "s3", "--addr", "127.0.0.1:0"),
            *("--auth-key", f"{KEY},{SECRET}", "--config", os.devnull, "--cache-dir", str(self._home / "cache")),
            *("--use-json-log=false", "--log-level", "NOTICE", str(self._folder)),
        ]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self._log: list[str] = []
        self._told = threading.Event()
        self.endpoint = ""
        threading.Thread(target=self._read, daemon=True).start()
        if not self._told.wait(START_DEADLINE) or not self.endpoint:
            self.stop()
            raise RuntimeError(f"rclone did not start:\n{''.join(self._log)}")
        SERVERS[self.bucket] = self

    def _read(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as lines:
            for line in lines:
                self._log.append(line)
                if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                    self.endpoint = found.group()
                    self._told.set()
        self._told.set()

    def objects(self, prefix: str) -> dict[str, bytes]:
        folder = self._folder / self.bucket / prefix
        files = [path for path in folder.rglob("*") if path.is_file()]
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._home, ignore_errors=True)
