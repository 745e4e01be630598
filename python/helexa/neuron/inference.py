"""The generating routes: from body to seat to stream, with one record of what happened to each request."""

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict
from typing import Any, Generic, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from helexa.engine.engine import Engine
from helexa.errors import HelexaError
from helexa.log import fields
from helexa.neuron.answers import Answers, ChatAnswers, CompletionAnswers
from helexa.neuron.config import NeuronSection
from helexa.neuron.generation import Job, Record, run
from helexa.neuron.metrics import Metrics
from helexa.neuron.prompt import chat_token_ids, completion_token_ids, refuse_unsupported, sampling_params
from helexa.neuron.registry import LoadedModel, Registry
from helexa.neuron.streaming import ClientGone, EventStream, read_body, unless_client_leaves
from helexa.neuron.text_work import TextWork
from helexa.wire import sse
from helexa.wire.chat import ChatRequest, parse_chat
from helexa.wire.completions import CompletionRequest, parse_completion
from helexa.wire.generation import USAGE_HEADER, encode

logger = logging.getLogger(__name__)
R = TypeVar("R", ChatRequest, CompletionRequest)


class Inference(ABC, Generic[R]):
    """An ASGI endpoint that generates. Raises HelexaError while the status can still be chosen."""

    route: str

    def __init__(self, registry: Registry, metrics: Metrics, config: NeuronSection, work: TextWork):
        self._registry = registry
        self._metrics = metrics
        self._config = config
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        record = Record()
        try:
            await self._serve(Request(scope, receive), send, record)
        except (ClientGone, ClientDisconnect, asyncio.CancelledError) as gone:
            record.outcome = "cancelled"
            if isinstance(gone, asyncio.CancelledError):
                raise
        except HelexaError as error:
            record.outcome = error.code
            raise
        except Exception:
            record.outcome = "internal_error"
            raise
        finally:
            self._account(record, scope.get("state", {}).get("request_id"))

    @abstractmethod
    def parse(self, body: bytes) -> R:
        """The request. Raises what is wrong with it."""

    @abstractmethod
    def prepare(self, engine: Engine, request: R) -> tuple[list[Job], Answers]:
        """What to generate and how to answer; runs in a thread, as long prompts take a while to tokenize."""

    async def _serve(self, http: Request, send: Send, record: Record) -> None:
        request = self.parse(await read_body(http, self._config.max_body_bytes))
        model = self._registry.get(request.model)
        assert model.engine is not None
        record.model = model.id
        record.jobs, answers = await self._work.run(self.prepare, model.engine, request)
        if request.stream:
            is_noted = USAGE_HEADER in http.headers
            events = self._events(model, record, answers, request.include_usage, is_noted)

            def failure(error: HelexaError) -> bytes:
                record.outcome = error.code
                return answers.failure(error)

            def sign_of_life() -> bytes:
                prefill = record.prefill()
                return sse.comment("prefill {}/{}".format(*prefill)) if prefill else sse.KEEP_ALIVE

            stream = EventStream(events, failure, self._config.keep_alive_s, sign_of_life)
            await stream(http.scope, http.receive, send)
        else:
            body = await unless_client_leaves(http.receive, self._whole(model, record, answers))
            await Response(body, media_type="application/json")(http.scope, http.receive, send)

    async def _events(
        self, model: LoadedModel, record: Record, answers: Answers, include_usage: bool, is_noted: bool
    ) -> AsyncGenerator[bytes, None]:
        async with (
            model.lease(len(record.jobs)) as engine,
            aclosing(run(engine, record, self._metrics)) as deltas,
        ):
            async for index, delta in deltas:
                yield answers.events(index, delta)
        usage = record.usage()
        note = sse.comment(encode(usage).decode()) if is_noted and not include_usage else b""
        yield note + answers.end(usage if include_usage else None)

    async def _whole(self, model: LoadedModel, record: Record, answers: Answers) -> bytes:
        async with (
            model.lease(len(record.jobs)) as engine,
            aclosing(run(engine, record, self._metrics)) as deltas,
        ):
            async for index, delta in deltas:
                answers.add(index, delta)
        return answers.whole(record.usage())

    def _account(self, record: Record, request_id: str | None) -> None:
        duration_s = time.monotonic() - record.started_s
        tokens = record.tokens()
        self._metrics.count_request(self.route, record.model, record.outcome, duration_s, tokens)
        first_s = record.first_token_s
        logger.info(
            "request",
            extra=fields(
                route=self.route,
                model=record.model or None,
                outcome=record.outcome,
                finish=",".join(sorted(set(record.finish_reasons.values()))) or None,
                **asdict(tokens),
                ttft_ms=round((first_s - record.started_s) * 1e3, 1) if first_s else None,
                duration_ms=round(duration_s * 1e3, 1),
                request_id=request_id,
            ),
        )


class ChatInference(Inference[ChatRequest]):
    """POST /v1/chat/completions"""

    route = "chat"

    def parse(self, body: bytes) -> ChatRequest:
        request = parse_chat(body)
        refuse_unsupported(request)
        return request

    def prepare(self, engine: Engine, request: ChatRequest) -> tuple[list[Job], Answers]:
        token_ids = chat_token_ids(engine, request)
        jobs = [Job(token_ids, sampling_params(request, choice)) for choice in range(request.num_choices)]
        return jobs, ChatAnswers(request.model, _tokenizer(engine), len(jobs))


class CompletionInference(Inference[CompletionRequest]):
    """POST /v1/completions"""

    route = "completions"

    def parse(self, body: bytes) -> CompletionRequest:
        return parse_completion(body)

    def prepare(self, engine: Engine, request: CompletionRequest) -> tuple[list[Job], Answers]:
        prompts = [completion_token_ids(engine, prompt) for prompt in request.prompts]
        jobs = [
            Job(token_ids, sampling_params(request, choice), prompt)
            for prompt, token_ids in enumerate(prompts)
            for choice in range(request.num_choices)
        ]
        tokenizer = _tokenizer(engine)
        texts = [
            prompt if isinstance(prompt, str) else tokenizer.decode(prompt) for prompt in request.prompts
        ]
        echoes = [texts[job.prompt] if request.echo else "" for job in jobs]
        return jobs, CompletionAnswers(request.model, tokenizer, len(jobs), echoes)


def _tokenizer(engine: Engine) -> Any:
    assert engine.tokenizer is not None  # or the prompt would have been refused
    return engine.tokenizer
