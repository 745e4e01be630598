"""The official openai package against the gateway."""

import asyncio

import openai
import pytest

from helexa.gateway.catalogue import ModelEntry

pytestmark = pytest.mark.timeout(60)
HELLO = [{"role": "user", "content": "hi"}]


async def test_chat(make_site, neuron):
    site = await make_site(neuron)
    async with openai.AsyncOpenAI(base_url=site.url + "/v1", api_key="none") as client:
        answer = await client.chat.completions.create(model="tiny", messages=HELLO)
    assert answer.choices[0].message.content == "Once upon a time"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    assert answer._request_id.startswith("req_")


async def test_chat_stream(make_site, neuron):
    site = await make_site(neuron)
    async with openai.AsyncOpenAI(base_url=site.url + "/v1", api_key="none") as client:
        stream = await client.chat.completions.create(model="tiny", messages=HELLO, stream=True)
        chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Once upon a time"
    assert chunks[-1].usage.completion_tokens == 4


async def test_a_cold_stream_with_comments_is_understood(make_site, make_neuron, catalogue, monkeypatch):
    monkeypatch.setattr("helexa.gateway.proxy.KEEP_ALIVE_S", 0.05)
    site = await make_site(make_neuron(load_s=0.3), catalogue=catalogue(ModelEntry("cold")))
    async with openai.AsyncOpenAI(base_url=site.url + "/v1", api_key="none") as client:
        stream = await client.completions.create(model="cold", prompt="hi", stream=True)
        assert (
            "".join([chunk.choices[0].text async for chunk in stream if chunk.choices]) == "Once upon a time"
        )


async def test_the_synchronous_client(make_site, neuron):
    site = await make_site(neuron)

    def talk():
        with openai.OpenAI(base_url=site.url + "/v1", api_key="none") as client:
            answer = client.completions.create(model="tiny", prompt="hi")
            chunks = list(client.chat.completions.create(model="tiny", messages=HELLO, stream=True))
            return answer.choices[0].text, len(chunks), [model.id for model in client.models.list()]

    assert await asyncio.to_thread(talk) == ("Once upon a time", 6, ["tiny"])


async def test_models(make_site, neuron):
    site = await make_site(neuron)
    async with openai.AsyncOpenAI(base_url=site.url + "/v1", api_key="none") as client:
        assert (await client.models.retrieve("tiny")).owned_by == "helexa"
        with pytest.raises(openai.NotFoundError) as caught:
            await client.models.retrieve("other")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, openai.BadRequestError),
        (429, openai.RateLimitError),
        (503, openai.InternalServerError),
    ],
)
async def test_refusals_are_the_exceptions_that_programs_expect(make_site, make_neuron, status, error):
    refusal = (
        status,
        {"message": "no", "type": "t", "code": "some_code", "param": "p"},
        {"retry-after": "3"},
    )
    site = await make_site(make_neuron("tiny", refusal=refusal))
    async with openai.AsyncOpenAI(base_url=site.url + "/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(error) as caught:
            await client.chat.completions.create(model="tiny", messages=HELLO)
    assert (caught.value.code, caught.value.param) == ("some_code", "p")
    assert caught.value.response.headers["retry-after"] == "3"


async def test_a_stream_that_breaks_is_an_exception_and_no_short_answer(make_site, make_neuron):
    site = await make_site(make_neuron("tiny", half_after=2))
    async with openai.AsyncOpenAI(base_url=site.url + "/v1", api_key="none", max_retries=0) as client:
        stream = await client.chat.completions.create(model="tiny", messages=HELLO, stream=True)
        said = []

        async def listen():
            async for chunk in stream:
                said.append(chunk.choices[0].delta.content)

        with pytest.raises(openai.APIError, match=r"n0 (closed the connection|ended its answer)"):
            await listen()
    assert said == ["Once", " upon"]
