"""The compiled core: csrc/bindings.cpp, entry by entry.  Addresses, dtype ids and streams are integers."""

from collections.abc import Sequence

has_cuda: bool

class CudaError(RuntimeError):
    code: int

class CpuGraph:
    def begin_capture(self) -> None: ...
    def end_capture(self) -> None: ...
    def replay(self) -> None: ...
    def __len__(self) -> int: ...

class MoeWeights:
    def __init__(
        self,
        router: WeightView,
        shared_router: Sequence[WeightView],
        gate_up: Sequence[WeightView],
        down: WeightView,
        shared_gate_up: Sequence[WeightView],
        shared_down: Sequence[WeightView],
    ) -> None: ...

class WeightView:
    def __init__(self, format: int, packed: int, rows: int, cols: int, bias: int) -> None: ...

class ByteRange:
    def __init__(self, descriptor: int, offset: int, nbytes: int, /) -> None: ...

class WeightLoader:
    def add(
        self,
        ranges: Sequence[ByteRange],
        nbytes: int,
        format: int,
        source_format: int,
        first_row: int,
        num_rows: int,
        cols: int,
        target: int,
        /,
    ) -> int: ...
    def close(self) -> None: ...
    def cancel(self) -> None: ...
    def done_bytes(self) -> int: ...
    def failure(self) -> tuple[int, int] | None: ...

class WeightCarrier:
    def __init__(
        self,
        loader: WeightLoader,
        pinned: Sequence[int],
        staged: Sequence[int],
        encoded: int,
        bad_values: int,
        pinned_bad_values: int,
        stream: int,
        /,
    ) -> None: ...
    def work(self) -> int: ...
    def slot(self) -> int: ...

