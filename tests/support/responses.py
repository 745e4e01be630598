"""Requests of OpenAI's Responses, and a neuron's streams as their answers, in the openai package's types."""

import json
from typing import Any

from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from helexa.wire import sse
from helexa.wire.responses import ResponsesRequest, ResponseTranslator, parse_responses

EVENTS = TypeAdapter[Any](ResponseStreamEvent)
TOKEN = "0123456789abcdef0123456789abcdef"
WEATHER = {"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": False}
PATCH = {"type": "custom", "name": "patch", "description": "Changes files."}
CREW = {
    **{"type": "namespace", "name": "crew", "description": "Helpers."},
    "tools": [{"type": "function", "name": "call"}],
}
Json = dict[str, Any]


def asked(**members: Any) -> ResponsesRequest:
    return parse_responses(json.dumps({"model": "tiny", "input": "Hello", **members}).encode())


def chat(**members: Any) -> Json:
    """The canonical request for these members."""
    request = asked(**members)
    body: Json = json.loads(request.to_chat(request.items)[0])
    return body


def messages(*items: Json, **members: Any) -> list[Json]:
    said: list[Json] = chat(input=list(items), **members)["messages"]
    return said


def translator(**members: Any) -> ResponseTranslator:
    request = asked(**members)
    return ResponseTranslator(request, request.to_chat(request.items)[1], token=TOKEN, created_at=1790000000)


def chunk(delta: Json | None = None, finish: str | None = None, **more: Any) -> bytes:
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish, **more}]
    return sse.encode({"id": "chatcmpl-1", "created": 1, "model": "tiny", "choices": choices})


def call(index: int, name: str | None = None, arguments: str = "") -> bytes:
    head = {} if name is None else {"id": f"call_{index}", "type": "function"}
    function = {"arguments": arguments} | ({} if name is None else {"name": name})
    return chunk({"tool_calls": [{"index": index, **head, "function": function}]})


def end(reason: str = "stop") -> bytes:
    usage = {
        **{"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18},
        "prompt_tokens_details": {"cached_tokens": 5},
        "completion_tokens_details": {"reasoning_tokens": 3},
    }
    return chunk({}, reason) + sse.encode({"choices": [], "usage": usage}) + sse.DONE


def events_of(stream: bytes) -> list[Json]:
    """The events, each one valid by the types of the openai package and numbered in turn."""
    events = []
    for number, event in enumerate(sse.Parser().feed(stream)):
        members = json.loads(event.data)
        EVENTS.validate_python(members)
        assert event.name == members["type"]
        assert members["sequence_number"] == number
        events.append(members)
    return events


def streamed(*parts: bytes, **members: Any) -> list[Json]:
    made = translator(stream=True, **members)
    told = made.feed(chunk({"role": "assistant", "content": ""}))
    for part in parts:
        told += made.feed(part)
    return events_of(told + made.finish())


def kinds(events: list[Json]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]
