"""GGUF files with the shapes of public Qwen models, random weights and a vocabulary of the right size.

Speed does not depend on what weights say, so these stand in for the published files where those cannot be
had. Shapes are those of the models' config.json files; which tensors of Q4_K_M are Q6_K is llama.cpp's rule.
`python bench/random_models.py NAME OUT.gguf` writes at the rate of the file system, all threads at once.
"""

import argparse
import itertools
import os
import string
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from helexa.quant import FORMATS
from helexa.weights.gguf import TensorInfo
from helexa.weights.gguf_writer import encode_entry, encode_header

PIECE_BYTES = 8 << 20
# The scales of a block (where they stand, and of what size), so that activations stay finite.
SCALES = {
    "q8_0": {0: 0.0008},
    "q4_k": {0: 0.0008, 2: 0.006},
    "q5_k": {0: 0.0004, 2: 0.006},
    "q6_k": {208: 0.00002},
}
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a model; of experts and of linear attention where it has them."""

    architecture: str
    quant: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int = 128
    intermediate_size: int = 0
    vocab_size: int = 151936
    is_tied: bool = False
    num_experts: int = 0
    expert_size: int = 0
    experts_used: int = 8
    linear_k_heads: int = 16
    linear_v_heads: int = 0

    @property
    def is_hybrid(self) -> bool:
        return self.linear_v_heads > 0


def dense(quant: str, hidden: int, layers: int, heads: int, inner: int, *, is_tied: bool = False) -> Shape:
    return Shape(
        architecture="qwen3",
        quant=quant,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        intermediate_size=inner,
        is_tied=is_tied,
    )


def hybrid(hidden: int, layers: int, heads: int, kv_heads: int, v_heads: int, **sizes: Any) -> Shape:
    return Shape(
        architecture="qwen35moe" if "num_experts" in sizes else "qwen35",
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=256,
        linear_v_heads=v_heads,
        vocab_size=248320,
        **sizes,
    )


SHAPES = {
    "qwen3-0.6b-q8_0": dense("q8_0", 1024, 28, 16, 3072, is_tied=True),
    "qwen3-1.7b-q4_k_m": dense("q4_k_m", 2048, 28, 16, 6144, is_tied=True),
    "qwen3-8b-q4_k_m": dense("q4_k_m", 4096, 36, 32, 12288),
    "qwen3-8b-q6_k": dense("q6_k", 4096, 36, 32, 12288),
    "qwen3-30b-a3b-q4_k_m": Shape(
        architecture="qwen3moe",
        quant="q4_k_m",
        hidden_size=2048,
        num_layers=48,
        num_heads=32,
        num_kv_heads=4,
        intermediate_size=6144,
        num_experts=128,
        expert_size=768,
    ),
    "qwen3.5-0.8b-q8_0": hybrid(1024, 24, 8, 2, 16, quant="q8_0", intermediate_size=3584, is_tied=True),
    "qwen3.6-27b-q4_k_m": hybrid(5120, 64, 24, 4, 48, quant="q4_k_m", intermediate_size=17408),
    "qwen3.6-35b-a3b-q4_k_m": hybrid(2048, 40, 16, 2, 32, quant="q4_k_m", num_experts=256, expert_size=512),
}


def write_model(shape: Shape, name: str, path: Path) -> int:
    """Writes the file, unless one of the same length is there, and returns its bytes."""
    tensors = [
        TensorInfo(tensor, sizes, format, 0, FORMATS[format].nbytes(prod(sizes)))
        for tensor, sizes, format in _tensors(shape)
    ]
    header, offsets = encode_header(list(_entries(shape, name)), tensors)
    size = offsets[-1] + -(-tensors[-1].nbytes // 32) * 32
    if path.exists() and path.stat().st_size == size:
        return size
    pools = {format: _pool(format) for format in SCALES}
    pieces: list[tuple[int, memoryview]] = [(0, memoryview(header))]
    for info, offset in zip(tensors, offsets, strict=True):
        pieces += _pieces(info, offset, pools)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        os.truncate(descriptor, size)
        with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as threads:
            list(threads.map(lambda piece: os.pwrite(descriptor, piece[1], piece[0]), pieces))
    finally:
        os.close(descriptor)
    return size


def _pool(format: str) -> memoryview:
    """Random blocks of twice a piece, of which any half will do."""
    layout = FORMATS[format]
    count = 2 * PIECE_BYTES // layout.block_bytes
    blocks = np.random.default_rng(0).integers(0, 256, (count, layout.block_bytes), np.uint8)
    for place, scale in SCALES[format].items():
        blocks[:, place : place + 2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
    return memoryview(blocks.reshape(-1))


def _pieces(info: TensorInfo, offset: int, pools: dict[str, memoryview]) -> Iterator[tuple[int, memoryview]]:
    """What to write where for one tensor."""
    if info.format == "f32":
        yield offset, memoryview(_floats(info).tobytes())
        return
    block_bytes, pool = FORMATS[info.format].block_bytes, pools[info.format]
    step = PIECE_BYTES // block_bytes * block_bytes
    for index, first in enumerate(range(0, info.nbytes, step)):
        begin = (offset + 7 * index) % (PIECE_BYTES // block_bytes) * block_bytes
        yield offset + first, pool[begin : begin + min(step, info.nbytes - first)]


def _floats(info: TensorInfo) -> np.ndarray[Any, np.dtype[np.float32]]:
    source = np.random.default_rng(len(info.name))
    if info.name.endswith("ssm_a"):  # -exp(A_log): how fast a state is forgotten
        values = -source.uniform(0.05, 1.0, info.shape)
    elif info.name.endswith("conv1d.weight"):
        values = source.normal(0.0, 0.3, info.shape)
    else:
        values = source.normal(1.0 if "norm" in info.name else 0.0, 0.02, info.shape)
    return values.astype(np.float32)


def _tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Names, shapes and formats in the order of a file."""
    hidden, vocab = shape.hidden_size, shape.vocab_size
    is_mixed = shape.quant == "q4_k_m"
    base = "q4_k" if is_mixed else shape.quant
    best = "q6_k" if is_mixed else shape.quant
    yield "token_embd.weight", (vocab, hidden), best if shape.is_tied else base
    yield "output_norm.weight", (hidden,), "f32"
    if not shape.is_tied:
        yield "output.weight", (vocab, hidden), best
    for layer in range(shape.num_layers):
        eighth = shape.num_layers // 8
        has_more = layer < eighth or layer >= 7 * eighth or (layer - eighth) % 3 == 2
        more = best if has_more else base
        is_linear = shape.is_hybrid and (layer + 1) % 4 != 0
        norm = "post_attention_norm" if shape.is_hybrid else "ffn_norm"
        parts = itertools.chain(
            (("attn_norm.weight", (hidden,), "f32"), (f"{norm}.weight", (hidden,), "f32")),
            _linear_attention(shape, base) if is_linear else _attention(shape, base, more),
            _experts(shape, base, more) if shape.num_experts else _mlp(shape, base, more),
        )
        yield from ((f"blk.{layer}.{name}", sizes, format) for name, sizes, format in parts)


