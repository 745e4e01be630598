"""What gateway and neuron cost on the wire.

overhead  the gateway before a neuron stand-in that streams at a fixed rate: time to first byte and chunk rate
          with and without it, alternating; each runs in a process of its own on loopback.

The last line of stdout is one JSON document.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
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


async def overhead(streams: int, rounds: int) -> dict[str, Any]:
    port = free_port()
    neuron = f"http://127.0.0.1:{port}"
    with process(__file__, "stand-in", str(port), url=neuron), gateway(neuron) as (url, pid):
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            times: dict[str, list[float]] = {neuron: [], url: []}
            alone: dict[str, list[float]] = {neuron: [], url: []}
            for _ in range(rounds):
                for target in (neuron, url):
                    alone[target].append((await stream(session, target, max_tokens=3, seed=1))[0])
                    parts = (stream(session, target, max_tokens=20, seed=10) for _ in range(streams))
                    times[target] += [first for first, _, _ in await asyncio.gather(*parts)]
            rates = {}
            for target in (neuron, url):
                before, started = cpu_seconds(pid), time.perf_counter()
                parts = (stream(session, target, max_tokens=2500, seed=0) for _ in range(streams))
                events = sum(count for _, _, count in await asyncio.gather(*parts))
                rates[target] = events / (time.perf_counter() - started)
            per_core = events / (cpu_seconds(pid) - before)
    one = {name: percentiles(alone[target]) for name, target in (("direct", neuron), ("gateway", url))}
    many = {name: percentiles(times[target]) for name, target in (("direct", neuron), ("gateway", url))}
    return {
        "streams": streams,
        "requests": len(times[url]),
        "first_byte_ms_1": _milliseconds(one),
        "first_byte_ms": _milliseconds(many),
        "added_p50_ms_1": round((one["gateway"]["p50"] - one["direct"]["p50"]) * 1e3, 3),
        "added_p50_ms": round((many["gateway"]["p50"] - many["direct"]["p50"]) * 1e3, 3),
        "added_p99_ms": round((many["gateway"]["p99"] - many["direct"]["p99"]) * 1e3, 3),
        "chunks_per_s": {"direct": round(rates[neuron]), "gateway": round(rates[url])},
        "chunks_per_gateway_core_s": round(per_core),
    }


def _milliseconds(table: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    return {name: {key: round(value * 1e3, 3) for key, value in row.items()} for name, row in table.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    own = commands.add_parser("overhead")
    own.add_argument("--streams", type=int, default=16)
    own.add_argument("--rounds", type=int, default=40)
    commands.add_parser("stand-in").add_argument("port", type=int)
    arguments = parser.parse_args()
    if arguments.command == "stand-in":
        asyncio.run(stand_in(arguments.port))
        return
    print(json.dumps(asyncio.run(overhead(arguments.streams, arguments.rounds))))


if __name__ == "__main__":
    main()
