"""POST /v1/embeddings: each input as one vector, computed one after the other under one seat."""

import base64

import numpy as np
import numpy.typing as npt
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Send

from helexa.engine.engine import Engine
from helexa.engine.stream import Usage
from helexa.errors import InvalidParameter
from helexa.neuron.caller import Caller, caller_of
from helexa.neuron.endpoint import Endpoint
from helexa.neuron.generation import Job, Record
from helexa.neuron.prompt import completion_token_ids
from helexa.neuron.registry import LoadedModel
from helexa.neuron.streaming import read_body, unless_client_leaves
from helexa.wire.embeddings import (
    Embedding,
    EmbeddingAnswer,
    EmbeddingRequest,
    EmbeddingUsage,
    parse_embedding,
)
from helexa.wire.generation import encode


class Embeddings(Endpoint):
    """The endpoint."""

    route = "embeddings"

    async def _serve(self, http: Request, send: Send, record: Record) -> None:
        request = parse_embedding(await read_body(http, self._config.max_body_bytes))
        model = self._registry.get(request.model)
        assert model.engine is not None
        record.model = model.id
        size = model.engine.config.hidden_size
        if request.dimensions is not None and request.dimensions > size:
            message = f"'dimensions' is {request.dimensions}; this model's vectors have {size}"
            raise InvalidParameter(message, param="dimensions")
        caller = caller_of(http)
        model.check_admission(caller.principal, caller.priority)
        jobs = self._work.run(_jobs, model.engine, request)
        record.jobs = await unless_client_leaves(http.receive, jobs)
        work = self._embed(model, request, record, caller)
        body = await unless_client_leaves(http.receive, work)
        await Response(body, media_type="application/json")(http.scope, http.receive, send)

    async def _embed(
        self, model: LoadedModel, request: EmbeddingRequest, record: Record, caller: Caller
    ) -> bytes:
        assert model.engine is not None
        longest = max(len(job.token_ids) for job in record.jobs)
        kv_tokens = min(longest, model.engine.stats().kv_tokens_total)
        data = []
        async with model.lease(
            1, principal=caller.principal, priority=caller.priority, kv_tokens=kv_tokens
        ) as engine:
            for index, job in enumerate(record.jobs):
                vector = await engine.embed(job.token_ids, request.pooling, priority=caller.priority)
                data.append(Embedding(index=index, embedding=_written(vector, request)))
                length = len(job.token_ids)
                record.usages[index] = Usage(length, 0, 0, length, 0.0, 0.0, 0.0)
        count = sum(len(job.token_ids) for job in record.jobs)
        return encode(EmbeddingAnswer(data=data, model=request.model, usage=EmbeddingUsage(count, count)))


def _jobs(engine: Engine, request: EmbeddingRequest) -> list[Job]:
    return [
        Job(completion_token_ids(engine, text, "input"), None, prompt)
        for prompt, text in enumerate(request.inputs)
    ]


def _written(vector: npt.NDArray[np.float32], request: EmbeddingRequest) -> list[float] | str:
    """The vector as the request wants it; shortened, it gets the length 1 again."""
    if request.dimensions is not None and request.dimensions < len(vector):
        vector = vector[: request.dimensions]
        vector = vector / max(float(np.linalg.norm(vector)), 1e-12)
    if request.encoding_format == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return [float(value) for value in vector]