Parts = Iterator[tuple[str, tuple[int, ...], str]]


def _attention(shape: Shape, base: str, more: str) -> Parts:
    hidden, width, kv_width = (
        shape.hidden_size,
        shape.num_heads * shape.head_dim,
        shape.num_kv_heads * shape.head_dim,
    )
    yield "attn_q.weight", (width * (2 if shape.is_hybrid else 1), hidden), base
    yield "attn_k.weight", (kv_width, hidden), base
    yield "attn_v.weight", (kv_width, hidden), more
    yield "attn_output.weight", (hidden, width), base
    yield "attn_q_norm.weight", (shape.head_dim,), "f32"
    yield "attn_k_norm.weight", (shape.head_dim,), "f32"


def _linear_attention(shape: Shape, base: str) -> Parts:
    hidden, heads = shape.hidden_size, shape.linear_v_heads
    width = (2 * shape.linear_k_heads + heads) * 128
    yield "attn_qkv.weight", (width, hidden), base
    yield "attn_gate.weight", (heads * 128, hidden), base
    yield "ssm_conv1d.weight", (width, 4), "f32"
    yield "ssm_dt.bias", (heads,), "f32"
    yield "ssm_a", (heads,), "f32"
    yield "ssm_beta.weight", (heads, hidden), "q8_0"
    yield "ssm_alpha.weight", (heads, hidden), "q8_0"
    yield "ssm_norm.weight", (128,), "f32"
    yield "ssm_out.weight", (hidden, heads * 128), base


