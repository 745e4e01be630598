"""What leaves on the wire has the members that clients dispatch on, and no others."""

import json

import msgspec

from helexa.wire.chat import AnswerMessage, ChatAnswer, ChatChunk, ChatDelta, Choice, ChunkChoice
from helexa.wire.completions import CompletionAnswer, CompletionChoice
from helexa.wire.control import (
    Activation,
    Cpu,
    Discovery,
    Health,
    LoadRequest,
    ModelInfo,
    Progress,
    UnloadReply,
)
from helexa.wire.generation import PromptTokensDetails, Timing, Usage, encode
from helexa.wire.models import ModelCard, ModelList


def shown(answer: object) -> object:
    return json.loads(encode(answer))


def test_a_chat_answer_names_object_role_and_finish():
    usage = Usage(3, 2, 5, PromptTokensDetails(1), helexa_timing=Timing(1.0, 2.0, 0.5, 2, 0.5))
    answer = ChatAnswer(
        id="chatcmpl-1", created=7, model="m", choices=[Choice(0, AnswerMessage("hi"), "stop")], usage=usage
    )
    assert shown(answer) == {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 7,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {"content": "hi", "role": "assistant"},
                "finish_reason": "stop",
                "logprobs": None,
            }
        ],
        "usage": {
            "prompt_tokens": 3,
            "completion_tokens": 2,
            "total_tokens": 5,
            "prompt_tokens_details": {"cached_tokens": 1},
            "helexa_timing": {
                "prefill_ms": 1.0,
                "decode_ms": 2.0,
                "queue_ms": 0.5,
                "prefill_tokens": 2,
                "reuse_ratio": 0.5,
            },
        },
    }


def test_a_chunk_says_null_until_it_finishes():
    chunk = ChatChunk(id="c", created=7, model="m", choices=[ChunkChoice(0, ChatDelta(content=""))])
    assert shown(chunk) == {
        "id": "c",
        "object": "chat.completion.chunk",
        "created": 7,
        "model": "m",
        "choices": [{"index": 0, "delta": {"content": ""}, "logprobs": None, "finish_reason": None}],
    }


def test_a_completion_names_its_object():
    answer = CompletionAnswer(id="c", created=7, model="m", choices=[CompletionChoice(0, "x", None, None)])
    assert shown(answer)["object"] == "text_completion"


def test_the_listing_is_openai_shaped():
    card = ModelCard(id="m", created=7, loaded=True)
    assert shown(ModelList([card])) == {
        "data": [{"id": "m", "object": "model", "created": 7, "owned_by": "helexa", "loaded": True}],
        "object": "list",
    }


def test_the_control_types_survive_the_wire():
    for value in (
        Discovery(hostname="h", os="o", kernel="k", cpu=Cpu(
            name="c", cores=1, threads=2, instruction_sets=["avx2"], memory_total_bytes=5), devices=[]),
        Health(status="ok", uptime_s=1.0, memory_available_bytes=5, models=[],
               activation=Activation(state="ready")),
        ModelInfo(id="m", status="loading", source="s", progress=Progress(phase="weights", percent=4.5)),
        LoadRequest(model_id="m"),
        UnloadReply(model_id="m"),
    ):  # fmt: skip
        assert msgspec.json.decode(encode(value), type=type(value)) == value


def test_answers_with_new_members_are_understood_by_older_readers():
    grown = b'{"id": "m", "status": "loaded", "source": "s", "novelty": 1}'
    assert msgspec.json.decode(grown, type=ModelInfo).id == "m"
