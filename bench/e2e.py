"""What gateway and neuron cost on the wire.

overhead  the gateway before a neuron stand-in that streams at a fixed rate: time to first byte, delay of each
          event and chunk rate with and without it, and with another proxy in its place (--peer, the command
          of LiteLLM's), alternating; each runs in a process of its own on loopback.
memory    what the gateway keeps after so many thousand requests.
model     a real model straight and through the gateway: time to first token and tokens per second, beside
          what the engine measured of itself.

The last line of stdout is one JSON document.
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

READY_S = 120.0
STAND_IN = str(Path(__file__).with_name("stand_in.py"))
WRITTEN = re.compile(rb'"content": ?"(\d+)"')
EMPTY: Mapping[str, str] = {}
PEER_ENVIRONMENT = {  # it asks for no key, as ours on loopback, and looks nothing up on the network
    "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_TELEMETRY": "False",
}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "stream": True}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def process(
    *arguments: str, url: str, program: str = sys.executable, environment: Mapping[str, str] = EMPTY
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that answers at `url`, until the block ends; its log is shown if it does not start."""
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(
            [program, *arguments], stdout=log, stderr=log, env={**os.environ, **environment}
        )
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
            f'[[neurons]]\nname = "n"\nendpoint = "{neuron}"\n'
        )
        url = f"http://127.0.0.1:{port}"
        with process("-m", "helexa.cli.gateway", "--config", str(config), url=url) as child:
            yield url, child.pid


@contextlib.contextmanager
def peer(command: str, neuron: str) -> Iterator[tuple[str, int]]:
    """URL and process id of LiteLLM's proxy before that neuron."""
    port = free_port()
    model = {"model": "openai/tiny", "api_base": neuron + "/v1", "api_key": "none"}
    config = {"model_list": [{"model_name": "tiny", "litellm_params": model}]}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(json.dumps(config))  # JSON is YAML
        url = f"http://127.0.0.1:{port}"
        arguments = ("--config", str(path), "--host", "127.0.0.1", "--port", str(port))
        with process(*arguments, url=url, program=command, environment=PEER_ENVIRONMENT) as child:
            yield url, child.pid


@dataclass
class Times:
    """What the clients of one target have measured, in seconds."""

    alone: list[float] = field(default_factory=list)  # to the first byte, one stream at a time
    first: list[float] = field(default_factory=list)  # to the first byte, many at a time
    events: list[float] = field(default_factory=list)  # from the neuron to the client, each event

    def summary(self) -> dict[str, dict[str, float]]:
        return {f"{name}_ms": percentiles(values) for name, values in vars(self).items()}


async def stream(
    session: aiohttp.ClientSession, url: str, delays: list[float] | None = None, **fields: Any
) -> tuple[float, int]:
    """Seconds to the first byte and number of events of one chat; `delays` gets those of its events."""
    started, count = time.perf_counter(), 0
    async with session.post(url + "/v1/chat/completions", json=CHAT | fields) as response:
        response.raise_for_status()
        first = 0.0
        while block := await response.content.readany():
            first = first or time.perf_counter() - started
            found = WRITTEN.findall(block)
            count += len(found)
            if delays is not None:
                now = time.monotonic_ns()
                delays += [(now - int(written)) / 1e9 for written in found]
    return first, count


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def percentiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        name: round(ordered[min(len(ordered) - 1, int(len(ordered) * share))] * 1e3, 3)
        for name, share in (("p50", 0.5), ("p99", 0.99))
    }


async def crowd(session: aiohttp.ClientSession, url: str, streams: int, times: Times) -> None:
    """So many clients that each send three requests, out of step."""

    async def client(index: int) -> None:
        await asyncio.sleep(0.2 * index / streams)
        for _ in range(3):
            first, _ = await stream(session, url, times.events, max_tokens=20, seed=10)
            times.first.append(first)

    await asyncio.gather(*map(client, range(streams)))


async def flood(
    session: aiohttp.ClientSession, url: str, pid: int, streams: int, each: int
) -> dict[str, int]:
    """Chunks per second, of the clock and of the process's CPU time, where the source never waits."""
    started, used = time.perf_counter(), cpu_seconds(pid)
    found = await asyncio.gather(*(stream(session, url, max_tokens=each, seed=0) for _ in range(streams)))
    seconds, used = time.perf_counter() - started, cpu_seconds(pid) - used
    chunks = sum(count for _, count in found)
    return {"of_clock": round(chunks / seconds), "of_cpu": round(chunks / max(used, 0.01))}


async def paced(session: aiohttp.ClientSession, url: str, pid: int, streams: int) -> int:
    """Chunks per second of CPU time where every chunk comes alone: one each 4 ms of each stream."""
    used = cpu_seconds(pid)
    found = await asyncio.gather(*(stream(session, url, max_tokens=500, seed=4) for _ in range(streams)))
    return round(sum(count for _, count in found) / (cpu_seconds(pid) - used))


