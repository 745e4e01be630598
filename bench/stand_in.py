"""A neuron in a few lines, to measure what stands before it: `python bench/stand_in.py PORT`.

Answers polls, and chats with `max_tokens` events, one each `seed` milliseconds. Every event tells when it was
written, in nanoseconds of the machine's monotonic clock.
"""

import asyncio
import json
import sys
import time
from typing import Any

_CONTROL: dict[str, Any] = {
    "/health": {
        **{"status": "ok", "uptime_s": 1.0, "memory_available_bytes": 1 << 30},
        **{"activation": {"state": "ready"}, "models": [{"id": "tiny"}]},
    },
    "/models": [{"id": "tiny", "status": "loaded", "source": "tiny"}],
    "/discovery": {
        **{"hostname": "stand-in", "os": "Linux", "kernel": "6", "devices": []},
        "cpu": {
            **{"name": "CPU", "cores": 2, "threads": 2},
            **{"instruction_sets": [], "memory_total_bytes": 1 << 30},
        },
    },
}
_WORD = {"index": 0, "delta": {"content": "TIME"}, "logprobs": None, "finish_reason": None}
_EVENT = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "tiny"}
_BEFORE, _AFTER = (b"data: %s\n\n" % json.dumps({**_EVENT, "choices": [_WORD]}).encode()).split(b"TIME")
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
_DONE = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


class StandIn(asyncio.Protocol):
    """One connection."""

    def __init__(self) -> None:
        self._buffer = b""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while b"\r\n\r\n" in self._buffer:
            head, _, rest = self._buffer.partition(b"\r\n\r\n")
            _, _, length = head.lower().partition(b"content-length:")
            size = int(length.split(b"\r\n")[0] or 0)
            if len(rest) < size:
                return
            self._buffer = rest[size:]
            self._answer(head.split(b" ")[1].decode(), rest[:size])

    def _answer(self, path: str, body: bytes) -> None:
        if path in _CONTROL:
            payload = json.dumps(_CONTROL[path]).encode()
            head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
            self._transport.write(head % len(payload) + payload)
            return
        asked = json.loads(body)
        self._task = asyncio.ensure_future(self._stream(asked["max_tokens"], asked["seed"] / 1e3))

    async def _stream(self, count: int, pause_s: float) -> None:
        self._transport.write(_HEAD + _chunk())
        due = time.perf_counter()
        for _ in range(count - 1):
            due += pause_s
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            self._transport.write(_chunk())
        self._transport.write(_DONE)


def _chunk() -> bytes:
    event = b"%s%d%s" % (_BEFORE, time.monotonic_ns(), _AFTER)
    return b"%x\r\n%s\r\n" % (len(event), event)


async def serve(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(StandIn, "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1])))
