"""`helexa load` and `unload`: the right neuron, its progress, and its failures."""

import io
from collections.abc import Iterator
from typing import Any

import pytest
from aiohttp import web
from rich.console import Console

from helexa.cli.client import Client
from helexa.cli.load import neuron_url, progress_bar, wait_until_loaded
from helexa.errors import BadRequest, HelexaError, UnknownModel

LOADING = {"id": "m", "status": "loading", "progress": {"phase": "weights", "percent": 40.0}}


def fleet(*nodes: tuple[str, list[str]]):
    async def handler(_: web.Request) -> web.Response:
        entries = [
            {"name": name, "endpoint": f"http://{name}:13131", "models": [{"id": model} for model in models]}
            for name, models in nodes
        ]
        return web.json_response({"nodes": entries})

    return {"GET /fleet": handler}


def listing(states: Iterator[list[dict[str, Any]]]):
    async def handler(_: web.Request) -> web.Response:
        return web.json_response(next(states))

    return {"GET /models": handler}


async def test_a_neuron_is_meant_by_its_own_url(serve) -> None:
    url = await serve({})
    assert await neuron_url(url, None, None) == url


async def test_the_only_neuron_of_a_gateway_needs_no_name(serve) -> None:
    assert await neuron_url(await serve(fleet(("attic", []))), None, None) == "http://attic:13131"


async def test_among_several_neurons_one_must_be_named(serve) -> None:
    url = await serve(fleet(("attic", ["m"]), ("cellar", [])))
    with pytest.raises(BadRequest, match=r"--node attic\|cellar"):
        await neuron_url(url, None, None)
    assert await neuron_url(url, None, "cellar") == "http://cellar:13131"
    with pytest.raises(BadRequest, match="no neuron 'roof'"):
        await neuron_url(url, None, "roof")


async def test_a_model_is_unloaded_where_it_is(serve) -> None:
    url = await serve(fleet(("attic", ["m"]), ("cellar", [])))
    assert await neuron_url(url, None, None, holding="m") == "http://attic:13131"
    with pytest.raises(BadRequest, match="no neuron with x"):
        await neuron_url(url, None, None, holding="x")


async def test_waiting_ends_when_the_model_is_loaded(serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("helexa.cli.load.POLL_S", 0)
    states = iter([[{**LOADING, "progress": None}], [LOADING], [{"id": "m", "status": "loaded"}]])
    async with Client(await serve(listing(states))) as client:
        with progress_bar(Console(file=io.StringIO())) as bar:
            assert (await wait_until_loaded(client, "m", bar))["status"] == "loaded"
            assert bar.tasks[0].percentage == 100


async def test_a_failed_load_is_reported_with_the_reason_of_the_neuron(serve) -> None:
    failed = {
        "id": "m",
        "status": "failed",
        "error": {"code": "invalid_model_file", "message": "tensor 7 is cut off"},
    }
    async with Client(await serve(listing(iter([[failed]])))) as client:
        with (
            progress_bar(Console(file=io.StringIO())) as bar,
            pytest.raises(HelexaError, match="tensor 7 is cut off"),
        ):
            await wait_until_loaded(client, "m", bar)


async def test_a_model_that_the_neuron_does_not_know_is_not_waited_for(serve) -> None:
    async with Client(await serve(listing(iter([[]])))) as client:
        with (
            progress_bar(Console(file=io.StringIO())) as bar,
            pytest.raises(UnknownModel, match="no model 'm'"),
        ):
            await wait_until_loaded(client, "m", bar)
