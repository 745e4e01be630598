"""The keys file: complete or not at all, for its owner alone, and never a key in it."""

import concurrent.futures
import multiprocessing
import os
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helexa.errors import BadRequest, ConfigError
from helexa.gateway.keys import Limit, add_key, digest, parse_limit, read_keys, revoke_key


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "keys.jsonl"


def test_no_file_is_no_keys(path):
    assert read_keys(path) == ()


def test_what_is_added_is_read_and_what_is_revoked_is_gone(path):
    limits = [Limit("tokens", 100, 60)]
    key, record = add_key(path, "ada", models=["a*"], limits=limits, priority=3, admin=True)
    _, other = add_key(path, "bob")
    assert read_keys(path) == (record, other)
    assert bytes.fromhex(record.digest) == digest(key)
    assert (record.models, record.limits, record.priority, record.admin) == (("a*",), tuple(limits), 3, True)
    assert revoke_key(path, "ada") == record
    assert read_keys(path) == (other,)


def test_the_file_is_for_its_owner_alone_and_stays_so(path):
    before = os.umask(0)
    try:
        add_key(path, "ada")
        assert path.stat().st_mode & 0o777 == 0o600
        path.chmod(0o644)
        add_key(path, "bob")
        assert path.stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(before)
    assert os.listdir(path.parent) == ["keys.jsonl"]


def test_a_link_stays_a_link(path, tmp_path):
    target = tmp_path / "elsewhere" / "keys"
    target.parent.mkdir()
    target.touch(mode=0o600)
    path.parent.mkdir()
    path.symlink_to(target)
    _, record = add_key(path, "ada")
    assert path.is_symlink()
    assert read_keys(target) == (record,)


def test_a_reader_sees_the_old_file_or_the_new_one_also_when_the_disk_is_full(path, monkeypatch):
    add_key(path, "ada")
    before = path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match=r"keys\.jsonl: cannot be written: No space left"):
        add_key(path, "bob")
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["keys.jsonl"]


def test_two_processes_that_add_at_once_lose_nothing(path):
    names = [f"n{number}" for number in range(12)]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(3, mp_context=context) as pool:
        keys = list(pool.map(add_key, [path] * len(names), names))
    assert {record.name for record in read_keys(path)} == set(names)
    assert {digest(key).hex() for key, _ in keys} == {record.digest for record in read_keys(path)}


@given(cut=st.integers(1, 250))
def test_a_file_that_is_half_written_is_refused(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("keys") / "keys.jsonl"
    add_key(path, "ada", models=["x" * 60])
    data = path.read_bytes()
    path.write_bytes(data[: min(cut, len(data) - 1)])
    with pytest.raises(ConfigError, match="the last line has no end"):
        read_keys(path)


LINE = '{{"id":"{id}","name":"{name}","digest":"{digest}","created_at":1{more}}}\n'
VALUES = {"id": "0" * 12, "name": "ada", "digest": "0" * 64, "more": ""}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": "xyz"}, "line 2 is no key"),
        ({"name": "a\\nb"}, "line 2 is no key"),
        ({"name": "\udcff"}, "line 2 is no key"),  # a byte that is no UTF-8
        ({"digest": "0" * 63}, "line 2 is no key"),
        ({"more": ',"priority":101'}, "line 2 is no key"),
        ({"more": ',"limits":[{"unit":"tokens","amount":0,"window_s":1}]'}, "line 2 is no key"),
        ({"more": ',"expires_at":1'}, "unknown field `expires_at`"),
        ({"id": "1" * 12}, "two keys have the id '111111111111'"),
        ({"name": "first"}, "two keys have the name 'first'"),
        ({"digest": "1" * 64}, "two keys have the digest"),
    ],
)
def test_what_is_wrong_in_it_is_named_and_refused(tmp_path, changes, message):
    path = tmp_path / "keys.jsonl"
    first = {"id": "1" * 12, "name": "first", "digest": "1" * 64, "more": ""}
    path.write_text(LINE.format(**first) + LINE.format(**VALUES | changes), errors="surrogateescape")
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=message):
        read_keys(path)


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_may_write_is_not_believed(path, mode):
    add_key(path, "ada")
    path.chmod(mode)
    with pytest.raises(ConfigError, match="others may write this file"):
        read_keys(path)


@pytest.mark.parametrize(
    ("text", "amount", "window_s", "shown"),
    [
        ("60/m", 60, 60, "60 tokens per minute"),
        ("2M/d", 2_000_000, 86400, "2000000 tokens per day"),
        ("5k/90s", 5000, 90, "5000 tokens per 90 seconds"),
        ("1/24h", 1, 86400, "1 tokens per day"),
    ],
)
def test_a_limit_is_written_as_an_amount_in_a_time(text, amount, window_s, shown):
    limit = parse_limit("tokens", text)
    assert limit == Limit("tokens", amount, window_s)
    assert str(limit) == shown


@given(st.text(max_size=12))
def test_any_other_text_is_no_limit(text):
    with suppress(BadRequest):
        limit = parse_limit("requests", text)
        assert limit.amount >= 1
        assert limit.window_s >= 1
