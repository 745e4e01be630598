"""The server on the wire: what clients see of connections, whatever the application."""

import asyncio
import json
import os
import socket
from contextlib import closing

import pytest

from helexa.server import serve
from helexa.serving import listen, server_settings

pytestmark = pytest.mark.timeout(30)

POST = b"POST /x HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\nhi"


class Echo:
    """Answers with the body it got, in two blocks, and remembers how its requests ended."""

    def __init__(self, pause_s=0.0):
        self.pause_s = pause_s
        self.bodies = []
        self.is_gone = asyncio.Event()

    async def __call__(self, scope, receive, send):
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message["body"]
            if not message["more_body"]:
                break
        self.bodies.append(body)
        await send(
            {"type": "http.response.start", "status": 200, "headers": [(b"x-path", scope["raw_path"])]}
        )
        await send({"type": "http.response.body", "body": body, "more_body": True})
        if self.pause_s:
            gone = asyncio.ensure_future(receive())
            done, _ = await asyncio.wait((gone,), timeout=self.pause_s)
            if done:
                self.is_gone.set()
                return
            gone.cancel()
        await send({"type": "http.response.body", "body": b"end", "more_body": False})


class Client:
    def __init__(self, reader, writer):
        self.reader = reader
        self.writer = writer

    async def until(self, end):
        return await asyncio.wait_for(self.reader.readuntil(end), 5)

    async def rest(self):
        return await asyncio.wait_for(self.reader.read(), 5)

    async def ask(self, request=POST):
        self.writer.write(request)
        return await self.until(b"0\r\n\r\n")


@pytest.fixture
def free_listener():
    """Settings of a server on a free port, and its address."""
    listener = listen("127.0.0.1", 0)
    address = listener.getsockname()
    return server_settings(listener, 0.2), address


@pytest.fixture
async def start(free_listener):
    """`await start(app, **settings)`: the address of a server before that application."""
    settings, address = free_listener
    stop, servers = asyncio.Event(), []

    async def start(app, **more):
        for name, value in more.items():
            setattr(settings, name, value)
        servers.append(asyncio.create_task(serve(app, settings, stop.wait)))
        await asyncio.sleep(0)
        return address

    yield start
    stop.set()
    await asyncio.gather(*servers)


@pytest.fixture
async def connect(start):
    clients = []

    async def connect(app, **settings):
        client = Client(*await asyncio.open_connection(*await start(app, **settings)))
        clients.append(client)
        return client

    yield connect
    for client in clients:
        client.writer.close()
        await asyncio.gather(client.writer.wait_closed(), return_exceptions=True)


async def test_a_connection_serves_one_request_after_the_other(connect):
    app = Echo()
    client = await connect(app)
    for _ in range(3):
        answer = await client.ask()
        assert answer.startswith(b"HTTP/1.1 200")
        assert answer.endswith(b"\r\n2\r\nhi\r\n3\r\nend\r\n0\r\n\r\n")
    assert app.bodies == [b"hi"] * 3


async def test_head_and_first_block_leave_together(connect):
    client = await connect(Echo(pause_s=5))
    client.writer.write(POST)
    first = await asyncio.wait_for(client.reader.read(65536), 5)
    assert first.startswith(b"HTTP/1.1 200")
    assert first.endswith(b"\r\n\r\n2\r\nhi\r\n")


async def test_requests_that_come_at_once_are_answered_in_turn(connect):
    client = await connect(Echo())
    client.writer.write(POST.replace(b"/x", b"/1") + POST.replace(b"/x", b"/2"))
    answers = await client.until(b"0\r\n\r\n") + await client.until(b"0\r\n\r\n")
    assert answers.index(b"x-path: /1") < answers.index(b"x-path: /2")


