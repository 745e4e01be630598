"""Times ops: `python bench/run.py op quant_matmul [--threads 2] [--device cpu]`.

Runs the op's tests first and refuses to time a red op.  Each case of `bench/ops/bench_<op>.py` is a call with
the bytes it must move
and the operations it must do; the table gives the least and the median time over repetitions, GB/s with its
share of the measured
read bandwidth, and GFLOP/s.  The last line of the output is one JSON document.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Case:
    """One timed call: `run` does the work once, moving `nbytes` and doing `operations` arithmetic
    operations."""

    name: str
    run: Callable[[], object]
    nbytes: float
    operations: float


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


def bench_op(op: str, threads: int, verify: bool) -> None:
    if verify:
        test = ROOT / "tests" / "ops" / f"test_{op}.py"
        if (
            subprocess.run(
                [sys.executable, "-m", "pytest", "-q", "--no-header", str(test)], cwd=ROOT
            ).returncode
            != 0
        ):
            sys.exit(f"{op} fails its tests: nothing to time")
    from helexa import ops
    from helexa.cli.measure import read_bandwidth

    ops.set_num_threads(threads)
    bandwidth = read_bandwidth(ops.num_threads())
    cases: Iterable[Case] = load_bench(op).cases()
    rows = []
    print(f"{'case':44} {'least us':>10} {'median us':>10} {'GB/s':>8} {'of read':>8} {'GFLOP/s':>9}")
    for case in cases:
        times = measure(case)
        least = min(times)
        row = {
            "case": case.name,
            "least_us": least * 1e6,
            "median_us": statistics.median(times) * 1e6,
            "gb_per_s": case.nbytes / least / 1e9,
            "share_of_read_bandwidth": case.nbytes / least / bandwidth,
            "gflop_per_s": case.operations / least / 1e9,
        }
        rows.append(row)
        print(
            f"{case.name:44} {row['least_us']:10.1f} {row['median_us']:10.1f} {row['gb_per_s']:8.1f} "
            f"{row['share_of_read_bandwidth']:8.0%} {row['gflop_per_s']:9.1f}"
        )
    print(
        json.dumps(
            {
                "op": op,
                "isa": ops.cpu_isa(),
                "threads": ops.num_threads(),
                "read_bandwidth": bandwidth,
                "cases": rows,
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    op = commands.add_parser("op", help="time one op")
    op.add_argument("name")
    op.add_argument("--threads", type=int, default=0, help="0 stands for the physical cores")
    op.add_argument("--no-verify", action="store_true", help="skip the op's tests")
    args = parser.parse_args()
    bench_op(args.name, args.threads, not args.no_verify)


if __name__ == "__main__":
    main()
