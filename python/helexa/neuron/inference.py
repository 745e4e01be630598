"""The generating routes: from body to seat to stream, with one record of what happened to each request."""

import logging
from abc import abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Generic, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Send

from helexa.engine.engine import Engine
from helexa.engine.stream import Delta
from helexa.errors import HelexaError, InvalidParameter
from helexa.neuron.answers import Answers, ChatAnswers
from helexa.neuron.caller import Caller, caller_of, turn_owner
from helexa.neuron.chat_prompt import ChatPrompts
from helexa.neuron.completion_answers import CompletionAnswers, Echo
from helexa.neuron.config import NeuronSection
from helexa.neuron.endpoint import Endpoint
from helexa.neuron.generation import Job, Record, run
from helexa.neuron.message import message_reader
from helexa.neuron.metrics import Metrics
from helexa.neuron.prompt import completion_token_ids, require_tokenizer
from helexa.neuron.registry import LoadedModel, Registry
from helexa.neuron.sampling import grammar_of, refuse_unsupported, sampling_params, thinking_of
from helexa.neuron.streaming import EventStream, read_body, unless_client_leaves
from helexa.neuron.text_work import TextWork
from helexa.wire import sse
from helexa.wire.chat import ChatRequest, parse_chat
from helexa.wire.completions import CompletionRequest, parse_completion
from helexa.wire.generation import USAGE_HEADER, encode

logger = logging.getLogger(__name__)
SHORT_BYTES = 4096  # of a body whose texts take less time than it takes to hand them to a thread and back
R = TypeVar("R", ChatRequest, CompletionRequest)


async def _nothing(_: Engine) -> None:
    pass


def _done() -> None:
    pass


@dataclass(frozen=True)
class Plan:
    """What a request comes to; `begin` runs before the first token, `finished` after the last one of all."""

    jobs: list[Job]
    answers: Answers
    begin: Callable[[Engine], Awaitable[None]] = _nothing
    finished: Callable[[], None] = _done

    async def check(self, engine: Engine) -> None:
        """Raises InvalidParameter for what the engine would refuse, while that can still be a status."""
        params = self.jobs[0].params
        if params is not None:
            params.check_vocabulary(engine.config.vocab_size)
        if params is None or params.grammar is None:
            return
        try:
            await engine.check_grammar(params.grammar)
        except InvalidParameter as error:
            message = f"'{params.grammar.param}' is no use: {error.message}"
            raise InvalidParameter(message, param=error.param) from None


class Inference(Endpoint, Generic[R]):
    """An endpoint that generates."""

    @abstractmethod
    def parse(self, body: bytes) -> R:
        """The request. Raises what is wrong with it."""

    @abstractmethod
    def prepare(self, model: LoadedModel, request: R, caller: Caller) -> Plan:
        """What to generate and how to answer; of long bodies in a thread, as tokenizing takes a while."""

    async def _serve(self, http: Request, send: Send, record: Record) -> None:
        body = await read_body(http, self._config.max_body_bytes)
        await unless_client_leaves(http.receive, self._answer(http, send, record, body))

    async def _answer(self, http: Request, send: Send, record: Record, body: bytes) -> None:
        request = self.parse(body)
        model = self._registry.get(request.model)
        assert model.engine is not None
        record.model = model.id
        caller = caller_of(http)
        model.check_admission(caller.principal, caller.priority)
        plan = await self._plan(model, request, caller, is_short=len(body) <= SHORT_BYTES)
        record.jobs = plan.jobs
        if request.stream:
            is_noted = USAGE_HEADER in http.headers
            events = self._events(model, record, plan, caller, request.include_usage, is_noted)

            def failure(error: HelexaError) -> bytes:
                record.outcome = error.code
                return plan.answers.failure(error)

            def sign_of_life() -> bytes:
                prefill = record.prefill()
                return prefill.encode() if prefill else sse.KEEP_ALIVE

            await EventStream(events, failure, self._config.keep_alive_s, sign_of_life).send_all(send)
        else:
            whole = await self._whole(model, record, plan, caller)
            await Response(whole, media_type="application/json")(http.scope, http.receive, send)

    async def _plan(self, model: LoadedModel, request: R, caller: Caller, *, is_short: bool) -> Plan:
        assert model.engine is not None
        if is_short:
            plan = self.prepare(model, request, caller)
        else:
            plan = await self._work.run(self.prepare, model, request, caller)
        await plan.check(model.engine)
        return plan

    async def _events(
        self,
        model: LoadedModel,
        record: Record,
        plan: Plan,
        caller: Caller,
        include_usage: bool,
        is_noted: bool,
    ) -> AsyncGenerator[bytes, None]:
        answers = plan.answers
        async with aclosing(self._deltas(model, record, plan, caller)) as deltas:
            async for index, delta in deltas:
                yield answers.events(index, delta)
        plan.finished()
        usage = record.usage()
        note = sse.comment(encode(usage).decode()) if is_noted and not include_usage else b""
        yield note + answers.end(usage if include_usage else None)

    async def _whole(self, model: LoadedModel, record: Record, plan: Plan, caller: Caller) -> bytes:
        async with aclosing(self._deltas(model, record, plan, caller)) as deltas:
            async for index, delta in deltas:
                plan.answers.add(index, delta)
        plan.finished()
        return plan.answers.whole(record.usage())

    async def _deltas(
        self, model: LoadedModel, record: Record, plan: Plan, caller: Caller
    ) -> AsyncGenerator[tuple[int, Delta], None]:
        """The deltas of all choices, once there is a seat for them."""
        assert model.engine is not None
        seat = model.lease(
            len(record.jobs),
            principal=caller.principal,
            priority=caller.priority,
            kv_tokens=record.kv_tokens(model.engine),
        )
        async with seat as engine:
            await plan.begin(engine)
            async with aclosing(run(engine, record, self._metrics)) as deltas:
                async for index, delta in deltas:
                    yield index, delta


