"""Whatever is sent to any route of either daemon: it is answered soon and properly, and nothing is left over.

Bodies come from the types of the wire: arbitrary values that fit them, and the same with one thing wrong.
"""

import asyncio
import http.client
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helexa.errors import SourceError
from helexa.gateway.app import create_app
from helexa.gateway.catalogue import Catalogue
from helexa.gateway.config import GatewayConfig, GatewaySection, NeuronEntry
from helexa.gateway.gateway import running
from helexa.neuron.app import Neuron
from helexa.neuron.config import ModelEntry, NeuronConfig, NeuronSection
from helexa.server import serve
from helexa.serving import listen, server_settings, url_of
from helexa.wire.chat import ChatRequest
from support.request_bodies import GATEWAY, MODEL, NEURON, bodies, mutated

pytestmark = pytest.mark.timeout(200)

WAIT_S = 30
SLACK = 6  # connections that are kept alive, and their tasks


@dataclass
class Site:
    """A gateway before a neuron with a scripted engine, on a thread of its own."""

    gateway_url: str
    neuron_url: str
    loop: asyncio.AbstractEventLoop
    neuron: Neuron
    gateway: Any

    def url(self, daemon: str) -> str:
        return self.gateway_url if daemon == "gateway" else self.neuron_url

    def connection(self, daemon: str) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.url(daemon).removeprefix("http://"), timeout=WAIT_S)

    def ask(
        self, daemon: str, method: str, path: str, body: bytes | None = None, headers: Any = ()
    ) -> "Answer":
        with closing(self.connection(daemon)) as connection:
            connection.request(method, path, body, dict(headers))
            found = connection.getresponse()
            return Answer(found.status, dict(found.getheaders()), found.read())

    def is_at_rest(self) -> bool:
        loads = [load for model in self.neuron.registry if (load := model.load_info())]
        return len(self.gateway.relays) == 0 and not any(
            load.in_flight or load.queue_depth or load.kv_tokens_used for load in loads
        )

    def has_model(self) -> bool:
        return any(model.id == MODEL and model.status == "loaded" for model in self.neuron.registry)

    def num_tasks(self) -> int:
        async def count() -> int:
            return len(asyncio.all_tasks())

        return asyncio.run_coroutine_threadsafe(count(), self.loop).result(WAIT_S)

    def settle(self) -> None:
        """Nothing is under way, and the model is there for the next example."""
        eventually(self.is_at_rest)
        if not self.has_model():
            body = json.dumps({"model_id": MODEL, "wait": True}).encode()
            assert self.ask("gateway", "POST", "/models/load", body).status == 200


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def kind(self) -> str:
        return {name.lower(): value for name, value in self.headers.items()}.get("content-type", "")


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come to hold"
        time.sleep(0.005)


