"""API keys: who may use the gateway. Keys are kept as digests and compared in constant time."""

import hashlib
import hmac
from collections.abc import Iterable, Mapping

from helexa.errors import Unauthorized
from helexa.gateway.config import GatewayConfig, is_loopback, split_address


class Keys:
    """The configured keys; asked for only if there are some and other machines can reach the listener."""

    def __init__(self, config: GatewayConfig):
        host, _ = split_address(config.gateway.listen)
        self.required = bool(config.auth.keys) and not is_loopback(host)
        self._digests = [_digest(key) for key in config.auth.keys]

    def check(self, headers: Mapping[str, str]) -> None:
        """Raises Unauthorized unless a known key comes as `Authorization: Bearer KEY` or `x-api-key: KEY`."""
        if not self.required:
            return
        given = list(_given(headers))
        if not given:
            raise Unauthorized("an API key is required: send Authorization: Bearer KEY or x-api-key: KEY")
        for key in given:
            digest = _digest(key)
            if any(hmac.compare_digest(digest, known) for known in self._digests):
                return
        raise Unauthorized("the API key is not known here")


def _given(headers: Mapping[str, str]) -> Iterable[str]:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token:
        yield token.strip()
    if key := headers.get("x-api-key"):
        yield key.strip()


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
