"""What the commands' HTTP client makes of answers, refusals and silence."""

import asyncio
import json

import pytest
from aiohttp import web

from helexa.cli.client import Client
from helexa.errors import HelexaError, UpstreamClosed, UpstreamTimeout


async def events(request: web.Request) -> web.StreamResponse:
    """Two events, the second after a comment, then the end mark and something behind it."""
    first = {"n": 1, "model": (await request.json())["model"]}
    text = f'data: {json.dumps(first)}\r\n\r\n: alive\n\ndata: {{"n": 2}}\n\ndata: [DONE]\n\ndata: x\n\n'
    return web.Response(text=text, content_type="text/event-stream")


async def test_a_stream_yields_each_event_until_its_end(serve) -> None:
    async with Client(await serve({"POST /v1/chat/completions": events})) as client:
        found = [event async for event in client.stream("/v1/chat/completions", {"model": "m"})]
    assert found == [{"n": 1, "model": "m"}, {"n": 2}]


async def test_an_error_within_a_stream_is_raised(serve) -> None:
    async def failing(_: web.Request) -> web.Response:
        return web.Response(
            body=b'data: {"n": 1}\n\ndata: {"error": {"message": "the neuron died", "code": "x"}}\n\n'
        )

    async with Client(await serve({"POST /s": failing})) as client:
        stream = client.stream("/s", {})
        assert await anext(stream) == {"n": 1}
        with pytest.raises(HelexaError, match="the neuron died") as caught:
            await anext(stream)
    assert caught.value.code == "x"


async def test_a_refusal_keeps_its_status_code_and_message(serve) -> None:
    async def refuse(_: web.Request) -> web.Response:
        body = {
            "error": {
                "message": "model 'x' is unknown",
                "type": "invalid_request_error",
                "code": "model_not_found",
            }
        }
        return web.json_response(body, status=404)

    async with Client(await serve({"GET /models": refuse})) as client:
        with pytest.raises(HelexaError, match="'x' is unknown") as caught:
            await client.get("/models")
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")


async def test_the_key_goes_along_and_a_url_may_end_in_v1(serve) -> None:
    async def echo(request: web.Request) -> web.Response:
        return web.json_response(request.headers.get("authorization"))

    url = await serve({"GET /who": echo})
    async with Client(url + "/v1/", "secret") as client:
        assert await client.get("/who") == "Bearer secret"


async def test_nobody_at_the_address_is_one_sentence_with_advice(unused_tcp_port: int) -> None:
    async with Client(f"http://127.0.0.1:{unused_tcp_port}") as client:
        with pytest.raises(UpstreamClosed, match=r"nothing answers at http://127\.0\.0\.1"):
            await client.get("/")


async def test_silence_ends_at_the_time_limit(serve) -> None:
    async def sleep(_: web.Request) -> web.Response:
        await asyncio.sleep(5)
        return web.Response()

    async with Client(await serve({"GET /": sleep}), timeout_s=0.05) as client:
        with pytest.raises(UpstreamTimeout, match="did not answer in time"):
            await client.get("/")


async def test_what_is_no_url_is_called_so() -> None:
    async with Client("localhost:31313") as client:
        with pytest.raises(HelexaError, match="localhost:31313"):
            await client.get("/")
