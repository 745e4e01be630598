"""What agents send, through a gateway to a neuron whose real engine recites: each request is served."""

import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import anthropic
import pytest

from helexa.gateway.app import create_app
from helexa.gateway.catalogue import Catalogue
from helexa.gateway.config import GatewayConfig, NeuronEntry
from helexa.gateway.gateway import running
from helexa.neuron.app import Neuron
from helexa.neuron.config import ModelEntry, NeuronConfig
from support.scripted_engine import scripted_engine
from support.scripted_neuron import listening

TRANSCRIPTS = Path(__file__).parent / "wire" / "transcripts"
ROUTES = {
    "claude": "/v1/messages?beta=true",
    "qwen": "/v1/chat/completions",
    "opencode": "/v1/chat/completions",
}
REQUESTS = [path for agent in ROUTES for path in sorted(TRANSCRIPTS.glob(f"{agent}_*.json"))]
CALL = '<tool_call>\n{"name": "count", "arguments": {"kind": "tits"}}\n</tool_call>'
SCRIPT = {
    "How many?": f"Counting will do.\n</think>\n\nI count them.\n{CALL}",
    "<tool_response>\n12\n</tool_response>": "Twelve, then.\n</think>\n\nThere are twelve.",
    "And now?": "Nothing has changed.\n</think>\n\nStill twelve.",
}
TOOL: Any = {"name": "count", "input_schema": {"type": "object", "properties": {"kind": {"type": "string"}}}}
Serve = Callable[[], AbstractAsyncContextManager[str]]


@pytest.fixture
def serve() -> Serve:
    """`async with serve() as url`: a gateway before a neuron with the model `m`, alias helexa/small."""

    @asynccontextmanager
    async def serving() -> AsyncIterator[str]:
        engine = scripted_engine(SCRIPT)
        config = NeuronConfig(models=(ModelEntry(id="m"),))
        neuron = Neuron(config, load=lambda path, **_: engine, fetch=lambda source, _: Path(source))
        async with listening(neuron.app) as neuron_url:
            gateway_config = GatewayConfig(neurons=(NeuronEntry("n0", neuron_url),))
            async with (
                running(gateway_config, Catalogue({}, {"helexa/small": "m"})) as gateway,
                listening(create_app(gateway)) as url,
            ):
                while not gateway.fleet.nodes["n0"].is_loaded("m"):
                    await gateway.poller.poll(gateway.fleet.nodes["n0"])
                yield url

    return serving


@pytest.mark.parametrize("path", REQUESTS, ids=lambda path: path.stem)
async def test_what_an_agent_sends_is_answered(serve: Serve, path: Path) -> None:
    request = json.loads(path.read_text())["request"]
    route = ROUTES[path.stem.partition("_")[0]]
    headers = {"anthropic-beta": "some-2026-01-01"} if route.startswith("/v1/messages") else {}
    async with (
        serve() as url,
        aiohttp.ClientSession() as session,
        session.post(url + route, json=request, headers=headers) as response,
    ):
        told = await response.text()
        assert response.status == 200, told
    assert "error" not in told
    if request.get("stream"):
        assert told.rstrip().endswith(("data: [DONE]", 'data: {"type":"message_stop"}'))


async def test_a_conversation_with_thoughts_and_tools_is_computed_only_once(serve: Serve) -> None:
    billing = "x-anthropic-billing-header: cc_version=2.1.197.{0}; cc_entrypoint=cli; cch={0};"
    turns: list[Any] = [{"role": "user", "content": "How many?"}]
    spent = 0
    async with serve() as url, anthropic.AsyncAnthropic(base_url=url, api_key="none") as client:
        for number, said in enumerate(("I count them.", "There are twelve.", "Still twelve.")):
            prompt: Any = {
                "model": "helexa/small",
                "messages": turns,
                "tools": [TOOL],
                "thinking": {"type": "enabled", "budget_tokens": 300},
                "system": [{"type": "text", "text": billing.format(f"a{number}")}],
            }
            async with client.messages.stream(**prompt, max_tokens=500) as stream:
                answer = await stream.get_final_message()
            counted = (await client.messages.count_tokens(**prompt)).input_tokens
            usage = answer.usage
            assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == counted
            assert (usage.cache_read_input_tokens or 0) >= spent
            spent = counted + usage.output_tokens - 1  # the last token ended the turn and was not computed
            assert [block.type for block in answer.content[:2]] == ["thinking", "text"]
            assert answer.content[1].text.strip() == said
            turns.append({"role": "assistant", "content": [block.to_dict() for block in answer.content]})
            calls = [block.id for block in answer.content if block.type == "tool_use"]
            results = [{"type": "tool_result", "tool_use_id": call, "content": "12"} for call in calls]
            turns.append({"role": "user", "content": results or "And now?"})
