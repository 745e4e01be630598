"""Finds the node for a request: asks the router, and carries out what it says until the answer is "serve".

Requests for a model that must displace others wait here for its turn; see `evictor` for the rules. A client
says how long it would wait; what is begun for it goes on without it, and it is told how far that is.
"""

import asyncio
import copy
import time
from collections.abc import Mapping
from contextlib import suppress

from helexa.errors import CannotHost, HelexaError, InvalidParameter, ModelLoading, NoPlacement, Unavailable
from helexa.gateway.fleet import Claim, Fleet, Node
from helexa.gateway.loader import Loader
from helexa.gateway.poller import Poller
from helexa.gateway.router import Decision, choose
from helexa.gateway.site import Site

WAIT_HEADER = "x-helexa-wait"
CLAIM_MEMORY_S = 15.0  # a client that was sent away is expected back within
_LOOK_S = 0.5  # turns end by the clock, which tells nobody
_UNKNOWN_LOAD_S = 10.0
_LONGEST_RETRY_S = 10.0  # below CLAIM_MEMORY_S, so that a client that keeps to it keeps its place


def wait_of(headers: Mapping[str, str]) -> float | None:
    """Seconds that the client would wait for its model: x-helexa-wait or Prefer: wait=N; None: any time."""
    given = headers.get(WAIT_HEADER)
    if given is None:
        given = _preferred(headers.get("prefer", ""))
    if given is None:
        return None
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise InvalidParameter(f"{WAIT_HEADER} is {given[:40]!r}; expected seconds", param=WAIT_HEADER)
    return seconds


def _preferred(prefer: str) -> str | None:
    """N of `wait=N` among the preferences of RFC 7240; one that makes no sense is ignored, as that asks."""
    for preference in prefer.split(","):
        name, _, value = preference.partition(";")[0].partition("=")
        if name.strip().lower() == "wait" and value.strip().isdecimal():
            return value.strip()
    return None


