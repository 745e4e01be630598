"""Rows of a weight matrix, packed or one that a device reads in main memory, looked up by token id."""

import torch
from torch import Tensor

from helexa import _C
from helexa.ops.main_memory import RowTable
from helexa.ops.pack import FORMAT_IDS, PackedWeight
from helexa.ops.tensor import check, on_cuda, stream


def embedding(token_ids: Tensor, weight: PackedWeight | RowTable, *, out: Tensor | None = None) -> Tensor:
    """out[t] = weight[token_ids[t]].

    token_ids: [T] int32, contiguous.   weight: [V, D].   out: [T, D] float32; ids outside [0, V) give zeros.
    All on one device, but for a RowTable.  Raises ValueError if a shape or dtype does not fit.  Capturable:
    allocates only `out`.
    """
    check(token_ids.dtype == torch.int32 and token_ids.ndim == 1, "embedding: token_ids must be [T] int32")
    num_tokens = token_ids.shape[0]
    out = torch.empty(num_tokens, weight.cols, device=token_ids.device) if out is None else out
    check(
        out.shape == (num_tokens, weight.cols) and out.is_contiguous(),
        lambda: f"embedding: out {tuple(out.shape)} is not [{num_tokens}, {weight.cols}]",
    )
    is_table = isinstance(weight, RowTable)
    place = out.device if is_table else weight.data.device
    check(
        token_ids.device == place == out.device and (on_cuda(out) or not is_table),
        lambda: f"embedding: ids on {token_ids.device}, weight on {weight.data.device}, out on {out.device}",
    )
    tail = (stream(out),) if on_cuda(out) else ()
    entry = _C.embedding_table_cuda if is_table else _C.embedding_cuda if tail else _C.embedding_cpu
    entry(
        token_ids.data_ptr(),
        num_tokens,
        FORMAT_IDS[weight.format],
        weight.data.data_ptr(),
        weight.rows,
        weight.cols,
        out.data_ptr(),
        *tail,
    )
    return out


def embedding_reference(token_ids: Tensor, weight: PackedWeight | RowTable) -> Tensor:
    """The same by whole-matrix decoding, where the matrix is."""
    values = weight.dequantize()
    return values[token_ids.long().to(values.device)]
