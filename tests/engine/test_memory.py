"""Main memory, read from files that the test writes."""

import pytest
import torch

from helexa.engine import memory
from helexa.engine.memory import allocation_errors, available_bytes, release, resident_bytes, total_bytes
from helexa.errors import OutOfMemory


@pytest.fixture
def host(tmp_path):
    (tmp_path / "self").mkdir()
    (tmp_path / "meminfo").write_text("MemTotal:  8000 kB\nMemAvailable:  6000 kB\nHugePages_Total:  0\n")
    (tmp_path / "self/status").write_text(
        "Name:\tpython\nRssAnon:\t 300 kB\nRssFile:\t 900 kB\nRssShmem:\t 20 kB\n"
    )
    (tmp_path / "cgroup").mkdir()
    return tmp_path


def limit(folder, limit, used, reclaimable=0, version=2):
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 100\n{names[2]} {reclaimable}\n")


def measured(host):
    return total_bytes(host, host / "cgroup"), available_bytes(host, host / "cgroup")


def test_without_a_limit_the_host_counts(host):
    limit(host / "cgroup", "max", 5)
    assert measured(host) == (8000 * 1024, 6000 * 1024)
    assert resident_bytes(host) == 320 * 1024


@pytest.mark.parametrize(
    ("version", "membership", "root"),
    [(2, "0::/outer/inner\n", ""), (1, "5:cpu,memory:/outer/inner\n0::/\n", "memory")],
)
def test_the_tightest_of_the_groups_around_the_process_counts(host, version, membership, root):
    (host / "self/cgroup").write_text(membership)
    top = host / "cgroup" / root
    limit(top / "outer/inner", 7_000_000, 1_000_000, version=version)
    assert measured(host) == (7_000_000, 6_000_000)
    limit(top / "outer", 5_000_000, 4_000_000, 500_000, version=version)
    assert measured(host) == (5_000_000, 1_500_000)
    limit(top / "other", 10, 10, version=version)
    assert measured(host) == (5_000_000, 1_500_000)


def test_in_a_container_the_group_may_be_mounted_at_the_top(host):
    (host / "self/cgroup").write_text("4:memory:/docker/abc\n0::/../..\n")
    limit(host / "cgroup/memory", 3_000_000, 1_000_000, version=1)
    assert measured(host) == (3_000_000, 2_000_000)


def test_the_boundless_limit_of_version_1_is_none(host):
    limit(host / "cgroup/memory", 2**63 - 4096, 1_000_000, version=1)
    assert measured(host) == (8000 * 1024, 6000 * 1024)


def test_a_group_beyond_its_limit_leaves_nothing(host):
    limit(host / "cgroup", 1000, 2000)
    assert available_bytes(host, host / "cgroup") == 0


def test_a_host_without_proc_has_no_memory_that_we_know_of(tmp_path):
    assert measured(tmp_path) == (0, 0)
    assert resident_bytes(tmp_path) == 0


def test_this_process_has_memory_and_can_give_some_back():
    assert 2**20 < resident_bytes() <= total_bytes()
    assert 2**20 < available_bytes() < 2**50
    release()


def test_a_system_with_another_c_library_is_no_error(monkeypatch):
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    release()


def test_an_allocation_that_fails_is_out_of_memory():
    with pytest.raises(OutOfMemory, match="does not suffice"), allocation_errors():
        torch.empty(2**60, dtype=torch.uint8)
    for error in (MemoryError(), OSError(12, "Cannot allocate memory")):
        with pytest.raises(OutOfMemory), allocation_errors():
            raise error


@pytest.mark.parametrize(
    "error", [RuntimeError("mat1 and mat2"), OSError(2, "no such file"), ValueError("memory")]
)
def test_other_errors_are_what_they_are(error):
    with pytest.raises(type(error)) as caught, allocation_errors():
        raise error
    assert caught.value is error
