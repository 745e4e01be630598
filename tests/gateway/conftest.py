"""A neuron stand-in on a real loopback port, and a gateway before any number of them."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import aiohttp
import hypercorn.asyncio
import hypercorn.config
import pytest

from helexa.gateway.app import create_app, create_metrics_app
from helexa.gateway.catalogue import Catalogue, ModelEntry
from helexa.gateway.config import GatewayConfig, GatewaySection, NeuronEntry
from helexa.gateway.gateway import Gateway, running
from helexa.server import serve

MIB = 2**20


@dataclass
class FakeNeuron:
    """An ASGI application that answers as a neuron does and keeps a record of what it was asked."""

    models: dict[str, dict[str, Any]] = field(default_factory=dict)  # id → ModelInfo
    words: list[str] = field(default_factory=lambda: ["Once", " upon", " a", " time"])
    pause_s: float = 0.0  # between words
    first_word_s: float = 0.0  # the headers wait as well
    load_s: float = 0.0
    memory_mib: int = 100  # of what it loads
    unaccounted_bytes: int = 0
    defrag_status: int = 200
    defrags: int = 0
    load_error: tuple[int, dict[str, Any]] | None = None
    refusal: tuple[int, dict[str, Any], dict[str, str]] | None = None  # status, error members, headers
    refusal_s: float = 0.0  # before it
    entry: dict[str, Any] = field(default_factory=dict)  # further members of its entry in gateway.toml
    list_status: int = 200  # of GET /v1/models
    half_after: int | None = None  # chunks after which the stream ends in the middle of an event
    total_bytes: int = 1000 * MIB
    status: str = "ok"
    secret: str | None = None
    name: str = ""
    url: str = ""
    loads: list[dict[str, Any]] = field(default_factory=list)
    unloads: list[str] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    cancelled: int = 0
    running: int = 0
    load_reports: dict[str, dict[str, Any]] = field(default_factory=dict)

    def hold(self, model: str, memory_mib: int = 100, **more: Any) -> None:
        self.models[model] = {
            **{"id": model, "status": "loaded", "source": f"{model}.gguf", "memory_bytes": memory_mib * MIB},
            **{"limit": {"context": 8192}, "capabilities": ["text"], **more},
        }

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            while True:
                message = await receive()
                await send({"type": message["type"] + ".complete"})
                if message["type"] == "lifespan.shutdown":
                    return
        body: Any = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        path, asked = scope["path"], json.loads(body or b"{}")
        given = dict(scope["headers"]).get(b"authorization", b"").decode()
        if self.secret and given != f"Bearer {self.secret}":
            await answer(send, 401, {"error": {"message": "no", "code": "invalid_api_key"}})
            return
        if path == "/v1/models":  # as a server of kind openai
            listed = {"object": "list", "data": [{"id": model, "max_model_len": 99} for model in self.models]}
            await answer(send, self.list_status, listed)
        elif path.startswith("/v1/") or path in ("/tokenize", "/detokenize"):
            self.headers.append({name.decode(): value.decode() for name, value in scope["headers"]})
            await self._generate(path, asked, receive, send)
        elif path == "/models/load":
            await self._load(asked, send)
        elif path == "/defrag":
            self.defrags += 1
            body = {"freed_bytes": 1} if self.defrag_status == 200 else {"error": {"message": "busy"}}
            await answer(send, self.defrag_status, body)
        elif path == "/models/unload":
            self.unloads.append(asked["model_id"])
            self.models.pop(asked["model_id"], None)
            await answer(send, 200, {"model_id": asked["model_id"], "status": "unloaded"})
        else:
            await answer(
                send,
                200,
                {"/health": self.health, "/models": self.infos, "/discovery": discovery}[path](self),
            )

    def health(self, _: Any) -> dict[str, Any]:
        used = sum(info.get("memory_bytes", 0) for info in self.models.values())
        reports = [{"id": model, **self.load_reports.get(model, {})} for model in self.models]
        return {
            **{"status": self.status, "uptime_s": 5.0, "memory_available_bytes": self.total_bytes - used},
            **{"activation": {"state": "ready"}, "models": reports},
            "unaccounted_bytes": self.unaccounted_bytes,
        }

    def infos(self, _: Any) -> list[dict[str, Any]]:
        return list(self.models.values())

    async def _load(self, asked: dict[str, Any], send: Any) -> None:
        self.loads.append(asked)
        await asyncio.sleep(self.load_s)
        if self.load_error:
            await answer(send, self.load_error[0], {"error": self.load_error[1]})
            return
        self.hold(asked["model_id"], self.memory_mib)
        self.load_reports.pop(asked["model_id"], None)
        await answer(send, 200, self.models[asked["model_id"]])

    async def _generate(self, path: str, asked: dict[str, Any], receive: Any, send: Any) -> None:
        self.requests.append(asked)
        if asked["model"] not in self.models:
            await answer(send, 404, {"error": {"message": "not loaded", "code": "model_not_found"}})
            return
        if self.refusal:
            await asyncio.sleep(self.refusal_s)
            status, members, headers = self.refusal
            await answer(send, status, {"error": members}, headers)
            return
        work = asyncio.ensure_future(self._answer(path, asked, send))
        gone = asyncio.ensure_future(receive())
        self.running += 1
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        self.running -= 1
        if not work.done():
            self.cancelled += 1
            work.cancel()
        gone.cancel()

    async def _answer(self, path: str, asked: dict[str, Any], send: Any) -> None:
        chat = path.endswith("/chat/completions")
        kind = "chat.completion" if chat else "text_completion"
        head = {"id": "gen-1", "object": kind, "created": 1700000000, "model": asked["model"]}
        usage = {
            "prompt_tokens": 7,
            "completion_tokens": len(self.words),
            "total_tokens": 7 + len(self.words),
        }
        usage["prompt_tokens_details"] = {"cached_tokens": 3}  # type: ignore[assignment]
        await asyncio.sleep(self.first_word_s)
        if not asked.get("stream"):
            await asyncio.sleep(self.pause_s * len(self.words))
            text = "".join(self.words)
            said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
            await answer(
                send,
                200,
                {**head, "choices": [{"index": 0, **said, "finish_reason": "stop"}], "usage": usage},
            )
            return
        if chat:
            head["object"] += ".chunk"
        await send(start(200, {"content-type": "text/event-stream"}))
        for index, word in enumerate([*self.words, None]):
            finish = "stop" if word is None else None
            delta = {"content": word} if word is not None else {}
            said = {"delta": delta} if chat else {"text": word or ""}
            event = data({**head, "choices": [{"index": 0, **said, "finish_reason": finish}]})
            if index == self.half_after:
                await send(
                    {"type": "http.response.body", "body": event[: len(event) // 2], "more_body": False}
                )
                return
            await send({"type": "http.response.body", "body": event, "more_body": True})
            await asyncio.sleep(self.pause_s)
        tail = data({**head, "choices": [], "usage": usage}) + b"data: [DONE]\n\n"
        await send({"type": "http.response.body", "body": tail, "more_body": False})


def discovery(neuron: FakeNeuron) -> dict[str, Any]:
    cpu = {
        "name": "CPU",
        "cores": 2,
        "threads": 2,
        "instruction_sets": [],
        "memory_total_bytes": neuron.total_bytes,
    }
    return {"hostname": neuron.name, "os": "Linux", "kernel": "6", "cpu": cpu, "devices": []}


def data(payload: Any) -> bytes:
    return b"data: " + json.dumps(payload).encode() + b"\n\n"


def start(status: int, headers: dict[str, str]) -> dict[str, Any]:
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    return {"type": "http.response.start", "status": status, "headers": pairs}


async def answer(send: Any, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
    await send(start(status, {"content-type": "application/json", **(headers or {})}))
    await send({"type": "http.response.body", "body": json.dumps(body).encode()})


@asynccontextmanager
async def listening(app: Any, serve: Any = hypercorn.asyncio.serve, **more: Any) -> AsyncIterator[str]:
    """Serves an ASGI application on a free loopback port; yields its URL. more: settings of hypercorn."""
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    settings = hypercorn.config.Config()
    settings.bind = [f"fd://{listener.detach()}"]
    settings.errorlog = None
    settings.graceful_timeout = 0.2
    for name, value in more.items():
        setattr(settings, name, value)
    stop = asyncio.Event()
    server = asyncio.create_task(serve(app, settings, shutdown_trigger=stop.wait))
    try:
        yield url
    finally:
        stop.set()
        await asyncio.wait([server])


@pytest.fixture
async def serving() -> AsyncIterator[Callable[..., Awaitable[tuple[str, int]]]]:
    """`await serving(app, **settings)`: host and port of the gateway's server before that application."""
    async with AsyncExitStack() as stack:

        async def start_serving(app: Any, **settings: Any) -> tuple[str, int]:
            url = await stack.enter_async_context(listening(app, serve, **settings))
            host, port = url.removeprefix("http://").split(":")
            return host, int(port)

        yield start_serving