class Placer:
    """Gives every request its node, after as many loads, evictions and turns of others as that takes."""

    def __init__(self, site: Site, poller: Poller, loader: Loader):
        self._fleet = site.fleet
        self._catalogue = site.catalogue
        self._metrics = site.metrics
        self._poller = poller
        self._loader = loader
        self._eviction = site.config.eviction
        self._room_wait_s = site.config.gateway.placement_wait_s

    async def place(
        self, model: str, tried: Mapping[str, HelexaError] | None = None, wait_s: float | None = None
    ) -> Node:
        """The node to send to, its count of requests already raised.

        tried: nodes that this request has been to, with what came of it. Raises HelexaError; ModelLoading
        with the progress when the model is not there within wait_s.
        """
        stay = _Stay(self._fleet, model)
        started = time.monotonic()
        no_room_since: float | None = None
        has_waited = is_cold = False
        try:
            while True:
                now = time.monotonic()
                decision, refusal = self._decide(model, tried or {}, now)
                if refusal is not None:
                    no_room_since = no_room_since or now
                    if now - no_room_since >= self._room_wait_s:
                        raise refusal
                else:
                    no_room_since = None
                if decision is not None and decision.action == "serve":
                    stay.leave()
                    if has_waited:
                        self._metrics.model_wait.labels(model, decision.node).observe(now - started)
                    node = self._fleet.nodes[decision.node]
                    node.begin(model, now)
                    return node
                if decision is not None and decision.action in ("load", "join") and not is_cold:
                    is_cold = True
                    self._metrics.cold_starts.labels(model, decision.node).inc()
                left_s = None if wait_s is None else wait_s - (now - started)
                has_waited = True
                await self._take_step(stay, decision, now, left_s)
        finally:
            stay.end(time.monotonic(), self._room_wait_s)

    def pursue(self, now: float) -> None:
        """Carries on for claims whose clients did not wait; forgets those who have not come back."""
        for model, claim in list(self._fleet.claims.items()):
            if claim.num_requests:
                continue
            if now - claim.asked_at > CLAIM_MEMORY_S or claim.is_spent(now, self._room_wait_s):
                del self._fleet.claims[model]
                continue
            decision = None
            with suppress(HelexaError):  # the client will hear of it when it comes back
                decision, _ = self._decide(model, {}, now)
            if decision is not None and decision.action == "wait":
                claim.follow(decision.node, decision.evict, decision.is_due, now)
                continue
            del self._fleet.claims[model]
            if decision is not None and decision.action == "load":
                self._loader.begin(decision)

    def _decide(
        self, model: str, tried: Mapping[str, HelexaError], now: float
    ) -> tuple[Decision | None, HelexaError | None]:
        """What to do; or no decision, but a refusal that time may change. Raises other refusals."""
        try:
            return choose(
                self._fleet, self._catalogue, model, now=now, avoid=tried.keys(), eviction=self._eviction
            ), None
        except HelexaError as error:
            if tried:
                raise list(tried.values())[-1] from None
            refusal = copy.copy(error)  # the original may be raised many times
            if isinstance(error, NoPlacement) and not isinstance(error, CannotHost):
                return None, refusal
            raise refusal from None

    async def _take_step(
        self, stay: "_Stay", decision: Decision | None, now: float, left_s: float | None
    ) -> None:
        """Does what the decision asks for and waits until something may have changed."""
        if decision is None or decision.action == "wait":
            if decision is None:
                stay.hold_nobody_up()
            elif stay.wait(decision, now).is_spent(now, self._room_wait_s):
                others = ", ".join(decision.evict)
                raise NoPlacement(
                    f"model {stay.model!r} needs the room of {others} on {decision.node}, still at work"
                )
            if left_s is not None and left_s <= 0:
                stay.come_back()
                raise self._not_yet(stay.model, decision, now)
            await self._poller.wait(_LOOK_S if left_s is None else min(_LOOK_S, left_s))
            return
        task = self._loader.begin(decision)
        stay.leave()
        if decision.action == "recover":
            raise Unavailable(f"model {stay.model!r} failed on its device and is recovering", retry_after_s=2)
        # A failure is remembered in the fleet, where the next choice finds it.
        if left_s is not None and left_s <= 0:
            raise self._not_yet(stay.model, decision, now)
        await asyncio.wait((task,), timeout=left_s)

    def _not_yet(self, model: str, decision: Decision | None, now: float) -> ModelLoading:
        """What a client that would not wait any longer is told."""
        if decision is None:
            progress: dict[str, object] = {"phase": "no_room", "percent": 0.0}
            retry_s = _LONGEST_RETRY_S
        elif decision.action == "wait":
            load_s = self._fleet.nodes[decision.node].load_seconds.get(model, _UNKNOWN_LOAD_S)
            waited_s = now - self._fleet.claims[model].since
            retry_s = max(0.0, self._eviction.turn_s - waited_s) + load_s
            progress = {"phase": "waiting", "percent": 0.0, "node": decision.node}
            if decision.evict:
                progress["displaces"] = list(decision.evict)
        else:
            node = self._fleet.nodes[decision.node]
            told = node.progress(model)
            retry_s = told.remaining_s or node.load_seconds.get(model, _UNKNOWN_LOAD_S)
            progress = {"phase": told.phase, "percent": told.percent, "node": decision.node}
            if told.remaining_s is not None:
                progress["remaining_s"] = told.remaining_s
        return ModelLoading(
            f"model {model!r} is not loaded yet ({progress['phase']}, {progress['percent']:.0f} %)",
            retry_after_s=min(max(1.0, retry_s), _LONGEST_RETRY_S),
            param="model",
            progress=progress,
        )


class _Stay:
    """One request's part in the claim of its model."""

    def __init__(self, fleet: Fleet, model: str):
        self.model = model
        self._claims = fleet.claims
        self._claim: Claim | None = None
        self._will_return = False

    def wait(self, decision: Decision, now: float) -> Claim:
        claim = self._claims.setdefault(self.model, Claim(since=now))
        if claim is not self._claim:
            self._claim = claim
            claim.num_requests += 1
        claim.asked_at = now
        claim.follow(decision.node, decision.evict, decision.is_due, now)
        return claim

    def hold_nobody_up(self) -> None:
        """There is no room for it now, whoever leaves."""
        if self._claim is not None:
            self._claim.follow("", (), False, self._claim.asked_at)

    def leave(self) -> None:
        """The turn has come: nobody waits any more."""
        if self._claim is not None and self._claims.get(self.model) is self._claim:
            del self._claims[self.model]
        self._claim = None

    def end(self, now: float, room_wait_s: float) -> None:
        """The request leaves; its claim lasts a while if its client was told to come back."""
        if self._claim is not None:
            self._claim.num_requests -= 1
            is_over = not self._will_return or self._claim.is_spent(now, room_wait_s)
            if not self._claim.num_requests and is_over:
                self.leave()

    def come_back(self) -> None:
        """The client does not wait, but its place in the line is kept."""
        self._will_return = True
