"""Who may speak to a neuron: who has its secret, or without one programs of this machine; no web page."""

import hashlib
import hmac

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from helexa.errors import Forbidden, HelexaError, Unauthorized
from helexa.serving import is_public_name
from helexa.wire.errors import error_bytes, error_headers

_OPEN_PATHS = ("/",)  # for probes of the process; tells name and version


class Guard:
    """Refuses before anything is read. `secret` is expected as `Authorization: Bearer SECRET`."""

    def __init__(self, app: ASGIApp, secret: str | None, is_local: bool):
        self._app = app
        self._digest = None if secret is None else _digest(secret.encode())
        self._is_local = is_local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._refusal(scope) if scope["type"] == "http" else None
        if error is None:
            await self._app(scope, receive, send)
            return
        headers = {"content-type": "application/json", **error_headers(error)}
        answer = Response(error_bytes(error), error.status, headers)
        await answer(scope, receive, send)

    def _refusal(self, scope: Scope) -> HelexaError | None:
        headers = dict(scope["headers"])
        if b"origin" in headers:
            return Forbidden("a neuron serves no web pages; they may use a gateway whose [cors] allows them")
        if scope["path"] in _OPEN_PATHS:
            return None
        if self._digest is not None:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() == b"bearer" and hmac.compare_digest(_digest(given.strip()), self._digest):
                return None
            return Unauthorized(
                "this neuron answers only who has its secret, as Authorization: Bearer SECRET"
            )
        if self._is_local and is_public_name(headers.get(b"host", b"").decode("latin-1")):
            return Forbidden("this neuron answers only requests to its address, not to a public name")
        return None


def _digest(secret: bytes) -> bytes:
    return hashlib.sha256(secret).digest()