class ChatInference(Inference[ChatRequest]):
    """POST /v1/chat/completions"""

    route = "chat"

    def __init__(
        self,
        registry: Registry,
        metrics: Metrics,
        config: NeuronSection,
        work: TextWork,
        prompts: ChatPrompts,
    ):
        super().__init__(registry, metrics, config, work)
        self._prompts = prompts

    def parse(self, body: bytes) -> ChatRequest:
        request = parse_chat(body)
        refuse_unsupported(request)
        return request

    def prepare(self, model: LoadedModel, request: ChatRequest, caller: Caller) -> Plan:
        engine = model.engine
        assert engine is not None
        grammar = grammar_of(engine, request)
        prompt = self._prompts.make(engine, request, turn_owner(model, caller))
        readers = [message_reader(engine, request, prompt.tail) for _ in range(request.num_choices)]
        thinking = thinking_of(engine, request, readers[0].is_in_reasoning, len(prompt.token_ids))
        jobs = [
            Job(
                prompt.token_ids,
                sampling_params(request, choice, grammar=grammar, thinking=thinking),
                priority=caller.priority,
                namespace=self._registry.namespace(caller.principal),
            )
            for choice in range(request.num_choices)
        ]
        answers = ChatAnswers(request.model, require_tokenizer(engine, "messages"), readers)

        def finished() -> None:
            for reader in readers:
                if reader.is_faithful:
                    self._prompts.keep(prompt, reader.message(), reader.token_ids)

        return Plan(jobs, answers, finished=finished)


class CompletionInference(Inference[CompletionRequest]):
    """POST /v1/completions"""

    route = "completions"

    def parse(self, body: bytes) -> CompletionRequest:
        return parse_completion(body)

    def prepare(self, model: LoadedModel, request: CompletionRequest, caller: Caller) -> Plan:
        engine = model.engine
        assert engine is not None
        prompts = [completion_token_ids(engine, prompt) for prompt in request.prompts]
        jobs = [
            Job(
                token_ids,
                None if request.max_tokens == 0 else sampling_params(request, choice),
                prompt,
                caller.priority,
                self._registry.namespace(caller.principal),
            )
            for prompt, token_ids in enumerate(prompts)
            for choice in range(request.num_choices)
        ]
        tokenizer = require_tokenizer(engine, "prompt")
        if not request.echo:
            return Plan(jobs, CompletionAnswers(request.model, tokenizer, [Echo()] * len(jobs)))
        echoes = [
            Echo(prompt if isinstance(prompt, str) else tokenizer.decode(prompt))
            for prompt in request.prompts
        ]
        answers = CompletionAnswers(request.model, tokenizer, [echoes[job.prompt] for job in jobs])

        async def begin(engine: Engine) -> None:
            for echo, token_ids in zip(echoes, prompts, strict=True):
                assert request.logprobs is not None
                echo.logprobs = await engine.prompt_logprobs(
                    token_ids, request.logprobs, priority=caller.priority
                )
                echo.token_ids = token_ids

        return Plan(jobs, answers, _nothing if request.logprobs is None else begin)
