"""Browsers: pages of other sites may neither read answers nor cause anything, unless their origin is allowed.

Every request of a page to another site carries `Origin`. One that is not allowed is refused before anything
reads it, since a request has its effect whether or not the page may read the answer. Cookies play no part.
"""

import logging
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

from helexa.errors import Forbidden, HelexaError
from helexa.gateway.dialects import Refusal
from helexa.log import fields

logger = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Scope = MutableMapping[str, Any]
App = Callable[[Scope, Callable[[], Awaitable[Message]], Send], Awaitable[None]]

_PREFLIGHT_AGE_S = 600
_METHODS = b"GET, HEAD, POST, DELETE"


class Origins:
    """The outermost layer of the API.

    allowed: the origins, "*" being all, asked for with each request. refuse: an error as the path has it.
    """

    def __init__(
        self,
        app: App,
        allowed: Callable[[], Collection[str]],
        refuse: Callable[[HelexaError, Scope], Refusal],
    ):
        self._app = app
        self._allowed = allowed
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Callable[[], Awaitable[Message]], send: Send) -> None:
        origin = next((value for name, value in scope.get("headers", ()) if name == b"origin"), None)
        if scope["type"] != "http" or origin is None:
            await self._app(scope, receive, send)
            return
        allowed = self._allowed()
        if "*" not in allowed and origin.decode("latin-1") not in allowed:
            shown = origin[:200].decode("latin-1")
            told = self._refuse(_foreign(shown), scope)
            _log(scope, told, shown)
            headers = [(name.encode(), value.encode("latin-1")) for name, value in told.headers.items()]
            await _answer(told.status, [*headers, (b"vary", b"origin")], told.body, send)
            return
        granted = [
            (b"access-control-allow-origin", b"*" if "*" in allowed else origin),
            (b"vary", b"origin"),
        ]
        asked = dict(scope["headers"])
        if scope["method"] == "OPTIONS" and b"access-control-request-method" in asked:
            await _allow(asked, granted, send)
            return

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                exposed = (b"access-control-expose-headers", b"x-request-id, request-id, retry-after")
                message["headers"] = [*message.get("headers", ()), *granted, exposed]
            await send(message)

        await self._app(scope, receive, marked)


def _foreign(origin: str) -> Forbidden:
    return Forbidden(f"pages of {origin!r} may not use this server; [cors] allow_origins says which may")


def _log(scope: Scope, told: Refusal, origin: str) -> None:
    logger.info(
        "request",
        extra=fields(
            method=scope["method"],
            path=scope["path"][:200],
            request=told.headers["x-request-id"],
            origin=origin,
            status=told.status,
            error=Forbidden.code,
        ),
    )


async def _allow(asked: dict[bytes, bytes], granted: list[tuple[bytes, bytes]], send: Send) -> None:
    """The answer to a preflight: the page may send what it asked to send."""
    headers = [
        *granted,
        (b"access-control-allow-methods", _METHODS),
        (b"access-control-max-age", b"%d" % _PREFLIGHT_AGE_S),
    ]
    if wanted := asked.get(b"access-control-request-headers"):
        headers.append((b"access-control-allow-headers", wanted))
    if asked.get(b"access-control-request-private-network") == b"true":
        headers.append((b"access-control-allow-private-network", b"true"))
    await _answer(204, headers, b"", send)


async def _answer(status: int, headers: list[tuple[bytes, bytes]], body: bytes, send: Send) -> None:
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
