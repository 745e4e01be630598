import stat
from pathlib import Path

import pytest

from helexa.errors import ConfigError, Unavailable
from helexa.gateway import store as store_module
from helexa.gateway.config import StoreSection
from helexa.gateway.store import ResponseStore, StoredResponse

pytestmark = pytest.mark.timeout(60)


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def response(name: str, previous: str | None = None, *, principal: str = "", size: int = 0) -> StoredResponse:
    return StoredResponse(name, principal, previous, b'{"output": []}' + b" " * size, b"[]")


@pytest.fixture(params=["memory", "file"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> str | None:
    return str(tmp_path / "state" / "responses.db") if request.param == "file" else None


async def test_what_is_put_can_be_read_at_once(path: str | None) -> None:
    store = ResponseStore(StoreSection(path))
    store.put(response("a"))
    assert await store.get("a", "") == response("a")
    assert await store.get("b", "") is None
    await store.close()


async def test_responses_belong_to_whoever_made_them(path: str | None) -> None:
    store = ResponseStore(StoreSection(path))
    store.put(response("a", principal="one"))
    assert await store.get("a", "two") is None
    assert not await store.delete("a", "two")
    assert await store.conversation("a", "two") == []
    assert await store.get("a", "one") is not None
    await store.close()


async def test_a_conversation_comes_oldest_first(path: str | None) -> None:
    store = ResponseStore(StoreSection(path))
    for name, previous in (("a", None), ("b", "a"), ("x", "a"), ("c", "b")):
        store.put(response(name, previous))
    assert [stored.id for stored in await store.conversation("c", "")] == ["a", "b", "c"]
    await store.close()


async def test_what_is_deleted_is_gone_and_cuts_what_continues_it(path: str | None) -> None:
    store = ResponseStore(StoreSection(path))
    store.put(response("a"))
    store.put(response("b", "a"))
    assert await store.delete("a", "")
    assert not await store.delete("a", "")
    assert [stored.id for stored in await store.conversation("b", "")] == ["b"]
    await store.close()


async def test_what_is_not_used_expires_and_use_renews_all_of_a_conversation(path: str | None) -> None:
    clock = Clock()
    store = ResponseStore(StoreSection(path, ttl_s=100), clock)
    store.put(response("a"))
    store.put(response("b", "a"))
    store.put(response("alone"))
    assert await store.get("alone", "") is not None
    clock.now += 60
    assert len(await store.conversation("b", "")) == 2
    clock.now += 60
    assert await store.get("alone", "") is None
    assert await store.get("a", "") is not None
    await store.close()


async def test_a_clock_that_jumps_back_loses_nothing(path: str | None) -> None:
    clock = Clock()
    store = ResponseStore(StoreSection(path, ttl_s=100), clock)
    store.put(response("a"))
    assert await store.get("a", "") is not None
    clock.now -= 1_000_000
    store.put(response("b", "a"))
    assert [stored.id for stored in await store.conversation("b", "")] == ["a", "b"]
    await store.close()


async def test_the_least_recently_used_make_room(path: str | None) -> None:
    clock = Clock()
    store = ResponseStore(StoreSection(path, max_bytes=10_000), clock)
    for name in "abcd":
        clock.now += 1
        store.put(response(name, size=2000))
        assert await store.get(name, "") is not None
    clock.now += 1
    await store.conversation("a", "")
    store.put(response("e", size=2000))
    found = [name for name in "abcde" if await store.get(name, "")]
    assert found == ["a", "c", "d", "e"]
    await store.close()


async def test_what_is_larger_than_the_store_is_not_kept(path: str | None) -> None:
    store = ResponseStore(StoreSection(path, max_bytes=1000))
    store.put(response("small"))
    store.put(response("large", size=1000))
    assert await store.get("large", "") is None
    assert await store.get("small", "") is not None
    await store.close()


async def test_a_file_outlives_the_process_and_is_its_owners_only(tmp_path: Path) -> None:
    file = tmp_path / "responses.db"
    store = ResponseStore(StoreSection(str(file)))
    store.put(response("a", size=100))
    await store.close()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    again = ResponseStore(StoreSection(str(file)))
    assert await again.get("a", "") == response("a", size=100)
    await again.close()


async def test_a_full_disk_loses_nothing_that_fits_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(store_module, "MAX_UNWRITTEN_BYTES", 20_000)
    store = ResponseStore(StoreSection(str(tmp_path / "responses.db")))
    pages = await store._run(lambda: store._rows.execute("PRAGMA page_count").fetchone()[0])
    await store._run(lambda: store._rows.execute(f"PRAGMA max_page_count = {pages}").fetchone())
    for index in range(5):
        store.put(response(f"r{index}", size=8000))
        await store.get("r0", "")
    assert "store_failed" in caplog.text
    assert [index for index in range(5) if await store.get(f"r{index}", "")] == [3, 4]
    # Once there is room, what has waited is written.
    await store._run(lambda: store._rows.execute("PRAGMA max_page_count = 1000").fetchone())
    store.put(response("last"))
    await store.close()
    again = ResponseStore(StoreSection(str(tmp_path / "responses.db")))
    assert [name for name in ("r2", "r3", "r4", "last") if await again.get(name, "")] == ["r3", "r4", "last"]
    await again.close()


async def test_a_file_that_cannot_be_read_is_an_error_with_a_status(tmp_path: Path) -> None:
    store = ResponseStore(StoreSection(str(tmp_path / "responses.db")))
    await store._run(lambda: store._rows.execute("DROP TABLE responses"))
    with pytest.raises(Unavailable, match="the store of responses cannot be read"):
        await store.get("a", "")
    await store.close()


def test_a_file_of_something_else_ends_the_start(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("These are notes, and no database at all. " * 100)
    with pytest.raises(ConfigError, match=r"store.path: .*notes.txt cannot be used"):
        ResponseStore(StoreSection(str(file)))
    assert file.read_text().startswith("These are notes")


def test_a_folder_that_is_none_ends_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"store.path"):
        ResponseStore(StoreSection(str(tmp_path / "file" / "responses.db")))