async def test_a_body_that_is_announced_is_asked_for(connect):
    client = await connect(Echo())
    head, body = POST[:-2], POST[-2:]
    client.writer.write(head.replace(b"\r\n\r\n", b"\r\nexpect: 100-continue\r\n\r\n"))
    assert (await client.until(b"\r\n\r\n")).startswith(b"HTTP/1.1 100")
    assert b"2\r\nhi\r\n" in await client.ask(body)


@pytest.mark.parametrize(
    "request_bytes",
    [b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\nhost: a\r\nno colon\r\n\r\n", b"\x16\x03\x01\x00" * 9],
)
async def test_what_is_no_request_is_400_and_the_end_of_the_connection(connect, request_bytes):
    app = Echo()
    client = await connect(app)
    client.writer.write(request_bytes + b"\r\n\r\n")
    status, _, body = (await client.rest()).partition(b"\r\n\r\n")
    assert b" 400 " in status.split(b"\r\n")[0]
    assert json.loads(body)["error"]["type"] == "invalid_request_error"
    assert app.bodies == []


async def test_http_2_is_not_taken_up(connect):
    client = await connect(Echo())
    request = POST.replace(b"host: a", b"host: a\r\nconnection: upgrade\r\nupgrade: h2c")
    assert (await client.ask(request)).startswith(b"HTTP/1.1 200")


async def test_an_idle_connection_is_closed_and_one_at_work_is_not(connect):
    client = await connect(Echo(pause_s=0.5), keep_alive_timeout=0.2)
    assert (await client.ask()).endswith(b"end\r\n0\r\n\r\n")
    assert await client.rest() == b""


@pytest.mark.parametrize("sent", [b"", b"POST /x HTTP/1.1\r\nhost:"])
async def test_a_connection_that_never_asks_is_closed(connect, sent):
    client = await connect(Echo(), keep_alive_timeout=0.1)
    client.writer.write(sent)
    assert await client.rest() == b""


async def test_a_client_that_leaves_is_told_to_the_application(connect):
    app = Echo(pause_s=20)
    client = await connect(app)
    client.writer.write(POST)
    await client.until(b"hi\r\n")
    client.writer.close()
    await asyncio.wait_for(app.is_gone.wait(), 5)


async def test_an_application_that_crashes_is_500_and_the_next_connection_is_served(connect, caplog):
    async def crashing(scope, receive, send):
        raise RuntimeError("a bug")

    client = await connect(crashing)
    client.writer.write(POST)
    assert (await client.rest()).startswith(b"HTTP/1.1 500")


async def test_stopping_ends_idle_connections_at_once_and_lets_the_others_finish(free_listener):
    app, stop = Echo(pause_s=0.3), asyncio.Event()
    settings, address = free_listener
    settings.graceful_timeout = 10
    server = asyncio.create_task(serve(app, settings, stop.wait))
    idle = Client(*await asyncio.open_connection(*address))
    busy = Client(*await asyncio.open_connection(*address))
    await idle.ask()
    busy.writer.write(POST)
    await busy.until(b"hi\r\n")
    stop.set()
    assert await idle.rest() == b""
    assert (await busy.rest()).endswith(b"end\r\n0\r\n\r\n")
    await asyncio.wait_for(server, 5)
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(*address)
    for client in (idle, busy):
        client.writer.close()


async def test_stopping_cuts_what_goes_on_beyond_the_grace(free_listener):
    stop = asyncio.Event()
    settings, address = free_listener
    settings.graceful_timeout = 0.1
    server = asyncio.create_task(serve(Echo(pause_s=60), settings, stop.wait))
    client = Client(*await asyncio.open_connection(*address))
    client.writer.write(POST)
    await client.until(b"hi\r\n")
    stop.set()
    await asyncio.wait_for(server, 5)
    assert await client.rest() == b""
    client.writer.close()


async def test_a_client_that_does_not_read_holds_up_its_application_alone(connect):
    sent = 0

    async def flood(scope, receive, send):
        nonlocal sent
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(1000):
            await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
            sent += 1

    client = await connect(flood)
    client.writer.write(POST)
    await asyncio.sleep(0.5)
    assert 0 < sent < 500


async def test_an_answer_that_its_application_crashed_on_is_cut_and_not_ended(connect, caplog):
    async def crashing(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        raise RuntimeError("a bug")

    client = await connect(crashing)
    client.writer.write(POST)
    answer = await client.rest()
    assert answer.endswith(b"4\r\nhalf\r\n")
    assert "a bug" in caplog.text


async def test_what_the_application_is_told_of_a_request(connect):
    scopes = []

    async def note(scope, receive, send):
        scopes.append(scope)
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    client = await connect(note)
    client.writer.write(
        b"HEAD /a%20b/%E2%82%AC?beta=true&x=%20 HTTP/1.1\r\nHost: h\r\nX-Long: " + b"y" * 30_000
    )
    client.writer.write(b"\r\nX-Twice: 1\r\nx-twice: 2\r\n\r\n")
    assert (await client.until(b"\r\n\r\n")).startswith(b"HTTP/1.1 204")
    (scope,) = scopes
    assert (scope["method"], scope["path"], scope["raw_path"]) == ("HEAD", "/a b/€", b"/a%20b/%E2%82%AC")
    assert scope["query_string"] == b"beta=true&x=%20"
    assert scope["headers"] == [
        (b"host", b"h"),
        (b"x-long", b"y" * 30_000),
        (b"x-twice", b"1"),
        (b"x-twice", b"2"),
    ]


async def test_head_gets_the_head_alone(connect):
    client = await connect(Echo())
    client.writer.write(b"HEAD /x HTTP/1.1\r\nhost: a\r\n\r\n" + POST)
    answer = await client.until(b"0\r\n\r\n")
    assert answer.count(b"HTTP/1.1 200") == 2
    assert answer.count(b"end") == 1


async def test_a_body_in_chunks_is_read_to_its_end(connect):
    app = Echo()
    client = await connect(app)
    client.writer.write(b"POST /x HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n")
    await asyncio.sleep(0.05)
    await client.ask(b"3\r\n you\r\n0\r\n\r\n".replace(b"3", b"4"))
    assert app.bodies == [b"hi you"]


async def test_a_client_that_leaves_within_its_body_is_told_to_the_application(connect):
    told = asyncio.Event()

    async def wait(scope, receive, send):
        while (await receive())["type"] != "http.disconnect":
            pass
        told.set()

    client = await connect(wait)
    client.writer.write(POST[:-1])
    await asyncio.sleep(0.05)
    client.writer.close()
    await asyncio.wait_for(told.wait(), 5)


async def test_connections_that_their_clients_have_closed_are_closed_at_once(start):
    address = await start(Echo())
    loop = asyncio.get_running_loop()
    before = len(os.listdir("/proc/self/fd"))

    def visit(request):
        with closing(socket.create_connection(address, 5)) as client:
            client.sendall(request)
            while request == POST and not client.recv(65536).endswith(b"0\r\n\r\n"):
                pass

    for request in (POST, b"", POST[:20]) * 20:
        await loop.run_in_executor(None, visit, request)
    async with asyncio.timeout(5):
        while len(os.listdir("/proc/self/fd")) > before:
            await asyncio.sleep(0.01)


async def test_a_body_that_stops_coming_ends_its_connection_and_no_other(connect):
    app = Echo()
    client = await connect(app, keep_alive_timeout=0.2)
    client.writer.write(POST[:-1])
    assert await client.rest() == b""
    slow = Client(*await asyncio.open_connection(*client.writer.get_extra_info("peername")))
    slow.writer.write(POST.replace(b"length: 2", b"length: 20")[:-2])
    for _ in range(10):
        await asyncio.sleep(0.05)
        slow.writer.write(b"hi")
    assert b"end" in await slow.until(b"0\r\n\r\n")
    assert app.bodies == [b"h", b"hi" * 10]
    slow.writer.close()
