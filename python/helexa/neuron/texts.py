"""The routes that answer about texts without generating: POST /tokenize and /detokenize."""

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from helexa.neuron.caller import Caller, caller_of, turn_owner
from helexa.neuron.chat_prompt import ChatPrompts
from helexa.neuron.config import NeuronSection
from helexa.neuron.prompt import check_token_ids, counted_token_ids, require_tokenizer
from helexa.neuron.registry import LoadedModel, Registry
from helexa.neuron.streaming import read_body
from helexa.neuron.text_work import TextWork
from helexa.wire.chat import ChatRequest
from helexa.wire.generation import encode
from helexa.wire.tokenize import (
    DetokenizeAnswer,
    TokenizeAnswer,
    TokenizeRequest,
    parse_detokenize,
    parse_tokenize,
)


class TextRoutes:
    """Counts as the generating routes count: the prompt is made by the same code."""

    def __init__(self, registry: Registry, config: NeuronSection, work: TextWork, prompts: ChatPrompts):
        self._registry = registry
        self._prompts = prompts
        self._config = config
        self._work = work

    @property
    def routes(self) -> list[Route]:
        return [
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
        ]

    async def tokenize(self, http: Request) -> Response:
        request = parse_tokenize(await read_body(http, self._config.max_body_bytes))
        model = self._registry.get(request.model)
        engine = model.engine
        assert engine is not None
        token_ids = await self._work.run(self._token_ids, model, request, caller_of(http))
        return _json(TokenizeAnswer(len(token_ids), engine.max_context, token_ids))

    async def detokenize(self, http: Request) -> Response:
        request = parse_detokenize(await read_body(http, self._config.max_body_bytes))
        engine = self._registry.get(request.model).engine
        assert engine is not None
        check_token_ids(engine, request.tokens, "tokens")
        text = await self._work.run(require_tokenizer(engine, "tokens").decode, request.tokens)
        return _json(DetokenizeAnswer(text))

    def _token_ids(
        self, model: LoadedModel, request: TokenizeRequest | ChatRequest, caller: Caller
    ) -> list[int]:
        assert model.engine is not None
        if isinstance(request, ChatRequest):
            owner = turn_owner(model, caller)
            return self._prompts.make(model.engine, request, owner, is_counted=True).token_ids
        return counted_token_ids(model.engine, request.prompt, request.add_special_tokens is not False)


def _json(answer: object) -> Response:
    return Response(encode(answer), media_type="application/json")