@dataclass
class Site:
    """A gateway, its neurons, and a client of it."""

    url: str
    metrics_url: str
    gateway: Gateway
    neurons: list[FakeNeuron]
    client: aiohttp.ClientSession

    async def chat(self, model: str = "tiny", **more: Any) -> tuple[int, dict[str, Any], Any]:
        body = {"model": model, "messages": [{"role": "user", "content": "hi"}], **more}
        async with self.client.post(self.url + "/v1/chat/completions", json=body) as response:
            return response.status, await response.json(), response.headers

    async def stream(self, model: str = "tiny", **more: Any) -> bytes:
        body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "stream": True, **more}
        async with self.client.post(self.url + "/v1/chat/completions", json=body) as response:
            return await response.read()

    async def get(self, path: str) -> Any:
        async with self.client.get(self.url + path) as response:
            return await response.json()

    async def metric(self, name: str, **labels: str) -> float:
        """The value of a sample; 0 if there is none."""
        async with self.client.get(self.metrics_url + "/metrics") as response:
            text = await response.text()
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        for line in text.splitlines():
            sample, _, value = line.rpartition(" ")
            if sample.split("{")[0] == name and all(pair in sample for pair in wanted):
                return float(value)
        return 0.0

    async def poll(self) -> None:
        for node in self.gateway.fleet.nodes.values():
            await self.gateway.poller.poll(node)


