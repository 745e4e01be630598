"""The models of this neuron and their life: loading, loaded, unloading, failed, poisoned.

Lives on the event loop; files are fetched and engines made in threads of their own. Loads of one id are one
load, and one model loads at a time, since each takes all the disk and memory bandwidth there is.
"""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from helexa.engine.engine import Engine
from helexa.errors import (
    BadRequest,
    DevicePoisoned,
    HelexaError,
    LoadFailed,
    ModelLoading,
    ShuttingDown,
    SourceError,
    Unavailable,
    UnknownModel,
)
from helexa.log import fields
from helexa.neuron.admission import Admission
from helexa.neuron.config import AdmissionSection, ModelEntry, NeuronConfig, merge_options
from helexa.neuron.metrics import Metrics
from helexa.weights import starter
from helexa.weights.names import is_hub_name
from helexa.wire.control import (
    Activation,
    ErrorInfo,
    Limit,
    LoadFailure,
    LoadRequest,
    ModelInfo,
    ModelLoad,
    ModelStatus,
    Progress,
)

logger = logging.getLogger(__name__)
T = TypeVar("T")
Report = Callable[[str, float], None]  # phase, percent

_STOP_S = 5.0  # how long closing waits for a load to notice that it is not wanted

_RETRIES_S = (
    10,
    20,
    40,
    80,
    160,
    300,
)  # of default models whose source is out of reach, as after a power cut


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
        self.memory_bytes: int | None = None
        self.started_s = time.monotonic()
        self.is_cancelled = False
        self.task: asyncio.Task[None] | None = None
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
    def poisoned(self) -> str | None:
        return self.engine.stats().poisoned if self.engine else None

    def require_ready(self) -> None:
        """Raises what a request for this model gets if it cannot be served now."""
        if self.status == "loading":
            raise ModelLoading(
                f"model '{self.id}' is loading ({self.progress.phase}, {self.progress.percent:.0f} %)",
                retry_after_s=self._remaining_s(),
                param="model",
                progress={"phase": self.progress.phase, "percent": self.progress.percent},
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
        return ModelInfo(
            id=self.id,
            status=status,
            source=self.source,
            device=engine.options.device if engine else str(self.options.get("device", "cpu")),
            architecture=engine.config.model_type if engine else None,
            memory_bytes=self.memory_bytes,
            capabilities=["text"] if engine else [],
            limit=Limit(context=engine.max_context) if engine else None,
            loaded_at=self.loaded_at,
            load_seconds=self.load_seconds,
            progress=self.progress if status == "loading" else None,
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
            tok_s_prefill=stats.prefill_tok_s,
            tok_s_decode=stats.decode_tok_s,
            poisoned=stats.poisoned,
        )

    def _remaining_s(self) -> float:
        """A guess at how long the load still takes, from how far it has come."""
        elapsed = time.monotonic() - self.started_s
        percent = self.progress.percent
        return min(max(1.0, elapsed * (100 - percent) / percent if percent >= 1 else elapsed + 2), 60.0)


class Registry:
    """All models of the process. `fetch` and `load` run in threads and report phase and percent."""

    def __init__(
        self,
        config: NeuronConfig,
        metrics: Metrics,
        *,
        fetch: Callable[[str, Report], Path],
        load: Callable[..., Engine],
    ):
        self._config = config
        self._metrics = metrics
        self._fetch = fetch
        self._load = load
        self._entries = {entry.id: entry for entry in config.models}
        self._models: dict[str, LoadedModel] = {}
        self._one_load = asyncio.Lock()
        self._closing: ShuttingDown | None = None
        self._activation: dict[str, str] = {entry.id: "pending" for entry in config.models if entry.load}

    @property
    def is_draining(self) -> bool:
        return self._closing is not None

    def __iter__(self) -> Iterator[LoadedModel]:
        return iter(list(self._models.values()))

    def get(self, model_id: str) -> LoadedModel:
        """The model, ready to serve; raises UnknownModel, or why it cannot serve now."""
        if self._closing:
            raise self._closing
        model = self._models.get(model_id)
        if model is None:
            loaded = ", ".join(f"'{name}'" for name in self._models) or "none"
            raise UnknownModel(f"model '{model_id:.200}' is not loaded here; loaded: {loaded}", param="model")
        model.require_ready()
        return model

    def start_load(self, request: LoadRequest) -> LoadedModel:
        """The model that `request` asks for, being loaded from now on unless it was already."""
        if self._closing:
            raise self._closing
        if not request.model_id.strip():
            raise BadRequest(
                "'model_id' is empty; expected the id to serve the model under", param="model_id"
            )
        entry = self._entries.get(request.model_id, ModelEntry(id=request.model_id))
        source = request.source or entry.source or entry.id
        model = self._models.get(request.model_id)
        if model and model.status in ("loading", "loaded", "unloading") and not model.poisoned:
            if request.source and request.source != model.source:
                message = f"model '{model.id}' is {model.status} from {model.source}; unload it first"
                raise BadRequest(message, param="source")
            if model.status != "unloading":
                return model
        options = merge_options(request.options, entry.options, self._config.engine.options)
        fresh = LoadedModel(request.model_id, source, options)
        self._models[fresh.id] = fresh
        fresh.task = asyncio.create_task(self._run_load(fresh, after=model), name=f"load {fresh.id}")
        return fresh

    async def load(self, request: LoadRequest) -> LoadedModel:
        """The loaded model. Raises what made the load fail. Going away does not stop the load."""
        model = self.start_load(request)
        if model.task:
            await asyncio.shield(model.task)
        if model.error:
            raise model.error
        return model

    async def unload(self, model_id: str, drain_s: float | None = None) -> None:
        """Takes the model away; one that is loading is stopped. Raises UnknownModel."""
        model = self._models.get(model_id)
        if model is None:
            raise UnknownModel(f"model '{model_id:.200}' is not loaded here", param="model_id")
        grace_s = self._config.neuron.shutdown_grace_s if drain_s is None else drain_s
        await self._retire(model, Unavailable(f"model '{model_id}' was unloaded", retry_after_s=1), grace_s)
        self._metrics.unloads.labels(model_id).inc()

    async def activate(self) -> None:
        """Loads the default models; those whose source is out of reach are tried again for some minutes."""
        await asyncio.gather(*(self._activate(name) for name in self._activation))

    def activation(self) -> Activation:
        """How far `activate` is."""
        states = self._activation
        pending = [name for name, state in states.items() if state == "pending"]
        running = [
            name for name in pending if name in self._models and self._models[name].status == "loading"
        ]
        failed = [name for name, state in states.items() if state == "failed"]
        return Activation(
            state="pre_warming" if pending else "ready",
            pending=[name for name in pending if name not in running[:1]],
            in_progress=running[0] if running else None,
            completed=[name for name, state in states.items() if state == "completed"],
            failed=[
                LoadFailure(model_id=name, code=error.code, error=error.message)
                for name in failed
                if name in self._models and (error := self._models[name].error)
            ],
        )

    async def close(self, grace_s: float) -> None:
        """Refuses new requests at once, drains every model and frees it."""
        self._closing = ShuttingDown("the neuron is shutting down", retry_after_s=15)
        await asyncio.gather(*(self._retire(model, self._closing, grace_s) for model in self))

    async def _activate(self, model_id: str) -> None:
        entry = self._entries[model_id]
        is_remote = is_hub_name(entry.source or entry.id) or entry.source == starter.NAME
        for delay_s in (*_RETRIES_S, None):
            try:
                self._activation[model_id] = "pending"
                await self.load(LoadRequest(model_id=model_id))
                self._activation[model_id] = "completed"
                return
            except HelexaError as error:
                self._activation[model_id] = "failed"
                if delay_s is None or not is_remote or not isinstance(error, SourceError):
                    return
            await asyncio.sleep(delay_s)
            if model_id not in self._models:  # unloaded meanwhile: it is no longer wanted
                return

    async def _run_load(self, model: LoadedModel, after: LoadedModel | None) -> None:
        """Fetches and loads; whatever goes wrong becomes the model's error."""
        try:
            if after is not None:
                await self._retire(after, Unavailable(f"model '{after.id}' is loaded again"), 0.0)
                await after.gone.wait()
            path = await self._in_thread(model, lambda report: self._fetch(model.source, report))
            async with self._one_load:
                model.started_s = started = time.monotonic()
                model.engine = await self._in_thread(model, partial(self._load_engine, path, model))
                model.load_seconds = round(time.monotonic() - started, 3)
            self._ready(model, path)
        except HelexaError as error:
            self._fail(model, error)
        except Exception:
            logger.exception("load_failed", extra=fields(model=model.id, source=model.source))
            self._fail(model, HelexaError("loading failed unexpectedly; the neuron's log has the details"))

    def _ready(self, model: LoadedModel, path: Path) -> None:
        assert model.engine is not None
        model.admission = _admission(self._config.admission, model.engine)
        model.memory_bytes = path.stat().st_size if path.is_file() else None
        model.loaded_at = int(time.time())
        model.status = "loaded"
        self._metrics.loads.labels(model.id, "ok").inc()
        self._metrics.load_seconds.labels(model.id).observe(model.load_seconds or 0.0)
        limit, seconds = model.engine.max_context, model.load_seconds
        logger.info(
            "model_ready", extra=fields(model=model.id, path=path, max_context=limit, seconds=seconds)
        )

    def _fail(self, model: LoadedModel, error: HelexaError) -> None:
        model.status, model.error = "failed", error
        self._metrics.loads.labels(model.id, "failed").inc()
        logger.error("model_failed", extra=fields(model=model.id, code=error.code, error=error.message))

    def _load_engine(self, path: Path, model: LoadedModel, report: Report) -> Engine:
        return self._load(path, progress=lambda step: report(step.phase, step.percent), **model.options)

    async def _in_thread(self, model: LoadedModel, work: Callable[[Report], T]) -> T:
        """The result of `work` from a daemon thread, so that a load that hangs cannot hold up the exit."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def report(phase: str, percent: float) -> None:
            if model.is_cancelled:
                raise Unavailable(f"the load of model '{model.id}' was stopped", retry_after_s=1)
            model.progress = Progress(phase=phase, percent=round(percent, 1))

        def settle(result: T | None, error: BaseException | None) -> None:
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)  # type: ignore[arg-type]

        def run() -> None:
            result, error = None, None
            try:
                result = work(report)
            except Exception as caught:
                error = caught
            if not loop.is_closed():
                loop.call_soon_threadsafe(settle, result, error)

        threading.Thread(target=run, name=f"load-{model.id}", daemon=True).start()
        return await future

    async def _retire(self, model: LoadedModel, error: HelexaError, grace_s: float) -> None:
        model.is_cancelled = True
        if model.status == "loading" and model.task and model.task is not asyncio.current_task():
            await asyncio.wait((model.task,), timeout=grace_s + _STOP_S if self._closing else None)
            if not model.task.done():
                logger.warning("load_abandoned", extra=fields(model=model.id, phase=model.progress.phase))
                return
        if model.status != "unloading":
            model.status = "unloading"
            await model.drain(error, grace_s)
            if engine := model.engine:
                model.engine = None
                await asyncio.to_thread(engine.close)
                logger.info("model_unloaded", extra=fields(model=model.id))
            model.gone.set()
        if self._models.get(model.id) is model:
            del self._models[model.id]


def _admission(section: AdmissionSection, engine: Engine) -> Admission:
    seats = section.max_in_flight or engine.options.max_sequences
    return Admission(
        seats,
        section.max_queue_depth,
        section.max_wait_s,
        max_per_principal=section.max_per_principal,
        kv_tokens_total=engine.stats().kv_tokens_total,
    )
