"""What all routes that compute have in common: one record of each request, for the log and the metrics."""

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from dataclasses import asdict

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from helexa.errors import HelexaError
from helexa.log import fields
from helexa.neuron.config import NeuronSection
from helexa.neuron.generation import Record
from helexa.neuron.metrics import Metrics
from helexa.neuron.registry import Registry
from helexa.neuron.streaming import ClientGone
from helexa.neuron.text_work import TextWork

logger = logging.getLogger(__name__)


class Endpoint(ABC):
    """An ASGI endpoint that takes a seat. Raises HelexaError while the status can still be chosen."""

    route: str

    def __init__(self, registry: Registry, metrics: Metrics, config: NeuronSection, work: TextWork):
        self._registry = registry
        self._metrics = metrics
        self._config = config
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        record = Record()
        try:
            await self._serve(Request(scope, receive), send, record)
        except (ClientGone, ClientDisconnect, asyncio.CancelledError) as gone:
            record.outcome = "cancelled"
            if isinstance(gone, asyncio.CancelledError):
                raise
        except HelexaError as error:
            record.outcome = error.code
            raise
        except Exception:
            record.outcome = "internal_error"
            raise
        finally:
            self._account(record, scope.get("state", {}).get("request_id"))

    @abstractmethod
    async def _serve(self, http: Request, send: Send, record: Record) -> None:
        """Answers the request, and writes into the record what it came to."""

    def _account(self, record: Record, request_id: str | None) -> None:
        duration_s = time.monotonic() - record.started_s
        tokens = record.tokens()
        self._metrics.count_request(self.route, record.model, record.outcome, duration_s, tokens)
        first_s = record.first_token_s
        logger.info(
            "request",
            extra=fields(
                route=self.route,
                model=record.model or None,
                outcome=record.outcome,
                finish=",".join(sorted(set(record.finish_reasons.values()))) or None,
                **asdict(tokens),
                ttft_ms=round((first_s - record.started_s) * 1e3, 1) if first_s else None,
                duration_ms=round(duration_s * 1e3, 1),
                request_id=request_id,
            ),
        )
