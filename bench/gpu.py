"""Our engine beside llama.cpp on a CUDA device: `python bench/gpu.py --peer FOLDER [--models A,B]`.

Writes each model with random weights of the real shapes, then measures both sides in turns, each time in a
fresh process: prefill, decode at depth 0 and 8192, decode of several streams, loading, device memory. Figures
are medians of the rounds, ratios medians of the pairs; of llama.cpp's micro-batches (512, its default, and
2048) the faster counts for prefill. Both sides have a cache for the same context, and neither keeps snapshots
of recurrent states, of which llama-bench has none. The last line of the output is one JSON document.
"""

import argparse
import asyncio
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "python")]

from bench.random_models import SHAPES, write_model  # noqa: E402

Figures = dict[str, float]
PROMPTS, STREAMS, DEPTH, GENERATE = (128, 512, 4096), (2, 4, 8), 8192, 128
CONTEXT = DEPTH + 2 * GENERATE
DEFAULT = "qwen3-8b-q4_k_m,qwen3.6-27b-q4_k_m,qwen3-0.6b-q8_0,qwen3-30b-a3b-q4_k_m,qwen3.6-35b-a3b-q4_k_m"
TIMEOUT_S = 240.0  # of one process


def own_figures(model: str, options: dict[str, Any], seed: int, repeat: int) -> Figures:
    """Everything about our engine, in this process."""
    import pynvml

    from helexa.cli.measure import Workload, bytes_per_token, measure_engine
    from helexa.engine.engine import Engine

    pynvml.nvmlInit()
    device = pynvml.nvmlDeviceGetHandleByIndex(0)
    empty = pynvml.nvmlDeviceGetMemoryInfo(device).used

    @contextmanager
    def loaded(name: str, streams: int, context: int, tokens: int) -> Iterator[Callable[..., list[Figures]]]:
        start = time.perf_counter()
        engine = Engine.load(
            model, max_sequences=streams, max_context=context, kv_cache_tokens=tokens, **options
        )
        found[name] = time.perf_counter() - start

        def run(**sizes: int) -> list[Figures]:
            nonlocal seed
            runs = []
            for _ in range(repeat):
                seed += 1
                work = Workload(**({"model": model, "prompt": 0, "generate": 0, "depth": 0} | sizes),  # type: ignore[arg-type]
                                streams=streams, threads=1, seed=seed)  # fmt: skip
                runs.append(asyncio.run(measure_engine(engine, work)))
            return runs

        try:
            yield run
        finally:
            engine.close()

    def middle(runs: list[Figures], key: str) -> float:
        return statistics.median(run[key] for run in runs)

    found: Figures = {"bytes_per_token": bytes_per_token(Path(model))}
    with loaded("first load", 1, CONTEXT, CONTEXT) as run:
        for prompt in PROMPTS:
            run(prompt=prompt)  # to warm up, as llama-bench does
            runs = run(prompt=prompt)
            found[f"prefill {prompt}"] = middle(runs, "prefill_tok_s")
            if prompt == PROMPTS[0]:
                found["ttft"] = middle(runs, "ttft_ms")
        found["decode"] = middle(run(generate=GENERATE), "decode_tok_s")
        found[f"decode at {DEPTH}"] = middle(run(generate=GENERATE, depth=DEPTH), "decode_tok_s")
        found["memory"] = pynvml.nvmlDeviceGetMemoryInfo(device).used - empty
    for streams in STREAMS:
        with loaded("load", streams, 1024, streams * 1024) as run:
            found[f"decode of {streams}"] = middle(run(generate=GENERATE), "decode_tok_s")
    return found


