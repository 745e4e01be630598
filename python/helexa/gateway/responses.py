"""OpenAI Responses at the gateway: requests that continue stored ones, and the routes of the store."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from helexa.errors import BadRequest, HelexaError, InvalidParameter, UnknownPreviousResponse, UnknownResponse
from helexa.gateway.auth import Keys
from helexa.gateway.dialects import CHAT_PATH, Asked, Dialect, Job, Refusal, refuse
from helexa.gateway.store import ResponseStore, StoredResponse
from helexa.wire.dialect import Translator
from helexa.wire.responses import (
    CountTranslator,
    ResponsesRequest,
    ResponseTranslator,
    listed,
    parse_responses,
    renamed,
    shortened,
)
from helexa.wire.responses.tools import Tools

Json = dict[str, Any]
PATH = "/v1/responses"
COUNT_PATH = PATH + "/input_tokens"
# What agents look for in the events of a stream, not in a status: they compact their conversation then.
TOLD_IN_STREAM = frozenset(("context_length_exceeded",))
MAX_LISTED = 100


def responses(keys: Keys, store: ResponseStore) -> Dialect:
    """The dialect, with what it keeps in `store`."""
    api = _Responses(keys, store)
    routes = (
        Route(PATH + "/{id}", api.retrieve, methods=["GET"]),
        Route(PATH + "/{id}", api.delete, methods=["DELETE"]),
        Route(PATH + "/{id}/input_items", api.input_items, methods=["GET"]),
        Route(PATH + "/{id}/cancel", api.cancel, methods=["POST"]),
    )
    generating = {PATH: api.create, COUNT_PATH: api.count}
    return Dialect("responses", (PATH,), generating, routes, _refuse)


def _refuse(error: HelexaError, request_id: str) -> Refusal:
    return refuse(renamed(error), request_id)


class _Responses:
    def __init__(self, keys: Keys, store: ResponseStore):
        self._keys = keys
        self._store = store

    async def create(self, asked: Asked) -> Job:
        request = parse_responses(asked.body)
        items, body, tools = await self._chat(request, asked.principal)
        made = ResponseTranslator(request, tools)
        translator: Translator = made
        if request.is_stored:
            translator = _Kept(made, request, items, self._store, asked.principal)
        told = TOLD_IN_STREAM if request.stream else frozenset()
        shorten = shortened if request.truncation == "auto" else None
        return Job(CHAT_PATH, request.model, body, request.stream is True, translator, told, shorten)

    async def count(self, asked: Asked) -> Job:
        request = parse_responses(asked.body)
        request.stream = None
        _, body, _ = await self._chat(request, asked.principal)
        return Job("/tokenize", request.model, body, translator=CountTranslator())

    async def _chat(self, request: ResponsesRequest, principal: str) -> tuple[list[Json], bytes, Tools]:
        """The items of the input, the canonical request, and its tools."""
        history = await self._history(request, principal)
        items = request.resolved(await self._referenced(request, principal))
        return items, *request.to_chat(items, history=history)

    async def retrieve(self, request: Request) -> Response:
        if request.query_params.get("stream", "false") == "true":
            message = "'stream' is true; a stored response is only given whole"
            raise InvalidParameter(message, param="stream")
        return Response((await self._stored(request)).body, media_type="application/json")

    async def delete(self, request: Request) -> Response:
        stored = await self._stored(request)
        await self._store.delete(stored.id, stored.principal)
        return JSONResponse({"id": stored.id, "object": "response", "deleted": True})

    async def cancel(self, request: Request) -> Response:
        stored = await self._stored(request)
        raise BadRequest(f"the response {stored.id} was not made in the background and cannot be cancelled")

    async def input_items(self, request: Request) -> Response:
        """All that the response was made from, with what it continued; the latest first unless asked."""
        stored = await self._stored(request)
        chain = await self._store.conversation(stored.id, stored.principal)
        items = [*_conversation(chain[:-1]), *_items(chain[-1])]
        return JSONResponse(_page(items, request.query_params))

    async def _stored(self, request: Request) -> StoredResponse:
        response_id: str = request.path_params["id"]
        found = await self._store.get(response_id, self._keys.check(request.headers).id)
        if found is None:
            message = f"no response with id {response_id!r:.80} is stored"
            raise UnknownResponse(message, param="response_id")
        return found

    async def _history(self, request: ResponsesRequest, principal: str) -> list[Json]:
        """The items of the responses that the request continues."""
        wanted = request.previous_response_id
        if wanted is None:
            return []
        chain = await self._store.conversation(wanted, principal)
        if chain:
            wanted = chain[0].previous_id
        if wanted is not None:
            message = f"Previous response with id {wanted!r:.80} not found."
            raise UnknownPreviousResponse(message, param="previous_response_id")
        return _conversation(chain)

    async def _referenced(self, request: ResponsesRequest, principal: str) -> dict[str, Json]:
        """The stored items that the input refers to, by id; those of output and of input."""
        found: dict[str, Json] = {}
        for item_id in request.references:
            if item_id in found:
                continue
            _, token, _ = (*item_id.split("_", 2), "", "")[:3]
            stored = await self._store.get(f"resp_{token}", principal)
            if stored is not None:
                found |= {item["id"]: item for item in _conversation([stored])}
        return found


class _Kept:
    """A translator whose response is stored before the client hears of its end."""

    def __init__(
        self,
        translator: ResponseTranslator,
        request: ResponsesRequest,
        items: Sequence[Json],
        store: ResponseStore,
        principal: str,
    ):
        self._translator = translator
        self._previous_id = request.previous_response_id
        self._items = items
        self._store = store
        self._principal = principal
        self.feed = translator.feed
        self.keep_alive = translator.keep_alive

    def finish(self) -> bytes:
        return self._stored(self._translator.finish())

    def failure(self, error: HelexaError) -> bytes:
        return self._stored(self._translator.failure(error))

    def whole(self, body: bytes) -> bytes:
        return self._stored(self._translator.whole(body))

    def _stored(self, told: bytes) -> bytes:
        response = self._translator.response
        items = msgspec.json.encode(listed(self._items, self._translator.token))
        self._store.put(
            StoredResponse(
                response["id"], self._principal, self._previous_id, msgspec.json.encode(response), items
            )
        )
        return told


def _items(stored: StoredResponse) -> list[Json]:
    items: list[Json] = msgspec.json.decode(stored.items)
    return items


def _conversation(chain: Sequence[StoredResponse]) -> list[Json]:
    """Input and output of each in turn."""
    items: list[Json] = []
    for stored in chain:
        items += _items(stored)
        items += msgspec.json.decode(stored.body)["output"]
    return items


def _page(items: list[Json], query: Mapping[str, str]) -> Json:
    """One page of a list as the API has it. Raises InvalidParameter for a wrong limit or place."""
    order, limit, after = query.get("order", "desc"), query.get("limit", "20"), query.get("after")
    if order not in ("asc", "desc"):
        raise InvalidParameter(f"'order' is {order!r:.80}; expected asc or desc", param="order")
    if not limit.isdecimal() or not 1 <= int(limit) <= MAX_LISTED:
        raise InvalidParameter(f"'limit' is {limit!r:.80}; expected 1 to {MAX_LISTED}", param="limit")
    listing = items if order == "asc" else items[::-1]
    if after is not None:
        place = next((index for index, item in enumerate(listing) if item["id"] == after), None)
        if place is None:
            raise InvalidParameter(f"'after' is {after!r:.80}, which is not in the list", param="after")
        listing = listing[place + 1 :]
    page = listing[: int(limit)]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": len(page) < len(listing),
    }
