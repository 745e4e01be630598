"""`helexa bench`: how fast a model runs on this machine, how much memory it takes, and how that compares.

Every repetition is a fresh process. With `--peer` each is followed by one of llama.cpp's `llama-bench`
on the same file and number of threads, so that both see the same noise. On a CUDA device memory is the
device's, of which nothing is known of the peer.
"""

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from helexa import __version__
from helexa.cli.local import local_model, usable_cpus
from helexa.cli.measure import Workload
from helexa.errors import BadRequest, HelexaError

METRICS = ("prefill_tok_s", "decode_tok_s", "ttft_ms", "load_s", "peak_memory_bytes")


def run_process(command: Sequence[str]) -> tuple[str, int]:
    """What a command wrote to stdout, and the peak of its resident memory in bytes.

    Raises HelexaError with the end of its stderr when it fails. The kernel counts the memory of the starting
    process into the peak, so this one must stay small.
    """
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors)
        except OSError as error:
            raise BadRequest(f"{command[0]} cannot be run: {error.strerror}") from None
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        errors.seek(0)
        if process.returncode != 0:
            tail = "\n".join(errors.read().splitlines()[-15:])
            raise HelexaError(f"{Path(command[0]).name} ended with status {process.returncode}:\n{tail}")
        return output.read(), usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run_own(work: Workload) -> dict[str, float]:
    """One measurement of helexa in a fresh process."""
    return _in_fresh_process(asdict(work))


def run_peer(binary: Path, work: Workload) -> dict[str, float]:
    """One measurement of `llama-bench` with the same file, threads and token counts; on its first devices."""
    command = [str(binary), "-m", work.model, "-t", str(work.threads), "-r", "1", "-o", "json"]
    command += ["-p", str(work.prompt), "-n", str(work.generate), "-d", str(work.depth)]
    command += [] if work.device == "cpu" else ["-ngl", "99"]
    output, peak = run_process(command)
    found: dict[str, float] = {"peak_memory_bytes": peak} if work.device == "cpu" else {}
    for test in json.loads(output):
        found["decode_tok_s" if test["n_gen"] else "prefill_tok_s"] = test["avg_ts"]
    return found


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Keeps that many other processes computing, as a compiler or another model beside us would."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measure_bandwidth(work: Workload) -> float:
    """Bytes per second that the threads read from memory, or that the device copies; in a fresh process."""
    return _in_fresh_process({"threads": work.threads, "device": work.device})["bytes_s"]


def _in_fresh_process(specification: dict[str, Any]) -> dict[str, float]:
    code = "import sys; from helexa.cli.measure import main; main(sys.argv[1])"
    output, _ = run_process([sys.executable, "-c", code, json.dumps(specification)])
    return dict(json.loads(output.splitlines()[-1]))


def summarize(values: Sequence[float]) -> dict[str, Any]:
    """Median, extremes and half the range as a percentage of the median."""
    middle = statistics.median(values)
    spread = 50 * (max(values) - min(values)) / middle if middle else 0.0
    return {
        "median": middle,
        "min": min(values),
        "max": max(values),
        "spread_percent": spread,
        "values": list(values),
    }


