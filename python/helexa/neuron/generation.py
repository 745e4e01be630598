"""Runs the choices of one request on an engine, merges their deltas and measures them."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

from prometheus_client import Histogram

from helexa.engine.engine import Engine
from helexa.engine.sampling_params import SamplingParams
from helexa.engine.sequence import GenerationProgress
from helexa.engine.stream import Delta
from helexa.engine.stream import Usage as EngineUsage
from helexa.neuron.metrics import Metrics, Tokens
from helexa.wire.generation import CompletionTokensDetails, PromptTokensDetails, Timing, Usage
from helexa.wire.sse import Prefill

_RESERVED = 512  # of an answer, which may get longer: the scheduler finds room or makes some


@dataclass(frozen=True)
class Job:
    """One choice to generate; `prompt` tells choices of the same prompt from those of another."""

    token_ids: list[int]
    params: SamplingParams | None  # None: nothing is generated
    prompt: int = 0
    priority: int = 0
    namespace: str = ""
    progress: GenerationProgress = field(default_factory=GenerationProgress)


@dataclass
class Record:
    """What one request has come to, for its answer, the log and the metrics."""

    model: str = ""
    outcome: str = "ok"  # or the code of the error, or "cancelled"
    jobs: list[Job] = field(default_factory=list)
    started_s: float = field(default_factory=time.monotonic)
    first_token_s: float | None = None
    num_tokens: int = 0  # generated so far, over all choices
    usages: dict[int, EngineUsage] = field(default_factory=dict)  # by choice
    finish_reasons: dict[int, str] = field(default_factory=dict)

    def prefill(self) -> Prefill | None:
        """Tokens computed and in all of the prompts that are being computed; None when none is."""
        running = [job.progress for job in self.jobs if job.progress.is_prefilling]
        if not running:
            return None
        return Prefill(sum(one.computed_tokens for one in running), sum(one.prompt_tokens for one in running))

    def tokens(self) -> Tokens:
        """What the request has cost; if it was cut off, its prompt counts once that was computed."""
        usage = self.usage()
        if self.usages or self.first_token_s is None:
            cached = usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else 0
            return Tokens(usage.prompt_tokens, cached, max(usage.completion_tokens, self.num_tokens))
        prompts = {job.prompt: len(job.token_ids) for job in self.jobs}
        return Tokens(sum(prompts.values()), 0, self.num_tokens)

    def kv_tokens(self, engine: Engine) -> int:
        """Positions of the KV cache to ask for: those of as many choices as run at a time, at most all."""
        prompts: dict[int, int] = {}
        answers = []
        for job in self.jobs:
            length = prompts[job.prompt] = len(job.token_ids)
            wanted = 0 if job.params is None else min(job.params.max_tokens or _RESERVED, _RESERVED)
            answers.append(min(wanted, engine.max_context - length))
        width = engine.options.max_sequences
        needed = sum(sorted(prompts.values())[-width:]) + sum(sorted(answers)[-width:])
        return min(needed, engine.stats().kv_tokens_total)

    def usage(self) -> Usage:
        """Tokens of all finished choices; a prompt counts once however many choices it has."""
        first = {self.jobs[index].prompt: self.usages[index] for index in sorted(self.usages, reverse=True)}
        usages = list(self.usages.values())
        prompt_tokens = sum(usage.prompt_tokens for usage in first.values())
        cached_tokens = sum(usage.cached_tokens for usage in first.values())
        completion_tokens = sum(usage.completion_tokens for usage in usages)
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens),
            completion_tokens_details=CompletionTokensDetails(
                sum(usage.reasoning_tokens for usage in usages)
            ),
            helexa_timing=Timing(
                prefill_ms=round(max((usage.prefill_ms for usage in usages), default=0.0), 3),
                decode_ms=round(max((usage.decode_ms for usage in usages), default=0.0), 3),
                queue_ms=round(max((usage.queue_ms for usage in usages), default=0.0), 3),
                prefill_tokens=sum(usage.prefill_tokens for usage in first.values()),
                reuse_ratio=round(cached_tokens / prompt_tokens, 4) if prompt_tokens else 0.0,
            ),
        )


async def run(engine: Engine, record: Record, metrics: Metrics) -> AsyncGenerator[tuple[int, Delta], None]:
    """Index of the choice and delta, as they come.

    Leaving the generator cancels every choice. The first error of any choice ends all of them.
    """
    times: dict[int, float] = {}
    first_token, inter_token = (
        histogram.labels(record.model) for histogram in (metrics.first_token, metrics.inter_token)
    )
    source = _one(engine, record.jobs[0]) if len(record.jobs) == 1 else _merge(engine, record.jobs)
    async with aclosing(source) as deltas:
        async for index, delta in deltas:
            times[index] = _measure(index, delta, times.get(index), record, first_token, inter_token)
            yield index, delta


async def _one(engine: Engine, job: Job) -> AsyncGenerator[tuple[int, Delta], None]:
    async with aclosing(_generate(engine, job)) as deltas:
        async for delta in deltas:
            yield 0, delta


def _generate(engine: Engine, job: Job) -> AsyncGenerator[Delta, None]:
    if job.params is None:
        return _nothing(len(job.token_ids))
    return engine.generate(
        job.token_ids,
        job.params,
        namespace=job.namespace,
        priority=job.priority,
        progress=job.progress,
    )


async def _nothing(num_tokens: int) -> AsyncGenerator[Delta, None]:
    yield Delta("", finish_reason="length", usage=EngineUsage(num_tokens, 0, 0, num_tokens, 0.0, 0.0, 0.0))


async def _merge(engine: Engine, jobs: list[Job]) -> AsyncGenerator[tuple[int, Delta], None]:
    """The deltas of many choices, as many at a time as the engine runs sequences."""
    width = min(engine.options.max_sequences, len(jobs))
    queue: asyncio.Queue[tuple[int, Delta] | Exception | None] = asyncio.Queue(maxsize=2 * width)
    waiting = iter(list(enumerate(jobs)))

    async def work() -> None:
        try:
            for index, job in waiting:
                async with aclosing(_generate(engine, job)) as deltas:
                    async for delta in deltas:
                        await queue.put((index, delta))
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    tasks = [asyncio.create_task(work()) for _ in range(width)]
    try:
        num_running = len(tasks)
        while num_running:
            item = await queue.get()
            if item is None:
                num_running -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _measure(
    index: int,
    delta: Delta,
    last_s: float | None,
    record: Record,
    first_token: Histogram,
    inter_token: Histogram,
) -> float:
    now_s = time.monotonic()
    if record.first_token_s is None and (delta.token_ids or delta.usage):
        record.first_token_s = now_s
        first_token.observe(now_s - record.started_s)
    if last_s is not None and delta.token_ids:
        for _ in delta.token_ids:
            inter_token.observe((now_s - last_s) / len(delta.token_ids))
    record.num_tokens += len(delta.token_ids)
    if delta.finish_reason and delta.usage:
        record.usages[index] = delta.usage
        record.finish_reasons[index] = delta.finish_reason
    return now_s
