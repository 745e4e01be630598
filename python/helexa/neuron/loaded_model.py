"""One model of a neuron, in whatever state, and the requests that run on it."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from helexa.engine.device import AUTO
from helexa.engine.engine import Engine
from helexa.errors import DevicePoisoned, HelexaError, LoadFailed, ModelLoading, Unavailable
from helexa.neuron.admission import Admission
from helexa.wire.control import ErrorInfo, Limit, ModelInfo, ModelLoad, ModelStatus, Progress


class Lease:
    """One request on a model; `abort` ends it with an error wherever it is."""

    def __init__(self) -> None:
        self.error: HelexaError | None = None
        self._task = asyncio.current_task()

    def abort(self, error: HelexaError) -> None:
        if self.error is None and self._task is not None:
            self.error = error
            self._task.cancel()


class LoadedModel:
    """A model that is in the registry, in whatever state."""

    def __init__(self, model_id: str, source: str, options: dict[str, Any]):
        self.id = model_id
        self.source = source
        self.options = options
        self.status: ModelStatus = "loading"
        self.progress = Progress(phase="queued", percent=0.0)
        self.error: HelexaError | None = None
        self.engine: Engine | None = None
        self.admission: Admission | None = None
        self.loaded_at: int | None = None
        self.load_seconds: float | None = None
        self.memory_bytes: int | None = None  # of its file and its cache
        self.claimed_bytes = 0  # main memory that it holds or may yet take
        self.started_s = time.monotonic()
        self.is_cancelled = False
        self.task: asyncio.Task[None] | None = None
        self.turn: asyncio.Future[Any] | None = None  # while it waits for another model's load to end
        self.gone = asyncio.Event()
        self._leases: set[Lease] = set()

    @asynccontextmanager
    async def lease(
        self, seats: int, *, principal: str = "", priority: int = 0, kv_tokens: int = 0
    ) -> AsyncIterator[Engine]:
        """Waits for seats, holds them, and gives the engine. Raises Overloaded, or the error of an unload."""
        if self.engine is None or self.admission is None:
            raise Unavailable(f"model '{self.id}' is {self.status}", retry_after_s=1)
        lease = Lease()
        self._leases.add(lease)
        try:
            async with self.admission.seat(
                seats, principal=principal, priority=priority, kv_tokens=kv_tokens
            ):
                yield self.engine
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if lease.error is None or task is None:
                raise
            task.uncancel()
            raise lease.error from None
        finally:
            self._leases.discard(lease)

    def check_admission(self, principal: str, priority: int) -> None:
        """Raises what a request gets that would be sent away in any case, however small it is."""
        if self.admission is not None:
            self.admission.check(principal=principal, priority=priority)

    async def drain(self, error: HelexaError, grace_s: float) -> None:
        """Refuses what waits, lets what runs go on for `grace_s`, then ends it with `error`."""
        if self.admission is None:
            return
        self.admission.close(error)
        if await self.admission.wait_idle(grace_s):
            return
        for lease in list(self._leases):
            lease.abort(error)
        await self.admission.wait_idle(5.0)

    @property
    def is_busy(self) -> bool:
        """Whether requests run or wait."""
        return self.admission is not None and bool(self.admission.in_flight or self.admission.queue_depth)

    @property
    def poisoned(self) -> str | None:
        return self.engine.stats().poisoned if self.engine else None

    def require_ready(self) -> None:
        """Raises what a request for this model gets if it cannot be served now."""
        if self.status == "loading":
            raise ModelLoading(
                f"model '{self.id}' is loading ({self.progress.phase}, {self.progress.percent:.0f} %)",
                retry_after_s=self._remaining_s(),
                param="model",
                progress=msgspec.to_builtins(self._progress()),
            )
        if self.status == "failed" and self.error:
            message = f"model '{self.id}' could not be loaded: {self.error.message}"
            raise LoadFailed(message, retry_after_s=None, param="model", cause=self.error.code)
        if self.status != "loaded":
            raise Unavailable(f"model '{self.id}' is {self.status}", retry_after_s=2, param="model")
        if reason := self.poisoned:
            raise DevicePoisoned(f"model '{self.id}' must be loaded again: {reason}", param="model")

    def info(self) -> ModelInfo:
        """What GET /models says."""
        error, status = self.error, self.status
        if status == "loaded" and (reason := self.poisoned):
            status, error = "poisoned", DevicePoisoned(reason)
        engine = self.engine
        device = engine.options.device if engine else str(self.options.get("device", AUTO))
        return ModelInfo(
            id=self.id,
            status=status,
            source=self.source,
            device=device,
            devices=[int(index)] if (index := device.partition(":")[2]) else [],
            architecture=engine.config.model_type if engine else None,
            memory_bytes=self.memory_bytes,
            capabilities=_capabilities(engine) if engine else [],
            tool_call=bool(engine and engine.output_format.capabilities["tool_call"]),
            reasoning=bool(engine and engine.output_format.capabilities["reasoning"]),
            limit=Limit(context=engine.max_context) if engine else None,
            loaded_at=self.loaded_at,
            load_seconds=self.load_seconds,
            progress=self._progress() if status == "loading" else None,
            error=ErrorInfo(code=error.code, message=error.message, status=error.status) if error else None,
        )

    def load_info(self) -> ModelLoad | None:
        """How busy the model is; None while it is not loaded."""
        if self.engine is None or self.admission is None:
            return None
        stats = self.engine.stats()
        return ModelLoad(
            id=self.id,
            in_flight=self.admission.in_flight,
            queue_depth=self.admission.queue_depth,
            max_in_flight=self.admission.max_in_flight,
            max_queue_depth=self.admission.max_queue_depth,
            rejected_queue_full=self.admission.rejected_queue_full,
            rejected_timeout=self.admission.rejected_timeout,
            rejected_per_principal=self.admission.rejected_per_principal,
            kv_tokens_used=stats.kv_tokens_used,
            kv_tokens_total=stats.kv_tokens_total,
            kv_tokens_cached=stats.kv_tokens_cached,
            snapshots_used=stats.snapshots_used,
            snapshots_total=stats.snapshots_total,
            stored_tokens=stats.stored_tokens,
            tok_s_prefill=stats.prefill_tok_s,
            tok_s_decode=stats.decode_tok_s,
            poisoned=stats.poisoned,
        )

    def serve(self, engine: Engine, admission: Admission, path: Path, grown_bytes: int) -> None:
        """Is loaded from now on. grown_bytes: by which loading it has made the process larger."""
        size = engine.weight_bytes or (path.stat().st_size if path.is_file() else 0)
        self.engine, self.admission = engine, admission
        self.memory_bytes = size + engine.cache_bytes or None
        # The cache grows into its memory, and vocabularies are no part of either.
        self.claimed_bytes = max(grown_bytes, self.memory_bytes or 0)
        if engine.options.device != "cpu":  # whose memory is not the process's
            self.claimed_bytes = grown_bytes
        self.loaded_at = int(time.time())
        self.status = "loaded"

    def _progress(self) -> Progress:
        if self.progress.percent < 1:
            return self.progress
        return msgspec.structs.replace(self.progress, remaining_s=round(self._remaining_s(), 1))

    def _remaining_s(self) -> float:
        """A guess at how long the load still takes, from how far it has come."""
        elapsed = time.monotonic() - self.started_s
        percent = self.progress.percent
        return min(max(1.0, elapsed * (100 - percent) / percent if percent >= 1 else elapsed + 2), 60.0)


def _capabilities(engine: Engine) -> list[str]:
    """What the model may be used for, in the words of model lists."""
    return ["text", "embeddings"] if engine.pooling else ["text"]
