"""What gateway and neuron cost on the wire.

overhead  the gateway before a neuron stand-in that streams at a fixed rate: time to first byte and chunk rate
          with and without it, alternating; each runs in a process of its own on loopback.
model     a real model straight and through the gateway: time to first token and tokens per second, beside
          what the engine measured of itself.

The last line of stdout is one JSON document.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp

READY_S = 60.0
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "stream": True}


class StandIn(asyncio.Protocol):
    """A connection to a neuron stand-in: answers polls, streams `max_tokens` chunks, one each `seed` ms."""

    def __init__(self) -> None:
        self._buffer = b""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while b"\r\n\r\n" in self._buffer:
            head, _, rest = self._buffer.partition(b"\r\n\r\n")
            lower = head.lower()
            size = (
                int(lower.split(b"content-length:")[1].split(b"\r\n")[0])
                if b"content-length:" in lower
                else 0
            )
            if len(rest) < size:
                return
            self._buffer = rest[size:]
            self._answer(head.split(b" ")[1].decode(), rest[:size])

    def _answer(self, path: str, body: bytes) -> None:
        if path in _CONTROL:
            payload = json.dumps(_CONTROL[path]).encode()
            self._transport.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
                % len(payload)
                + payload
            )
            return
        asked = json.loads(body)
        self._task = asyncio.ensure_future(self._stream(asked["max_tokens"], asked["seed"] / 1e3))

    async def _stream(self, count: int, pause_s: float) -> None:
        head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        word = {"index": 0, "delta": {"content": " word"}, "logprobs": None, "finish_reason": None}
        payload = {
            "id": "chatcmpl-1",
            "object": "chat.completion.chunk",
            "created": 1,
            "model": "tiny",
            "choices": [word],
        }
        event = b"data: " + json.dumps(payload).encode() + b"\n\n"
        chunk = b"%x\r\n" % len(event) + event + b"\r\n"
        self._transport.write(head + chunk)
        due = time.perf_counter()
        for _ in range(count - 1):
            due += pause_s
            delay = due - time.perf_counter()
            await asyncio.sleep(max(0.0, delay))
            self._transport.write(chunk)
        done = b"data: [DONE]\n\n"
        self._transport.write(b"%x\r\n" % len(done) + done + b"\r\n0\r\n\r\n")


_CONTROL: dict[str, Any] = {
    "/health": {
        **{"status": "ok", "uptime_s": 1.0, "memory_available_bytes": 1 << 30},
        **{"activation": {"state": "ready"}, "models": [{"id": "tiny"}]},
    },
    "/models": [{"id": "tiny", "status": "loaded", "source": "tiny"}],
    "/discovery": {
        **{"hostname": "stand-in", "os": "Linux", "kernel": "6", "devices": []},
        "cpu": {
            "name": "CPU",
            "cores": 2,
            "threads": 2,
            "instruction_sets": [],
            "memory_total_bytes": 1 << 30,
        },
    },
}


async def stand_in(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(StandIn, "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def process(*arguments: str, url: str) -> Iterator[subprocess.Popen[bytes]]:
    """A Python process that answers at `url`, until the block ends; its log is shown if it does not start."""
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen([sys.executable, *arguments], stdout=log, stderr=log)
        try:
            host, port = url.removeprefix("http://").split(":")
            end = time.monotonic() + READY_S
            while True:
                with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 1):
                    break
                if child.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    raise SystemExit(f"{arguments} did not start:\n{log.read().decode()}")
                time.sleep(0.05)
            yield child
        finally:
            child.send_signal(signal.SIGTERM)
            child.wait(30)


@contextlib.contextmanager
def gateway(neuron: str) -> Iterator[tuple[str, int]]:
    """URL and process id of a gateway before that neuron."""
    port, metrics = free_port(), free_port()
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "gateway.toml"
        config.write_text(
            f'[gateway]\nlisten = "127.0.0.1:{port}"\nmetrics_listen = "127.0.0.1:{metrics}"\n'
            f'[log]\nlevel = "warning"\n[[neurons]]\nname = "n"\nendpoint = "{neuron}"\n'
        )
        url = f"http://127.0.0.1:{port}"
        with process("-m", "helexa.cli.gateway", "--config", str(config), url=url) as child:
            yield url, child.pid


async def stream(session: aiohttp.ClientSession, url: str, **fields: Any) -> tuple[float, float, int]:
    """Seconds to the first body byte, seconds in all, and events of one streamed chat."""
    started = time.perf_counter()
    async with session.post(url + "/v1/chat/completions", json=CHAT | fields) as response:
        response.raise_for_status()
        block = await response.content.readany()
        first = time.perf_counter() - started
        events = block.count(b"data: ")
        while block := await response.content.readany():
            events += block.count(b"data: ")
    return first, time.perf_counter() - started, events - 1


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def percentiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        name: ordered[min(len(ordered) - 1, int(len(ordered) * share))]
        for name, share in (("p50", 0.5), ("p99", 0.99))
    }


async def clients(session: aiohttp.ClientSession, url: str, streams: int) -> list[float]:
    """Seconds to the first byte of what `streams` clients see that each send three requests, out of step."""

    async def client(index: int) -> list[float]:
        await asyncio.sleep(0.2 * index / streams)
        return [(await stream(session, url, max_tokens=20, seed=10))[0] for _ in range(3)]

    return [first for firsts in await asyncio.gather(*map(client, range(streams))) for first in firsts]


async def flood(session: aiohttp.ClientSession, url: str, streams: int) -> tuple[int, float]:
    """Events and seconds of streams whose source never waits."""
    started = time.perf_counter()
    parts = (stream(session, url, max_tokens=2500, seed=0) for _ in range(streams))
    events = sum(count for _, _, count in await asyncio.gather(*parts))
    return events, time.perf_counter() - started


async def overhead(streams: int, rounds: int) -> dict[str, Any]:
    port = free_port()
    neuron = f"http://127.0.0.1:{port}"
    alone: dict[str, list[float]] = {"direct": [], "gateway": []}
    many: dict[str, list[float]] = {"direct": [], "gateway": []}
    with process(__file__, "stand-in", str(port), url=neuron), gateway(neuron) as (url, pid):
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            for _ in range(rounds):
                for name, target in (("direct", neuron), ("gateway", url)):
                    alone[name] += [
                        (await stream(session, target, max_tokens=3, seed=1))[0] for _ in range(5)
                    ]
                    many[name] += await clients(session, target, streams)
            direct, direct_s = await flood(session, neuron, streams)
            before = cpu_seconds(pid)
            through, through_s = await flood(session, url, streams)
            per_core = through / (cpu_seconds(pid) - before)
    return {
        "first_byte_ms_1_stream": _summary(alone),
        f"first_byte_ms_{streams}_streams": _summary(many),
        "chunks_per_s": {"direct": round(direct / direct_s), "gateway": round(through / through_s)},
        "chunks_per_s_of_gateway_cpu": round(per_core),
    }


async def model(path: str, prompt: int, generate: int, rounds: int) -> dict[str, Any]:
    """The same request straight to a neuron and through a gateway, beside what the engine says of itself."""
    port = free_port()
    neuron = f"http://127.0.0.1:{port}"
    rows: dict[str, list[dict[str, float]]] = {"neuron": [], "gateway": []}
    arguments = ("-m", "helexa.cli.neuron", "--port", str(port), "--model", f"tiny={path}")
    with process(*arguments, url=neuron), gateway(neuron) as (url, _):
        async with aiohttp.ClientSession() as session:
            await loaded(session, url)
            for index in range(rounds + 1):
                for name, target in (("neuron", neuron), ("gateway", url)):
                    words = f"{name} {index} " + "and so it went " * (prompt // 4)  # no two share a prefix
                    row = await generation(session, target, words, generate)
                    if index:  # the first is to warm up
                        rows[name].append(row)
    keys = ("prompt_tokens", "first_token_ms", "tokens_per_s", "engine_prefill_ms", "engine_tokens_per_s")
    return {
        name: {key: round(statistics.median(row[key] for row in measured), 2) for key in keys}
        for name, measured in rows.items()
    }


async def loaded(session: aiohttp.ClientSession, url: str) -> None:
    for _ in range(int(READY_S * 10)):
        async with session.get(url + "/v1/models") as response:
            if any(card["loaded"] for card in (await response.json())["data"]):
                return
        await asyncio.sleep(0.1)
    raise SystemExit("the model was not loaded in time")


async def generation(session: aiohttp.ClientSession, url: str, words: str, count: int) -> dict[str, float]:
    wanted = {
        "max_tokens": count,
        "temperature": 0,
        "ignore_eos": True,
        "stream_options": {"include_usage": True},
    }
    body = CHAT | wanted | {"messages": [{"role": "user", "content": words}]}
    started, first, last, usage = time.perf_counter(), 0.0, 0.0, {}
    async with session.post(url + "/v1/chat/completions", json=body) as response:
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            usage = event.get("usage") or usage
            if any(choice["delta"].get("content") for choice in event["choices"]):
                last = time.perf_counter()
                first = first or last
    timing = usage["helexa_timing"]
    tokens = usage["completion_tokens"]
    return {
        "prompt_tokens": usage["prompt_tokens"],
        "first_token_ms": (first - started) * 1e3,
        "tokens_per_s": (tokens - 1) / (last - first),
        "engine_prefill_ms": timing["prefill_ms"],
        "engine_tokens_per_s": (tokens - 1) / timing["decode_ms"] * 1e3,
    }


def _summary(values: dict[str, list[float]]) -> dict[str, Any]:
    """Percentiles of both, and how much the gateway adds."""
    rows = {name: {key: round(s * 1e3, 3) for key, s in percentiles(v).items()} for name, v in values.items()}
    added = {key: round(rows["gateway"][key] - rows["direct"][key], 3) for key in rows["direct"]}
    return {**rows, "added": added, "requests": len(values["gateway"])}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    own = commands.add_parser("overhead")
    own.add_argument("--streams", type=int, default=16)
    own.add_argument("--rounds", type=int, default=20)
    real = commands.add_parser("model")
    real.add_argument("path", help="a GGUF file")
    real.add_argument("--prompt", type=int, default=256)
    real.add_argument("--generate", type=int, default=64)
    real.add_argument("--rounds", type=int, default=5)
    commands.add_parser("stand-in").add_argument("port", type=int)
    arguments = parser.parse_args()
    if arguments.command == "stand-in":
        asyncio.run(stand_in(arguments.port))
        return
    if arguments.command == "overhead":
        result = asyncio.run(overhead(arguments.streams, arguments.rounds))
    else:
        result = asyncio.run(model(arguments.path, arguments.prompt, arguments.generate, arguments.rounds))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
