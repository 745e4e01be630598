"""`helexa reload`: what a gateway says of its changes."""

import asyncio
from typing import Any

import pytest
from aiohttp import web
from typer.testing import CliRunner

from helexa.cli import app
from helexa.errors import HelexaError


async def reload(serve, answer: dict[str, Any], status: int = 200) -> Any:
    async def handler(_: web.Request) -> web.Response:
        return web.json_response(answer, status=status)

    url = await serve({"POST /reload": handler})
    return await asyncio.to_thread(CliRunner().invoke, app, ["reload", "--url", url])


async def test_changes_are_listed_with_those_that_need_a_restart(serve) -> None:
    changed = {"gateway.listen": ["a:1", "a:2"], "auth.keys": ["***", None]}
    done = await reload(serve, {"changed": changed, "needs_restart": ["gateway.listen"]})
    assert done.stdout == "gateway.listen: a:1 -> a:2  (needs a restart)\nauth.keys: *** -> -\n"


async def test_no_change_is_said(serve) -> None:
    assert (await reload(serve, {"changed": {}, "needs_restart": []})).stdout == "nothing has changed\n"


async def test_a_refusal_is_the_error_of_the_gateway(serve) -> None:
    done = await reload(serve, {"error": {"message": "gateway.toml: unknown key 'x'"}}, 500)
    assert isinstance(done.exception, HelexaError)
    with pytest.raises(HelexaError, match="unknown key 'x'"):
        raise done.exception
