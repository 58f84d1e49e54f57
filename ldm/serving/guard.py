"""What every request passes first: its host and origin, the key, and limits of its body in size and time."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import ipaddress
import logging
import re
import socket
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ldm.serving.counters import Counters
from ldm.serving.errors import ApiError, server_failed
from ldm.support.text import shown

HOST = re.compile(r"[A-Za-z0-9._\-]+(:[0-9]{1,5})?|\[[0-9A-Fa-f:.]+\](:[0-9]{1,5})?")  # and a port
LOOPBACK = ("localhost", "127.0.0.1", "::1")
OPEN = ("/", "/health", "/favicon.ico")  # paths, and starts of paths, that need no key
OPEN_BELOW = ("/page/", "/v1/images/files/")
BODY_SECONDS = 30.0  # for which a body may stand still
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:;"
        " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
}
_logger = logging.getLogger(__name__)


class Guard:
    """An ASGI application around another one, which refuses what the server does not take.

    Args:
        app: The application.
        counters: Counts the responses.
        host: The address that the server is bound to.
        origins: Origins besides the server's own whose pages may use it, such as "https://example.org".
        key: The key that requests must have. None: none.
        most: Largest number of bytes of a body.
        seconds: Seconds for which a body may stand still. Default: `BODY_SECONDS`.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        counters: Counters,
        host: str,
        origins: Sequence[str],
        key: str | None,
        most: int,
        seconds: float = BODY_SECONDS,
    ) -> None:
        self.app, self.counters, self.key, self.most, self.seconds = app, counters, key, most, seconds
        self.origins = frozenset(origin.rstrip("/").lower() for origin in origins)
        names = {host.lower(), socket.gethostname().lower(), *LOOPBACK}
        self.hosts = frozenset(names | {urlsplit(origin).hostname or "" for origin in self.origins})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers, path = Headers(scope=scope), scope["path"]
        origin = headers.get("origin", "").lower()
        started = False

        async def guarded_send(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self._complete(message, path, origin)
            await send(message)

        try:
            self._check(headers, path, scope["method"], origin)
            if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                await preflight()(scope, receive, guarded_send)
                return
            await self.app(scope, self._limited(headers, receive), guarded_send)
        except ApiError as error:
            if not started:
                response = error.response()
                if error.status == 408:
                    response.headers["connection"] = "close"  # the rest of its body is not waited for
                await response(scope, receive, guarded_send)
        except Exception as error:
            _logger.error("a request failed", exc_info=error)
            if not started:
                await server_failed("the server failed; its log has the reason").response()(
                    scope, receive, guarded_send
                )

    def _check(self, headers: Headers, path: str, method: str, origin: str) -> None:
        """Raise ApiError for a foreign host or origin, a missing key, or a body that is too large."""
        host = headers.get("host", "")
        if not self._own_host(host):
            raise ApiError(
                403,
                f"host {shown(host)}: expected an address of this server; --allow-origin names others",
                code="host_not_allowed",
            )
        foreign = origin and not self._own_origin(origin, host)
        if foreign and origin not in self.origins:
            raise ApiError(
                403,
                f"origin {shown(origin)}: expected the server's own; --allow-origin names others",
                code="origin_not_allowed",
            )
        if method != "OPTIONS" and self.key is not None and not is_open(path):
            self._check_key(headers)
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > self.most:
            raise self._too_large()

    def _own_host(self, host: str) -> bool:
        """Return whether a Host header is one of this server: a page elsewhere can point its name here."""
        if not HOST.fullmatch(host):
            return False
        try:
            name = (urlsplit(f"//{host}").hostname or "").lower()
        except ValueError:
            return False
        if name in self.hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    @staticmethod
    def _own_origin(origin: str, host: str) -> bool:
        """Return whether an origin is the address that the request was sent to."""
        try:
            return urlsplit(origin).netloc == host.lower()
        except ValueError:
            return False

    def _check_key(self, headers: Headers) -> None:
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() == "basic":  # as A1111's clients send it: any name, the key as the password
            try:
                given = base64.b64decode(given, validate=True).decode("utf-8").partition(":")[2]
            except (binascii.Error, ValueError):
                given = ""
        elif kind.lower() != "bearer":
            given = ""
        assert self.key is not None
        if not hmac.compare_digest(given.strip().encode(), self.key.encode()):
            raise ApiError(
                401,
                "expected the server's key, as `Authorization: Bearer KEY`",
                kind="authentication_error",
                code="invalid_api_key",
            )

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is too large: expected at most {self.most:,} bytes", code="too_large")

    def _limited(self, headers: Headers, receive: Receive) -> Receive:
        """Return `receive`, with the limits of a body in size and in time between its parts."""
        total, complete = 0, False

        async def limited() -> Message:
            nonlocal total, complete
            if complete:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), self.seconds)
            except TimeoutError:
                raise ApiError(
                    408, f"the body stood still for {self.seconds:g} seconds", code="timeout"
                ) from None
            if message["type"] == "http.request":
                total += len(message.get("body", b""))
                complete = not message.get("more_body", False)
                if total > self.most:
                    raise self._too_large()
            return message

        return limited

    def _complete(self, message: Message, path: str, origin: str) -> None:
        """Count a response, and add the headers that all have."""
        headers = MutableHeaders(scope=message)
        for name, value in HEADERS.items():
            headers.setdefault(name, value)
        if origin in self.origins:
            headers["access-control-allow-origin"] = origin
            headers.add_vary_header("Origin")
        else:
            headers.setdefault("cross-origin-resource-policy", "same-origin")
        self.counters.answered(counted_path(path), message["status"])


def is_open(path: str) -> bool:
    """Return whether a path needs no key: the page, whether the server is well, and unguessable urls."""
    return path in OPEN or path.startswith(OPEN_BELOW)


def preflight() -> Response:
    """Return the answer to a browser that asks whether a page of another origin may send a request."""
    allowed: dict[str, Any] = {
        "access-control-allow-methods": "GET, POST",
        "access-control-allow-headers": "*, Authorization",
        "access-control-max-age": "600",
    }
    return Response(status_code=204, headers=allowed)


def counted_path(path: str) -> str:
    """Return a path as the counters name it; those that a client can make up are one."""
    known = ("/v1/images/generations", "/v1/images/edits", "/v1/images/variations", "/v1/models")
    if path in known or path in ("/", "/health", "/metrics"):
        return path
    return "/sdapi" if path.startswith("/sdapi/v1/") else "other"
