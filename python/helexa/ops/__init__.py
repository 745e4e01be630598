"""The operations that models are made of: each checks its tensors and calls the extension.

`<op>_reference` is an op's truth in tests.  Only this package (and helexa.parallel) knows the extension.
On the CPU an op runs on a pool of threads that belongs to the calling thread, as a CUDA stream does.
"""

from helexa._C import CudaError, cpu_isa, has_cuda, num_threads, set_num_threads
from helexa.ops.activation import (
    MAX_MATVEC_ROWS,
    Activation,
    Rows,
    as_float,
    empty_activation,
    quantize_rows,
)
from helexa.ops.attention import (
    MAX_SPLIT_BYTES,
    PAGE_TOKENS,
    attention,
    attention_reference,
    cache_shape,
)
from helexa.ops.dequantize import (
    SCRATCH_BYTES,
    dequantize_rows,
    unpacked_matmul,
    unpacked_matmul_reference,
)
from helexa.ops.device_memory import captured, free_unused
from helexa.ops.embedding import embedding, embedding_reference
from helexa.ops.gated_delta_net import DeltaParameters, gated_delta_net, gated_delta_net_reference
from helexa.ops.graph import CpuGraph
from helexa.ops.main_memory import RowTable, copy_across, empty_table, reads_main_memory
from helexa.ops.matmul_add_norm import matmul_add_norm, matmul_add_norm_reference
from helexa.ops.moe import (
    FLOAT_FORMATS,
    SharedExpert,
    moe_mlp,
    moe_mlp_reference,
    moe_route,
    moe_route_reference,
    sparse_moe,
    sparse_moe_reference,
)
from helexa.ops.pack import (
    TILE_ROWS,
    Arena,
    DeviceArena,
    PackedWeight,
    RowBlocks,
    WeightArena,
    empty_packed,
    is_tiled,
    pack_rows,
    pack_weight,
    packed_nbytes,
)
from helexa.ops.quant_matmul import MAX_MIDDLE_ROWS, gated_matmul, quant_matmul, quant_matmul_reference
from helexa.ops.quantize import ENCODED, quantize, quantize_on_device
from helexa.ops.rms_norm import MAX_CUDA_WIDTH, rms_norm, rms_norm_reference
from helexa.ops.rope import rope_append, rope_append_reference, rope_table, rope_table_reference
from helexa.ops.rope_attention import rope_attention
from helexa.ops.sample import (
    ANY_TOKEN,
    FORCED,
    MASKED_TOKENS,
    MAX_VOCABULARY,
    NOT_FINITE,
    SAMPLE_PARAMETERS,
    SAMPLE_RECORD,
    SAMPLED,
    WEIGHT_ONE,
    sample,
    sample_workspace,
    sample_workspace_bytes,
)
from helexa.ops.sigmoid_mul import sigmoid_mul, sigmoid_mul_reference
from helexa.ops.silu_mul import silu_mul, silu_mul_reference
from helexa.ops.weight_loader import SLOT_BYTES, UnfitValues, WeightLoader, default_readers, keep_slots
from helexa.ops.weight_loader import Source as WeightSource

__all__ = [
    "ANY_TOKEN",
    "ENCODED",
    "FLOAT_FORMATS",
    "FORCED",
    "MASKED_TOKENS",
    "MAX_CUDA_WIDTH",
    "MAX_MATVEC_ROWS",
    "MAX_MIDDLE_ROWS",
    "MAX_SPLIT_BYTES",
    "MAX_VOCABULARY",
    "NOT_FINITE",
    "PAGE_TOKENS",
    "SAMPLED",
    "SAMPLE_PARAMETERS",
    "SAMPLE_RECORD",
    "SCRATCH_BYTES",
    "SLOT_BYTES",
    "TILE_ROWS",
    "WEIGHT_ONE",
    "Activation",
    "Arena",
    "CpuGraph",
    "CudaError",
    "DeltaParameters",
    "DeviceArena",
    "PackedWeight",
    "RowBlocks",
    "RowTable",
    "Rows",
    "SharedExpert",
    "UnfitValues",
    "WeightArena",
    "WeightLoader",
    "WeightSource",
    "as_float",
    "attention",
    "attention_reference",
    "cache_shape",
    "captured",
    "copy_across",
    "cpu_isa",
    "default_readers",
    "dequantize_rows",
    "embedding",
    "embedding_reference",
    "empty_activation",
    "empty_packed",
    "empty_table",
    "free_unused",
    "gated_delta_net",
    "gated_delta_net_reference",
    "gated_matmul",
    "has_cuda",
    "is_tiled",
    "keep_slots",
    "matmul_add_norm",
    "matmul_add_norm_reference",
    "moe_mlp",
    "moe_mlp_reference",
    "moe_route",
    "moe_route_reference",
    "num_threads",
    "pack_rows",
    "pack_weight",
    "packed_nbytes",
    "quant_matmul",
    "quant_matmul_reference",
    "quantize",
    "quantize_on_device",
    "quantize_rows",
    "reads_main_memory",
    "rms_norm",
    "rms_norm_reference",
    "rope_append",
    "rope_append_reference",
    "rope_attention",
    "rope_table",
    "rope_table_reference",
    "sample",
    "sample_workspace",
    "sample_workspace_bytes",
    "set_num_threads",
    "sigmoid_mul",
    "sigmoid_mul_reference",
    "silu_mul",
    "silu_mul_reference",
    "sparse_moe",
    "sparse_moe_reference",
    "unpacked_matmul",
    "unpacked_matmul_reference",
]
