"""Times ops: `python bench/run.py op quant_matmul [more ...] [--threads 2] [--device cuda]`.

Runs the op's tests first and refuses to time a red op. Each case of `bench/ops/bench_<op>.py` (its `cases`,
or `cuda_cases` for a CUDA device) is a call with the bytes it must move and the operations it must do; the
table gives the least and the median time, GB/s with its share of the measured bandwidth (a CPU's reads, a
device's copy), and GFLOP/s. Those of a device are captured in a graph, which is replayed between two events;
they go round so many weights that none waits in the second-level cache. The last line of the output is one
JSON document.
"""

import argparse
import importlib.util
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STREAM_BYTES = 256e6  # of a device's weights that a case goes round


@dataclass
class Case:
    """One timed call: `run` does the work once, moving `nbytes` and doing `operations` arithmetic operations.

    calls: how many alike it consists of; the times shown are of one.
    """

    name: str
    run: Callable[[], object]
    nbytes: float
    operations: float
    calls: int = 1


def measure(case: Case, *, seconds: float = 0.5, least: int = 5) -> list[float]:
    """Seconds of each repetition, after one warm-up."""
    case.run()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < end:
        start = time.perf_counter()
        case.run()
        times.append(time.perf_counter() - start)
    return times


def measure_on_device(case: Case, *, seconds: float = 0.2, least: int = 10) -> list[float]:
    """Seconds of each replay of the case, captured in a graph."""
    import torch

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        case.run()
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            case.run()
        times: list[float] = []
        graph.replay()
        end = time.perf_counter() + seconds
        while len(times) < least or time.perf_counter() < end:
            begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begun.record()
            graph.replay()
            ended.record()
            ended.synchronize()
            times.append(begun.elapsed_time(ended) / 1e3)
    return times


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a large copy on the device."""
    import torch

    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    copy = Case("copy", lambda: target.copy_(source), 2.0 * source.nbytes, 0)
    return copy.nbytes / statistics.median(measure_on_device(copy))


def rounds(nbytes: float) -> range:
    """How often to repeat a case of so many bytes, each time with other ones, to leave the cache behind."""
    return range(max(1, math.ceil(STREAM_BYTES / nbytes)))


def load_bench(op: str) -> ModuleType:
    path = ROOT / "bench" / "ops" / f"bench_{op}.py"
    if not path.exists():
        known = ", ".join(sorted(p.stem.removeprefix("bench_") for p in path.parent.glob("bench_*.py")))
        sys.exit(f"there is no bench for {op!r}; known: {known}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    sys.path.insert(0, str(ROOT))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def verify(op: str, device: str) -> None:
    """Exits unless the op's tests for the device pass."""
    test = ROOT / "tests" / "ops" / f"test_{op}.py"
    if device != "cpu" and test.with_stem(test.stem + "_cuda").exists():
        test = test.with_stem(test.stem + "_cuda")
    marks = ("-m", "not cuda" if device == "cpu" else "cuda")
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", *marks, str(test)]
    if subprocess.run(command, cwd=ROOT).returncode != 0:
        sys.exit(f"{op} fails its tests: nothing to time")


def bench_op(op: str, device: str, bandwidth: float) -> dict[str, Any]:
    module = load_bench(op)
    name = "cases" if device == "cpu" else "cuda_cases"
    if not hasattr(module, name):
        sys.exit(f"{op} has no cases for {device}")
    cases: Iterable[Case] = getattr(module, name)()
    timed = measure if device == "cpu" else measure_on_device
    rows = []
    print(f"{'case':44} {'least us':>10} {'median us':>10} {'GB/s':>8} {'of best':>8} {'GFLOP/s':>9}")
    for case in cases:
        times = timed(case)
        best = min(times) if device == "cpu" else statistics.median(times)
        row = {
            "case": case.name,
            "least_us": min(times) / case.calls * 1e6,
            "median_us": statistics.median(times) / case.calls * 1e6,
            "gb_per_s": case.nbytes / best / 1e9,
            "share_of_bandwidth": case.nbytes / best / bandwidth,
            "gflop_per_s": case.operations / best / 1e9,
        }
        rows.append(row)
        print(
            f"{case.name:44} {row['least_us']:10.1f} {row['median_us']:10.1f} {row['gb_per_s']:8.1f} "
            f"{row['share_of_bandwidth']:8.0%} {row['gflop_per_s']:9.1f}",
            flush=True,
        )
    return {"op": op, "cases": rows}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    op = commands.add_parser("op", help="time one op")
    op.add_argument("names", nargs="+")
    op.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    op.add_argument("--threads", type=int, default=0, help="0 stands for the physical cores")
    op.add_argument("--no-verify", action="store_true", help="skip the op's tests")
    args = parser.parse_args()
    if not args.no_verify:
        for name in args.names:
            verify(name, args.device)
    from helexa import ops
    from helexa.cli.measure import read_bandwidth

    document: dict[str, Any] = {"device": args.device}
    if args.device == "cpu":
        ops.set_num_threads(args.threads)
        document |= {"isa": ops.cpu_isa(), "threads": ops.num_threads()}
        bandwidth = read_bandwidth(ops.num_threads())
    else:
        import torch

        document["card"] = torch.cuda.get_device_name()
        bandwidth = copy_bandwidth()
    found = [bench_op(name, args.device, bandwidth) for name in args.names]
    print(json.dumps(document | {"bandwidth": bandwidth, "ops": found}))


if __name__ == "__main__":
    main()
