"""Token embedding, read row by row: from the packed matrix that a tied head shares, or from main memory."""

from torch import Tensor

from helexa import ops


class Embedding:
    """weight[token_ids] as float32 [T, hidden_size]."""

    def __init__(self, weight: ops.PackedWeight | ops.RowTable):
        self.weight = weight

    def __call__(self, token_ids: Tensor) -> Tensor:
        return ops.embedding(token_ids, self.weight)