@dataclass
class Peer:
    """llama.cpp's programs in a folder."""

    folder: Path
    repeat: int
    own_memory: list[int] = field(default_factory=list)

    def figures(self, model: str) -> Figures:
        found: Figures = {}
        common = ("-m", model, "-ngl", "99", "-o", "json")
        prompts = ("-p", ",".join(map(str, PROMPTS)), "-ub", "512,2048", "-b", "2048")
        for test in self._tests(*common, "-r", str(self.repeat), *prompts, "-n", "0"):
            name = f"prefill {test['n_prompt']}"
            found[name] = max(found.get(name, 0.0), test["avg_ts"])
            if test["n_ubatch"] == 512:
                found[f"{name}, ub 512"] = test["avg_ts"]
        decode = ("-p", "0", "-n", str(GENERATE), "-r", str(self.repeat))
        found["decode"] = self._tests(*common, *decode)[0]["avg_ts"]
        with device_memory() as peak:
            found[f"decode at {DEPTH}"] = self._tests(*common, *decode, "-d", str(DEPTH))[0]["avg_ts"]
        found["memory"] = peak()
        start = time.perf_counter()
        self._tests(*common, "-p", "0", "-n", "1", "-r", "1", "--no-warmup")
        found["load"] = time.perf_counter() - start
        streams = ",".join(map(str, STREAMS))
        sizes = ("-c", "2048", "-npp", "32", "-ntg", str(GENERATE), "-npl", streams)
        output = self._run(
            "llama-batched-bench", "-m", model, "-ngl", "99", *sizes, "--output-format", "jsonl"
        )
        for line in output.splitlines():
            if line.startswith("{"):
                test = json.loads(line)
                found[f"decode of {test['pl']}"] = test["speed_tg"]
        return found

    def _tests(self, *arguments: str) -> list[dict[str, Any]]:
        return list(json.loads(self._run("llama-bench", *arguments)))

    def _run(self, program: str, *arguments: str) -> str:
        return output_of(str(self.folder / program), *arguments)


@contextmanager
def device_memory() -> Iterator[Callable[[], int]]:
    """The most device memory in use during the block, above what was in use before."""
    import pynvml

    pynvml.nvmlInit()
    device = pynvml.nvmlDeviceGetHandleByIndex(0)
    before = peak = pynvml.nvmlDeviceGetMemoryInfo(device).used
    is_over = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not is_over.wait(0.01):
            peak = max(peak, pynvml.nvmlDeviceGetMemoryInfo(device).used)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield lambda: peak - before
    finally:
        is_over.set()
        thread.join()


def ceilings() -> Figures:
    """What the card does at best: a large copy, read and written, and a large matrix product in bfloat16."""
    import torch

    def seconds(work: Callable[[], object], repeat: int) -> float:
        work()
        times = []
        for _ in range(repeat):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        return statistics.median(times)

    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return {
        "copy_bytes_s": 2 * source.nbytes / seconds(lambda: target.copy_(source), 20),
        "bf16_flop_s": 2 * 8192**3 / seconds(lambda: a @ b, 20),
    }


def in_fresh_process(command: str, *arguments: str) -> Figures:
    """What `python bench/gpu.py COMMAND ...` prints as its last line."""
    return dict(json.loads(output_of(sys.executable, __file__, command, *arguments).splitlines()[-1]))


class Failed(Exception):
    """A process did not do what it should."""


def output_of(*command: str) -> str:
    """What a command writes to stdout. Raises Failed with the end of its stderr."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise Failed(f"{' '.join(command)} took more than {TIMEOUT_S:.0f} s") from None
    if done.returncode:
        raise Failed(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return done.stdout


def compare(model: str, args: argparse.Namespace, options: dict[str, Any]) -> dict[str, Any]:
    """Medians of both sides for one model, and the medians of the pairs' ratios (ours ÷ theirs)."""
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=args.folder))
    try:
        path = folder / f"{model}.gguf"
        start = time.perf_counter()
        size = write_model(SHAPES[model], model, path)
        print(f"# {model}: {size / 1e9:.1f} GB written in {time.perf_counter() - start:.1f} s", flush=True)
        own, other = [], []
        for index in range(args.rounds):
            if not args.no_own:
                seed = str(1000 * index)
                own.append(in_fresh_process("own", str(path), json.dumps(options), seed, str(args.repeat)))
            if args.peer:
                other.append(Peer(args.peer, args.repeat).figures(str(path)))
    finally:
        shutil.rmtree(folder)
    document: dict[str, Any] = {"helexa": medians(own), "llama.cpp": medians(other), "runs": [own, other]}
    if own and other:
        document["ratios"] = {
            name: statistics.median(
                ours[name] / theirs[name] for ours, theirs in zip(own, other, strict=True)
            )
            for name in own[0]
            if name in other[0]
        }
    return document


