"""Chat and completions over real connections: streams, whole answers, errors, and clients that leave."""

import asyncio
import json
import threading
from unittest.mock import Mock

import openai
import pytest

from helexa.errors import DevicePoisoned
from helexa.neuron.config import AdmissionSection
from helexa.neuron.inference import SHORT_BYTES
from helexa.wire import sse

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}


async def events_of(client, body, path="/v1/chat/completions"):
    """Status, raw body and the parsed data of all events but [DONE]."""
    async with client.stream("POST", path, json=body | {"stream": True}) as response:
        raw = b"".join([chunk async for chunk in response.aiter_raw()])
    parsed = [event.data for event in sse.Parser().feed(raw)]
    return response, raw, [json.loads(data) for data in parsed if data != "[DONE]"]


async def test_a_whole_answer_has_text_finish_and_usage(client):
    answer = (await client.post("/v1/chat/completions", json=CHAT)).json()
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "m"
    (choice,) = answer["choices"]
    assert choice["message"] == {"content": "Hi you", "role": "assistant"}
    assert choice["finish_reason"] == "stop"
    assert choice["logprobs"] is None
    usage = answer["usage"]
    assert usage["prompt_tokens"] == len("user: Hello\n")
    assert usage["completion_tokens"] == 6
    assert usage["total_tokens"] == usage["prompt_tokens"] + 6
    assert usage["prompt_tokens_details"] == {"cached_tokens": 3}
    assert usage["helexa_timing"] == {
        "prefill_ms": 2.0, "decode_ms": 3.0, "queue_ms": 1.0, "prefill_tokens": 9, "reuse_ratio": 0.25,
    }  # fmt: skip


async def test_a_stream_is_role_content_finish_and_done(client):
    response, raw, events = await events_of(client, CHAT)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert raw.endswith(sse.DONE)
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == "Hi you"
    assert [event["choices"][0]["finish_reason"] for event in events] == [None] * 7 + ["stop"]
    assert len({event["id"] for event in events}) == 1
    assert all("usage" not in event for event in events)


async def test_usage_ends_a_stream_when_asked_for(client):
    _, _, events = await events_of(client, CHAT | {"stream_options": {"include_usage": True}})
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == 6


async def test_usage_is_a_comment_for_a_gateway_whose_client_did_not_ask(client):
    body, asked = CHAT | {"stream": True}, {"stream_options": {"include_usage": True}}
    headers = {"x-helexa-usage": "comment"}
    raw = (await client.post("/v1/chat/completions", json=body, headers=headers)).content
    note = raw.removesuffix(sse.DONE).rstrip().rpartition(b"\n")[2]
    assert json.loads(note.removeprefix(b": "))["completion_tokens"] == 6
    assert all('"usage"' not in event.data for event in sse.Parser().feed(raw))
    raw = (await client.post("/v1/chat/completions", json=body | asked, headers=headers)).content
    assert raw.count(b'"completion_tokens"') == 1


async def test_a_silent_stream_says_how_far_its_prompt_is_computed(client, script, eventually):
    script.hold, script.prefilled = asyncio.Event(), 5
    raw = b""
    async with client.stream("POST", "/v1/chat/completions", json=CHAT | {"stream": True}) as response:
        async for chunk in response.aiter_raw():
            raw += chunk
            if b": prefill 5/12\n\n" in raw:
                script.prefilled = 0
                script.hold.set()
    assert b": prefill 5/12\n\n" in raw
    assert raw.endswith(sse.DONE)
    assert b"prefill" not in raw.partition(b"data:")[2]


async def test_a_stream_that_waits_for_its_turn_is_kept_alive(client, script):
    script.hold = asyncio.Event()
    async with client.stream("POST", "/v1/chat/completions", json=CHAT | {"stream": True}) as response:
        assert await anext(response.aiter_raw()) == sse.KEEP_ALIVE


