"""Who leaves when room is needed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helexa.gateway.evictor import Resident, victims


def resident(model, rank=100, memory=10, last_used=0.0, is_kept=False):
    return Resident(model, rank, memory, last_used, is_kept)


OLD, NEW, LOW = (
    resident("old", last_used=1),
    resident("new", last_used=9),
    resident("low", rank=50, last_used=10),
)


@pytest.mark.parametrize(
    ("residents", "needed", "rank", "strategy", "expected"),
    [
        pytest.param([OLD], 0, 100, "priority", (), id="nobody leaves without need"),
        pytest.param([OLD], -5, 100, "priority", (), id="nobody leaves when more than enough is free"),
        pytest.param([NEW, OLD], 5, 100, "priority", ("old",), id="the least recently used goes"),
        pytest.param([NEW, OLD], 15, 100, "priority", ("old", "new"), id="as many as it takes"),
        pytest.param([NEW, OLD], 25, 100, "priority", None, id="nobody leaves in vain"),
        pytest.param([LOW, OLD], 5, 100, "priority", ("low",), id="the lower class goes first"),
        pytest.param([LOW, OLD], 5, 100, "lru", ("old",), id="lru looks at the time alone"),
        pytest.param([OLD], 5, 99, "priority", None, id="a higher class stays"),
        pytest.param([OLD], 5, 100, "priority", ("old",), id="equal classes displace each other"),
        pytest.param([resident("busy", is_kept=True)], 5, 100, "priority", None, id="who works stays"),
        pytest.param(
            [resident("unknown", memory=0), OLD], 5, 100, "priority", ("old",), id="no known room, no use"
        ),
        pytest.param(
            [resident("small", memory=2, last_used=1), resident("big", memory=20, last_used=2)],
            15,
            100,
            "priority",
            ("big",),
            id="who turns out not to be needed stays",
        ),
    ],
)
def test_the_victims(residents, needed, rank, strategy, expected):
    assert victims(residents, needed, rank, strategy) == expected


residents_of_any_kind = st.lists(
    st.builds(
        Resident,
        model=st.text("abcdef", min_size=1, max_size=3),
        rank=st.integers(0, 3),
        memory_bytes=st.integers(0, 50),
        last_used=st.floats(0, 10),
        is_kept=st.booleans(),
    ),
    unique_by=lambda resident: resident.model,
    max_size=8,
)


@given(residents_of_any_kind, st.integers(-10, 200), st.integers(0, 3), st.sampled_from(["priority", "lru"]))
def test_victims_make_enough_room_and_none_of_them_could_stay(residents, needed, rank, strategy):
    named = victims(residents, needed, rank, strategy)
    by_name = {resident.model: resident for resident in residents}
    may_go = [resident for resident in residents if resident.rank <= rank and not resident.is_kept]
    if named is None:
        assert sum(resident.memory_bytes for resident in may_go) < needed
        return
    chosen = [by_name[model] for model in named]
    assert all(resident in may_go for resident in chosen)
    freed = sum(resident.memory_bytes for resident in chosen)
    assert freed >= needed
    assert all(freed - resident.memory_bytes < needed for resident in chosen)