async def overhead(streams: int, rounds: int, other: str | None) -> dict[str, Any]:
    port = free_port()
    neuron = f"http://127.0.0.1:{port}"
    async with contextlib.AsyncExitStack() as stack:
        child = stack.enter_context(process(STAND_IN, str(port), url=neuron))
        targets = {"direct": (neuron, child.pid), "gateway": stack.enter_context(gateway(neuron))}
        if other:
            targets["peer"] = stack.enter_context(peer(other, neuron))
        connector = aiohttp.TCPConnector(limit=0)
        session = await stack.enter_async_context(aiohttp.ClientSession(connector=connector))
        times = {name: Times() for name in targets}
        for url, _ in targets.values():
            await crowd(session, url, streams, Times())  # to warm up
        for _ in range(rounds):
            for name, (url, _) in targets.items():
                for _ in range(5):
                    times[name].alone.append((await stream(session, url, max_tokens=3, seed=1))[0])
                await crowd(session, url, streams, times[name])
        rows: dict[str, Any] = {name: measured.summary() for name, measured in times.items()}
        for name, (url, pid) in targets.items():
            rows[name]["chunks_per_s"] = await flood(
                session, url, pid, streams, 250 if name == "peer" else 2500
            )
            rows[name]["chunks_per_s"]["of_cpu_one_by_one"] = await paced(session, url, pid, streams)
    for name in ("gateway", "peer"):
        if name in rows:
            rows[name]["added"] = _added(rows["direct"], rows[name])
    return {"streams": streams, "requests": rounds * (5 + 3 * streams), **rows}


def _added(direct: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    kinds = ("alone_ms", "first_ms", "events_ms")
    return {
        kind: {key: round(row[kind][key] - direct[kind][key], 3) for key in direct[kind]} for kind in kinds
    }


async def memory(requests: int, streams: int) -> dict[str, Any]:
    """Resident bytes of the gateway after each tenth of the requests, which end in every way there is."""
    port = free_port()
    neuron = f"http://127.0.0.1:{port}"
    resident = []
    with process(STAND_IN, str(port), url=neuron), gateway(neuron) as (url, pid):
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:

            async def client(count: int) -> None:
                for index in range(count):
                    if index % 10 == 0:
                        with contextlib.suppress(TimeoutError):
                            async with asyncio.timeout(0.01):  # leaves
                                await stream(session, url, max_tokens=100, seed=10)
                    elif index % 10 == 1:
                        async with session.post(
                            url + "/v1/chat/completions", json={"model": "none"}
                        ) as refused:
                            await refused.read()
                    else:
                        await stream(session, url, max_tokens=3, seed=0)

            for _ in range(11):
                await asyncio.gather(*(client(requests // 10 // streams) for _ in range(streams)))
                resident.append(resident_bytes(pid))
    first, *later = resident  # the first tenth is to warm up
    return {"requests": requests, "resident_bytes": resident, "grown_bytes": later[-1] - first}


def resident_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024


async def model(path: str, device: str | None, prompt: int, generate: int, rounds: int) -> dict[str, Any]:
    """The same request straight to a neuron and through a gateway, beside what the engine says of itself."""
    port = free_port()
    neuron = f"http://127.0.0.1:{port}"
    rows: dict[str, list[dict[str, float]]] = {"neuron": [], "gateway": []}
    arguments = ("-m", "helexa.cli.neuron", "--port", str(port), "--model", f"tiny={path}")
    where = ("--device", device) if device else ()
    with process(*arguments, *where, url=neuron), gateway(neuron) as (url, _):
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
    started, first, last = time.perf_counter(), 0.0, 0.0
    usage: dict[str, Any] = {}
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    own = commands.add_parser("overhead")
    own.add_argument("--streams", type=int, default=16)
    own.add_argument("--rounds", type=int, default=20)
    own.add_argument("--peer", help="path of the `litellm` command, to measure its proxy in the same run")
    flat = commands.add_parser("memory")
    flat.add_argument("--requests", type=int, default=20_000)
    flat.add_argument("--streams", type=int, default=16)
    real = commands.add_parser("model")
    real.add_argument("path", help="a GGUF file")
    real.add_argument("--device", help="as the neuron takes it, such as cuda:0")
    real.add_argument("--prompt", type=int, default=256)
    real.add_argument("--generate", type=int, default=64)
    real.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.command == "overhead":
        result = asyncio.run(overhead(arguments.streams, arguments.rounds, arguments.peer))
    elif arguments.command == "memory":
        result = asyncio.run(memory(arguments.requests, arguments.streams))
    else:
        sizes = (arguments.prompt, arguments.generate, arguments.rounds)
        result = asyncio.run(model(arguments.path, arguments.device, *sizes))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
