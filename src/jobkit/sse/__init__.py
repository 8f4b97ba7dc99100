"""The events of one job, or of one company, as ``text/event-stream``: bytes for WSGI and ASGI."""

from jobkit.sse.streams import HEADERS, AsyncStream, Stream, astream, end_all, end_on_signals, stream

__all__ = ["HEADERS", "AsyncStream", "Stream", "astream", "end_all", "end_on_signals", "stream"]
