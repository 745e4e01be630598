"""Tokenizing and its reverse, over real connections."""

import pytest

MESSAGES = [{"role": "user", "content": "Hello"}]


async def test_a_text_is_tokenized_with_count_and_context(client):
    answer = (await client.post("/tokenize", json={"model": "m", "prompt": "abé"})).json()
    assert answer == {"count": 4, "max_model_len": 200, "tokens": list("abé".encode())}


async def test_a_chat_is_counted_as_the_chat_route_counts_it(client):
    chat = {"model": "m", "messages": MESSAGES, "temperature": 0.5, "max_tokens": 3}
    counted = (await client.post("/tokenize", json=chat)).json()
    used = (await client.post("/v1/chat/completions", json=chat)).json()["usage"]
    assert counted["count"] == used["prompt_tokens"]
    assert bytes(counted["tokens"]) == b"user: Hello\n"


async def test_what_is_too_long_to_be_answered_can_still_be_counted(client):
    text = "x" * 500
    assert (await client.post("/tokenize", json={"model": "m", "prompt": text})).json()["count"] == 500
    chat = {"model": "m", "messages": [{"role": "user", "content": text}]}
    assert (await client.post("/tokenize", json=chat)).json()["count"] == 507
    refused = await client.post("/tokenize", json={"model": "m", "prompt": text * 10})
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "context_length_exceeded"


async def test_tokens_become_text_again(client):
    answer = await client.post("/detokenize", json={"model": "m", "tokens": list("abé".encode())})
    assert answer.json() == {"prompt": "abé"}
    assert (await client.post("/detokenize", json={"model": "m", "tokens": []})).json() == {"prompt": ""}


@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        ("/tokenize", {"model": "m"}, "prompt"),
        ("/tokenize", {"prompt": "x"}, "model"),
        ("/tokenize", {"model": "", "prompt": "x"}, "model"),
        ("/tokenize", {"model": "m", "prompt": 5}, "prompt"),
        ("/tokenize", {"model": "m", "prompt": "x", "text": "y"}, "text"),
        ("/tokenize", {"model": "m", "messages": [{"role": "user"}]}, "messages[0].content"),
        ("/detokenize", {"model": "m", "tokens": [999]}, "tokens"),
        ("/detokenize", {"model": "m", "tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"model": "m", "tokens": "x"}, "tokens"),
        ("/detokenize", {"model": "m"}, "tokens"),
    ],
)
async def test_a_wrong_request_is_a_400_that_names_the_field(client, route, body, param):
    response = await client.post(route, json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"].replace("[]", "").startswith(param.split("[")[0])
    assert param.split("[")[0] in error["message"]


async def test_an_unknown_model_is_a_404(client):
    for route, body in (("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [1]})):
        response = await client.post(route, json=body | {"model": "x"})
        assert response.status_code == 404
