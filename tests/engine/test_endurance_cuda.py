"""Engines on a CUDA device for a long time: nothing grows, nothing changes, neighbours do not matter."""

import asyncio
import gc
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from helexa.engine import Engine, SamplingParams
from helexa.engine.device import Device
from helexa.engine.memory import resident_bytes

pytestmark = pytest.mark.cuda

GOLDEN = Path(__file__).parents[1] / "golden"
DENSE, HYBRID, MIXTURE = "qwen3", "qwen35_tied", "qwen3moe"
ROUND = 250  # tokens of each answer, over the border of a page


def tokens_of(case):
    return np.load(GOLDEN / f"{case}.npz")["token_ids"].tolist()


def load(case, device, **options):
    sizes = {"kv_cache_tokens": 2048, "num_threads": 1, "device": device}
    return Engine.load(GOLDEN / f"{case}.gguf", **(sizes | options))


async def answer(engine, prompt, **params):
    params = SamplingParams(**({"temperature": 0.0, "max_tokens": 12, "ignore_eos": True} | params))
    deltas = [delta async for delta in engine.generate(prompt, params)]
    return [token_id for delta in deltas for token_id in delta.token_ids]


def held():
    """Bytes that torch has on the device, in use and in all."""
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()


def test_memory_returns_to_the_start_level_after_each_of_50_loads(cuda_device):
    if cuda_device == "cpu":
        pytest.skip("the host stands for a CUDA device")
    is_alone = "PYTEST_XDIST_WORKER" not in os.environ  # else others take and free memory meanwhile

    def cycle(case):
        with load(case, cuda_device) as engine:
            engine.logits(tokens_of(case))
            del engine
        gc.collect()
        free = torch.cuda.mem_get_info()[0] if is_alone else 0
        return *held(), free

    cycle(DENSE), cycle(HYBRID)  # what libraries keep from now on
    start = cycle(DENSE)
    for _ in range(25):
        for case in (HYBRID, DENSE):
            allocated, reserved, free = cycle(case)
            assert allocated <= start[0]
            assert reserved <= start[1] + (2 << 20)  # what torch takes at once for small tensors
            assert free >= start[2] - (8 << 20)


@pytest.mark.parametrize("case", [DENSE, HYBRID])
async def test_ten_thousand_steps_change_neither_memory_nor_tokens(cuda_device, case):
    is_emulated = cuda_device == "cpu"
    num_tokens = 4 if is_emulated else ROUND
    prompts = [tokens_of(case)[i : 40 + i] for i in range(3)]
    how = [{"presence_penalty": 0.5, "temperature": 0.4 * i, "top_p": 0.9, "seed": i} for i in range(3)]
    with load(case, cuda_device, prefix_cache=False) as engine:

        async def answers():
            return await asyncio.gather(
                *(
                    answer(engine, prompt, max_tokens=num_tokens, **params)
                    for prompt, params in zip(prompts, how, strict=True)
                )
            )

        first = await answers()
        on_device, on_host = None if is_emulated else held(), resident_bytes()
        for _ in range(1 if is_emulated else -(-10_000 // ROUND)):
            assert await answers() == first
        if on_device is not None:
            allocated, reserved = held()
            assert allocated <= on_device[0] + (256 << 10)  # a last step may not have been dropped yet
            assert reserved == on_device[1]
        assert resident_bytes() <= on_host + (32 << 20)
        assert engine.stats().kv_tokens_used == 0
    assert all(len(tokens) == num_tokens for tokens in first)


async def test_several_models_on_one_device_answer_as_each_does_alone(cuda_device):
    cases = (DENSE, HYBRID) if cuda_device == "cpu" else (DENSE, HYBRID, MIXTURE)
    alone = []
    for case in cases:
        with load(case, cuda_device) as engine:
            alone.append(await answer(engine, tokens_of(case)[:40]))
    engines = [load(case, cuda_device) for case in cases]
    try:
        together = await asyncio.gather(
            *(answer(engine, tokens_of(case)[:40]) for engine, case in zip(engines, cases, strict=True))
        )
    finally:
        for engine in engines:
            engine.close()
    assert together == alone


async def test_a_model_that_is_loaded_and_unloaded_does_not_disturb_its_neighbour(cuda_device):
    prompt, num_tokens = tokens_of(DENSE)[:40], 6 if cuda_device == "cpu" else 400
    with load(DENSE, cuda_device, prefix_cache=False) as engine:
        expected = await answer(engine, prompt, max_tokens=num_tokens)

        def neighbour():
            for case in (HYBRID, MIXTURE):
                with load(case, cuda_device) as other:
                    other.logits(tokens_of(case)[:40])

        loads = asyncio.create_task(asyncio.to_thread(neighbour))
        while not loads.done():
            assert await answer(engine, prompt, max_tokens=num_tokens) == expected
        await loads


def test_memory_that_an_engine_will_need_again_is_not_free(cuda_device):
    if cuda_device == "cpu":
        pytest.skip("the host stands for a CUDA device")
    device = Device(cuda_device)
    claim = device.claim(64 << 20)
    assert torch.cuda.memory_reserved() - torch.cuda.memory_allocated() >= 64 << 20
    torch.cuda.empty_cache()
    with_claim = device.free_bytes()
    del claim
    gc.collect()
    if "PYTEST_XDIST_WORKER" not in os.environ:
        assert device.free_bytes() - with_claim == 64 << 20
