"""What a benchmark run asks of an engine, and the figures of the machine it runs on."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter

from helexa.cli import measure
from helexa.cli.measure import (
    Workload,
    bytes_per_token,
    copy_bandwidth,
    device_memory_bytes,
    measure_engine,
    peak_memory_bytes,
    read_bandwidth,
)


class Recorder:
    """An engine that writes down what it is asked and knows a prompt's pages from the second time on."""

    config = SimpleNamespace(vocab_size=50)

    def __init__(self) -> None:
        self.asked: list[tuple[list[int], Any]] = []

    async def generate(self, token_ids: list[int], params: Any) -> AsyncIterator[Any]:
        seen = any(prompt[:256] == token_ids[:256] for prompt, _ in self.asked if len(token_ids) > 256)
        self.asked.append((token_ids, params))
        for _ in range(params.max_tokens):
            yield SimpleNamespace(token_ids=[1], usage=None)
        yield SimpleNamespace(token_ids=[], usage=SimpleNamespace(cached_tokens=256 if seen else 0))


def workload(**changes: Any) -> Workload:
    given = {"model": "m.gguf", "prompt": 20, "generate": 5, "depth": 0, "streams": 1, "threads": 1}
    return Workload(**given | changes)


async def test_prompt_and_generation_are_timed_apart_and_after_a_warm_up() -> None:
    engine = Recorder()
    found = await measure_engine(engine, workload())
    assert [(len(prompt), params.max_tokens) for prompt, params in engine.asked] == [(32, 8), (20, 1), (1, 6)]
    assert all(params.temperature == 0 and params.ignore_eos for _, params in engine.asked)
    assert set(found) == {"prefill_tok_s", "ttft_ms", "decode_tok_s"}


async def test_depth_is_computed_before_and_comes_from_the_cache_then() -> None:
    engine = Recorder()
    await measure_engine(engine, workload(depth=300))
    lengths = [(len(prompt), params.max_tokens) for prompt, params in engine.asked]
    assert lengths == [(32, 8), (301, 1), (320, 1), (301, 6)]
    depths = {tuple(prompt[:300]) for prompt, _ in engine.asked[1:]}
    assert len(depths) == 1


async def test_streams_have_prompts_of_their_own() -> None:
    engine = Recorder()
    await measure_engine(engine, workload(depth=300, streams=3, generate=0))
    assert len({tuple(prompt[:300]) for prompt, _ in engine.asked if len(prompt) > 300}) == 3


async def test_another_seed_gives_other_prompts_of_tokens_that_the_model_has() -> None:
    prompts = []
    for seed in (0, 1):
        engine = Recorder()
        await measure_engine(engine, workload(seed=seed))
        prompts.append(engine.asked[1][0])
    assert prompts[0] != prompts[1]
    assert all(0 <= token < 50 for token in prompts[0])


async def test_only_decoding_has_a_time_to_first_token_too() -> None:
    found = await measure_engine(Recorder(), workload(prompt=0))
    assert set(found) == {"ttft_ms", "decode_tok_s"}


@pytest.mark.parametrize("has_output", [True, False])
def test_an_embedding_counts_for_a_step_only_as_the_output(tmp_path: Path, has_output: bool) -> None:
    path = tmp_path / "m.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_tensor("token_embd.weight", np.zeros((8, 4), np.float32))
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((2, 4), np.float32))
    if has_output:
        writer.add_tensor("output.weight", np.zeros((8, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert bytes_per_token(path) == 4 * (8 * 4 + 2 * 4)


def test_a_step_reads_only_the_experts_that_a_token_uses(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = GGUFWriter(path, "qwen3moe")
    writer.add_expert_count(8)
    writer.add_expert_used_count(2)
    writer.add_tensor("blk.0.ffn_gate_inp.weight", np.zeros((8, 4), np.float32))
    writer.add_tensor("blk.0.ffn_up_exps.weight", np.zeros((8, 3, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert bytes_per_token(path) == 4 * (8 * 4 + 2 * 3 * 4)


def test_the_machine_is_measured_with_plausible_results(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure, "BUFFER_BYTES", 1 << 20)
    assert read_bandwidth(threads=2, repeats=2) > 1e6
    assert 1 << 20 < peak_memory_bytes() < 1 << 40
    measure.main('{"threads": 1}')
    assert json.loads(capsys.readouterr().out)["bytes_s"] > 1e6


@pytest.mark.cuda
def test_a_device_copies_at_a_plausible_rate_and_its_memory_is_known(cuda_device: str) -> None:
    if cuda_device == "cpu":
        pytest.skip("the host stands for the device")
    assert 5e10 < copy_bandwidth(cuda_device, repeats=3) < 5e13
    assert device_memory_bytes(cuda_device) > 1 << 30  # what was copied is still held
