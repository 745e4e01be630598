"""The Responses API by the openai package, through a gateway, against a neuron that plays a script."""

import asyncio
import json

import openai
import pytest
from pydantic import BaseModel

from helexa.errors import UnknownResponse
from helexa.gateway.config import AuthSection, GatewayConfig, StoreSection
from support.scripted_neuron import ScriptedNeuron, ToolUse, Turn

pytestmark = pytest.mark.timeout(120)

WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "The weather of a town.",
    "parameters": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
    "strict": False,
}


class Town(BaseModel):
    name: str
    people: int


@pytest.fixture
async def make_client(make_site):
    """`await make_client(turn, …, context=…)`: an SDK client, the neuron behind it and the site."""
    clients = []

    async def make(*turns, config=None, **neuron_fields):
        neuron = ScriptedNeuron(list(turns), **neuron_fields)
        site = await make_site(neuron, config=config)
        client = openai.AsyncOpenAI(base_url=site.url + "/v1", api_key="unused", max_retries=0)
        clients.append(client)
        return client, neuron, site

    yield make
    for client in clients:
        await client.close()


async def test_create_gives_text_and_usage(make_client):
    client, neuron, _ = await make_client(Turn("Blue."))
    response = await client.responses.create(
        model="scripted", input="Which colour?", instructions="Be brief."
    )
    assert response.output_text == "Blue."
    assert response.status == "completed"
    assert response.usage.input_tokens == -(-len(rendered(neuron.requests[0])) // 4)
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    assert [message["role"] for message in neuron.requests[0]["messages"]] == ["system", "user"]


async def test_the_stream_helper_follows_reasoning_text_and_calls(make_client):
    client, _, _ = await make_client(
        Turn("Let me look.", reasoning="Rome, then.", tool_calls=(ToolUse("weather", {"town": "Rome"}),))
    )
    seen = []
    async with client.responses.stream(
        model="scripted", input="How is it in Rome?", tools=[WEATHER], reasoning={"summary": "auto"}
    ) as stream:
        async for event in stream:
            seen.append(event.type)
        final = await stream.get_final_response()
    assert final.output_text == "Let me look."
    reasoning, message, call = final.output
    assert reasoning.summary[0].text == "Rome, then."
    assert message.content[0].text == "Let me look."
    assert call.parsed_arguments == {"town": "Rome"} or json.loads(call.arguments) == {"town": "Rome"}
    assert seen[0] == "response.created"
    assert seen[-1] == "response.completed"
    assert "response.function_call_arguments.delta" in seen


async def test_parse_gives_an_object_and_the_schema_reaches_the_neuron(make_client):
    client, neuron, _ = await make_client(Turn('{"name": "Rome", "people": 3}'))
    response = await client.responses.parse(model="scripted", input="A town?", text_format=Town)
    assert response.output_parsed == Town(name="Rome", people=3)
    wanted = neuron.requests[0]["response_format"]["json_schema"]
    assert (wanted["name"], wanted["strict"]) == ("Town", True)
    assert set(wanted["schema"]["properties"]) == {"name", "people"}


async def test_a_tool_loop_continues_by_id_with_reasoning_and_calls(make_client):
    client, neuron, _ = await make_client(
        Turn("", reasoning="I must look.", tool_calls=(ToolUse("weather", {"town": "Rome"}),)), Turn("Sun.")
    )
    first = await client.responses.create(model="scripted", input="How is it in Rome?", tools=[WEATHER])
    call = first.output[-1]
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "sun"}
    second = await client.responses.create(
        model="scripted", input=[output], previous_response_id=first.id, tools=[WEATHER]
    )
    assert second.output_text == "Sun."
    assert second.previous_response_id == first.id
    user, assistant, tool = neuron.requests[1]["messages"]
    assert user == {"role": "user", "content": "How is it in Rome?"}
    assert assistant["reasoning_content"] == "I must look."
    assert assistant["tool_calls"][0]["function"]["name"] == "weather"
    assert tool == {"role": "tool", "tool_call_id": call.call_id, "content": "sun"}
    assert second.usage.input_tokens_details.cached_tokens > 0


