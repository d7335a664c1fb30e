"""Reads HTTP within bounds: a request's head comes from anyone, before its API key can be looked at."""

from __future__ import annotations

import asyncio
import logging
from email.utils import formatdate
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from darkroom.configs.logs import facts

from .errors import ApiError
from .metrics import Metrics
from .trail import new_id

logger = logging.getLogger(__name__)

HEAD_BYTES = 64 * 1024
"""Of a request line with its headers; as many of the trailers behind a chunked body."""
HEAD_FIELDS = 256
"""Each takes many times its bytes in memory, if it is short."""

_HEAD_SECONDS = 20.0
"""To send a head in, from its first byte on, or from the connection's opening."""
_LINGER_SECONDS = 2.0
"""For a client that still sends to read why it is refused: a socket that is closed over unread bytes is reset."""


class HttpProtocol(HttpToolsProtocol):
    """uvicorn's, with heads that are bounded in size and time, and refusals that are the error object.

    The parser tells of a header when it has all of it, and keeps it until then: so raw bytes are counted too, of data
    in which nothing ended. Data with the end of one request and the beginning of another counts by what is told alone.

    A request that asks for another protocol is answered in this one, as RFC 9110 (7.8) lets a server do: Java's client
    asks for HTTP/2 with every request, and the parser would skip the body, or take it for the next request.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head = True
        """Or before it; otherwise in a body or its trailers."""
        self._has_begun = False
        self._told = self._fields = self._raw = 0
        self._has_ended = False
        """Whether a head, a piece of a body or a request ended in the data at hand."""
        self._deadline: asyncio.TimerHandle | None = None
        self._is_refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._deadline = self.loop.call_later(_HEAD_SECONDS, self._too_late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_deadline()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        self._has_ended = False
        self._unset_keepalive_if_required()
        try:
            self._parse(data)
        except httptools.HttpParserError:
            if not self._is_refused:
                self._refuse(ApiError(400, "The request is not valid HTTP/1.1.", code="invalid_http"))
        if not self._has_ended and not self._is_refused:
            self._raw += len(data)
            if self._raw > HEAD_BYTES:
                self._refuse(_too_large())
        if not self._is_refused and self._is_idle and self._deadline is None:
            self._wait_for_head()

    def _parse(self, data: bytes) -> None:
        """Raises `HttpParserError`."""
        rest = memoryview(data)
        while rest:
            try:
                self.parser.feed_data(rest)
                return
            except httptools.HttpParserUpgrade as e:
                rest = rest[e.args[0] :]
                self._read_again()

    def _read_again(self) -> None:
        """The head at hand, as if no other protocol had been asked for."""
        line = b"%b %b HTTP/%b\r\n" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        headers = [b"%b: %b\r\n" % header for header in self.headers if header[0] != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
        self._end()
        self.parser.feed_data(b"".join([line, *headers, b"\r\n"]))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._has_begun = True

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._fields += 1
        self._count(len(name) + len(value) + len(": \r\n"))
        if self._in_head:  # a trailer would join the headers, which have been checked by then
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.parser.get_method() == b"CONNECT":
            raise ValueError("a proxy's method")  # stops the parser
        if self.parser.should_upgrade():
            return
        super().on_headers_complete()
        self._in_head = self._has_begun = False
        self._cancel_deadline()
        self._end()

    def on_body(self, body: bytes) -> None:
        self._end()
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._in_head = True
        self._end()
        super().on_message_complete()

    @property
    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _count(self, size: int) -> None:
        self._told += size
        if self._told > HEAD_BYTES or self._fields > HEAD_FIELDS:
            self._refuse(_too_large())
            raise ValueError("too large")  # stops the parser

    def _end(self) -> None:
        self._told = self._fields = self._raw = 0
        self._has_ended = True

    def _wait_for_head(self) -> None:
        """Data has come that leaves nothing to answer, and uvicorn has stopped its timer."""
        if self._has_begun:
            self._deadline = self.loop.call_later(_HEAD_SECONDS, self._too_late)
        else:  # an empty line, or the rest of a body that was refused: the connection is as idle as before
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _too_late(self) -> None:
        if self._has_begun:
            self._refuse(ApiError(408, f"The request's headers did not arrive within {_HEAD_SECONDS:g} seconds."))
        else:  # nothing was asked, and whoever opens connections ahead would read 408 as the answer to its next request
            self.transport.close()

    def _cancel_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _refuse(self, error: ApiError) -> None:
        """Read nothing more, and close: with this as the answer where one is due, and after those that are."""
        self._is_refused = True
        self._cancel_deadline()
        if self._in_head and self._is_idle:
            self._answer(error)
            metrics: Metrics = self.config.app.state.context.metrics  # type: ignore[union-attr]
            metrics.count("unknown", error.status)  # a request that is refused later the app has, and counts
            if self.transport.can_write_eof():
                self.transport.write_eof()
            self._deadline = self.loop.call_later(_LINGER_SECONDS, self.transport.close)
        elif self._in_head:
            self.cycle.keep_alive = False  # the requests before it are answered, and then the connection is closed
        else:
            if not self.pipeline and not self.cycle.response_started:
                self._answer(error)
            self.transport.close()

    def _answer(self, error: ApiError) -> None:
        id = new_id()
        response = error.response()
        headers = [
            *self.server_state.default_headers,
            *response.raw_headers,
            (b"x-request-id", id.encode()),
            (b"date", formatdate(usegmt=True).encode()),
            (b"connection", b"close"),
        ]
        lines = [b"%b: %b\r\n" % header for header in headers]
        self.transport.write(b"".join([STATUS_LINE[error.status], *lines, b"\r\n", bytes(response.body)]))
        members = facts(request_id=id, client=self.client and self.client[0], status=error.status, code=error.code)
        logger.info("request refused", extra=members)


def _too_large() -> ApiError:
    message = f"There may be {HEAD_FIELDS} headers, of {HEAD_BYTES} bytes together with the request line."
    return ApiError(431, message, code="headers_too_large")