def num_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def fetch(source: str, _: Any) -> Path:
    if source in ("nowhere", "absent"):
        raise SourceError(f"no model is named {source!r}")
    return Path(source)


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    support = pytest.importorskip("support.scripted_engine")
    config = NeuronConfig(
        neuron=NeuronSection(keep_alive_s=0.05, shutdown_grace_s=0.2, max_body_bytes=200_000),
        models=(ModelEntry(id=MODEL),),
    )
    neuron = Neuron(config, load=lambda path, **_: support.scripted_engine({}, max_context=512), fetch=fetch)
    made: list[Site] = []
    ready, loop = threading.Event(), asyncio.new_event_loop()
    stop = asyncio.Event()

    async def work() -> None:
        async with AsyncExitStack() as stack:
            servers = []

            async def start(app: Any) -> str:
                listener = listen("127.0.0.1", 0)
                url = url_of(listener)
                settings = server_settings(listener, 0.5)
                settings.keep_alive_timeout = 0.5  # so long it waits for a body that was announced
                servers.append(asyncio.create_task(serve(app, settings, stop.wait)))
                return url

            app = neuron.app
            await stack.enter_async_context(app.router.lifespan_context(app))
            neuron_url = await start(app)
            section = GatewaySection(poll_interval_s=0.2, placement_wait_s=0.3, max_body_bytes=150_000)
            whole = GatewayConfig(gateway=section, neurons=(NeuronEntry("n0", neuron_url),))
            gateway = await stack.enter_async_context(running(whole, Catalogue()))
            made.append(Site(await start(create_app(gateway)), neuron_url, loop, neuron, gateway))
            ready.set()
            await stop.wait()
            await asyncio.gather(*servers)

    thread = threading.Thread(target=loop.run_until_complete, args=(work(),))
    thread.start()
    try:
        assert ready.wait(WAIT_S)
        yield made[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(WAIT_S)
        loop.close()


@pytest.fixture(autouse=True)
def nothing_is_left(site: Site) -> Iterator[None]:
    """After each test there are no more tasks and files than before."""
    eventually(site.has_model)
    for daemon in ("gateway", "neuron"):
        assert site.ask(daemon, "GET", "/health").status == 200
    site.settle()
    tasks, files = site.num_tasks(), num_files()
    yield
    site.settle()
    eventually(lambda: site.num_tasks() <= tasks + SLACK and num_files() <= files + SLACK)


def check(site: Site, path: str, kind: type[msgspec.Struct] | None, answer: Answer) -> None:
    """The answer is a proper one; what it refuses it says in the form of the API, naming the field."""
    shown = answer.status, answer.body[:500]
    assert answer.status < 500 or answer.status == 503, shown
    if answer.status == 503:
        assert "retry-after" in {name.lower() for name in answer.headers}, shown
    if answer.status >= 400:
        check_error(path, kind, answer)
    elif answer.kind.startswith("text/event-stream"):
        for fault in (b"internal_error", b"server_error", b"api_error", b'"upstream'):
            assert fault not in answer.body, answer.body[-500:]
        end = {"/v1/responses": b"event: response.", "/v1/messages": b"event: message_stop"}
        assert end.get(path, b"data: [DONE]\n\n") in answer.body, answer.body[-500:]
    elif answer.body and answer.kind.startswith("application/json"):
        json.loads(answer.body)
    site.settle()


def check_error(path: str, kind: type[msgspec.Struct] | None, answer: Answer) -> None:
    assert answer.kind.startswith("application/json"), answer
    told = json.loads(answer.body)
    error, message = told["error"], told["error"]["message"]
    assert message
    assert error["type"] != "api_error" or answer.status in (401, 422, 503), told
    if path.startswith("/v1/messages"):
        assert told["type"] == "error"
        assert told["request_id"]
        is_about_field = "not JSON" not in message and answer.status == 400 and "too long" not in message
    else:
        is_about_field = error["code"] in ("invalid_parameter", "missing_model_field")
        if is_about_field and error["param"] is not None:
            assert str(error["param"]).split(".")[-1].split("[")[0] in message or "messages" in message, told
    if kind is not None and is_about_field and "the body is wrong" not in message:
        names = {name for inner in (kind, ChatRequest) for name in inner.__struct_fields__}
        assert "field" in message or any(name in message for name in names), told


FEW_EXAMPLES = settings(
    max_examples=16,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.large_base_example,
        HealthCheck.filter_too_much,
    ],
)
ROUTES = [
    *(("gateway", path, kind) for path, kind in GATEWAY.items()),
    *(("neuron", path, kind) for path, kind in NEURON.items()),
]
WITH_BODY = pytest.mark.parametrize(
    ("daemon", "path", "kind"),
    [route for route in ROUTES if route[2] is not None],
    ids=lambda value: value if isinstance(value, str) else "",
)
HEADERS = {"content-type": "application/json"}


@WITH_BODY
@FEW_EXAMPLES
@given(data=st.data())
def test_whatever_fits_the_types_is_answered_or_refused(site, daemon, path, kind, data):
    body = json.dumps(data.draw(bodies(kind))).encode()
    check(site, path, kind, site.ask(daemon, "POST", path, body, HEADERS))


@WITH_BODY
@FEW_EXAMPLES
@given(data=st.data())
def test_whatever_is_wrong_with_a_body_is_told(site, daemon, path, kind, data):
    body = data.draw(mutated(kind))
    check(site, path, kind, site.ask(daemon, "POST", path, body, HEADERS))


def routes(site: Site, daemon: str) -> set[tuple[str, str]]:
    app = create_app(site.gateway)._app._app if daemon == "gateway" else site.neuron.app
    return {(method, route.path) for route in app.routes for method in route.methods}