async def test_a_streamed_response_can_be_continued_as_soon_as_it_has_ended(make_client):
    client, neuron, _ = await make_client(Turn("One."), Turn("Two."))
    async with client.responses.stream(model="scripted", input="Count.") as stream:
        first = await stream.get_final_response()
    async with client.responses.stream(
        model="scripted", input="Go on.", previous_response_id=first.id
    ) as stream:
        second = await stream.get_final_response()
    assert second.output_text == "Two."
    said = [message["content"] for message in neuron.requests[1]["messages"]]
    assert said == ["Count.", "One.", "Go on."]


async def test_instructions_are_not_carried_over(make_client):
    client, neuron, _ = await make_client(Turn("One."), Turn("Two."))
    first = await client.responses.create(model="scripted", input="Count.", instructions="In English.")
    await client.responses.create(model="scripted", input="Go on.", previous_response_id=first.id)
    assert "In English." not in json.dumps(neuron.requests[1])


async def test_items_can_be_referred_to_by_id(make_client):
    client, neuron, _ = await make_client(Turn("One."), Turn("Two."))
    first = await client.responses.create(model="scripted", input="Count.")
    reference = {"type": "item_reference", "id": first.output[0].id}
    await client.responses.create(model="scripted", input=[reference, {"role": "user", "content": "Go on."}])
    assert [message["content"] for message in neuron.requests[1]["messages"]] == ["One.", "Go on."]


async def test_stored_responses_can_be_looked_at_and_deleted(make_client):
    client, _, _ = await make_client(Turn("One."), Turn("Two."))
    first = await client.responses.create(model="scripted", input="Count.", metadata={"a": "b"})
    second = await client.responses.create(
        model="scripted", input=[{"role": "user", "content": "Go on."}], previous_response_id=first.id
    )
    assert await client.responses.retrieve(first.id) == first
    items = [item async for item in client.responses.input_items.list(second.id, order="asc", limit=2)]
    said = [item.content[0].text for item in items]
    assert said == ["Count.", "One.", "Go on."]
    latest = await client.responses.input_items.list(second.id, limit=1)
    assert (latest.data[0].content[0].text, latest.has_more) == ("Go on.", True)
    await client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError) as caught:
        await client.responses.retrieve(first.id)
    assert caught.value.code == UnknownResponse.code
    with pytest.raises(openai.BadRequestError, match=f"{first.id}.* not found") as caught:
        await client.responses.create(model="scripted", input="x", previous_response_id=second.id)
    assert caught.value.code == "previous_response_not_found"


async def test_each_key_sees_only_its_own_responses(make_client):
    config = GatewayConfig(auth=AuthSection(keys=("one-of-two-keys", "two-of-two-keys")))
    client, _, _ = await make_client(Turn("One."), config=config)
    one = client.with_options(api_key="one-of-two-keys")
    response = await one.responses.create(model="scripted", input="Count.")
    assert (await one.responses.retrieve(response.id)).output_text == "One."
    for other in (client.with_options(api_key="two-of-two-keys"), client):
        for call in (other.responses.retrieve, other.responses.delete, other.responses.input_items.list):
            with pytest.raises(openai.NotFoundError):
                await call(response.id)
        with pytest.raises(openai.BadRequestError, match="not found"):
            await other.responses.create(model="scripted", input="x", previous_response_id=response.id)
        reference = [{"type": "item_reference", "id": response.output[0].id}]
        with pytest.raises(openai.BadRequestError, match="not stored"):
            await other.responses.create(model="scripted", input=reference)


