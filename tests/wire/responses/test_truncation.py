"""Conversations that are too long are shortened."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helexa.errors import ContextTooLong, HelexaError
from helexa.wire.responses import shortened
from support.responses import Json


def too_long(found: int, most: int) -> ContextTooLong:
    return ContextTooLong("too long", max=most, prompt_tokens=found)


def test_a_conversation_is_shortened_from_its_beginning() -> None:
    said = [{"role": "system", "content": "Be brief."}]
    said += [{"role": role, "content": f"{n} " * 50} for n in range(6) for role in ("user", "assistant")]
    said += [{"role": "user", "content": "Go on."}]
    body = json.dumps({"model": "tiny", "messages": said, "max_completion_tokens": 10}).encode()
    shorter = shortened(body, too_long(700, 400))
    assert shorter is not None
    left = json.loads(shorter)["messages"]
    assert left[0] == said[0]
    assert left[1:] == said[7:]
    assert json.loads(shorter) | {"messages": said} == json.loads(body)


def test_the_results_of_a_call_go_with_it() -> None:
    said = [
        {"role": "user", "content": "x" * 100},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "tool", "tool_call_id": "c", "content": "y" * 900},
        {"role": "assistant", "content": "The last."},
    ]
    shorter = shortened(json.dumps({"messages": said}).encode(), too_long(300, 290))
    assert shorter is not None
    assert json.loads(shorter)["messages"] == said[3:]


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ([{"role": "user", "content": "x"}], too_long(9, 5)),
        ([{"role": "system", "content": "x"}, {"role": "user", "content": "x"}], too_long(9, 5)),
        (
            [{"role": "assistant", "content": None}, {"role": "tool", "tool_call_id": "c", "content": "x"}],
            too_long(9, 5),
        ),
        ([{"role": "user", "content": "x"}] * 3, ContextTooLong("nobody counted")),
    ],
)
def test_what_cannot_be_shortened_is_not(said: list[Json], error: HelexaError) -> None:
    assert shortened(json.dumps({"messages": said}).encode(), error) is None


@given(
    st.lists(st.sampled_from(["system", "user", "assistant", "tool"]), min_size=1, max_size=12),
    st.integers(2, 1000),
    st.integers(1, 2000),
)
def test_every_shortening_is_shorter_and_keeps_both_ends(roles: list[str], most: int, over: int) -> None:
    said = [{"role": role, "content": str(index)} for index, role in enumerate(roles)]
    left = said
    while (
        shorter := shortened(json.dumps({"messages": left}).encode(), too_long(most + over, most))
    ) is not None:
        fewer = json.loads(shorter)["messages"]
        assert len(fewer) < len(left)
        assert fewer[-1] == said[-1]
        assert (roles[0] == "system") == (fewer[0]["role"] == "system" and fewer[0] == said[0])
        left = fewer
