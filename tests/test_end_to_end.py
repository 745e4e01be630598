"""Gateway and neuron as real processes with the starter model, used by openai and the command line."""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anthropic
import openai
import pydantic
import pytest

from support.stack import Stack, free_port, get, running_stack

pytestmark = pytest.mark.model
QUESTION = [{"role": "user", "content": "What is the capital of England?"}]


class Town(pydantic.BaseModel):
    name: str


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, starter_model: Path) -> Iterator[Stack]:
    with running_stack(tmp_path_factory.mktemp("stack"), starter_model) as running:
        yield running
        assert running.neuron.running.poll() is None, "the neuron died"


def helexa(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "helexa.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def test_a_simple_question_gets_a_sensible_english_answer(stack: Stack) -> None:
    answer = stack.client.chat.completions.create(
        model="starter", messages=QUESTION, temperature=0, max_tokens=40
    )
    assert "London" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.model == "starter"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_streamed_answer_is_the_same_text_in_pieces_and_ends_with_usage(stack: Stack) -> None:
    asked: dict[str, Any] = {"model": "starter", "messages": QUESTION, "temperature": 0, "max_tokens": 40}
    whole = stack.client.chat.completions.create(**asked)
    chunks = list(
        stack.client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    pieces = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert len([piece for piece in pieces if piece]) > 3
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert reasons == [whole.choices[0].finish_reason]
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_messages_say_the_same_streamed_and_whole_and_their_tokens_are_counted_exactly(stack: Stack) -> None:
    prompt: Any = {"model": "starter", "messages": QUESTION, "system": "Answer in a few words."}
    asked: Any = {**prompt, "max_tokens": 60, "stop_sequences": ["."], "extra_body": {"temperature": 0}}
    with anthropic.Anthropic(base_url=stack.url, api_key="none", max_retries=0) as client:
        whole = client.messages.create(**asked)
        with client.messages.stream(**asked) as stream:
            streamed = stream.get_final_message()
        counted = client.messages.count_tokens(**prompt).input_tokens
        with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long: \d+ tokens > \d+ maximum"):
            client.messages.create(**{**asked, "messages": [{"role": "user", "content": "word " * 20000}]})
    assert whole.content[0].text == streamed.content[0].text
    assert "London" in whole.content[0].text
    for message in (whole, streamed):
        assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", ".")
        assert message.usage.input_tokens + message.usage.cache_read_input_tokens == counted
    assert streamed.usage.cache_read_input_tokens > 0


def test_responses_are_streamed_counted_continued_and_follow_a_schema(stack: Stack) -> None:
    client, asked = stack.client, {"model": "starter", "temperature": 0, "max_output_tokens": 40}
    with client.responses.stream(**asked, input=QUESTION) as events:
        first = events.get_final_response()
    assert "London" in first.output_text
    further: dict[str, Any] = {"input": "And of France?", "previous_response_id": first.id}
    counted = client.responses.input_tokens.count(model="starter", **further)
    second = client.responses.create(**asked, **further)
    assert second.usage.input_tokens == counted.input_tokens
    assert second.usage.input_tokens_details.cached_tokens >= first.usage.total_tokens - 1
    town = client.responses.parse(**asked, input="Name a town.", text_format=Town)
    assert town.output_parsed is not None
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**asked, input="word " * 20000)
    assert caught.value.code == "context_length_exceeded"
    failed = list(client.responses.create(**asked, input="word " * 20000, stream=True))[-1]
    assert failed.response.error.code == "context_length_exceeded"


def test_a_text_is_continued(stack: Stack) -> None:
    found = stack.client.completions.create(
        model="starter", prompt="The capital of France is", temperature=0, max_tokens=8
    )
    assert "Paris" in found.choices[0].text


def test_the_same_seed_gives_the_same_text(stack: Stack) -> None:
    asked: dict[str, Any] = {"model": "starter", "messages": QUESTION, "temperature": 1.5, "max_tokens": 24}
    texts = [
        stack.client.chat.completions.create(**asked, seed=seed).choices[0].message.content
        for seed in (7, 7, 8)
    ]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_a_second_turn_computes_only_what_is_new(stack: Stack) -> None:
    opening = "You are a patient teacher. " + "Explain each step with a short example from daily life. " * 30
    messages = [{"role": "system", "content": opening}, {"role": "user", "content": "What is rain?"}]
    first = stack.client.chat.completions.create(
        model="starter", messages=messages, temperature=0, max_tokens=16
    )
    messages += [
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "And snow?"},
    ]
    second = stack.client.chat.completions.create(
        model="starter", messages=messages, temperature=0, max_tokens=4
    )
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens - 1