def cpu_isa() -> str: ...
def limit_isa(highest: int) -> None: ...
def num_threads() -> int: ...
def set_num_threads(num_threads: int) -> None: ...
def packed_bytes(format: int, rows: int, cols: int) -> int: ...
def reads_main_memory(device: int) -> bool: ...
def pin(address: int, nbytes: int) -> None: ...
def unpin(address: int, nbytes: int, piece_bytes: int) -> None: ...
def copy_runs_cuda(
    to: int, to_stride: int, from_: int, from_stride: int, run_bytes: int, num_runs: int, stream: int, /
) -> None: ...
def tiled_bytes(format: int, rows: int, cols: int) -> int: ...
def pack_cpu(format: int, raw: int, first_row: int, num_rows: int, cols: int, packed: int, /) -> None: ...
def pack_cuda(
    format: int, raw: int, first_row: int, num_rows: int, cols: int, tiles: int, stream: int, /
) -> None: ...
def dequantize_cuda(
    weights: Sequence[WeightView], out: int, out_stride: int, dtype: int, stream: int, /
) -> None: ...
def embedding_cuda(
    token_ids: int,
    num_tokens: int,
    format: int,
    tiles: int,
    rows: int,
    cols: int,
    out: int,
    stream: int,
    /,
) -> None: ...
def embedding_table_cuda(
    token_ids: int,
    num_tokens: int,
    format: int,
    table: int,
    rows: int,
    cols: int,
    out: int,
    stream: int,
    /,
) -> None: ...
def embedding_cpu(
    token_ids: int, num_tokens: int, format: int, packed: int, rows: int, cols: int, out: int, /
) -> None: ...
def quantize_cuda(
    source_format: int,
    source: int,
    num_values: int,
    format: int,
    blocks: int,
    num_bad: int,
    stream: int,
    /,
) -> None: ...
def quant_matmul_cpu(x: int, num_tokens: int, weights: Sequence[WeightView], out: int, /) -> None: ...
def quant_matmul_cuda(
    q8: int,
    x: int,
    squares: int,
    eps: float,
    num_tokens: int,
    weights: Sequence[WeightView],
    out: int,
    stream: int,
    /,
) -> None: ...
def gated_matmul_cuda(
    q8: int,
    x: int,
    squares: int,
    eps: float,
    num_tokens: int,
    weights: Sequence[WeightView],
    out: int,
    stream: int,
    /,
) -> None: ...
def add_norm_matmul_cuda(
    q8: int,
    x: int,
    num_tokens: int,
    weight: WeightView,
    residual: int,
    norm_weight: int,
    out_q8: int,
    out_x: int,
    out_squares: int,
    stream: int,
    /,
) -> None: ...
def middle_matmul_workspace_bytes() -> int: ...
def middle_matmul_cuda(
    x: int,
    num_rows: int,
    weights: Sequence[WeightView],
    gated: bool,
    out: int,
    out_dtype: int,
    workspace: int,
    stream: int,
    /,
) -> None: ...
def quantize_rows_cuda(x: int, num_tokens: int, cols: int, dtype: int, q8: int, stream: int, /) -> None: ...
def quantize_cpu(
    source_format: int, source: int, num_values: int, format: int, blocks: int, num_bad: int, /
) -> None: ...
def rms_norm_cpu(
    x: int, weight: int, residual: int, out: int, num_tokens: int, width: int, eps: float, /
) -> None: ...
def rms_norm_cuda(
    x: int,
    x_dtype: int,
    weight: int,
    residual: int,
    q8: int,
    bf16: int,
    plain: int,
    num_tokens: int,
    width: int,
    eps: float,
    stream: int,
    /,
) -> None: ...
def sample_workspace_bytes(max_rows: int, vocab_size: int) -> int: ...
def sample_cuda(
    logits: int,
    slots: int,
    positions: int,
    parameters: int,
    forced: int,
    masks: int,
    mask_words: int,
    last_tokens: int,
    records: int,
    workspace: int,
    max_rows: int,
    num_rows: int,
    vocab_size: int,
    greedy_only: bool,
    stream: int,
    /,
) -> None: ...
def sigmoid_mul_cpu(x: int, gate: int, num_values: int, /) -> None: ...
def silu_mul_cpu(gate_up: int, out: int, num_tokens: int, width: int, /) -> None: ...
def silu_mul_cuda(
    gate_up: int, dtype: int, q8: int, bf16: int, num_tokens: int, width: int, stream: int, /
) -> None: ...
def rope_table_cpu(
    positions: int, inv_freq: int, table: int, num_tokens: int, num_pairs: int, magnitude: float, /
) -> None: ...
def rope_append_cpu(
    qkv: int,
    table: int,
    slots: int,
    k_cache: int,
    v_cache: int,
    cache_dtype: int,
    q_out: int,
    q_norm: int,
    k_norm: int,
    eps: float,
    num_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    num_pairs: int,
    interleaved: bool,
    /,
) -> None: ...
def rope_table_cuda(
    positions: int,
    inv_freq: int,
    table: int,
    num_tokens: int,
    num_pairs: int,
    magnitude: float,
    stream: int,
    /,
) -> None: ...
def rope_append_cuda(
    qkv: int,
    qkv_dtype: int,
    qkv_stride: int,
    table: int,
    slots: int,
    k_cache: int,
    v_cache: int,
    cache_dtype: int,
    q_out: int,
    q_norm: int,
    k_norm: int,
    eps: float,
    num_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    num_pairs: int,
    interleaved: bool,
    stream: int,
    /,
) -> None: ...
def is_attention_tiled(head_dim: int, cache_dtype: int, /) -> bool: ...
def attention_cuda(
    q: int,
    k_cache: int,
    v_cache: int,
    cache_dtype: int,
    page_table: int,
    query_start: int,
    kv_lengths: int,
    num_tokens: int,
    num_sequences: int,
    max_pages: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    scale: float,
    first_row: int,
    end_row: int,
    gate: int,
    gate_dtype: int,
    gate_stride: int,
    q8: int,
    bf16: int,
    x: int,
    split_queries: int,
    counters: int,
    partial: int,
    max_splits: int,
    qkv: int,
    qkv_stride: int,
    slots: int,
    table: int,
    q_norm: int,
    k_norm: int,
    eps: float,
    num_pairs: int,
    interleaved: bool,
    stream: int,
    /,
) -> None: ...
def attention_cpu(
    q: int,
    k_cache: int,
    v_cache: int,
    cache_dtype: int,
    page_table: int,
    query_start: int,
    kv_lengths: int,
    out: int,
    num_sequences: int,
    max_pages: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    scale: float,
    /,
) -> None: ...
def gated_delta_net_cpu(
    x: int,
    conv_weight: int,
    decay: int,
    dt_bias: int,
    norm_weight: int,
    conv_states: int,
    states: int,
    state_slots: int,
    query_start: int,
    kv_lengths: int,
    out: int,
    num_tokens: int,
    num_sequences: int,
    num_key_heads: int,
    num_value_heads: int,
    key_head_dim: int,
    value_head_dim: int,
    num_taps: int,
    eps: float,
    tiled: bool,
    /,
) -> None: ...
def gated_delta_net_cuda(
    x: int,
    conv_weight: int,
    decay: int,
    dt_bias: int,
    norm_weight: int,
    conv_states: int,
    states: int,
    state_slots: int,
    query_start: int,
    kv_lengths: int,
    counters: int,
    workspace: int,
    out: int,
    num_tokens: int,
    num_sequences: int,
    settled: bool,
    num_key_heads: int,
    num_value_heads: int,
    key_head_dim: int,
    value_head_dim: int,
    num_taps: int,
    dtype: int,
    form: int,
    eps: float,
    tiled: bool,
    stream: int,
    /,
) -> None: ...
def gated_delta_net_workspace(
    num_tokens: int,
    num_sequences: int,
    num_key_heads: int,
    num_value_heads: int,
    key_head_dim: int,
    value_head_dim: int,
    num_taps: int,
    dtype: int,
    /,
) -> int: ...
def moe_route_cpu(
    logits: int, ids: int, weights: int, num_tokens: int, num_experts: int, top_k: int, normalize: bool, /
) -> None: ...
def moe_mlp_cpu(
    x: int,
    ids: int,
    weights: int,
    gate_up: Sequence[WeightView],
    down: Sequence[WeightView],
    shared: int,
    shared_gate: int,
    out: int,
    num_tokens: int,
    num_experts: int,
    top_k: int,
    /,
) -> None: ...
def moe_route_cuda(
    logits: int,
    ids: int,
    weights: int,
    num_tokens: int,
    num_experts: int,
    top_k: int,
    normalize: bool,
    stream: int,
    /,
) -> None: ...
def moe_few_workspace_bytes(weights: MoeWeights, num_tokens: int, top_k: int) -> int: ...
def moe_few_cuda(
    x: int,
    q8: int,
    squares: int,
    eps: float,
    weights: MoeWeights,
    normalize: bool,
    out: int,
    workspace: int,
    num_tokens: int,
    top_k: int,
    stream: int,
    /,
) -> None: ...
def moe_many_workspace_bytes(weights: MoeWeights, num_tokens: int, top_k: int) -> int: ...
def moe_many_cuda(
    x: int,
    logits: int,
    shared_logits: int,
    weights: MoeWeights,
    normalize: bool,
    shared: int,
    shared_dtype: int,
    out: int,
    out_dtype: int,
    workspace: int,
    num_tokens: int,
    top_k: int,
    stream: int,
    /,
) -> None: ...
def trap_cuda(stream: int) -> None: ...
def spin_cuda(nanoseconds: int, stream: int) -> None: ...