MakeSite = Callable[..., Awaitable[Site]]


@pytest.fixture
async def make_site() -> AsyncIterator[MakeSite]:
    """`await make_site(neuron, …, catalogue=…, endpoints=…, **settings)`: a site until the test ends."""
    async with AsyncExitStack() as stack:

        async def make(
            *neurons: FakeNeuron,
            catalogue: Catalogue | None = None,
            endpoints: tuple[str, ...] = (),
            config: GatewayConfig | None = None,
            **settings: Any,
        ) -> Site:
            for index, neuron in enumerate(neurons):
                neuron.name = neuron.name or f"n{index}"
                neuron.url = await stack.enter_async_context(listening(neuron))
            entries = [
                NeuronEntry(neuron.name, neuron.url, **getattr(neuron, "entry", {})) for neuron in neurons
            ]
            entries += [NeuronEntry(f"x{index}", url) for index, url in enumerate(endpoints)]
            section = GatewaySection(**{"poll_interval_s": 0.2, "placement_wait_s": 0.3, **settings})
            whole = replace(config or GatewayConfig(), gateway=section, neurons=tuple(entries))
            gateway = await stack.enter_async_context(running(whole, catalogue or Catalogue()))
            url = await stack.enter_async_context(listening(create_app(gateway), serve))
            metrics_url = await stack.enter_async_context(listening(create_metrics_app(gateway)))
            client = await stack.enter_async_context(aiohttp.ClientSession())
            return Site(url, metrics_url, gateway, list(neurons), client)

        yield make


def catalogue_of(*entries: ModelEntry, **aliases: str) -> Catalogue:
    return Catalogue({entry.id: entry for entry in entries}, aliases)


@pytest.fixture
def catalogue() -> Callable[..., Catalogue]:
    """`catalogue(ModelEntry(…), …, alias="id")`."""
    return catalogue_of


@pytest.fixture
def neuron() -> FakeNeuron:
    """A neuron that has `tiny` loaded."""
    made = FakeNeuron()
    made.hold("tiny")
    return made


@pytest.fixture
def make_neuron() -> Callable[..., FakeNeuron]:
    """`make_neuron("model", …, **fields)`: a neuron that has these models loaded."""

    def make(*models: str, **more: Any) -> FakeNeuron:
        made = FakeNeuron(**more)
        for model in models:
            made.hold(model)
        return made

    return make


@pytest.fixture
def eventually() -> Callable[..., Awaitable[None]]:
    """`await eventually(lambda: condition)`: polls until it holds; fails after five seconds."""

    async def wait(condition: Callable[[], bool]) -> None:
        for _ in range(500):
            if condition():
                return
            await asyncio.sleep(0.01)
        raise AssertionError("the condition did not come to hold")

    return wait
