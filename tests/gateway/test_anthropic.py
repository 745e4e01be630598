"""The official anthropic package against the gateway, before a neuron that plays a script."""

import asyncio
import json
from typing import Any

import anthropic
import pydantic
import pytest
from anthropic import beta_async_tool, beta_tool

from helexa.gateway.catalogue import ModelEntry
from helexa.gateway.config import AnthropicSection, AuthSection, GatewayConfig
from support.scripted_neuron import ScriptedNeuron, ToolUse, Turn

pytestmark = pytest.mark.timeout(60)
HELLO: Any = {
    "model": "scripted",
    "max_tokens": 1000,
    "messages": [{"role": "user", "content": "How many birds?"}],
}
TOOL: Any = {"name": "count", "input_schema": {"type": "object", "properties": {"kind": {"type": "string"}}}}
THINKING: Any = {"type": "enabled", "budget_tokens": 500}
CALL = Turn(
    text="I count them.", reasoning="Counting will do.", tool_calls=(ToolUse("count", {"kind": "tits"}),)
)


def client_of(site, **more):
    return anthropic.AsyncAnthropic(base_url=site.url, api_key="none", max_retries=0, **more)


@pytest.fixture
def script():
    return ScriptedNeuron()


async def test_a_message(make_site, script):
    script.turns = [Turn("Twelve.", stop := "They may be more.")]
    site = await make_site(script)
    async with client_of(site) as client:
        message = await client.messages.create(**HELLO, thinking=THINKING, system="Be short.")
    assert [block.type for block in message.content] == ["thinking", "text"]
    assert (message.content[0].thinking, message.content[1].text) == (stop, "Twelve.")
    assert (message.stop_reason, message.model, message.role) == ("end_turn", "scripted", "assistant")
    assert message._request_id.startswith("req_")
    assert script.requests[0]["thinking_budget"] == 500


async def test_the_stream_helper_collects_what_a_whole_answer_says(make_site, script):
    script.turns = [CALL, CALL]
    site = await make_site(script)
    asked = {**HELLO, "thinking": THINKING, "tools": [TOOL]}
    async with client_of(site) as client:
        whole = await client.messages.create(**asked)
        async with client.messages.stream(**asked) as stream:
            kinds = [event.type async for event in stream]
            streamed = await stream.get_final_message()
    assert {"thinking", "text", "input_json", "signature"} <= set(kinds)
    assert streamed.stop_reason == whole.stop_reason == "tool_use"
    assert streamed.content[2].input == whole.content[2].input == {"kind": "tits"}
    assert streamed.content[0] == whole.content[0]
    assert streamed.content[1].text == whole.content[1].text == "I count them."
    assert streamed.usage.output_tokens == whole.usage.output_tokens > 0
    assert streamed.usage.cache_read_input_tokens == script_tokens(whole) - 1


def script_tokens(message):
    usage = message.usage
    return usage.input_tokens + usage.cache_read_input_tokens + usage.cache_creation_input_tokens


async def test_the_count_of_tokens_is_the_usage_of_the_answer(make_site, script):
    site = await make_site(script)
    asked = {**HELLO, "system": "Be short.", "tools": [TOOL], "thinking": THINKING}
    async with client_of(site) as client:
        for _ in range(2):  # the second time the prompt is cached
            message = await client.messages.create(**asked)
            counted = await client.messages.count_tokens(
                **{name: value for name, value in asked.items() if name != "max_tokens"}
            )
            assert counted.input_tokens == script_tokens(message) > 0
    assert message.usage.cache_read_input_tokens > 0


async def test_the_tool_runner_goes_on_until_there_is_an_answer(make_site, script):
    script.turns = [CALL, Turn("There are twelve.", when="12 tits")]
    site = await make_site(script)

    @beta_async_tool
    async def count(kind: str) -> str:
        """Counts the birds of a kind."""
        return f"12 {kind}"

    async with client_of(site) as client:
        runner = client.beta.messages.tool_runner(**HELLO, tools=[count], thinking=THINKING)
        last = await runner.until_done()
    assert last.content[-1].text == "There are twelve."
    said = script.requests[1]["messages"]
    assert [message["role"] for message in said] == ["user", "assistant", "tool"]
    assert said[1]["reasoning_content"] == "Counting will do."
    assert said[2]["tool_call_id"] == said[1]["tool_calls"][0]["id"]


