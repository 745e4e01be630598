"""What an engine makes of faults of a real device; each in a process of its own, which loses the device."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from helexa.ops.tensor import EMULATED

pytestmark = pytest.mark.cuda

GOLDEN = Path(__file__).parents[1] / "golden" / "qwen3.gguf"

SCRIPT = """
import asyncio, os, sys, threading, time
import torch
from pathlib import Path
from helexa.engine.engine import Engine
from helexa.engine.faults import is_lost
from helexa.engine.sampling_params import SamplingParams
from helexa.errors import DevicePoisoned, HelexaError, OutOfMemory
from helexa.ops import fault

options = {"device": "cuda:0", "kv_cache_tokens": 2048, "max_sequences": 2, "step_timeout_s": 2.0}
engine = Engine.load(Path(sys.argv[1]), **options)

async def text(**options):
    tokens, params = [], SamplingParams(temperature=0.0, ignore_eos=True, **options)
    async for delta in engine.generate([1, 2, 3], params):
        tokens += delta.token_ids
    return tokens

async def error_of(request):
    started = time.monotonic()
    try:
        await request
    except HelexaError as error:
        return type(error).__name__, time.monotonic() - started
    return "", 0.0
"""


def run(model, body: str) -> str:
    """What a script prints in which `engine` has the model; fails unless it ends by itself."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT + textwrap.dedent(body), str(model)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert "the end" in done.stdout, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def model(cuda_device):
    if EMULATED:
        pytest.skip("the host has no faults of a device")
    return GOLDEN


def test_a_kernel_that_fails_ends_all_requests_and_loses_the_device(model):
    out = run(
        model,
        """
        async def main():
            before = await text(max_tokens=5)
            running = asyncio.create_task(error_of(text(max_tokens=400)))
            await asyncio.sleep(0.05)
            engine._host.worker.post(lambda: fault.trap("cuda:0"))
            name, seconds = await running
            later, _ = await error_of(text(max_tokens=5))
            poisoned = engine.stats().poisoned is not None
            print(len(before), name, later, seconds < 10, poisoned, is_lost("cuda:0"))
        asyncio.run(main())
        print("the end", flush=True)
        os._exit(0)  # as a neuron does: what frees memory of a lost device cannot succeed
        """,
    )
    assert "5 DevicePoisoned DevicePoisoned True True True" in out


def test_a_kernel_that_spins_is_reported_within_the_limit(model):
    out = run(
        model,
        """
        async def main():
            engine._host.worker.post(lambda: fault.spin("cuda:0", 20.0))
            name, seconds = await error_of(text(max_tokens=5))
            print(name, 1.5 < seconds < 8, "not ended" in engine.stats().poisoned, is_lost("cuda:0", 1.0))
        asyncio.run(main())
        print("the end", flush=True)
        os._exit(0)
        """,
    )
    assert "DevicePoisoned True True True" in out


def test_too_little_memory_for_a_request_fails_only_that(model):
    out = run(
        model,
        """
        start = type(engine._host.core.runner).start
        failures = [1]
        def fail_once(self, plan):
            if plan.is_prefill and failures:
                failures.pop()
                from helexa.engine.device import request_errors
                with request_errors():
                    torch.empty(1 << 50, dtype=torch.uint8, device="cuda:0")
            return start(self, plan)
        type(engine._host.core.runner).start = fail_once
        async def main():
            name, _ = await error_of(text(max_tokens=5))
            tokens = await text(max_tokens=5)
            print(name, len(tokens), engine.stats().poisoned)
        asyncio.run(main())
        engine.close()
        print("the end")
        """,
    )
    assert "OutOfMemory 5 None" in out
