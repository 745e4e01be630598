"""A neuron without a model: it plays a script in the wire of neurons, and records what it is asked.

For tests with agents and SDKs, in a process of its own (`python tests/support/scripted_neuron.py FILE.json`)
or in the test's. Its tokens are four characters of the rendered prompt each; `/tokenize` counts them. What
a prompt shares with an earlier one is reported as cached.
"""

import argparse
import asyncio
import json
import socket
import sys
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import hypercorn.asyncio
import hypercorn.config
import msgspec

from helexa.wire import sse
from helexa.wire.chat import (
    AnswerMessage,
    ChatAnswer,
    ChatChunk,
    ChatDelta,
    Choice,
    ChunkChoice,
    FunctionCall,
    FunctionCallDelta,
    ToolCall,
    ToolCallDelta,
)
from helexa.wire.generation import (
    USAGE_HEADER,
    CompletionTokensDetails,
    FinishReason,
    PromptTokensDetails,
    Usage,
    encode,
)

CHARACTERS_PER_TOKEN = 4


@dataclass(frozen=True)
class ToolUse:
    """A call of the model; the arguments are streamed as the text of this JSON."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Turn:
    """What the model says to one request.

    It is played to the first request that it suits: whose body contains `when`, and which offers the tools
    that it calls. `error` (status, members) refuses; `cut` breaks the stream off in the midst of the text.
    """

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolUse, ...] = ()
    when: str = ""
    prefill_s: float = 0.0
    pause_s: float = 0.0  # between pieces
    error: tuple[int, dict[str, Any]] | None = None
    cut: bool = False

    def suits(self, asked: dict[str, Any], body: str) -> bool:
        offered = {tool.get("function", {}).get("name") for tool in asked.get("tools") or ()}
        return self.when in body and all(call.name in offered for call in self.tool_calls)


@dataclass
class ScriptedNeuron:
    """An ASGI application. Requests that no turn of the script is left for get `otherwise`."""

    turns: list[Turn] = field(default_factory=list)
    otherwise: Turn = Turn("Done.")
    model: str = "scripted"
    context: int = 131072
    piece: int = 5  # characters of one delta
    keep_alive_s: float = 1.0
    record: Path | None = None  # a file that gets each request as a line
    name: str = "scripted"
    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)  # bodies of chat completions
    headers: list[dict[str, str]] = field(default_factory=list)
    _prompts: list[str] = field(default_factory=list)
    _started: float = field(default_factory=time.monotonic)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            while True:
                message = await receive()
                await send({"type": message["type"] + ".complete"})
                if message["type"] == "lifespan.shutdown":
                    return
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        path, asked = scope["path"], json.loads(body or b"{}")
        if path == "/v1/chat/completions":
            headers = {name.decode(): value.decode() for name, value in scope["headers"]}
            self._note(asked, headers)
            await self._chat(asked, headers, send)
        elif path == "/tokenize":
            count = num_tokens(render(asked))
            await _answer(send, 200, {"count": count, "max_model_len": self.context, "tokens": [0] * count})
        elif path in ("/health", "/models", "/discovery"):
            await _answer(send, 200, getattr(self, "_" + path[1:])())
        else:
            await _refuse(send, 404, {"message": f"no such route: {path}", "code": "not_found"})

    def _note(self, asked: dict[str, Any], headers: dict[str, str]) -> None:
        self.requests.append(asked)
        self.headers.append(headers)
        if self.record:
            with self.record.open("a") as file:
                file.write(json.dumps(asked) + "\n")

    def _take(self, asked: dict[str, Any]) -> Turn:
        body = json.dumps(asked, ensure_ascii=False)
        for index, turn in enumerate(self.turns):
            if turn.suits(asked, body):
                return self.turns.pop(index)
        return self.otherwise

    async def _chat(self, asked: dict[str, Any], headers: dict[str, str], send: Any) -> None:
        if asked["model"] != self.model:
            await _refuse(send, 404, {"message": "not loaded", "code": "model_not_found"})
            return
        prompt = render(asked)
        if (count := num_tokens(prompt)) >= self.context:
            message = f"this model's context is {self.context} tokens; the prompt has {count}"
            members = {"message": message, "type": "invalid_request_error", "code": "context_length_exceeded"}
            await _refuse(send, 400, {**members, "max": self.context, "prompt_tokens": count})
            return
        turn = self._take(asked)
        if turn.error:
            await _refuse(send, *turn.error)
            return
        answer = _Answer(turn, asked, self.piece, self._usage(prompt))
        if not asked.get("stream"):
            await asyncio.sleep(turn.prefill_s)
            await _answer(send, 200, json.loads(encode(answer.whole())))
            return
        async for block in self._stream(turn, answer, asked, USAGE_HEADER in headers):
            await send(block)

    async def _stream(
        self, turn: Turn, answer: "_Answer", asked: dict[str, Any], is_noted: bool
    ) -> AsyncIterator[dict[str, Any]]:
        total, begun = answer.prompt.prompt_tokens, time.monotonic()
        yield _start(200, {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"})
        while (passed_s := time.monotonic() - begun) < turn.prefill_s:
            await asyncio.sleep(min(self.keep_alive_s, turn.prefill_s - passed_s))
            done = int(total * min(1.0, (time.monotonic() - begun) / turn.prefill_s))
            yield _body(sse.comment(f"prefill {done}/{total}"))
        for chunk in answer.chunks():
            yield _body(sse.encode_raw(encode(chunk)))
            await asyncio.sleep(turn.pause_s)
        if turn.cut:
            yield _body(b'data: {"id": "chatc', more=False)
            return
        usage = answer.usage()
        if (asked.get("stream_options") or {}).get("include_usage"):
            yield _body(sse.encode_raw(encode(answer.chunk(None, usage=usage))))
        elif is_noted:
            yield _body(sse.comment(encode(usage).decode()))
        yield _body(sse.DONE, more=False)

    def _usage(self, prompt: str) -> Usage:
        shared = max((_num_shared(prompt, past) for past in self._prompts), default=0)
        self._prompts.append(prompt)
        count = num_tokens(prompt)
        cached = min(shared // CHARACTERS_PER_TOKEN, count - 1)
        return Usage(count, 0, count, PromptTokensDetails(cached))

    def _health(self) -> dict[str, Any]:
        activation = {"state": "ready"}
        load = {"id": self.model, "max_in_flight": 8, "max_queue_depth": 8}
        uptime_s = time.monotonic() - self._started
        return {
            **{"status": "ok", "uptime_s": uptime_s, "memory_available_bytes": 2**33},
            **{"activation": activation, "models": [load]},
        }

    def _models(self) -> list[dict[str, Any]]:
        about = {"id": self.model, "status": "loaded", "source": "script", "memory_bytes": 2**28}
        abilities = {"capabilities": ["text"], "tool_call": True, "reasoning": True}
        return [{**about, **abilities, "limit": {"context": self.context}}]

    def _discovery(self) -> dict[str, Any]:
        cpu = {"name": "CPU", "cores": 2, "threads": 2, "instruction_sets": [], "memory_total_bytes": 2**34}
        return {"hostname": self.name, "os": "Linux", "kernel": "6", "cpu": cpu, "devices": []}


class _Answer:
    """One turn in the canonical wire, with what the request says about its end."""

    def __init__(self, turn: Turn, asked: dict[str, Any], piece: int, prompt: Usage):
        self.prompt = prompt
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._model = asked["model"]
        self._created = int(time.time())
        self._cut = turn.cut
        stop = asked.get("stop") or ()
        text, self._stop = _until(turn.text, [stop] if isinstance(stop, str) else stop)
        is_stopped = self._stop is not None
        pieces: list[ChatDelta] = [
            ChatDelta(reasoning_content=part) for part in _pieces(turn.reasoning, piece)
        ]
        self._num_reasoning = len(pieces)
        pieces += [ChatDelta(content=part) for part in _pieces(text, piece)]
        if not is_stopped:
            for index, call in enumerate(turn.tool_calls):
                pieces += _call(index, call, piece)
        limit = asked.get("max_completion_tokens") or asked.get("max_tokens") or len(pieces)
        self._pieces = pieces[:limit]
        self._finish: FinishReason = "tool_calls" if turn.tool_calls and not is_stopped else "stop"
        if len(pieces) > limit:
            self._finish = "length"

    def usage(self) -> Usage:
        count = len(self._pieces)
        details = CompletionTokensDetails(min(self._num_reasoning, count))
        total = self.prompt.prompt_tokens + count
        return Usage(self.prompt.prompt_tokens, count, total, self.prompt.prompt_tokens_details, details)

    def chunk(
        self, delta: ChatDelta | None, finish: FinishReason | None = None, usage: Usage | None = None
    ) -> ChatChunk:
        stop = self._stop if finish == "stop" and self._stop else msgspec.UNSET
        choices = [ChunkChoice(0, delta, None, finish, stop)] if delta is not None else []
        return ChatChunk(id=self._id, created=self._created, model=self._model, choices=choices, usage=usage)

    def chunks(self) -> Iterator[ChatChunk]:
        yield self.chunk(ChatDelta(role="assistant", content=""))
        pieces = self._pieces[: len(self._pieces) // 2] if self._cut else self._pieces
        yield from map(self.chunk, pieces)
        if not self._cut:
            yield self.chunk(ChatDelta(), self._finish)

    def whole(self) -> ChatAnswer:
        text = "".join(delta.content or "" for delta in self._pieces)
        reasoning = "".join(delta.reasoning_content or "" for delta in self._pieces)
        calls: list[ToolCall] = []
        for part in (part for delta in self._pieces for part in delta.tool_calls or ()):
            assert part.function is not None
            if part.id:
                calls.append(ToolCall(FunctionCall(part.function.name or "", ""), part.id))
            function = calls[-1].function
            function.arguments = f"{function.arguments}{part.function.arguments}"
        message = AnswerMessage(
            None if calls and not text else text,
            reasoning_content=reasoning or None,
            tool_calls=calls or None,
        )
        return ChatAnswer(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=[Choice(0, message, self._finish, None, self._stop or msgspec.UNSET)],
            usage=self.usage(),
        )


def render(asked: dict[str, Any]) -> str:
    """The prompt: tools, then messages, as a template would put them."""
    parts = [*(asked.get("tools") or ()), *(asked.get("messages") or ()), asked.get("prompt") or ""]
    return "\n".join(json.dumps(part, ensure_ascii=False) for part in parts)


def _num_shared(one: str, other: str) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))


def num_tokens(text: str) -> int:
    return -(-len(text) // CHARACTERS_PER_TOKEN)


def _call(index: int, call: ToolUse, piece: int) -> list[ChatDelta]:
    head = ToolCallDelta(index, f"call_{uuid.uuid4().hex}", "function", FunctionCallDelta(call.name, ""))
    parts = [
        ToolCallDelta(index, function=FunctionCallDelta(arguments=part))
        for part in _pieces(json.dumps(call.arguments, ensure_ascii=False), piece)
    ]
    return [ChatDelta(tool_calls=[part]) for part in (head, *parts)]


def _pieces(text: str, size: int) -> list[str]:
    return [text[start : start + size] for start in range(0, len(text), size)]


def _until(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    ends = [(end, stop) for stop in stops if (end := text.find(stop)) >= 0]
    return (text[: min(ends)[0]], min(ends)[1]) if ends else (text, None)


def _start(status: int, headers: dict[str, str]) -> dict[str, Any]:
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    return {"type": "http.response.start", "status": status, "headers": pairs}


def _body(block: bytes, *, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": block, "more_body": more}


async def _answer(send: Any, status: int, body: Any) -> None:
    await send(_start(status, {"content-type": "application/json"}))
    await send(_body(json.dumps(body).encode(), more=False))


async def _refuse(send: Any, status: int, members: dict[str, Any]) -> None:
    await _answer(send, status, {"error": {"type": "api_error", "param": None, **members}})


@asynccontextmanager
async def listening(app: Any, port: int = 0) -> AsyncIterator[str]:
    """Serves an ASGI application on a loopback port; yields its URL."""
    listener = socket.create_server(("127.0.0.1", port))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    settings = hypercorn.config.Config()
    settings.bind = [f"fd://{listener.detach()}"]
    settings.errorlog = None
    settings.graceful_timeout = 0.2
    stop = asyncio.Event()
    server = asyncio.create_task(hypercorn.asyncio.serve(app, settings, shutdown_trigger=stop.wait))
    try:
        yield url
    finally:
        stop.set()
        await asyncio.wait([server])


def load_script(path: Path) -> ScriptedNeuron:
    """A neuron from {"turns": [{"text", "reasoning", "tool_calls": [{"name", "arguments"}], …}], …}."""
    members = json.loads(path.read_text("utf-8"))
    turns = msgspec.convert(members.pop("turns"), list[Turn])
    otherwise = msgspec.convert(members.pop("otherwise", asdict(Turn("Done."))), Turn)
    return ScriptedNeuron(turns, otherwise, **members)


async def _main(arguments: argparse.Namespace) -> None:
    neuron = load_script(arguments.script)
    neuron.record = arguments.record
    async with listening(neuron, arguments.port) as neuron.url:
        print(neuron.url, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("script", type=Path)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--record", type=Path, help="append each request's body here, one a line")
    try:
        asyncio.run(_main(parser.parse_args()))
    except KeyboardInterrupt:
        sys.exit(0)
