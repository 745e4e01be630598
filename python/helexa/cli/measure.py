"""One benchmark measurement in a process of its own, so that its peak memory is its own alone.

`helexa bench` runs `main` in a fresh interpreter and reads one JSON line from its stdout.
"""

import asyncio
import json
import random
import resource
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

PAGE_TOKENS = 256
BUFFER_BYTES = 1 << 28  # per thread; far larger than any cache


@dataclass(frozen=True)
class Workload:
    """What one run does: `streams` sequences, each `depth` tokens deep before anything is timed."""

    model: str
    prompt: int
    generate: int
    depth: int
    streams: int
    threads: int
    seed: int = 0
    device: str = "cpu"  # or cuda:N

    @property
    def max_context(self) -> int:
        """Tokens of the longest sequence, and room for the warm-up."""
        return max(self.depth + max(self.prompt, 1) + self.generate + 1, 64)

    @property
    def kv_cache_tokens(self) -> int:
        """Whole pages for every stream, with one page more for the fork from its cached depth."""
        pages = -(-self.max_context // PAGE_TOKENS) + 1
        return pages * PAGE_TOKENS * self.streams


@dataclass(frozen=True)
class Timeline:
    """When a stream's tokens came: seconds since its submission, and how many at that moment."""

    times_s: list[float]
    counts: list[int]
    cached_tokens: int


def rates(timelines: Sequence[Timeline], prompt_tokens: int) -> dict[str, float]:
    """Prefill and decode in tokens per second over all streams, and the median time to the first token.

    Prefill counts the prompt tokens that were computed until every stream had its first token. Decode counts
    the tokens of the time in which all streams were decoding, that is without those first ones.
    """
    begin = max(line.times_s[0] for line in timelines)
    end = min(line.times_s[-1] for line in timelines)
    computed = sum(prompt_tokens - line.cached_tokens for line in timelines)
    decoded = sum(
        count
        for line in timelines
        for moment, count in zip(line.times_s[1:], line.counts[1:], strict=True)
        if begin < moment <= end
    )
    firsts = sorted(line.times_s[0] for line in timelines)
    found = {"prefill_tok_s": computed / begin, "ttft_ms": firsts[len(firsts) // 2] * 1e3}
    if decoded and end > begin:
        found["decode_tok_s"] = decoded / (end - begin)
    return found


async def _stream(engine: Any, token_ids: list[int], max_tokens: int, start: float) -> Timeline:
    from helexa.engine.sampler import SamplingParams

    times, counts, cached = [], [], 0
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    async for delta in engine.generate(token_ids, params):
        if delta.token_ids:
            times.append(time.perf_counter() - start)
            counts.append(len(delta.token_ids))
        if delta.usage is not None:
            cached = delta.usage.cached_tokens
    if not times:
        raise SystemExit("the engine generated no token")
    return Timeline(times, counts, cached)


async def _together(engine: Any, prompts: Sequence[list[int]], max_tokens: int) -> list[Timeline]:
    start = time.perf_counter()
    return list(await asyncio.gather(*(_stream(engine, prompt, max_tokens, start) for prompt in prompts)))


async def measure_engine(engine: Any, work: Workload) -> dict[str, float]:
    """Prefill of `prompt`, decode of `generate` tokens, each after `depth` tokens from the prefix cache."""
    source = random.Random(work.seed)

    def some_tokens(count: int) -> list[int]:
        return [source.randrange(engine.config.vocab_size) for _ in range(count)]

    await _together(engine, [some_tokens(32) for _ in range(work.streams)], 8)
    depths = [some_tokens(work.depth) for _ in range(work.streams)]
    if work.depth:
        await _together(engine, [depth + some_tokens(1) for depth in depths], 1)
    found: dict[str, float] = {}
    if work.prompt:
        lines = await _together(engine, [depth + some_tokens(work.prompt) for depth in depths], 1)
        found = rates(lines, work.depth + work.prompt)
    if work.generate:
        lines = await _together(engine, [depth + some_tokens(1) for depth in depths], work.generate + 1)
        decode = rates(lines, work.depth + 1)
        found.setdefault("ttft_ms", decode["ttft_ms"])
        if "decode_tok_s" in decode:
            found["decode_tok_s"] = decode["decode_tok_s"]
    return found


def bytes_per_token(path: Path) -> int:
    """Bytes of weights that a decode step of one sequence reads: all but an embedding that is not also the
    output, and of the experts those that a token uses."""
    from helexa.weights.model_file import open_model

    file = open_model(path)
    try:
        total = sum(tensor.nbytes for tensor in file.tensors.values())
        embedding = file.tensors.get("token_embd.weight")
        if embedding is not None and "output.weight" in file.tensors:
            total -= embedding.nbytes
        experts, used = (_expert_count(file.metadata, key) for key in ("expert_count", "expert_used_count"))
        stacks = sum(tensor.nbytes for name, tensor in file.tensors.items() if "_exps." in name)
        return total - stacks + stacks * used // experts
    finally:
        file.close()


def _expert_count(metadata: Mapping[str, Any], key: str) -> int:
    """A count of experts in a header; 1 where there are none."""
    return int(metadata.get(f"{metadata.get('general.architecture')}.{key}", 0)) or 1


def read_bandwidth(threads: int, repeats: int = 8) -> float:
    """Bytes per second that `threads` threads read together from memory: the best of `repeats` passes."""
    import numpy as np

    buffers = [np.ones(BUFFER_BYTES // 8, np.int64) for _ in range(threads)]
    best = 0.0
    for _ in range(repeats):
        readers = [threading.Thread(target=np.bitwise_or.reduce, args=(buffer,)) for buffer in buffers]
        start = time.perf_counter()
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        best = max(best, threads * BUFFER_BYTES / (time.perf_counter() - start))
    return best


def copy_bandwidth(device: str, repeats: int = 8) -> float:
    """Bytes per second, read and written, of a large copy on a CUDA device: the best of `repeats`."""
    import torch

    source = torch.ones(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(repeats):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize(device)
        best = max(best, 2 * source.nbytes / (time.perf_counter() - start))
    return best


def device_memory_bytes(device: str) -> int:
    """What is in use of a CUDA device's memory, as the driver says."""
    from helexa.neuron.discovery import device_health

    index = int(device.partition(":")[2] or 0)
    return next((found.memory_used_bytes for found in device_health() if found.index == index), 0)


def peak_memory_bytes() -> int:
    """The largest resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def run_engine(work: Workload) -> dict[str, float]:
    """Loads the model and measures it once."""
    from helexa.engine.engine import Engine

    used_bytes = 0 if work.device == "cpu" else device_memory_bytes(work.device)
    start = time.perf_counter()
    engine = Engine.load(
        Path(work.model),
        device=work.device,
        max_context=work.max_context,
        max_sequences=work.streams,
        kv_cache_tokens=work.kv_cache_tokens,
        num_threads=work.threads,
    )
    load_s = time.perf_counter() - start
    try:
        if work.device != "cpu":  # short prompts are captured when they come again
            asyncio.run(measure_engine(engine, replace(work, depth=0, generate=0, seed=work.seed + 1)))
        found = asyncio.run(measure_engine(engine, work))
        peak_bytes = peak_memory_bytes()
        if work.device != "cpu":
            peak_bytes = device_memory_bytes(work.device) - used_bytes
    finally:
        engine.close()
    found |= {"load_s": load_s, "peak_memory_bytes": peak_bytes}
    return found | {"bytes_per_token": bytes_per_token(Path(work.model))}


def main(argument: str) -> None:
    """Runs what the JSON `argument` says: a workload, or {"threads": N, "device": …} for the bandwidth."""
    values = json.loads(argument)
    if "model" in values:
        found = run_engine(Workload(**values))
    elif values.get("device", "cpu") == "cpu":
        found = {"bytes_s": read_bandwidth(values["threads"])}
    else:
        found = {"bytes_s": copy_bandwidth(values["device"])}
    sys.stdout.write(json.dumps(found) + "\n")