@pytest.mark.parametrize(("daemon", "known"), [("gateway", GATEWAY), ("neuron", NEURON)])
def test_no_route_that_takes_a_body_is_left_out(site, daemon, known):
    assert {path for method, path in routes(site, daemon) if method == "POST"} == set(known)


TOKEN = st.text("ABCDEFGHIJKLMNOPQRSTUVWXYZabcz!#$%&'*+-.^_`|~09", min_size=1, max_size=9)
LATIN = st.text(st.characters(min_codepoint=0x20, max_codepoint=0xFF, exclude_characters="\x7f"), max_size=30)
NAMES = TOKEN | st.sampled_from(
    [
        *(
            "content-length",
            "transfer-encoding",
            "connection",
            "expect",
            "authorization",
            "x-api-key",
            "origin",
        ),
        *(
            "x-request-id",
            "x-helexa-wait",
            "prefer",
            "x-helexa-principal",
            "x-helexa-priority",
            "anthropic-beta",
        ),
        *("content-encoding", "content-type", "accept-encoding", "upgrade", "cookie", "traceparent", "host"),
    ]
)
VALUES = LATIN | st.sampled_from(
    [
        *("0", "-1", "1" * 30, "chunked", "gzip", "close", "100-continue", "nan", "inf", "wait=0", "h2c"),
        *("Bearer ", "Bearer hx-1", "http://a.example", "null", "x" * 5000, "a.example", "websocket"),
    ]
)


@pytest.mark.parametrize("daemon", ["gateway", "neuron"])
@settings(FEW_EXAMPLES, max_examples=80)
@given(data=st.data())
def test_odd_methods_paths_queries_and_headers_are_answered_or_refused(site, daemon, data):
    known = sorted(path for _, path in routes(site, daemon))
    path = data.draw(st.sampled_from(known) | LATIN.map(lambda text: "/" + text.replace(" ", "")))
    path = path.split("{")[0] + (
        data.draw(st.sampled_from([MODEL, "resp_1", "a/b", "%ff%00", ".."])) if "{" in path else ""
    )
    query = data.draw(
        st.sampled_from(["", "?", "?beta=true", "?x=%ff&&=", "?stream=true", "#x", "?limit=-1&order=up"])
    )
    method = data.draw(
        st.sampled_from(["GET", "POST", "HEAD", "DELETE", "OPTIONS", "PUT", "PATCH", "TRACE"]) | TOKEN
    )
    headers = data.draw(st.lists(st.tuples(NAMES, VALUES), max_size=4))
    if path == "/defrag" or path.startswith("/models/"):
        method = "GET"
    head = f"{method} {path}{query} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in headers)
    status, body = exchange(site, daemon, head.encode("latin-1") + b"\r\n")
    assert status is None or status < 500 or status == 503, (status, body)
    if status is not None and status >= 400 and body and method != "HEAD":
        assert json.loads(body)["error"]["message"]
    site.settle()


def exchange(site: Site, daemon: str, request: bytes) -> tuple[int | None, bytes]:
    """Status and body of the answer to raw bytes; None if the connection ends without one."""
    host, port = site.url(daemon).removeprefix("http://").split(":")
    with closing(socket.create_connection((host, int(port)), WAIT_S)) as connection:
        connection.sendall(request)
        answer = http.client.HTTPResponse(connection, method=request.partition(b" ")[0].decode())
        try:
            answer.begin()
            return answer.status, answer.read()
        except (http.client.BadStatusLine, ConnectionResetError):
            return None, b""


@FEW_EXAMPLES
@given(data=st.data())
def test_a_client_may_leave_at_any_moment(site, data):
    daemon, path, kind = data.draw(
        st.sampled_from([route for route in ROUTES if route[2] and not route[1].startswith("/models/")])
    )
    body = json.dumps(data.draw(bodies(kind)) | {"stream": data.draw(st.booleans())}).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    request = head + body
    is_whole = data.draw(st.booleans())
    sent = len(request) if is_whole else data.draw(st.integers(0, len(request)))
    host, port = site.url(daemon).removeprefix("http://").split(":")
    with closing(socket.create_connection((host, int(port)), WAIT_S)) as connection:
        connection.sendall(request[:sent])
        if is_whole and data.draw(st.booleans()):
            connection.recv(data.draw(st.integers(1, 400)))
        if data.draw(st.booleans()):  # without a goodbye
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    site.settle()
