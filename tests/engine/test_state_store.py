import logging
import os
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helexa.engine.state_store import StateStore, tail_name

ROOM = 10**6


@pytest.fixture(params=["memory", "disk", "both"])
def store(request, tmp_path):
    options = {}
    if request.param != "disk":
        options |= {"host_bytes": ROOM}
    if request.param != "memory":
        options |= {"path": tmp_path / "states", "max_bytes": ROOM}
    return StateStore(**options)


def test_what_was_put_comes_back_as_one_piece(store):
    assert store.put("ab", [b"one", bytearray(b" and "), memoryview(b"two")])
    assert "ab" in store
    assert store.get("ab") == b"one and two"
    assert store.get("cd") is None


def test_an_entry_is_replaced_as_a_whole(store):
    store.put("ab", [b"a long one"])
    store.put("ab", [b"short"])
    assert store.get("ab") == b"short"


def test_removed_is_gone(store):
    store.put("ab", [b"x"])
    store.remove("ab")
    store.remove("ab")
    assert "ab" not in store
    assert store.get("ab") is None
    assert (store.held_bytes, store.disk_bytes) == (0, 0)


def test_tails_are_known_by_what_they_follow(store):
    for length, own in ((7, "aa"), (7, "bb"), (9, "cc")):
        store.put(tail_name("00", length, own), [b"x"])
    assert sorted(store.lengths("00")) == [7, 9]
    store.remove(tail_name("00", 7, "aa"))
    assert sorted(store.lengths("00")) == [7, 9]
    store.remove(tail_name("00", 7, "bb"))
    assert store.lengths("00") == [9]
    assert store.lengths("11") == []


def test_beyond_the_budget_the_least_recently_used_goes():
    store = StateStore(host_bytes=30)
    for name in ("aa", "bb", "cc"):
        store.put(name, [bytes(10)])
    store.touch(["aa"])
    store.put("dd", [bytes(10)])
    assert [name in store for name in ("aa", "bb", "cc", "dd")] == [True, False, True, True]
    assert store.held_bytes == 30
    assert not store.put("ee", [bytes(31)])


def test_what_leaves_the_memory_stays_on_disk(tmp_path):
    store = StateStore(host_bytes=10, path=tmp_path, max_bytes=ROOM)
    store.put("aa", [b"0123456789"])
    store.put("bb", [b"9876543210"])
    assert store.held_bytes == 10
    assert (store.get("aa"), store.get("bb")) == (b"0123456789", b"9876543210")


def test_a_new_process_finds_the_files_and_their_order(tmp_path):
    store = StateStore(path=tmp_path, max_bytes=ROOM)
    names = ["aa", "bb", tail_name("bb", 4, "cc")]
    for index, name in enumerate(names):
        store.put(name, [name.encode()])
        os.utime(tmp_path / f"{name}.state", (index, index))
    store.touch(["aa"])
    store = StateStore(path=tmp_path, max_bytes=store.disk_bytes)
    assert [store.get(name) for name in names] == [name.encode() for name in names]
    assert store.lengths("bb") == [4]
    store.put("dd", [b"dd"])
    assert [name in store for name in [*names, "dd"]] == [True, False, True, True]
    assert {path.name for path in tmp_path.iterdir()} == {"aa.state", "bb-4-cc.state", "dd.state"}


def test_files_and_folder_are_private(tmp_path):
    store = StateStore(path=tmp_path / "states", max_bytes=ROOM)
    store.put("aa", [b"x"])
    assert stat.S_IMODE((tmp_path / "states").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "states" / "aa.state").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        lambda data: data[:-1],
        lambda data: data + b"x",
        lambda data: data[:20],
        lambda data: b"",
        lambda data: b"other!!!" + data[8:],
        lambda data: data[:8] + b"\x09" + data[9:],
    ],
)
def test_a_damaged_file_counts_as_absent_and_is_removed(tmp_path, caplog, damage):
    store = StateStore(path=tmp_path, max_bytes=ROOM)
    store.put("aa", [b"content"])
    path = tmp_path / "aa.state"
    path.write_bytes(damage(path.read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert store.get("aa") is None
    assert caplog.messages == ["state_ignored"]
    assert not path.exists()
    assert "aa" not in store
    assert (store.num_entries, store.num_damaged) == (0, 1)


def test_a_file_that_somebody_has_removed_counts_as_absent(tmp_path):
    store = StateStore(path=tmp_path, max_bytes=ROOM)
    for name in ("aa", "bb"):
        store.put(name, [b"x"])
        (tmp_path / f"{name}.state").unlink()
    assert store.get("aa") is None
    store.touch(["bb"])
    assert "bb" not in store
    assert store.disk_bytes == 0


def test_a_disk_that_cannot_be_written_to_is_no_error(tmp_path, caplog):
    store = StateStore(path=tmp_path / "states", max_bytes=ROOM)
    (tmp_path / "states").rmdir()
    with caplog.at_level(logging.WARNING):
        assert not store.put("aa", [b"x"])
    assert caplog.messages == ["state_not_written"]
    assert "aa" not in store


def test_other_files_are_left_alone_and_unfinished_ones_removed(tmp_path):
    for name in ("notes.txt", "aa.1-2.partial", "a-b.state"):
        (tmp_path / name).write_bytes(b"x")
    StateStore(path=tmp_path, max_bytes=0)
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", "a-b.state"}


@given(
    st.lists(
        st.tuples(st.sampled_from(["put", "get", "touch", "remove"]), st.integers(0, 5), st.integers(0, 40)),
        max_size=40,
    ),
    st.integers(0, 100),
)
def test_whatever_is_done_the_budget_holds_and_what_is_there_is_right(actions, budget):
    store = StateStore(host_bytes=budget)
    expected = {}
    for action, number, size in actions:
        name = tail_name(f"{number % 2}", number + 1, f"{number}")
        if action == "put" and store.put(name, [bytes([number]) * size]):
            expected[name] = bytes([number]) * size
        elif action == "touch":
            store.touch([name])
        elif action == "remove":
            store.remove(name)
        held = {key: store.get(key) for key in expected if key in store}
        assert all(value == expected[key] for key, value in held.items())
        assert store.held_bytes == sum(len(value) for value in held.values()) <= budget
        lengths = sorted(int(key.split("-")[1]) for key in held)
        assert sorted([*store.lengths("0"), *store.lengths("1")]) == lengths
