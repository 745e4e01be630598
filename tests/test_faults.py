"""Faults injected into real processes: after each nothing is left over, and the next request is served."""

import http.client
import json
import os
import resource
import socket
import struct
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest

from support.stack import Daemon, Stack, get, running_stack, wait_for

pytestmark = pytest.mark.model

SEATS = 4
NEURON = f"""
[neuron]
shutdown_grace_s = 1

[admission]
max_in_flight = {SEATS}
max_queue_depth = 256
"""
GATEWAY = """
[gateway]
poll_interval_s = 0.5
idle_timeout_s = 5

[store]
path = "responses.sqlite"
"""
QUESTION = [{"role": "user", "content": "What is the capital of England?"}]
STORY = [{"role": "user", "content": "Write a long story about the sea and all its ships."}]
LONG = [
    {"role": "user", "content": "Tell me all about the rain in every county. " * 700}
]  # some 7,000 tokens
KEPT = 4  # connections, and tasks with them, that are kept alive for the next request
# A process in whose folder of modules this lies has a clock that is wrong by the seconds in a file.
WRONG_CLOCK = """
import os, time

right = time.time

def wrong():
    with open(os.environ["CLOCK_SHIFT"]) as file:
        return right() + float(file.read() or 0)

time.time = wrong
"""


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, starter_model: Path) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("faults")
    with running_stack(folder, starter_model, neuron=NEURON, gateway=GATEWAY) as running:
        assert "London" in running.ask().choices[0].message.content  # what is opened once is open now
        yield running


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test on the shared stack: at rest, no more files and tasks than before, and it answers."""
    if "stack" not in request.fixturenames:
        yield
        return
    stack: Stack = request.getfixturevalue("stack")
    daemons = stack.gateway, stack.neuron
    before = [(daemon.running.pid, daemon.num_files(), stack.num_tasks(daemon)) for daemon in daemons]
    yield
    wait_for(stack.is_loaded, "the model being there again")
    wait_for(stack.is_at_rest, "rest")
    assert "London" in stack.ask().choices[0].message.content
    for daemon, (pid, files, tasks) in zip(daemons, before, strict=True):
        if daemon.running.pid == pid:
            wait_for(partial(has_no_more, stack, daemon, files, tasks), f"{daemon.name}'s files and tasks")


def has_no_more(stack: Stack, daemon: Daemon, files: int, tasks: int) -> bool:
    return daemon.num_files() <= files + KEPT and stack.num_tasks(daemon) <= tasks + KEPT


def body(messages: Any = QUESTION, **more: Any) -> bytes:
    asked = {"model": "starter", "messages": messages, "temperature": 0, "max_tokens": 12, **more}
    return json.dumps(asked).encode()


def raw_stream(stack: Stack, messages: Any = QUESTION, receive_buffer: int = 0, **more: Any) -> socket.socket:
    """A connection on which a streamed chat request has been sent and nothing read."""
    return raw_post(stack, "/v1/chat/completions", body(messages, stream=True, **more), receive_buffer)


def raw_post(stack: Stack, path: str, payload: bytes, receive_buffer: int = 0) -> socket.socket:
    host, port = stack.url.removeprefix("http://").split(":")
    made = socket.socket()
    if receive_buffer:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    made.settimeout(60)
    made.connect((host, int(port)))
    head = (
        f"POST {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\ncontent-length: {len(payload)}\r\n\r\n"
    )
    made.sendall(head.encode() + payload)
    return made


def rest_of(connection: socket.socket, most: int = 65536) -> bytes:
    """What comes until the end, at most so many bytes at a time."""
    received = b""
    while piece := connection.recv(most):
        received += piece
    return received


def is_busy(stack: Stack) -> bool:
    return bool(stack.load().get("in_flight"))


def endless(stack: Stack, **more: Any) -> Any:
    """A stream that goes on to the end of the context."""
    return stack.client.chat.completions.create(
        model="starter",
        messages=QUESTION,
        stream=True,
        max_tokens=6000,
        extra_body={"ignore_eos": True},
        **more,
    )


def restart(stack: Stack) -> None:
    stack.neuron.start()
    wait_for(stack.load, "the neuron's return")
    wait_for(stack.is_loaded, "the gateway noticing")


def test_a_neuron_killed_within_a_prefill_is_an_error_for_its_client(stack: Stack) -> None:
    failed: list[Exception] = []

    def ask() -> None:
        try:
            stack.client.chat.completions.create(model="starter", messages=LONG, max_tokens=4)
        except openai.APIStatusError as error:
            failed.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    wait_for(lambda: is_busy(stack), "the prefill")
    stack.neuron.kill()
    asking.join(60)
    assert [getattr(error, "status_code", error) for error in failed] in ([502], [503])
    restart(stack)


def test_a_neuron_killed_within_a_stream_ends_it_with_an_error(stack: Stack) -> None:
    stream = endless(stack)
    next(stream)
    stack.neuron.kill()
    with pytest.raises(openai.APIError, match="local"):
        list(stream)
    restart(stack)


@pytest.mark.parametrize("moment", ["prefill", "stream"])
def test_streams_of_every_api_end_with_its_error_when_the_neuron_dies(stack: Stack, moment: str) -> None:
    messages = LONG if moment == "prefill" else STORY
    asked = {"model": "starter", "stream": True, "temperature": 0}
    apis = {
        "/v1/chat/completions": ({"messages": messages, "max_tokens": 400}, b"data: [DONE]"),
        "/v1/responses": ({"input": messages, "max_output_tokens": 400}, b"event: response.failed"),
        "/v1/messages": ({"messages": messages, "max_tokens": 400}, b"event: error"),
    }
    with ExitStack() as opened:
        streams = {
            path: opened.enter_context(closing(raw_post(stack, path, json.dumps(asked | more).encode())))
            for path, (more, _) in apis.items()
        }
        wait_for(lambda: stack.load().get("in_flight") == len(apis), "all at work")
        for stream in streams.values():  # a comment, or some of the answer
            assert b"200 OK" in stream.recv(65536)
        stack.neuron.kill()
        for path, (_, end) in apis.items():
            received = rest_of(streams[path])
            assert end in received, received[-500:]
            assert b"error" in received
    restart(stack)


def test_a_load_that_the_gateway_asked_for_may_be_interrupted(stack: Stack) -> None:
    assert post(f"{stack.url}/models/unload", {"model_id": "starter"})["node"] == "local"
    stack.neuron.freeze()  # so that the load takes as long as it has to
    with closing(raw_stream(stack, max_tokens=4)) as waiting:
        assert b"200 OK" in waiting.recv(65536)  # comments while it waits
        stack.neuron.kill()
        stack.neuron.start()
        received = rest_of(waiting)
        assert b"data: [DONE]" in received  # an error or, the neuron being back in time, the answer
    wait_for(stack.is_loaded, "the model being there again")


def test_a_full_disk_costs_no_answer_and_what_was_not_written_is_as_soon_as_there_is_room(
    stack: Stack,
) -> None:
    def respond(previous: Any = None) -> Any:
        more = {"previous_response_id": previous.id} if previous else {}
        question = "What is the capital of England?"
        return stack.client.responses.create(
            model="starter", input=question, max_output_tokens=8, temperature=0, **more
        )

    made = [respond()]
    pid = stack.gateway.running.pid
    limit = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (1, limit[1]))  # no file grows any more
    try:
        made.append(respond(made[-1]))
        made.append(respond(made[-1]))
        for response in made:
            assert stack.client.responses.retrieve(response.id).output_text == response.output_text
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, limit)
    made.append(respond(made[-1]))
    assert stack.gateway.stop() == 0
    stack.gateway.start()
    wait_for(stack.is_loaded, "the gateway's return")
    for response in made:
        assert stack.client.responses.retrieve(response.id).output_text == response.output_text


def test_a_clock_that_jumps_disturbs_nobody(tmp_path: Path, starter_model: Path) -> None:
    shift, modules = tmp_path / "shift", tmp_path / "modules"
    modules.mkdir()
    (modules / "sitecustomize.py").write_text(WRONG_CLOCK)
    shift.write_text("0")
    path = os.pathsep.join(filter(None, (str(modules), os.environ.get("PYTHONPATH"))))
    environ = {"PYTHONPATH": path, "CLOCK_SHIFT": str(shift)}
    with running_stack(tmp_path, starter_model, neuron=NEURON, gateway=GATEWAY, environ=environ) as stack:
        kept = stack.client.responses.create(model="starter", input="Hello", max_output_tokens=4)
        for jump_s in (3 * 86400, -86400, 0):
            with endless(stack) as stream:
                next(stream)
                shift.write_text(str(jump_s))
                for _ in range(10):
                    assert next(stream).choices
            wait_for(stack.is_at_rest, "rest")
            answer = stack.ask()
            assert "London" in answer.choices[0].message.content
            assert abs(answer.created - time.time() - jump_s) < 60
            assert stack.client.responses.retrieve(kept.id).id == kept.id
            time.sleep(1.2)  # two polls
            assert get(f"{stack.url}/health")["nodes"]["healthy"] == 1


def test_a_neuron_killed_while_it_loads_is_an_error_and_loads_again_when_it_is_back(stack: Stack) -> None:
    answer = post(f"{stack.neuron_url}/models/unload", {"model_id": "starter"})
    assert answer["status"] == "unloaded"
    stack.neuron.freeze()  # so that the load takes as long as it has to
    outcome: list[Any] = []
    loading = threading.Thread(
        target=lambda: outcome.append(
            attempt(lambda: post(f"{stack.neuron_url}/models/load", {"model_id": "starter"}))
        )
    )
    loading.start()
    time.sleep(0.3)
    stack.neuron.kill()
    loading.join(60)
    assert isinstance(outcome[0], OSError)
    restart(stack)


def test_a_gateway_killed_within_a_stream_frees_the_neuron(stack: Stack) -> None:
    stream = endless(stack)
    next(stream)
    assert is_busy(stack)
    stack.gateway.kill()
    wait_for(stack.is_at_rest, "the end of the generation")
    with suppress(openai.APIError, ConnectionError, OSError, Exception):
        list(stream)
    stack.gateway.start()
    wait_for(stack.is_loaded, "the gateway's return")


def test_a_client_that_reads_slowly_holds_up_nobody_and_gets_everything(stack: Stack) -> None:
    with closing(raw_stream(stack, receive_buffer=2048, max_tokens=400, ignore_eos=True)) as slow:
        wait_for(lambda: is_busy(stack), "the slow client's turn")
        assert "London" in stack.ask().choices[0].message.content  # beside it
        received = rest_of(slow, 1500)
        assert b"data: [DONE]" in received
        assert received.count(b'"content":') > 100


def test_clients_that_vanish_give_their_seats_back(stack: Stack) -> None:
    for kind in ("closed", "reset", "half-read"):
        sockets = [raw_stream(stack, max_tokens=6000, ignore_eos=True) for _ in range(SEATS + 2)]
        wait_for(lambda: stack.load().get("in_flight") == SEATS, "all seats taken")
        for made in sockets:
            if kind == "half-read":
                made.recv(64)
            if kind == "reset":  # without a goodbye
                made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            made.close()
        wait_for(stack.is_at_rest, f"rest after {kind}")


def test_a_client_that_vanishes_within_a_long_prefill_stops_it(stack: Stack) -> None:
    made = raw_stream(stack, LONG, max_tokens=4)
    wait_for(lambda: is_busy(stack), "the prefill")
    made.close()
    wait_for(stack.is_at_rest, "rest")


def test_a_neuron_that_falls_silent_is_a_time_out_and_is_used_again_once_it_speaks(stack: Stack) -> None:
    stream = endless(stack)
    next(stream)
    stack.neuron.freeze()
    try:
        with pytest.raises(openai.APIError, match="silent"):
            list(stream)
        wait_for(lambda: not stack.is_loaded(), "the gateway noticing")
        with pytest.raises(openai.APIStatusError) as refused:
            stack.ask()
        assert refused.value.status_code in (502, 503, 504)
    finally:
        stack.neuron.thaw()


def test_half_a_request_is_no_request(stack: Stack) -> None:
    host, port = stack.url.removeprefix("http://").split(":")
    for head in (
        b"POST /v1/chat/comp",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{",
        b"GET / HTTP/1.1\r\nhost",
        b"\x16\x03\x01\x02\x00\x01\x00",  # TLS where none is spoken
    ):
        with closing(socket.create_connection((host, int(port)), 10)) as made:
            made.sendall(head)
    assert stack.is_at_rest()


def test_connections_that_are_left_open_take_nothing_from_others(stack: Stack) -> None:
    sent = (
        b"",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{",
        b"GET / HT",
    )
    with ExitStack() as opened:
        for url in (stack.url, stack.neuron_url) * 40:
            host, port = url.removeprefix("http://").split(":")
            made = opened.enter_context(closing(socket.create_connection((host, int(port)), 10)))
            made.sendall(sent[made.fileno() % len(sent)])
        assert stack.is_at_rest()
        assert "London" in stack.ask().choices[0].message.content


def test_short_connections_leave_nothing_behind(stack: Stack) -> None:
    for url in (stack.url, stack.neuron_url) * 200:
        assert get(f"{url}/health")["status"] == "ok"


def test_two_hundred_requests_for_four_seats_are_all_answered(stack: Stack) -> None:
    def ask(number: int) -> str:
        connection = http.client.HTTPConnection(stack.url.removeprefix("http://"), timeout=200)
        with closing(connection):
            connection.request("POST", "/v1/chat/completions", body(max_tokens=2 + number % 3))
            answer = connection.getresponse()
            found = json.loads(answer.read())
            assert answer.status == 200, found
            return str(found["choices"][0]["finish_reason"])

    most = 0
    with ThreadPoolExecutor(200) as pool:
        asked = [pool.submit(ask, number) for number in range(200)]
        while not all(one.done() for one in asked):
            most = max(most, stack.load().get("in_flight", 0))
            time.sleep(0.05)
    assert {one.result() for one in asked} <= {"length", "stop"}
    assert 1 < most <= SEATS


def test_requests_beyond_the_queue_are_sent_away_with_the_time_to_come_back(
    tmp_path: Path, starter_model: Path
) -> None:
    few = "[admission]\nmax_in_flight = 1\nmax_queue_depth = 1\n"
    with running_stack(tmp_path, starter_model, neuron=few) as stack:
        running = raw_stream(stack, max_tokens=6000, ignore_eos=True)
        wait_for(lambda: stack.load().get("in_flight") == 1, "the seat taken")
        waiting = raw_stream(stack, max_tokens=4)
        wait_for(lambda: stack.load().get("queue_depth") == 1, "the queue full")
        with pytest.raises(openai.APIStatusError) as refused:
            stack.ask()
        assert refused.value.status_code in (429, 503)
        assert int(refused.value.response.headers["retry-after"]) >= 1
        running.close()
        received = b""
        while b"[DONE]" not in received:
            received += waiting.recv(65536)
        waiting.close()


def attempt(work: Any) -> Any:
    try:
        return work()
    except Exception as error:
        return error


def post(url: str, asked: Any) -> Any:
    request = urllib.request.Request(url, json.dumps(asked).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def test_the_health_of_both_is_told_all_the_time(stack: Stack) -> None:
    with closing(raw_stream(stack, LONG, max_tokens=300)):
        wait_for(lambda: is_busy(stack), "the prefill")
        for _ in range(20):
            assert get(f"{stack.neuron_url}/health")["status"] == "ok"
            assert get(f"{stack.url}/health")["nodes"]["healthy"] == 1
            time.sleep(0.02)