async def test_sampling_fields_reach_the_engine(client, script):
    body = CHAT | {
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.1, "seed": 3,
        "presence_penalty": 0.2, "frequency_penalty": 0.3, "logit_bias": {"5": -1}, "stop": "x",
        "ignore_eos": True, "max_tokens": 9, "max_completion_tokens": 2, "logprobs": True,
        "top_logprobs": 2, "stop_token_ids": [4],
    }  # fmt: skip
    answer = (await client.post("/v1/chat/completions", json=body)).json()
    (params,) = script.engines[0].params
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 7, 0.1)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.1, 0.2, 0.3)
    assert (params.seed, params.logit_bias, params.stop) == (3, {5: -1.0}, ("x",))
    assert (params.max_tokens, params.logprobs, params.stop_token_ids, params.ignore_eos) == (
        2,
        2,
        (4,),
        True,
    )
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "length"
    first = choice["logprobs"]["content"][0]
    assert first["token"] == "H"
    assert first["bytes"] == [72]
    assert [top["token"] for top in first["top_logprobs"]] == ["H", "�"]


async def test_several_choices_differ_in_seed_and_count_the_prompt_once(client, script):
    answer = (await client.post("/v1/chat/completions", json=CHAT | {"n": 3, "seed": 10})).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert {choice["message"]["content"] for choice in answer["choices"]} == {"Hi you"}
    assert sorted(params.seed for params in script.engines[0].params) == [10, 11, 12]
    assert answer["usage"]["prompt_tokens"] == len("user: Hello\n")
    assert answer["usage"]["completion_tokens"] == 18


async def test_template_arguments_and_roles_reach_the_template(client, script):
    body = CHAT | {
        "chat_template_kwargs": {"enable_thinking": False},
        "messages": [
            {"role": "developer", "content": [
                {"type": "text", "text": "Be "}, {"type": "text", "text": "brief"}]},
            {"role": "assistant", "content": None, "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}]},
            {"role": "tool", "tool_call_id": "c1", "content": "42"},
        ],
    }  # fmt: skip
    assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
    template = script.engines[0].chat_template
    assert template.keywords == {"enable_thinking": False}
    system, call, tool = template.messages
    assert system == {"role": "system", "content": "Be brief"}
    assert call["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}
    assert tool == {"role": "tool", "content": "42", "tool_call_id": "c1"}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"reasoning_effort": "enormous"}, "reasoning_effort"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"store": True}, "store"),
        ({"temperature": "hot"}, "temperature"),
        ({"temprature": 1}, "temprature"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"n": 0}, "n"),
    ],
)
async def test_what_cannot_be_honoured_is_a_400_that_names_the_field(client, change, param):
    response = await client.post("/v1/chat/completions", json=CHAT | change)
    error = response.json()["error"]
    assert response.status_code == 400
    assert error["param"] == param
    assert param.split(".")[0].split("[")[0] in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "harmless",
    [
        {
            "user": "u",
            "metadata": {"a": "b"},
            "store": False,
            "service_tier": "auto",
            "prompt_cache_key": "k",
        },
        {
            "tools": [],
            "tool_choice": "auto",
            "parallel_tool_calls": True,
            "response_format": {"type": "text"},
        },
        {
            "temperature": None,
            "stop": None,
            "n": None,
            "stream": None,
            "logit_bias": None,
            "modalities": ["text"],
        },
    ],
)
async def test_harmless_fields_are_accepted(client, harmless):
    assert (await client.post("/v1/chat/completions", json=CHAT | harmless)).status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CHAT | {"messages": [{"role": "user", "content": "x" * 10**6}]}),
        ("/v1/completions", {"model": "m", "prompt": "x" * 10**6}),
    ],
)
async def test_a_prompt_that_is_far_too_long_is_refused_before_it_is_tokenized(
    client, script, monkeypatch, path, body
):
    monkeypatch.setattr(type(script.engines[0].tokenizer), "encode", None)
    response = await client.post(path, json=body)
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert "at least 1000" in response.json()["error"]["message"]


async def test_a_prompt_that_is_too_long_says_how_long(client):
    body = CHAT | {"messages": [{"role": "user", "content": "x" * 300}], "stream": True}
    response = await client.post("/v1/chat/completions", json=body)
    error = response.json()["error"]
    assert response.status_code == 400
    assert error["code"] == "context_length_exceeded"
    assert error["max"] == 200
    assert error["prompt_tokens"] == 307