def test_an_unknown_model_is_refused_by_name(stack: Stack) -> None:
    with pytest.raises(openai.NotFoundError, match="no-such-model"):
        stack.client.chat.completions.create(model="no-such-model", messages=QUESTION)


def test_status_shows_the_node_and_its_model(stack: Stack) -> None:
    done = helexa("status", "--url", stack.url, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["status"] == "ok"
    (node,) = report["nodes"]
    assert (node["state"], [model["id"] for model in node["models"]]) == ("up", ["starter"])
    assert "starter" in helexa("status", "--url", stack.url).stdout


def test_chat_answers_a_question_from_standard_input(stack: Stack) -> None:
    question = QUESTION[0]["content"]
    done = helexa("chat", "--url", stack.url, "--temperature", "0", "--max-tokens", "40", input=question)
    assert done.returncode == 0, done.stderr
    assert "London" in done.stdout


def test_a_model_is_unloaded_and_loaded_again_through_the_gateway(stack: Stack) -> None:
    assert helexa("unload", "starter", "--url", stack.url).stdout == "starter is unloaded\n"
    assert [
        model["status"] for model in get(f"{stack.neuron_url}/models") if model["status"] == "loaded"
    ] == []
    done = helexa("load", "starter", "--url", stack.url)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("starter is loaded on local in ")


def test_a_neuron_that_dies_mid_stream_ends_the_stream_with_an_error(
    tmp_path: Path, starter_model: Path
) -> None:
    with running_stack(tmp_path, starter_model) as stack:
        stream = stack.client.chat.completions.create(
            model="starter", messages=QUESTION, stream=True, max_tokens=2000, extra_body={"ignore_eos": True}
        )
        next(stream)
        stack.neuron.kill()
        with pytest.raises(openai.APIError):
            list(stream)


@contextmanager
def helexa_up(folder: Path, model: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`helexa up` with the model on free ports, and what it printed when all was ready."""
    ports = [f"--{name}={free_port()}" for name in ("port", "metrics-port", "neuron-port")]
    process = subprocess.Popen(
        [sys.executable, "-m", "helexa.cli", "up", str(model), *ports],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "XDG_STATE_HOME": str(folder)},
    )
    try:
        lines = []
        assert process.stdout is not None
        while not lines or "Ctrl-C" not in lines[-1]:
            lines.append(process.stdout.readline())
            assert lines[-1], process.communicate()[1]
        yield process, "".join(lines)
    finally:
        process.kill()
        process.communicate()


def test_up_answers_says_how_to_go_on_and_stops_cleanly(tmp_path: Path, starter_model: Path) -> None:
    with helexa_up(tmp_path, starter_model) as (process, text):
        url = re.search(r"helexa is up: (\S+)", text)[1]
        assert "answer: " in text
        assert "London" in text
        curl = re.search(r"curl .*?'$", text, re.DOTALL | re.MULTILINE)[0]
        done = subprocess.run(["bash", "-c", curl], capture_output=True, text=True, timeout=120)
        assert done.stdout.rstrip().endswith("data: [DONE]"), done.stderr
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        with pytest.raises(OSError, match="refused"):
            urllib.request.urlopen(url, timeout=5)


def test_up_ends_with_the_reason_when_a_daemon_dies(tmp_path: Path, starter_model: Path) -> None:
    with helexa_up(tmp_path, starter_model) as (process, _):
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 1
        assert re.search(r"neuron was killed by signal 9; the end of \S+neuron\.log", errors)