def report(
    work: Workload,
    own: Sequence[dict[str, float]],
    peer: Sequence[dict[str, float]],
    bandwidth_bytes_s: float,
    busy: int = 0,
) -> dict[str, Any]:
    """The JSON document of a benchmark: workload, machine, both sides' figures, ratios (ours ÷ peer's)."""

    def side(runs: Sequence[dict[str, float]]) -> dict[str, Any]:
        return {
            name: summarize([run[name] for run in runs])
            for name in METRICS
            if all(name in run for run in runs)
        }

    document: dict[str, Any] = {
        "helexa_version": __version__,
        "model": Path(work.model).name,
        "file_bytes": _file_bytes(Path(work.model)),
        "bytes_per_token": own[0]["bytes_per_token"],
        "cpu": cpu_name(),
        "device": work.device,
        "threads": work.threads,
        **{name: getattr(work, name) for name in ("prompt", "generate", "depth", "streams")},
        "busy_processes": busy,
        "repeat": len(own),
        "read_bandwidth_bytes_s": bandwidth_bytes_s,
        "helexa": side(own),
    }
    if "decode_tok_s" in document["helexa"]:
        steps_s = document["helexa"]["decode_tok_s"]["median"] / work.streams
        document["bandwidth_share"] = steps_s * own[0]["bytes_per_token"] / bandwidth_bytes_s
    if peer:
        document["peer"] = side(peer)
        document["ratios"] = {
            name: statistics.median(ours[name] / theirs[name] for ours, theirs in zip(own, peer, strict=True))
            for name in METRICS
            if name in document["helexa"] and name in document["peer"]
        }
    return document


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def table(document: dict[str, Any]) -> Table:
    """The document for a person."""
    peer = document.get("peer")
    is_cpu = document["device"] == "cpu"
    where = f"{document['threads']} threads" if is_cpu else document["device"]
    view = Table(
        title=f"{document['model']}: {where}, depth {document['depth']}, "
        f"{document['streams']} stream(s), median of {document['repeat']}"
        + (f", beside {document['busy_processes']} busy" if document["busy_processes"] else "")
    )
    for column in ("", "helexa", *(("llama.cpp", "ratio") if peer else ())):
        view.add_column(column, justify="right" if column else "left", no_wrap=True)
    rows: dict[str, tuple[str, Callable[[float], str]]] = {
        "prefill_tok_s": (f"prefill {document['prompt']}, tok/s", lambda value: f"{value:.1f}"),
        "decode_tok_s": (f"decode {document['generate']}, tok/s", lambda value: f"{value:.2f}"),
        "ttft_ms": ("time to first token, ms", lambda value: f"{value:.1f}"),
        "load_s": ("load, s", lambda value: f"{value:.2f}"),
        "peak_memory_bytes": (
            "peak memory, MiB" if is_cpu else "device memory, MiB",
            lambda value: f"{value / 2**20:.0f}",
        ),
    }
    for name, (label, show) in rows.items():
        if name not in document["helexa"]:
            continue
        cells = [_cell(side.get(name), show) for side in (document["helexa"], *((peer,) if peer else ()))]
        if peer:
            cells.append(f"{document['ratios'][name]:.2f}x" if name in document["ratios"] else "")
        view.add_row(label, *cells)
    if "bandwidth_share" in document:
        bandwidth = f"{document['read_bandwidth_bytes_s'] / 1e9:.1f} GB/s"
        view.add_row(
            "read bandwidth used by decode" if is_cpu else "copy bandwidth used by decode",
            f"{100 * document['bandwidth_share']:.0f} % of {bandwidth}",
        )
    return view


def _cell(summary: dict[str, Any] | None, show: Callable[[float], str]) -> str:
    return f"{show(summary['median'])} ± {summary['spread_percent']:.0f} %" if summary else ""


def _file_bytes(path: Path) -> int:
    """Of a GGUF file, or of a directory's weights."""
    files = path.glob("*.safetensors") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def bench(
    model: Annotated[str, typer.Argument(help="a path, or a name that `helexa models` lists")],
    prompt: Annotated[int, typer.Option(min=0, help="tokens of the timed prompt")] = 512,
    generate: Annotated[int, typer.Option(min=0, help="tokens to generate")] = 128,
    depth: Annotated[int, typer.Option(min=0, help="tokens of context before anything is timed")] = 0,
    streams: Annotated[int, typer.Option(min=1, help="sequences at the same time")] = 1,
    busy: Annotated[int, typer.Option(min=0, help="other processes that compute all the while")] = 0,
    repeat: Annotated[int, typer.Option(min=1, help="fresh processes per side")] = 3,
    threads: Annotated[int | None, typer.Option(min=1, help="threads; all that this process may use")] = None,
    device: Annotated[str, typer.Option(metavar="cpu|cuda:N", help="where the model runs")] = "cpu",
    peer: Annotated[Path | None, typer.Option(help="llama.cpp's llama-bench, to alternate with ours")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON document")] = False,
) -> None:
    """Measure prefill, decode, time to first token, load time and peak memory of a model."""
    if peer is not None and streams > 1:
        raise BadRequest("--peer compares one stream; leave --streams at 1")
    if not prompt and not generate:
        raise BadRequest("nothing to measure: give --prompt or --generate")
    if not re.fullmatch(r"cpu|cuda:\d+", device):
        raise BadRequest(f"--device is {device!r}; expected cpu, cuda:0, cuda:1, ...")
    path = local_model(model)
    work = Workload(str(path), prompt, generate, depth, streams, threads or usable_cpus(), device=device)
    console = Console(stderr=True)
    own: list[dict[str, float]] = []
    others: list[dict[str, float]] = []
    with console.status("measuring the memory's bandwidth") as status:
        bandwidth = measure_bandwidth(work)
        for index in range(repeat):
            with busy_processes(busy):
                status.update(f"run {index + 1} of {repeat}")
                own.append(run_own(replace(work, seed=index)))
                if peer is not None:
                    status.update(f"run {index + 1} of {repeat}: {peer.name}")
                    others.append(run_peer(peer, work))
    document = report(work, own, others, max(bandwidth, measure_bandwidth(work)), busy)
    if as_json:
        typer.echo(json.dumps(document))
    else:
        Console().print(table(document))