async def test_silence_is_filled_with_comments_until_the_first_token(client, script):
    script.hold = asyncio.Event()
    asyncio.get_running_loop().call_later(0.3, script.hold.set)
    _, raw, events = await events_of(client, CHAT)
    assert raw.startswith(b": keep-alive\n\n")
    assert raw.count(sse.KEEP_ALIVE) >= 3
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"


async def test_a_failure_before_the_first_token_is_a_status(client, script):
    script.fail_at, script.error = 0, DevicePoisoned("the device broke")
    response = await client.post("/v1/chat/completions", json=CHAT | {"stream": True})
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "device_poisoned"


async def test_a_failure_in_mid_stream_is_an_error_event_a_finish_and_done(client, script):
    script.fail_at = 3
    _, raw, events = await events_of(client, CHAT)
    assert raw.endswith(sse.DONE)
    assert events[-2]["error"]["message"] == "the device broke"
    assert events[-1]["choices"][0]["finish_reason"] == "error"


async def test_a_bug_in_mid_stream_does_not_end_in_silence(client, script):
    script.fail_at, script.error = 3, RuntimeError("a bug")
    _, raw, events = await events_of(client, CHAT)
    assert raw.endswith(sse.DONE)
    assert events[-2]["error"]["code"] == "internal_error"
    assert "a bug" not in raw.decode()


async def test_a_bug_is_an_internal_error_that_tells_nothing(client, script):
    script.fail_at, script.error = 0, RuntimeError("a secret")
    response = await client.post("/v1/chat/completions", json=CHAT)
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert "secret" not in response.text


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("when", ["prefill", "decode"])
async def test_a_client_that_leaves_stops_its_generation(client, script, eventually, stream, when):
    script.delay_s, script.reply = 0.05, "x" * 100
    if when == "prefill":
        script.hold = asyncio.Event()
    engine = script.engines[0]
    task = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT | {"stream": stream}))
    await eventually(lambda: engine.running == 1)
    task.cancel()
    await eventually(lambda: engine.running == 0)
    assert engine.cancelled == 1
    health = (await client.get("/health")).json()
    assert health["models"][0].get("in_flight", 0) == 0


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": "x" * SHORT_BYTES}]}),
        ("/v1/completions", {"model": "m", "prompt": "x" * SHORT_BYTES}),
        ("/v1/embeddings", {"model": "m", "input": "x"}),
    ],
)
async def test_the_text_of_a_client_that_has_left_is_not_tokenized(client, eventually, route, body):
    work, tokenizer = client.neuron.text_work, client.neuron.registry.get("m").engine.tokenizer
    tokenizer.encode = Mock(side_effect=tokenizer.encode)
    hold = threading.Event()
    others = [asyncio.create_task(work.run(hold.wait)) for _ in range(2)]
    asked = asyncio.create_task(client.post(route, json=body))
    await eventually(lambda: work.num_pending == 3)
    asked.cancel()
    await eventually(lambda: work.num_pending == 2)
    hold.set()
    await asyncio.gather(*others)
    await work.run(str)
    assert not tokenizer.encode.called


async def test_a_waiting_client_that_leaves_frees_its_place(client, script, eventually):
    script.hold = asyncio.Event()
    engine = script.engines[0]
    tasks = [asyncio.create_task(client.post("/v1/chat/completions", json=CHAT)) for _ in range(3)]
    admission = client.neuron.registry.get("m").admission
    await eventually(lambda: admission.queue_depth == 1)
    tasks[0].cancel()
    tasks[1].cancel()
    tasks[2].cancel()
    await eventually(lambda: admission.queue_depth == 0 and engine.running == 0)
    script.hold = None
    assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200


