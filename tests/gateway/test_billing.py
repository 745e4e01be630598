"""What requests cost their keys, over real sockets: whole, streamed, cut off, refused, and many at once."""

import asyncio

import pytest

from helexa.gateway.billing import used_tokens
from helexa.gateway.config import AuthSection, GatewayConfig
from helexa.gateway.fleet import Fleet
from helexa.gateway.keys import Limit, add_key
from helexa.gateway.metrics import Meter, Metrics

pytestmark = pytest.mark.timeout(60)
COMPUTED = 7 - 3 + 4  # the neuron's prompt without its cached part, and its answer


@pytest.fixture
def make_limited(make_site, tmp_path):
    """`await make_limited(neuron, (unit, amount, window_s), …)`: a site whose client has a limited key."""

    async def make(neuron, *limits):
        path = tmp_path / "keys.jsonl"
        key, _ = add_key(path, "ada", limits=[Limit(*limit) for limit in limits])
        site = await make_site(neuron, config=GatewayConfig(auth=AuthSection(keys_file=str(path))))
        site.client.headers["authorization"] = f"Bearer {key}"
        return site

    return make


def used(site):
    """What counts against each limit of the only key, and what is reserved."""
    (principal,) = site.gateway.keys.principals
    windows = site.gateway.ledger._windows.values()
    return [amount for _, amount in site.gateway.ledger.used(principal)], sum(w.reserved for w in windows)


async def test_an_answer_costs_what_was_computed_streamed_or_not(make_limited, neuron):
    site = await make_limited(neuron, ("tokens", 1000, 60))
    await site.chat()
    assert used(site) == ([COMPUTED], 0)
    await site.stream()
    assert used(site) == ([2 * COMPUTED], 0)


async def test_a_client_beyond_its_limit_is_told_when_to_come_back(make_limited, neuron):
    site = await make_limited(neuron, ("requests", 2, 3600))
    assert [(await site.chat())[0] for _ in range(2)] == [200, 200]
    status, body, headers = await site.chat(stream=True)
    assert (status, body["error"]["code"], body["error"]["type"]) == (
        429,
        "rate_limit_exceeded",
        "rate_limit_error",
    )
    assert "2 requests per hour" in body["error"]["message"]
    assert 3500 < int(headers["retry-after"]) <= 3662
    assert len(neuron.requests) == 2


@pytest.mark.parametrize("wrong", [b'"\xff"', b'"\\ud800"', b"[[1]]", b"null", b"-1", b"1e400"])
async def test_a_limit_that_makes_no_sense_is_left_to_the_neuron(make_limited, neuron, wrong):
    site = await make_limited(neuron, ("tokens", 1000, 60))
    body = b'{"model": "tiny", "messages": [], "max_tokens": ' + wrong + b"}"
    async with site.client.post(site.url + "/v1/chat/completions", data=body) as response:
        assert b"internal_error" not in await response.read()
    assert used(site)[1] == 0


async def test_tokens_run_out(make_limited, neuron):
    site = await make_limited(neuron, ("tokens", 2 * COMPUTED, 60))
    assert [(await site.chat())[0] for _ in range(3)] == [200, 200, 429]


async def test_a_stream_that_its_client_leaves_is_counted(make_limited, make_neuron, eventually):
    neuron = make_neuron("tiny", words=["word"] * 1000, pause_s=0.01)
    site = await make_limited(neuron, ("tokens", 100_000, 60))
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x" * 400}], "stream": True}
    async with site.client.post(site.url + "/v1/chat/completions", json=body) as response:
        for _ in range(10):
            await response.content.readuntil(b"\n\n")
    await eventually(lambda: used(site)[1] == 0 and used(site)[0] != [0])
    (tokens,), _ = used(site)
    assert 400 // 4 + 10 <= tokens <= 400 // 4 + 100


async def test_an_answer_that_its_client_does_not_wait_for_costs_its_prompt(
    make_limited, make_neuron, eventually
):
    neuron = make_neuron("tiny", first_word_s=30)
    site = await make_limited(neuron, ("tokens", 100_000, 60))
    asking = asyncio.create_task(site.chat(stop=["x" * 400]))
    await eventually(lambda: neuron.running == 1)
    assert used(site)[1] > 4096
    asking.cancel()
    await eventually(lambda: used(site)[1] == 0)
    assert 100 <= used(site)[0][0] <= 140


async def test_a_stream_that_breaks_off_is_counted(make_limited, make_neuron):
    site = await make_limited(make_neuron("tiny", half_after=2), ("tokens", 1000, 60))
    assert b"upstream_connection_error" in await site.stream()
    assert used(site)[0][0] >= 2


async def test_what_is_refused_costs_a_request_and_no_tokens(make_limited, make_neuron):
    neuron = make_neuron("tiny", refusal=(400, {"message": "no", "code": "invalid_parameter"}, {}))
    site = await make_limited(neuron, ("requests", 10, 60), ("tokens", 1000, 60))
    assert (await site.chat())[0] == 400
    assert (await site.chat("nowhere"))[0] == 404
    assert used(site) == ([2, 0], 0)


async def test_many_at_once_cannot_overdraw(make_limited, make_neuron):
    neuron = make_neuron("tiny", first_word_s=0.3)
    site = await make_limited(neuron, ("tokens", 100, 60), ("requests", 25, 60))
    answers = await asyncio.gather(*(site.chat(max_tokens=10) for _ in range(40)))
    assert {status for status, _, _ in answers} == {200, 429}
    assert len(neuron.requests) <= 4  # each reserves 10 tokens and those of its prompt
    assert used(site)[1] == 0


async def test_a_request_reserves_what_it_may_generate(make_limited, make_neuron, eventually):
    neuron = make_neuron("tiny", first_word_s=30)
    site = await make_limited(neuron, ("tokens", 10_000, 60))
    for options, least in (({"max_completion_tokens": 500, "n": 3}, 1500), ({"max_tokens": "many"}, 4096)):
        asking = asyncio.create_task(site.chat(**options))
        await eventually(lambda: neuron.running == 1)
        assert least < used(site)[1] < least + 100
        asking.cancel()
        await eventually(lambda: neuron.running == 0 and used(site)[1] == 0)


@pytest.mark.parametrize(
    ("usage", "completion", "node", "code", "expected"),
    [
        ({"prompt_tokens": 10, "cached_tokens": 4}, 5, "n", None, 11),
        ({"prompt_tokens": 10}, 5, "n", "upstream_timeout", 15),
        ({}, 5, "n", None, 105),
        ({}, 0, "n", "client_closed_request", 100),
        ({}, 0, "n", "shutting_down", 100),
        ({}, 0, "", "client_closed_request", 0),
        ({}, 0, "n", "rate_limit_exceeded", 0),
    ],
)
def test_what_was_computed_is_told_or_guessed(usage, completion, node, code, expected):
    meter = Meter(Metrics(Fleet({})), "m", 0.0)
    meter.usage, meter.completion_tokens, meter.node, meter.code = usage, completion, node, code
    assert used_tokens(meter, 100) == expected