async def test_the_synchronous_client(make_site, script):
    script.turns = [Turn("One."), Turn("Two."), CALL, Turn("There are twelve.", when="12 tits")]
    site = await make_site(script)

    @beta_tool
    def count(kind: str) -> str:
        """Counts the birds of a kind."""
        return f"12 {kind}"

    def talk():
        with anthropic.Anthropic(base_url=site.url, api_key="none", max_retries=0) as client:
            whole = client.messages.create(**HELLO).content[0].text
            with client.messages.stream(**HELLO) as stream:
                streamed = "".join(stream.text_stream)
            last = client.beta.messages.tool_runner(**HELLO, tools=[count]).until_done()
            return whole, streamed, last.content[-1].text

    assert await asyncio.to_thread(talk) == ("One.", "Two.", "There are twelve.")


async def test_the_parse_helper(make_site, script):
    class Birds(pydantic.BaseModel):
        number: int

    script.turns = [Turn('{"number": 12}')]
    site = await make_site(script)
    async with client_of(site) as client:
        message = await client.messages.parse(**HELLO, output_format=Birds)
    assert message.parsed_output == Birds(number=12)
    form = script.requests[0]["response_format"]
    assert form["json_schema"]["schema"]["properties"]["number"]["type"] == "integer"


async def test_a_stop_sequence_is_told(make_site, script):
    script.turns = [Turn("One, two. END three")] * 2
    site = await make_site(script)
    asked = {**HELLO, "stop_sequences": ["END", "\n\nHuman:"]}
    async with client_of(site) as client:
        whole = await client.messages.create(**asked)
        async with client.messages.stream(**asked) as stream:
            streamed = await stream.get_final_message()
    for message in (whole, streamed):
        assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "END")
        assert message.content[0].text == "One, two. "


async def test_a_short_limit_is_told(make_site, script):
    script.turns = [Turn("One, two, three.")]
    site = await make_site(script)
    async with client_of(site) as client:
        message = await client.messages.create(**{**HELLO, "max_tokens": 1})
    assert (message.stop_reason, message.content[0].text) == ("max_tokens", "One, ")


async def test_a_long_prefill_is_no_silence(make_site, script, monkeypatch):
    monkeypatch.setattr("helexa.wire.anthropic.answer.QUIET_S", 0.1)
    monkeypatch.setattr("helexa.wire.anthropic.answer.LIFE_S", 0.1)
    script.turns, script.keep_alive_s = [Turn("Twelve.", "Hm.", prefill_s=0.5)], 0.05
    site = await make_site(script)
    async with client_of(site) as client, client.messages.stream(**HELLO) as stream:
        kinds = [event.type async for event in stream]
        message = await stream.get_final_message()
    assert kinds[:3] == ["message_start", "message_delta", "message_delta"]
    assert kinds[-1] == "message_stop"
    assert [block.type for block in message.content] == ["thinking", "text"]
    assert message.stop_reason == "end_turn"


async def test_a_load_is_waited_for(make_site, make_neuron, catalogue, monkeypatch):
    monkeypatch.setattr("helexa.gateway.proxy.KEEP_ALIVE_S", 0.05)
    monkeypatch.setattr("helexa.wire.anthropic.answer.QUIET_S", 0.1)
    site = await make_site(make_neuron(load_s=0.5), catalogue=catalogue(ModelEntry("cold")))
    async with client_of(site) as client, client.messages.stream(**{**HELLO, "model": "cold"}) as stream:
        assert "".join([text async for text in stream.text_stream]) == "Once upon a time"


BILLING = "x-anthropic-billing-header: cc_version=2.1.197.{}; cc_entrypoint=cli; cch={};"


@pytest.mark.parametrize("is_normalized", [True, False])
async def test_a_changed_billing_line_leaves_the_prompt_cached_unless_switched_off(
    make_site, script, is_normalized
):
    config = GatewayConfig(anthropic=AnthropicSection(normalize_billing_line=is_normalized))
    site = await make_site(script, config=config)
    usages = []
    async with client_of(site) as client:
        for varying in (("3f1", "a81c7"), ("90b", "5cc10")):
            line = {"type": "text", "text": BILLING.format(*varying)}
            system = [line, {"type": "text", "text": "Be short. " * 50}]
            usages.append((await client.messages.create(**HELLO, system=system)).usage)
    assert (usages[1].input_tokens < 10) is is_normalized


