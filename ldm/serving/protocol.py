"""HTTP as uvicorn reads it by httptools, with a limit of the bytes before a request's body."""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MOST_HEAD = 64 * 1024
"""Largest number of bytes of a request's first line and headers that are waited for."""


class BoundedProtocol(HttpToolsProtocol):
    """The protocol of a connection; a request whose headers do not end is answered with 400."""

    in_head, head = False, 0

    def on_message_begin(self) -> None:
        """Note that a request begins."""
        self.in_head, self.head = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Note that its headers have ended."""
        self.in_head = False
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        """Read what the client has sent."""
        super().data_received(data)
        if self.in_head:
            self.head += len(data)
            if self.head > MOST_HEAD:
                self.in_head = False
                self.send_400_response(f"The headers have more than {MOST_HEAD} bytes.")