async def test_a_conversation_goes_on_at_the_gateway_that_comes_after(make_client, tmp_path):
    config = GatewayConfig(store=StoreSection(path=str(tmp_path / "responses.db")))
    client, _, site = await make_client(Turn("One."), config=config)
    first = await client.responses.create(model="scripted", input="Count.")
    assert await site.gateway.store.get(first.id, "") is not None  # its thread has written it
    client, neuron, _ = await make_client(Turn("Two."), config=config)
    await client.responses.create(model="scripted", input="Go on.", previous_response_id=first.id)
    assert [message["content"] for message in neuron.requests[0]["messages"]] == ["Count.", "One.", "Go on."]


async def test_what_shall_not_be_stored_is_not(make_client):
    client, _, _ = await make_client(Turn("One."))
    response = await client.responses.create(model="scripted", input="Count.", store=False)
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(response.id)


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda client, kept: client.responses.cancel(kept), "cannot be cancelled"),
        (lambda client, kept: client.responses.retrieve(kept, stream=True), "only given whole"),
        (lambda client, kept: client.responses.input_items.list(kept, limit=0), "'limit' is '0'"),
        (lambda client, kept: client.responses.input_items.list(kept, order="up"), "'order' is 'up'"),
        (lambda client, kept: client.responses.input_items.list(kept, after="x"), "'after' is 'x'"),
    ],
)
async def test_what_a_stored_response_cannot_do_is_said(make_client, call, complaint):
    client, _, _ = await make_client(Turn("One."))
    kept = (await client.responses.create(model="scripted", input="Count.")).id
    with pytest.raises(openai.BadRequestError, match=complaint):
        await call(client, kept)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/responses", 405),
        ("POST", "/v1/responses/resp_1", 405),
        ("GET", "/v1/responses/resp_1/nothing", 404),
        ("GET", "/v1/responses/resp_1", 404),
        ("POST", "/v1/responses/compact", 405),
        ("GET", "/v1/responses/a%2Fb", 404),
    ],
)
async def test_what_is_not_there_is_said_in_openais_envelope(make_client, method, path, status):
    _, _, site = await make_client()
    async with site.client.request(method, site.url + path) as answer:
        assert answer.status == status
        assert set((await answer.json())["error"]) == {"message", "type", "code", "param"}


async def test_a_wrong_request_is_told_in_openais_envelope(make_client):
    client, neuron, _ = await make_client()
    with pytest.raises(openai.BadRequestError) as caught:
        await client.responses.create(model="scripted", input="x", tools=[{"type": "file_search"}])
    assert caught.value.param == "tools[0]"
    assert caught.value.code == "invalid_parameter"
    with pytest.raises(openai.NotFoundError) as caught:
        await client.responses.create(model="nobody", input="x")
    assert caught.value.code == "model_not_found"
    assert neuron.requests == []


async def test_a_refusal_of_the_neuron_names_the_clients_field(make_client):
    wrong = {"message": "'max_completion_tokens' is 9; too many", "param": "max_completion_tokens"}
    client, _, _ = await make_client(
        Turn(error=(400, {**wrong, "type": "invalid_request_error", "code": "invalid_parameter"}))
    )
    with pytest.raises(openai.BadRequestError, match="'max_output_tokens' is 9") as caught:
        await client.responses.create(model="scripted", input="x", max_output_tokens=9)
    assert caught.value.param == "max_output_tokens"


async def test_a_context_that_is_too_long_is_a_status_or_an_event(make_client):
    client, _, _ = await make_client(context=100)
    with pytest.raises(openai.BadRequestError) as caught:
        await client.responses.create(model="scripted", input="x" * 1000)
    assert caught.value.code == "context_length_exceeded"
    stream = await client.responses.create(model="scripted", input="x" * 1000, stream=True)
    events = [event async for event in stream]
    assert [event.type for event in events] == ["response.created", "response.in_progress", "response.failed"]
    assert events[-1].response.error.code == "context_length_exceeded"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_conversation_that_is_too_long_loses_its_beginning_where_that_is_asked_for(
    make_client, eventually, stream
):
    client, neuron, site = await make_client(Turn("Fine."), context=300)
    said = [{"role": "user", "content": f"{n} " * 40} for n in range(20)]
    asked = {"model": "scripted", "input": said, "instructions": "Be brief.", "max_output_tokens": 20}
    with pytest.raises(openai.BadRequestError, match="context is 300"):
        await client.responses.create(**asked)
    refused = len(neuron.headers)
    if stream:
        async with client.responses.stream(**asked, truncation="auto") as events:
            response = await events.get_final_response()
    else:
        response = await client.responses.create(**asked, truncation="auto")
    assert response.output_text == "Fine."
    assert len(neuron.headers) > refused + 1
    left = neuron.requests[-1]["messages"]
    assert left[0]["content"] == "Be brief."
    assert [message["content"] for message in left[1:]] == [
        item["content"] for item in said[-len(left) + 1 :]
    ]
    assert len(left) > 3
    await eventually(lambda: not any(sum(node.active.values()) for node in site.gateway.fleet.nodes.values()))


