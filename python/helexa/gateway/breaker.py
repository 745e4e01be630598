"""Keeps requests away from a neuron that answers polls but fails its work, while others can do that.

Three failures within half a minute trip it: for ten seconds the router prefers any other. Then it is tried
again; each time that it trips anew soon after, it is left alone for twice as long. Nothing is refused because
of it: a neuron that alone has a model goes on being asked.
"""

import asyncio
import logging
import time
from collections import deque

from helexa.gateway.fleet import Node
from helexa.log import fields

logger = logging.getLogger(__name__)

FAILURES = 3
WINDOW_S = 30.0
PAUSE_S = 10.0
LONGEST_PAUSE_S = 160.0


class Breaker:
    """Counts the failures of requests by node and sets `node.tripped`."""

    def __init__(self) -> None:
        self._histories: dict[str, _History] = {}

    def failed(self, node: Node) -> None:
        """A request has failed on the node in a way that another one might not have."""
        history = self._histories.setdefault(node.name, _History())
        now = time.monotonic()
        history.failures.append(now)
        if node.tripped or len(history.failures) < FAILURES or now - history.failures[0] > WINDOW_S:
            return
        if now - history.untripped_at > WINDOW_S:
            history.pause_s = PAUSE_S
        node.tripped = True
        history.failures.clear()
        logger.warning("node_tripped", extra=fields(node=node.name, pause_s=history.pause_s))
        asyncio.get_running_loop().call_later(history.pause_s, self._try_again, node, history)

    def _try_again(self, node: Node, history: "_History") -> None:
        node.tripped = False
        history.untripped_at = time.monotonic()
        history.pause_s = min(history.pause_s * 2, LONGEST_PAUSE_S)


class _History:
    def __init__(self) -> None:
        self.failures: deque[float] = deque(maxlen=FAILURES)
        self.untripped_at = float("-inf")
        self.pause_s = PAUSE_S
