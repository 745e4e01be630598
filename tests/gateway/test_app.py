"""The gateway's routes, over real sockets."""

import asyncio
import os
import signal
import socket
import sys

import aiohttp
import pytest

from helexa import __version__
from helexa.errors import ConfigError
from helexa.gateway.app import serve
from helexa.gateway.catalogue import Catalogue
from helexa.gateway.config import GatewayConfig, GatewaySection

pytestmark = pytest.mark.timeout(60)


async def test_a_chat_goes_to_the_neuron_and_back(make_site, neuron):
    site = await make_site(neuron)
    status, body, headers = await site.chat(temperature=0)
    assert status == 200
    assert body["choices"][0]["message"]["content"] == "Once upon a time"
    assert headers["content-type"] == "application/json"
    assert headers["x-request-id"].startswith("req_")
    assert neuron.requests == [
        {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "temperature": 0}
    ]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_a_stream_passes_through_byte_for_byte(make_site, neuron, path):
    site = await make_site(neuron)
    body = {"model": "tiny", "messages": [], "stream": True}
    texts = []
    for url in (site.url, neuron.url):
        async with site.client.post(url + path, json=body) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            texts.append(await response.read())
    assert texts[0] == texts[1]


async def test_the_root_answers_get_and_head(make_site, neuron):
    site = await make_site(neuron)
    assert await site.get("/") == {"name": "helexa-gateway", "version": __version__}
    async with site.client.head(site.url + "/") as response:
        assert (response.status, await response.read()) == (200, b"")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("POST", "/v1/nothing", 404, "not_found"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("DELETE", "/health", 405, "method_not_allowed"),
        ("GET", "/metrics", 404, "not_found"),
    ],
)
async def test_what_is_not_a_route_is_told_in_the_envelope(make_site, neuron, method, path, status, code):
    site = await make_site(neuron)
    async with site.client.request(method, site.url + path) as response:
        error = (await response.json())["error"]
        assert (response.status, error["code"], error["type"]) == (status, code, "invalid_request_error")
        assert path in error["message"]


async def test_a_bug_of_ours_is_a_plain_500(make_site, neuron, monkeypatch):
    site = await make_site(neuron)
    monkeypatch.setattr("helexa.gateway.listing.health", lambda _: 1 / 0)
    async with site.client.get(site.url + "/health") as response:
        assert response.status == 500
        assert (await response.json())["error"]["code"] == "internal_error"


async def test_metrics_are_on_a_port_of_their_own(make_site, neuron):
    site = await make_site(neuron)
    await site.chat()
    async with site.client.get(site.metrics_url + "/metrics") as response:
        assert response.headers["content-type"].startswith("text/plain; version=")
        assert b"helexa_requests_total" in await response.read()


async def test_an_address_that_is_taken_is_one_sentence():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        config = GatewayConfig(gateway=GatewaySection(listen=address))
        with pytest.raises(ConfigError, match=f"cannot listen on {address}: Address already in use"):
            await serve(config, Catalogue())


async def test_serving_tells_its_urls_and_ends_when_asked():
    config = GatewayConfig(gateway=GatewaySection(listen="127.0.0.1:0", metrics_listen="127.0.0.1:0"))
    stop, urls = asyncio.Event(), []
    serving = asyncio.create_task(
        serve(config, Catalogue(), stop=stop, on_ready=lambda *told: urls.extend(told))
    )
    while not urls:
        await asyncio.sleep(0.01)
    async with aiohttp.ClientSession() as client:
        for url, path in zip(urls, ("/health", "/metrics"), strict=True):
            async with client.get(url + path) as response:
                assert response.status == 200
    stop.set()
    await serving


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.mark.parametrize("grace_s", [0.3, 20])
async def test_a_signal_lets_streams_end_for_a_while_and_stops(make_neuron, make_site, tmp_path, grace_s):
    neuron = make_neuron("tiny", words=["word"] * 20, pause_s=0.05)
    await make_site(neuron)
    url = f"http://127.0.0.1:{free_port()}"
    config = tmp_path / "gateway.toml"
    config.write_text(
        f'[gateway]\nlisten = "{url[7:]}"\nmetrics_listen = "127.0.0.1:0"\nshutdown_grace_s = {grace_s}\n'
        f'[[neurons]]\nname = "n"\nendpoint = "{neuron.url}"\n'
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "helexa.cli.gateway",
        "--config",
        str(config),
        stderr=asyncio.subprocess.PIPE,
        env=os.environ,
    )
    log = b""
    while b"event=listening" not in log:
        log += await process.stderr.readline()
    body = {"model": "tiny", "messages": [], "stream": True}
    async with (
        aiohttp.ClientSession() as client,
        client.post(url + "/v1/chat/completions", json=body) as response,
    ):
        text = await response.content.readany()
        process.send_signal(signal.SIGTERM)
        text += await response.read()
    rest = await process.stderr.read()
    assert await process.wait() == 0
    assert b"Traceback" not in rest, rest.decode()
    assert b"event=stopped" in rest
    assert text.endswith(b"[DONE]\n\n")
    assert (b'"code":"shutting_down"' in text) is (grace_s < 1)
