"""The arithmetic of `helexa bench`, and how it drives processes; no speed is asserted."""

import io
import json
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from helexa.cli.bench import bench, busy_processes, report, run_peer, run_process, summarize, table
from helexa.cli.measure import Timeline, Workload, rates
from helexa.errors import BadRequest, HelexaError

GIB = 2**30


def workload(path: Path, **changes: int) -> Workload:
    path.write_bytes(bytes(1000))
    return Workload(
        **{"model": str(path), "prompt": 512, "generate": 4, "depth": 0, "streams": 1, "threads": 2} | changes
    )


def test_one_stream_is_timed_between_its_first_and_last_token() -> None:
    line = Timeline(times_s=[2.0, 2.5, 3.0], counts=[1, 1, 1], cached_tokens=0)
    assert rates([line], 100) == {"prefill_tok_s": 50.0, "ttft_ms": 2000.0, "decode_tok_s": 2.0}


def test_cached_tokens_do_not_count_as_prefilled() -> None:
    assert rates([Timeline([1.0], [1], cached_tokens=256)], 768)["prefill_tok_s"] == 512.0


def test_several_streams_decode_only_while_all_of_them_do() -> None:
    early = Timeline([1.0, 2.0, 3.0, 4.0], [1, 1, 1, 1], 0)
    late = Timeline([2.0, 3.0, 4.0, 5.0], [1, 1, 1, 1], 0)
    found = rates([early, late], 10)
    assert found["decode_tok_s"] == pytest.approx(4 / 2)  # two of each between 2 s and 4 s
    assert found["prefill_tok_s"] == pytest.approx(20 / 2)


def test_a_stream_of_one_token_has_no_decode_speed() -> None:
    assert "decode_tok_s" not in rates([Timeline([1.0], [1], 0)], 10)


def test_the_cache_holds_every_stream_in_whole_pages(tmp_path: Path) -> None:
    work = workload(tmp_path / "m.gguf", depth=1000, prompt=500, streams=3)
    assert work.max_context >= 1505
    assert work.kv_cache_tokens % 256 == 0
    assert work.kv_cache_tokens >= 3 * work.max_context


def test_a_summary_has_median_extremes_and_half_the_range() -> None:
    found = summarize([90.0, 100.0, 120.0])
    assert (found["median"], found["min"], found["max"], found["spread_percent"]) == (
        100.0,
        90.0,
        120.0,
        15.0,
    )


def test_the_report_compares_runs_pair_by_pair_and_names_the_share_of_bandwidth(tmp_path: Path) -> None:
    work = workload(tmp_path / "m.gguf")
    own = [
        {
            "prefill_tok_s": p,
            "decode_tok_s": d,
            "ttft_ms": 5.0,
            "load_s": 1.0,
            "peak_memory_bytes": GIB,
            "bytes_per_token": 10**8,
        }
        for p, d in ((300.0, 60.0), (200.0, 40.0), (100.0, 50.0))
    ]
    peer = [
        {"prefill_tok_s": p / 2, "decode_tok_s": 40.0, "peak_memory_bytes": 2 * GIB}
        for p in (300.0, 200.0, 100.0)
    ]
    document = report(work, own, peer, 20e9)
    assert document["ratios"] == {"prefill_tok_s": 2.0, "decode_tok_s": 1.25, "peak_memory_bytes": 0.5}
    assert document["bandwidth_share"] == pytest.approx(50 * 10**8 / 20e9)
    assert document["file_bytes"] == 1000
    assert json.loads(json.dumps(document)) == document
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table(document))
    text = console.export_text()
    assert "2.00x" in text
    assert "25 % of 20.0 GB/s" in text


def test_a_report_without_peer_has_no_ratios(tmp_path: Path) -> None:
    own = {"decode_tok_s": 10.0, "load_s": 1.0, "peak_memory_bytes": GIB, "bytes_per_token": 10}
    document = report(workload(tmp_path / "m.gguf", prompt=0), [own], [], 1e9)
    assert "ratios" not in document
    assert "prefill_tok_s" not in document["helexa"]


def test_a_process_returns_its_output_and_its_peak_memory() -> None:
    output, peak = run_process([sys.executable, "-c", "block = bytearray(200 << 20); print('done')"])
    assert output == "done\n"
    assert 200 << 20 < peak < 2 * GIB


def test_a_failed_process_is_reported_with_the_end_of_its_errors() -> None:
    with pytest.raises(HelexaError, match=r"status 3:\nthe reason"):
        run_process([sys.executable, "-c", "import sys; print('the reason', file=sys.stderr); sys.exit(3)"])


def test_a_program_that_is_not_there_is_named() -> None:
    with pytest.raises(BadRequest, match="/no/such/program cannot be run"):
        run_process(["/no/such/program"])


def test_the_peer_gets_the_same_workload_and_its_json_is_understood(tmp_path: Path) -> None:
    binary = tmp_path / "llama-bench"
    tests = [{"n_prompt": 512, "n_gen": 0, "avg_ts": 321.5}, {"n_prompt": 0, "n_gen": 4, "avg_ts": 45.5}]
    binary.write_text(f"#!/bin/sh\necho \"$@\" > {tmp_path}/arguments\necho '{json.dumps(tests)}'\n")
    binary.chmod(binary.stat().st_mode | stat.S_IXUSR)
    work = workload(tmp_path / "m.gguf", depth=7)
    found = run_peer(binary, work)
    assert (found["prefill_tok_s"], found["decode_tok_s"]) == (321.5, 45.5)
    assert found["peak_memory_bytes"] > 0
    assert (
        tmp_path / "arguments"
    ).read_text().split() == f"-m {work.model} -t 2 -r 1 -o json -p 512 -n 4 -d 7".split()


def test_on_a_device_the_peer_runs_there_and_memory_is_not_compared(tmp_path: Path) -> None:
    binary = tmp_path / "llama-bench"
    tests = [{"n_prompt": 0, "n_gen": 4, "avg_ts": 45.5}]
    binary.write_text(f"#!/bin/sh\necho \"$@\" > {tmp_path}/arguments\necho '{json.dumps(tests)}'\n")
    binary.chmod(binary.stat().st_mode | stat.S_IXUSR)
    work = replace(workload(tmp_path / "m.gguf", prompt=0), device="cuda:0")
    peer = run_peer(binary, work)
    assert peer == {"decode_tok_s": 45.5}
    assert (tmp_path / "arguments").read_text().split()[-2:] == ["-ngl", "99"]
    own = {"decode_tok_s": 91.0, "load_s": 1.0, "peak_memory_bytes": GIB, "bytes_per_token": 10**9}
    document = report(work, [own], [peer], 1e12)
    assert document["device"] == "cuda:0"
    assert document["ratios"] == {"decode_tok_s": 2.0}
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table(document))
    text = console.export_text()
    for part in ("m.gguf: cuda:0, depth 0", "device memory, MiB", "copy bandwidth used by decode", "9 % of"):
        assert part in text


@pytest.mark.parametrize("name", ["auto", "cuda", "gpu:0", ""])
def test_a_device_has_to_be_one(name: str, tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="--device is"):
        bench(str(tmp_path / "m.gguf"), device=name)


def test_busy_processes_compute_and_are_gone_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Recorded(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *args: object, **keywords: object) -> None:
            super().__init__(*args, **keywords)  # type: ignore[call-overload]
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    with busy_processes(2):
        assert [process.poll() for process in started] == [None, None]
    assert all(process.poll() is not None for process in started)
    assert len(started) == 2
