"""The operations that models are made of: each checks its tensors and calls the extension; `<op>_reference` is its truth in tests.

Only this package (and helexa.parallel) knows the extension.  On the CPU an op runs on a pool of threads that belongs to the calling
thread, as a CUDA stream does.
"""

from helexa._C import cpu_isa, num_threads, set_num_threads
from helexa.ops.embedding import embedding, embedding_reference
from helexa.ops.graph import CpuGraph
from helexa.ops.pack import (
    TILE_ROWS,
    PackedWeight,
    empty_packed,
    pack_rows,
    pack_weight,
    packed_nbytes,
)
from helexa.ops.quant_matmul import quant_matmul, quant_matmul_reference

__all__ = [
    "TILE_ROWS",
    "CpuGraph",
    "PackedWeight",
    "cpu_isa",
    "embedding",
    "embedding_reference",
    "empty_packed",
    "num_threads",
    "pack_rows",
    "pack_weight",
    "packed_nbytes",
    "quant_matmul",
    "quant_matmul_reference",
    "set_num_threads",
]
