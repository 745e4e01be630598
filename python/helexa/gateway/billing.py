"""What one request costs its key: a guess while it runs, the tokens that were computed once it has ended."""

from typing import Any

import msgspec

from helexa.errors import UpstreamClosed, UpstreamTimeout
from helexa.gateway.auth import Principal
from helexa.gateway.metrics import CLIENT_CLOSED, Meter
from helexa.gateway.quota import Ledger
from helexa.gateway.upstream import Call

_ANSWER_TOKENS = 4096  # of an answer that the request sets no limit
_MOST_TOKENS = 2**31
# Ends of requests that were being computed until then.
_BROKEN_OFF = frozenset((CLIENT_CLOSED, "shutting_down", UpstreamClosed.code, UpstreamTimeout.code))


class Bill:
    """The charge of one call. Raises QuotaExceeded when it is made."""

    def __init__(self, ledger: Ledger, principal: Principal, call: Call):
        self._meter = call.meter
        self._prompt_tokens = len(call.body) // 4  # a guess, needed only where no neuron tells
        self._charge = ledger.charge(principal, self._expected(call.body) if principal.limits else 0)

    def settle(self) -> None:
        """Puts what was used in place of the reservation; the meter must have ended."""
        self._charge.settle(used_tokens(self._meter, self._prompt_tokens))

    def _expected(self, body: bytes) -> int:
        try:
            bounds = msgspec.json.decode(body, type=_Bounds)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            bounds = _Bounds()
        limit = _count(bounds.max_completion_tokens) or _count(bounds.max_tokens) or _ANSWER_TOKENS
        return min(self._prompt_tokens + limit * (_count(bounds.n) or 1), _MOST_TOKENS)


class _Bounds(msgspec.Struct):
    """Fields as the client sent them, right or wrong; the neuron judges."""

    max_completion_tokens: Any = None
    max_tokens: Any = None
    n: Any = None


def used_tokens(meter: Meter, prompt_tokens: int) -> int:
    """Tokens that were computed: prompt without its cached part, and answer.

    Of an answer that broke off nobody has told the usage: then events count for tokens and `prompt_tokens`, a
    guess, for the prompt. What was refused costs nothing.
    """
    usage = meter.usage
    if "prompt_tokens" in usage:
        return max(0, usage["prompt_tokens"] - usage.get("cached_tokens", 0)) + meter.completion_tokens
    if meter.completion_tokens or (meter.node and meter.code in _BROKEN_OFF):
        return prompt_tokens + meter.completion_tokens
    return 0


def _count(value: Any) -> int:
    return value if isinstance(value, int) and 0 < value < _MOST_TOKENS else 0
