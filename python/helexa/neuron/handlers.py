"""The control routes of a neuron. They answer from memory and never wait for a device."""

import asyncio
import logging
import platform
import time
from contextlib import suppress
from importlib import metadata

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from helexa import __version__
from helexa.engine.device import wake_cuda
from helexa.errors import UnknownModel
from helexa.log import fields
from helexa.neuron import discovery
from helexa.neuron.config import NeuronConfig
from helexa.neuron.metrics import CONTENT_TYPE, Metrics
from helexa.neuron.registry import LoadedModel, Registry
from helexa.neuron.streaming import read_body
from helexa.wire.body import decode
from helexa.wire.control import (
    DefragReply,
    DeviceHealth,
    Discovery,
    Health,
    LoadRequest,
    UnloadReply,
    UnloadRequest,
    VersionInfo,
)
from helexa.wire.generation import encode
from helexa.wire.models import ModelCard, ModelList

logger = logging.getLogger(__name__)

_TELEMETRY_S = 5.0


class Control:
    """Answers what the neuron is and has, and loads and unloads models."""

    def __init__(self, config: NeuronConfig, registry: Registry, metrics: Metrics):
        self._config = config
        self._registry = registry
        self._metrics = metrics
        self._started_s = time.monotonic()
        self._discovery: asyncio.Task[Discovery] | None = None
        self._devices: list[DeviceHealth] = []

    @property
    def routes(self) -> list[Route]:
        return [
            Route("/", self.root),
            Route("/version", self.version),
            Route("/discovery", self.discovery),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
            Route("/models", self.models),
            Route("/models/load", self.load, methods=["POST"]),
            Route("/models/unload", self.unload, methods=["POST"]),
            Route("/defrag", self.defrag, methods=["POST"]),
            Route("/v1/models", self.model_list),
            Route("/v1/models/{model_id:path}", self.model_card),
        ]

    async def watch_devices(self) -> None:
        """Looks at the hardware once, then keeps the telemetry of its devices fresh, if there are any."""
        self._discovery = asyncio.create_task(_discover())
        found = await self._discovery
        if found.cuda_unavailable_reason:
            logger.warning("cuda_unavailable", extra=fields(reason=found.cuda_unavailable_reason))
        while found.devices:
            self._devices = await asyncio.to_thread(discovery.device_health)
            await asyncio.sleep(_TELEMETRY_S)

    async def root(self, _: Request) -> Response:
        return _json({"name": "helexa-neuron", "version": __version__})

    async def version(self, _: Request) -> Response:
        torch_version = None
        with suppress(metadata.PackageNotFoundError):
            torch_version = metadata.version("torch")
        return _json(
            VersionInfo(
                version=__version__, python_version=platform.python_version(), torch_version=torch_version
            )
        )

    async def discovery(self, _: Request) -> Response:
        if self._discovery is None:
            self._discovery = asyncio.create_task(_discover())
        return _json(await asyncio.shield(self._discovery))

    async def health(self, _: Request) -> Response:
        activation = self._registry.activation()
        loads = [load for model in self._registry if (load := model.load_info())]
        is_degraded = bool(activation.failed) or any(load.poisoned for load in loads)
        return _json(
            Health(
                status="draining" if self._registry.is_draining else "degraded" if is_degraded else "ok",
                uptime_s=round(time.monotonic() - self._started_s, 3),
                memory_available_bytes=self._registry.memory_available_bytes(),
                activation=activation,
                models=loads,
                devices=self._devices,
                unaccounted_bytes=self._registry.unaccounted_bytes(),
                reason=self._registry.refusal,
            )
        )

    async def metrics(self, _: Request) -> Response:
        return Response(self._metrics.render(), headers={"content-type": CONTENT_TYPE})

    async def models(self, _: Request) -> Response:
        return _json(self._registry.infos())

    async def load(self, request: Request) -> Response:
        wanted = decode(await self._body(request), LoadRequest)
        model = await self._registry.load(wanted) if wanted.wait else self._registry.start_load(wanted)
        return _json(model.info(), 202 if model.status == "loading" else 200)

    async def unload(self, request: Request) -> Response:
        wanted = decode(await self._body(request), UnloadRequest)
        await self._registry.unload(wanted.model_id, wanted.drain_s)
        return _json(UnloadReply(model_id=wanted.model_id))

    async def defrag(self, _: Request) -> Response:
        return _json(DefragReply(freed_bytes=await self._registry.defragment()))

    async def model_list(self, _: Request) -> Response:
        return _json(ModelList([_card(model) for model in self._registry if model.status == "loaded"]))

    async def model_card(self, request: Request) -> Response:
        model_id = request.path_params["model_id"]
        for model in self._registry:
            if model.id == model_id and model.status == "loaded":
                return _json(_card(model))
        raise UnknownModel(f"model '{model_id:.200}' is not loaded here", param="model")

    async def _body(self, request: Request) -> bytes:
        return await read_body(request, self._config.neuron.max_body_bytes)


async def _discover() -> Discovery:
    """What the host is. Where it has CUDA devices, CUDA is started, and its word on them counts."""
    found = await asyncio.to_thread(discovery.discover)
    if found.devices and (problem := await asyncio.to_thread(wake_cuda)) is not None:
        found = msgspec.structs.replace(found, cuda_unavailable_reason=problem)
    return found


def _card(model: LoadedModel) -> ModelCard:
    info = model.info()
    return ModelCard(
        id=info.id,
        created=info.loaded_at or 0,
        loaded=info.status == "loaded",
        capabilities=info.capabilities,
        tool_call=info.tool_call,
        reasoning=info.reasoning,
        limit=info.limit,
        max_model_len=info.limit.context if info.limit else None,
    )


def _json(answer: object, status: int = 200) -> Response:
    return Response(encode(answer), status, media_type="application/json")