async def test_what_cannot_be_shortened_is_refused_after_all(make_client):
    client, _, _ = await make_client(context=100)
    with pytest.raises(openai.BadRequestError) as caught:
        await client.responses.create(model="scripted", input="x" * 1000, truncation="auto")
    assert caught.value.code == "context_length_exceeded"


async def test_input_tokens_are_those_of_the_usage(make_client):
    client, _, _ = await make_client(Turn("One."), Turn("Two."))
    first = await client.responses.create(model="scripted", input="Count.")
    asked = {"model": "scripted", "input": "Go on.", "previous_response_id": first.id, "tools": [WEATHER]}
    counted = await client.responses.input_tokens.count(**asked)
    assert counted.input_tokens == (await client.responses.create(**asked)).usage.input_tokens


async def test_an_answer_at_its_limit_is_incomplete(make_client):
    client, _, _ = await make_client(Turn("A long answer that does not end."))
    response = await client.responses.create(model="scripted", input="x", max_output_tokens=2)
    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"


async def test_a_stream_that_breaks_off_has_failed(make_client):
    client, _, _ = await make_client(Turn("This is cut.", cut=True))
    stream = await client.responses.create(model="scripted", input="x", stream=True)
    events = [event async for event in stream]
    assert events[-1].type == "response.failed"
    assert events[-1].response.error.code == "server_error"
    kept = await client.responses.retrieve(events[-1].response.id)
    assert kept.status == "failed"


async def test_a_long_prefill_shows_signs_of_life(make_client):
    client, _, site = await make_client(Turn("There.", prefill_s=0.4), keep_alive_s=0.02)
    body = {"model": "scripted", "input": "x", "stream": True}
    async with site.client.post(site.url + "/v1/responses", json=body) as answer:
        text = await answer.text()
    assert text.startswith("event: response.created\n")
    assert text.count("\n: prefill ") > 5
    async with client.responses.stream(model="scripted", input="x") as stream:
        assert (await stream.get_final_response()).output_text == "Done."


async def test_the_stream_helper_bears_repeated_progress(make_client):
    client, _, _ = await make_client(Turn("There.", prefill_s=0.5), keep_alive_s=0.01)
    seen = []
    async with client.responses.stream(model="scripted", input="x") as stream:
        async for event in stream:
            seen.append(event.type)
        assert (await stream.get_final_response()).output_text == "There."
    assert seen.count("response.in_progress") > 1


async def test_a_client_that_leaves_leaves_nothing_in_the_store(make_client, eventually):
    client, neuron, site = await make_client(Turn("word " * 200, pause_s=0.02))
    stream = await client.responses.create(model="scripted", input="x", stream=True)
    first = await anext(aiter(stream))
    await stream.close()
    await eventually(lambda: len(site.gateway.relays) == 0)
    await asyncio.sleep(0)
    assert await site.gateway.store.get(first.response.id, "") is None
    assert len(neuron.requests) == 1


def rendered(asked):
    parts = [*(asked.get("tools") or ()), *asked["messages"], ""]
    return "\n".join(json.dumps(part, ensure_ascii=False) for part in parts)
