"""The models of this neuron and their life: loading, loaded, unloading, failed, poisoned.

Lives on the event loop; files are fetched and engines made in threads of their own. Loads of one id are one
load, and one model loads at a time, since each takes all the disk and memory bandwidth there is.
"""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

from helexa.engine import memory
from helexa.engine.device import AUTO
from helexa.engine.engine import Engine
from helexa.errors import (
    BadRequest,
    HelexaError,
    ShuttingDown,
    SourceError,
    Unavailable,
    UnknownModel,
)
from helexa.log import fields
from helexa.neuron.admission import Admission
from helexa.neuron.config import AdmissionSection, ModelEntry, NeuronConfig, merge_options
from helexa.neuron.loaded_model import LoadedModel
from helexa.neuron.metrics import Metrics
from helexa.weights import starter
from helexa.weights.names import is_hub_name, named_recipe
from helexa.wire.control import Activation, LoadFailure, LoadRequest, ModelInfo, Progress

__all__ = ["LoadedModel", "Registry", "Report"]

logger = logging.getLogger(__name__)
T = TypeVar("T")
Report = Callable[[str, float], None]  # phase, percent

_STOP_S = 5.0  # how long closing waits for a load to notice that it is not wanted

_RETRIES_S = (10, 20, 40, 80, 160, 300)  # of default models out of reach, as after a power cut
_FAILURE_S = 600.0  # how long the failed load of a model that is not configured is shown
_MOST_FAILURES = 16  # of these


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
        self._own_bytes = memory.resident_bytes()  # of the process without models
        self._closing: ShuttingDown | None = None
        self._activation: dict[str, str] = {entry.id: "pending" for entry in config.models if entry.load}

    @property
    def is_draining(self) -> bool:
        return self._closing is not None

    def __iter__(self) -> Iterator[LoadedModel]:
        return iter(list(self._models.values()))

    def infos(self) -> list[ModelInfo]:
        """The models that are here, and those that are configured and would be loaded if asked for."""
        unloaded = [
            ModelInfo(id=entry.id, status="unloaded", source=entry.source or entry.id)
            for entry in self._config.models
            if entry.id not in self._models
        ]
        return [*(model.info() for model in self), *unloaded]

    def memory_available_bytes(self) -> int:
        """What a further model may take: what is free, less what the caches of those here will fill yet."""
        return max(0, memory.available_bytes() - self._promised_bytes())

    def unaccounted_bytes(self) -> int:
        """What the process holds beyond its models; not known while one is loaded."""
        is_loading = any(model.status == "loading" for model in self)
        return 0 if is_loading else max(0, self._excess_bytes())

    def _promised_bytes(self) -> int:
        """What the caches of the models here are yet to fill."""
        return max(0, -self._excess_bytes())

    def _excess_bytes(self) -> int:
        claimed = sum(model.claimed_bytes for model in self)
        return memory.resident_bytes() - self._own_bytes - claimed

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

    def namespace(self, principal: str) -> str:
        """Within which the prompts of whoever asks share what was computed."""
        return principal if self._config.state_cache.isolate_keys else ""

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
        return self._begin_load(LoadedModel(request.model_id, source, options), (model,) if model else ())

    def reload(self, model: LoadedModel) -> LoadedModel:
        """The same model, being loaded anew from the same source; what runs on the old one is ended."""
        if self._closing:
            raise self._closing
        return self._begin_load(LoadedModel(model.id, model.source, model.options), (model,))

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

    async def defragment(self) -> int:
        """Unloads all models, gives all memory back to the system and loads them again; the bytes gained.

        Raises Unavailable if a model is at work, or what made the first of the loads fail.
        """
        before = [model for model in self if model.status == "loaded"]
        if busy := [f"'{model.id}'" for model in before if model.is_busy]:
            raise Unavailable(f"at work: {', '.join(busy)}", retry_after_s=30)
        held = memory.resident_bytes()
        fresh = [LoadedModel(model.id, model.source, model.options) for model in before]
        tasks = [task for model in fresh if (task := self._begin_load(model, before).task)]
        await asyncio.shield(asyncio.gather(*tasks))
        if error := next((model.error for model in fresh if model.error), None):
            raise error
        return held - memory.resident_bytes()

    async def activate(self) -> None:
        """Loads the default models; those whose source is out of reach are tried again for some minutes."""
        await asyncio.gather(*(self._activate(name) for name in self._activation))

    async def before_loads(self, work: Callable[[], object]) -> None:
        """Does the work in a thread unless there is a model by now; loads wait for its end."""
        if not self._models:
            async with self._one_load:
                await asyncio.to_thread(work)

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

    def refuse(self, message: str) -> None:
        """Refuses new requests and loads from now on, and ends those that wait."""
        self._closing = ShuttingDown(message, retry_after_s=15)
        for model in self:
            if model.admission is not None:
                model.admission.close(self._closing)

    @property
    def refusal(self) -> str | None:
        """Why nothing new is taken, if so."""
        return self._closing.message if self._closing else None

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

    def _begin_load(self, model: LoadedModel, after: Sequence[LoadedModel]) -> LoadedModel:
        """Puts the model in its place, to be loaded when those in `after` are gone."""
        self._models[model.id] = model
        model.task = asyncio.create_task(self._run_load(model, after), name=f"load {model.id}")
        return model

    async def _run_load(self, model: LoadedModel, after: Sequence[LoadedModel]) -> None:
        """Fetches and loads; whatever goes wrong becomes the model's error."""
        try:
            for old in after:
                await self._retire(old, Unavailable(f"model '{old.id}' is loaded again"), 0.0)
                await old.gone.wait()
            path = await self._in_thread(model, lambda report: self._fetch(model.source, report))
            async with self._turn(model):
                before, model.started_s = memory.resident_bytes(), time.monotonic()
                engine = await self._in_thread(model, partial(self._load_engine, path, model))
                model.load_seconds = round(time.monotonic() - model.started_s, 3)
                admission = _admission(self._config.admission, engine)
                model.serve(engine, admission, path, memory.resident_bytes() - before)
            self._metrics.loads.labels(model.id, "ok").inc()
            self._metrics.load_seconds.labels(model.id).observe(model.load_seconds)
            limit, seconds = engine.max_context, model.load_seconds
            logger.info(
                "model_ready", extra=fields(model=model.id, path=path, max_context=limit, seconds=seconds)
            )
        except HelexaError as error:
            self._fail(model, error)
        except Exception:
            logger.exception("load_failed", extra=fields(model=model.id, source=model.source))
            self._fail(model, HelexaError("loading failed unexpectedly; the neuron's log has the details"))

    @asynccontextmanager
    async def _turn(self, model: LoadedModel) -> AsyncIterator[None]:
        """Waits for the loads of other models; raises Unavailable if it is unloaded while it waits."""
        model.turn = turn = asyncio.ensure_future(self._one_load.acquire())
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._one_load.release()
            if not model.is_cancelled:
                raise
            raise Unavailable(f"the load of model '{model.id}' was stopped", retry_after_s=1) from None
        finally:
            model.turn = None
        try:
            yield
        finally:
            self._one_load.release()

    def _fail(self, model: LoadedModel, error: HelexaError) -> None:
        model.status, model.error = "failed", error
        self._metrics.loads.labels(model.id, "failed").inc()
        logger.error("model_failed", extra=fields(model=model.id, code=error.code, error=error.message))
        if model.id not in self._entries:
            asyncio.get_running_loop().call_later(_FAILURE_S, self._forget, model)
            failures = [one for one in self if one.status == "failed" and one.id not in self._entries]
            for oldest in failures[:-_MOST_FAILURES]:
                self._forget(oldest)

    def _forget(self, model: LoadedModel) -> None:
        if self._models.get(model.id) is model and model.status == "failed":
            del self._models[model.id]

    def _load_engine(self, path: Path, model: LoadedModel, report: Report) -> Engine:
        return self._load(
            path,
            progress=lambda step: report(step.phase, step.percent),
            reserved_bytes=self._promised_bytes(),
            **({"device": AUTO} | _quant(model.source, path) | model.options),
        )

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
        if model.turn:
            model.turn.cancel()
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
                del engine  # the last that knows of it
                await asyncio.to_thread(memory.release)
                logger.info("model_unloaded", extra=fields(model=model.id))
            model.gone.set()
        if self._models.get(model.id) is model:
            del self._models[model.id]


def _quant(source: str, path: Path) -> dict[str, str]:
    """ORG/REPO:QUANT of a repository without such a file: what it has is quantized while it loads."""
    recipe = named_recipe(source) if path.is_dir() else None
    return {"quant": recipe} if recipe else {}


def _admission(section: AdmissionSection, engine: Engine) -> Admission:
    seats = section.max_in_flight or engine.options.max_sequences
    return Admission(
        seats,
        section.max_queue_depth,
        section.max_wait_s,
        max_per_principal=section.max_per_principal,
        kv_tokens_total=engine.stats().kv_tokens_total,
    )
