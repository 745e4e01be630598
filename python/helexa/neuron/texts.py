"""The routes that answer about texts without generating: POST /tokenize and /detokenize."""

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from helexa.engine.engine import Engine
from helexa.neuron.config import NeuronSection
from helexa.neuron.prompt import chat_token_ids, check_token_ids, counted_token_ids, require_tokenizer
from helexa.neuron.registry import Registry
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

    def __init__(self, registry: Registry, config: NeuronSection, work: TextWork):
        self._registry = registry
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
        engine = self._registry.get(request.model).engine
        assert engine is not None
        token_ids = await self._work.run(_token_ids, engine, request)
        return _json(TokenizeAnswer(len(token_ids), engine.max_context, token_ids))

    async def detokenize(self, http: Request) -> Response:
        request = parse_detokenize(await read_body(http, self._config.max_body_bytes))
        engine = self._registry.get(request.model).engine
        assert engine is not None
        check_token_ids(engine, request.tokens, "tokens")
        text = await self._work.run(require_tokenizer(engine, "tokens").decode, request.tokens)
        return _json(DetokenizeAnswer(text))


def _token_ids(engine: Engine, request: TokenizeRequest | ChatRequest) -> list[int]:
    if isinstance(request, ChatRequest):
        return chat_token_ids(engine, request, is_counted=True)
    return counted_token_ids(engine, request.prompt, request.add_special_tokens is not False)


def _json(answer: object) -> Response:
    return Response(encode(answer), media_type="application/json")