def _mlp(shape: Shape, base: str, more: str) -> Parts:
    yield "ffn_gate.weight", (shape.intermediate_size, shape.hidden_size), base
    yield "ffn_up.weight", (shape.intermediate_size, shape.hidden_size), base
    yield "ffn_down.weight", (shape.hidden_size, shape.intermediate_size), more


def _experts(shape: Shape, base: str, more: str) -> Parts:
    hidden, size, count = shape.hidden_size, shape.expert_size, shape.num_experts
    yield "ffn_gate_inp.weight", (count, hidden), "f32"
    yield "ffn_gate_exps.weight", (count, size, hidden), base
    yield "ffn_up_exps.weight", (count, size, hidden), base
    yield "ffn_down_exps.weight", (count, hidden, size), more
    if shape.is_hybrid:
        yield "ffn_gate_inp_shexp.weight", (hidden,), "f32"
        yield "ffn_gate_shexp.weight", (size, hidden), base
        yield "ffn_up_shexp.weight", (size, hidden), base
        yield "ffn_down_shexp.weight", (hidden, size), more


def _entries(shape: Shape, name: str) -> Iterator[bytes]:
    """The header: what the architecture needs, and a vocabulary."""
    yield encode_entry("general.architecture", shape.architecture)
    yield encode_entry("general.name", name)
    keys: dict[str, Any] = {
        "context_length": 262144 if shape.is_hybrid else 40960,
        "embedding_length": shape.hidden_size,
        "block_count": shape.num_layers,
        "feed_forward_length": shape.intermediate_size,
        "attention.head_count": shape.num_heads,
        "attention.head_count_kv": shape.num_kv_heads,
        "attention.key_length": shape.head_dim,
        "attention.value_length": shape.head_dim,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 1e7 if shape.is_hybrid else 1e6,
        "vocab_size": shape.vocab_size,
    }
    if shape.is_hybrid:
        keys |= {
            "rope.dimension_count": 64,
            "rope.dimension_sections": [11, 11, 10, 0],
            "ssm.conv_kernel": 4,
            "ssm.state_size": 128,
            "ssm.group_count": shape.linear_k_heads,
            "ssm.time_step_rank": shape.linear_v_heads,
            "ssm.inner_size": shape.linear_v_heads * 128,
            "full_attention_interval": 4,
        }
    if shape.num_experts:
        keys |= {
            "expert_count": shape.num_experts,
            "expert_used_count": shape.experts_used,
            "expert_feed_forward_length": shape.expert_size,
        }
        if shape.is_hybrid:
            keys["expert_shared_feed_forward_length"] = shape.expert_size
    yield from (encode_entry(f"{shape.architecture}.{key}", value) for key, value in keys.items())
    tokens, merges = _vocabulary(shape.vocab_size)
    types = np.ones(shape.vocab_size, np.int32)
    types[-len(SPECIAL) :] = 3
    end = shape.vocab_size - 1
    for key, value in {
        "model": "gpt2",
        "pre": "qwen2",
        "tokens": tokens,
        "token_type": types,
        "merges": merges,
        "eos_token_id": end,
        "add_bos_token": False,
    }.items():
        yield encode_entry(f"tokenizer.ggml.{key}", value)


def _vocabulary(size: int) -> tuple[list[str], list[str]]:
    """Tokens and merges of a byte-level vocabulary: words of two, three and four letters above the bytes."""
    tokens = [chr(code) for code in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x144))]
    merges: list[str] = []
    letters, stems = string.ascii_lowercase, list(string.ascii_lowercase)
    while len(tokens) < size - len(SPECIAL):
        words = [(stem, letter) for stem in stems for letter in letters]
        words = words[: size - len(SPECIAL) - len(tokens)]
        merges += [f"{stem} {letter}" for stem, letter in words]
        stems = [stem + letter for stem, letter in words]
        tokens += stems
    return [*tokens, *SPECIAL], merges


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=SHAPES)
    parser.add_argument("path", type=Path)
    args = parser.parse_args()
    print(f"{write_model(SHAPES[args.name], args.name, args.path) / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
