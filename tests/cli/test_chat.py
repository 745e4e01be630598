"""`helexa chat` as a client: what it sends, what it shows, and what it remembers."""

import io
import json
from typing import Any

import pytest
from aiohttp import web
from rich.console import Console

from helexa.cli.chat import Conversation, choose_model
from helexa.cli.client import Client
from helexa.errors import BadRequest, HelexaError

USAGE = {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 5}}


def answering(*pieces: str, seen: list[Any]):
    """A chat route that records requests and streams `pieces`, then the usage."""

    async def handler(request: web.Request) -> web.Response:
        seen.append(await request.json())
        chunks = [{"choices": [{"delta": {"content": piece}}]} for piece in pieces]
        lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in [*chunks, {"choices": [], "usage": USAGE}]]
        return web.Response(text="".join(lines) + "data: [DONE]\n\n", content_type="text/event-stream")

    return handler


async def test_the_answer_is_shown_as_it_comes_and_remembered_for_the_next_question(serve) -> None:
    seen: list[Any] = []
    screen = io.StringIO()
    url = await serve({"POST /v1/chat/completions": answering("Paris", ".", seen=seen)})
    async with Client(url) as client:
        talk = Conversation(client, {"model": "m", "temperature": 0.0}, "be brief", Console(file=screen))
        assert await talk.ask("capital of France?") == "Paris."
        await talk.ask("and [red]Spain[/red]?")
    assert screen.getvalue() == "Paris.\nParis.\n"
    first, second = seen
    assert first["stream"] is True
    assert first["stream_options"] == {"include_usage": True}
    assert (first["model"], first["temperature"]) == ("m", 0.0)
    assert [message["role"] for message in second["messages"]] == ["system", "user", "assistant", "user"]
    assert second["messages"][2]["content"] == "Paris."


async def test_markup_in_an_answer_is_shown_as_it_is(serve) -> None:
    screen = io.StringIO()
    url = await serve({"POST /v1/chat/completions": answering("[bold]x[/bold]", seen=[])})
    async with Client(url) as client:
        await Conversation(client, {"model": "m"}, None, Console(file=screen)).ask("?")
    assert screen.getvalue() == "[bold]x[/bold]\n"


async def test_a_terminal_also_sees_tokens_and_time(serve) -> None:
    screen = io.StringIO()
    url = await serve({"POST /v1/chat/completions": answering("hi", seen=[])})
    async with Client(url) as client:
        console = Console(file=screen, force_terminal=True, color_system=None, width=100)
        await Conversation(client, {"model": "m"}, None, console).ask("?")
    assert "9 prompt tokens (5 cached), 2 generated" in screen.getvalue()


@pytest.mark.parametrize(("is_terminal", "shown"), [(True, "hmm\n\nhi\n"), (False, "hi\n")])
async def test_thoughts_are_for_the_terminal_alone_and_no_part_of_the_answer(
    serve, is_terminal, shown
) -> None:
    async def thinking(_: web.Request) -> web.Response:
        deltas = ({"reasoning_content": "h"}, {"reasoning_content": "mm"}, {"content": "hi"})
        text = "".join(f"data: {json.dumps({'choices': [{'delta': delta}]})}\n\n" for delta in deltas)
        return web.Response(text=text + "data: [DONE]\n\n", content_type="text/event-stream")

    screen = io.StringIO()
    async with Client(await serve({"POST /v1/chat/completions": thinking})) as client:
        console = Console(file=screen, force_terminal=is_terminal, color_system=None, width=100)
        talk = Conversation(client, {"model": "m"}, None, console)
        assert await talk.ask("?") == "hi"
    assert screen.getvalue() == shown
    assert talk.messages[-1] == {"role": "assistant", "content": "hi"}


async def test_a_question_that_failed_is_taken_back(serve) -> None:
    async def refuse(_: web.Request) -> web.Response:
        return web.json_response({"error": {"message": "overloaded"}}, status=503)

    async with Client(await serve({"POST /v1/chat/completions": refuse})) as client:
        talk = Conversation(client, {"model": "m"}, "system", Console(file=io.StringIO()))
        with pytest.raises(HelexaError, match="overloaded"):
            await talk.ask("?")
    assert talk.messages == [{"role": "system", "content": "system"}]
    talk.forget()
    assert talk.messages == [{"role": "system", "content": "system"}]


async def test_without_a_name_the_loaded_model_is_chosen(serve) -> None:
    async def models(_: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "cold", "loaded": False}, {"id": "warm", "loaded": True}]})

    async def none(_: web.Request) -> web.Response:
        return web.json_response({"data": []})

    async with Client(await serve({"GET /v1/models": models})) as client:
        assert await choose_model(client, None) == "warm"
        assert await choose_model(client, "given") == "given"
    async with Client(await serve({"GET /v1/models": none})) as client:
        with pytest.raises(BadRequest, match="offers no model"):
            await choose_model(client, None)