@pytest.mark.parametrize(
    ("asked", "error", "words"),
    [
        ({"model": "other"}, anthropic.NotFoundError, "other"),
        ({"extra_body": {"temperature": 7}}, anthropic.BadRequestError, "temperature"),
        ({"messages": []}, anthropic.BadRequestError, "messages"),
    ],
)
async def test_refusals_are_the_exceptions_that_programs_expect(make_site, script, asked, error, words):
    site = await make_site(script)
    async with client_of(site) as client:
        with pytest.raises(error, match=words) as caught:
            await client.messages.create(**{**HELLO, **asked})
    body = caught.value.body
    assert body["type"] == "error"
    assert body["request_id"] == caught.value.request_id


@pytest.mark.parametrize("stream", [True, False])
async def test_too_long_a_prompt_is_worded_so_that_agents_compact(make_site, stream):
    site = await make_site(ScriptedNeuron(context=10))
    async with client_of(site) as client:
        with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long: \d+ tokens > 10 maximum"):
            await client.messages.create(**HELLO, stream=stream)


async def test_a_stream_that_breaks_is_an_exception(make_site, script):
    script.turns = [Turn("One, two, three.", cut=True)]
    site = await make_site(script)
    async with client_of(site) as client:
        said = []

        async def listen():
            async with client.messages.stream(**HELLO) as stream:
                async for text in stream.text_stream:
                    said.append(text)

        with pytest.raises(anthropic.APIStatusError, match=r"ended its answer|closed the connection"):
            await listen()
    assert "".join(said) == "One, two, "


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "kind"),
    [
        ("GET", "/v1/messages", b"", 405, "invalid_request_error"),
        ("GET", "/v1/messages/batches", b"", 404, "not_found_error"),
        ("POST", "/v1/messages/batches", b"{}", 404, "not_found_error"),
        ("POST", "/v1/messages", b"{", 400, "invalid_request_error"),
        ("POST", "/v1/messages?beta=true", b"{}", 400, "invalid_request_error"),
        ("POST", "/v1/messages/count_tokens", b"[]", 400, "invalid_request_error"),
        ("POST", "/v1/messages", b" " * 5000, 413, "request_too_large"),
    ],
)
async def test_every_failure_has_anthropics_shape(make_site, script, method, path, body, status, kind):
    site = await make_site(script, max_body_bytes=4000)
    async with site.client.request(method, site.url + path, data=body) as response:
        told = await response.json()
        assert response.status == status
        assert response.headers["request-id"] == told["request_id"]
    assert (told["type"], told["error"]["type"]) == ("error", kind)


async def test_a_wrong_key_is_an_authentication_error(make_site, script):
    auth = AuthSection(keys=("a-long-key",), anonymous=False)
    site = await make_site(script, config=GatewayConfig(auth=auth))
    async with client_of(site) as client:
        with pytest.raises(anthropic.AuthenticationError):
            await client.messages.create(**HELLO)
    async with client_of(site).with_options(api_key="a-long-key") as client:
        assert (await client.messages.create(**HELLO)).content[0].text == "Done."


async def test_no_neuron_is_an_error_that_clients_try_again(make_site, script):
    site = await make_site(endpoints=("http://127.0.0.1:9",))
    async with client_of(site) as client:
        with pytest.raises(anthropic.InternalServerError) as caught:
            await client.messages.create(**HELLO)
    assert caught.value.status_code == 503
    assert caught.value.response.headers["retry-after"]


async def test_headers_and_queries_of_betas_are_tolerated(make_site, script):
    site = await make_site(script)
    headers = {"anthropic-beta": "effort-2025-11-24,other-2026-01-01", "anthropic-version": "2023-06-01"}
    body = json.dumps({**HELLO, "something_new": {"a": 1}})
    url = site.url + "/v1/messages?beta=true"
    async with site.client.post(url, data=body, headers=headers) as response:
        assert response.status == 200
    async with site.client.head(site.url + "/") as response:
        assert response.status == 200


async def test_the_models_are_listed(make_site, script):
    site = await make_site(script)
    async with client_of(site) as client:
        assert [model.id async for model in client.models.list()] == ["scripted"]
        assert (await client.models.retrieve("scripted")).id == "scripted"