def medians(runs: list[Figures]) -> Figures:
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]} if runs else {}


def show(model: str, document: dict[str, Any], ceiling: Figures) -> None:
    own, other, ratios = document["helexa"], document["llama.cpp"], document.get("ratios", {})
    print(f"\n{model:28} {'helexa':>12} {'llama.cpp':>12} {'ratio':>7}")
    for name in dict.fromkeys((*own, *other)):
        if name == "bytes_per_token":
            continue
        scale, unit = {
            "memory": (2**-20, "MiB"),
            "ttft": (1, "ms"),
            "load": (1, "s"),
            "first load": (1, "s"),
        }.get(name, (1, "tok/s"))
        cells = [f"{side[name] * scale:12.{2 if unit == 's' else 1}f}" if name in side else " " * 12
                 for side in (own, other)]  # fmt: skip
        ratio = f"{ratios[name]:6.2f}x" if name in ratios else ""
        print(f"  {name + ', ' + unit:26} {cells[0]} {cells[1]} {ratio}")
    if "decode" in own:
        share = own["decode"] * own["bytes_per_token"] / ceiling["copy_bytes_s"]
        print(f"  share of the copy bandwidth in decode: {share:.0%}")
        steps = [own["decode"] * streams / own[f"decode of {streams}"] for streams in STREAMS]
        print("  a step of " + ", ".join(f"{n}: {step:.2f}x" for n, step in zip(STREAMS, steps, strict=True)))
    sys.stdout.flush()


def main() -> None:
    if sys.argv[1:2] == ["own"]:
        model, options, seed, repeat = sys.argv[2:]
        print(json.dumps(own_figures(model, json.loads(options), int(seed), int(repeat))))
        return
    if sys.argv[1:2] == ["ceilings"]:
        print(json.dumps(ceilings()))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default=DEFAULT, help="names, separated by commas")
    parser.add_argument("--peer", type=Path, help="folder of llama-bench and llama-batched-bench")
    parser.add_argument("--no-own", action="store_true", help="measure llama.cpp alone")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side")
    parser.add_argument("--repeat", type=int, default=3, help="repetitions inside a process")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"), help="where models are written")
    parser.add_argument("--options", type=json.loads, default={}, help="more of EngineOptions, as JSON")
    parser.add_argument("--out", type=Path, help="file for the JSON document")
    args = parser.parse_args()
    options = {"device": args.device, "snapshot_bytes": 0, **args.options}
    ceiling = in_fresh_process("ceilings")
    copy, product = ceiling["copy_bytes_s"] / 1e12, ceiling["bf16_flop_s"] / 1e12
    print(f"# copy {copy:.2f} TB/s, bf16 product {product:.0f} TFLOP/s", flush=True)
    document: dict[str, Any] = {"ceilings": ceiling, "models": {}}
    for model in args.models.split(","):
        try:
            document["models"][model] = compare(model, args, options)
            show(model, document["models"][model], ceiling)
        except Failed as failure:
            print(f"\n{model}: {failure}", flush=True)
            document["models"][model] = {"failed": str(failure)}
        if args.out:  # what is measured stays measured if a later model fails
            args.out.write_text(json.dumps(document))
    print(json.dumps(document))


if __name__ == "__main__":
    main()