async def test_a_full_queue_is_a_503_with_the_time_to_come_back(
    make_neuron, serve_neuron, script, eventually
):
    neuron = make_neuron("m", admission=AdmissionSection(max_in_flight=1, max_queue_depth=1, max_wait_s=0.3))
    async with serve_neuron(neuron) as client:
        await eventually(lambda: neuron.registry.activation().state == "ready")
        script.hold = asyncio.Event()
        first = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT))
        await eventually(lambda: script.engines[0].running == 1)
        second = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT))
        await eventually(lambda: neuron.registry.get("m").admission.queue_depth == 1)
        script.engines[0].tokenizer = None  # nothing is tokenized for who is sent away
        third = await client.post("/v1/chat/completions", json=CHAT)
        assert third.status_code == 503
        assert third.json()["error"]["code"] == "rate_limit_exceeded"
        assert int(third.headers["retry-after"]) >= 1
        waited = await second
        assert waited.status_code == 503
        assert "no seat became free" in waited.json()["error"]["message"]
        script.hold.set()
        assert (await first).status_code == 200
        load = (await client.get("/health")).json()["models"][0]
        assert (load["rejected_queue_full"], load["rejected_timeout"]) == (1, 1)


async def test_a_model_that_is_loading_is_a_503_with_progress(make_neuron, serve_neuron, script):
    import threading

    script.load_hold = threading.Event()
    neuron = make_neuron("m")
    async with serve_neuron(neuron) as client:
        response = await client.post("/v1/chat/completions", json=CHAT)
        error = response.json()["error"]
        assert response.status_code == 503
        assert error["code"] == "model_loading"
        assert error["progress"]["phase"] in ("queued", "weights")
        assert int(response.headers["retry-after"]) >= 1
        script.load_hold.set()


async def test_an_unknown_model_is_a_404_that_lists_the_known(client):
    response = await client.post("/v1/chat/completions", json=CHAT | {"model": "x"})
    assert response.status_code == 404
    assert response.json()["error"]["message"] == "model 'x' is not loaded here; loaded: 'm'"


async def test_completions_take_texts_and_token_ids(client):
    body = {"model": "m", "prompt": ["ab", "cde"], "echo": True, "max_tokens": 2}
    answer = (await client.post("/v1/completions", json=body)).json()
    assert [choice["text"] for choice in answer["choices"]] == ["abHi", "cdeHi"]
    assert answer["usage"]["prompt_tokens"] == 5
    answer = (
        await client.post("/v1/completions", json={"model": "m", "prompt": [97, 98], "logprobs": 1})
    ).json()
    logprobs = answer["choices"][0]["logprobs"]
    assert "".join(logprobs["tokens"]) == "Hi you"
    assert logprobs["text_offset"] == [0, 1, 2, 3, 4, 5]
    assert logprobs["top_logprobs"][0] == {"H": -0.5}


async def test_completions_stream(client):
    body = {"model": "m", "prompt": "ab", "stream_options": {"include_usage": True}}
    _, raw, events = await events_of(client, body, "/v1/completions")
    assert "".join(event["choices"][0]["text"] for event in events if event["choices"]) == "Hi you"
    assert events[-1]["usage"]["prompt_tokens"] == 2
    assert raw.endswith(sse.DONE)


async def test_unknown_token_ids_are_refused(client):
    response = await client.post("/v1/completions", json={"model": "m", "prompt": [97, 9999]})
    assert response.status_code == 400
    assert "token 9999" in response.json()["error"]["message"]


async def test_the_openai_package_is_content(client):
    async with openai.AsyncOpenAI(
        base_url=f"{str(client.base_url).rstrip('/')}/v1", api_key="-", max_retries=0
    ) as api:
        answer = await api.chat.completions.create(model="m", messages=CHAT["messages"], logprobs=True)
        assert answer.choices[0].message.content == "Hi you"
        stream = await api.chat.completions.create(
            model="m", messages=CHAT["messages"], stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "Hi you"
        assert chunks[-1].usage.completion_tokens == 6
        text = await api.completions.create(model="m", prompt="ab")
        assert text.choices[0].text == "Hi you"
        assert [model.id async for model in api.models.list()] == ["m"]
        with pytest.raises(openai.NotFoundError, match="is not loaded here"):
            await api.chat.completions.create(model="x", messages=CHAT["messages"])
        client.neuron.registry.get("m").engine.script.fail_at = 2
        with pytest.raises(openai.APIError, match="the device broke"):
            async for _ in await api.chat.completions.create(
                model="m", messages=CHAT["messages"], stream=True
            ):
                pass
