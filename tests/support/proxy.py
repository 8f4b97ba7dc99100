"""A TCP proxy before a server, whose connections can be made to fall silent: they stay open and carry nothing."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from typing import Self


class Proxy:
    """Listens on a port of 127.0.0.1 while the ``with`` lasts; on ``listen``, when that is given."""

    def __init__(self, host: str, port: int, *, listen: int = 0) -> None:
        self._target = host, port
        self._listener = socket.create_server(("127.0.0.1", listen))
        self.port: int = self._listener.getsockname()[1]
        self._pairs: list[tuple[threading.Event, socket.socket, socket.socket]] = []
        self._lock = threading.Lock()
        self._deaf = False
        #: How many connections were made.
        self.accepted = 0

    def stall(self, *, new: bool = False) -> None:
        """Silence the connections there are; with ``new`` also those that will be made."""
        with self._lock:
            self._deaf = new
            for flowing, _, _ in self._pairs:
                flowing.clear()

    def turn(self, host: str, port: int) -> None:
        """Lead new connections to another server, and end those there are."""
        self._target = host, port
        self._end()

    def resume(self) -> None:
        """Carry what new connections send again, and what the silent ones held back."""
        with self._lock:
            self._deaf = False
            for flowing, _, _ in self._pairs:
                flowing.set()

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Accept no more, and end every connection."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._listener.close()
        self.resume()
        self._end()

    def _end(self) -> None:
        with self._lock:
            for _, *ends in self._pairs:
                for end in ends:
                    with suppress(OSError):
                        end.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._target)
            flowing = threading.Event()
            with self._lock:
                self.accepted += 1
                if not self._deaf:
                    flowing.set()
                self._pairs.append((flowing, client, server))
            carriers = [
                threading.Thread(target=_carry, args=(source, target, flowing), daemon=True)
                for source, target in ((client, server), (server, client))
            ]
            for carrier in carriers:
                carrier.start()
            threading.Thread(target=_close, args=(carriers, client, server), daemon=True).start()


def _flows(source: socket.socket, flowing: threading.Event) -> bool:
    """Wait until it flows; False when the source has hung up meanwhile, so that the other end hears of that."""
    while not flowing.wait(0.05):
        with suppress(BlockingIOError):
            if not source.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                return False
    return True


def _carry(source: socket.socket, target: socket.socket, flowing: threading.Event) -> None:
    with suppress(OSError):
        while (data := source.recv(65536)) and _flows(source, flowing):
            target.sendall(data)
    for end in (source, target):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def _close(carriers: list[threading.Thread], *ends: socket.socket) -> None:
    for carrier in carriers:
        carrier.join()
    for end in ends:
        end.close()
