"""`helexa load` and `unload`: what is asked for, the progress of it, and its failures."""

import asyncio
import io
from collections.abc import Iterator
from typing import Any

import pytest
from aiohttp import web
from rich.console import Console
from typer.testing import CliRunner

from helexa.cli import app
from helexa.cli.client import Client
from helexa.cli.load import progress_bar, wait_until_loaded
from helexa.errors import HelexaError, UnknownModel

LOADING = {"id": "m", "status": "loading", "progress": {"phase": "weights", "percent": 40.0}}


def listing(states: Iterator[list[dict[str, Any]]]):
    async def handler(_: web.Request) -> web.Response:
        return web.json_response(next(states))

    return {"GET /models": handler}


def gateway(posted: list[tuple[str, Any, str | None]], *states: dict[str, Any]):
    """A gateway that loads what it is told on node attic, whose model goes through `states`."""
    left = list(states)

    async def post(request: web.Request) -> web.Response:
        posted.append((request.path, await request.json(), request.headers.get("authorization")))
        return web.json_response(
            {"id": "m", "model_id": "m", "status": "loading", "node": "attic"}, status=202
        )

    async def fleet(_: web.Request) -> web.Response:
        state = left.pop(0) if len(left) > 1 else left[0]
        others = {"name": "cellar", "models": [{"id": "m", "status": "failed"}]}
        return web.json_response({"nodes": [others, {"name": "attic", "models": [state]}]})

    return {"POST /models/load": post, "POST /models/unload": post, "GET /fleet": fleet}


def helexa(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


async def test_a_gateway_is_asked_to_load_and_says_where(serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("helexa.cli.load.POLL_S", 0)
    posted: list[Any] = []
    url = await serve(gateway(posted, LOADING, {"id": "m", "status": "loaded", "load_seconds": 2.0}))
    arguments = ("load", "alias", "--url", url, "--key", "k", "--node", "attic")
    arguments += ("--max-context", "64", "--quant", "q8_0")
    done = await asyncio.to_thread(helexa, *arguments)
    assert done.output.endswith("m is loaded on attic in 2.0 s\n")
    body = {"model_id": "alias", "options": {"max_context": 64, "quant": "q8_0"}, "node": "attic"}
    assert posted == [("/models/load", body, "Bearer k")]


async def test_a_gateway_is_asked_to_unload(serve) -> None:
    posted: list[Any] = []
    url = await serve(gateway(posted, LOADING))
    assert (await asyncio.to_thread(helexa, "unload", "m", "--url", url)).output == "m is unloaded\n"
    await asyncio.to_thread(helexa, "unload", "m", "--url", url, "--node", "attic")
    assert [body for _, body, _ in posted] == [{"model_id": "m"}, {"model_id": "m", "node": "attic"}]


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
