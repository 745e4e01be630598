"""Keys and values in fewer bits on a device: logits stay near, and prefixes are found again."""

from pathlib import Path

import numpy as np
import pytest

from helexa.engine import Engine, SamplingParams

pytestmark = pytest.mark.cuda

GOLDEN = Path(__file__).parents[1] / "golden"
TOLERANCES = {"bfloat16": 0.03, "float16": 0.03, "int8": 0.03, "float8_e4m3": 0.1}  # of the root mean square


def load(case, device, kv_dtype):
    sizes = {"kv_cache_tokens": 2048, "num_threads": 1, "device": device}
    return Engine.load(GOLDEN / f"{case}.gguf", kv_dtype=kv_dtype, **sizes)


@pytest.mark.parametrize("kv_dtype", TOLERANCES)
@pytest.mark.parametrize("case", ["qwen3", "qwen35_tied"])
def test_logits_are_near_those_of_transformers(cuda_device, case, kv_dtype):
    arrays = np.load(GOLDEN / f"{case}.npz")
    with load(case, cuda_device, kv_dtype) as engine:
        logits = engine.logits(arrays["token_ids"][:60].tolist())
    expected = arrays["logits"][:60]
    error = np.sqrt(np.square(logits - expected).mean() / np.square(expected).mean())
    assert error < TOLERANCES[kv_dtype]


@pytest.mark.parametrize("kv_dtype", ["int8", "float8_e4m3"])
async def test_a_part_of_a_page_is_copied_with_all_that_belongs_to_it(cuda_device, kv_dtype):
    prompt = np.load(GOLDEN / "qwen3.npz")["token_ids"][:50].tolist()
    params = SamplingParams(temperature=0.0, max_tokens=6)
    with load("qwen3", cuda_device, kv_dtype) as engine:
        answers = []
        for _ in range(2):
            deltas = [delta async for delta in engine.generate(prompt, params)]
            answers.append([token_id for delta in deltas for token_id in delta.token_ids])
    assert answers[0] == answers[1]
    assert deltas[-1].usage.cached_tokens == 49
