"""The routes of whoever runs the fleet: load and unload models on its neurons, read its settings again."""

import logging
from collections.abc import Awaitable, Callable

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from helexa.errors import BadRequest, Unavailable, UnknownModel
from helexa.gateway.fleet import Node
from helexa.gateway.gateway import Gateway
from helexa.gateway.handlers import read_body
from helexa.gateway.router import is_feasible
from helexa.log import fields
from helexa.wire.body import decode
from helexa.wire.control import LoadOptions, LoadRequest, ModelId, Source, UnloadRequest

logger = logging.getLogger(__name__)

_MAX_BODY_BYTES = 64 * 1024
Reload = Callable[[], Awaitable[dict[str, object]]]


class _Load(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a neuron's own route takes, and the neuron."""

    model_id: ModelId
    node: str | None = None
    source: Source | None = None
    options: LoadOptions = LoadOptions()
    wait: bool = False


class _Unload(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    model_id: ModelId
    node: str | None = None
    drain_s: float | None = None


class Admin:
    """Needs an admin key, as soon as there is one."""

    def __init__(self, gateway: Gateway, reload: Reload | None = None):
        self._gateway = gateway
        self._reload = reload

    @property
    def routes(self) -> list[Route]:
        return [
            Route("/models/load", self.load, methods=["POST"]),
            Route("/models/unload", self.unload, methods=["POST"]),
            Route("/reload", self.reload, methods=["POST"]),
        ]

    async def load(self, request: Request) -> Response:
        wanted = decode(await self._body(request), _Load)
        model = self._gateway.catalogue.resolve(wanted.model_id)
        node = self._node_for(model, wanted.node)
        entry = self._gateway.catalogue.models.get(model)
        known = LoadRequest(model_id=model, source=wanted.source)
        if entry is not None and wanted.source is None:
            known = entry.load_request()
        quant = wanted.options.quant or known.options.quant
        options = msgspec.structs.replace(wanted.options, quant=quant)
        asked = msgspec.structs.replace(known, options=options, wait=wanted.wait)
        return await self._carry_out(node, "/models/load", asked)

    async def unload(self, request: Request) -> Response:
        wanted = decode(await self._body(request), _Unload)
        model = self._gateway.catalogue.resolve(wanted.model_id)
        node = self._node_with(model, wanted.node)
        asked = UnloadRequest(model_id=model, drain_s=wanted.drain_s)
        return await self._carry_out(node, "/models/unload", asked)

    async def reload(self, request: Request) -> Response:
        self._gateway.keys.check(request.headers).require_admin()
        if self._reload is None:
            raise BadRequest("this gateway was started without a configuration file to read again")
        return JSONResponse(await self._reload())

    async def _body(self, request: Request) -> bytes:
        self._gateway.keys.check(request.headers).require_admin()
        return await read_body(request.receive, request.headers, _MAX_BODY_BYTES)

    async def _carry_out(self, node: Node, path: str, asked: msgspec.Struct) -> Response:
        """The neuron's answer with its name; what the gateway knows of it is up to date then."""
        try:
            status, body = await self._gateway.loader.ask(node, path, asked)
        finally:
            await self._gateway.poller.poll(node)
        logger.info("admin", extra=fields(path=path, node=node.name, model=getattr(asked, "model_id", None)))
        return JSONResponse({**msgspec.json.decode(body), "node": node.name}, status)

    def _node_for(self, model: str, name: str | None) -> Node:
        """The node to load on: the one named, one that has it, or the feasible one with most free memory."""
        if name is not None:
            return self._named(name)
        nodes = [node for node in self._gateway.fleet.routable() if node.kind == "neuron"]
        entry = self._gateway.catalogue.models.get(model)
        having = [node for node in nodes if model in node.models]
        fitting = having or [node for node in nodes if entry is None or is_feasible(node, entry)]
        if not fitting:
            raise Unavailable(f"no node that is up can hold model {model!r}")
        return max(fitting, key=lambda node: sum(device.free_bytes for device in node.devices))

    def _node_with(self, model: str, name: str | None) -> Node:
        if name is not None:
            return self._named(name)
        nodes = [node for node in self._gateway.fleet.nodes.values() if node.kind == "neuron"]
        having = [node for node in nodes if model in node.models]
        if not having:
            raise UnknownModel(f"no node has model {model!r}; `helexa status` lists them", param="model_id")
        if len(having) > 1:
            names = ", ".join(node.name for node in having)
            raise BadRequest(
                f"several nodes have model {model!r}: {names}; say which with 'node'", param="node"
            )
        return having[0]

    def _named(self, name: str) -> Node:
        nodes = {name: node for name, node in self._gateway.fleet.nodes.items() if node.kind == "neuron"}
        if name not in nodes:
            known = ", ".join(nodes) or "none"
            raise BadRequest(f"there is no neuron {name!r:.80}; known: {known}", param="node")
        return nodes[name]
